"""Which rows of a group in two tiers are on the device, and in which slots (numba).

In: the rows of a plan's distinct ids. Out: the slots of those rows, and which slots change hands: a row that is not on the
device takes the slot of one that is, which goes back to the host.

Who has to go is found by a clock (Corbato 1968, "A paging experiment with the Multics system") with small counters: each slot
counts the plans that touched it while it was there, up to `MOST`; the hand takes a plan off each slot that it passes and stops
at the first that has none left. So a row that came for one plan is the first to go, and a row that many plans touch outlasts
several turns of the hand. Rows that this plan touches stay; so do those of tables that have a slot for every row. The state is
by shard: it depends on the plans so far, and neither on threads nor on the mesh. Expiry does not concern it: a row without an
id keeps its slot until the hand takes it, so that device and host together hold what one array on the device would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from monolith_jax.ids.lines import Distinct, jit, places_of
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.types import Moves

MOST = 3
"""Turns of the hand that a slot outlasts at most: for zipf(1.05) ids and a tenth of the rows on the device the hit rate is 0.56
with 1, 0.58 with 3 or 7 (least recently used first: 0.54); the more, the longer stays what was hot once."""
_IN_PLAN = 64
"""Bit of a mark: touched by the plan being made."""
_STAYS = 128
"""Bit of a mark: the row is of a table that has a slot for every row."""


@jit
def _free_slot(marks, row_at, hand):
    """Returns the first slot from the hand on that nothing keeps, or -1; counts down what it passes."""
    for _ in range((MOST + 1) * marks.size):
        slot = hand
        hand = hand + 1 if hand + 1 < marks.size else 0
        if row_at[slot] < 0 or marks[slot] == 0:
            return slot
        if marks[slot] < _IN_PLAN:
            marks[slot] -= 1
    return -1


@jit
def _pin(distinct, row_offsets, start, end, slot_of, marks):
    """Counts the plan for the slots of its rows that have one, and marks them; returns how many rows it has."""
    number = 0
    for i in range(start, end):
        if distinct.rows[i] >= 0:
            number += 1
            slot = slot_of[row_offsets[distinct.tables[i]] + distinct.rows[i]]
            if slot >= 0:
                mark = marks[slot]
                marks[slot] = (mark + ((mark & (_IN_PLAN - 1)) < MOST)) | _IN_PLAN
    return number


@jit
def _unpin(distinct, start, end, marks):
    for i in range(start, end):
        if distinct.rows[i] >= 0:
            marks[distinct.rows[i]] &= ~np.uint8(_IN_PLAN)


@jit
def assign_slots(
    distinct, row_offsets, stays, from_shard, to_shard, slot_of, row_at, marks, hands, slots, rows, evicted, loaded, numbers
):
    """Gives every row of a plan a slot.

    Args:
        distinct: The plan's ids with their rows; the rows become slots.
        row_offsets: int64 [T], where each table's rows start in a shard.
        stays: bool [T], whether the table has a slot for every row.
        from_shard, to_shard: Range of shards.
        slot_of: int32 [L, R], slot of each row, -1: on the host. Changed, as the three that follow.
        row_at: int32 [L, C], row of each slot, -1: none.
        marks: uint8 [L, C], plans that touched the slot, and what else keeps it.
        hands: int32 [L], where each shard's hand is.
        slots, rows, evicted, loaded: [N] out: the `Moves` of each shard from `distinct.starts[shard]` on.
        numbers: int64 [L, 3] out: how many those are, rows of the plan that were not fresh, and all of its rows. The first is
            -1 where the rows do not fit; the state is then of no use any more.
    """
    of = distinct.tables
    for shard in range(from_shard, to_shard):
        start = distinct.starts[shard]
        end, at, known = start + distinct.numbers[shard], start, 0
        left = numbers[shard, 2] = _pin(distinct, row_offsets, start, end, slot_of[shard], marks[shard])
        for i in range(start, end):
            if distinct.rows[i] < 0:
                continue
            known += not distinct.fresh[i]
            row = row_offsets[of[i]] + distinct.rows[i]
            slot = np.int64(slot_of[shard, row])
            if slot < 0:
                slot = _free_slot(marks[shard], row_at[shard], np.int64(hands[shard]))
                if slot < 0:
                    break
                hands[shard] = slot + 1 if slot + 1 < marks.shape[1] else 0
                old = row_at[shard, slot]
                if old >= 0:
                    slot_of[shard, old] = -1
                slot_of[shard, row], row_at[shard, slot] = slot, row
                marks[shard, slot] = _IN_PLAN | (_STAYS if stays[of[i]] else 0)
                slots[at], rows[at], evicted[at], loaded[at] = slot, row, old, not distinct.fresh[i]
                at += 1
            distinct.rows[i] = slot
            left -= 1
        numbers[shard, 0], numbers[shard, 1] = at - start, known
        if left:
            # The ids that are left still have rows, which are no places of marks.
            numbers[shard, 0] = -1
            continue
        _unpin(distinct, start, end, marks[shard])


class Tier:
    """The slots of a group's rows on the device. Not thread safe: one caller at a time."""

    def __init__(
        self,
        names: Sequence[str],
        row_offsets: np.ndarray,
        stays: Sequence[bool],
        rows_per_shard: int,
        slots_per_shard: int,
        num_shards: int,
    ) -> None:
        """Makes empty slots.

        Args:
            names: Of the group's tables, for messages.
            row_offsets: int64 [T], where each table's rows start in a shard.
            stays: Of each table whether its rows stay on the device once they are there. There must be a slot for each of them,
                and at least one more.
            rows_per_shard: R.
            slots_per_shard: C.
            num_shards: L, or as many of them as this process maps.
        """
        self.slots_per_shard = slots_per_shard
        self._names, self._row_offsets = tuple(names), np.asarray(row_offsets, np.int64)
        self._stays = np.asarray(stays, np.bool_)
        self._slot_of = np.full((num_shards, rows_per_shard), -1, np.int32)
        self._row_at = np.full((num_shards, slots_per_shard), -1, np.int32)
        self._marks = np.zeros((num_shards, slots_per_shard), np.uint8)
        self._hands = np.zeros(num_shards, np.int32)
        self.moves = _no_moves()
        """Those of the last plan."""
        self.known = 0
        """Rows of the last plan that were not fresh."""
        self._needed = 0

    def assign(self, distinct: Distinct, threads: ShardThreads) -> None:
        """Turns the rows of a plan's distinct ids into slots, and sets `moves` and `known`. `check` tells whether they fit."""
        size, num_shards = distinct.rows.size, self._hands.size
        slots, rows, evicted = (np.empty(size, np.int32) for _ in range(3))
        loaded, numbers = np.empty(size, np.bool_), np.zeros((num_shards, 3), np.int64)
        state = (self._slot_of, self._row_at, self._marks, self._hands)

        def of_shards(first: int, last: int) -> None:
            assign_slots(distinct, self._row_offsets, self._stays, first, last, *state, slots, rows, evicted, loaded, numbers)

        threads.run(of_shards, num_shards)
        if (numbers[:, 0] < 0).any():
            self._needed = int(numbers[numbers[:, 0] < 0, 2].max())
            return
        of_shard = numbers[:, 0]
        shards = np.repeat(np.arange(num_shards, dtype=np.int32), of_shard)
        at = places_of(distinct.starts, of_shard)
        self.moves = Moves(shards, slots[at], rows[at], evicted[at], loaded[at])
        self.known = int(numbers[:, 1].sum())

    def check(self) -> None:
        """Refuses the last plan where it did not fit; the slots are then of no use any more.

        Raises:
            ValueError: A shard has too few slots for the rows of the plan.
        """
        needed = self._needed
        if not needed:
            return
        tiered = [name for name, stays in zip(self._names, self._stays, strict=True) if not stays]
        slots = f"{self.slots_per_shard:,} slots" + (", some kept by tables of memory 'device'" if self._stays.any() else "")
        raise ValueError(
            f"a batch does not fit on the device: it needs {needed:,} distinct rows of tables {', '.join(self._names)} in one "
            f"shard, and a shard has {slots}. Raise TableConfig.device_rows of {', '.join(tiered)} to "
            f"{math.ceil(10 * needed / self.slots_per_shard) / 10} times what it is or more, or lower TrainConfig.batch_size"
        )

    def rows_of(self, slots: np.ndarray) -> np.ndarray:
        """Returns the rows in their shards, int32 [S, V], that slots of each device's part [S, V] hold; any where out of it."""
        flat = self._row_at.reshape(slots.shape[0], -1)
        return np.take_along_axis(flat, np.minimum(slots, flat.shape[1] - 1), axis=1)

    def stats(self) -> dict[str, float]:
        """Returns counts of the last plan: rows loaded, evicted, not fresh; and 1 where it did not fit."""
        loaded, evicted = int(self.moves.loaded.sum()), int((self.moves.evicted >= 0).sum())
        counts = {"loaded": float(loaded), "evicted": float(evicted), "known": float(self.known)}
        return counts | {"too_few_slots": float(self._needed > 0)}

    def reset(self) -> None:
        """Forgets which rows are on the device: all are on the host."""
        self._slot_of[:] = -1
        self._row_at[:] = -1
        self._marks[:] = 0
        self._hands[:] = 0
        self.moves, self.known, self._needed = _no_moves(), 0, 0


def _no_moves() -> Moves:
    empty = np.zeros(0, np.int32)
    return Moves(empty, empty, empty, empty, np.zeros(0, np.bool_))
