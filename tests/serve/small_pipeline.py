"""A pipeline over a small published model: 400 videos of 40 authors, an MMoE and a two-tower of dim 8."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from monolith_jax.features import (
    BucketFeatureConfig,
    CrossFeatureConfig,
    DenseFeatureConfig,
    FeatureConfig,
    IdFeatureConfig,
    TimeFeatureConfig,
)
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.serve.catalogue import CatalogueConfig
from monolith_jax.serve.index import IndexConfig
from monolith_jax.serve.pipeline import Pipeline, ServingConfig
from monolith_jax.serve.request import FLAGS, Feed, Request
from monolith_jax.serve.rerank import RerankConfig
from monolith_jax.serve.seen import SeenConfig
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.serve.sources import SourcesConfig
from monolith_jax.serve.user_state import UserStateConfig
from monolith_jax.serve.values import GroupValuesConfig, RankConfig
from monolith_jax.stream.events import ACTION
from monolith_jax.tables.table import TableConfig
from tests.serve.published import NUM_SHARDS, Log

NOW_MS = 1_750_000_000_000
HISTORY = 6
VIDEOS, AUTHORS = 400, 40
COLUMNS = ("video_id", "author_id", "sound_id", "tag_id", "duration_ms", "content")
FEATURES = (
    IdFeatureConfig(name="user", column="user_id", table="user"),
    IdFeatureConfig(name="video", column="video_id", table="video"),
    IdFeatureConfig(name="author", column="author_id", table="author"),
    IdFeatureConfig(name="tag", column="tag_id", table="tag", max_length=3, combiner="mean"),
    IdFeatureConfig(name="history", column="history_video_id", table="video", max_length=HISTORY, combiner="mean"),
    IdFeatureConfig(name="history_action", column="history_action", table="tag", max_length=HISTORY, combiner="mean"),
    CrossFeatureConfig(name="user_author", columns=("user_id", "author_id"), table="author"),
    BucketFeatureConfig(name="duration_bucket", column="duration_ms", boundaries=(1e4, 3e4), table="tag"),
    TimeFeatureConfig(name="hour", unit="hour", table="tag"),
    IdFeatureConfig(name="device", column="device", table="tag"),
    DenseFeatureConfig(name="duration", column="duration_ms", scale="log", mean=9.0),
    DenseFeatureConfig(name="content", column="content", size=4),
)
TABLES = tuple(TableConfig(name, rows, 8) for name, rows in (("user", 500), ("video", 2000), ("author", 2000), ("tag", 500)))
HEADS = (HeadConfig("like", base_rate=0.1), HeadConfig("skip", base_rate=0.3), HeadConfig("play_ratio", kind="regression"))
MMOE = MMoEConfig(num_experts=2, expert_hidden=(16, 8), tower_hidden=(8,))
TWO_TOWER = TwoTowerConfig(
    user_features=("user", "history", "history_action", "hour"),
    video_features=("video", "author", "tag", "content"),
    attention=("history", "history_action"),
    dim=8,
    user_hidden=(16,),
    video_hidden=(16,),
)
PLAIN = RerankConfig(explore_share=0.0, author_gap=0, sound_gap=0, tag_window=0, diversity="none")
QUOTAS = {"two_tower": 60, "fresh": 10, "trending": 10, "followed": 10, "explore": 10, "similar": 0}


def serving(**fields: Any) -> ServingConfig:
    """Returns a config; `fields` replace parts of it."""
    parts: dict[str, Any] = {
        "catalogue": CatalogueConfig(1000, COLUMNS),
        "index": IndexConfig(max_videos=1000, scanned=1000),
        "user_state": UserStateConfig(length=HISTORY, max_users=200, actions=("like", "complete", "skip")),
        "seen": SeenConfig(max_users=200, videos=500),
        "sources": SourcesConfig(**QUOTAS, max_videos=2000),  # pyright: ignore[reportArgumentType]
        "rank": RankConfig(
            num_candidates=100,
            heads=("like", "skip"),
            weights=(1.0, -0.5),
            play_s_weight=0.01,
            groups=(GroupValuesConfig(name="skippers", heads=("skip",), weights=(5.0,)),),
        ),
        "rerank": RerankConfig(explore_share=0.0),
    }
    return ServingConfig(**(parts | fields))


def videos(ids: np.ndarray, seed: int = 0, **columns: Any) -> pa.RecordBatch:
    """Returns videos with random columns; `columns` replace some."""
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {
        "event_time_ms": pa.array(np.full(ids.size, NOW_MS - 60_000)),
        "video_id": pa.array(ids),
        "author_id": pa.array(rng.integers(0, AUTHORS, ids.size)),
        "sound_id": pa.array(rng.integers(0, 100, ids.size)),
        "tag_id": pa.array([rng.integers(0, 20, rng.integers(1, 4)).tolist() for _ in ids], pa.list_(pa.int64())),
        "duration_ms": pa.array(rng.integers(3_000, 60_000, ids.size)),
        "content": pa.array(rng.normal(size=(ids.size, 4)).astype(np.float32).tolist(), pa.list_(pa.float32())),
    }
    return pa.record_batch(made | columns)


def actions(
    user: int, ids: Any, names: Any, time_ms: int = NOW_MS - 1000, values: Any = None, request_id: int = 1
) -> pa.RecordBatch:
    """Returns actions of a user, a millisecond apart."""
    number = len(names)
    columns: dict[str, Any] = {
        "event_time_ms": pa.array(time_ms + np.arange(number)),
        "request_id": pa.array(np.full(number, request_id)),
        "user_id": pa.array(np.full(number, user)),
        "video_id": pa.array(np.asarray(ids, np.int64)),
        "action": pa.array(list(names)),
        "value": pa.array(values, pa.int64()) if values is not None else pa.nulls(number, pa.int64()),
        "event_id": pa.nulls(number, pa.int64()),
    }
    return pa.RecordBatch.from_arrays([columns[field.name] for field in ACTION], schema=ACTION)


def sources(**quotas: Any) -> SourcesConfig:
    """Returns quotas, some replaced."""
    return SourcesConfig(**(QUOTAS | quotas))  # pyright: ignore[reportArgumentType]


def no_chance() -> SourcesConfig:
    """Returns quotas without exploring."""
    return sources(explore=0)


def ask(pipeline: Pipeline, user: int = 3, number: int = 10, **fields: Any) -> Feed:
    """Returns a feed that has been looked over."""
    feed = pipeline.recommend(Request(user, number, **{"time_ms": NOW_MS, **fields}))
    assert set(feed.flags) <= set(FLAGS)
    assert len(set(feed.video_ids.tolist())) == len(feed)
    lengths = (feed.values, feed.scores, feed.sources, feed.explored, feed.propensities)
    assert all(len(one) == len(feed) for one in lengths)
    return feed


class World:
    """A published model, and pipelines over it."""

    def __init__(
        self,
        root: Path,
        heads: tuple[HeadConfig, ...] = HEADS,
        two_tower: TwoTowerConfig | None = TWO_TOWER,
        features: tuple[FeatureConfig, ...] = FEATURES,
    ) -> None:
        """Publishes a base with rows for most ids."""
        self.log = Log(root, TABLES, MMOE if heads else None, features, two_tower, heads)
        rng = np.random.default_rng(7)
        ids = {"user": np.arange(100), "video": np.arange(0, VIDEOS, 2), "author": np.arange(AUTHORS), "tag": np.arange(20)}
        self.rows = {name: (of, rng.normal(size=(of.size, 8)).astype(np.float32)) for name, of in ids.items()}
        self.log.publish(self.rows, kind="base")

    def served(self) -> ServedModel:
        """Returns a served model."""
        follow = ("video",) if self.log.two_tower else ()
        return self.log.serve(num_shards=NUM_SHARDS, batch_sizes=(16,), follow=follow)

    def pipeline(self, filled: bool = True, **fields: Any) -> Pipeline:
        """Returns a pipeline, with all videos in it."""
        model = self.served()
        both = model if self.log.heads else None, model if self.log.two_tower else None
        pipeline = Pipeline(serving(**fields), *both)
        if filled:
            pipeline.events.videos(videos(np.arange(VIDEOS)))
            if pipeline.indexer:
                pipeline.indexer.build()
            pipeline.events.actions(actions(99, np.arange(20), ["like"] * 20, NOW_MS - 5000))
        return pipeline
