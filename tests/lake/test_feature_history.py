"""Features of history: as of each example's time, and beside what the server logged."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.feature_history import FeatureHistory
from tests.lake.feature_oracle import Change, int64, log_of
from tests.lake.lake_of import Lake, make_lake

COLUMNS = ("user_age", "user_profile_ms")


def write(lake: Lake, changes: list[Change]) -> None:
    with closing(TableWriter(lake.warehouse, "user_features_log", "one")) as writer:
        writer.write(pa.Table.from_batches([log_of("user", changes)]))
        writer.commit(0, {"epoch": 0})


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
