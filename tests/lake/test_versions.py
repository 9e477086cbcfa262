from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.lake.rows import MAX_ITEMS, FeatureRows
from monolith_jax.lake.tables import Subject
from monolith_jax.lake.versions import FeatureState, state_bytes
from tests.lake.feature_oracle import Change, Oracle, changes_of, int64, log_of

SUBJECTS: tuple[Subject, ...] = ("user", "video")
# Steps of half a minute: counts go stale within the range.
TIMES = st.integers(0, 12).map(lambda step: 30_000 * step)
ASKED = st.lists(st.tuples(st.integers(0, 6), TIMES | st.integers(0, 400_000)), min_size=1, max_size=20)


def same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reads_are_those_of_the_oracle(data: st.DataObject) -> None:
    subject = data.draw(st.sampled_from(SUBJECTS))
    versions = data.draw(st.integers(1, 4) | st.just(13))
    oracle, state = Oracle(subject, versions), FeatureState(subject, 10, versions)
    for changes in data.draw(st.lists(st.lists(changes_of(subject, TIMES), max_size=15), max_size=4)):
        oracle.apply(changes)
        state.apply(log_of(subject, changes))
        ids, times = zip(*data.draw(ASKED), strict=True)
        wanted = oracle.as_of(ids, times)
        assert state.as_of(int64(ids), int64(times)).to_pydict() == wanted
        assert state.columns == tuple(wanted)
        again = FeatureState(subject, 10, versions)
        again.set_state(state.get_state())
        assert same_state(again.get_state(), state.get_state())
        state = again


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_order_in_which_changes_come_tells_nothing(data: st.DataObject) -> None:
    subject = data.draw(st.sampled_from(SUBJECTS))
    every = data.draw(st.lists(changes_of(subject, TIMES), max_size=25, unique_by=lambda one: (one.id, one.group, one.time_ms)))
    ids, times = zip(*data.draw(ASKED), strict=True)
    versions = data.draw(st.sampled_from((1, 2, 13)))
    found = []
    for order in (every, data.draw(st.permutations(every))):
        state = FeatureState(subject, 10, versions)
        cut = data.draw(st.integers(0, len(order)))
        for part in (order[:cut], order[cut:]):
            state.apply(log_of(subject, part))
        found.append(state.as_of(int64(ids), int64(times)))
    assert found[0].equals(found[1])


def counts(id: int, time_ms: int, views: int) -> Change:
    return Change(id, 1, time_ms, (views, 0, 0))


@pytest.mark.usefixtures("at_once")
def test_a_version_is_seen_from_the_next_millisecond_until_it_is_stale() -> None:
    state = FeatureState("video", 4, 2)
    state.apply(log_of("video", [counts(1, 1000, 7)]))
    times = int64([1000, 1001, 61_000, 61_001])
    found = state.as_of(np.ones(4, np.int64), times, ["video_views_5m", "video_counts_5m_ms", "video_known"])
    assert found.to_pydict() == {
        "video_views_5m": [0, 7, 7, 0],
        "video_counts_5m_ms": [None, 1000, 1000, None],
        "video_known": [False, True, True, True],
    }


@pytest.mark.usefixtures("at_once")
def test_what_was_pushed_out_is_null_and_counted() -> None:
    state = FeatureState("video", 4, 2)
    state.apply(log_of("video", [counts(1, time, time) for time in (10, 20, 30)]))
    state.apply(log_of("video", [counts(1, 5, 5)]))
    found = state.as_of(np.ones(4, np.int64), int64([5, 15, 25, 35]), ["video_views_5m", "video_known"])
    assert found.to_pydict() == {"video_views_5m": [0, None, 20, 30], "video_known": [False, True, True, True]}
    assert (state.metrics()["too_old"], state.metrics()["ignored"], state.metrics()["written"]) == (1, 1, 3)


def test_a_deleted_profile_is_null_and_the_later_written_of_equal_times_counts() -> None:
    state = FeatureState("user", 4)
    state.apply(log_of("user", [Change(1, 0, 10, ("at", "de", 30)), Change(1, 0, 10, ("ch", "de", None))]))
    columns = ["user_country", "user_language", "user_age", "user_profile_ms"]
    assert list(state.as_of(int64([1]), int64([11]), columns).to_pylist()[0].values()) == ["ch", "de", None, 10]
    state.apply(log_of("user", [Change(1, 0, 20, (None, None, None))]))
    assert list(state.as_of(int64([1]), int64([21]), columns).to_pylist()[0].values()) == [None, None, None, 20]


@pytest.mark.usefixtures("at_once")
def test_ids_of_which_nothing_came_for_long_make_room() -> None:
    state = FeatureState("video", 50)
    for block in range(40):
        state.apply(log_of("video", [counts(id, 1000 * block + id, id) for id in range(5 * block, 5 * block + 20)]))
        assert len(state) <= 50
    newest = np.arange(195, 215)
    assert state.as_of(newest, np.full(20, 40_000), ["video_views_5m"]).column(0).to_pylist() == newest.tolist()
    assert not state.as_of(np.arange(100), np.full(100, 40_000), ["video_known"]).column(0).to_numpy(False).any()
    metrics = state.metrics()
    assert metrics["evicted"] == 215 - 50 and metrics["refused"] == 0
    state.apply(log_of("video", [counts(id, 50_000, id) for id in range(1000, 1060)]))
    assert len(state) == 50 and state.metrics()["refused"] == 0, "more in one batch than there is room for"
    last = state.as_of(np.arange(1050, 1060), np.full(10, 60_000), ["video_views_5m"]).column(0).to_pylist()
    assert last == list(range(1050, 1060))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("rows", (1, 7, 40, 200))
def test_those_that_changed_last_stay_however_many_come_at_once(rows: int) -> None:
    log = log_of("video", [counts(id, 1000 + id, id) for id in range(200)])
    state = FeatureState("video", 40)
    for start in range(0, 200, rows):
        state.apply(log.slice(start, rows))
    known = state.as_of(np.arange(200), np.full(200, 2000), ["video_known"]).column(0).to_numpy(False)
    assert known[180:].all() and not known[:120].any() and state.metrics()["refused"] == 0


@pytest.mark.usefixtures("at_once")
def test_a_walk_finds_room_for_those_that_come_last() -> None:
    state, ids = FeatureState("video", 40), np.arange(0, 200, 5)
    changes = state.rows.encode(log_of("video", [counts(id, 1000 + id, id) for id in range(200)]))
    seen, taken = state.walk(ids, 1001 + ids, changes)
    assert seen.known.all() and (seen.times_ms[:, 1] == 1000 + ids).all() and taken == 196
    assert state.metrics()["refused"] == 0 and state.metrics()["evicted"] == 156


@pytest.mark.usefixtures("at_once")
def test_rows_of_the_table_and_of_sources_that_lack_groups_are_taken() -> None:
    state = FeatureState("video", 4)
    batch = pa.record_batch(
        {
            "video_id": pa.array([1, None, 2]),
            "counts_5m_ms": pa.array([10, 10, None]),
            "views_5m": pa.array([1, 2, 3], pa.int32()),
            "completes_5m": pa.nulls(3),
            "likes_5m": pa.array([1, 2, 3]),
        }
    )
    state.apply(batch)
    found = state.as_of(int64([1, 2]), int64([11, 11]), ["video_views_5m", "video_completes_5m", "video_known"])
    assert found.to_pylist()[0] == {"video_views_5m": 1, "video_completes_5m": None, "video_known": True}
    assert found.to_pylist()[1] == {"video_views_5m": 0, "video_completes_5m": 0, "video_known": False}
    assert state.metrics()["without_id"] == 1
    with pytest.raises(ValueError, match="needs the column 'likes_5m'"):
        state.apply(batch.drop_columns(["likes_5m"]))
    with pytest.raises(ValueError, match="'views_5m' of features is string, expected int64"):
        state.apply(batch.set_column(2, "views_5m", pa.array(["x", "y", "z"])))
    with pytest.raises(ValueError, match="no column video_clicks"):
        state.as_of(int64([1]), int64([1]), ["video_clicks"])


def test_lists_and_slices_keep_their_rows() -> None:
    lists: list[Any] = [[1, None, 2], None, [], list(range(20)), [5]]
    changes = [Change(id, 0, 10, (id, None, lists[id], 3, -0.0)) for id in range(5)]
    state = FeatureState("video", 10)
    for start in range(5):
        state.apply(log_of("video", changes).slice(start, 1))
    found = state.as_of(np.arange(5), np.full(5, 11), ["video_tag_id", "video_quality"])
    assert found.column("video_tag_id").to_pylist() == [[1, 2], None, [], list(range(MAX_ITEMS)), [5]]
    assert np.signbit(found.column("video_quality").to_numpy()).all()


def test_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monolith_jax.lake.rows.MAX_TEXTS", 2)
    state = FeatureState("user", 10)
    state.apply(log_of("user", [Change(id, 0, 10, (str(id), None, 1)) for id in range(4)]))
    assert state.as_of(np.arange(4), np.full(4, 11), ["user_country"]).column(0).to_pylist() == ["0", "1", None, None]
    assert state.metrics()["texts_refused"] == 2


def test_memory_is_what_was_said() -> None:
    for subject in SUBJECTS:
        state = FeatureState(subject, 1000, 3).get_state()
        held = sum(array.nbytes for name, array in state.items() if not name.startswith("texts."))
        assert abs(held - state_bytes(subject, 1000, 3)) < 200
    assert [FeatureRows(subject).num_words for subject in SUBJECTS] == [17, 26]
