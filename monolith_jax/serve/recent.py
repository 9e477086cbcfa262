"""The newest items of each slot: the last videos of a user, the last uploads of an author.

In: items with times, by slot (`id_slots`). Out: the newest `length` of each slot, newest first. An item that comes out of order
goes where its time says. With marks, an item has bits that say what was done to it, and the largest play time that was told.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.lines import jit


@jit
def _find(items, head, size, item):
    # The place of the newest entry of an item in one slot's ring, -1 if there is none. head: the place after the newest.
    for k in range(size):
        place = head - 1 - k if head > k else head - 1 - k + items.size
        if items[place] == item:
            return place
    return -1


@jit
def _num_newer(times, head, size, time):
    # How many entries of one slot's ring are newer than a time.
    for k in range(size):
        place = head - 1 - k if head > k else head - 1 - k + times.size
        if times[place] <= time:
            return k
    return size


@jit
def _make_room(values, head, newer):
    # Moves the newest entries of one slot's ring on by one place.
    to = head
    for _ in range(newer):
        place = to - 1 if to > 0 else values.size - 1
        values[to] = values[place]
        to = place


@jit
def _add(slots, items, times, marks, play_ms, skip, repeats, ring_items, ring_times, ring_marks, ring_play_ms, heads, sizes):
    # In order. Returns how many items came too late for a full ring.
    length, marked, late = ring_items.shape[1], ring_marks.shape[1] > 0, 0
    for i in range(slots.size):
        slot = slots[i]
        if slot < 0:
            continue
        head, size = np.int64(heads[slot]), np.int64(sizes[slot])
        at = np.int64(-1) if repeats else _find(ring_items[slot], head, size, items[i])
        if at >= 0:
            if marked and play_ms[i] > ring_play_ms[slot, at]:
                # The largest play time counts: it says whether this was a skip.
                ring_play_ms[slot, at] = play_ms[i]
                ring_marks[slot, at] = (ring_marks[slot, at] & ~skip) | marks[i]
            elif marked:
                ring_marks[slot, at] |= marks[i] & ~skip
            continue
        newer = _num_newer(ring_times[slot], head, size, times[i])
        if newer == length:
            late += 1
            continue
        _make_room(ring_items[slot], head, newer)
        _make_room(ring_times[slot], head, newer)
        at = head - newer if head >= newer else head - newer + length
        ring_items[slot, at], ring_times[slot, at] = items[i], times[i]
        if marked:
            _make_room(ring_marks[slot], head, newer)
            _make_room(ring_play_ms[slot], head, newer)
            ring_marks[slot, at], ring_play_ms[slot, at] = marks[i], play_ms[i]
        heads[slot] = head + 1 if head + 1 < length else 0
        sizes[slot] = min(size + 1, length)
    return late


@jit
def _newest(slots, before, most, ring_items, ring_times, ring_marks, heads, sizes, items, times, marks, lengths):
    # before int64 [N]; items, times int64 [N * most], marks [N * most] or [0] out, filled without gaps; returns how many.
    length, total = ring_items.shape[1], 0
    for i in range(slots.size):
        slot, start = slots[i], total
        for k in range(sizes[slot] if slot >= 0 else 0):
            if total - start == most:
                break
            place = heads[slot] - 1 - k if heads[slot] > k else heads[slot] - 1 - k + length
            if ring_times[slot, place] < before[i]:
                items[total], times[total] = ring_items[slot, place], ring_times[slot, place]
                if ring_marks.shape[1]:
                    marks[total] = ring_marks[slot, place]
                total += 1
        lengths[i] = total - start
    return total


@jit
def _drop(slots, items, ring_items, ring_times, heads, sizes):
    # Takes items out of rings without marks, those behind them move up.
    length = ring_items.shape[1]
    for i in range(slots.size):
        slot = slots[i]
        if slot < 0:
            continue
        kept = 0
        for k in range(sizes[slot]):
            place = (heads[slot] - 1 - k) % length
            if ring_items[slot, place] != items[i]:
                to = (heads[slot] - 1 - kept) % length
                ring_items[slot, to], ring_times[slot, to] = ring_items[slot, place], ring_times[slot, place]
                kept += 1
        sizes[slot] = kept


class RecentItems:
    """The rings of all slots. One caller at a time."""

    def __init__(self, num_slots: int, length: int, marked: bool = False) -> None:
        """Makes empty rings of `length` items; `marked`: with marks."""
        self.items = np.zeros((num_slots, length), np.int64)
        self.times = np.zeros((num_slots, length), np.int64)
        self.marks = np.zeros((num_slots, length if marked else 0), np.uint8)
        self.play_ms = np.zeros((num_slots, length if marked else 0), np.int32)
        self.heads = np.zeros(num_slots, np.int32)
        self.sizes = np.zeros(num_slots, np.int32)

    def clear(self, slots: np.ndarray) -> None:
        """Empties slots, int64 [M]."""
        self.sizes[slots] = 0

    def add(
        self,
        slots: np.ndarray,
        items: np.ndarray,
        times: np.ndarray,
        marks: np.ndarray | None = None,
        play_ms: np.ndarray | None = None,
        skip: int = 0,
        repeats: bool = False,
    ) -> int:
        """Adds items in order.

        Args:
            slots: int64 [N]; -1: passed over.
            items: int64 [N].
            times: int64 [N]; among equal times what comes later is newer.
            marks: uint8 [N], what was done; needed with marks. Bits are only ever set, but for `skip`.
            play_ms: int32 [N], the play time that says so, -1: none; needed with marks.
            skip: The bit that only the largest play time sets or clears.
            repeats: Whether an item that is there is added once more; else it stays where it is, and has more marks.

        Returns:
            How many items were older than all that their full rings hold, and are not kept.
        """
        none = np.zeros(0, np.uint8)
        return _add(
            slots, items, times, none if marks is None else marks, none.astype(np.int32) if play_ms is None else play_ms,
            np.uint8(skip), repeats, self.items, self.times, self.marks, self.play_ms, self.heads, self.sizes,
        )  # fmt: skip

    def newest(self, slots: np.ndarray, before: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns the newest items of slots.

        Args:
            slots: int64 [N]; -1: it has none.
            before: int64 [N], only items of earlier times.
            most: At most so many of each.

        Returns:
            int64 [T] items, newest first within each slot, int64 [T] their times, uint8 [T] their marks ([0] without marks),
            and int32 [N], how many each slot has.
        """
        most = min(most, self.items.shape[1])
        items, times = np.empty(slots.size * most, np.int64), np.empty(slots.size * most, np.int64)
        marks = np.empty(items.size if self.marks.shape[1] else 0, np.uint8)
        lengths = np.empty(slots.size, np.int32)
        total = _newest(
            slots, before, most, self.items, self.times, self.marks, self.heads, self.sizes, items, times, marks, lengths
        )
        return items[:total], times[:total], marks[:total], lengths

    def drop(self, slots: np.ndarray, items: np.ndarray) -> None:
        """Takes items, int64 [N], out of slots, int64 [N]; only without marks."""
        assert not self.marks.shape[1]
        _drop(slots, items, self.items, self.times, self.heads, self.sizes)


def recent_bytes(num_slots: int, length: int, marked: bool = False) -> int:
    """Returns the bytes of the arrays of `RecentItems`."""
    return num_slots * (length * (21 if marked else 16) + 8)
