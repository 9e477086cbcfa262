"""Which rows have changed since the last publication, and which ids have gone.

In: plans, in the order in which they ran. Out: rows with their ids and tables, and ids to delete, by table. Host only.

A publication is two sets that a reader applies in this order: deletions, then rows. So an id whose row was taken and that came
back in between is both, and a row that was given to another id is a deletion of the one and a row of the other. What was taken
is kept until it is known to be durable (`done`), or goes back (`failed`).

Memory: 10 bytes for each row that there can be (id, table, mark), 8 for each row that changed and 12 for each deletion since
the last publication. An id that came and went in between is a deletion too: a run that goes on from in between needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.types import FreedRows, GroupPlan


class GroupRows(NamedTuple):
    """Rows of one group, ascending."""

    rows: np.ndarray
    """int64 [N], place in this process's part of the group, all of its shards one after the other."""
    ids: np.ndarray
    """int64 [N]"""
    tables: np.ndarray
    """int8 [N] (int16 from 128 tables on), index of each id's table in the group."""


class Taken(NamedTuple):
    """What a publication has to hold."""

    groups: tuple[GroupRows, ...]
    deleted: dict[str, np.ndarray]
    """int64 ids by table, ascending; tables without any are missing."""


class Touched:
    """What has changed in this process's shards. One thread follows and takes."""

    def __init__(self, layouts: Sequence[MapLayout], process_id: int = 0, num_processes: int = 1) -> None:
        """Knows no id yet.

        Args:
            layouts: Of each group.
            process_id, num_processes: This process and all that share the shards evenly.
        """
        self._groups = tuple(_Group(layout, process_id, num_processes) for layout in layouts)
        self._names = [layout.names for layout in layouts]
        self._taken: Taken | None = None

    @property
    def num_changed(self) -> int:
        """Rows and deletions that the next publication would hold, or a few less."""
        return sum(group.num_listed + len(group.deleted) for group in self._groups)

    @property
    def is_taken(self) -> bool:
        """Whether something is taken that is neither done nor failed."""
        return self._taken is not None

    def restore(self, maps: Sequence[IdMaps]) -> None:
        """Takes over the ids of restored maps, one of each group: nothing of them has changed."""
        for group, of_group in zip(self._groups, maps, strict=True):
            group.restore(of_group)

    def rewind(self, table: str, ids: np.ndarray, maps: Sequence[IdMaps]) -> None:
        """Notes what readers may hold from after the restored state, right after `restore`.

        Args:
            table: Name of the ids' table.
            ids: int64; those of other processes' shards are passed over. The others become changed rows, or deletions where
                the restored maps do not have them.
            maps: The restored maps.
        """
        for group, names, of_group in zip(self._groups, self._names, maps, strict=True):
            if table in names:
                group.rewind(names.index(table), np.unique(ids), of_group)

    def follow(self, plans: Sequence[GroupPlan], freed: Sequence[FreedRows]) -> None:
        """Notes what a plan changed that has run.

        Args:
            plans: Of each group, host arrays of this process's devices.
            freed: Of each group, the rows that it took from their ids, none of which it touched.
        """
        for group, plan, of_group in zip(self._groups, plans, freed, strict=True):
            group.follow(plan, of_group)

    def take(self) -> Taken:
        """Returns all that has changed since the last publication.

        What was taken before must be `done` or `failed`.
        """
        assert self._taken is None, "what was taken before is neither done nor failed"
        groups = tuple(group.take() for group in self._groups)
        deleted: dict[str, np.ndarray] = {}
        for group, names in zip(self._groups, self._names, strict=True):
            deleted |= group.take_deleted(names)
        self._taken = Taken(groups, deleted)
        return self._taken

    def done(self) -> None:
        """Forgets what was taken: it is durable."""
        self._taken = None

    def failed(self) -> None:
        """Puts back what was taken: the next publication holds it too."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        for group, names, of_group in zip(self._groups, self._names, taken.groups, strict=True):
            group.put_back(of_group.rows, {names.index(name): ids for name, ids in taken.deleted.items() if name in names})

    def live(self) -> tuple[GroupRows, ...]:
        """Returns all rows that have an id, of each group."""
        return tuple(group.live() for group in self._groups)


class _Group:
    """The rows of one group."""

    def __init__(self, layout: MapLayout, process_id: int, num_processes: int) -> None:
        num_shards = layout.num_shards // num_processes
        self._layout, self._first_shard, self._num_shards = layout, process_id * num_shards, num_shards
        size = num_shards * layout.rows_per_shard
        number = np.int8 if len(layout.names) < 128 else np.int16
        self._ids, self._tables = np.zeros(size, np.int64), np.full(size, -1, number)
        self._listed = np.zeros(size, np.bool_)
        self._lists: list[np.ndarray] = []
        self.num_listed = 0
        self.deleted = _Deleted()

    def _places(self, shards: np.ndarray, rows: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Returns the places of rows of tables in shards that are counted from this process's first."""
        return shards.astype(np.int64) * self._layout.rows_per_shard + self._layout.row_offsets[tables] + rows

    def _list(self, rows: np.ndarray) -> None:
        """Lists distinct rows that are not listed yet."""
        new = rows[~self._listed[rows]]
        self._listed[new] = True
        self._lists.append(new)
        self.num_listed += new.size

    def restore(self, maps: IdMaps) -> None:
        for table in range(len(self._layout.names)):
            ids, shards, rows, _ = maps.entries(table)
            places = self._places(shards, rows, np.full(rows.size, table))
            self._ids[places], self._tables[places] = ids, table

    def rewind(self, table: int, ids: np.ndarray, maps: IdMaps) -> None:
        shards = (maps.hashes_of(ids, table) >> self._layout.tables.shard_shift).astype(np.int64) - self._first_shard
        ids = ids[(shards >= 0) & (shards < self._num_shards)]
        shards, rows = maps.lookup(ids, table)
        there = rows >= 0
        self._list(self._places(shards[there], rows[there], np.full(int(there.sum()), table)))
        self.deleted.add(ids[~there], np.full(int((~there).sum()), table, np.int32))

    def follow(self, plan: GroupPlan, freed: FreedRows) -> None:
        per_device = self._ids.size // plan.touched.shape[0]
        device, at = np.nonzero(plan.fresh_rows < per_device)
        fresh = device * per_device + plan.fresh_rows[device, at]
        self._ids[fresh] = np.ascontiguousarray(plan.fresh_ids[device, at]).view(np.int64).reshape(-1)
        self._tables[fresh] = plan.fresh_tables[device, at]
        device, at = np.nonzero(plan.touched < per_device)
        self._list(device * per_device + plan.touched[device, at])
        if freed.rows.size:
            gone = self._places(freed.shards - self._first_shard, freed.rows, freed.tables)
            assert np.array_equal(self._ids[gone], freed.ids), "a plan frees a row of another id"
            self.deleted.add(freed.ids, freed.tables)
            self._tables[gone] = -1

    def take(self) -> GroupRows:
        rows = np.sort(np.concatenate(self._lists)) if self._lists else np.zeros(0, np.int64)
        self._lists, self.num_listed = [], 0
        self._listed[rows] = False
        rows = rows[self._tables[rows] >= 0]
        return GroupRows(rows, self._ids[rows], self._tables[rows])

    def take_deleted(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        ids, tables = self.deleted.take()
        return {names[table]: np.unique(ids[tables == table]) for table in np.unique(tables).tolist()}

    def put_back(self, rows: np.ndarray, deleted: dict[int, np.ndarray]) -> None:
        # Those that were freed meanwhile are left out at the next take.
        self._list(rows)
        for table, ids in deleted.items():
            self.deleted.add(ids, np.full(ids.size, table, np.int32))

    def live(self) -> GroupRows:
        rows = np.flatnonzero(self._tables >= 0)
        return GroupRows(rows, self._ids[rows], self._tables[rows])


class _Deleted:
    """Ids that have gone. Ids that came back and went again stand there more than once for a while."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._tables: list[np.ndarray] = []
        self._number = 0

    def __len__(self) -> int:
        return self._number

    def add(self, ids: np.ndarray, tables: np.ndarray) -> None:
        if ids.size:
            self._ids.append(ids)
            self._tables.append(tables)
            self._number += ids.size

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns all, int64 [N] and int32 [N], in the order in which they went."""
        ids, tables = (
            np.concatenate([np.zeros(0, np.int64), *self._ids]),
            np.concatenate([np.zeros(0, np.int32), *self._tables]),
        )
        self._ids, self._tables, self._number = [], [], 0
        return ids, tables
