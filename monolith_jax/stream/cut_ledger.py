"""From which cut on a stream must be read again for the same state.

In: of each cut, until when any of its events matters, and the watermarks. Out: the oldest cut that is needed.

Say an event *matters* while it would be kept, whether it was or not. What is held now came from the cuts since the first one of
which something matters. But whether an impression was taken depends on those of its key that mattered when it came; whether an
action had been taken by an earlier impression, on those that mattered when that action came. So three such steps back are
needed, and one cut more, which tells the watermark. With events in order that is three windows.
"""

from __future__ import annotations

from typing import NamedTuple

_NEVER = -(2**63)


class _Cut(NamedTuple):
    number: int
    matters_until: int
    first_mattering: int
    """Number of the first cut of which something mattered when this one came."""


class CutLedger:
    """Remembers the cuts that may be needed."""

    def __init__(self) -> None:
        """Knows no cut."""
        self._cuts: list[_Cut] = []

    def begin(self, number: int, watermark_ms: int) -> None:
        """Begins a cut; `watermark_ms` is that of the cut before.

        Raises:
            ValueError: The number is not larger than the one before.
        """
        if self._cuts and number <= self._cuts[-1].number:
            raise ValueError(f"Joiner.join: cut {number} comes after cut {self._cuts[-1].number}; numbers must ascend")
        oldest = self.oldest(watermark_ms)
        self._cuts = [cut for cut in self._cuts if cut.number >= oldest]
        first = next((cut.number for cut in self._cuts if cut.matters_until > watermark_ms), number)
        self._cuts.append(_Cut(number, _NEVER, first))

    def add(self, matters_until_ms: int) -> None:
        """Tells that an event of the cut that was begun matters until the watermark reaches a time."""
        cut = self._cuts[-1]
        self._cuts[-1] = cut._replace(matters_until=max(cut.matters_until, matters_until_ms))

    def oldest(self, watermark_ms: int) -> int:
        """Returns the oldest cut that is needed, the last one if nothing matters; 0: there was none."""
        if not self._cuts:
            return 0
        numbers = [cut.number for cut in self._cuts]
        first = next((at for at, cut in enumerate(self._cuts) if cut.matters_until > watermark_ms), None)
        if first is None:
            return numbers[-1]
        for _ in range(2):
            first = next(at for at, number in enumerate(numbers) if number >= self._cuts[first].first_mattering)
        return numbers[max(first - 1, 0)]
