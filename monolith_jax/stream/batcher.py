"""Chunks of a stream to batches of fixed size, read ahead in a thread (the only file of `stream` that imports grain).

In: a `Source`. Out: a grain iterator of `Batch`es; `get_state` says where the next batch starts, `set_state` goes there. A
batch never spans two passes over the data (epochs), so the last one of a pass may be short; and a live stream ends batches
that have waited long enough, be they empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grain
import pyarrow as pa

from monolith_jax.stream.run_schema import concatenated
from monolith_jax.types import Chunk, Rejected, Source


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring examples of a stream."""

    examples: pa.RecordBatch
    """At most B of them; none, and no columns, where all that was read was set aside, or nothing came for a while."""
    rejected: tuple[Rejected, ...]
    """Rows set aside in the chunks that this batch was the first to read."""
    epoch: int
    """Pass over the data."""
    is_idle: bool = False
    """Whether it is empty because nothing came for a while: a turn in which others go on without this partition."""
    told: Mapping[str, float] = field(default_factory=dict)
    """What a live stream told last of itself."""


MAX_REJECTED = 10_000
"""A batch is cut when this many rows were set aside while it was filled, so that memory stays bounded."""


class _BatchIterator(grain.DatasetIterator[Batch]):
    """Cuts chunks into batches. Its state is the position of a chunk and a row in it: small, as grain copies it each time."""

    def __init__(self, source: Source, batch_size: int) -> None:
        super().__init__()
        self._source = source
        self._batch_size = batch_size
        self._position: Any = {}
        self._row = 0
        self._chunks: Iterator[Chunk] | None = None
        self._chunk: Chunk | None = None

    def __next__(self) -> Batch:
        before = self.get_state()
        try:
            batch = self._cut()
        except Exception:
            self.set_state(before)  # What was read of the batch is read again: an error loses no example.
            raise
        if batch is None:
            raise StopIteration
        return batch

    def _cut(self) -> Batch | None:
        pieces: list[pa.RecordBatch] = []
        rejected: list[Rejected] = []
        missing, epoch, ended = self._batch_size, 0, False
        told: Mapping[str, float] = {}
        while missing and not ended and len(rejected) < MAX_REJECTED:
            chunk = self._current_chunk()
            if chunk is None or (pieces and chunk.epoch != epoch):
                break
            if self._row == 0:
                rejected += chunk.rejected
            piece = chunk.examples.slice(self._row, missing)
            epoch, told = chunk.epoch, chunk.told
            if piece.num_rows:
                pieces.append(piece)
                missing -= piece.num_rows
            self._row += piece.num_rows
            if self._row == chunk.examples.num_rows:
                ended = chunk.ends_batch
                self._position, self._row, self._chunk = chunk.position, 0, None
        if not pieces and not rejected and not ended:
            return None
        examples = concatenated(pieces) if pieces else pa.RecordBatch.from_pylist([])
        return Batch(examples, tuple(rejected), epoch, ended and not pieces, told)

    def _current_chunk(self) -> Chunk | None:
        if self._chunks is None:
            self._chunks = self._source.read(self._position)
        if self._chunk is None:
            self._chunk = next(self._chunks, None)
        return self._chunk

    def get_state(self) -> dict[str, Any]:
        return {"position": dict(self._position), "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._position, self._row = state["position"], state["row"]
        self._chunks = self._chunk = None


class _Batches(grain.IterDataset[Batch]):
    def __init__(self, source: Source, batch_size: int) -> None:
        super().__init__()
        self._source = source
        self._batch_size = batch_size

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _BatchIterator(self._source, self._batch_size)


def batches(source: Source, batch_size: int, read_ahead: int = 4) -> grain.DatasetIterator[Batch]:
    """Returns the batches of a source. Close it after use.

    Args:
        source: Where examples come from.
        batch_size: B.
        read_ahead: Batches that a thread keeps ready; 0: none, reading happens when a batch is asked for.
    """
    dataset = _Batches(source, batch_size)
    if read_ahead:
        return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=read_ahead))
    return iter(dataset)
