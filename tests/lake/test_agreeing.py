"""One served impression, read back in three ways: history, changelog and server have the same features for it."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from monolith_jax.lake.agreeing import Agreeing
from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.feature_changes import FeatureChanges
from monolith_jax.lake.feature_history import FeatureHistory
from monolith_jax.lake.tables import GROUPS, key_of
from monolith_jax.lake.versions import FeatureState
from monolith_jax.serve.feature_cache import FeatureCache, FeatureCacheConfig
from monolith_jax.stream.events import IMPRESSION
from tests.lake.lake_of import Lake, make_lake
from tests.stream.event_log import START_MS, make_world

WORLD = make_world(900, step_ms=400)
PROFILES = {"user": {"country": "at", "language": "de", "age": 30}, "video": {"author_id": 4, "tag_id": [7, 8], "quality": 0.5}}


def tell_profiles(lake: Lake, epoch: int, time_ms: int, age: int) -> None:
    """Writes a profile of each user and video, as the job of profiles does."""
    for subject, profile in PROFILES.items():
        ids = range(50) if subject == "user" else {row["video_id"] for row in WORLD.impressions}
        rows = [profile | {key_of(subject): one, "profile_ms": time_ms} for one in ids]  # type: ignore[arg-type]
        rows = [row | ({"age": age} if subject == "user" else {"duration_ms": age}) for row in rows]
        for name, more in (
            (f"{subject}_features_log", {"event_time_ms": time_ms, "day": "2023-11-14"}),
            (f"{subject}_features", {}),
        ):
            with closing(TableWriter(lake.warehouse, name, "profiles")) as writer:
                writer.write(pa.Table.from_pylist([row | more for row in rows], writer.schema))
                writer.commit(epoch, {})


def serve(cache: FeatureCache, row: dict[str, Any], time_ms: int) -> dict[str, Any]:
    """Returns an impression as a server logs it: with what it looked up."""
    user = cache.as_of("user", np.array([row["user_id"]]), time_ms).to_pylist()[0]
    video = cache.as_of("video", np.array([row["video_id"]]), time_ms).to_pylist()[0]
    seen = {name: value for name, value in (user | video).items() if not name.endswith("_known")}
    return {**row, "event_time_ms": time_ms, **seen}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Returns a lake with events, counts and profiles, of which some came late in the day."""
    one = make_lake(tmp_path_factory.mktemp("lake"))
    tell_profiles(one, 0, START_MS - 1000, 30)
    with closing(one.feed()) as feed:
        feed.send_world(WORLD)
    one.ingest()
    tell_profiles(one, 1, START_MS + 200_000, 31)
    return one


@pytest.mark.parametrize("newest_count", [True, False])
def test_a_served_impression_has_the_same_features_in_all_ways(lake: Lake, newest_count: bool) -> None:
    changes, cache = FeatureChanges(lake.warehouse), FeatureCache(FeatureCacheConfig(max_users=1000, max_videos=10_000))
    for found in changes.whole():
        for subject, batch in found:
            cache.observe(subject, batch)
    now_ms = max(row["event_time_ms"] for row in WORLD.actions) + 3000
    if not newest_count:  # What users did last is in the lake, and is not to be known yet.
        now_ms = max(row["event_time_ms"] for row in WORLD.impressions) + 500
    served = [serve(cache, row, now_ms) for row in WORLD.impressions[-200:]]
    assert {row["user_age"] for row in served} == {31} and {row["user_country"] for row in served} == {"at"}
    assert any(row["video_views_5m"] for row in served) and any(row["video_views_1h"] for row in served)
    assert all(row["user_last_video_id"] is not None and row["video_tag_id"] == [7, 8] for row in served)
    examples = pa.RecordBatch.from_pylist(
        [{name: row[name] for name in IMPRESSION.names if name in row} for row in served], IMPRESSION
    )
    columns = [name for subject in GROUPS for name in FeatureState(subject, 1).columns if not name.endswith("_known")]
    history = FeatureHistory(lake.warehouse, columns, 10_000).join(examples)
    for subject in GROUPS:
        state, log = FeatureState(subject, 10_000, 64), lake.changelog(f"{subject}_features_log", 0)
        while log.snapshot < log.newest():  # A snapshot at a time, as one who follows gets them.
            for batch in log.poll(log.snapshot + 1).rows.to_batches():
                state.apply(batch)
        ids = np.array([row[key_of(subject)] for row in served])
        online = state.as_of(ids, np.full(ids.size, now_ms))
        for name in columns:
            if name.startswith(subject):
                expected = [row[name] for row in served]
                assert online.column(name).to_pylist() == expected, name
                assert history.column(name).to_pylist() == expected, name


@pytest.mark.parametrize("wrong", [False, True])
def test_a_server_that_was_wrong_is_counted(tmp_path: Path, wrong: bool) -> None:
    lake = make_lake(tmp_path)
    tell_profiles(lake, 0, START_MS - 1000, 30)
    with closing(lake.feed()) as feed:
        feed.send_world(WORLD)
        lake.ingest()
        cache = FeatureCache(FeatureCacheConfig(max_users=1000, max_videos=10_000))
        for found in FeatureChanges(lake.warehouse).whole():
            for subject, batch in found:
                cache.observe(subject, batch)
        agreeing = Agreeing(lake.warehouse, "impressions", 10_000)
        now_ms = max(row["event_time_ms"] for row in WORLD.actions) + 3000
        served = [serve(cache, row, now_ms) for row in WORLD.impressions[-100:]]
        if wrong:
            served[7]["user_age"] = 99
        kinds = {f"{subject}_{name}": kind for subject in GROUPS for group in GROUPS[subject] for name, kind in group.columns}
        kinds |= {f"{subject}_{group.time_column}": pa.int64() for subject in GROUPS for group in GROUPS[subject]}
        schema = pa.schema([*IMPRESSION, *(pa.field(name, kind) for name, kind in kinds.items())])
        feed.send("impressions", served, schema)
        feed.send("impressions", [WORLD.impressions[0] | {"event_time_ms": now_ms + 60_000, "request_id": 99_999}])
        feed.producer.flush()
    lake.ingest()
    assert agreeing.step() == 100
    metrics = agreeing.metrics()
    assert metrics["user_checked"] >= 200 and metrics["video_checked"] >= 400
    assert metrics["user_mismatched"] == wrong and not metrics["video_mismatched"]
    assert not metrics["user_behind"] + metrics["video_behind"] + metrics["user_unknown"] + metrics["video_unknown"]
    if wrong:
        (found,) = agreeing.agreements["user"].mismatches
        assert (found.column, found.logged, found.found) == ("user_age", 99, 30)
