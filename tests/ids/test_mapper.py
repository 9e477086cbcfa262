from collections.abc import Callable, Sequence

import numpy as np
import pytest

from monolith_jax.ids import group as group_module
from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.cuckoo import MapLayout, ladder
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.ids.mapper import Mapper
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.types import FreedRows, GroupIds, GroupPlan

LAYOUT = MapLayout(("user", "video"), (30, 50), 8)
TABLES = (0, 1, 0, 1, 1)
RULES = (Rule(AdmissionConfig("seen", 2, 400), ttl_s=4), Rule(AdmissionConfig("chance_each", 2), ttl_s=9))
"""Ids wait in filters, some are refused by chance, some expire, and others go at the cap."""

State = dict[str, np.ndarray]


def draw(rng: np.random.Generator, size: int = 16, pool: int = 100, tables: tuple[int, ...] = TABLES) -> GroupIds:
    """Skewed ids with repeats, equal ids in several tables, and empty positions that hold ids too."""
    ids = (rng.random((size, len(tables))) ** 3 * pool).astype(np.int64) * (2**61 // pool) - 2**60
    return GroupIds(ids, rng.random(ids.shape) < 0.8)


def seen(size: int, seconds: int = 1) -> np.ndarray:
    return np.full(size, seconds, np.uint32)


def received(plan: GroupPlan, slice_index: int, rows_per_device: int) -> list[int]:
    """What a slice of the batch gets: the number (device * rows_per_device + row) of each row, -1 for padding."""
    values = []
    num_devices, touched_size = plan.touched.shape
    for owner in range(num_devices):
        gathered = [owner * rows_per_device + row if row < rows_per_device else None for row in plan.touched[owner].tolist()]
        for which in plan.sent[owner, slice_index].tolist():
            assert 0 <= which <= touched_size
            values.append(-1 if which == touched_size else gathered[which])
        assert np.all(np.diff((plan.sent[owner, slice_index] == touched_size).astype(int)) >= 0), "padding comes last"
    return values


def check_plan(mapper: GroupMapper, plan: GroupPlan, batch: GroupIds, tables: tuple[int, ...], num_devices: int) -> set[int]:
    """Compares each position with the row of its own id; returns the numbers of the rows that the batch touches."""
    layout = mapper.maps.layout
    rows_per_device = layout.num_shards // num_devices * layout.rows_per_shard
    size, num_positions = batch.ids.shape
    assert plan.touched_rows is None
    arrays = {name: array for name, array in plan._asdict().items() if name != "touched_rows"}
    assert all(array.dtype == (np.uint32 if name == "fresh_ids" else np.int32) for name, array in arrays.items())
    where = np.empty((size, num_positions), np.int64)
    for position, table in enumerate(tables):
        shards, rows = mapper.maps.lookup(batch.ids[:, position], table)
        numbers = shards.astype(np.int64) * layout.rows_per_shard + layout.row_offsets[table] + rows
        where[:, position] = np.where(rows < 0, -1, numbers)
    refused, empty = plan.sent.shape[2] * num_devices, plan.sent.shape[2] * num_devices + 1
    for s in range(num_devices):
        values = received(plan, s, rows_per_device)
        for b in range(s * size // num_devices, (s + 1) * size // num_devices):
            for p in range(num_positions):
                position = plan.positions[b, p]
                if not batch.valid[b, p]:
                    assert position == empty
                elif where[b, p] < 0:
                    assert position == refused
                else:
                    assert values[position] == where[b, p]
        asked = np.unique(where[s * size // num_devices : (s + 1) * size // num_devices][_mask(batch, where, s, num_devices)])
        assert sorted(value for value in values if value != -1) == asked.tolist(), "each row is sent once, and none for nothing"
    touched = set()
    for device, rows in enumerate(plan.touched):
        assert np.unique(rows).size == rows.size
        touched |= {device * rows_per_device + row for row in rows.tolist() if row < rows_per_device}
    assert touched == set(where[batch.valid & (where >= 0)].tolist())
    return touched


def _mask(batch: GroupIds, where: np.ndarray, s: int, num_devices: int) -> np.ndarray:
    part = slice(s * len(where) // num_devices, (s + 1) * len(where) // num_devices)
    return batch.valid[part] & (where[part] >= 0)


def fresh_of(plan: GroupPlan, rows_per_device: int) -> set[tuple[int, int, int]]:
    """Returns (number of the row, id, table) of the fresh rows; what pads them is distinct and behind the end."""
    found = set()
    for device, rows in enumerate(plan.fresh_rows.astype(np.int64)):
        ids = np.ascontiguousarray(plan.fresh_ids[device]).view(np.int64)[:, 0]
        assert np.unique(rows).size == rows.size
        real = rows < rows_per_device
        assert not plan.fresh_ids[device][~real].any()
        numbers = device * rows_per_device + rows[real]
        found |= set(zip(numbers.tolist(), ids[real].tolist(), plan.fresh_tables[device][real].tolist(), strict=True))
    return found


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_every_position_gets_the_row_of_its_id(num_devices: int) -> None:
    rng = np.random.default_rng(1)
    mapper = GroupMapper(LAYOUT, TABLES, num_devices)
    rows_per_device = LAYOUT.num_shards // num_devices * LAYOUT.rows_per_shard
    known: dict[tuple[int, int], int] = {}
    refused = 0.0
    for step in range(30):
        batch = draw(rng, pool=3000)
        plan, freed, stats = mapper.plan(batch, seen(16, step), step, step)
        check_plan(mapper, plan, batch, TABLES, num_devices)
        assert freed.ids.size == stats["expired"] == stats["freed_at_cap"] == stats["not_admitted"] == 0
        pairs = {(TABLES[p], int(batch.ids[b, p])) for b, p in zip(*np.nonzero(batch.valid), strict=True)}
        new = {}
        for table, key in pairs - set(known):
            shard, row = (int(found[0]) for found in mapper.maps.lookup(np.array([key]), table))
            if row >= 0:
                new[table, key] = int(shard * LAYOUT.rows_per_shard + LAYOUT.row_offsets[table] + row)
        fresh = fresh_of(plan, rows_per_device)
        assert fresh == {(number, key, table) for (table, key), number in new.items()}
        known |= new
        assert len(set(known.values())) == len(known), "no two ids share a row"
        unknown = len(pairs - set(known))
        assert stats["occurrences"] == batch.valid.sum() and stats["unique"] == len(pairs)
        assert stats["fresh"] == len(fresh) and stats["rows"] == len(known) and stats["unknown"] == unknown
        assert stats["refused_at_cap"] + stats["refused_no_path"] == unknown
        refused += unknown
    assert refused and len(known) > 60


def new_mapper(num_devices: int = 2, num_threads: int = 1, rules: Sequence[Rule] = RULES) -> GroupMapper:
    return GroupMapper(LAYOUT, TABLES, num_devices, rules, ShardThreads(num_threads, ()))


def assert_same(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        mine, theirs = np.asarray(mine), np.asarray(theirs)
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)


def assert_same_state(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def freed_set(freed: FreedRows) -> set[tuple[int, ...]]:
    found = set(zip(*(array.tolist() for array in freed), strict=True))
    assert len(found) == freed.ids.size
    return found


@pytest.mark.parametrize("rules", [(), RULES])
def test_rows_do_not_depend_on_the_mesh(rules: Sequence[Rule]) -> None:
    mappers = [new_mapper(num_devices, 1, rules) for num_devices in (1, 8)]
    rng = np.random.default_rng(2)
    num_freed = 0
    for step in range(16):
        batch = draw(rng, 64, 300)
        plans, freed, stats = zip(*(mapper.plan(batch, seen(64, step), step, step) for mapper in mappers), strict=True)
        touched = [check_plan(*args) for args in zip(mappers, plans, [batch] * 2, [TABLES] * 2, (1, 8), strict=True)]
        assert touched[0] == touched[1]
        assert stats[0] == stats[1]
        assert fresh_of(plans[0], 8 * LAYOUT.rows_per_shard) == fresh_of(plans[1], LAYOUT.rows_per_shard)
        assert_same(freed[0], freed[1])
        num_freed += len(freed_set(freed[0]))
    assert bool(num_freed) == bool(rules)
    states = [mapper.get_state() for mapper in mappers]
    assert_same_state(*({**state, "sizes": np.zeros(0)} for state in states))


@pytest.mark.parametrize("worth_threads", [0, 2**15])
def test_plans_do_not_depend_on_threads(worth_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "_WORTH_THREADS", worth_threads)
    mappers = [new_mapper(1, num_threads) for num_threads in (1, 4)]
    rng = np.random.default_rng(7)
    num_freed = 0
    for step, size in enumerate((64, 8000, 0, 1, 3, 7000, 500, 30, 9000, 16, 16, 16)):  # 2^15 positions are 6,554 examples
        batch = draw(rng, size, 600)
        times = rng.integers(0, step + 1, size).astype(np.uint32)
        plans, freed, stats = zip(*(mapper.plan(batch, times, step, step) for mapper in mappers), strict=True)
        assert_same(plans[0], plans[1])
        assert_same(freed[0], freed[1])
        assert stats[0] == stats[1]
        check_plan(mappers[1], plans[1], batch, TABLES, 1)
        num_freed += len(freed_set(freed[0]))
        assert_same_state(mappers[0].get_state(), mappers[1].get_state())
    assert num_freed > 100


def test_more_threads_than_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "_WORTH_THREADS", 0)
    layout, rng = MapLayout(("user", "video"), (300, 500), 2), np.random.default_rng(8)
    batches = [draw(rng, 32, 600) for _ in range(4)]
    mappers = [GroupMapper(layout, TABLES, 2, RULES, ShardThreads(number, ())) for number in (1, 5)]
    for step, batch in enumerate(batches):
        plans = [mapper.plan(batch, seen(32, step), step, step)[0] for mapper in mappers]
        assert_same(*plans)
        check_plan(mappers[1], plans[1], batch, TABLES, 2)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_padded_sizes_only_grow(num_devices: int) -> None:
    layout = MapLayout(("user",), (20_000,), 64)
    mapper = GroupMapper(layout, (0, 0), num_devices)
    rng = np.random.default_rng(3)
    sizes = []
    for pool in (10, 40_000, 300, 80_000, 10):
        for size in (64, 2048):
            batch = draw(rng, size, pool, (0, 0))
            plan, _, _ = mapper.plan(batch, seen(size), 1, 0)
            check_plan(mapper, plan, batch, (0, 0), num_devices)
            sizes.append((plan.touched.shape[1], plan.sent.shape[2]))
    assert sizes == sorted(sizes) and sizes[0] == ((256, 256) if num_devices == 1 else (256, 64)) and max(sizes)[0] > 256
    assert all(size == ladder(size) for pair in sizes for size in pair)


def test_a_batch_without_ids() -> None:
    mapper = new_mapper()
    batch = GroupIds(np.ones((4, 5), np.int64), np.zeros((4, 5), np.bool_))
    plan, freed, stats = mapper.plan(batch, seen(4), 9, 0)
    assert check_plan(mapper, plan, batch, TABLES, 2) == set() and fresh_of(plan, 4 * LAYOUT.rows_per_shard) == set()
    assert stats["unique"] == stats["rows"] == 0
    plan, freed, stats = mapper.plan(GroupIds(batch.ids[:0], batch.valid[:0]), seen(0), 9, 1)
    assert plan.positions.shape == (0, 5) and stats["unique"] == 0 and freed.ids.size == 0


def test_without_inserting_nothing_changes() -> None:
    rng = np.random.default_rng(4)
    batches, others = ([draw(rng, 32, pool) for _ in range(20)] for pool in (200, 300))
    mapper, undisturbed = new_mapper(), new_mapper()
    plan, freed, stats = mapper.plan(others[0], seen(32), 10**6, 0, insert=False)
    assert check_plan(mapper, plan, others[0], TABLES, 2) == set() and stats["unknown"] == stats["unique"] > 0
    num_freed = 0
    for step, (batch, other) in enumerate(zip(batches, others, strict=True)):
        expected = undisturbed.plan(batch, seen(32, step), step, step)
        before = mapper.get_state()
        plan, freed, stats = mapper.plan(other, seen(32, 10**6), 10**6, step, insert=False)
        assert bool(check_plan(mapper, plan, other, TABLES, 2)) == bool(step) and stats["unknown"] > 0
        assert stats["fresh"] == stats["refused_at_cap"] == stats["not_admitted"] == stats["expired"] == freed.ids.size == 0
        assert not fresh_of(plan, 4 * LAYOUT.rows_per_shard)
        assert_same_state(mapper.get_state(), before)
        plan, freed, stats = mapper.plan(batch, seen(32, step), step, step)
        assert_same(plan, expected[0])
        assert_same(freed, expected[1])
        assert stats == expected[2]
        num_freed += freed.ids.size
    assert num_freed


def test_going_on_from_a_state_gives_the_same_plans() -> None:
    rng = np.random.default_rng(5)
    author = MapLayout(("author",), (300,), 8)

    def new() -> Mapper:
        return Mapper([new_mapper(), GroupMapper(author, (0, 0), 2)])

    steps = [(draw(rng, 64, 400), draw(rng, 64, 2000, (0, 0))) for _ in range(14)]
    mapper, states, plans = new(), [], []
    for number, step in enumerate(steps):
        states.append(mapper.get_state())
        plans.append(mapper.plan(step, np.arange(64) * 10 + 900 * number, 900 * number, number))
    assert all(sum(plan.stats[name] for plan in plans[6:]) > 0 for name in ("expired", "freed_at_cap", "not_admitted"))
    for start in (0, 1, 6):
        again = new()
        again.set_state(states[start])
        for one, other in zip(again.get_state(), states[start], strict=True):
            assert_same_state(one, other)
        for number, (step, plan) in enumerate(zip(steps[start:], plans[start:], strict=True), start):
            resumed = again.plan(step, np.arange(64) * 10 + 900 * number, 900 * number, number)
            assert resumed.stats == plan.stats
            for one, other in zip(resumed.groups + resumed.freed, plan.groups + plan.freed, strict=True):
                assert_same(one, other)
    with pytest.raises(ValueError, match="zip"):
        new().set_state(states[1][:1])
    with pytest.raises(ValueError, match="of tables"):
        new().set_state(states[1][::-1])


def used(mapper: GroupMapper) -> GroupMapper:
    rng = np.random.default_rng(9)
    for step in range(12):
        mapper.plan(draw(rng, 64, 200), seen(64, step), step, step)
    return mapper


def _count_one_more(state: State) -> None:
    state["counts"][0, 0] += 1


def _lose_an_id(state: State) -> None:
    rows = state["lines"][:, :, 8:12]
    rows[tuple(np.argwhere(rows != 2**32 - 1)[0])] = 2**32 - 1


def _move_an_id(state: State) -> None:
    lines = state["lines"]
    shard, line, slot = np.argwhere(lines[:, :, 8:12] != 2**32 - 1)[0]
    lines[shard, line, 2 * slot] ^= 1 << 31


DAMAGE: dict[str, Callable[[State], object]] = {
    "no sweeps": lambda state: state.pop("sweeps"),
    "no filters": lambda state: state.pop("filters"),
    "no lines": lambda state: state.pop("lines"),
    "no sizes": lambda state: state.pop("sizes"),
    "short filters": lambda state: state.update(filters=state["filters"][:, :-1]),
    "other type": lambda state: state.update(wanted=state["wanted"].astype(np.int64)),
    "third generation": lambda state: state["filter_heads"].__setitem__((0, 0), 2),
    "generation below 0": lambda state: state["filter_heads"].__setitem__((7, 1), -1),
    "sweep below 0": lambda state: state["sweeps"].__setitem__((3, 0), -1),
    "sweep beyond": lambda state: state["sweeps"].__setitem__((3, 1), LAYOUT.num_buckets[1]),
    "cursor beyond": lambda state: state["cursors"].__setitem__((3, 1), 10**6),
    "size below 0": lambda state: state["sizes"].__setitem__(0, -1),
    "count": _count_one_more,
    "lost id": _lose_an_id,
    "moved id": _move_an_id,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused(damage: str) -> None:
    state = used(new_mapper()).get_state()
    DAMAGE[damage](state)
    mapper = new_mapper()
    before = mapper.get_state()
    with pytest.raises(ValueError, match="'user', 'video'"):
        mapper.set_state(state)
    assert_same_state(mapper.get_state(), before)


def test_counts_of_groups_are_summed_and_times_are_the_latest() -> None:
    mapper = Mapper([GroupMapper(LAYOUT, TABLES, 1), GroupMapper(MapLayout(("author",), (300,), 8), (0,), 1)])
    ids = np.array([[1, 1, 1, 1, 1], [1, 2, 2, 1, 1], [3, 3, 3, 3, 3], [4, 4, 4, 4, 4]])
    everywhere = np.ones((4, 5), np.bool_)
    times = np.array([9_999, 4_000, -5, 2**42 + 7_000])
    plan = mapper.plan([GroupIds(ids, everywhere), GroupIds(ids[:, :1], everywhere[:, :1])], times)
    assert plan.stats["occurrences"] == 24 and plan.stats["unique"] == 4 + 4 + 3
    assert plan.stats["padding"] == pytest.approx(1 - (8 / 256 + 3 / 256) / 2)
    found = []
    for table in range(2):
        keys, _, _, seconds = mapper.groups[0].maps.entries(table)
        found.append(dict(zip(keys.tolist(), seconds.tolist(), strict=True)))
    latest = min(2**32 - 1, (2**42 + 7000) // 1000)
    assert found == [{1: 9, 2: 4, 3: 0, 4: latest}, {1: 9, 2: 4, 3: 0, 4: latest}]


def test_columns_of_a_larger_array_are_read() -> None:
    rng = np.random.default_rng(6)
    batch = draw(rng)
    spread = GroupIds(np.repeat(batch.ids, 2, axis=1)[:, ::2], np.repeat(batch.valid, 2, axis=1)[:, ::2])
    plans = [GroupMapper(LAYOUT, TABLES, 2).plan(one, seen(16), 1, 0)[0] for one in (batch, spread)]
    assert_same(*plans)


def test_clear_errors() -> None:
    with pytest.raises(ValueError, match="8 shards cannot be divided among 3 devices"):
        GroupMapper(LAYOUT, TABLES, 3)
    with pytest.raises(ValueError, match="15 examples cannot be divided among 2 devices"):
        GroupMapper(LAYOUT, TABLES, 2).plan(draw(np.random.default_rng(0), 15), seen(15), 1, 0)
    with pytest.raises(ValueError, match="more than int32 counts; use more than 1 devices"):
        GroupMapper(MapLayout(("user",), (2**32,), 64), (0,), 1)
