from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids import kernels
from monolith_jax.ids.cuckoo import MAX_LOAD, IdMaps, MapLayout, ladder, text_seed

EDGES = (-1, 0, 1, -(2**63), 2**63 - 1, 2**62)


def put(
    maps: IdMaps, ids: list[int] | np.ndarray, table: int = 0, seen_s: int = 0, insert: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Returns shards, rows, fresh, at_cap, no_path."""
    keys = np.asarray(ids, np.int64).view(np.uint64)
    tables = np.full(keys.size, table, np.int32)
    times = np.full(keys.size, seen_s, np.uint32)
    return maps.lookup_or_insert(keys, maps.hashes_of(keys, table), tables, times, insert)


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

    def put(self, maps: IdMaps, ids: list[int], table: int, seen_s: int, insert: bool) -> None:
        shards, rows, fresh, at_cap, no_path = put(maps, ids, table, seen_s, insert)
        full = refused = 0
        for key, shard, row, new in zip(ids, shards.tolist(), rows.tolist(), fresh.tolist(), strict=True):
            assert shard == shard_of(self.layout, table, key)
            if key in self.places[table]:
                assert (shard, row) == self.places[table][key] and not new
                if insert:
                    self.seen[table][key] = max(self.seen[table][key], seen_s)
                continue
            taken = self.in_shard(table, shard)
            if not insert:
                assert row == -1 and not new
            elif row < 0:
                refused += 1
                full += len(taken) == self.layout.caps[table]
            else:
                assert new and row not in taken and row < self.layout.caps[table]
                self.places[table][key], self.seen[table][key] = (shard, row), seen_s
        assert at_cap == full and at_cap + no_path == refused

    def check(self, maps: IdMaps, pool: list[int]) -> None:
        assert maps.num_rows.tolist() == [len(places) for places in self.places]
        for table, places in enumerate(self.places):
            found = maps.lookup(np.array(pool, np.int64), table).tolist()
            expected = [list(places.get(key, (shard_of(self.layout, table, key), -1))) for key in pool]
            assert found == expected
            ids, shards, rows, seen_s = maps.entries(table)
            assert dict(zip(ids.tolist(), zip(shards.tolist(), rows.tolist(), strict=True), strict=True)) == places
            assert dict(zip(ids.tolist(), seen_s.tolist(), strict=True)) == self.seen[table]
            assert len(ids) == len(places)


POOL = [*EDGES, *range(100, 140), *(7 * 2**k for k in range(3, 40))]
KEYS = st.lists(st.sampled_from(POOL), max_size=30, unique=True)
STEP = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 2), KEYS, st.integers(0, 2**32 - 1), st.booleans()),
    st.tuples(st.just("erase"), st.integers(0, 2), KEYS),
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
            oracle.put(maps, step[2], step[1], *step[3:])
        elif step[0] == "erase":
            table, places = step[1], oracle.places[step[1]]
            freed = maps.erase(np.array(step[2], np.int64), table)
            nowhere = [(shard_of(layout, table, key), -1) for key in step[2]]
            assert freed.tolist() == [list(places.pop(key, none)) for key, none in zip(step[2], nowhere, strict=True)]
            for key in step[2]:
                oracle.seen[table].pop(key, None)
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
    oracle.put(maps, ids.tolist(), 0, 1, True)
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
    freed = {tuple(place) for place in maps.erase(np.array(gone), 0).tolist()}
    assert freed == {oracle.places[0].pop(key) for key in gone}
    shards, rows, fresh, *_ = put(maps, refused)
    reused = set(zip(shards[fresh].tolist(), rows[fresh].tolist(), strict=True))
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
    keys = np.tile(ids, 3).view(np.uint64)
    tables = np.repeat(np.arange(3, dtype=np.int32), ids.size)
    hashes = np.concatenate([maps.hashes_of(ids.view(np.uint64), table) for table in range(3)])
    shards, rows, fresh, *_ = maps.lookup_or_insert(keys, hashes, tables, np.zeros(keys.size, np.uint32))
    assert fresh.all() and maps.num_rows.tolist() == [7, 7, 7]
    places = set(zip((layout.row_offsets[tables] + rows).tolist(), shards.tolist(), strict=True))
    assert len(places) == 21 and max(row for row, _ in places) < layout.rows_per_shard
    maps.erase(ids[:3], 1)
    assert maps.num_rows.tolist() == [7, 4, 7]
    assert (maps.lookup(ids, 0)[:, 1] >= 0).all() and (maps.lookup(ids, 2)[:, 1] >= 0).all()


def test_a_full_table_finds_a_path_for_every_id() -> None:
    layout = MapLayout(("user",), (200_000,), 2)
    maps = IdMaps(layout)
    ids = np.random.default_rng(0).permutation(240_000)
    at_caps = no_paths = 0
    given_out = []
    for start in range(0, ids.size, 40_000):
        shards, rows, _, at_cap, no_path = put(maps, ids[start : start + 40_000])
        at_caps, no_paths = at_caps + at_cap, no_paths + no_path
        given_out.append(np.stack([shards, rows], axis=1))
    # Ids that were moved to make room are found where they went, with the rows they had.
    assert np.array_equal(maps.lookup(ids, 0), np.concatenate(given_out))
    assert no_paths == 0 and at_caps == 240_000 - 2 * layout.caps[0]
    assert layout.caps[0] / (kernels.SLOTS * layout.num_buckets[0]) == pytest.approx(MAX_LOAD, abs=1e-4)
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
    _, rows, fresh, at_cap, no_path = put(maps, [*EDGES, 88, 89], 1, seen_s=9, insert=False)
    assert (rows >= 0).tolist() == [True] * 6 + [False] * 2 and not fresh.any() and at_cap == no_path == 0
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


def _flip_row(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    shard, line, slot = filled
    state["lines"][shard, line, 8 + slot] += 1


def _negative_row(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    shard, line, slot = filled
    state["lines"][shard, line, 8 + slot] = 0x80000000


def _row_above_the_cap(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    shard, line, slot = filled
    state["lines"][shard, line, 8 + slot] = 2**30


def _flip_id(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    shard, line, slot = filled
    state["lines"][shard, line, 2 * slot] ^= 1


def _clear_bit(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    state["used"][filled[0], 0] &= state["used"][filled[0], 0] - np.uint32(1)


def _another_bit(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    _clear_bit(state, filled)
    state["used"][filled[0], 0] |= np.uint32(1 << 31)


def _move_count(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    state["counts"][0, 0] += 1
    state["counts"][1, 0] -= 1


def _wild_cursor(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    state["cursors"][1, 0] = 10_000


def _lack(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    del state["used"]


def _other_type(state: dict[str, np.ndarray], filled: tuple[int, int, int]) -> None:
    state["counts"] = state["counts"].astype(np.int64)


DAMAGE = (
    *(_flip_row, _negative_row, _row_above_the_cap, _flip_id, _clear_bit, _another_bit),
    *(_move_count, _wild_cursor, _lack, _other_type),
)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_state_is_refused(damage: Callable[..., None]) -> None:
    layout = MapLayout(("user", "video"), (40, 40), 2)
    maps = IdMaps(layout)
    put(maps, list(range(20)))
    state = maps.get_state()
    filled = np.argwhere(state["lines"][:, :, 8:12] != 0xFFFFFFFF)[3]
    damage(state, tuple(filled.tolist()))
    other = IdMaps(layout)
    put(other, [1, 2, 3])
    before = other.get_state()
    with pytest.raises(ValueError, match="id maps of tables"):
        other.set_state(state)
    assert_same_state(other.get_state(), before)


@pytest.mark.parametrize(
    "layout",
    [
        MapLayout(("user", "video"), (40, 41), 2),
        MapLayout(("user", "video"), (41, 40), 2),
        MapLayout(("user", "video"), (40, 40), 4),
        MapLayout(("user",), (40,), 2),
        MapLayout(("user", "movie"), (40, 40), 2),
    ],
)
def test_a_state_of_another_layout_is_refused(layout: MapLayout) -> None:
    maps = IdMaps(MapLayout(("user", "video"), (40, 40), 2))
    for table in range(2):
        put(maps, list(range(20)), table)
    with pytest.raises(ValueError, match="id maps of tables"):
        IdMaps(layout).set_state(maps.get_state())


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


@pytest.mark.parametrize("num_buckets", [2, 3, 8, 1000])
def test_every_id_has_two_buckets(num_buckets: int) -> None:
    firsts = []
    for h in np.random.default_rng(0).integers(0, 2**64, 2000, np.uint64):
        first, second = kernels.first_bucket(h, num_buckets), kernels.second_bucket(h, num_buckets)
        assert 0 <= first < num_buckets and 0 <= second < num_buckets and first != second
        firsts.append(first)
    assert len(set(firsts)) > 0.8 * num_buckets


def test_seeds_depend_on_the_name_alone() -> None:
    # Saved maps depend on this value: another one would lose every id.
    assert text_seed("user") == 0x2596215C4C80F95C
    assert len({text_seed(text, seed) for text in ("user", "video", "", "resu") for seed in (0, 1)}) == 8
    assert text_seed("") == 0 and text_seed("", 1) == 1


@given(st.integers(0, 2**31))
def test_padded_sizes(needed: int) -> None:
    size = ladder(needed)
    power = 1 << (size.bit_length() - 4)
    assert size >= max(needed, 256) and size % power == 0
    assert size == 256 or size - needed <= size / 9
