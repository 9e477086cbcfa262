"""Which impression a play belongs to, while both are fresh.

In: impressions and plays, in any order, and how far time has gone. Out: of each play the duration of the video that was shown,
once the time of the play is past. Request and video are what they are matched by. Memory is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from monolith_jax.ids.lines import jit, prefetch
from monolith_jax.stream.join_kernels import build_index, find, hash_keys

REQUEST, VIDEO, TIME, DURATION = range(4)
_AHEAD = 16
_FIRST_ROOM = 2**12


@jit
def _insert(fresh, hashes, kept, table, floor_ms, size):
    """Keeps impressions, in order; returns how many rows there are then.

    Args:
        fresh: int64 [4, N].
        hashes: uint64 [N].
        kept: int64 [4, R], of which `size` are in use. It has room.
        table: int32 of a power of two: the index of what is kept.
        floor_ms: What is older counts as forgotten.
        size: Rows in use.
    """
    mask = np.uint64(table.size - 1)
    for i in range(hashes.size):
        if i + _AHEAD < hashes.size:
            prefetch(np.int64(table.ctypes.data) + np.int64(4) * np.int64(hashes[i + _AHEAD] & mask))
        if fresh[2, i] < floor_ms:
            continue
        at = hashes[i] & mask
        while True:
            row = table[at]
            if row < 0:
                table[at] = size
                for k in range(4):
                    kept[k, size] = fresh[k, i]
                size += 1
                break
            if kept[0, row] == fresh[0, i] and kept[1, row] == fresh[1, i]:
                # What was told twice counts from its first time on.
                if kept[2, row] < floor_ms or fresh[2, i] < kept[2, row]:
                    kept[2, row], kept[3, row] = fresh[2, i], fresh[3, i]
                break
            at = (at + np.uint64(1)) & mask
    return size


class OpenImpressions:
    """The impressions that plays may still come for, and the plays whose time has not come.

    Not thread safe: one caller at a time.
    """

    def __init__(self, interval_ms: int, max_impressions: int) -> None:
        """Keeps nothing yet. A play belongs to an impression that was at most `interval_ms` before it."""
        self._interval_ms, self._max = interval_ms, max_impressions
        self._counts = {"forgotten": np.zeros(1, np.int64), "unmatched": np.zeros(1, np.int64)}
        self._waiting: list[np.ndarray] = []
        self._take(np.empty((4, 0), np.int64))

    @property
    def num_forgotten(self) -> int:
        """Impressions so far that had to go before their time, since there were `max_impressions`."""
        return int(self._counts["forgotten"][0])

    @property
    def num_unmatched(self) -> int:
        """Plays so far that no impression was found for."""
        return int(self._counts["unmatched"][0])

    def add_impressions(self, impressions: np.ndarray, watermark_ms: int) -> None:
        """Keeps impressions, int64 [4, N]: request, video, time and duration (0: unknown)."""
        floor_ms = watermark_ms - self._interval_ms
        # In parts that are no larger than the room that there can be.
        for start in range(0, impressions.shape[1], self._max):
            part = np.ascontiguousarray(impressions[:, start : start + self._max])
            number = part.shape[1]
            self._make_room(number, floor_ms)
            hashes = np.empty(number, np.uint64)
            hash_keys(part[REQUEST], part[VIDEO], hashes)
            self._size = _insert(part, hashes, self._kept, self._table, floor_ms, self._size)

    def add_plays(self, plays: np.ndarray) -> None:
        """Keeps plays, int64 [4, N]: request, video, time and how long it was played."""
        if plays.shape[1]:
            self._waiting.append(plays)

    def due(self, watermark_ms: int, before_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the plays whose time is past, int64 [4, N], and the durations of their videos, int64 [N] (0: unknown).

        Args:
            watermark_ms: Plays up to this time are due: no impression that was before them is still to come.
            before_ms: The watermark so far: impressions that were forgotten by then match nothing.
        """
        if not self._waiting:
            return np.empty((4, 0), np.int64), np.empty(0, np.int64)
        waiting = np.concatenate(self._waiting, axis=1)
        is_due = waiting[TIME] <= watermark_ms
        later, plays = waiting[:, ~is_due], waiting[:, is_due]
        self._waiting = [later] if later.shape[1] else []
        hashes, rows = np.empty(plays.shape[1], np.uint64), np.empty(plays.shape[1], np.int32)
        hash_keys(plays[REQUEST], plays[VIDEO], hashes)
        kept = self._kept
        find(plays[REQUEST], plays[VIDEO], hashes, kept[REQUEST], kept[VIDEO], self._table, rows)
        since_ms = plays[TIME] - kept[TIME, rows]
        in_time = (since_ms >= 0) & (since_ms <= self._interval_ms) & (kept[TIME, rows] >= before_ms - self._interval_ms)
        matched = (rows >= 0) & in_time
        self._counts["unmatched"] += np.count_nonzero(~matched)
        return plays[:, matched], kept[DURATION, rows[matched]]

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of everything."""
        waiting = np.concatenate([np.empty((4, 0), np.int64), *self._waiting], axis=1)
        counts = {name: array.copy() for name, array in self._counts.items()}
        room = np.array([self._room], np.int64)
        return {"impressions": self._kept[:, : self._size].copy(), "room": room, "plays": waiting, **counts}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned."""
        self._take(state["impressions"], room=int(state["room"][0]))
        self._waiting = [state["plays"].copy()] if state["plays"].shape[1] else []
        for name, array in self._counts.items():
            array[:] = state[name]

    def _make_room(self, number: int, floor_ms: int) -> None:
        """Makes room for so many more: drops what is too old, then grows, then drops what came first."""
        if self._size + number <= self._room:
            return
        kept = self._kept[:, : self._size]
        kept = kept[:, kept[TIME] >= floor_ms]
        if (too_many := kept.shape[1] + number - self._max) > 0:
            # More than needed: dropping costs as much as there is.
            too_many = min(max(too_many, self._max // 4), kept.shape[1])
            self._counts["forgotten"] += too_many
            kept = kept[:, too_many:]
        self._take(kept, number)

    def _take(self, kept: np.ndarray, more: int = 0, room: int = 0) -> None:
        """Keeps these and nothing else, with room for so many more, or so many in all."""
        self._size = kept.shape[1]
        self._room = room or max(min(self._max, max(2 * (self._size + more), _FIRST_ROOM)), self._size + more)
        self._kept = np.zeros((4, self._room), np.int64)
        self._kept[:, : self._size] = kept
        self._table = np.empty(1 << (2 * self._room - 1).bit_length(), np.int32)
        hashes = np.empty(self._size, np.uint64)
        kept = self._kept[:, : self._size]
        hash_keys(kept[REQUEST], kept[VIDEO], hashes)
        build_index(kept[REQUEST], kept[VIDEO], hashes, self._table, np.empty(self._size, np.int32))
