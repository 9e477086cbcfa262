"""Holds the windowed counters to what Flink's HOP would emit: by a plain dict, by an example by hand, over a restart."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.lake.counters import WindowCounts, WindowCountsConfig
from monolith_jax.lake.tables import Window, features_schema

SMALL = (Window("s", 6, 2), Window("m", 12, 6), Window("l", 8, 8))
CONFIG = WindowCountsConfig(max_videos=64, play_interval_s=0.009, max_impressions=1000)
MINUTE = 60_000


def impressions(rows: Sequence[Sequence[int | None]]) -> pa.RecordBatch:
    times, requests, videos, durations = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = {"event_time_ms": times, "request_id": requests, "video_id": videos, "duration_ms": durations}
    return pa.RecordBatch.from_arrays([pa.array(one, pa.int64()) for one in columns.values()], [*columns])


def actions(rows: Sequence[Sequence[int | str | None]]) -> pa.RecordBatch:
    times, requests, videos, names, values = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    columns = {"event_time_ms": times, "request_id": requests, "video_id": videos, "value": values}
    batch = pa.RecordBatch.from_arrays([pa.array(one, pa.int64()) for one in columns.values()], [*columns])
    return batch.append_column("action", pa.array(names, pa.string()))


def rows_of(out: dict[str, pa.RecordBatch]) -> list[tuple[int, ...]]:
    """Returns (index of window, end, video, views, completes, likes), sorted."""
    found = []
    for index, batch in enumerate(out.values()):
        videos, ends, *counts = (column.to_pylist() for column in batch.columns)
        found += [(index, *row) for row in zip(ends, videos, *counts, strict=True)]
    return sorted(found)


class Oracle:
    """Every event in every window that holds it."""

    def __init__(self, config: WindowCountsConfig) -> None:
        self.windows, self.interval = SMALL, round(1000 * config.play_interval_s)
        self.watermark = -(10**15)
        self.counts: dict[tuple[int, int, int], list[int]] = defaultdict(lambda: [0, 0, 0])
        self.shown: dict[tuple[int, int], tuple[int, int | None]] = {}
        self.plays: list[tuple[int, int, int, int]] = []
        self.late = [0] * len(self.windows)
        self.unmatched = 0

    def count(self, time: int, video: int, what: int) -> None:
        for index, window in enumerate(self.windows):
            first = (time // window.slide_ms + 1) * window.slide_ms
            ends = [end for end in range(first, time + window.size_ms + 1, window.slide_ms) if end - 1 > self.watermark]
            self.late[index] += not ends
            for end in ends:
                self.counts[index, end, video][what] += 1

    def impression(self, time: int, request: int | None, video: int, duration: int | None) -> None:
        self.count(time, video, 0)
        if request is None or time < self.watermark - self.interval:
            return
        known = self.shown.get((request, video))
        if known is None or known[0] < self.watermark - self.interval or time < known[0]:
            self.shown[request, video] = time, duration

    def action(self, time: int, request: int | None, video: int, name: str, value: int | None) -> None:
        if name == "like":
            self.count(time, video, 2)
        elif name == "play" and request is not None and value is not None:
            self.plays.append((time, request, video, value))

    def advance(self, watermark: int) -> list[tuple[int, ...]]:
        if watermark <= self.watermark:
            return []
        due = [play for play in self.plays if play[0] <= watermark]
        self.plays = [play for play in self.plays if play[0] > watermark]
        for time, request, video, value in due:
            shown, duration = self.shown.get((request, video), (None, None))
            if shown is None or not 0 <= time - shown <= self.interval or shown < self.watermark - self.interval:
                self.unmatched += 1
            elif duration is not None and duration > 0 and 20 * value >= 19 * duration:
                self.count(time, video, 1)
        self.watermark = watermark
        fired = [key for key in self.counts if key[1] - 1 <= watermark]
        return sorted((*key, *self.counts.pop(key)) for key in fired)


TIMES = st.integers(-20, 80)
REQUESTS = st.one_of(st.none(), st.integers(1, 3))
VIDEOS = st.sampled_from([-5, 0, 7, 2**62])
SHOWN = st.tuples(TIMES, REQUESTS, VIDEOS, st.sampled_from([None, 0, 20, 100]))
DONE = st.tuples(
    TIMES, REQUESTS, VIDEOS, st.sampled_from(["play", "play", "like", "share"]), st.sampled_from([None, 18, 19, 95])
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("shown"), st.lists(SHOWN, max_size=6)),
        st.tuples(st.just("done"), st.lists(DONE, max_size=6)),
        st.tuples(st.just("until"), st.integers(-30, 100)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_the_rows_are_those_of_a_plain_dict(steps: list) -> None:
    counts, oracle = WindowCounts(CONFIG, SMALL), Oracle(CONFIG)
    for what, value in steps:
        if what == "shown":
            counts.add_impressions(impressions(value))
            for row in value:
                oracle.impression(*row)
        elif what == "done":
            counts.add_actions(actions(value))
            for row in value:
                oracle.action(*row)
        elif what == "until":
            assert rows_of(counts.advance(value)) == oracle.advance(value)
        else:
            state = counts.get_state()
            counts = WindowCounts(CONFIG, SMALL)
            counts.set_state(state)
    assert rows_of(counts.advance(10**6)) == oracle.advance(10**6)
    assert list(counts.num_late.values()) == oracle.late and counts.num_unmatched == oracle.unmatched
    assert not counts.num_refused and not counts.num_forgotten


def test_an_example_by_hand() -> None:
    # Windows of five minutes that end every minute; the watermark is five seconds behind the newest event.
    counts = WindowCounts(replace(CONFIG, play_interval_s=3600.0), (Window("5m", 5 * MINUTE, MINUTE),))
    t0 = 1_800_000_000_000  # a whole number of minutes
    counts.add_impressions(impressions([(t0, 1, 10, 20_000), (t0 + 30_000, 2, 11, 10_000)]))
    counts.add_actions(actions([(t0 + 40_000, 1, 10, "play", 19_000), (t0 + 41_000, 2, 11, "play", 9_499)]))
    # Short of it by one: [t0 - 4 min, t0 + 1 min) fires when nothing before its end can come.
    assert rows_of(counts.advance(t0 + MINUTE - 2)) == []
    first = t0 + MINUTE
    assert rows_of(counts.advance(first - 1)) == [(0, first, 10, 1, 1, 0), (0, first, 11, 1, 0, 0)]
    # In the first minute, of which one window of five has fired: it counts in the other four.
    counts.add_actions(actions([(t0 + 50_000, 2, 11, "like", None)]))
    out = rows_of(counts.advance(t0 + 2 * MINUTE - 1))
    assert out == [(0, first + MINUTE, 10, 1, 1, 0), (0, first + MINUTE, 11, 1, 0, 1)]
    # Three more windows, the last of them [t0, t0 + 5 min); then nothing is in any, and nothing is emitted.
    out = rows_of(counts.advance(t0 + 60 * MINUTE))
    ends = [first + k * MINUTE for k in (2, 3, 4)]
    assert out == [row for end in ends for row in ((0, end, 10, 1, 1, 0), (0, end, 11, 1, 0, 1))]
    counts.add_actions(actions([(t0 + 50_000, 2, 11, "like", None)]))
    assert counts.num_late == {"5m": 1} and rows_of(counts.advance(t0 + 61 * MINUTE)) == []


def test_columns_are_those_of_video_features() -> None:
    counts = WindowCounts(WindowCountsConfig())
    counts.add_impressions(impressions([(0, 1, 10, 20)]))
    out = counts.advance(2 * 86_400_000)
    assert [*out] == ["counts_5m", "counts_1h", "counts_1d"] and [batch.num_rows for batch in out.values()] == [5, 12, 24]
    schema = features_schema("video")
    for batch in out.values():
        assert all(schema.field(field.name).type == field.type for field in batch.schema)
    events = counts.advance(0)
    assert [batch.num_rows for batch in events.values()] == [0, 0, 0] and counts.watermark_ms == 2 * 86_400_000


def test_a_play_that_comes_before_its_impression_is_matched() -> None:
    counts = WindowCounts(CONFIG, SMALL)
    counts.add_actions(actions([(3, 1, 7, "play", 100)]))
    counts.add_impressions(impressions([(2, 1, 7, 100)]))
    assert rows_of(counts.advance(5))[0] == (0, 4, 7, 1, 1, 0)


def test_batches_may_be_cut_anywhere() -> None:
    generator = np.random.default_rng(0)
    number = 3000
    times = np.sort(generator.integers(0, 4000, number)) + generator.integers(0, 30, number)
    shown = [(int(t), int(r), int(v), 20) for t, r, v in zip(times, times, generator.integers(0, 50, number), strict=True)]
    done = [(t + 3, r, v, "play" if v % 2 else "like", 19) for t, r, v, _ in shown]
    config, outputs = replace(CONFIG, max_impressions=10**5), []
    for size in (1, 10, 1000):
        counts, out = WindowCounts(config, SMALL), []
        for start in range(0, number, size):
            counts.add_impressions(impressions(shown[start : start + size]))
            counts.add_actions(actions(done[start : start + size]))
            if (start + size) % 1000 == 0:
                out += rows_of(counts.advance(int(times[: start + size].max()) - 5))
        outputs.append(out)
        assert counts.num_late["s"]
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) > 1000


def test_videos_and_impressions_are_bounded() -> None:
    counts = WindowCounts(replace(CONFIG, max_videos=100, max_impressions=50), SMALL)
    counts.add_impressions(impressions([(1, k, k, 20) for k in range(1000)]))
    assert 790 <= counts.num_refused <= 900 and counts.num_forgotten == 950
    counts.add_actions(actions([(2, k, k, "play", 20) for k in (0, 999)]))
    counted = len({video for *_, video, _, _, _ in rows_of(counts.advance(7))})
    # The complete of the last one, too, was refused.
    assert counted == 1000 - (counts.num_refused - 1) and counts.num_unmatched == 1
    # When the day of all is over, there is room again.
    counts.advance(1000)
    before = counts.num_refused
    counts.add_impressions(impressions([(1001, k, k, 20) for k in range(5000, 5100)]))
    assert counts.num_refused == before


def test_a_state_goes_on_bit_by_bit() -> None:
    generator = np.random.default_rng(1)
    config = replace(CONFIG, max_videos=40, max_impressions=200)

    def feed(counts: WindowCounts, seed: int) -> list[tuple[int, ...]]:
        generator = np.random.default_rng(seed)
        t = seed * 20 + generator.integers(0, 60, 100)
        columns = [t, generator.integers(0, 300, 100), generator.integers(0, 90, 100)]
        rows = [tuple(map(int, row)) for row in zip(*columns, strict=True)]
        counts.add_impressions(impressions([(*row, 20) for row in rows]))
        counts.add_actions(actions([(row[0] + 5, *row[1:], "play", 20) for row in rows[::2]]))
        return rows_of(counts.advance(seed * 20 + int(generator.integers(0, 30))))

    straight, resumed = WindowCounts(config, SMALL), WindowCounts(config, SMALL)
    for seed in range(30):
        if generator.random() < 0.4:
            state = resumed.get_state()
            resumed = WindowCounts(config, SMALL)
            resumed.set_state(state)
        assert feed(straight, seed) == feed(resumed, seed)
    left, right = straight.get_state(), resumed.get_state()
    assert {*left} == {*right} and all(left[name].tobytes() == right[name].tobytes() for name in left)
    assert straight.num_refused and straight.num_forgotten and sum(straight.num_late.values())


def test_times_far_apart_do_not_stop_it() -> None:
    counts, oracle, far = WindowCounts(CONFIG, SMALL), Oracle(CONFIG), 2**61
    oracle.watermark = -far - 10**6
    rows = [(1, 1, 7, 20), (far, 2, 7, 20), (-far, 3, 7, 20)]
    counts.add_impressions(impressions(rows))
    for row in rows:
        oracle.impression(*row)
    for watermark in (0, 9, 10**9, far + 2):
        assert rows_of(counts.advance(watermark)) == oracle.advance(watermark)


def test_wrong_input_is_named() -> None:
    counts = WindowCounts(CONFIG, SMALL)
    with pytest.raises(ValueError, match="duration_ms"):
        counts.add_impressions(impressions([]).drop_columns(["duration_ms"]))
    with pytest.raises(ValueError, match="video_id is string"):
        batch = impressions([(1, 1, 1, 1)])
        counts.add_impressions(batch.set_column(2, "video_id", pa.array(["x"])))
    with pytest.raises(ValueError, match="action"):
        counts.add_actions(actions([]).drop_columns(["action"]))
    with pytest.raises(ValueError, match="multiple of slide_ms"):
        WindowCounts(CONFIG, (Window("x", 5, 2),))
    with pytest.raises(ValueError, match="max_videos"):
        WindowCounts(replace(CONFIG, max_videos=0), SMALL)
    with pytest.raises(ValueError, match="another WindowCountsConfig"):
        counts.set_state(WindowCounts(replace(CONFIG, max_videos=5000), SMALL).get_state())
