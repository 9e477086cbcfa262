"""The ids of a batch and of one group of tables to its part of a plan: distinct, admitted, mapped to rows, routed to devices.

In: ids [B, P], event times, and the time. Out: a `GroupPlan` of padded index arrays, and the rows it freed.

    ids -> by shard -> distinct ids -> find, touch -> admit -> insert -> free the unseen -> routes
           [examples in parallel]    [shards in parallel                                         ]

A plan depends on the stream up to it and on nothing else: not on threads, and its rows not on the mesh. The id maps change in
the order of the calls; padded sizes only ever grow, so few shapes are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from monolith_jax.ids import admission, expiry, kernels, routes
from monolith_jax.ids import batch as batch_kernels
from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.copies import Copies
from monolith_jax.ids.cuckoo import IdMaps, MapLayout, ladder
from monolith_jax.ids.lines import NOT_ADMITTED, Distinct, make_distinct, places_of
from monolith_jax.ids.sizes import first_sizes, fresh_size, grown_size, rows_per_device, scratch_size
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.ids.tier import Tier
from monolith_jax.types import FreedRows, GroupIds, GroupPlan

_WORTH_THREADS = 2**15
"""Positions of a batch below which handing it to threads takes longer than the work."""


@dataclass(frozen=True)
class Rule:
    """How ids come into a table and leave it."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    ttl_s: int = 0
    """Seconds of event time without being seen after which an id is taken out; 0: it stays, and a full table refuses."""


@dataclass
class Work:
    """Arrays of one batch, as large as the largest so far. They are used again: fresh memory costs more than the work."""

    size: int
    distinct: Distinct
    hashes: np.ndarray
    positions: np.ndarray
    inverse: np.ndarray
    last_slice: np.ndarray
    sent_at: np.ndarray
    touched_at: np.ndarray
    freed: expiry.Freed


def make_work(size: int, num_freed: int, num_shards: int) -> Work:
    """Returns room for so many ids and freed rows."""

    def empty(dtype: type, number: int = size) -> np.ndarray:
        return np.empty(number, dtype)

    freed = expiry.Freed(empty(np.uint64, num_freed), empty(np.int32, num_freed), empty(np.int32, num_freed))
    places = [empty(np.int32) for _ in range(5)]
    return Work(size, make_distinct(size, num_shards), empty(np.uint64), *places, freed=freed)


class GroupMapper:
    """Maps the ids of one group of tables. Not thread safe."""

    def __init__(
        self,
        layout: MapLayout,
        position_tables: Sequence[int],
        num_devices: int,
        rules: Sequence[Rule] = (),
        threads: ShardThreads | None = None,
        process_id: int = 0,
        num_processes: int = 1,
        tier: Tier | None = None,
    ) -> None:
        """Makes empty maps.

        Args:
            layout: Tables of the group and their sizes.
            position_tables: Table index of each of the P id positions of an example.
            num_devices: S, a divisor of the number of shards.
            rules: Of each table; none: all ids are admitted and stay.
            threads: Share the shards; none: all is done in the caller's thread.
            process_id, num_processes: This process and all that share the shards: it has the maps of those that its devices
                own, and makes plans together with the others (`ids.owners`).
            tier: Slots of the rows on the device; none: all rows are there, and plans name rows instead of slots.

        Raises:
            ValueError: S does not divide L, or a device would have more rows than int32 can count.
        """
        self.tier = tier
        self.rows_per_shard = tier.slots_per_shard if tier else layout.rows_per_shard
        self.row_offsets = np.zeros_like(layout.row_offsets) if tier else layout.row_offsets
        self.rows_per_device = rows_per_device(layout, num_devices, self.rows_per_shard)
        self._layout = layout
        self._threads, self._alone = threads or ShardThreads(1, ()), ShardThreads(1, ())
        self.maps = IdMaps(layout, self._threads, num_processes)
        self._first_shard = process_id * self.maps.num_shards
        self.position_tables = np.asarray(position_tables, np.int32)
        self._num_devices = num_devices
        rules = rules or (Rule(),) * len(layout.names)
        self._ttl_s = np.array([rule.ttl_s for rule in rules], np.int64)
        self._shares = np.minimum([-(-rows // layout.num_shards) for rows in layout.max_rows], layout.caps)
        self._rules = admission.make_rules([rule.admission for rule in rules], layout.max_rows, layout.num_shards)
        self._filters = admission.empty_filters(self._rules, self.maps.num_shards)
        self._pinned = np.zeros_like(self.maps.arrays.used) if self._ttl_s.any() else np.zeros((1, 1), np.uint32)
        shape = self.maps.arrays.counts.shape
        self._expiry = {"sweeps": np.zeros(shape, np.int32), "wanted": np.zeros(shape, np.int32)}
        self.work, self._copies = make_work(0, 0, self.maps.num_shards), Copies()
        self._touched_size, self._sent_size = first_sizes(num_devices)

    def plan(
        self, batch: GroupIds, seen_s: np.ndarray, now_s: int, plan_number: int, insert: bool = True
    ) -> tuple[GroupPlan, FreedRows, dict[str, float]]:
        """Returns the plan of one batch, what it freed, and its counts; the maps are as they are after it.

        Args:
            batch: ids [B, P]; S must divide B.
            seen_s: uint32 [B], event times in seconds.
            now_s: The time, in seconds; never less than in the plan before.
            plan_number: How many plans there were before.
            insert: Whether new ids get rows; if not, they read zeros and nothing changes but padded sizes, which may grow, and
                in two tiers which rows are on the device.

        Raises:
            ValueError: S does not divide B, or a batch needs more rows at once than the device has slots.
        """
        if batch.ids.shape[0] % self._num_devices:
            raise ValueError(f"{batch.ids.shape[0]} examples cannot be divided among {self._num_devices} devices")
        threads = self.threads_for(batch.ids.size)
        self.make_room(batch.ids.size)
        work, ends = self.work, self.group_by_shard(batch, self.work, threads)
        parts = ends - work.distinct.starts

        def dedup(first: int, last: int) -> None:
            scratch = np.empty(scratch_size(parts), np.int32)
            positions = (work.positions, self.position_tables, seen_s)
            batch_kernels.dedup(ends, work.hashes, *positions, first, last, scratch, work.distinct, work.inverse)

        freed, stats = self.map_rows(parts, dedup, now_s, plan_number, insert, threads)
        if self.tier:
            self.tier.check()
        fresh = self.fresh_lists(int(stats["fresh"]))
        touched, sent, positions, num_sent, num_touched = self._route(batch, ends, threads)
        stats["unknown"] = stats["unique"] - num_touched
        rows = self.tier.rows_of(touched) if self.tier else None
        return GroupPlan(touched, sent, positions, *fresh, num_sent, rows), freed, stats

    def threads_for(self, size: int) -> ShardThreads:
        """Returns who does the work for so many ids."""
        return self._threads if size >= _WORTH_THREADS else self._alone

    def make_room(self, number: int) -> None:
        """Makes `work` large enough for so many ids."""
        num_freed = 2 * number + self.maps.num_shards * self._freed_room(0)
        if self.work.size < number or self.work.freed.rows.size < num_freed:
            self.work = make_work(number, num_freed, self.maps.num_shards)

    def group_by_shard(self, batch_ids: GroupIds, work: Work, threads: ShardThreads) -> np.ndarray:
        """Fills the occurrences of a batch by shard, of all L; returns where each shard's part ends."""
        num_shards, tables = self._layout.num_shards, self._layout.tables
        ids, valid = np.ascontiguousarray(batch_ids.ids).view(np.uint64), batch_ids.valid
        parts = dict(threads.ranges(ids.shape[0]))
        counts = np.zeros((len(parts), num_shards), np.int64)
        of_part = {first: counts[index] for index, first in enumerate(parts)}
        sizes = (tables.seeds, tables.shard_shift)

        def count(first: int, last: int) -> None:
            batch_kernels.count_occurrences(ids, valid, self.position_tables, *sizes, first, last, of_part[first])

        threads.run(count, ids.shape[0])
        ends = counts.sum(0).cumsum()
        work.distinct.starts[:] = ends - counts.sum(0)
        places = work.distinct.starts + counts.cumsum(0) - counts
        place_of = {first: places[index] for index, first in enumerate(parts)}

        def group(first: int, last: int) -> None:
            batch_kernels.group_by_shard(
                ids, valid, self.position_tables, *sizes, first, last, place_of[first], work.hashes, work.positions
            )

        threads.run(group, ids.shape[0])
        return ends

    def _freed_room(self, occurrences: Any) -> Any:
        """Returns how many rows one shard may free in a plan."""
        if not self._ttl_s.any():
            return 0
        return 2 * occurrences + max(256, int(self._layout.caps.sum()) // expiry.CAP_PARTS)

    def map_rows(
        self,
        parts: np.ndarray,
        dedup: Callable[[int, int], None],
        now_s: int,
        plan_number: int,
        insert: bool,
        threads: ShardThreads,
    ) -> tuple[FreedRows, dict[str, float]]:
        """Finds or makes the rows of the distinct ids in `work`, and frees others. With a tier the rows become slots.

        Args:
            parts: int64 [L], ids of each shard that `dedup` looks at.
            dedup: Fills the distinct ids of a range of shards.
            now_s, plan_number, insert: As of `plan`.
            threads: Share the shards.
        """
        work, tables, maps, distinct = self.work, self.maps.tables, self.maps.arrays, self.work.distinct
        refused = np.zeros((*maps.counts.shape, 2), np.int64)
        looks, freed_numbers = [], np.zeros((parts.size, 2), np.int64)
        limits = np.broadcast_to(np.asarray(self._freed_room(parts), np.int64), parts.shape)
        freed_starts = limits.cumsum() - limits
        cells = self._filters["filters"].view(np.uint8).reshape(-1, 64)
        heads, taken = self._filters["filter_heads"], self._filters["filter_taken"]
        filtered, number = bool(self._rules.kinds.any()), np.uint64(plan_number)

        def of_shards(first: int, last: int) -> None:
            dedup(first, last)
            looks.append(kernels.find(tables, maps.lines, distinct, first, last, insert))
            if not insert:
                return
            if filtered:
                admission.admit(self._rules, cells, heads, taken, distinct, number, first, last)
            kernels.insert(tables, maps, distinct, first, last, refused)
            if self._ttl_s.any():
                expiry.free_unseen(
                    tables, maps, distinct, refused, self._ttl_s, self._shares, now_s, first, last, self._pinned,
                    self._expiry["sweeps"], self._expiry["wanted"], freed_starts, limits, work.freed, freed_numbers,
                )  # fmt: skip

        threads.run(of_shards, parts.size)
        freed = self._freed(freed_starts, freed_numbers[:, 0])
        stats = self._stats(int(parts.sum()), refused, (freed, int(freed_numbers[:, 1].sum())))
        stats["second_looks"] = float(sum(looks))
        if self.tier:
            self.tier.assign(distinct, threads)
            stats |= self.tier.stats()
        return freed, stats

    def _freed(self, starts: np.ndarray, numbers: np.ndarray) -> FreedRows:
        freed, shards = self.work.freed, np.repeat(np.arange(numbers.size, dtype=np.int32), numbers)
        places = places_of(starts, numbers)
        tables = freed.tables[places]
        ids = self.maps.ids_of(freed.hashes[places], tables).view(np.int64)
        return FreedRows(ids, tables, shards + np.int32(self._first_shard), freed.rows[places])

    def _stats(self, occurrences: int, refused: np.ndarray, freed: tuple[FreedRows, int]) -> dict[str, float]:
        unique, fresh, not_admitted = routes.count_states(self.work.distinct, NOT_ADMITTED)
        rows, slots = int(self.maps.num_rows.sum()), 4 * int(self._layout.num_buckets.sum()) * self.maps.num_shards
        return {
            "occurrences": float(occurrences),
            "unique": float(unique),
            "fresh": float(fresh),
            "not_admitted": float(not_admitted),
            "refused_at_cap": float(refused[:, :, 0].sum()),
            "refused_no_path": float(refused[:, :, 1].sum()),
            "expired": float(freed[0].ids.size - freed[1]),
            "freed_at_cap": float(freed[1]),
            "rows": float(rows),
            "slots": float(slots),
        }

    def grow_sizes(self, touched: int, sent: int) -> tuple[int, int]:
        """Returns the padded sizes V and U for what a plan needs; they never become smaller."""
        self._touched_size = grown_size(self._touched_size, touched)
        self._sent_size = grown_size(self._sent_size, sent)
        return self._touched_size, self._sent_size

    def fresh_lists(self, number: int, size: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the fresh rows of this process's devices with their ids and tables, padded to `size` or as needed."""
        per_device = self._layout.num_shards // self._num_devices
        num_devices = self.maps.num_shards // per_device
        hashes, tables = np.empty(number, np.uint64), np.empty(number, np.int32)
        rows, numbers = np.empty(number, np.int64), np.zeros(num_devices, np.int64)
        routes.list_fresh(self.work.distinct, per_device, self.rows_per_shard, self.row_offsets, hashes, tables, rows, numbers)
        ids = self.maps.ids_of(hashes, tables).view(np.uint32).reshape(-1, 2)
        size = size or fresh_size(int(numbers.max()))
        fresh_rows = np.tile(np.arange(self.rows_per_device, self.rows_per_device + size, dtype=np.int32), (num_devices, 1))
        fresh_ids = np.zeros((num_devices, size, 2), np.uint32)
        fresh_tables = np.zeros((num_devices, size), np.int32)
        ends = numbers.cumsum()
        for device, (end, of_device) in enumerate(zip(ends, numbers, strict=True)):
            mine = slice(end - of_device, end)
            fresh_rows[device, :of_device], fresh_ids[device, :of_device] = rows[mine], ids[mine]
            fresh_tables[device, :of_device] = tables[mine]
        return fresh_rows, fresh_ids, fresh_tables

    def _route(self, batch: GroupIds, ends: np.ndarray, threads: ShardThreads) -> tuple[Any, Any, Any, Any, int]:
        """Returns touched [S, V], sent [S, S, U], positions [B, P], num_sent [S, S] of the plan; how many rows are touched."""
        work, layout, num_devices = self.work, self._layout, self._num_devices
        num_touched = np.zeros(layout.num_shards, np.int64)
        num_sent = np.zeros((layout.num_shards, num_devices), np.int64)
        at = (work.distinct, ends, work.positions, work.inverse, batch.ids.size // num_devices)

        def count(first: int, last: int) -> None:
            routes.count_routes(*at, first, last, work.last_slice, num_touched, num_sent)

        threads.run(count, layout.num_shards)
        touched_of, sent_of = num_touched.reshape(num_devices, -1), num_sent.reshape(num_devices, -1, num_devices)
        self.grow_sizes(int(touched_of.sum(1).max()), int(sent_of.sum(1).max()))
        touched = np.empty((num_devices, self._touched_size), np.int32)
        sent = np.empty((num_devices, num_devices, self._sent_size), np.int32)
        positions = np.empty(batch.ids.shape, np.int32)
        if ends[-1] < positions.size:
            positions[~batch.valid] = num_devices * self._sent_size + 1
        for device in range(num_devices):
            used = int(touched_of[device].sum())
            first_padding = self.rows_per_device + used
            touched[device, used:] = np.arange(first_padding, first_padding + self._touched_size - used)
            for part in range(num_devices):
                sent[device, part, int(sent_of[device, :, part].sum()) :] = self._touched_size
        first_touched = (touched_of.cumsum(1) - touched_of).reshape(-1)
        first_sent = (sent_of.cumsum(1) - sent_of).reshape(num_sent.shape)
        sizes = (layout.num_shards // num_devices, self.rows_per_shard, self.row_offsets)

        def fill(first: int, last: int) -> None:
            scratch = (work.last_slice, work.sent_at, work.touched_at)
            outputs = (touched, sent, positions.reshape(-1))
            routes.fill_routes(*at, first, last, *sizes, first_touched, first_sent, *scratch, *outputs)

        threads.run(fill, layout.num_shards)
        return touched, sent, positions, sent_of.sum(1, dtype=np.int32), int(num_touched.sum())

    def _state(self) -> dict[str, np.ndarray]:
        return {**self._filters, **self._expiry}

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of the maps, filters, sweeps and padded sizes."""
        sizes = np.array([self._touched_size, self._sent_size, self._num_devices], np.int32)
        copies = {name: self._copies.copy(name, array) for name, array in self._state().items()}
        return {**self.maps.get_state(), **copies, "sizes": sizes}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The state is of another layout or damaged.
        """
        mine = self._state()
        for name, array in mine.items():
            if name not in state or state[name].shape != array.shape or state[name].dtype != array.dtype:
                there = f"{state[name].dtype} {state[name].shape}" if name in state else "nothing"
                raise ValueError(f"the state of tables {self._layout.names} has {there} as {name}, expected {array.shape}")
        sweeps = state["sweeps"]
        if (state["filter_heads"] >> 1).any() or (sweeps < 0).any() or (sweeps >= self._layout.num_buckets).any():
            raise ValueError(f"the state of tables {self._layout.names} is damaged: a place in filters or sweeps is too large")
        sizes = [int(size) for size in np.asarray(state.get("sizes", ())).reshape(-1)]
        if len(sizes) != 3 or any(size != ladder(size) or size >= 2**31 for size in sizes[:2]):
            raise ValueError(f"the state of tables {self._layout.names} is damaged: no plan has the padded sizes {sizes}")
        self.maps.set_state(state)
        if self.tier:
            self.tier.reset()
        for name, array in mine.items():
            array[:] = state[name]
        # What a device needs on another mesh says nothing about this one.
        same = sizes[2] == self._num_devices
        self._touched_size, self._sent_size = sizes[:2] if same else first_sizes(self._num_devices)
