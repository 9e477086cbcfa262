import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids.cuckoo import MAX_LOAD, IdMaps, MapLayout, ladder, text_seed
from monolith_jax.ids.lines import SLOTS
from monolith_jax.ids.threads import ShardThreads

EDGES = (-1, 0, 1, -(2**63), 2**63 - 1, 2**62)


def put(
    maps: IdMaps, ids: list[int] | np.ndarray, table: int = 0, seen_s: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Returns shards, rows, fresh, at_cap, no_path."""
    keys = np.asarray(ids, np.int64)
    return maps.lookup_or_insert(keys, table, np.full(keys.size, seen_s, np.uint32))


def pairs(shards: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def places_of(maps: IdMaps, table: int) -> dict[int, tuple[int, int, int]]:
    """Shard, row and last-seen of each id."""
    ids, *places = (array.tolist() for array in maps.entries(table))
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, zip(*places, strict=True), strict=True))


def shard_of(layout: MapLayout, table: int, key: int) -> int:
    """The documented hash with Python's integers."""
    x = (key ^ text_seed(layout.names[table])) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> (64 - layout.num_shards.bit_length() + 1)


def assert_same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.shape == other[name].shape
        assert array.tobytes() == other[name].tobytes(), name


class Oracle:
    """Dicts that say what the maps must say."""

    def __init__(self, layout: MapLayout) -> None:
        self.layout = layout
        self.places: list[dict[int, tuple[int, int]]] = [{} for _ in layout.names]
        self.seen: list[dict[int, int]] = [{} for _ in layout.names]

    def in_shard(self, table: int, shard: int) -> set[int]:
        return {row for where, row in self.places[table].values() if where == shard}

    def expected(self, table: int, ids: list[int]) -> list[tuple[int, int]]:
        places = self.places[table]
        return [places.get(key, (shard_of(self.layout, table, key), -1)) for key in ids]

    def put(self, maps: IdMaps, ids: list[int], table: int, seen_s: int) -> None:
        shards, rows, fresh, at_cap, no_path = put(maps, ids, table, seen_s)
        full = refused = 0
        for key, shard, row, new in zip(ids, shards.tolist(), rows.tolist(), fresh.tolist(), strict=True):
            assert shard == shard_of(self.layout, table, key)
            if key in self.places[table]:
                assert (shard, row) == self.places[table][key] and not new
                self.seen[table][key] = max(self.seen[table][key], seen_s)
                continue
            taken = self.in_shard(table, shard)
            if row < 0:
                assert row == -1 and not new
                refused += 1
                full += len(taken) == self.layout.caps[table]
            else:
                assert new and row not in taken and row < self.layout.caps[table]
                self.places[table][key], self.seen[table][key] = (shard, row), seen_s
        assert at_cap == full and at_cap + no_path == refused

    def erase(self, maps: IdMaps, ids: list[int], table: int) -> None:
        assert pairs(*maps.erase(np.array(ids, np.int64), table)) == self.expected(table, ids)
        for key in ids:
            self.places[table].pop(key, None)
            self.seen[table].pop(key, None)

    def check(self, maps: IdMaps, pool: list[int]) -> None:
        assert maps.num_rows.tolist() == [len(places) for places in self.places]
        keys = np.array(pool, np.int64)
        for table, places in enumerate(self.places):
            assert pairs(*maps.lookup(keys, table)) == self.expected(table, pool)
            assert pairs(*maps.lookup(keys.view(np.uint64), table)) == self.expected(table, pool)
            seen = self.seen[table]
            assert places_of(maps, table) == {key: (*place, seen[key]) for key, place in places.items()}


POOL = [*EDGES, *range(100, 140), *(7 * 2**k for k in range(3, 40))]
KEYS = st.lists(st.sampled_from(POOL), max_size=30, unique=True)
STEP = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 2), KEYS, st.integers(0, 2**32 - 1)),
    st.tuples(st.just("erase"), st.integers(0, 2), KEYS),
    st.tuples(st.just("look")),
    st.tuples(st.just("save")),
)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(STEP, max_size=15),
    num_shards=st.sampled_from([2, 4, 64]),
    max_rows=st.tuples(st.integers(1, 40), st.integers(1, 8), st.integers(1, 3)),
)
def test_agrees_with_dicts(steps: list[tuple], num_shards: int, max_rows: tuple[int, ...]) -> None:
    layout = MapLayout(("user", "video", "author"), max_rows, num_shards)
    maps, oracle = IdMaps(layout), Oracle(layout)
    for step in steps:
        if step[0] == "put":
            oracle.put(maps, step[2], step[1], step[3])
        elif step[0] == "erase":
            oracle.erase(maps, step[2], step[1])
        elif step[0] == "look":
            oracle.check(maps, POOL)
        else:
            saved = maps.get_state()
            maps = IdMaps(layout)
            maps.set_state(saved)
            assert_same_state(maps.get_state(), saved)
    oracle.check(maps, POOL)


@pytest.mark.parametrize("num_shards", [2, 4, 64])
@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 8, 13, 21, 34, 40])
def test_a_tiny_table_holds_its_ids_and_refuses_the_rest(max_rows: int, num_shards: int) -> None:
    layout = MapLayout(("user", "video"), (max_rows, max_rows), num_shards)
    rng = np.random.default_rng(max_rows * 100 + num_shards)
    ids = np.unique(rng.integers(-(2**63), 2**63 - 1, num_shards * 60 + 400))
    rng.shuffle(ids)
    maps, oracle = IdMaps(layout), Oracle(layout)
    for table in range(2):
        *_, at_cap, no_path = put(maps, ids[:max_rows], table)
        assert (at_cap, no_path) == (0, 0), "max_rows ids must fit"
    maps = IdMaps(layout)
    oracle.put(maps, ids.tolist(), 0, 1)
    held = int(maps.num_rows[0])
    assert max_rows <= held < len(ids)
    refused = [key for key in ids.tolist() if key not in oracle.places[0]]
    before = maps.get_state()
    shards, rows, fresh, at_cap, no_path = put(maps, refused)
    assert (rows == -1).all() and not fresh.any() and at_cap + no_path == len(refused)
    # Times of the ids that are there stay, and no line has moved for nothing.
    assert_same_state(maps.get_state(), before)
    # Freed rows go to the next ids of the same shards.
    gone = list(oracle.places[0])[::2]
    freed = set(oracle.expected(0, gone))
    oracle.erase(maps, gone, 0)
    shards, rows, fresh, *_ = put(maps, refused)
    reused = set(pairs(shards[fresh], rows[fresh]))
    assert reused and reused <= freed and len(reused) == fresh.sum()


def test_max_rows_ids_fit_whatever_they_are() -> None:
    for num_shards in (2, 16, 64):
        layout = MapLayout(tuple(f"t{k}" for k in range(60)), tuple(range(1, 2000, 33))[:60], num_shards)
        maps = IdMaps(layout)
        for table, max_rows in enumerate(layout.max_rows):
            ids = np.arange(max_rows, dtype=np.int64) * (2 ** (table % 40)) - 5  # neighbours and strides, as ids often are
            *_, at_cap, no_path = put(maps, ids, table)
            assert (at_cap, no_path) == (0, 0)
        assert maps.num_rows.tolist() == list(layout.max_rows)


def test_equal_ids_of_several_tables_are_apart() -> None:
    layout = MapLayout(("user", "video", "author"), (50, 50, 50), 4)
    maps = IdMaps(layout)
    ids = np.array([*EDGES, 77], np.int64)
    places = set()
    for table in range(3):
        shards, rows, fresh, *_ = put(maps, ids, table)
        assert fresh.all()
        places |= set(pairs(shards, rows + layout.row_offsets[table]))
    assert maps.num_rows.tolist() == [7, 7, 7]
    assert len(places) == 21 and max(row for _, row in places) < layout.rows_per_shard
    maps.erase(ids[:3], 1)
    assert maps.num_rows.tolist() == [7, 4, 7]
    assert (maps.lookup(ids, 0)[1] >= 0).all() and (maps.lookup(ids, 2)[1] >= 0).all()


def test_a_full_table_finds_a_path_for_every_id() -> None:
    layout = MapLayout(("user",), (200_000,), 2)
    maps = IdMaps(layout)
    ids = np.random.default_rng(0).permutation(240_000)
    at_caps = no_paths = 0
    given_out = []
    for start in range(0, ids.size, 40_000):
        shards, rows, _, at_cap, no_path = put(maps, ids[start : start + 40_000])
        at_caps, no_paths = at_caps + at_cap, no_paths + no_path
        given_out.append(np.stack([shards, rows]))
    # Ids that were moved to make room are found where they went, with the rows they had.
    assert np.array_equal(np.stack(maps.lookup(ids, 0)), np.concatenate(given_out, axis=1))
    assert no_paths == 0 and at_caps == 240_000 - 2 * layout.caps[0]
    assert layout.caps[0] / (SLOTS * layout.num_buckets[0]) == pytest.approx(MAX_LOAD, abs=1e-4)
    _, shards, rows, _ = maps.entries(0)
    for shard in range(2):
        assert np.array_equal(np.sort(rows[shards == shard]), np.arange(layout.caps[0]))
    again = IdMaps(layout)
    again.set_state(maps.get_state())
    assert_same_state(again.get_state(), maps.get_state())


def test_looking_up_changes_nothing() -> None:
    maps = IdMaps(MapLayout(("user", "video"), (20, 20), 2))
    put(maps, [*EDGES], 1, seen_s=5)
    before = maps.get_state()
    _, rows = maps.lookup(np.array([*EDGES, 88, 89]), 1)
    assert (rows >= 0).tolist() == [True] * 6 + [False] * 2
    maps.lookup(np.array([88, -1]), 0)
    maps.erase(np.array([88]), 1)
    assert_same_state(maps.get_state(), before)
    put(maps, [88], 1)
    assert before["counts"].sum() == 6, "the state is a copy"


def test_the_latest_time_is_kept() -> None:
    maps = IdMaps(MapLayout(("user",), (20,), 2))
    for seen_s in (7, 3, 2**32 - 1, 2**31):
        put(maps, [1], seen_s=seen_s)
    put(maps, [2], seen_s=2**31 - 1)
    put(maps, [2], seen_s=2**31)
    ids, _, _, seen = maps.entries(0)
    assert dict(zip(ids.tolist(), seen.tolist(), strict=True)) == {1: 2**32 - 1, 2: 2**31}


def test_the_search_for_a_free_row_goes_round() -> None:
    layout = MapLayout(("user",), (300,), 2)
    maps = IdMaps(layout)
    shards, rows, *_ = put(maps, np.arange(250))
    assert (maps.get_state()["cursors"][:, 0] == [rows[shards == shard].max() // 32 for shard in range(2)]).all()
    early = np.flatnonzero(rows < 32)
    assert early.size == 64
    maps.erase(early, 0)
    _, rows, *_ = put(maps, np.arange(1000, 1030))
    assert rows.min() >= 64, "the freed rows are behind"
    shards, rows, *_ = put(maps, np.arange(2000, 3000))
    given = set(pairs(shards, rows))
    assert {(shard, row) for shard in range(2) for row in range(32)} <= given, "they are met again"


def test_arrays_with_strides_will_do() -> None:
    layout = MapLayout(("user",), (200,), 4)
    maps, oracle = IdMaps(layout), Oracle(layout)
    ids, seen_s = np.arange(300), np.arange(300, dtype=np.uint32)
    maps.lookup_or_insert(ids[::3], 0, seen_s[::-3])
    oracle.put(IdMaps(layout), ids[::3].tolist(), 0, 0)
    oracle.seen[0] = dict(zip(range(0, 300, 3), range(299, -1, -3), strict=True))
    oracle.check(maps, list(range(300)))
    assert pairs(*maps.lookup(ids[::2], 0)) == oracle.expected(0, ids[::2].tolist())
    oracle.erase(maps, ids[::-6].tolist(), 0)
    assert maps.erase(ids[::6], 0)[1].max() >= 0
    assert maps.num_rows.tolist() == [50]


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_who_allocates_the_maps_does_not_matter(num_threads: int) -> None:
    layout = MapLayout(("user", "video"), (100, 40), 4)
    alone, together = IdMaps(layout), IdMaps(layout, ShardThreads(num_threads, ()))
    assert together.arrays.lines.ctypes.data % 64 == 0
    for maps in (alone, together):
        assert maps.entries(0)[0].size == 0
        put(maps, list(range(60)), 1)
    # Hashes of empty slots are whatever memory held; they must not be.
    assert_same_state(together.get_state(), alone.get_state())


def test_maps_that_may_be_filled_completely_lose_no_id() -> None:
    layout = MapLayout(("user",), (20_000,), 2, max_load=1.0)
    slots = SLOTS * int(layout.num_buckets.sum()) * 2
    assert int(layout.caps.sum()) * 2 == slots
    maps, oracle = IdMaps(layout), {}
    ids = np.random.default_rng(1).permutation(40_000)
    no_paths = 0
    for start in range(0, ids.size, 8_000):
        some = ids[start : start + 8_000]
        shards, rows, fresh, at_cap, no_path = put(maps, some, seen_s=start)
        assert at_cap + no_path == (rows == -1).sum() and np.array_equal(fresh, rows >= 0)
        assert no_path > 0 or start < 16_000
        no_paths += no_path
        oracle |= {
            key: (*place, start)
            for key, place, new in zip(some.tolist(), pairs(shards, rows), fresh.tolist(), strict=True)
            if new
        }
        assert places_of(maps, 0) == oracle
    assert 0.97 * slots < len(oracle) < slots and no_paths > 10_000
    found = maps.lookup(ids, 0)[1]
    assert set(ids[found >= 0].tolist()) == set(oracle)
    IdMaps(layout).set_state(maps.get_state())


@pytest.mark.parametrize("num_shards", [2, 16])
@pytest.mark.parametrize("larger_rows", [(100, 700, 30), (100, 701, 31), (3_000, 50_000, 30), (999, 800, 9_000)])
def test_growing_keeps_every_id_where_it_is(larger_rows: tuple[int, ...], num_shards: int) -> None:
    names = ("user", "video", "author")
    small, large = (MapLayout(names, rows, num_shards) for rows in ((100, 700, 30), larger_rows))
    smaller, larger = IdMaps(small), IdMaps(large)
    ids = np.concatenate([np.array(EDGES), np.random.default_rng(num_shards).integers(-(2**63), 2**63 - 1, 3_000)])
    for table in range(3):
        put(smaller, ids[:1500], table, seen_s=7)  # full, so that ids were moved
        smaller.erase(ids[10:1500:3], table)  # free rows between used ones
        put(smaller, ids[1500:1600], table, seen_s=2**32 - 1 - table)
    before, places = smaller.get_state(), [places_of(smaller, table) for table in range(3)]
    larger.grow_from(smaller)
    assert_same_state(smaller.get_state(), before)
    assert [places_of(larger, table) for table in range(3)] == places
    assert larger.num_rows.tolist() == smaller.num_rows.tolist()
    assert np.array_equal(larger.get_state()["cursors"], before["cursors"])
    again = IdMaps(large)
    again.set_state(larger.get_state())  # which refuses what contradicts itself
    oracle = Oracle(large)
    for table in range(3):
        oracle.places[table] = {key: place[:2] for key, place in places[table].items()}
        oracle.seen[table] = {key: place[2] for key, place in places[table].items()}
        oracle.put(larger, ids.tolist(), table, 8)
    oracle.check(larger, ids.tolist())
    for table in range(3):
        assert larger.num_rows[table] >= large.max_rows[table] or larger.num_rows[table] == len(ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((("a",), (5,), 1), "power of two from 2 to 4096, got 1"),
        ((("a",), (5,), 12), "power of two from 2 to 4096, got 12"),
        ((("a",), (5,), 8192), "power of two from 2 to 4096, got 8192"),
        ((("a", "b"), (5, 0), 4), "max_rows of table 'b' must be at least 1, got 0"),
        ((("a",), (2**33,), 4), "raise MeshConfig.num_shards"),
        ((("a", "b"), (5,), 4), "zip"),
    ],
)
def test_layouts_that_cannot_be(fields: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MapLayout(*fields)


def test_seeds_depend_on_the_name_alone() -> None:
    # Saved maps depend on this value: another one would lose every id.
    assert text_seed("user") == 0x2596215C4C80F95C
    assert len({text_seed(text, seed) for text in ("user", "video", "", "resu") for seed in (0, 1)}) == 8
    assert text_seed("") == 0 and text_seed("", 1) == 1


@given(st.integers(0, 2**31))
def test_padded_sizes(needed: int) -> None:
    size = ladder(needed)
    power = 1 << (size.bit_length() - 5)
    assert size >= max(needed, 64) and size % power == 0
    assert size == 64 or size - needed <= size / 17
