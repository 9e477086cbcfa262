"""Features of the lake in a request: served as of its time, logged as served, and the same that training joins."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.feature_columns import with_lake_columns
from monolith_jax.features import BucketFeatureConfig, CrossFeatureConfig, DenseFeatureConfig, IdFeatureConfig, featurize
from monolith_jax.lake.as_of import as_of_join
from monolith_jax.lake.tables import Subject
from monolith_jax.lake.versions import FeatureState
from monolith_jax.serve.feature_cache import FeatureCacheConfig
from monolith_jax.serve.pipeline import Pipeline
from monolith_jax.serve.request import Request
from monolith_jax.stream.feed import Outlet
from monolith_jax.stream.formats import Schemas
from monolith_jax.stream.joiner import JoinerConfig
from monolith_jax.stream.log import open_log, open_producer
from monolith_jax.stream.log_source import LogConfig, LogSource
from tests.lake.feature_oracle import Change, log_of
from tests.serve.small_pipeline import FEATURES, NOW_MS, TWO_TOWER, VIDEOS, World, actions, ask

LAKE = (
    IdFeatureConfig(name="country", column="user_country", table="tag"),
    IdFeatureConfig(name="last_tags", column="user_last_tag_id", table="tag", max_length=3, combiner="mean"),
    IdFeatureConfig(name="lake_tags", column="video_tag_id", table="tag", max_length=4, combiner="mean"),
    BucketFeatureConfig(name="views_bucket", column="video_views_5m", boundaries=(1.0, 10.0, 100.0), table="tag"),
    DenseFeatureConfig(name="views", column="video_views_1h", scale="log"),
    DenseFeatureConfig(name="quality", column="video_quality"),
    CrossFeatureConfig(name="country_author", columns=("user_country", "author_id"), table="author"),
    CrossFeatureConfig(name="user_lake_author", columns=("user_id", "video_author_id"), table="author"),
    CrossFeatureConfig(name="authors", columns=("author_id", "video_author_id"), table="author"),
    CrossFeatureConfig(name="lake_author_sound", columns=("video_author_id", "video_sound_id"), table="author"),
)
# Among the others, so that ids and numbers of both kinds alternate.
EVERY = tuple(
    one for pair in zip(FEATURES, (*LAKE, None, None), strict=True) for one in reversed(pair) if one is not None
)  # fmt: skip
CACHE = FeatureCacheConfig(max_users=100, max_videos=1000)
LOGGED = (
    "user_profile_ms", "user_country", "user_activity_ms", "user_last_tag_id", "video_profile_ms", "video_author_id",
    "video_sound_id", "video_tag_id", "video_quality", "video_counts_5m_ms", "video_views_5m", "video_counts_1h_ms",
    "video_views_1h",
)  # fmt: skip


def changes_until(time_ms: int, seed: int = 0) -> dict[Subject, pa.RecordBatch]:
    """Returns random changes of the last two minutes; not of everybody."""
    rng = np.random.default_rng(seed)
    users = [
        change
        for user in range(0, 20, 2)
        for change in (
            Change(user, 0, time_ms - int(rng.integers(1, 120_000)), (["at", "ch", None][user % 3], "de", user)),
            Change(user, 1, time_ms - int(rng.integers(1, 120_000)), (user, 1, 2, rng.integers(0, 20, user % 4).tolist())),
        )
    ]
    videos = []
    for video in rng.permutation(VIDEOS)[:300].tolist():
        ids = rng.integers(0, 40, 2).tolist()
        tags = rng.integers(0, 20, rng.integers(0, 6)).tolist()
        profile = (*ids, tags, 9000, float(rng.normal()))
        counts = tuple(rng.integers(0, 200, 3).tolist())
        times = (time_ms - rng.integers(0, 120_000, 3)).tolist()
        videos += [
            Change(video, group, time, of) for group, time, of in zip((0, 1, 2), times, (profile, counts, counts), strict=True)
        ]
    return {"user": log_of("user", users), "video": log_of("video", videos)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("deltas"), features=EVERY)


@pytest.fixture
def pipeline(world: World) -> Iterator[Pipeline]:
    pipeline = world.pipeline(features=CACHE)
    yield pipeline
    pipeline.close()


def test_a_feed_is_scored_and_logged_with_the_features_of_its_time(pipeline: Pipeline) -> None:
    model, cache, changes = pipeline._model, pipeline.features, changes_until(NOW_MS)
    assert model is not None and cache is not None
    before = ask(pipeline, user=4, number=30)
    for subject, batch in changes.items():
        cache.observe(subject, batch)
    feed = ask(pipeline, user=4, number=30)
    for one, is_known in ((before, False), (feed, True)):
        assert one.impressions is not None and {*LOGGED} <= {*one.impressions.schema.names}
        assert "video_likes_1h" not in one.impressions.schema.names, "no feature reads it"
        np.testing.assert_allclose(one.scores, model.predict(one.impressions), atol=2e-6)
        assert (one.impressions.column("video_profile_ms").null_count < 30) == is_known
    # What training would join from the log of changes, with everything later in it, is what was logged, bit for bit.
    logged = feed.impressions
    assert logged is not None
    joined = logged.drop_columns([*LOGGED])
    for subject, batch in changes.items():
        later = changes_until(NOW_MS + 150_000, 1)[subject]
        every = pa.Table.from_batches([later, batch]).combine_chunks().to_batches()[0]
        joined = as_of_join(joined, every, FeatureState(subject, 1000)).examples
    for name in LOGGED:
        assert joined.column(name).equals(logged.column(name)), name
    np.testing.assert_array_equal(model.predict(joined), model.predict(logged))
    assert logged.column("user_country").to_pylist() == ["ch"] * 30 and 0 < logged.column("video_counts_5m_ms").null_count < 30


def test_without_changes_scores_are_those_of_users_and_videos_that_nobody_knows(pipeline: Pipeline, world: World) -> None:
    model = pipeline._model
    feed = ask(pipeline)
    assert model is not None and feed.impressions is not None and not feed.flags
    assert feed.impressions.column("video_views_5m").to_pylist() == [0] * 10
    assert feed.impressions.column("user_country").null_count == 10
    metrics = pipeline.metrics()
    assert metrics["features"]["videos"]["reads"] > 0 and metrics["memory_bytes"]["features"] > 500_000
    # Without a cache the same columns are the request's, and null.
    bare = world.pipeline()
    plain = ask(bare).impressions
    assert "features" not in bare.metrics() and plain is not None and "video_views_5m" in plain.schema.names
    bare.close()


def test_another_version_that_comes_while_a_feed_is_made_does_not_show_in_its_log(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache, ranked = pipeline._model, pipeline.features, pipeline._ranked
    assert model is not None and cache is not None

    def changed(*args: Any) -> Any:
        for subject, batch in changes_until(NOW_MS - 1, 3).items():
            cache.observe(subject, batch)
        return ranked(*args)

    monkeypatch.setattr(pipeline, "_ranked", changed)
    feed = ask(pipeline, user=4)
    assert feed.impressions is not None and feed.impressions.column("video_profile_ms").null_count == 10
    np.testing.assert_allclose(feed.scores, model.predict(feed.impressions), atol=2e-6)


def test_the_tower_of_videos_may_not_read_what_changes(tmp_path: Path) -> None:
    tower = replace(TWO_TOWER, video_features=(*TWO_TOWER.video_features, "views"))
    world = World(tmp_path, two_tower=tower, features=EVERY)
    with pytest.raises(ValueError, match="'views' of the two-tower's videos reads video_views_1h"):
        world.pipeline(features=CACHE)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_log_of_feeds_trains_with_what_was_served(pipeline: Pipeline, tmp_path: Path, is_known: bool) -> None:
    url, model, cache = f"file://{tmp_path / 'log'}", pipeline._model, pipeline.features
    assert model is not None and cache is not None
    config = LogConfig(url=url, joiner=JoinerConfig(window_s=1.0), ends=True, max_wait_s=0.05, idle_s=0.2)
    served: dict[tuple[int, int], np.ndarray] = {}
    with closing(open_producer(url)) as producer:
        for topic in ("impressions", "actions"):
            producer.create(topic, 1)
        topics = [(Schemas(open_log(url), topic), topic) for topic in ("impressions", "actions")]
        outlets = [Outlet(producer, schemas, topic, 1, "arrow", 16) for schemas, topic in topics]
        for turn in range(6):
            now_ms = NOW_MS + 60_000 * turn
            for subject, batch in changes_until(now_ms, turn).items() if is_known else ():
                cache.observe(subject, batch)
            feed = pipeline.recommend(Request(turn, 5, now_ms, context={"device": turn}))
            assert feed.impressions is not None
            served |= {(feed.request_id, video): feed.scores[row] for row, video in enumerate(feed.video_ids.tolist())}
            outlets[0].add(feed.impressions)
            outlets[1].add(actions(turn, feed.video_ids[:1], ["like"], now_ms + 10, request_id=feed.request_id))
        for outlet in outlets:
            outlet.send_rest()
        producer.flush()
    chunks = [chunk.examples for chunk in LogSource(config, tmp_path / "cuts", 16).read({})]
    examples = pa.Table.from_batches([one for one in chunks if one.num_rows]).combine_chunks().to_batches()[0]
    # A log leaves out what is null in all of it; a reader puts it in again.
    assert examples.num_rows == 30 and ({*LOGGED} <= {*examples.schema.names}) == is_known
    examples = with_lake_columns(examples, model.layout.features)
    keys = zip(examples.column("request_id").to_pylist(), examples.column("video_id").to_pylist(), strict=True)
    np.testing.assert_allclose(model.predict(examples), np.stack([served[key] for key in keys]), atol=2e-6)
    features = featurize(examples, model.layout)
    if is_known:
        assert min(group.valid.any(0).mean() for group in features.groups) > 0.5 and (features.dense != 0).any(0).all()
