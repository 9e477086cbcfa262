"""A stream as a point of a sweep reads it that learns a part of it before the rest.

In: a source that is read once. Out: its first examples, in one or more passes, then the others, as a continuation of the last
pass: histories, counters and time go on from there. No batch has examples of both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from monolith_jax.stream.synthetic import SyntheticSource
from monolith_jax.types import Chunk, Position, Source


class Sizes(NamedTuple):
    """How a stream is cut."""

    first: int
    """Examples of the first part."""
    first_steps: int
    """Batches of all passes over it."""
    rest_steps: int
    """Batches of the rest."""


def sizes(source: Source, share: float, passes: int, batch_size: int) -> Sizes:
    """Returns how a stream is cut; reads it where its examples have to be counted, because rows may be set aside.

    Raises:
        ValueError: The source makes several passes itself, or a part would be empty.
    """
    total = source.num_examples if isinstance(source, SyntheticSource) else None
    if total is None:
        total = 0
        for chunk in source.read({}):
            if chunk.epoch:
                raise ValueError(
                    "the source makes several passes over its data: set its epochs to 1, the point has passes of its own"
                )
            total += chunk.examples.num_rows
    first = math.floor(share * total)
    if not 0 < first < total:
        raise ValueError(
            f"the stream has {total} examples, of which a first part of {share:g} leaves {first} and {total - first}"
        )
    return Sizes(first, passes * math.ceil(first / batch_size), math.ceil((total - first) / batch_size))


@dataclass(frozen=True)
class FirstAndRest:
    """That stream. It is read from its start only."""

    source: Source
    """Read once for each pass and once for the rest."""
    first: int
    """Examples of the first part."""
    passes: int
    """Passes over it."""

    @property
    def num_examples(self) -> int | None:
        """Examples from start to end."""
        total = self.source.num_examples
        return None if total is None else total + (self.passes - 1) * self.first

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from the start."""
        if position:
            raise ValueError(f"this stream is read from its start, not from {dict(position)}")
        for number in range(self.passes - 1):
            for chunk, left in self._with_left():
                yield dataclasses.replace(
                    chunk, examples=chunk.examples.slice(0, left), epoch=number, position={"pass": number}
                )
                if chunk.examples.num_rows >= left:
                    break
        last = {"epoch": self.passes - 1, "position": {"pass": self.passes - 1}}
        for chunk, left in self._with_left():
            if 0 < left <= chunk.examples.num_rows:
                yield dataclasses.replace(chunk, examples=chunk.examples.slice(0, left), ends_batch=True, **last)
                if left < chunk.examples.num_rows:
                    yield dataclasses.replace(chunk, examples=chunk.examples.slice(left), rejected=(), **last)
            else:
                yield dataclasses.replace(chunk, **last)

    def _with_left(self) -> Iterator[tuple[Chunk, int]]:
        """Yields chunks, and how many examples of the first part are left before each."""
        left = self.first
        for chunk in self.source.read({}):
            yield chunk, left
            left -= chunk.examples.num_rows
