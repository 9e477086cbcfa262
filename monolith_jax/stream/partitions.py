"""A stream divided into partitions, a property of the run: any number of processes that divides them reads the same batches.

In: a `Source`, and how many partitions. Out: the `Source` of one of them. Chunks are dealt out in turn, so that all partitions
are at the same time of the stream. Each reads the whole stream and keeps its chunks, but for the synthetic world and for files
that are dealt out whole (`ColumnsConfig.divide`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from monolith_jax.stream.columns import ColumnsSource
from monolith_jax.stream.synthetic import SyntheticSource
from monolith_jax.types import Chunk, Position, Source


@dataclass(frozen=True, slots=True)
class DealtChunks:
    """Every `number`-th chunk of a source, from the `index`-th on."""

    source: Source
    index: int
    number: int

    @property
    def num_examples(self) -> int | None:
        """Not known before reading: chunks are dealt out, not examples."""
        return None

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields its chunks from `position` on; raises what the source raises."""
        turn = position.get("turn", 0)
        for chunk in self.source.read(position.get("position", {})):
            mine, turn = turn == self.index, (turn + 1) % self.number
            if mine:
                yield dataclasses.replace(chunk, position={"position": dict(chunk.position), "turn": turn})


def partition(source: Source, index: int, number: int) -> Source:
    """Returns one partition of a source.

    Args:
        source: The whole stream.
        index: Which partition, from 0.
        number: How many there are.

    Raises:
        ValueError: There are fewer files than partitions where files are dealt out.
    """
    if number == 1:
        return source
    match source:
        case SyntheticSource():
            return dataclasses.replace(source, index=index, number=number)
        case ColumnsSource() if source.config.divide == "files":
            return dataclasses.replace(source, index=index, number=number)
        case _:
            return DealtChunks(source, index, number)
