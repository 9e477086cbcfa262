"""What versions changed in some tables, for who keeps something made from their rows: an index, a catalogue.

In: each version as it comes to be served, and the copy before it. Out: the ids that were written, and those that are gone,
since they were last asked for. An id that came and went in between is neither. So what is kept of a table is at most the ids
that it had when it was last asked for and those it has now, however long nobody asks: twice `TableConfig.max_rows`, 10 bytes
each, and as much again before equal ids are taken together.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from monolith_jax.serve.served_copy import Loaded, ServedCopy

_FEW = 1 << 16
"""Ids that are kept with repeats: sorting them at each version would cost more than it spares."""


class Changed(NamedTuple):
    """What changed in a table since the last call. No id is in both."""

    written: np.ndarray
    """int64 [N], distinct: ids whose rows were written, and are there."""
    deleted: np.ndarray
    """int64 [M], distinct: ids that were there at the last call, and are gone."""


class _Noted(NamedTuple):
    ids: np.ndarray
    """int64 [N]"""
    was: np.ndarray
    """bool [N], whether it was there at the last call."""
    is_there: np.ndarray
    """bool [N], whether it is there now."""


_NOTHING = _Noted(np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0, np.bool_))


class _Table:
    def __init__(self) -> None:
        self.sorted, self.later = _NOTHING, list[_Noted]()

    def add(self, noted: _Noted) -> None:
        self.later.append(noted)
        if sum(one.ids.size for one in self.later) > max(_FEW, self.sorted.ids.size):
            self.merge()

    def merge(self) -> None:
        """Takes the notes of each id together: the first tells what was, the last what is."""
        ids, was, is_there = (np.concatenate(parts) for parts in zip(self.sorted, *self.later, strict=True))
        distinct, first = np.unique(ids, return_index=True)
        last = ids.size - 1 - np.unique(ids[::-1], return_index=True)[1]
        matters = was[first] | is_there[last]
        self.sorted = _Noted(distinct[matters], was[first][matters], is_there[last][matters])
        self.later = []


class Changes:
    """The changes of the tables that are followed. One thread notes, any take."""

    def __init__(self, tables: Sequence[str]) -> None:
        """Starts with no table having any id."""
        self._tables = {name: _Table() for name in tables}
        self._lock = threading.Lock()

    def note(self, before: ServedCopy | None, loaded: Loaded) -> None:
        """Notes a version that is served now.

        Args:
            before: What was served before it; None: nothing.
            loaded: The version.
        """
        for name in self._tables:
            rows, gone = loaded.content.rows.get(name), loaded.content.deleted.get(name, _NOTHING.ids)
            if loaded.manifest.kind == "base":
                gone = _NOTHING.ids if before is None else before.ids(name)
            written = _NOTHING.ids if rows is None else rows.ids
            ids = np.concatenate([gone, written])
            was = np.zeros(ids.size, np.bool_) if before is None else before.has(name, ids)
            noted = _Noted(ids, was, np.arange(ids.size) >= gone.size)
            with self._lock:
                self._tables[name].add(noted)

    def take(self, table: str) -> Changed:
        """Returns what changed since the last call; all that there is, at the first one.

        Raises:
            ValueError: The table is not followed.
        """
        if table not in self._tables:
            followed = ", ".join(self._tables) or "none"
            raise ValueError(f"table {table!r} is not followed (followed: {followed}); give its name to ServedModel's `follow`")
        with self._lock:
            of_table = self._tables[table]
            self._tables[table] = _Table()
        of_table.merge()
        ids, was, is_there = of_table.sorted
        return Changed(ids[is_there], ids[was & ~is_there])
