"""Several processes plan what one plans: the same rows, the same routes, the same maps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.ids.mapper import Mapper
from monolith_jax.ids.owners import OwnedGroup
from monolith_jax.ids.tier import Tier
from monolith_jax.types import GroupIds, GroupPlan, Moves, Plan
from tests.ids.threads_exchange import ThreadsExchange, together

SHARDS = 16
LAYOUTS = (MapLayout(("user", "video"), (300, 500), SHARDS), MapLayout(("tag",), (90,), SHARDS))
TABLES = ((0, 1, 1), (0, 0))
RULES = (
    (Rule(AdmissionConfig("seen", 2), 500), Rule(ttl_s=900)),
    (Rule(AdmissionConfig("chance", 2)),),
)
IN_TIERS = (RULES[0], (Rule(),))
"""The first group is in two tiers."""
SLOTS = 14
NO_RULES = ((Rule(), Rule()), (Rule(),))
SPECIAL = np.array([0, -1, 2**63 - 1, -(2**63), 1], np.int64)

Batch = tuple[list[GroupIds], np.ndarray]


def draw(rng: np.random.Generator, size: int, num_ids: int, step: int) -> Batch:
    batch = []
    for tables in TABLES:
        ids = rng.integers(0, num_ids, (size, len(tables))) * 7919 - 100
        ids[rng.random(ids.shape) < 0.05] = rng.choice(SPECIAL)
        batch.append(GroupIds(ids, rng.random(ids.shape) < 0.9))
    return batch, (np.int64(step) * 60 + rng.integers(0, 60, size)) * 1000


def part_of(batch: Batch, index: int, number: int) -> Batch:
    rows = slice(index * len(batch[1]) // number, (index + 1) * len(batch[1]) // number)
    return [GroupIds(group.ids[rows], group.valid[rows]) for group in batch[0]], batch[1][rows]


def make_groups(num_devices: int, rules: Any, process_id: int = 0, num_processes: int = 1) -> list[GroupMapper]:
    shards = SHARDS // num_processes
    return [
        GroupMapper(
            layout, tables, num_devices, of_group, process_id=process_id, num_processes=num_processes,
            tier=Tier(layout.names, layout.row_offsets, (False,) * len(layout.names), layout.rows_per_shard, SLOTS, shards)
            if rules is IN_TIERS and layout is LAYOUTS[0] else None,
        )
        for layout, tables, of_group in zip(LAYOUTS, TABLES, rules, strict=True)
    ]  # fmt: skip


def run_alone(batches: Sequence[Batch], num_devices: int, rules: Any) -> tuple[list[Plan], Any]:
    mapper = Mapper(make_groups(num_devices, rules))
    plans = [mapper.plan(ids, times, int(times.max()), number) for number, (ids, times) in enumerate(batches)]
    return plans, mapper.get_state()


def run_together(batches: Sequence[Batch], num_devices: int, rules: Any, num_processes: int) -> list[tuple[list[Plan], Any]]:
    def work(exchange: ThreadsExchange) -> tuple[list[Plan], Any]:
        mapper = Mapper(make_groups(num_devices, rules, exchange.process_id, num_processes), num_devices, exchange)
        plans = []
        for number, batch in enumerate(batches):
            ids, times = part_of(batch, exchange.process_id, num_processes)
            plans.append(mapper.plan(ids, times, int(batch[1].max()), number))
        return plans, mapper.get_state()

    return together(num_processes, work)


def whole(plans: Sequence[GroupPlan]) -> GroupPlan:
    """Returns the plan that the processes' parts make up."""
    return GroupPlan(*(None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*plans, strict=True)))


def resolved(plan: GroupPlan, num_devices: int) -> np.ndarray:
    """Returns for each position device and row there, -1 for a refused id, -2 for an empty position."""
    size, slices = plan.sent.shape[2], np.repeat(np.arange(num_devices), plan.positions.size // num_devices)
    flat = plan.positions.reshape(-1)
    there = flat < num_devices * size
    owner, place = np.where(there, flat // size, 0), np.where(there, flat % size, 0)
    at = plan.sent[owner, slices, place]
    # No padding is ever asked for.
    assert (at[there] < plan.touched.shape[1]).all() and (place < plan.num_sent[owner, slices])[there].all()
    rows = plan.touched[owner, np.where(there, at, 0)]
    state = np.where(flat == num_devices * size, -1, -2)
    return np.where(there, owner * 10_000_000 + rows, state).reshape(plan.positions.shape)


def check_equal(batches: Sequence[Batch], num_devices: int, rules: Any, num_processes: int) -> list[Plan]:
    alone, state = run_alone(batches, num_devices, rules)
    others = run_together(batches, num_devices, rules, num_processes)
    for number, plan in enumerate(alone):
        parts = [plans[number] for plans, _ in others]
        for name, value in plan.stats.items():
            for part in parts:
                assert part.stats[name] == pytest.approx(value, rel=1e-12), (number, name)
        for group, of_group in enumerate(plan.groups):
            found = whole([part.groups[group] for part in parts])
            for name in ("touched", "num_sent", "fresh_rows", "fresh_ids", "fresh_tables"):
                np.testing.assert_array_equal(getattr(found, name), getattr(of_group, name), err_msg=f"{number} {name}")
            np.testing.assert_array_equal(resolved(found, num_devices), resolved(of_group, num_devices))
            freed = [np.concatenate(arrays) for arrays in zip(*(part.freed[group] for part in parts), strict=True)]
            for mine, theirs in zip(freed, plan.freed[group], strict=True):
                np.testing.assert_array_equal(mine, theirs)
            if of_group.touched_rows is not None:
                np.testing.assert_array_equal(found.touched_rows, of_group.touched_rows)
                check_moves([part.moves[group] for part in parts], plan.moves[group])
    for group, arrays in enumerate(state):
        for name, array in arrays.items():
            of_parts = [of_process[group][name] for _, of_process in others]
            found = of_parts[0] if name == "sizes" else np.concatenate(of_parts)
            np.testing.assert_array_equal(found, array, err_msg=name)
    return alone


def check_moves(parts: Sequence[Moves | None], whole: Moves | None) -> None:
    """Compares the moves of processes, whose shards are their own, with those of one."""
    assert whole is not None
    for process, part in enumerate(parts):
        assert part is not None
        first = process * SHARDS // len(parts)
        mine = (whole.shards >= first) & (whole.shards < first + SHARDS // len(parts))
        np.testing.assert_array_equal(part.shards + first, whole.shards[mine])
        for one, other in zip(part[1:], whole[1:], strict=True):
            np.testing.assert_array_equal(one, other[mine])


@pytest.mark.parametrize("rules", [NO_RULES, RULES, IN_TIERS], ids=["all ids", "admission and expiry", "two tiers"])
@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 2), (2, 8), (4, 4), (4, 8), (8, 8), (1, 4)])
def test_processes_plan_what_one_plans(num_processes: int, num_devices: int, rules: Any) -> None:
    rng = np.random.default_rng(num_processes)
    batches = [draw(rng, 32, 40 + 60 * step, step * 5) for step in range(12)]
    plans = check_equal(batches, num_devices, rules, num_processes)
    if rules is IN_TIERS:
        assert min(sum(plan.stats[name] for plan in plans) for name in ("loaded", "evicted", "hit_rate")) > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ids=st.integers(1, 2000), num_processes=st.sampled_from([2, 4]))
def test_any_batches(seed: int, num_ids: int, num_processes: int) -> None:
    rng = np.random.default_rng(seed)
    check_equal([draw(rng, 16, num_ids, int(rng.integers(0, 100))) for _ in range(4)], 8, RULES, num_processes)


def test_one_process_is_idle_while_another_has_a_burst() -> None:
    rng = np.random.default_rng(5)
    batches = []
    for step in range(4):
        ids, times = draw(rng, 256, 3000, step)
        for group in ids:
            group.valid[:128] = False
        batches.append((ids, times))
    check_equal(batches, 4, NO_RULES, 2)


def test_full_tables_refuse_the_same_ids() -> None:
    rng = np.random.default_rng(6)
    batches = [draw(rng, 128, 100_000, step) for step in range(12)]
    plans, _ = run_alone(batches, 4, NO_RULES)
    assert plans[-1].stats["refused_at_cap"] > 50
    check_equal(batches, 4, NO_RULES, 4)


def test_padded_sizes_are_those_of_the_mesh() -> None:
    rng = np.random.default_rng(8)
    batches = [draw(rng, 256, 3000, step) for step in range(3)]
    _, state = run_alone(batches, 1, NO_RULES)
    fresh, resumed, same = (Mapper(make_groups(devices, NO_RULES)) for devices in (8, 8, 1))
    resumed.set_state(state)
    same.set_state(state)
    ids, times = draw(rng, 256, 3000, 3)
    sizes = [[one.sent.shape[2] for one in mapper.plan(ids, times).groups] for mapper in (fresh, resumed, same)]
    assert sizes[0][0] >= sizes[1][0] and 2 * sizes[1][0] < sizes[2][0]


def test_frozen_tables_are_read_only() -> None:
    rng = np.random.default_rng(7)
    first, second = draw(rng, 32, 50, 0), draw(rng, 32, 100, 1)

    def work(exchange: ThreadsExchange) -> tuple[Plan, Any, Any]:
        mapper = Mapper(make_groups(4, NO_RULES, exchange.process_id, 2), 4, exchange)
        ids, times = part_of(first, exchange.process_id, 2)
        mapper.plan(ids, times)
        before = mapper.get_state()
        ids, times = part_of(second, exchange.process_id, 2)
        return mapper.plan(ids, times, insert=False), before, mapper.get_state()

    alone = Mapper(make_groups(4, NO_RULES))
    alone.plan(*first)
    expected = alone.plan(*second, insert=False)
    found = together(2, work)
    for group in range(2):
        plan = whole([plan.groups[group] for plan, _, _ in found])
        np.testing.assert_array_equal(resolved(plan, 4), resolved(expected.groups[group], 4))
        assert (resolved(plan, 4) == -1).any()
    for _, before, after in found:
        for one, other in zip(before, after, strict=True):
            for name in set(one) - {"sizes"}:
                np.testing.assert_array_equal(one[name], other[name])


def test_too_many_devices_of_a_process_are_refused() -> None:
    with pytest.raises(ValueError, match="64 devices cannot be divided among 1 processes with at most 32 each"):
        OwnedGroup(GroupMapper(MapLayout(("id",), (100,), 64), (0,), 64), 64, 1)
