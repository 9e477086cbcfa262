"""Slots of rows on the device against plain Python, and what no plan may break."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.ids.group import GroupMapper
from monolith_jax.ids.lines import Distinct, make_distinct
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.ids.tier import MOST, Tier
from monolith_jax.types import GroupIds, GroupPlan, Moves

SHARDS, ROWS = 4, 12
OFFSETS = np.array([0, 8])
"""Two tables: eight rows of the first, four of the second."""
ALONE = ShardThreads(1, ())


class Clock:
    """A shard, written down as it is told."""

    def __init__(self, num_slots: int, stays: tuple[bool, bool]) -> None:
        self.rows: list[int | None] = [None] * num_slots
        self.marks = [0] * num_slots
        self.hand, self.stays = 0, stays

    def plan(self, rows: list[int], fresh: list[bool]) -> tuple[list[int], list[tuple[int, int, int, bool]]]:
        """Returns the slots of whole rows, and (slot, row, evicted, loaded) of those that change hands."""
        kept = {slot for slot, row in enumerate(self.rows) if row in rows}
        for slot in kept:
            self.marks[slot] = min(self.marks[slot] + 1, MOST)
        moves = []
        for row, is_fresh in zip(rows, fresh, strict=True):
            if row in self.rows:
                continue
            while True:
                slot, self.hand = self.hand, (self.hand + 1) % len(self.rows)
                there = self.rows[slot]
                if there is None:
                    break
                if slot in kept or self.stays[there >= 8]:
                    continue
                if self.marks[slot] == 0:
                    break
                self.marks[slot] -= 1
            moves.append((slot, row, -1 if there is None else there, not is_fresh))
            self.rows[slot], self.marks[slot] = row, 0
            kept.add(slot)
        return [self.rows.index(row) for row in rows], moves


def distinct_of(plan: list[list[tuple[int, bool]]]) -> Distinct:
    """Returns the distinct ids of a plan: whole row (-1: none) and whether it is fresh, by shard."""
    distinct = make_distinct(sum(map(len, plan)) + 3 * SHARDS, SHARDS)
    at = 0
    for shard, rows in enumerate(plan):
        distinct.starts[shard], distinct.numbers[shard] = at, len(rows)
        for i, (row, fresh) in enumerate(rows, at):
            distinct.tables[i] = row >= 8
            distinct.rows[i] = row - OFFSETS[int(row >= 8)] if row >= 0 else row
            distinct.fresh[i] = fresh
        at += len(rows) + 3
    return distinct


def tier_of(num_slots: int, stays: tuple[bool, bool] = (False, False)) -> Tier:
    return Tier(("user", "video"), OFFSETS, stays, ROWS, num_slots, SHARDS)


def rows_of(distinct: Distinct, shard: int) -> list[int]:
    start = distinct.starts[shard]
    return distinct.rows[start : start + distinct.numbers[shard]].tolist()


def of_shard(moves: Moves, shard: int) -> list[tuple[int, int, int, bool]]:
    mine = moves.shards == shard
    return list(zip(*(part[mine].tolist() for part in moves[1:]), strict=True))


row = st.integers(-2, ROWS - 1)
shard_plan = st.lists(row, max_size=6, unique_by=lambda one: one if one >= 0 else None).flatmap(
    lambda rows: st.tuples(*(st.tuples(st.just(one), st.booleans() if one >= 0 else st.just(False)) for one in rows))
)
plans = st.lists(st.lists(shard_plan.map(list), min_size=SHARDS, max_size=SHARDS), max_size=12)


@settings(max_examples=150, deadline=None)
@given(plans, st.sampled_from([(6, (False, False)), (9, (False, False)), (10, (False, True)), (12, (False, False))]))
def test_slots_are_those_of_plain_python(
    plans: list[list[list[tuple[int, bool]]]], sizes: tuple[int, tuple[bool, bool]]
) -> None:
    num_slots, stays = sizes
    tier, threaded = tier_of(num_slots, stays), tier_of(num_slots, stays)
    clocks = [Clock(num_slots, stays) for _ in range(SHARDS)]
    for plan in plans:
        distinct, again = distinct_of(plan), distinct_of(plan)
        tier.assign(distinct, ALONE)
        threaded.assign(again, ShardThreads(3, ()))
        for shard, rows in enumerate(plan):
            known = [(one, fresh) for one, fresh in rows if one >= 0]
            slots, moves = clocks[shard].plan([one for one, _ in known], [fresh for _, fresh in known])
            assert of_shard(tier.moves, shard) == of_shard(threaded.moves, shard) == moves
            found = rows_of(distinct, shard)
            assert [slot for slot in found if slot >= 0] == slots
            assert [one for one in found if one < 0] == [one for one, _ in rows if one < 0]
            # Which row is in which slot, as the device is told.
            there = np.array([slots], np.int32) + shard * num_slots
            assert tier.rows_of(there).tolist() == [[one for one, _ in known]]
        every = [(one, fresh) for rows in plan for one, fresh in rows if one >= 0]
        loaded = sum(of[3] for shard in range(SHARDS) for of in of_shard(tier.moves, shard))
        evicted = sum(of[2] >= 0 for shard in range(SHARDS) for of in of_shard(tier.moves, shard))
        known = sum(not fresh for _, fresh in every)
        assert tier.stats() == {"loaded": loaded, "evicted": evicted, "known": known, "too_few_slots": 0}
        tier.check()


def test_what_many_plans_touch_outlasts_what_one_did() -> None:
    tier = tier_of(4)

    def plan(*rows: int) -> list[int]:
        tier.assign(distinct_of([[(one, False) for one in rows], [], [], []]), ALONE)
        return tier.moves.rows.tolist()

    for _ in range(3):
        plan(0, 1)
    loads = [plan(2 + number % 8) for number in range(6)]
    assert all(loads), "rows that come once have to be loaded"
    assert plan(0, 1) == [], "and do not drive out those that came often"


def test_a_reset_forgets_everything() -> None:
    tier, plan = tier_of(5), [[(row, False) for row in rows] for rows in ([1, 2, 9], [3], [4, 5, 6, 7, 8], [])]
    tier.assign(distinct_of(plan), ALONE)
    first = tier.moves
    tier.assign(distinct_of(plan), ALONE)
    assert tier.moves.slots.size == 0 and tier.stats()["known"] == 9
    tier.reset()
    assert tier.moves.slots.size == 0
    tier.assign(distinct_of(plan), ALONE)
    for one, other in zip(first, tier.moves, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("stays", [(False, False), (False, True)])
def test_a_plan_that_does_not_fit_is_refused(stays: tuple[bool, bool]) -> None:
    tier = tier_of(6, stays)
    rows = [(row, False) for row in (0, 1, 2, 3, 8, 9)]
    tier.assign(distinct_of([rows, rows, [], rows]), ALONE)
    tier.check()
    tier.assign(distinct_of([rows, [*rows, (4, False)], [], []]), ALONE)
    assert tier.stats()["too_few_slots"] == 1
    with pytest.raises(ValueError, match=r"it needs 7 distinct rows of tables user, video in one shard") as caught:
        tier.check()
    told = str(caught.value)
    assert "a shard has 6 slots" in told and "to 1.2 times what it is" in told and "TrainConfig.batch_size" in told
    assert f"Raise TableConfig.device_rows of {'user' if stays[1] else 'user, video'} to" in told
    assert ("memory 'device'" in told) == stays[1]


def test_a_mapper_whose_state_is_set_takes_no_row_for_resident() -> None:
    layout = MapLayout(("user", "video"), (300, 500), SHARDS)
    tier = Tier(layout.names, layout.row_offsets, (False, False), layout.rows_per_shard, 20, SHARDS)
    mapper = GroupMapper(layout, (0, 1), 2, tier=tier)
    batch = GroupIds(np.arange(32).reshape(16, 2), np.ones((16, 2), np.bool_))

    def plan() -> tuple[dict[str, float], GroupPlan]:
        planned, _, stats = mapper.plan(batch, np.ones(16, np.uint32), 1, 0)
        return stats, planned

    stats, planned = plan()
    assert (stats["fresh"], stats["loaded"], stats["known"]) == (32, 0, 0)
    # Slots are not rows: of each device the first ones are taken, and they tell their rows.
    part = 2 * tier.slots_per_shard
    touched, rows = planned.touched[planned.touched < part], planned.touched_rows[planned.touched < part]
    assert touched.size == 32 and (touched % 20 < 20).all() and (rows >= 0).all()
    assert set(planned.fresh_rows[planned.fresh_rows < part].tolist()) == set(touched.tolist())
    state = mapper.get_state()
    assert plan()[0]["loaded"] == 0
    mapper.set_state(state)
    assert plan()[0]["loaded"] == 32
