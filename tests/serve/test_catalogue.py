from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.features import (
    BucketFeatureConfig,
    DenseFeatureConfig,
    IdFeatureConfig,
    feature_layout,
    featurize,
)
from monolith_jax.serve.catalogue import Catalogue, CatalogueConfig

FEATURES = (
    IdFeatureConfig(name="video", column="video_id", table="video"),
    IdFeatureConfig(name="author", column="author_id", table="author"),
    IdFeatureConfig(name="tag", column="tag_id", table="tag", max_length=2, combiner="mean"),
    BucketFeatureConfig(name="bucket", column="duration_ms", boundaries=(1e4, 3e4), table="bucket"),
    DenseFeatureConfig(name="duration", column="duration_ms", scale="log"),
    DenseFeatureConfig(name="content", column="content", size=3),
)
LAYOUT = feature_layout(FEATURES, [["video", "author"], ["tag", "bucket"]])
COLUMNS = ("video_id", "author_id", "sound_id", "tag_id", "duration_ms", "content")


def videos(rng: np.random.Generator, ids: list[int]) -> pa.RecordBatch:
    number = len(ids)
    tags = [None if rng.random() < 0.1 else rng.integers(0, 50, rng.integers(0, 6)).tolist() for _ in ids]
    content = [None if rng.random() < 0.2 else rng.normal(size=3).tolist() for _ in ids]
    return pa.RecordBatch.from_pydict(
        {
            "video_id": pa.array(ids, pa.int64()),
            "author_id": pa.array([None if x < 2 else int(x) for x in rng.integers(0, 20, number)], pa.int64()),
            "sound_id": pa.array(rng.integers(0, 9, number)),
            "tag_id": pa.array(tags, pa.list_(pa.int64())),
            "duration_ms": pa.array([None if x < 3000 else int(x) for x in rng.integers(0, 60_000, number)], pa.int64()),
            "content": pa.array(content, pa.list_(pa.float32())),
            "other": pa.array(["x"] * number),
        }
    )


def make(max_videos: int = 1000, **more: Any) -> Catalogue:
    return Catalogue(CatalogueConfig(max_videos, COLUMNS, **more), [LAYOUT])


def test_features_are_those_of_the_columns_after_any_upserts() -> None:
    rng = np.random.default_rng(0)
    catalogue, rows = make(), {}
    for _ in range(30):
        batch = videos(rng, rng.choice(2000, 40).tolist() if rng.random() < 0.5 else rng.integers(-9, 90, 40).tolist())
        known = set(rows)
        upserted = catalogue.upsert(batch)
        for at, video in enumerate(batch.column("video_id").to_pylist()):
            rows[video] = batch.slice(at, 1)
        assert sorted(upserted.new.tolist()) == sorted(set(rows) - known) and not upserted.removed.size
    asked = list(rows)
    assert len(catalogue) == len(rows)
    wanted = featurize(pa.concat_batches([rows[video] for video in asked]), LAYOUT)
    taken = catalogue.take(np.array([*asked, 10**6]), 0)
    assert taken.known.tolist() == [True] * len(asked) + [False] and taken.features is not None
    found = jax.tree.map(lambda array: array[:-1], taken.features)
    for mine, theirs in zip(found.groups, wanted.groups, strict=True):
        np.testing.assert_array_equal(mine.valid, theirs.valid)
        np.testing.assert_array_equal(mine.ids[mine.valid], theirs.ids[mine.valid])
    np.testing.assert_array_equal(found.dense, wanted.dense)


def test_the_columns_come_back_as_they_came_and_give_the_same_features() -> None:
    rng = np.random.default_rng(1)
    catalogue, batch = make(), videos(rng, list(range(-50, 50)))
    catalogue.upsert(batch)
    back = catalogue.batch(batch.column("video_id").to_numpy())
    assert back.schema.names == list(COLUMNS)
    for name in ("video_id", "author_id", "sound_id", "duration_ms"):
        assert back.column(name).to_pylist() == batch.column(name).to_pylist(), name
    assert back.column("tag_id").to_pylist() == [tags[:4] if tags else None for tags in batch.column("tag_id").to_pylist()], (
        "an empty list is as good as none"
    )
    again, wanted = (
        featurize(back.slice(0, 100), LAYOUT.__class__(LAYOUT.features[:-1], LAYOUT.groups, 1)),
        featurize(batch, LAYOUT),
    )
    for mine, theirs in zip(again.groups, wanted.groups, strict=True):
        np.testing.assert_array_equal(mine.valid, theirs.valid)
    np.testing.assert_array_equal(again.dense[:, 0], wanted.dense[:, 0])


def test_a_full_catalogue_lets_the_oldest_go_first() -> None:
    rng = np.random.default_rng(2)
    catalogue = make(max_videos=50)
    assert not catalogue.upsert(videos(rng, list(range(50)))).removed.size
    catalogue.upsert(videos(rng, [0, 1]))  # Known ones take no room.
    upserted = catalogue.upsert(videos(rng, list(range(100, 103))))
    assert sorted(upserted.removed.tolist()) == [0, 1, 2] and len(catalogue) == 50
    assert not catalogue.known(np.array([0, 1, 2])).any() and catalogue.known(np.arange(3, 50)).all()
    # One that is given again is not among those that make room for the others of its batch.
    upserted = catalogue.upsert(videos(rng, [3, 104]))
    assert upserted.removed.tolist() == [4] and catalogue.known(np.array([3])).all()


def test_more_videos_in_one_batch_than_there_is_room_for_leaves_a_full_catalogue() -> None:
    catalogue = make(max_videos=30)
    upserted = catalogue.upsert(videos(np.random.default_rng(3), list(range(500))))
    assert len(catalogue) == 30 and upserted.new.size == 500 and upserted.removed.size == 470


def test_rows_without_an_id_are_set_aside_and_the_last_of_two_counts() -> None:
    batch = videos(np.random.default_rng(4), [7, 8, 7])
    batch = batch.set_column(0, "video_id", pa.array([7, None, 7], pa.int64()))
    batch = batch.set_column(4, "duration_ms", pa.array([1, 2, 3], pa.int64()))
    catalogue = make()
    upserted = catalogue.upsert(batch)
    assert upserted.refused == 1 and upserted.new.tolist() == [7] and catalogue.refused == 1
    assert catalogue.values("duration_ms", np.array([7, 9]))[0].tolist() == [3, 0]
    assert catalogue.values("duration_ms", np.array([7, 9]))[1].tolist() == [True, False]


def test_the_sweep_meets_every_video_again_and_again() -> None:
    rng = np.random.default_rng(5)
    catalogue = make(max_videos=200)
    assert catalogue.sweep(10).size == 0
    catalogue.upsert(videos(rng, list(range(100))))
    catalogue.remove(np.arange(0, 100, 3))
    met = np.concatenate([catalogue.sweep(7) for _ in range(200)])
    left = sorted(set(range(100)) - set(range(0, 100, 3)))
    assert sorted(set(met.tolist())) == left and len(catalogue) == len(left)
    assert catalogue.remove(np.array([0, 1])) == 1


def test_bad_columns_are_named() -> None:
    catalogue = make()
    with pytest.raises(ValueError, match="need the columns content"):
        catalogue.upsert(videos(np.random.default_rng(6), [1]).drop_columns(["content"]))
    with pytest.raises(ValueError, match="'sound_id' of a video is"):
        catalogue.upsert(videos(np.random.default_rng(6), [1]).set_column(2, "sound_id", pa.array([None], pa.timestamp("ms"))))
    with pytest.raises(ValueError, match="columns must name video_id"):
        Catalogue(CatalogueConfig(10, ("author_id",)), [])
