"""The ranking path on KuaiRand: the verdict, and what calibration is worth."""

import numpy as np
import pytest

from launch.bench.served_rank import calibrated, figures_of
from monolith_jax.models.losses import HeadConfig


@pytest.mark.parametrize(("like", "met"), [(0.9, True), (0.9000009, True), (0.900002, False), (0.89, False)])
def test_any_head_that_differs_fails(like: float, met: bool) -> None:
    told = figures_of({"like": 0.9, "skip": 0.8}, {"like": like, "skip": 0.8}, {"requests": 3, "ms_a_request": 1.23456})
    assert told["met"] is met and told["ms_a_request"] == 1.235 and told["apart"] == pytest.approx(abs(like - 0.9), abs=1e-12)


def test_the_second_half_is_repaired_by_the_first() -> None:
    rng = np.random.default_rng(0)
    true = rng.random((20_000, 2)) * 0.2
    labels = (rng.random(true.shape) < true).astype(np.float32)
    scores = np.stack([true[:, 0], 3 * true[:, 1]], 1).astype(np.float32)
    heads = (HeadConfig("like"), HeadConfig("play_ratio", "regression"))
    found, ratios = calibrated(heads, scores, labels, np.ones_like(scores))
    assert ratios["play_ratio"] == pytest.approx((3, 1), rel=0.1) and ratios["like"] == pytest.approx((1, 1), rel=0.1)
    assert found["play_ratio"].slope == pytest.approx(1 / 3, rel=0.1)
