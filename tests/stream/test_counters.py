import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.stream.counters import Counters, CountersConfig

LABELS = ("like", "play_ratio")
SCHEMA = pa.schema(
    {
        **{"user_id": pa.int64(), "video_id": pa.int64(), "event_time_ms": pa.int64()},
        **{"like": pa.bool_(), "play_time_ms": pa.int64(), "duration_ms": pa.int64()},
    }
)
IDS = st.one_of(st.none(), st.sampled_from([-1, 0, 2**63 - 1, *range(1, 7)]))
ROW = st.fixed_dictionaries(
    {
        "user_id": IDS,
        "video_id": IDS,
        "event_time_ms": st.integers(10**12, 10**12 + 60_000),
        "like": st.one_of(st.none(), st.booleans()),
        "play_time_ms": st.one_of(st.none(), st.integers(0, 3000)),
        "duration_ms": st.one_of(st.none(), st.just(2000)),
    }
)


def labels_of(row: dict) -> list[float | None]:
    play, duration = row["play_time_ms"], row["duration_ms"]
    ratio = None if play is None or duration is None else min(play / duration, 1.0)
    return [None if row["like"] is None else float(row["like"]), ratio]


class Model:
    """One key with Python's dicts: every event is kept, and weighted when it is asked for."""

    def __init__(self, key: str, config: CountersConfig) -> None:
        self.key, self.config = key, config
        self.layout = MapLayout((f"counters.{key}",), (config.max_rows,), 2)
        self.events: dict[int, list[tuple[float, list[float | None]]]] = {}
        self.ids_in: dict[int, int] = defaultdict(int)
        self.all: list[list[float | None]] = []
        self.refused = 0

    def knows(self, key: int) -> bool:
        if key not in self.events:
            shard = int(IdMaps(self.layout).hashes_of(np.array([key]).view(np.uint64), 0)[0] >> np.uint64(63))
            if self.ids_in[shard] == self.layout.caps[0]:
                self.refused += 1
                return False
            self.ids_in[shard] += 1
            self.events[key] = []
        return True

    def extend(self, row: dict) -> tuple[list[float], float]:
        key, config, now = row[self.key], self.config, row["event_time_ms"] / 1000
        lifts, count = [0.0] * len(LABELS), 0.0
        if key is not None and self.knows(key):
            # Counts lose weight as the newest time of their id moves on; a late event comes in at full weight.
            newest, weighted = -math.inf, []
            times = [time for time, _ in self.events[key]]
            for time, values in self.events[key]:
                newest = max(newest, time)
                weighted.append((newest, values))
            end = max([*times, now])
            weights = [0.5 ** ((end - time) / config.half_life_s) if config.half_life_s else 1.0 for time, _ in weighted]
            count = sum(weights)
            for task in range(len(LABELS)):
                defined = [value for values in self.all if (value := values[task]) is not None]
                overall = (sum(defined) + 1) / (len(defined) + 2)
                pairs = [(w, v) for w, (_, vs) in zip(weights, weighted, strict=True) if (v := vs[task]) is not None]
                rate = (sum(w * v for w, v in pairs) + config.prior_count * overall) / (
                    sum(w for w, _ in pairs) + config.prior_count
                )
                lifts[task] = math.log(rate / (1 - rate)) - math.log(overall / (1 - overall))
            self.events[key].append((now, labels_of(row)))
        self.all.append(labels_of(row))
        return lifts, count


def config(**fields: object) -> CountersConfig:
    return CountersConfig(**{"labels": LABELS, **fields})  # pyright: ignore[reportArgumentType]


def same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(array, other[name]) for name, array in one.items())


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(ROW, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    half_life_s=st.sampled_from([0.0, 5.0, 1e6]),
    prior_count=st.sampled_from([0.5, 5.0]),
    max_rows=st.sampled_from([1, 3, 100]),
    saved=st.integers(0, 4),
)
def test_agrees_with_dicts_wherever_batches_are_cut(
    rows: list[dict], cuts: list[int], half_life_s: float, prior_count: float, max_rows: int, saved: int
) -> None:
    one = config(half_life_s=half_life_s, prior_count=prior_count, max_rows=max_rows)
    counters, models = Counters(one), [Model(key, one) for key in one.keys]
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    edges = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    for index, (start, stop) in enumerate(pairwise(edges)):
        if index == saved:
            state = counters.get_state()
            counters = Counters(one)
            counters.set_state(state)
            assert same_state(counters.get_state(), state)
        part = batch.slice(start, stop - start)
        out = counters.extend(part)
        assert out.select(part.schema.names).equals(part)
        for model in models:
            expected = [model.extend(row) for row in rows[start:stop]]
            lift, count = out.column(f"{model.key}_lift"), out.column(f"{model.key}_count")
            assert lift.type == pa.list_(pa.float32()) and count.type == pa.float32()
            found = np.array(lift.to_pylist()).reshape(-1, len(LABELS))
            assert np.allclose(found, [lifts for lifts, _ in expected], rtol=1e-5, atol=1e-5)
            assert np.allclose(count.to_pylist(), [number for _, number in expected], rtol=1e-5, atol=1e-6)
    assert counters.num_refused == sum(model.refused for model in models)


def batch_of(users: list, likes: list[bool | None], times_s: list[float]) -> pa.RecordBatch:
    times = [round(1000 * time) for time in times_s]
    return pa.record_batch({"user_id": pa.array(users), "like": pa.array(likes, pa.bool_()), "event_time_ms": times})


def likes(**fields: object) -> Counters:
    return Counters(config(keys=("user_id",), labels=("like",), **fields))


def test_an_example_never_sees_itself() -> None:
    for like in (True, False):
        out = likes().extend(batch_of([1, 1], [like, like], [1, 1]))
        assert out.column("user_id_lift").to_pylist()[0] == [0.0] and out.column("user_id_count").to_pylist() == [0.0, 1.0]
    lifts = [likes().extend(batch_of([1, 2, 1, 2], [True, False, last, last], [1, 2, 3, 4])) for last in (True, False)]
    assert lifts[0].column("user_id_lift")[2] == lifts[1].column("user_id_lift")[2]
    up, down = (lift[0] for lift in lifts[0].column("user_id_lift").to_pylist()[2:])
    assert up > 0 > down


def test_a_half_life_halves() -> None:
    out = likes(half_life_s=10).extend(batch_of([1] * 5, [True] * 5, [100, 110, 110, 105, 130]))
    assert out.column("user_id_count").to_pylist() == pytest.approx([0, 0.5, 1.5, 2.5, 3.5 / 4])


def test_a_label_that_is_always_true_stays_finite() -> None:
    counters = likes()
    users = [1] * 4096
    for _ in range(50):
        out = counters.extend(batch_of(users, [True] * 4096, [1] * 4096))
    assert np.isfinite(np.array(out.column("user_id_lift").to_pylist())).all()
    # Counting goes on where float32 would stand still.
    state = counters.get_state()
    state["user_id/events"][state["user_id/events"] > 0] = 2.0**24
    counters.set_state(state)
    counters.extend(batch_of([1], [True], [1]))
    assert counters.get_state()["user_id/events"].max() == 2**24 + 1


def test_strings_are_counted_like_ids() -> None:
    names = ["a", "b", None, "a", "a"]
    number = {"a": 1, "b": 2, None: None}
    flags = [True, False, True, None, False]
    one, other = (
        likes().extend(batch_of(users, flags, [1, 2, 3, 4, 5])) for users in (names, [number[name] for name in names])
    )
    assert one.select(one.schema.names[-2:]).equals(other.select(other.schema.names[-2:]))
    assert one.column("user_id_count").to_pylist() == [0, 0, 0, 1, 2]


def test_reset_forgets_everything() -> None:
    counters = likes(max_rows=1)
    empty = counters.get_state()
    batch = batch_of([1, 2, 3, 1], [True, False, None, True], [1, 2, 3, 4])
    first = counters.extend(batch)
    assert counters.num_refused and not same_state(counters.get_state(), empty)
    counters.reset()
    assert same_state(counters.get_state(), empty)
    assert counters.extend(batch).equals(first)


def test_keys_with_a_slash_keep_their_own_state() -> None:
    one = config(keys=("a/b", "a"), labels=("like",))
    counters = Counters(one)
    columns = {"a": [1, 1], "a/b": [1, 2], "like": [True, False], "event_time_ms": [1000, 2000]}
    counters.extend(pa.record_batch(columns))
    again = Counters(one)
    again.set_state(counters.get_state())
    assert same_state(again.get_state(), counters.get_state())


def test_clear_errors() -> None:
    for fields in ({"max_rows": 0}, {"half_life_s": -1.0}, {"prior_count": 0.0}):
        with pytest.raises(ValueError, match="CountersConfig: max_rows must be at least 1"):
            likes(**fields)
    batch = batch_of([1], [True], [1])
    with pytest.raises(ValueError, match=r"CountersConfig.keys is 'who', which the source does not yield"):
        Counters(config(keys=("who",), labels=("like",))).extend(batch)
    with pytest.raises(ValueError, match=r"CountersConfig.keys is 'like', which is bool; expected int64 or string"):
        Counters(config(keys=("like",), labels=("like",))).extend(batch)
    state = likes().get_state()
    with pytest.raises(ValueError, match="state of 'sums'"):
        Counters(config(keys=("user_id",))).set_state(state)
    with pytest.raises(ValueError, match="id maps of tables"):
        likes(max_rows=7).set_state(state)
    with pytest.raises(ValueError, match="id maps of tables"):
        Counters(config(labels=("like",))).set_state({})
