"""What scores are worth, against the sum written out."""

import numpy as np
import pytest

from monolith_jax.experiment import load_as
from monolith_jax.models.losses import HeadConfig
from monolith_jax.serve.values import CalibrationConfig, GroupValuesConfig, RankConfig, Values

HEADS = (HeadConfig("like"), HeadConfig("play_ratio", "regression"), HeadConfig("skip"))
CONFIG = RankConfig(heads=("skip", "like"), weights=(-2.0, 3.0), play_s_weight=0.1)


def draw(number: int = 50) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((number, 3)).astype(np.float32), rng.integers(1000, 60_000, number)


def test_the_value_is_the_weighted_sum_and_the_time_of_play() -> None:
    scores, durations = draw()
    got = Values(CONFIG, HEADS)(scores, durations)
    expected = [
        3 * like - 2 * skip + 0.1 * ratio * ms / 1000 for (like, ratio, skip), ms in zip(scores, durations, strict=True)
    ]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    no_play = RankConfig(heads=("like",), weights=(1.0,))
    np.testing.assert_allclose(Values(no_play, HEADS[:1])(scores[:, :1], durations), scores[:, 0], rtol=1e-6)


def test_a_group_has_weights_of_its_own_over_the_defaults() -> None:
    scores, durations = draw()
    groups = (GroupValuesConfig(name="new", heads=("skip",), weights=(-5.0,)), GroupValuesConfig(name="old", play_s_weight=0.0))
    values = Values(RankConfig(heads=("skip", "like"), weights=(-2.0, 3.0), play_s_weight=0.1, groups=groups), HEADS)
    default = values(scores, durations)
    np.testing.assert_allclose(values(scores, durations, "new"), default - 3 * scores[:, 2], atol=1e-5)
    np.testing.assert_allclose(values(scores, durations, "old"), default - 1e-4 * scores[:, 1] * durations, atol=1e-5)
    assert values.metrics() == {"unknown_groups": 0, "set_aside": 0}
    np.testing.assert_array_equal(values(scores, durations, "never"), default)
    assert values.metrics()["unknown_groups"] == 1


def test_a_score_that_is_no_number_is_never_first() -> None:
    scores, durations = draw(6)
    values = Values(CONFIG, HEADS)
    expected = values(scores, durations)
    scores[1, 0], scores[4, 1] = np.nan, np.inf
    got = values(scores, durations)
    assert np.isneginf(got[[1, 4]]).all() and values.metrics()["set_aside"] == 2
    np.testing.assert_array_equal(got[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])
    no_time = values(scores[:3], np.array([np.nan, 5.0, -7.0]))
    np.testing.assert_allclose(no_time[[0, 2]], 3 * scores[[0, 2], 0] - 2 * scores[[0, 2], 2], rtol=1e-5)


def test_scores_are_corrected_by_slope_and_intercept() -> None:
    scores, _ = draw()
    scores[0] = [0, 0, 1]
    calibration = (CalibrationConfig(head="like", slope=2.0, intercept=-1.0), CalibrationConfig(head="play_ratio", slope=0.5))
    got = Values(RankConfig(heads=("like",), weights=(1.0,), calibration=calibration), HEADS).calibrated(scores)
    odds = (scores[1:, 0] / (1 - scores[1:, 0])) ** 2 * np.exp(-1)
    np.testing.assert_allclose(got[1:, 0], odds / (1 + odds), rtol=1e-5)
    np.testing.assert_allclose(got[:, 1:], scores[:, 1:] * [0.5, 1.0], rtol=1e-6)
    assert np.isfinite(got).all() and got[0, 0] < 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"heads": ("likes",), "weights": (1.0,)},
            "needs the head 'likes', which the ranker has not; its heads: like, play_ratio",
        ),
        ({"heads": ("like",), "weights": ()}, "heads must differ"),
        ({"heads": ("like", "like"), "weights": (1.0, 2.0)}, "heads must differ"),
        ({"heads": ("like",), "weights": (float("nan"),)}, "finite"),
        ({"num_candidates": 0}, "num_candidates must be at least 1"),
        ({"calibration": (CalibrationConfig(head="x"),)}, "CalibrationConfig needs the head 'x'"),
        ({"calibration": (CalibrationConfig(head="like"),) * 2}, "names a head twice"),
        (
            {"groups": (GroupValuesConfig(name="a", heads=("y",), weights=(1.0,)),)},
            "GroupValuesConfig 'a'.heads needs the head 'y'",
        ),
        ({"groups": (GroupValuesConfig(name="a"),) * 2}, "is there twice"),
    ],
)
def test_a_config_that_does_not_fit_is_told(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Values(RankConfig(**{"heads": ("like",), "weights": (1.0,)} | fields), HEADS)
    with pytest.raises(ValueError, match="play_s_weight needs the head 'play_ratio'"):
        Values(CONFIG, (HEADS[0], HEADS[2]))


def test_values_are_read_from_gin(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("gin") / "rank.gin"
    file.write_text(
        "RankConfig.heads = ('like',)\nRankConfig.weights = (1.0,)\nRankConfig.groups = (@new/GroupValuesConfig(),)\n"
        "new/GroupValuesConfig.name = 'new'\nnew/GroupValuesConfig.play_s_weight = 0.5\n"
    )
    got = load_as(RankConfig, (RankConfig, GroupValuesConfig, CalibrationConfig), [file])
    assert got == RankConfig(heads=("like",), weights=(1.0,), groups=(GroupValuesConfig(name="new", play_s_weight=0.5),))
