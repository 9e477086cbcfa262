"""The ids of a batch to a plan: deduplicated, mapped to rows, routed to the devices that own them.

In: ids [B, P] of a group of tables and event times. Out: a `Plan` of padded index arrays. A step's plan depends on the ids of
the stream up to it and on nothing else: not on threads, and its rows not on the mesh. The id maps change in the order of the
calls; padded sizes only ever grow, so few shapes are compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from monolith_jax.ids import kernels, routes
from monolith_jax.ids.cuckoo import IdMaps, MapLayout, ladder
from monolith_jax.types import GroupIds, GroupPlan, Plan

_FRESH_SIZES = tuple(4**k for k in range(3, 14))
_ROOM = 1.05
"""A padded size that must grow takes this much more than was needed (and half as much again as it was): each size is a
compilation of the step."""


class GroupMapper:
    """Maps the ids of one group of tables. Not thread safe."""

    def __init__(self, layout: MapLayout, position_tables: Sequence[int], num_devices: int) -> None:
        """Makes empty maps.

        Args:
            layout: Tables of the group and their sizes.
            position_tables: Table index of each of the P id positions of an example.
            num_devices: S, a divisor of the number of shards.

        Raises:
            ValueError: S does not divide L, or a device would have more rows than int32 can count.
        """
        if layout.num_shards % num_devices:
            raise ValueError(f"{layout.num_shards} shards cannot be divided among {num_devices} devices; use a power of two")
        self._rows_per_device = layout.num_shards // num_devices * layout.rows_per_shard
        if self._rows_per_device + _FRESH_SIZES[-1] >= 2**31:
            raise ValueError(
                f"a device would hold {self._rows_per_device:,} rows of tables {layout.names}, more than int32 counts; use "
                f"more than {num_devices} devices or a smaller TableConfig.max_rows"
            )
        self.maps = IdMaps(layout)
        self._position_tables = np.asarray(position_tables, np.int32)
        self._num_devices = num_devices
        self._scratch = np.full(0, -1, np.int32)
        self._touched_size = self._sent_size = ladder(0)

    def plan(self, batch: GroupIds, seen_s: np.ndarray, insert: bool = True) -> tuple[GroupPlan, dict[str, float]]:
        """Returns the plan of one batch and its counts; the maps have the batch's new ids afterwards.

        Args:
            batch: ids [B, P]; S must divide B.
            seen_s: uint32 [B], event times in seconds.
            insert: Whether new ids get rows; if not, no map changes and they read zeros.

        Raises:
            ValueError: S does not divide B.
        """
        if batch.ids.shape[0] % self._num_devices:
            raise ValueError(f"{batch.ids.shape[0]} examples cannot be divided among {self._num_devices} devices")
        inverse, ids, hashes, tables, last_seen_s = self._dedup(batch, seen_s)
        shards, rows, fresh, at_cap, no_path = self.maps.lookup_or_insert(ids, hashes, tables, last_seen_s, insert)
        owners, local_rows = self._places(tables, shards, rows)
        touched, sent, positions = self._route(inverse, owners, local_rows)
        fresh_rows, fresh_ids, fresh_tables = self._fresh(np.flatnonzero(fresh), ids, tables, owners, local_rows)
        num_touched = int(np.count_nonzero(rows >= 0))
        stats = {
            "occurrences": float(np.count_nonzero(batch.valid)),
            "unique": float(ids.size),
            "unknown": float(ids.size - num_touched),
            "fresh": float(np.count_nonzero(fresh)),
            "refused_at_cap": float(at_cap),
            "refused_no_path": float(no_path),
            "padding": 1 - num_touched / touched.size,
            "rows": float(self.maps.num_rows.sum()),
        }
        return GroupPlan(touched, sent, positions, fresh_rows, fresh_ids, fresh_tables), stats

    def _places(self, tables: np.ndarray, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the owning device and the row in its part of the group, -1 where the id was refused."""
        layout = self.maps.layout
        shards_per_device = layout.num_shards // self._num_devices
        owners = shards // shards_per_device
        local = (
            (shards - owners * shards_per_device).astype(np.int64) * layout.rows_per_shard + layout.row_offsets[tables] + rows
        )
        return owners, np.where(rows >= 0, local, -1)

    def _dedup(self, batch: GroupIds, seen_s: np.ndarray) -> tuple[np.ndarray, ...]:
        size = batch.ids.size
        if self._scratch.size < 2 * size:
            self._scratch = np.full(1 << (2 * size - 1).bit_length(), -1, np.int32)
        inverse = np.empty(batch.ids.shape, np.int32)
        ids, hashes = np.empty(size, np.uint64), np.empty(size, np.uint64)
        tables, last_seen_s, places = np.empty(size, np.int32), np.empty(size, np.uint32), np.empty(size, np.int32)
        count = kernels.dedup(
            np.ascontiguousarray(batch.ids).view(np.uint64), batch.valid, self._position_tables, seen_s,
            self.maps.layout.seeds, self._scratch, inverse, ids, hashes, tables, last_seen_s, places,
        )  # fmt: skip
        return inverse, ids[:count], hashes[:count], tables[:count], last_seen_s[:count]

    def _route(self, inverse: np.ndarray, owners: np.ndarray, local_rows: np.ndarray) -> tuple[np.ndarray, ...]:
        num_devices, number = self._num_devices, owners.size
        touched_at = np.empty(number, np.int32)
        sent_at = np.empty((num_devices, number), np.int32)
        num_touched = np.zeros(num_devices, np.int64)
        num_sent = np.zeros((num_devices, num_devices), np.int64)
        routes.count_routes(inverse, owners, local_rows, num_devices, touched_at, sent_at, num_touched, num_sent)
        self._touched_size = _grown(self._touched_size, int(num_touched.max()))
        self._sent_size = _grown(self._sent_size, int(num_sent.max()))
        touched = np.empty((num_devices, self._touched_size), np.int32)
        sent = np.empty((num_devices, num_devices, self._sent_size), np.int32)
        positions = np.empty(inverse.shape, np.int32)
        routes.fill_padding(touched, sent, self._rows_per_device)
        routes.fill_rows(owners, local_rows, touched_at, sent_at, touched, sent)
        routes.fill_positions(inverse, owners, local_rows, sent_at, self._sent_size, positions)
        return touched, sent, positions

    def _fresh(
        self, which: np.ndarray, ids: np.ndarray, tables: np.ndarray, owners: np.ndarray, local_rows: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        num_devices = self._num_devices
        most = int(np.bincount(owners[which], minlength=1).max())
        size = next(size for size in _FRESH_SIZES if size >= most)
        fresh_rows = np.tile(np.arange(self._rows_per_device, self._rows_per_device + size, dtype=np.int32), (num_devices, 1))
        fresh_ids = np.zeros((num_devices, size, 2), np.uint32)
        fresh_tables = np.zeros((num_devices, size), np.int32)
        for device in range(num_devices):
            mine = which[owners[which] == device]
            fresh_rows[device, : mine.size] = local_rows[mine]
            fresh_ids[device, : mine.size] = ids[mine].view(np.uint32).reshape(-1, 2)
            fresh_tables[device, : mine.size] = tables[mine]
        return fresh_rows, fresh_ids, fresh_tables

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of the maps and the padded sizes."""
        return {**self.maps.get_state(), "sizes": np.array([self._touched_size, self._sent_size], np.int32)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The state is of another layout or damaged.
        """
        self.maps.set_state(state)
        self._touched_size, self._sent_size = (int(size) for size in np.asarray(state["sizes"]))


class Mapper:
    """Maps the ids of all groups of a model."""

    def __init__(self, groups: Sequence[GroupMapper]) -> None:
        """Takes over the groups, in the model's order."""
        self.groups = tuple(groups)

    def plan(self, batch: Sequence[GroupIds], event_time_ms: np.ndarray, insert: bool = True) -> Plan:
        """Returns the plan of one batch: int64 ids of each group, event times int64 [B] in ms. `insert`: see `GroupMapper`."""
        seen_s = np.clip(event_time_ms // 1000, 0, 2**32 - 1).astype(np.uint32)
        plans, totals = [], {}
        for group, ids in zip(self.groups, batch, strict=True):
            plan, stats = group.plan(ids, seen_s, insert)
            plans.append(plan)
            for name, value in stats.items():
                totals[name] = totals.get(name, 0.0) + value
        if len(plans) > 1:
            totals["padding"] /= len(plans)
        return Plan(tuple(plans), totals)

    def get_state(self) -> list[dict[str, np.ndarray]]:
        """Returns a copy of everything, one mapping of arrays a group."""
        return [group.get_state() for group in self.groups]

    def set_state(self, state: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The state is of another layout or damaged.
        """
        for group, of_group in zip(self.groups, state, strict=True):
            group.set_state(of_group)


def _grown(size: int, needed: int) -> int:
    return size if needed <= size else ladder(max(int(needed * _ROOM), size + size // 2))
