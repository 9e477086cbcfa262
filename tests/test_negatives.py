"""The videos that are drawn for the two-tower: how often each is shown, a uniform pool, and what stands beside the examples."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.features import DenseFeatureConfig, Features, IdFeatureConfig, feature_layout, featurize
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.negatives import Drawn, Frequencies, NegativeSampler, Pool, sampler_bytes, side_by_side

LAYOUT = feature_layout(
    (
        IdFeatureConfig("user", "user_id", "user"),
        IdFeatureConfig("tag", "tag", "tag", max_length=3, weight_column="tag_weight"),
        DenseFeatureConfig("age", "age"),
        IdFeatureConfig("video", "video_id", "video"),
        DenseFeatureConfig("content", "content", size=2),
    ),
    (("user", "video"), ("tag",)),
)
CONFIG = TwoTowerConfig(
    user_features=("user", "age"),
    video_features=("video", "tag", "content"),
    positives=("like", "complete"),
    positive_weights=(2.0, 0.5),
    num_negatives=8,
    pool_size=512,
    frequency_size=512,
)


def zipf(number: int, distinct: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns draws of ids, and the share of each; ids are -3, 4, 11, ..."""
    shares = 1 / np.arange(1, distinct + 1)
    shares /= shares.sum()
    return np.random.default_rng(seed).choice(distinct, number, p=shares) * 7 - 3, shares


def counted(videos: np.ndarray, size: int = 2**15, batch: int = 500, alpha: float = 0.01) -> Frequencies:
    frequencies = Frequencies(size, alpha, guess=1000)
    for first in range(0, videos.size, batch):
        part = videos[first : first + batch]
        frequencies.add(part, np.ones(part.size, np.bool_))
    return frequencies


def examples_of(videos: np.ndarray, seed: int = 0, known: np.ndarray | None = None) -> pa.RecordBatch:
    """Returns examples of videos, whose tags and content follow from their ids."""
    rng, number = np.random.default_rng(seed), videos.size
    tags = [[int(video), int(video) + 1][: 1 + int(video) % 2] for video in videos]
    columns = {
        "user_id": pa.array(rng.integers(0, 50, number)),
        "age": pa.array(rng.normal(size=number)),
        "video_id": pa.array(videos, mask=None if known is None else ~known),
        "tag": pa.array(tags, pa.list_(pa.int64())),
        "tag_weight": pa.array([[0.25 * (1 + tag % 3) for tag in of] for of in tags], pa.list_(pa.float32())),
        "content": pa.array(np.stack([videos, -videos], 1).astype(np.float64).tolist(), pa.list_(pa.float64())),
        "like": pa.array(rng.random(number) < 0.4),
        "play_time_ms": pa.array(rng.integers(0, 20_000, number)),
        "duration_ms": pa.array([None if rng.random() < 0.2 else 10_000 for _ in range(number)], pa.int64()),
        "weight": pa.array(rng.random(number).astype(np.float32)),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def sampler(batch_size: int = 32, partitions: int = 1, index: int = 0, seed: int = 0, **fields: Any) -> NegativeSampler:
    return NegativeSampler(dataclasses.replace(CONFIG, **fields), LAYOUT, batch_size, partitions, index, seed)


def take(one: NegativeSampler, examples: pa.RecordBatch) -> Drawn:
    return one.take(examples, featurize(examples, LAYOUT))


def assert_same(one: Drawn, other: Drawn) -> None:
    for a, b in zip(leaves(one.features), leaves(other.features), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one.retrieval, other.retrieval, strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(features: Features) -> list[np.ndarray]:
    weights = [one for one in features.weights if one is not None]
    return [*(array for group in features.groups for array in group), *weights, features.dense]


def test_shares_of_a_zipf_stream_are_near_the_truth() -> None:
    videos, shares = zipf(200_000, 2_000)
    found = counted(videos).shares(np.arange(2_000) * 7 - 3)
    often = shares * videos.size > 200
    error = np.log(found / shares)
    assert often.sum() > 100 and np.abs(error[often]).max() < 0.3 and np.abs(error[often].mean()) < 0.03
    # Of rare ones little can be known; most are within a factor of two.
    assert np.quantile(np.abs(error[shares * videos.size > 10]), 0.9) < np.log(2)


def test_two_videos_in_one_cell_are_told_apart_by_another() -> None:
    videos, shares = zipf(100_000, 500)
    found = counted(videos, size=2_000).shares(np.arange(500) * 7 - 3)
    error = np.log(found / shares)[shares * videos.size > 50]
    # With one hash a fifth of them would share their cell with another; a more frequent one would shorten the interval.
    assert np.quantile(np.abs(error), 0.95) < 0.6


def test_shares_follow_a_change() -> None:
    first, second = np.arange(100_000) % 100, np.arange(20_000) % 10
    frequencies = counted(np.concatenate([first, second]))
    np.testing.assert_allclose(frequencies.shares(np.arange(10)), 0.1, rtol=0.15)
    # Those that are shown no more were one in 100, and were not seen for 20,000.
    assert frequencies.shares(np.arange(10, 100)).max() < 1 / 4_000


def test_a_new_video_is_neither_frequent_nor_impossible() -> None:
    frequencies = counted(np.arange(50_000) % 100)
    frequencies.add(np.array([-1]), np.array([True]))
    assert frequencies.shares(np.array([-1])) == pytest.approx(1 / 1000)
    at_the_start = Frequencies(1_000, 0.01, 1000)
    at_the_start.add(np.arange(20), np.ones(20, np.bool_))
    np.testing.assert_allclose(at_the_start.shares(np.arange(20), least=64), 1 / 64)
    # The second time its interval is what it was: the guess is forgotten.
    frequencies.add(np.array([*range(9), -1]), np.ones(10, np.bool_))
    assert frequencies.shares(np.array([-1])) == pytest.approx(1 / 10)


def test_every_video_of_the_pool_is_drawn_as_often_as_any_other() -> None:
    layout = feature_layout((IdFeatureConfig("video", "video_id", "video"),), (("video",),))
    pool, (videos, _) = Pool(400, layout), zipf(30_000, 600)
    for part in np.split(videos, 60):
        columns = {"dense": np.zeros((part.size, 0), np.float32), "ids_0": part[:, None]}
        pool.add(part, columns | {"valid_0": np.ones((part.size, 1), np.bool_)})
    kept = pool.arrays["videos"][pool.arrays["taken"]]
    assert np.unique(kept).size == kept.size == len(pool) > 250
    places = pool.draw(200 * len(pool), np.random.default_rng(0))
    np.testing.assert_array_equal(pool.arrays["ids_0"][places, 0], pool.arrays["videos"][places])
    counts = np.bincount(np.searchsorted(np.sort(kept), pool.arrays["videos"][places]), minlength=kept.size)
    # A sum of squares of about as many normals as there are videos.
    assert np.abs((np.square(counts - 200) / 200).mean() - 1) < 5 * np.sqrt(2 / kept.size)


def test_a_full_pool_keeps_the_latest() -> None:
    pool = Pool(50, feature_layout((), ()))
    for first in range(0, 10_000, 100):
        pool.add(np.arange(first, first + 100), {"dense": np.zeros((100, 0), np.float32)})
    assert len(pool) == 50 and pool.arrays["videos"].min() > 9_000


def test_drawn_rows_have_their_video_and_no_user() -> None:
    one, videos = sampler(), zipf(32, 40, seed=3)[0]
    drawn = take(one, examples_of(videos))
    of_videos = featurize(examples_of(np.unique(videos)), LAYOUT)
    slots = {slot.feature: slot for slots in LAYOUT.groups for slot in slots}
    assert not drawn.features.groups[0].valid[:, slots["user"].start].any() and not drawn.features.dense[:, 0].any()
    rows = np.searchsorted(np.unique(videos), drawn.features.groups[0].ids[:, slots["video"].start])
    assert len(rows) == 8 and len(set(rows.tolist())) > 1
    np.testing.assert_array_equal(drawn.features.groups[1].ids, of_videos.groups[1].ids[rows])
    np.testing.assert_array_equal(drawn.features.groups[1].valid, of_videos.groups[1].valid[rows])
    weights, wanted = drawn.features.weights[1], of_videos.weights[1]
    assert drawn.features.weights[0] is None and weights is not None and wanted is not None
    there = of_videos.groups[1].valid[rows]
    np.testing.assert_array_equal(weights[there], wanted[rows][there])
    np.testing.assert_array_equal(drawn.features.dense[:, 1:], of_videos.dense[rows, 1:])
    # Equal videos have equal keys, among examples and drawn ones alike.
    both = np.concatenate([videos, np.unique(videos)[rows]])
    np.testing.assert_array_equal(drawn.retrieval.key[:, None] == drawn.retrieval.key, both[:, None] == both)


def test_weights_and_log_q() -> None:
    one = sampler(batch_size=64, partitions=2)
    videos = np.tile(np.arange(16), 2)
    for seed in range(200):
        examples = examples_of(videos, seed)
        drawn = take(one, examples)
    # Each of 16 videos is one example in 16; of 8 drawn videos each is half a one.
    np.testing.assert_allclose(drawn.retrieval.log_q, np.log(64 / 16 + 8 / 16), rtol=0.02)
    assert drawn.retrieval.log_q.size == 32 + 4
    like = np.array(examples["like"].to_pylist(), np.float64)
    ratio = np.array([play >= 9_500 and duration is not None for play, duration in zip(
        examples["play_time_ms"].to_pylist(), examples["duration_ms"].to_pylist(), strict=True)])  # fmt: skip
    expected = (2.0 * like + 0.5 * ratio) * np.array(examples["weight"].to_pylist())
    np.testing.assert_allclose(drawn.retrieval.weight, expected, rtol=1e-6)


def test_examples_without_a_video_and_short_parts_are_no_candidates() -> None:
    one, known = sampler(), np.arange(20) % 3 > 0
    drawn = take(one, examples_of(np.arange(20), known=known))
    there = np.zeros(32, np.bool_)
    there[:20] = known
    np.testing.assert_array_equal(np.isfinite(drawn.retrieval.log_q[:32]), there)
    assert np.isfinite(drawn.retrieval.log_q[32:]).all() and not drawn.retrieval.weight[~there].any()
    nobody = take(sampler(), examples_of(np.arange(5), known=np.zeros(5, np.bool_)))
    for nothing in (nobody, one.nothing()):
        assert np.isinf(nothing.retrieval.log_q).all() and not nothing.retrieval.weight.any()
        assert not any(group.valid.any() for group in nothing.features.groups)


def test_a_sampler_goes_on_from_its_state() -> None:
    batches = [examples_of(zipf(32, 300, seed)[0], seed) for seed in range(8)]
    whole = sampler(seed=5)
    expected = [take(whole, batch) for batch in batches]
    stopped = sampler(seed=5)
    for batch in batches[:4]:
        take(stopped, batch)
    state = stopped.get_state()
    for batch in batches[4:]:
        take(stopped, batch)
    resumed = sampler(seed=5)
    resumed.set_state(state)
    for batch, drawn in zip(batches[4:], expected[4:], strict=True):
        assert_same(take(resumed, batch), drawn)
    # Another seed and another partition draw others.
    for other in (sampler(seed=6), sampler(seed=5, index=1, partitions=1)):
        found = [take(other, batch) for batch in batches]
        assert any((a.features.dense != b.features.dense).any() for a, b in zip(found, expected, strict=True))


def test_sampler_bytes_are_those_of_its_state() -> None:
    state = sampler().get_state()
    assert sum(array.nbytes for array in state.values()) == sampler_bytes(CONFIG, LAYOUT)


def test_every_device_has_its_share_of_examples_and_of_drawn_videos() -> None:
    parts = [sampler(batch_size=32, partitions=2, index=index) for index in range(2)]
    examples = [examples_of(np.arange(16) + 100 * index, index) for index in range(2)]
    drawn = [take(part, batch) for part, batch in zip(parts, examples, strict=True)]
    features = [featurize(batch, LAYOUT) for batch in examples]
    joined = Features(
        tuple(type(pair[0])(*map(np.concatenate, zip(*pair, strict=True)))
              for pair in zip(*(one.groups for one in features), strict=True)),
        (None, np.concatenate([one.weights[1] for one in features])),  # pyright: ignore[reportCallIssue, reportArgumentType]
        np.concatenate([one.dense for one in features]),
    )  # fmt: skip
    rows, retrieval = side_by_side(joined, drawn, 4)
    blocks = rows.dense.reshape(4, 10, -1)
    np.testing.assert_array_equal(blocks[:, :8].reshape(32, -1), joined.dense)
    np.testing.assert_array_equal(blocks[:, 8:].reshape(8, -1), np.concatenate([one.features.dense for one in drawn]))
    content = rows.dense[:, 1]
    np.testing.assert_array_equal(retrieval.key[:, None] == retrieval.key, content[:, None] == content)
    assert retrieval.weight.size == 32 and rows.groups[1].ids.shape == (40, 3)
