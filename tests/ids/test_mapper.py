import numpy as np
import pytest

from monolith_jax.ids.cuckoo import MapLayout, ladder
from monolith_jax.ids.mapper import GroupMapper, Mapper
from monolith_jax.types import GroupIds, GroupPlan

LAYOUT = MapLayout(("user", "video"), (30, 50), 8)
TABLES = (0, 1, 0, 1, 1)


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
    assert all(array.dtype == (np.uint32 if name == "fresh_ids" else np.int32) for name, array in plan._asdict().items())
    where = np.empty((size, num_positions), np.int64)
    for position, table in enumerate(tables):
        shards, rows = mapper.maps.lookup(batch.ids[:, position], table).astype(np.int64).T
        where[:, position] = np.where(rows < 0, -1, shards * layout.rows_per_shard + layout.row_offsets[table] + rows)
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
        plan, stats = mapper.plan(batch, seen(16, step))
        check_plan(mapper, plan, batch, TABLES, num_devices)
        pairs = {(TABLES[p], int(batch.ids[b, p])) for b, p in zip(*np.nonzero(batch.valid), strict=True)}
        new = {}
        for table, key in pairs - set(known):
            shard, row = mapper.maps.lookup(np.array([key]), table)[0].astype(np.int64)
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
        assert stats["padding"] == pytest.approx(1 - (len(pairs) - unknown) / plan.touched.size)
        refused += unknown
    assert refused and len(known) > 60


def test_rows_do_not_depend_on_the_mesh() -> None:
    mappers = [GroupMapper(LAYOUT, TABLES, num_devices) for num_devices in (1, 8)]
    rng = np.random.default_rng(2)
    for step in range(8):
        batch = draw(rng)
        plans, stats = zip(*(mapper.plan(batch, seen(16, step)) for mapper in mappers), strict=True)
        touched = [check_plan(*args) for args in zip(mappers, plans, [batch] * 2, [TABLES] * 2, (1, 8), strict=True)]
        assert touched[0] == touched[1]
        assert {**stats[0], "padding": 0} == {**stats[1], "padding": 0}
        assert fresh_of(plans[0], 8 * LAYOUT.rows_per_shard) == fresh_of(plans[1], LAYOUT.rows_per_shard)
    states = [mapper.maps.get_state() for mapper in mappers]
    assert all(np.array_equal(array, states[1][name]) for name, array in states[0].items())


@pytest.mark.parametrize("num_devices", [1, 8])
def test_padded_sizes_only_grow(num_devices: int) -> None:
    layout = MapLayout(("user",), (20_000,), 64)
    mapper = GroupMapper(layout, (0, 0), num_devices)
    rng = np.random.default_rng(3)
    sizes = []
    for pool in (10, 40_000, 300, 80_000, 10):
        for size in (64, 2048):
            batch = draw(rng, size, pool, (0, 0))
            plan, _ = mapper.plan(batch, seen(size))
            check_plan(mapper, plan, batch, (0, 0), num_devices)
            sizes.append((plan.touched.shape[1], plan.sent.shape[2]))
    assert sizes == sorted(sizes) and sizes[0] == (256, 256) and max(sizes)[0] > 256
    assert all(size == ladder(size) for pair in sizes for size in pair)


def test_a_batch_without_ids() -> None:
    mapper = GroupMapper(LAYOUT, TABLES, 2)
    batch = GroupIds(np.ones((4, 5), np.int64), np.zeros((4, 5), np.bool_))
    plan, stats = mapper.plan(batch, seen(4))
    assert check_plan(mapper, plan, batch, TABLES, 2) == set() and fresh_of(plan, 4 * LAYOUT.rows_per_shard) == set()
    assert stats["unique"] == stats["rows"] == 0 and stats["padding"] == 1
    plan, stats = mapper.plan(GroupIds(batch.ids[:0], batch.valid[:0]), seen(0))
    assert plan.positions.shape == (0, 5) and stats["unique"] == 0


def test_without_inserting_no_map_changes() -> None:
    mapper = GroupMapper(LAYOUT, TABLES, 2)
    rng = np.random.default_rng(4)
    known, other = draw(rng), draw(rng, pool=300)
    plan, stats = mapper.plan(known, seen(16), insert=False)
    assert check_plan(mapper, plan, known, TABLES, 2) == set() and stats["unknown"] == stats["unique"] > 0
    mapper.plan(known, seen(16, 5))
    before = mapper.maps.get_state()
    plan, stats = mapper.plan(other, seen(16, 9), insert=False)
    assert check_plan(mapper, plan, other, TABLES, 2) and stats["unknown"] > 0
    assert stats["fresh"] == stats["refused_at_cap"] == 0 and not fresh_of(plan, 4 * LAYOUT.rows_per_shard)
    assert all(np.array_equal(array, before[name]) for name, array in mapper.maps.get_state().items())


def test_going_on_from_a_state_gives_the_same_plans() -> None:
    rng = np.random.default_rng(5)
    layouts = (LAYOUT, MapLayout(("author",), (300,), 8))

    def new() -> Mapper:
        return Mapper([GroupMapper(LAYOUT, TABLES, 2), GroupMapper(layouts[1], (0, 0), 2)])

    steps = [(draw(rng, 64), draw(rng, 64, 2000, (0, 0))) for _ in range(6)]
    times = np.arange(64) * 1000
    mapper, states, plans = new(), [], []
    for step in steps:
        states.append(mapper.get_state())
        plans.append(mapper.plan(step, times))
    for start in (0, 1, 4):
        again = new()
        again.set_state(states[start])
        for step, plan in zip(steps[start:], plans[start:], strict=True):
            resumed = again.plan(step, times)
            assert resumed.stats == plan.stats
            for one, other in zip(resumed.groups, plan.groups, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="zip"):
        new().set_state(states[1][:1])
    with pytest.raises(ValueError, match="id maps of tables"):
        new().set_state(states[1][::-1])


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
    plans = [GroupMapper(LAYOUT, TABLES, 2).plan(one, seen(16))[0] for one in (batch, spread)]
    assert all(np.array_equal(a, b) for a, b in zip(*plans, strict=True))


def test_clear_errors() -> None:
    with pytest.raises(ValueError, match="8 shards cannot be divided among 3 devices"):
        GroupMapper(LAYOUT, TABLES, 3)
    with pytest.raises(ValueError, match="15 examples cannot be divided among 2 devices"):
        GroupMapper(LAYOUT, TABLES, 2).plan(draw(np.random.default_rng(0), 15), seen(15))
    with pytest.raises(ValueError, match="more than int32 counts; use more than 1 devices"):
        GroupMapper(MapLayout(("user",), (2**32,), 64), (0,), 1)
