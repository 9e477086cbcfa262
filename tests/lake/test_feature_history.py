"""Features of history: as of each example's time, and beside what the server logged."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from monolith_jax.lake.as_of import Joined, as_of_join
from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.feature_history import FeatureHistory
from monolith_jax.lake.jobs import TidyConfig
from monolith_jax.lake.tidy import expire
from monolith_jax.lake.versions import FeatureState
from monolith_jax.lake.warehouse import open_table
from tests.lake.feature_oracle import Change, int64, log_of
from tests.lake.lake_of import Lake, make_lake

DAY_MS, HOUR_MS = 86_400_000, 3_600_000
COLUMNS = ("user_age", "user_profile_ms")


def write(lake: Lake, changes: list[Change], epoch: int = 0, day: str = "1970-01-01") -> None:
    with closing(TableWriter(lake.warehouse, "user_features_log", "one")) as writer:
        rows = log_of("user", changes).drop_columns(["day"]).append_column("day", pa.array([day] * len(changes)))
        writer.write(rows)
        writer.commit(epoch, {"epoch": epoch})


def examples_of(
    times: list[int], ages: list[int | None] | None = None, since: list[int | None] | None = None
) -> pa.RecordBatch:
    """Returns examples of user 1, with what a server logged of the user."""
    columns = {"event_time_ms": int64(times), "user_id": np.ones(len(times), np.int64)}
    logged = {"user_age": pa.array(ages, pa.int64()), "user_profile_ms": pa.array(since, pa.int64())} if ages else {}
    return pa.record_batch({**columns, **logged})


def test_what_was_logged_is_replaced_and_compared(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    write(lake, [Change(1, 0, 10 * age, ("at", "de", age)) for age in range(1, 5)])
    history = FeatureHistory(lake.warehouse, COLUMNS, 100)
    assert history.join(examples_of([5, 15])).column("user_age").to_pylist() == [None, 1] and history.told == {}
    # As it was; one that had not seen the newest; one that had another value; one that had what is not there.
    logged = examples_of([16, 25, 35, 36], [1, 1, 77, 3], [10, 10, 30, 33])
    joined = history.join(logged)
    assert joined.column("user_age").to_pylist() == [1, 2, 3, 3]
    assert joined.column("user_profile_ms").to_pylist() == [10, 20, 30, 30]
    # The other group was not logged, so it does not count.
    assert {name.removeprefix("agreement_user_"): count for name, count in history.told.items()} == {
        "checked": 4,
        "mismatched": 1,
        "behind": 1,
        "unknown": 1,
    }
    (mismatch,) = history.mismatches
    assert (mismatch.id, mismatch.time_ms, mismatch.since_ms, mismatch.logged, mismatch.found) == (1, 35, 30, 77, 3)
    again = FeatureHistory(lake.warehouse, COLUMNS, 100, json.loads(json.dumps(history.position)))
    assert again.join(examples_of([41])).column("user_age").to_pylist() == [4]


def test_a_walk_goes_on_from_any_position_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    lake, rng = make_lake(tmp_path), np.random.default_rng(0)
    # More changes within the time in which they do not count yet than there are versions.
    times = np.sort(rng.integers(0, 20_000, 300)).tolist()
    write(lake, [Change(1, 1, time, (number, 1, 2, [number])) for number, time in enumerate(times)])
    columns = ("user_last_video_id", "user_last_tag_id", "user_activity_ms", "user_age")
    whole, places, expected = FeatureHistory(lake.warehouse, columns, 100), [], []
    for first in range(0, 25_000, 2500):
        places.append(json.loads(json.dumps(whole.position)))
        expected.append(whole.join(examples_of(sorted(rng.integers(first, first + 2500, 20).tolist()))))
    assert whole.metrics()["user/too_old"] == 0
    assert len({row["user_last_video_id"] for one in expected for row in one.to_pylist()}) > 80
    for place, wanted in zip(places, expected, strict=True):
        again = FeatureHistory(lake.warehouse, columns, 100, place)
        assert again.join(wanted.select(["event_time_ms", "user_id"])).equals(wanted)


def activity(user: int, time_ms: int, video: int) -> Change:
    return Change(user, 1, time_ms, (video, 1, 2, None))


def test_no_more_changes_are_held_than_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, rng = make_lake(tmp_path), np.random.default_rng(1)
    for day in range(3):
        times = DAY_MS * day + np.sort(rng.integers(0, DAY_MS, 400))
        users = rng.integers(1, 30, 400).tolist()
        write(
            lake,
            [activity(user, time, time) for user, time in zip(users, times.tolist(), strict=True)],
            day,
            f"1970-01-0{day + 1}",
        )
    batches = []
    for begin in (2 * DAY_MS + 1000, 2 * DAY_MS + HOUR_MS, 3 * DAY_MS - 5 * HOUR_MS):
        times = np.sort(begin + rng.integers(0, 5 * HOUR_MS, 100))[rng.permutation(100)]
        batches.append(pa.record_batch({"event_time_ms": times, "user_id": rng.integers(1, 30, 100)}))
    columns = ("user_last_video_id", "user_activity_ms")
    all_at_once = FeatureHistory(lake.warehouse, columns, 100)
    expected = [all_at_once.join(batch) for batch in batches]
    held = []

    def spied(examples: pa.RecordBatch, changes: pa.RecordBatch, state: FeatureState) -> Joined:
        held.append(changes.num_rows)
        return as_of_join(examples, changes, state)

    monkeypatch.setattr("monolith_jax.lake.feature_history._MOST_ROWS", 10)
    monkeypatch.setattr("monolith_jax.lake.feature_history.as_of_join", spied)
    few, places = FeatureHistory(lake.warehouse, columns, 100), []
    for batch, wanted in zip(batches, expected, strict=True):
        places.append(few.position)
        assert few.join(batch).equals(wanted)
    # Those that do not count yet come beside them.
    assert len(held) > 10 and max(held) <= 13
    for at, place in enumerate(places):
        assert FeatureHistory(lake.warehouse, columns, 100, place).join(batches[at]).equals(expected[at])


def test_what_would_depend_on_interruptions_is_refused(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    write(lake, [activity(user, 10 * user, 7) for user in range(50)])
    history = FeatureHistory(lake.warehouse, ("user_last_video_id",), 20)
    history.join(examples_of([2100]))
    with pytest.raises(ValueError, match=r"more than 20 users.*raise LakeConfig\.joined_rows"):
        history.join(examples_of([2100, 9000]))


def test_a_tag_is_read_for_as_long_as_it_is_there(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    write(lake, [activity(1, 1000, 5)])
    open_table(lake.warehouse, "user_features_log").create_tag("kept")
    write(lake, [activity(1, 2000, 6)], 1)
    columns = ("user_last_video_id", "video_views_5m")
    examples = pa.record_batch({"event_time_ms": [9000], "user_id": [1], "video_id": [1]})
    tagged, newest = FeatureHistory(lake.warehouse, columns, 10, None, "kept"), FeatureHistory(lake.warehouse, columns, 10)
    assert tagged.position["user"] == {"moment": [1, "kept"], "until_ms": None}
    # The other log has no such tag.
    assert tagged.position["video"]["moment"] == [0, ""] and newest.position["user"]["moment"] == [2, ""]
    assert [one.join(examples).column("user_last_video_id").to_pylist() for one in (tagged, newest)] == [[5], [6]]
    write(lake, [activity(1, 3000, 7)], 2)
    assert expire(lake.warehouse, "user_features_log", TidyConfig(retention_s=0.0, keep=1, orphan_s=0.0))[0] == 2
    again = FeatureHistory(lake.warehouse, columns, 10, json.loads(json.dumps(tagged.position)))
    assert again.join(examples).column("user_last_video_id").to_pylist() == [5]
    later = examples.set_column(0, "event_time_ms", pa.array([9500]))
    for walk in (lambda: newest.join(later), lambda: FeatureHistory(lake.warehouse, columns, 10, newest.position)):
        with pytest.raises(ValueError, match=r"snapshot 2 of .* has expired"):
            walk()
