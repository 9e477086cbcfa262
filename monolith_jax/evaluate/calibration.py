"""Scores and what happened to corrections of the scores: a slope and an intercept a head.

In: scores that a model gave to examples it had not learned from, with labels and masks. Out: of a binary head the two numbers
of sigmoid(slope * logit(score) + intercept) (Platt 1999, "Probabilistic outputs for support vector machines"; found by Newton's
method, as Lin, Lin and Weng 2007 have it); of a regression head the ratio of what happened to what was predicted, as the slope.
The order of candidates by one head stays; what changes is what a head is worth beside others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_SMALLEST = 1e-7
_STEPS = 50
_DONE = 1e-9
"""Length of the gradient, an example."""


class Calibration(NamedTuple):
    """The correction of a head."""

    slope: float
    intercept: float


IDENTITY = Calibration(1.0, 0.0)


def fit(scores: np.ndarray, labels: np.ndarray, masks: np.ndarray, kinds: Sequence[str]) -> list[Calibration]:
    """Returns the correction of each head; that which changes nothing where a head has no example, or all are alike.

    Args:
        scores: float32 [N, T].
        labels: float32 [N, T].
        masks: float32 [N, T], the weight of the example, 0 where the label is undefined.
        kinds: "binary" or "regression" of each head.

    Raises:
        ValueError: The shapes differ.
    """
    if not scores.shape == labels.shape == masks.shape or scores.ndim != 2 or scores.shape[1] != len(kinds):
        raise ValueError(
            f"scores, labels and masks must be [N, {len(kinds)}], got {scores.shape}, {labels.shape}, {masks.shape}"
        )
    out = []
    for task, kind in enumerate(kinds):
        there = (masks[:, task] > 0) & np.isfinite(scores[:, task])
        of_head = tuple(array[there, task].astype(np.float64) for array in (scores, labels, masks))
        out.append(_binary(*of_head) if kind == "binary" else _ratio(*of_head))
    return out


def _ratio(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Calibration:
    predicted, happened = float((weights * scores).sum()), float((weights * labels).sum())
    return Calibration(happened / predicted, 0.0) if predicted > 0 and happened > 0 else IDENTITY


def _binary(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Calibration:
    positive, negative = float(weights[labels > 0].sum()), float(weights[labels <= 0].sum())
    if not positive or not negative:
        return IDENTITY
    inside = np.clip(scores, _SMALLEST, 1 - _SMALLEST)
    x = np.log(inside) - np.log1p(-inside)
    # Platt's targets: as if one more of each kind had been seen, so that few examples do not make predictions certain.
    targets = np.where(labels > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))
    inputs = np.stack([x, np.ones_like(x)], axis=1)
    at = np.array([1.0, 0.0])
    loss = _loss(inputs @ at, targets, weights)
    for _ in range(_STEPS):
        predicted = 1 / (1 + np.exp(-inputs @ at))
        gradient = inputs.T @ (weights * (predicted - targets))
        if np.abs(gradient).max() < _DONE * weights.sum():
            break
        curvature = (inputs * (weights * predicted * (1 - predicted))[:, None]).T @ inputs
        step = np.linalg.solve(curvature + 1e-9 * (1 + np.trace(curvature)) * np.eye(2), gradient)
        size = 1.0
        while size > 1e-9 and (new := _loss(inputs @ (at - size * step), targets, weights)) > loss:
            size /= 2
        if size <= 1e-9:
            break
        at, loss = at - size * step, new
    return Calibration(float(at[0]), float(at[1]))


def _loss(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    return float((weights * (np.logaddexp(0, logits) - targets * logits)).sum())


def gin_lines(found: Mapping[str, Calibration]) -> str:
    """Returns the corrections of heads as the lines of a gin file that `RankConfig.calibration` takes."""
    named = ", ".join(f"@{head}/CalibrationConfig()" for head in found)
    lines = [f"RankConfig.calibration = ({named}{',' if len(found) == 1 else ''})"]
    for head, (slope, intercept) in found.items():
        lines.append(f"{head}/CalibrationConfig.head = {head!r}")
        lines.append(f"{head}/CalibrationConfig.slope = {slope:.6g}")
        lines.append(f"{head}/CalibrationConfig.intercept = {intercept:.6g}")
    return "\n".join(lines)
