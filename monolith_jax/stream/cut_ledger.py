"""From which cut on a stream must be read again for the same state.

In: of each cut, until when any of its events matters, and the watermarks. Out: the oldest cut that is needed.

Say an event *matters* while it would be kept, whether it was or not. What is held now came from the cuts since the first one of
which something matters. But whether an impression was taken depends on those of its key that mattered when it came; whether an
action had been taken by an earlier impression, on those that mattered when that action came. So three such steps back are
needed, and one cut more, which tells the watermark. With events in order that is three windows.
"""

from __future__ import annotations

import bisect
from operator import attrgetter
from typing import NamedTuple

_NEVER = -(2**63)


class _Cut(NamedTuple):
    number: int
    matters_until: int
    first_mattering: int
    """Number of the first cut of which something mattered when this one came."""


class CutLedger:
    """Remembers the cuts that may be needed. What it is asked costs the same, however many they are."""

    def __init__(self) -> None:
        """Knows no cut."""
        self._cuts: list[_Cut] = []
        self._first = 0
        """Place of the first cut of which something matters, by the highest watermark so far; behind the last: none does."""

    def begin(self, number: int, watermark_ms: int) -> None:
        """Begins a cut; `watermark_ms` is that of the cut before, and never goes back.

        Raises:
            ValueError: The number is not larger than the one before.
        """
        if self._cuts and number <= self._cuts[-1].number:
            raise ValueError(f"Joiner.join: cut {number} comes after cut {self._cuts[-1].number}; numbers must ascend")
        unneeded = self._place(self.oldest(watermark_ms))
        if 2 * unneeded > len(self._cuts):  # Not at every cut: it moves all that are left.
            del self._cuts[:unneeded]
            self._first -= unneeded
        first = self._cuts[self._first].number if self._first < len(self._cuts) else number
        self._cuts.append(_Cut(number, _NEVER, first))

    def add(self, matters_until_ms: int) -> None:
        """Tells that an event of the cut that was begun matters until the watermark reaches a time."""
        cut = self._cuts[-1]
        self._cuts[-1] = cut._replace(matters_until=max(cut.matters_until, matters_until_ms))
        # It may matter again.
        self._first = min(self._first, len(self._cuts) - 1)

    def oldest(self, watermark_ms: int) -> int:
        """Returns the oldest cut that is needed, the last one if nothing matters; 0: there was none."""
        if not self._cuts:
            return 0
        while self._first < len(self._cuts) and self._cuts[self._first].matters_until <= watermark_ms:
            self._first += 1
        if self._first == len(self._cuts):
            return self._cuts[-1].number
        first = self._first
        for _ in range(2):
            first = self._place(self._cuts[first].first_mattering)
        return self._cuts[max(first - 1, 0)].number

    def _place(self, number: int) -> int:
        """Returns the place of the first cut with this number or a higher one."""
        return bisect.bisect_left(self._cuts, number, key=attrgetter("number"))
