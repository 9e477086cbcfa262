from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.ids.expiry import CAP_PARTS, SWEEP_PLANS
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.types import FreedRows, GroupIds, GroupPlan

SHARDS = 2

Pair = tuple[int, int]
"""Table and id, or shard and table, or shard and row."""
FreedTimes = dict[Pair, list[tuple[int, bool]]]
"""For each shard and table the times of the freed, and whether they were expired."""


class Seen(NamedTuple):
    """An id in a batch."""

    table: int
    key: int
    time: int


class Owned(NamedTuple):
    shard: int
    row: int
    time: int


def new_mapper(max_rows: Sequence[int], ttl_s: Sequence[int], admission: AdmissionConfig | None = None) -> GroupMapper:
    """One position for each table."""
    layout = MapLayout(tuple(f"table {index}" for index in range(len(max_rows))), tuple(max_rows), SHARDS)
    rules = [Rule(admission or AdmissionConfig(), ttl) for ttl in ttl_s]
    return GroupMapper(layout, range(len(max_rows)), 1, rules)


def shards_of(mapper: GroupMapper, table: int, keys: Sequence[int] | np.ndarray) -> np.ndarray:
    hashes = mapper.maps.hashes_of(np.asarray(keys, np.int64), table)
    return (hashes >> mapper.maps.layout.tables.shard_shift).astype(np.int64)


def keys_in(mapper: GroupMapper, shard: int, number: int, first: int = 0, table: int = 0) -> list[int]:
    """The next ids of one shard."""
    keys = np.arange(first, first + 4 * number + 200)
    return keys[shards_of(mapper, table, keys) == shard][:number].tolist()


def plan(mapper: GroupMapper, batch: Sequence[Seen], now_s: int, number: int) -> tuple[GroupPlan, FreedRows, dict[str, float]]:
    num_tables = len(mapper.maps.layout.names)
    ids, valid = np.zeros((len(batch), num_tables), np.int64), np.zeros((len(batch), num_tables), np.bool_)
    for place, (table, key, _) in enumerate(batch):
        ids[place, table], valid[place, table] = key, True
    times = np.array([seen.time for seen in batch], np.uint32)
    return mapper.plan(GroupIds(ids, valid), times, now_s, number)


def plan_keys(mapper: GroupMapper, keys: Sequence[int], time: int, number: int = 0) -> tuple[list[int], dict[str, float]]:
    """Plans ids of table 0, seen now; returns the ids that were freed."""
    _, freed, stats = plan(mapper, [Seen(0, key, time) for key in keys], time, number)
    return freed.ids.tolist(), stats


def row_of(mapper: GroupMapper, table: int, key: int) -> tuple[int, int]:
    shards, rows = mapper.maps.lookup(np.array([key]), table)
    return int(shards[0]), int(rows[0])


def times_in(mapper: GroupMapper, shard: int) -> dict[int, int]:
    """When each id of table 0 in a shard was last seen."""
    keys, shards, _, times = mapper.maps.entries(0)
    return dict(zip(keys[shards == shard].tolist(), times[shards == shard].tolist(), strict=True))


def fresh_ids(plan: GroupPlan, mapper: GroupMapper) -> Counter[Pair]:
    real = plan.fresh_rows[0] < SHARDS * mapper.maps.layout.rows_per_shard
    ids = np.ascontiguousarray(plan.fresh_ids[0, real]).view(np.int64).reshape(-1)
    return Counter(zip(plan.fresh_tables[0, real].tolist(), ids.tolist(), strict=True))


def restored(mapper: GroupMapper, max_rows: Sequence[int], ttl_s: Sequence[int]) -> GroupMapper:
    again = new_mapper(max_rows, ttl_s)
    again.set_state(mapper.get_state())
    return again


class Oracle:
    """Dicts that say what a mapper must do, and what it may."""

    def __init__(self, max_rows: Sequence[int], ttl_s: Sequence[int]) -> None:
        self.max_rows, self.ttl_s = max_rows, ttl_s
        self.mapper = new_mapper(max_rows, ttl_s)
        self.caps = self.mapper.maps.layout.caps.tolist()
        self.known: dict[Pair, Owned] = {}
        self.most_new, self.most_held = Counter[Pair](), Counter[Pair]()  # in one plan so far, by shard and table
        self.number = 0

    def in_use(self, shard: int, table: int) -> dict[int, Owned]:
        return {key: owned for (of, key), owned in self.known.items() if of == table and owned.shard == shard}

    def plan(self, batch: Sequence[Seen], now_s: int) -> None:
        result, freed, stats = plan(self.mapper, batch, now_s, self.number)
        self.number += 1
        latest: dict[Pair, int] = {}
        for table, key, time in batch:
            latest[table, key] = max(latest.get((table, key), 0), time)
        rows_before, given = len(self.known), []
        new, refused = self.insert(latest, given)
        by_place = self.check_freed(freed, latest, now_s)
        fresh = Counter((self.known[pair].shard, pair[0]) for pair in given)
        at_cap = self.check_numbers(by_place, new, fresh, latest)
        assert fresh_ids(result, self.mapper) == Counter(given)
        assert stats["fresh"] == len(given) and stats["refused_at_cap"] == refused and stats["refused_no_path"] == 0
        assert stats["expired"] + stats["freed_at_cap"] == freed.ids.size and stats["freed_at_cap"] >= at_cap
        assert stats["rows"] == len(self.known) == rows_before + stats["fresh"] - freed.ids.size
        for (table, key), owned in self.known.items():
            assert row_of(self.mapper, table, key) == owned[:2]

    def insert(self, latest: dict[Pair, int], given: list[Pair]) -> tuple[Counter[Pair], int]:
        """Known ids keep their rows, new ones get free ones as long as there are any; rows that are freed come later."""
        new: Counter[Pair] = Counter()
        refused = 0
        for (table, key), time in latest.items():
            shard, row = row_of(self.mapper, table, key)
            if (table, key) in self.known:
                owned = self.known[table, key]
                assert (shard, row) == owned[:2], "an id that is in the batch keeps its row"
                self.known[table, key] = Owned(shard, row, max(owned.time, time))
                continue
            new[shard, table] += 1
            taken = {owned.row for owned in self.in_use(shard, table).values()}
            if len(taken) == self.caps[table]:
                assert row == -1
                refused += 1
            else:
                assert 0 <= row < self.caps[table] and row not in taken, "a row freed in this plan is given out in it"
                self.known[table, key] = Owned(shard, row, time)
                given.append((table, key))
        return new, refused

    def check_freed(self, freed: FreedRows, latest: dict[Pair, int], now_s: int) -> FreedTimes:
        by_place: FreedTimes = {}
        for key, table, shard, row in zip(*(array.tolist() for array in freed), strict=True):
            assert (table, key) not in latest, "an id of the batch is not freed"
            owned = self.known.pop((table, key))
            assert (shard, row) == owned[:2] == (shards_of(self.mapper, table, [key])[0], row)
            assert row_of(self.mapper, table, key) == (shard, -1)
            by_place.setdefault((shard, table), []).append((owned.time, now_s - owned.time >= self.ttl_s[table]))
        return by_place

    def check_numbers(self, by_place: FreedTimes, new: Counter[Pair], fresh: Counter[Pair], latest: dict[Pair, int]) -> int:
        """Those not expired went because of the cap: the least recently seen, and not too many or few."""
        at_cap = 0
        for shard in range(SHARDS):
            for table, cap in enumerate(self.caps):
                place, left = (shard, table), self.in_use(shard, table)
                self.most_new[place] = max(self.most_new[place], new[place])
                if not self.ttl_s[table]:
                    assert place not in by_place
                    continue
                unpinned = [owned.time for key, owned in left.items() if (table, key) not in latest]
                live = [time for time, expired in by_place.get(place, []) if not expired]
                at_cap += len(live)
                if live:
                    assert max(live) <= min(unpinned, default=max(live)), "the least recently seen go first"
                    assert len(left) >= cap - max(self.most_new[place], cap // CAP_PARTS), "and no more than are needed"
                share = -(-self.max_rows[table] // SHARDS)
                held = len(left) + len(live) - fresh[place]  # at least: what was expired may have been held too
                wanted = new[place] - fresh[place] + (min(fresh[place], max(cap - share, 1)) if held >= share else 0)
                self.most_held[place] = max(self.most_held[place], len(left) + len(by_place.get(place, [])))
                assert not live or self.most_held[place] >= share, "a shard that never held its share frees none"
                if unpinned:
                    assert cap - len(left) >= wanted, "as many are free as came new to a full shard"
        return at_cap


EVENTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25), st.integers(0, 20)), max_size=14)
BATCHES = st.lists(st.tuples(st.integers(0, 12), EVENTS), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(batches=BATCHES, ttl_s=st.tuples(st.integers(0, 40), st.integers(1, 40)))
def test_rows_are_taken_and_kept_as_dicts_say(batches: list[tuple[int, list[Seen]]], ttl_s: Pair) -> None:
    max_rows, ttls = (5, 16, 9), (ttl_s[0], ttl_s[1], 1000)
    oracle, now = Oracle(max_rows, ttls), 50
    for seconds, ids in batches:
        now += seconds
        oracle.plan([Seen(table, (key - 9) * 2**40, now - late) for table, key, late in ids], now)
    oracle.mapper = restored(oracle.mapper, max_rows, ttls)
    oracle.plan([Seen(table, (key - 9) * 2**40, now) for table in range(3) for key in range(20)], now)
    assert int(oracle.mapper.maps.num_rows.sum()) == len(oracle.known)


def test_long_streams_are_as_dicts_say() -> None:
    max_rows, ttls = (30, 200, 60, 60), (12, 15, 5, 0)
    oracle, rng, freed = Oracle(max_rows, ttls), np.random.default_rng(0), 0
    for number in range(150):
        size = int(rng.integers(0, 60))
        keys = (rng.random(size) ** 2 * 60).astype(int) + number // 3
        times = 100 + number - rng.integers(0, 4, size) * rng.integers(0, 8, size)
        tables = rng.integers(0, 4, size)
        before = len(oracle.known)
        oracle.plan([Seen(*one) for one in zip(tables.tolist(), keys.tolist(), times.tolist(), strict=True)], 100 + number)
        freed += len(oracle.known) < before
    assert freed > 5
    restored(oracle.mapper, max_rows, ttls)


@pytest.mark.parametrize(("rows", "alive_per_shard"), [(20, 5), (2000, 20), (2000, 2)])
def test_within_a_sweep_all_unseen_ids_are_gone(rows: int, alive_per_shard: int) -> None:
    ttl, dead = 100, range(rows // 2)
    mapper = new_mapper([rows], [ttl])
    alive = [*keys_in(mapper, 0, alive_per_shard, 10**6), *keys_in(mapper, 1, alive_per_shard, 10**6)]
    mapper.maps.lookup_or_insert(np.array([*dead, *alive]), 0, np.full(len(dead) + len(alive), 1000, np.uint32))
    for time in (1001, 1050, 1000 + ttl - 1):
        assert plan_keys(mapper, alive, time)[0] == []
    gone, plans = [], 0
    while len(gone) < len(dead) and plans < 1000:
        freed, stats = plan_keys(mapper, alive, 1000 + ttl)
        assert stats["expired"] == len(freed) and stats["freed_at_cap"] == 0
        gone, plans = gone + freed, plans + 1
    assert sorted(gone) == list(dead) and sorted(mapper.maps.entries(0)[0].tolist()) == sorted(alive)
    buckets = int(mapper.maps.layout.num_buckets[0])
    per_plan = min(-(-buckets // SWEEP_PLANS), alive_per_shard)  # a sweep costs no more than the batch
    assert 0.7 * buckets / per_plan < plans <= -(-buckets // per_plan)


def test_plans_without_ids_sweep_too() -> None:
    mapper = new_mapper([100], [5])
    plan_keys(mapper, range(100), 10)
    gone = [key for number in range(mapper.maps.layout.num_buckets[0]) for key in plan_keys(mapper, [], 15 + number)[0]]
    assert sorted(gone) == list(range(100))


def test_late_events_are_not_freed_with_their_own_batch() -> None:
    mapper = new_mapper([20], [10])
    buckets = int(mapper.maps.layout.num_buckets[0])
    keys = keys_in(mapper, 0, 4)
    for number in range(3 * buckets):  # the sweep comes by several times
        _, freed, stats = plan(mapper, [Seen(0, key, 7) for key in keys], 10**6 + number, number)
        assert freed.ids.size == 0 and stats["unknown"] == 0 and stats["fresh"] == (4 if number == 0 else 0)
    gone = [key for number in range(buckets) for key in plan_keys(mapper, [], 2 * 10**6 + number)[0]]
    assert sorted(gone) == keys, "the next sweep takes them"


def test_an_earlier_event_does_not_make_an_id_older() -> None:
    mapper = new_mapper([20], [10])
    buckets = int(mapper.maps.layout.num_buckets[0])
    plan(mapper, [Seen(0, 1, 1000), Seen(0, 2, 3), Seen(0, 2, 1000), Seen(0, 3, 3)], 1000, 0)
    plan(mapper, [Seen(0, 1, 3)], 1000, 1)
    gone = [key for _ in range(2 * buckets) for key in plan_keys(mapper, [], 1009)[0]]
    assert gone == [3]


def test_a_freed_id_that_returns_is_fresh() -> None:
    mapper = new_mapper([20], [10])
    first, _, _ = plan(mapper, [Seen(0, 5, 0)], 0, 0)
    assert fresh_ids(first, mapper) == {(0, 5): 1}
    buckets = int(mapper.maps.layout.num_buckets[0])
    assert [key for _ in range(buckets) for key in plan_keys(mapper, [], 10)[0]] == [5]
    again, freed, stats = plan(mapper, [Seen(0, 5, 11)], 11, 9)
    assert fresh_ids(again, mapper) == {(0, 5): 1} and stats["fresh"] == 1 and freed.ids.size == 0


def filled(
    rows: int, ttl_s: int, times: Sequence[int] | np.ndarray, admission: AdmissionConfig | None = None
) -> tuple[GroupMapper, list[int]]:
    """A mapper whose shard 0 is at its cap, its ids seen at `times`, again and again."""
    mapper = new_mapper([rows], [ttl_s], admission)
    cap = int(mapper.maps.layout.caps[0])
    keys = keys_in(mapper, 0, cap)
    _, rows_of, _, at_cap, no_path = mapper.maps.lookup_or_insert(
        np.array(keys), 0, np.resize(np.asarray(times), cap).astype(np.uint32)
    )
    assert at_cap == no_path == 0 and (rows_of >= 0).all()
    return mapper, keys


TIMES = {
    "all equal": [7],
    "two": [7, 8],
    "neighbours": np.arange(5000)[::-1] + 2**21 - 2000,
    "many ties": np.random.default_rng(1).integers(0, 30, 3000) << 10,
    "all digits": np.random.default_rng(2).integers(0, 2**32, 3000),
    "ends": [0, 2**32 - 1, 2**31, 2**31 - 1, 2**21, 2**21 - 1, 2**10, 2**10 - 1],
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("num_new", [1, 3, 40])
@pytest.mark.parametrize("rows", [60, 5000])
def test_at_the_cap_the_least_recently_seen_go(rows: int, num_new: int, times: str) -> None:
    mapper, keys = filled(rows, 2**33, TIMES[times])
    cap, seen = len(keys), times_in(mapper, 0)
    oldest = sorted(keys, key=seen.__getitem__)
    pinned = oldest[: cap // 8]  # the batch holds them, so that others must go, but their times stay
    new = keys_in(mapper, 0, num_new, 10**6)
    _, freed, stats = plan(mapper, [Seen(0, key, 0) for key in [*pinned, *new]], 2**32, 0)
    number = max(num_new, cap // CAP_PARTS)
    assert stats["refused_at_cap"] == num_new and stats["fresh"] == stats["expired"] == 0
    assert stats["freed_at_cap"] == freed.ids.size == min(number, cap - len(pinned))
    assert not set(freed.ids.tolist()) & {*pinned, *new} and set(freed.shards.tolist()) == {0}
    expected = sorted(seen[key] for key in set(keys) - set(pinned))[: freed.ids.size]
    assert sorted(seen[key] for key in freed.ids.tolist()) == expected
    assert times_in(mapper, 0) == {key: time for key, time in seen.items() if key not in freed.ids}
    _, again, stats = plan(mapper, [Seen(0, key, 2**32 - 1) for key in new], 2**32, 1)
    assert stats["fresh"] == num_new and stats["refused_at_cap"] == 0
    assert {row_of(mapper, 0, key)[1] for key in new} <= set(freed.rows.tolist())
    assert not set(again.ids.tolist()) & set(new)


def test_at_the_cap_with_every_id_in_the_batch() -> None:
    mapper, keys = filled(60, 10**6, [5])
    new = keys_in(mapper, 0, 7, 10**6)
    for number in range(3):
        freed, stats = plan_keys(mapper, [*keys, *new], 6 + number, number)
        assert freed == [] and stats["refused_at_cap"] == stats["unknown"] == 7 and stats["rows"] == len(keys)
    freed, stats = plan_keys(mapper, [*keys[3:], *new], 9, 3)
    assert sorted(freed) == keys[:3] and stats["refused_at_cap"] == 7
    freed, stats = plan_keys(mapper, new, 10, 4)
    assert stats["fresh"] == 3 and stats["refused_at_cap"] == 4 and len(freed) == stats["freed_at_cap"] == 7


def test_room_is_kept_for_as_many_as_came_lately() -> None:
    mapper, keys = filled(200, 10**6, np.arange(100))
    rooms = []
    for number in range(80):  # many at once, and then few in each plan: the room that is kept shrinks slowly
        _, stats = plan_keys(mapper, keys_in(mapper, 0, 8 if number else 40, (1 + number) * 10**6), 200 + number)
        assert stats["refused_at_cap"] == (0 if number else 40)
        rooms.append(len(keys) - len(times_in(mapper, 0)))
    assert rooms[0] == 40 and 40 - 8 < rooms[1] < 40 and rooms[-1] == 8 and rooms == sorted(rooms, reverse=True)


def test_what_one_plan_can_free_is_limited() -> None:
    num_tables, freed, most = 120, Counter(), 0
    mapper = new_mapper([27] * num_tables, [5] * num_tables)
    keys = [keys_in(mapper, 0, 27, table=table) for table in range(num_tables)]
    for table in range(num_tables):
        mapper.maps.lookup_or_insert(np.array(keys[table]), table, np.ones(27, np.uint32))
    for number in range(40):
        of_plan = plan(mapper, [], 100, number)[1]
        freed.update(zip(of_plan.tables.tolist(), of_plan.ids.tolist(), strict=True))
        most = max(most, of_plan.ids.size)
    assert freed == Counter((table, key) for table in range(num_tables) for key in keys[table]) and 200 < most <= 256


def test_without_a_time_to_live_nothing_is_freed() -> None:
    mapper, keys = filled(60, 0, [5])
    for number in range(40):
        freed, stats = plan_keys(mapper, keys_in(mapper, 0, 3, 10**6), 10**9 + number, number)
        assert freed == [] and stats["refused_at_cap"] == 3 and stats["rows"] == len(keys)
    assert set(times_in(mapper, 0).values()) == {5}


def test_an_id_that_is_not_admitted_takes_no_room() -> None:
    mapper, keys = filled(60, 100, [5], AdmissionConfig("seen", 2, 1000))
    waiting = keys_in(mapper, 0, 9, 10**6)
    freed, stats = plan_keys(mapper, waiting, 6)
    assert freed == [] and stats["not_admitted"] == 9 and stats["refused_at_cap"] == 0
    freed, stats = plan_keys(mapper, waiting, 6)
    assert stats["not_admitted"] == 0 and stats["refused_at_cap"] == len(freed) == 9 and set(freed) <= set(keys)


def test_a_table_that_holds_all_ids_frees_none() -> None:
    mapper = new_mapper([300], [10**6])
    plan_keys(mapper, range(300), 0)
    assert [plan_keys(mapper, range(10), number, number)[0] for number in range(1, 5)] == [[]] * 4


def test_soak() -> None:
    max_rows, ttls, per_plan = (5000, 300), (30, 30), 6
    mapper, rng = new_mapper(max_rows, ttls), np.random.default_rng(3)
    sizes = {name: array.nbytes for name, array in mapper.get_state().items()}
    most, fresh, freed_number, owners = 0, 0, 0, {}
    for number in range(2000):
        keys = rng.integers(-(2**63), 2**63, per_plan).tolist()
        batch = [Seen(table, key, 100 + number - key % 5) for key in keys for table in range(2)]
        _, freed, stats = plan(mapper, batch, 100 + number, number)
        for table, key, _ in batch:
            shard, row = row_of(mapper, table, key)
            if row >= 0:
                assert (table, shard, row) not in owners
                owners[table, shard, row] = key
        for key, table, shard, row in zip(*(array.tolist() for array in freed), strict=True):
            assert owners.pop((table, shard, row)) == key
        fresh, freed_number = fresh + int(stats["fresh"]), freed_number + freed.ids.size
        assert stats["rows"] == len(owners) == fresh - freed_number and stats["refused_no_path"] == 0
        most = max(most, len(owners))
        if number % 200 == 199:
            mapper = restored(mapper, max_rows, ttls)
            assert {name: array.nbytes for name, array in mapper.get_state().items()} == sizes
    sweep = -(-mapper.maps.layout.num_buckets[0] // per_plan)  # plans; a shard has that many ids in one, on average
    assert most < 300 + 1.3 * per_plan * (ttls[0] + sweep) and fresh > 20_000
