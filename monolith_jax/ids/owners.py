"""Plans that several processes make together: each asks the owners of the shards, they answer, both write their index arrays.

In: each process's part of a batch. Out: its part of a `GroupPlan`. What crosses, in words of uint32 (by `ids.exchange`):

    asking:  ids -> by shard -> distinct ids  -- hash, table, count, last seen, slices -->  owner
    owner:   merge, in the order of the processes -> find, admit, insert, free -> touched, sent
    owner    -- a bit an id: has a row --> asking: positions

Merged in this order, the distinct ids of a shard are those of the whole batch in order of first appearance: rows do not
depend on the number of processes. Both sides count the places of `sent` in the same order (shard, then as asked), so places
never travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from monolith_jax.ids import batch as batch_kernels
from monolith_jax.ids.group import GroupMapper, make_work
from monolith_jax.ids.lines import jit, places_of
from monolith_jax.ids.sizes import fresh_size, scratch_size
from monolith_jax.types import FreedRows, GroupIds, GroupPlan

WORDS = 6
"""Words of an id that is asked for: hash (2), table, count, last seen, slices."""
MOST_SLICES = 32
"""Devices of one process: their bits fit into one word."""


class Sizes(NamedTuple):
    """Padded sizes that all processes agree on: V, U and F of the group's plan."""

    touched: int
    sent: int
    fresh: int


@dataclass(frozen=True)
class Asked:
    """What a process asks for, by shard of all L."""

    numbers: np.ndarray
    """int64 [L], distinct ids of each shard."""
    words: np.ndarray
    """uint32 [N, 6], shard by shard."""
    ends: np.ndarray
    """int64 [L], where each shard's part of the occurrences ends."""


@dataclass(frozen=True)
class Answered:
    """What an owner found for the ids that it was asked for."""

    has_row: list[np.ndarray]
    """Of each process, bool [N] in the order in which it asked."""
    needed: Sizes
    """What this owner needs."""
    freed: FreedRows
    stats: dict[str, float]
    received: _Received
    num_touched: np.ndarray
    num_sent: np.ndarray


class _Received(NamedTuple):
    """Ids of all processes in the order of this owner's shards, then of the processes."""

    ends: np.ndarray
    hashes: np.ndarray
    tables: np.ndarray
    counts: np.ndarray
    seen_s: np.ndarray
    slices: np.ndarray
    processes: np.ndarray
    inverse: np.ndarray
    """int32 [N] out: index of its distinct id within the shard."""
    order: np.ndarray
    """Where each stood when the processes' lists followed one another."""


@jit
def _mark_slices(distinct, ends, positions, inverse, slice_positions, slices):
    """Sets, in uint32 `slices` [N], a bit for each slice of this process's part of the batch that holds the id."""
    for shard in range(ends.size):
        start = distinct.starts[shard]
        for i in range(start, start + distinct.numbers[shard]):
            slices[i] = 0
        s, slice_end = 0, slice_positions
        for k in range(start, ends[shard]):
            while positions[k] >= slice_end:
                s += 1
                slice_end += slice_positions
            slices[start + inverse[k]] |= np.uint32(1) << np.uint32(s)


@jit
def _merge(received, from_shard, to_shard, scratch, distinct):
    """Finds the distinct ids of a range of shards among those that were asked for; as `batch.dedup`."""
    for shard in range(from_shard, to_shard):
        start, end = distinct.starts[shard], received.ends[shard]
        size = 16
        while size < 2 * (end - start):
            size *= 2
        for place in range(size):
            scratch[place] = -1
        mask, number = np.uint64(size - 1), 0
        for k in range(start, end):
            h, table = received.hashes[k], received.tables[k]
            place = np.int64(h & mask)
            found = np.int64(scratch[place])
            while found >= 0 and (distinct.hashes[start + found] != h or distinct.tables[start + found] != table):
                place = np.int64(np.uint64(place + 1) & mask)
                found = np.int64(scratch[place])
            if found < 0:
                found = number
                number += 1
                scratch[place] = found
                distinct.hashes[start + found], distinct.tables[start + found] = h, table
                distinct.counts[start + found], distinct.seen_s[start + found] = 0, 0
            distinct.counts[start + found] += received.counts[k]
            distinct.seen_s[start + found] = max(distinct.seen_s[start + found], received.seen_s[k])
            received.inverse[k] = found
        distinct.numbers[shard] = number


@jit
def _count_routes(received, distinct, slices_of_process, num_touched, num_fresh, num_sent):
    """Counts the rows that each shard touches and gives out, int64 [L], and those that each slice asks of it, int64 [L, S]."""
    for shard in range(received.ends.size):
        start = distinct.starts[shard]
        for i in range(start, start + distinct.numbers[shard]):
            num_touched[shard] += distinct.rows[i] >= 0
            num_fresh[shard] += distinct.fresh[i]
        for k in range(start, received.ends[shard]):
            if distinct.rows[start + received.inverse[k]] >= 0:
                first = received.processes[k] * slices_of_process
                for s in range(slices_of_process):
                    num_sent[shard, first + s] += (received.slices[k] >> np.uint32(s)) & np.uint32(1)


@jit
def _fill_routes(received, distinct, slices_of_process, shards_per_device, rows_per_shard, row_offsets, touched, sent):
    """Writes what this owner's devices gather and send: touched int32 [S here, V], sent int32 [S here, S, U]."""
    num_devices = touched.shape[0]
    at_touched, at_sent = np.zeros(num_devices, np.int64), np.zeros(sent.shape[:2], np.int64)
    for shard in range(received.ends.size):
        device, start = shard // shards_per_device, distinct.starts[shard]
        first_row = (shard - device * shards_per_device) * rows_per_shard
        places = np.empty(distinct.numbers[shard], np.int32)
        for i in range(distinct.numbers[shard]):
            row = distinct.rows[start + i]
            if row >= 0:
                places[i] = at_touched[device]
                touched[device, at_touched[device]] = first_row + row_offsets[distinct.tables[start + i]] + row
                at_touched[device] += 1
        for k in range(start, received.ends[shard]):
            i = received.inverse[k]
            if distinct.rows[start + i] < 0:
                continue
            for s in range(slices_of_process):
                if (received.slices[k] >> np.uint32(s)) & np.uint32(1):
                    to = received.processes[k] * slices_of_process + s
                    sent[device, to, at_sent[device, to]] = places[i]
                    at_sent[device, to] += 1


@jit
def _fill_positions(
    distinct, ends, positions, inverse, slices, has_row, slice_positions, shards_per_device, num_sent, out_positions
):
    """Writes for each position of this process's part where its vector will stand: owner * U + u; S U: there is none.

    `has_row` is bool [N] in the order of shards, `num_sent` is U, `out_positions` int32 [B P] of this process.
    """
    num_slices = out_positions.size // slice_positions
    num_devices = ends.size // shards_per_device
    at = np.zeros((num_devices, num_slices), np.int64)
    first_asked = 0
    for shard in range(ends.size):
        owner, start, number = shard // shards_per_device, distinct.starts[shard], distinct.numbers[shard]
        places, k = np.empty(number, np.int32), start
        for s in range(num_slices):
            for i in range(number):
                if not has_row[first_asked + i]:
                    places[i] = num_devices * num_sent
                elif (slices[start + i] >> np.uint32(s)) & np.uint32(1):
                    places[i] = owner * num_sent + at[owner, s]
                    at[owner, s] += 1
            while k < ends[shard] and positions[k] < (s + 1) * slice_positions:
                out_positions[positions[k]] = places[inverse[k]]
                k += 1
        first_asked += number


def _by_shard(numbers: np.ndarray) -> np.ndarray:
    """Returns where the ids of lists, int64 [P, L] long by shard, stand when the lists follow one another, shard by shard."""
    starts = np.concatenate([[0], numbers.reshape(-1).cumsum()[:-1]]).reshape(numbers.shape)
    return places_of(starts.T.reshape(-1), numbers.T.reshape(-1))


class OwnedGroup:
    """One process's half of a group's plans. Not thread safe; calls come in the order ask, answer, plan."""

    def __init__(self, mapper: GroupMapper, num_devices: int, num_processes: int) -> None:
        """Takes over a mapper that was made for one of several processes.

        Args:
            mapper: Holds the maps of this process's shards.
            num_devices: S, of all processes.
            num_processes: P.

        Raises:
            ValueError: The processes do not divide the devices, or one has too many.
        """
        if num_devices % num_processes or num_devices // num_processes > MOST_SLICES:
            raise ValueError(
                f"{num_devices} devices cannot be divided among {num_processes} processes with at most {MOST_SLICES} each"
            )
        self.mapper = mapper
        self._num_devices, self._num_processes = num_devices, num_processes
        self._slices = num_devices // num_processes
        self._shards = mapper.maps.layout.num_shards
        self._asking, self._bits = make_work(0, 0, self._shards), np.empty(0, np.uint32)

    def ask(self, batch: GroupIds, seen_s: np.ndarray) -> Asked:
        """Returns what this process asks for its part of the batch, ids [B / P, positions], seen_s uint32 [B / P].

        Raises:
            ValueError: Its devices do not divide its part.
        """
        if batch.ids.shape[0] % self._slices:
            raise ValueError(f"{batch.ids.shape[0]} examples cannot be divided among {self._slices} devices of a process")
        mapper, number = self.mapper, batch.ids.size
        if self._asking.size < number:
            self._asking, self._bits = make_work(number, 0, self._shards), np.empty(number, np.uint32)
        work, threads = self._asking, mapper.threads_for(number)
        distinct, ends = work.distinct, mapper.group_by_shard(batch, work, threads)
        size = scratch_size(ends - distinct.starts)

        def dedup(first: int, last: int) -> None:
            at = (work.positions, mapper.position_tables, seen_s, first, last, np.empty(size, np.int32))
            batch_kernels.dedup(ends, work.hashes, *at, distinct, work.inverse)

        threads.run(dedup, self._shards)
        _mark_slices(distinct, ends, work.positions, work.inverse, number // self._slices, self._bits)
        numbers = distinct.numbers.copy()
        places = places_of(distinct.starts, numbers)
        words = np.empty((places.size, WORDS), np.uint32)
        words[:, :2] = distinct.hashes[places].view(np.uint32).reshape(-1, 2)
        words[:, 2], words[:, 3] = distinct.tables[places], distinct.counts[places]
        words[:, 4], words[:, 5] = distinct.seen_s[places], self._bits[places]
        return Asked(numbers, words, ends)

    def answer(self, numbers: np.ndarray, words: np.ndarray, now_s: int, plan_number: int, insert: bool) -> Answered:
        """Finds or makes the rows of what all processes ask of this one.

        Args:
            numbers: int64 [P, L / P], ids that each asks for, by shard of this process.
            words: uint32 [N, 6], the processes' lists one after the other.
            now_s, plan_number, insert: As of `GroupMapper.plan`.
        """
        order = _by_shard(numbers)
        self.mapper.make_room(order.size)
        distinct, words = self.mapper.work.distinct, words[order]
        ends = numbers.sum(0).cumsum()
        distinct.starts[:] = ends - numbers.sum(0)
        processes = np.repeat(np.tile(np.arange(len(numbers), dtype=np.int32), numbers.shape[1]), numbers.T.reshape(-1))
        columns = [np.ascontiguousarray(words[:, column]) for column in range(2, WORDS)]
        hashes = np.ascontiguousarray(words[:, :2]).view(np.uint64).reshape(-1)
        received = _Received(
            ends, hashes, columns[0].view(np.int32), columns[1].view(np.int32), columns[2], columns[3], processes,
            np.empty(order.size, np.int32), order,
        )  # fmt: skip
        parts = ends - distinct.starts
        size = scratch_size(parts)

        def merge(first: int, last: int) -> None:
            _merge(received, first, last, np.empty(size, np.int32), distinct)

        threads = self.mapper.threads_for(order.size)
        freed, stats = self.mapper.map_rows(parts, merge, now_s, plan_number, insert, threads)
        stats["occurrences"] = float(received.counts.sum())
        num_touched, num_fresh = np.zeros(parts.size, np.int64), np.zeros(parts.size, np.int64)
        num_sent = np.zeros((parts.size, self._num_devices), np.int64)
        _count_routes(received, distinct, self._slices, num_touched, num_fresh, num_sent)
        stats["unknown"] = stats["unique"] - float(num_touched.sum())
        has_row = np.empty(order.size, np.bool_)
        has_row[order] = distinct.rows[np.repeat(distinct.starts, parts) + received.inverse] >= 0
        touched, fresh = (of_shard.reshape(self._slices, -1).sum(1) for of_shard in (num_touched, num_fresh))
        sent = num_sent.reshape(self._slices, -1, self._num_devices).sum(1, dtype=np.int32)
        needed = Sizes(int(touched.max()), int(sent.max()), int(fresh.max()))
        of_process = np.split(has_row, numbers.sum(1).cumsum()[:-1])
        return Answered(of_process, needed, freed, stats, received, touched, sent)

    def plan(self, batch: GroupIds, asked: Asked, answered: Answered, has_row: np.ndarray, needed: Sizes) -> GroupPlan:
        """Returns this process's part of the plan.

        Args:
            batch: As given to `ask`.
            asked, answered: What `ask` and `answer` returned.
            has_row: bool [N], the owners' answers in the order of `asked.words`.
            needed: The most that any owner needs.
        """
        mapper, work = self.mapper, self._asking
        num_touched, num_sent = mapper.grow_sizes(needed.touched, needed.sent)
        per_device, slice_positions = self._shards // self._num_devices, batch.ids.size // self._slices
        touched = np.empty((self._slices, num_touched), np.int32)
        sent = np.full((self._slices, self._num_devices, num_sent), num_touched, np.int32)
        for device, used in enumerate(answered.num_touched.tolist()):
            first = mapper.rows_per_device + used
            touched[device, used:] = np.arange(first, first + num_touched - used)
        sizes = (self._slices, per_device, mapper.rows_per_shard, mapper.row_offsets)
        _fill_routes(answered.received, mapper.work.distinct, *sizes, touched, sent)
        positions = np.full(batch.ids.shape, self._num_devices * num_sent + 1, np.int32)
        _fill_positions(
            work.distinct, asked.ends, work.positions, work.inverse, self._bits, has_row, slice_positions, per_device,
            num_sent, positions.reshape(-1),
        )  # fmt: skip
        fresh = mapper.fresh_lists(int(answered.stats["fresh"]), fresh_size(needed.fresh))
        rows = mapper.tier.rows_of(touched) if mapper.tier else None
        return GroupPlan(touched, sent, positions, *fresh, answered.num_sent, rows)
