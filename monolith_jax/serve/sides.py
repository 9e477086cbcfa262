"""Two copies of a state: one is read, the other one changed, then they change places ("left-right").

Readers never wait and never see half a change; a change waits for the readers of the old copy (Ramalhete and Correia 2015,
"Brief announcement: Left-Right, a concurrency control technique with wait-free population oblivious reads").
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")

_WAIT_S = 50e-6


class Sides(Generic[T]):
    """A copy that is read and an idle one. One thread at a time swaps; any number read."""

    def __init__(self, live: T, idle: T) -> None:
        """Takes over two copies."""
        self._live, self._idle = (live, set[object]()), (idle, set[object]())

    @property
    def live(self) -> T:
        """The copy that is read, for what never changes in parts."""
        return self._live[0]

    @property
    def idle(self) -> T:
        """The copy that nobody reads."""
        return self._idle[0]

    @contextmanager
    def read(self) -> Iterator[T]:
        """Gives the live copy, which stays as it is as long as this lasts. Not for long: changes wait for it."""
        token = object()
        while True:
            side = self._live
            # Single operations of sets and attributes are atomic. Who comes between a look and a swap notices here, and leaves
            # before having read anything.
            side[1].add(token)
            if side is self._live:
                break
            side[1].discard(token)
        try:
            yield side[0]
        finally:
            side[1].discard(token)

    def swap(self) -> T:
        """Makes the idle copy the one that is read; returns the other one once nobody reads it."""
        self._live, self._idle = self._idle, self._live
        while self._idle[1]:
            time.sleep(_WAIT_S)
        return self._idle[0]
