"""A stream divided into partitions, a property of the run: any number of processes that divides them reads the same batches.

In: a `Source`, and how many partitions. Out: the `Source` of one of them. A user's examples are all in one partition, so that
histories and counters of users are whole; a stream without users is dealt out chunk by chunk. Each partition reads the whole
stream and keeps its part, unless files are dealt out (`ColumnsConfig.divide`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from monolith_jax.stream.columns import ColumnsSource
from monolith_jax.stream.history import ids_of
from monolith_jax.types import Chunk, Position, Source

_M = np.uint64(0x9E3779B97F4A7C15)


def partitions_of(ids: np.ndarray, number: int) -> np.ndarray:
    """Returns which of `number` partitions each id belongs to, int64 [B]. Ids together in 12 of them are so in 4, 3 and 2.

    Args:
        ids: int64 [B].
        number: How many partitions there are.
    """
    return (((ids.view(np.uint64) * _M) >> np.uint64(32)) % np.uint64(number)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class DealtOut:
    """What belongs to one partition of a source."""

    source: Source
    index: int
    number: int
    user_column: str

    @property
    def num_examples(self) -> int | None:
        """Not known before reading."""
        return None

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields its examples from `position` on; raises what the source raises. Rejected rows are partition 0's."""
        turn = position.get("turn", 0)
        for chunk in self.source.read(position.get("position", {})):
            mine = self._of_users(chunk.examples) if self.user_column in chunk.examples.schema.names else None
            examples = chunk.examples.slice(0, len(chunk.examples) * (turn == self.index)) if mine is None else mine
            turn = (turn + 1) % self.number
            place = {"position": dict(chunk.position), "turn": turn}
            yield Chunk(examples, () if self.index else chunk.rejected, place, chunk.epoch)

    def _of_users(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        ids, _ = ids_of(examples, self.user_column, "the column of users, HistoryConfig.user_column,")
        return examples.filter(pa.array(partitions_of(ids, self.number) == self.index))


def partition(source: Source, index: int, number: int, user_column: str = "user_id") -> Source:
    """Returns one partition of a source.

    Args:
        source: The whole stream.
        index: Which partition, from 0.
        number: How many there are.
        user_column: What histories go by: rows with the same value are in one partition.
    """
    if number == 1:
        return source
    if isinstance(source, ColumnsSource) and source.config.divide == "files":
        return dataclasses.replace(source, index=index, number=number)
    return DealtOut(source, index, number, user_column)
