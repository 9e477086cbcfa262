"""Candidates of one user are scored as whole examples are."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.features import CrossFeatureConfig, FeatureConfig, Features, featurize
from monolith_jax.models.dcn import DCNConfig
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.fm import FMConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.models.shared_bottom import SharedBottomConfig
from monolith_jax.models.towers import ModelConfig
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.serve.encode import Encoder
from monolith_jax.serve.rank import Ranker
from monolith_jax.types import GroupIds
from tests.serve.published import Log
from tests.small_model import FEATURES, TABLES, make_examples

CROSSED: tuple[FeatureConfig, ...] = (
    CrossFeatureConfig("user_video", ("user_id", "last"), "video"),
    *FEATURES,
    CrossFeatureConfig("of_video", ("last", "last"), "tag"),
    CrossFeatureConfig("three", ("last", "user_id", "last"), "tag"),
    CrossFeatureConfig("when", ("event_time_ms", "last"), "tag"),
    CrossFeatureConfig("of_user", ("user_id", "event_time_ms"), "tag"),
)
CANDIDATE = ("last", "pinned", "tag", "tag_weight")
REQUEST = ("user_id", "seen", "age", "event_time_ms")
TWO_TOWER = TwoTowerConfig(user_features=("user", "seen", "age"), video_features=("last", "tag"), dim=8, video_column="last")
CONFIGS: dict[str, ModelConfig] = {
    "deepfm": DeepFMConfig(hidden=(8,)),
    "mmoe": MMoEConfig(2, (8,), (4,)),
    "shared bottom": SharedBottomConfig((8,), (4,)),
    "dcn": DCNConfig(2, 0, (8,)),
    "fm": FMConfig(),
}


def published(root: Path, config: ModelConfig, features: tuple[FeatureConfig, ...] = CROSSED) -> Log:
    log, rng = Log(root, config=config, features=features, two_tower=TWO_TOWER), np.random.default_rng(0)
    ids = np.arange(60) * 7919 - 100
    rows = {table.name: (ids, rng.normal(size=(60, 4)).astype(np.float32)) for table in TABLES}
    log.publish(rows, kind="base")
    return log


def with_request_of_first(examples: pa.RecordBatch) -> pa.RecordBatch:
    """Returns examples that are all of the first one's request."""
    for name in REQUEST:
        index = examples.schema.get_field_index(name)
        first = examples.column(name).take(pa.array(np.zeros(examples.num_rows, np.int64)))
        examples = examples.set_column(index, examples.schema.field(index), first)
    return examples


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_candidates_score_as_whole_examples(tmp_path: Path, config: ModelConfig) -> None:
    log = published(tmp_path, config)
    served = log.serve()
    ranker = Ranker(served, CANDIDATE, sizes=(4, 16))
    asked = with_request_of_first(make_examples(40))
    request, candidates = asked.slice(0, 1).select(REQUEST), asked.select(CANDIDATE)
    once = ranker.once_features(request)
    for number in (0, 1, 4, 5, 16, 40):
        each = ranker.candidate_features(request, candidates.slice(0, number))
        got = ranker.scores(once, each)
        assert got.shape == (number, 2) and got.dtype == np.float32
        np.testing.assert_allclose(got, served.predict(asked.slice(0, number)), rtol=2e-5, atol=1e-6)
    before = got
    log.publish({}, dense={name: weight * 1.5 for name, weight in log.dense.items()})
    served.poll()
    got = ranker.scores(once, each)
    np.testing.assert_allclose(got, served.predict(asked), rtol=2e-5, atol=1e-6)
    assert np.abs(got - before).max() > 1e-3


def test_what_is_kept_of_videos_gives_the_features_of_whole_examples(tmp_path: Path) -> None:
    ranker = Ranker(published(tmp_path, CONFIGS["mmoe"]).serve(), CANDIDATE, sizes=(4,))
    asked = with_request_of_first(make_examples(30))
    plain, raw = featurize(asked.select(CANDIDATE), ranker.plain_layout), ranker.crosses.of_candidates(asked.select(CANDIDATE))
    at = np.array([3, 20, 3, 7])
    taken = Features(
        tuple(GroupIds(ids[at], valid[at]) for ids, valid in plain.groups),
        tuple(None if weights is None else weights[at] for weights in plain.weights),
        plain.dense[at],
    )
    of_request = ranker.crosses.of_request(asked.slice(0, 1).select(REQUEST))
    got = ranker.joined(taken, ranker.crosses.ids(of_request, GroupIds(raw.ids[at], raw.valid[at])))
    expected = featurize(asked.take(pa.array(at)), ranker.each_layout)
    assert raw.valid.any() and not raw.valid.all()
    for ours, whole in zip(got.groups, expected.groups, strict=True):
        np.testing.assert_array_equal(ours.valid, whole.valid)
        np.testing.assert_array_equal(ours.ids * ours.valid, whole.ids * whole.valid)
    for ours, whole in zip(got.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(ours, whole)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(got.dense, expected.dense)


def test_candidates_of_one_version(tmp_path: Path) -> None:
    """All that is read of a request is of one version, while versions come."""
    config = DeepFMConfig(hidden=())
    log = published(tmp_path, config, FEATURES)
    asked = with_request_of_first(make_examples(40))
    ids = np.arange(60) * 7919 - 100

    def publish(number: int, kind: str) -> None:
        rows = np.zeros((60, 4), np.float32)
        rows[:, 0] = 2.0**number
        dense = {name: np.zeros_like(weight) for name, weight in log.dense.items()}
        dense["wide"] = np.full(2, 2.0**-number, np.float32)
        log.publish({table.name: (ids, rows) for table in TABLES}, dense=dense, kind=kind)

    publish(0, "base")
    served = log.serve(two_tower=TWO_TOWER)
    ranker = Ranker(served, CANDIDATE, sizes=(16,))
    request, candidates = asked.slice(0, 1), asked.select(CANDIDATE)
    once, each = ranker.once_features(request), ranker.candidate_features(request, candidates)
    expected = ranker.scores(once, each)
    served.watch(0.001)
    for number in range(1, 8):
        publish(number, "delta")
        for _ in range(10):
            np.testing.assert_array_equal(ranker.scores(once, each), expected)
    served.close()
    assert np.unique(expected).size > 10


def test_what_cannot_be_ranked_is_told(tmp_path: Path) -> None:
    log = published(tmp_path, CONFIGS["deepfm"])
    served = log.serve()
    with pytest.raises(ValueError, match="no feature reads a column of candidates"):
        Ranker(served, ("video",))
    with pytest.raises(ValueError, match="'tag' reads tag, tag_weight, some of a candidate"):
        Ranker(served, ("last", "tag"))
    with pytest.raises(ValueError, match="sizes must be one or more"):
        Ranker(served, CANDIDATE, sizes=())
    ranker = Ranker(served, CANDIDATE, sizes=(4,))
    with pytest.raises(ValueError, match="one row, got 2"):
        ranker.once_features(make_examples(2))
    with pytest.raises(ValueError, match="needs the column 'last'"):
        ranker.candidate_features(make_examples(1), make_examples(2).select(["tag", "tag_weight", "pinned"]))


def test_vectors_of_users_and_videos(tmp_path: Path) -> None:
    log = published(tmp_path, CONFIGS["deepfm"])
    served = log.serve()
    encoder = Encoder(served, user_sizes=(1, 8), video_sizes=(4, 16))
    asked = make_examples(40)
    users = encoder.users(featurize(asked, encoder.user_layout))
    videos = encoder.videos(featurize(asked, encoder.video_layout))
    assert users.shape == videos.shape == (40, 8) and users.dtype == videos.dtype == np.float32
    for vectors in (users, videos):
        np.testing.assert_allclose(np.square(vectors).sum(1), 1, rtol=1e-5)
        assert np.unique(vectors[:, 0]).size > 10
    for number in (0, 1, 5, 20):
        few = encoder.users(featurize(asked.slice(3, number), encoder.user_layout))
        np.testing.assert_allclose(few, users[3 : 3 + number], atol=1e-6)
    log.publish({}, dense={name: weight + 0.1 for name, weight in log.dense.items()})
    served.poll()
    assert np.abs(encoder.users(featurize(asked, encoder.user_layout)) - users).max() > 1e-3


def test_a_two_tower_alone(tmp_path: Path) -> None:
    log = Log(tmp_path, two_tower=TWO_TOWER, heads=())
    log.publish({"user": ([1], np.ones((1, 4), np.float32))}, kind="base")
    served = log.serve()
    encoder = Encoder(served, user_sizes=(4,), video_sizes=(4,))
    assert encoder.users(featurize(make_examples(3), encoder.user_layout)).shape == (3, 8)
    with pytest.raises(ValueError, match="no ranker"):
        Ranker(served, CANDIDATE)
    with pytest.raises(ValueError, match="no ranker to predict with"):
        served.predict(make_examples(3))
    log = published(tmp_path / "ranker", CONFIGS["deepfm"])
    log.two_tower = None
    with pytest.raises(ValueError, match="unknown retrieval/user"):
        log.serve()
    log = Log(tmp_path / "alone")
    log.publish({}, kind="base")
    with pytest.raises(ValueError, match="this model has no two-tower"):
        Encoder(log.serve())
