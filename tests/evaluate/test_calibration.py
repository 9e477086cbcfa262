"""Corrections of scores whose error is known."""

from pathlib import Path

import numpy as np
import pytest

from monolith_jax.evaluate.calibration import IDENTITY, Calibration, fit, gin_lines
from monolith_jax.experiment import load_as
from monolith_jax.serve.values import CalibrationConfig, GroupValuesConfig, RankConfig


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def draw(number: int = 40_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the true logits of three heads, labels that follow them, and masks."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(number, 3)) * 1.5 - [0.0, 2.0, 0.0]
    labels = (rng.random((number, 3)) < sigmoid(logits)).astype(np.float32)
    labels[:, 2] = rng.exponential(np.exp(logits[:, 2] / 3))
    return logits, labels, np.ones((number, 3), np.float32)


KINDS = ("binary", "binary", "regression")


def test_a_wrong_head_is_repaired_and_a_right_one_left_alone() -> None:
    logits, labels, masks = draw()
    scores = np.stack([sigmoid(logits[:, 0]), sigmoid(logits[:, 1] / 2 + 0.8), 2 * np.exp(logits[:, 2] / 3)], 1).astype(
        np.float32
    )
    right, wrong, ratio = fit(scores, labels, masks, KINDS)
    # Errors of the estimates are about 0.015 each.
    np.testing.assert_allclose(right, (1.0, 0.0), atol=0.05)
    np.testing.assert_allclose(wrong, (2.0, -1.6), atol=0.1)
    np.testing.assert_allclose(ratio, (0.5, 0.0), atol=0.02)
    corrected = sigmoid(wrong.slope * (logits[:, 1] / 2 + 0.8) + wrong.intercept)
    assert abs(scores[:, 1].mean() / labels[:, 1].mean() - 1) > 0.5
    np.testing.assert_allclose(corrected.mean(), labels[:, 1].mean(), rtol=1e-3)


def test_the_fit_is_the_best_one() -> None:
    """No other slope and intercept near it has a lower loss, by weight."""
    logits, labels, masks = draw(3000, 1)
    masks[:] = np.random.default_rng(2).choice([0.0, 1.0, 3.0], masks.shape)
    labels[masks == 0] = np.nan
    scores = sigmoid(logits * 3 + 1).astype(np.float32)
    found = fit(scores, labels, masks, ("binary", "binary", "regression"))[0]
    there = masks[:, 0] > 0
    x = np.log(scores[there, 0].astype(np.float64)) - np.log1p(-scores[there, 0].astype(np.float64))

    def loss(slope: float, intercept: float) -> float:
        predicted = sigmoid(slope * x + intercept)
        of_each = np.where(labels[there, 0] > 0, np.log(predicted), np.log1p(-predicted))
        return float(-(masks[there, 0] * of_each).mean())

    for slope, intercept in ((0.02, 0), (-0.02, 0), (0, 0.05), (0, -0.05)):
        assert loss(*found) < loss(found.slope + slope, found.intercept + intercept)


def test_nothing_to_learn_from_changes_nothing() -> None:
    nothing = np.zeros((0, 2), np.float32)
    assert fit(nothing, nothing, nothing, ("binary", "regression")) == [IDENTITY, IDENTITY]
    ones = np.ones((9, 2), np.float32)
    assert fit(ones / 2, ones * [1, 0], ones, ("binary", "regression")) == [IDENTITY, IDENTITY]
    assert fit(ones / 2, ones, ones * 0, ("binary", "regression")) == [IDENTITY, IDENTITY]
    certain = np.array([[0.0], [1.0]], np.float32).repeat(5, axis=0)
    (found,) = fit(certain, certain, np.ones_like(certain), ("binary",))
    assert np.isfinite([found.slope, found.intercept]).all()
    with pytest.raises(ValueError, match=r"must be \[N, 1\], got \(9, 2\)"):
        fit(ones, ones, ones, ("binary",))


def test_corrections_are_lines_of_gin(tmp_path: Path) -> None:
    logits, labels, masks = draw(500)
    like, skip, _ = fit(sigmoid(logits).astype(np.float32), labels, masks, KINDS)
    found: dict[str, Calibration] = {"like": like, "skip": skip}
    for some in (found, {"like": found["like"]}):
        file = tmp_path / "rank.gin"
        file.write_text(f"RankConfig.heads = ('like',)\nRankConfig.weights = (1.0,)\n{gin_lines(some)}\n")
        got = load_as(RankConfig, (RankConfig, GroupValuesConfig, CalibrationConfig), [file])
        assert [one.head for one in got.calibration] == list(some)
        np.testing.assert_allclose([one.slope for one in got.calibration], [one.slope for one in some.values()], rtol=1e-5)
