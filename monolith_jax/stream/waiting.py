"""Actions whose impression has not come.

In: rows of actions, and the keys of impressions that come. Out: the actions that waited for these, in order of arrival. An
action waits until the watermark reaches its event time + window. Actions are kept by classes of event time, in memory or on
disk, and a router of their own tells which class to look through for an impression.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from monolith_jax.stream.join_input import NO_ACTIONS, keys_of_actions
from monolith_jax.stream.join_kernels import ARRIVAL, BITS, TIME
from monolith_jax.stream.open_rows import Index, Keys, grouped
from monolith_jax.stream.router import BUCKETS, NOWHERE, Router
from monolith_jax.stream.spill import Spill


class Waiting:
    """The actions that wait."""

    def __init__(self, window_ms: int, span_ms: int, spill: Spill) -> None:
        """Holds none.

        Args:
            window_ms: How long after its event time an action waits.
            span_ms: Event time of a class.
            spill: For what does not fit into memory.
        """
        self._window, self._span, self._spill = window_ms, span_ms, spill
        self._parts: dict[int, list[np.ndarray]] = {}
        self._on_disk: set[int] = set()
        self._router = Router(64)
        self.part_bytes = 0
        """Bytes in memory that `spill` can move to disk."""

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self.part_bytes + self._router.num_bytes

    def add(self, actions: np.ndarray) -> None:
        """Adds rows of actions, int64 [N, 6]."""
        if not len(actions):
            return
        classes = actions[:, TIME] // self._span
        for number, places in grouped(classes):
            self._put(number, actions[places])
        self._router.insert(keys_of_actions(actions).hashes, (classes % BUCKETS).astype(np.int32), self._everything)

    def claim(self, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
        """Returns the actions of distinct keys, int64 [M, 6], which wait no more, and which key each has, int64 [M]."""
        suspects = np.flatnonzero(self._router.route(keys.hashes) != NOWHERE)
        which, slots = self._router.candidates(keys.hashes[suspects])
        found, owners = [NO_ACTIONS], [np.empty(0, np.int64)]
        for number in sorted(self._parts) if which.size else ():
            places = suspects[which[slots == number % BUCKETS]]
            if not places.size:
                continue
            actions = self._take(number)
            rows = Index(keys.at(places)).find(keys_of_actions(actions))
            found.append(actions[rows >= 0])
            owners.append(places[rows[rows >= 0]])
            self._put(number, actions[rows < 0])
            self._forget(number, found[-1])
        claimed, whose = np.concatenate(found), np.concatenate(owners)
        order = np.argsort(claimed[:, BITS] >> ARRIVAL)
        return claimed[order], whose[order]

    def expire(self, watermark_ms: int) -> int:
        """Drops the actions that are not to wait longer; returns how many."""
        number_gone = 0
        for number in [one for one in self._parts if one * self._span + self._window <= watermark_ms]:
            actions = self._take(number)
            expired = actions[:, TIME] + self._window <= watermark_ms
            self._put(number, actions[~expired])
            self._forget(number, actions[expired])
            number_gone += int(np.count_nonzero(expired))
        return number_gone

    def spill(self) -> None:
        """Moves all actions to disk."""
        for number, parts in self._parts.items():
            if parts:
                self._spill.append(_file(number), parts)
                self._on_disk.add(number)
                self._parts[number] = []
        self.part_bytes = 0

    def _put(self, number: int, actions: np.ndarray) -> None:
        if len(actions):
            self._parts.setdefault(number, []).append(actions)
            self.part_bytes += actions.nbytes

    def _take(self, number: int) -> np.ndarray:
        """Returns the actions of a class and drops them."""
        parts = [self._read(number), *self._parts.pop(number)]
        self.part_bytes -= sum(part.nbytes for part in parts[1:])
        if number in self._on_disk:
            self._on_disk.remove(number)
            self._spill.remove(_file(number))
        return np.concatenate(parts)

    def _read(self, number: int) -> np.ndarray:
        return self._spill.array(_file(number)).reshape(-1, 6) if number in self._on_disk else NO_ACTIONS

    def _forget(self, number: int, actions: np.ndarray) -> None:
        hashes = keys_of_actions(actions).hashes
        self._router.remove(hashes, np.full(hashes.size, number % BUCKETS, np.int32))

    def _everything(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number, parts in self._parts.items():
            for part in (self._read(number), *parts):
                yield keys_of_actions(part).hashes, np.full(len(part), number % BUCKETS, np.int32)


def _file(number: int) -> str:
    return f"{number}.waiting"
