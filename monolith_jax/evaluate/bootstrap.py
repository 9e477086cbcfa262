"""Confidence intervals by bootstrap over users: how far a metric may be off because these users were seen and not others.

In: scores, labels and users of examples, or values of users. Out: each metric with the quantiles of its values over resamples
(Efron 1979, "Bootstrap methods: another look at the jackknife"; the percentile interval of Efron and Tibshirani 1993, "An
introduction to the bootstrap", chapter 13). Users are drawn, with replacement, as many as there are, and each comes with all
examples: those of one user are alike, and drawing them one by one would give intervals that are too narrow (the "cluster
bootstrap"; Davison and Hinkley 1997, "Bootstrap methods and their application", section 3.8).

A resample is a count for each user. All metrics but the AUC are made of sums over users, which are added up once; for the AUC
examples are sorted once, and a resample is a pass over them with the counts as weights. So it costs O(N + U) a resample, and
memory of about 40 bytes an example beside what is given: 5 million examples take 0.2 GB, whatever the number of resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from monolith_jax.evaluate import metrics

METRICS = {
    "binary": ("auc", "gauc", "log_loss", "normalised_entropy", "calibration"),
    "regression": ("mae", "rmse", "calibration"),
}
"""What `of_head` gives, by the head's kind."""


class Interval(NamedTuple):
    """A metric, and between what it probably is."""

    value: float
    """Of the examples as they are; NaN where it is undefined."""
    low: float
    high: float
    """NaN where no resample has a value, or there is only one user."""


def counts(users: int, number: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each user was drawn, float64 [users], for each of `number` resamples."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        yield np.bincount(rng.integers(0, users, users), minlength=users).astype(np.float64)


def of_head(
    scores: np.ndarray,
    labels: np.ndarray,
    users: np.ndarray,
    kind: str = "binary",
    number: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Returns the metrics of a head, `METRICS`, each with its interval.

    Args:
        scores: [N], probabilities of a binary head, predicted values of a regression head; an order of float32 for the AUC.
        labels: [N]; above 0 is positive for a binary head.
        users: [N], any values; equal values are a user.
        kind: "binary" or "regression".
        number: Resamples; 0: the metrics alone.
        confidence: Share of the resamples that the interval holds.
        seed: Of the draws.

    Raises:
        ValueError: The shapes differ, a score is NaN, or another argument makes no sense.
    """
    scores, labels, users = np.asarray(scores, np.float32), np.asarray(labels, np.float64), np.asarray(users)
    _check(number, confidence)
    if kind not in METRICS:
        raise ValueError(f"kind must be one of {', '.join(METRICS)}, got {kind!r}")
    if not scores.shape == labels.shape == users.shape or scores.ndim != 1:
        raise ValueError(f"expected scores, labels and users [N], got {scores.shape}, {labels.shape}, {users.shape}")
    names, codes = np.unique(users, return_inverse=True)
    codes = codes.astype(np.int32)
    if kind == "binary":
        labels = (labels > 0).astype(np.float64)
    sums = _sums(scores, labels, codes, names.size, kind)
    area = _Area(scores, labels > 0, codes) if kind == "binary" else None

    def measured(weights: np.ndarray) -> list[float]:
        total = weights @ sums
        return [area(weights), *_of_binary(total)] if area else _of_regression(total)

    return _intervals(METRICS[kind], measured, names.size, number, confidence, seed)


def of_means(
    of_users: Mapping[str, np.ndarray], number: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Returns the mean of each metric over the users that have it, with its interval.

    Args:
        of_users: By name, float64 [U], NaN where a user has none; the same users in all.
        number: Resamples.
        confidence: Share of the resamples that the interval holds.
        seed: Of the draws.

    Raises:
        ValueError: The shapes differ, or an argument makes no sense.
    """
    _check(number, confidence)
    if len({values.shape for values in of_users.values()}) > 1 or any(values.ndim != 1 for values in of_users.values()):
        raise ValueError(f"expected values [U] of one length, got {', '.join(str(one.shape) for one in of_users.values())}")
    if not of_users:
        return {}
    values = np.stack(list(of_users.values()), axis=1)
    there = ~np.isnan(values)
    both = np.concatenate([np.where(there, values, 0.0), there], axis=1)

    def measured(weights: np.ndarray) -> list[float]:
        above, below = np.split(weights @ both, 2)
        return [_ratio(a, b) for a, b in zip(above.tolist(), below.tolist(), strict=True)]

    return _intervals(tuple(of_users), measured, values.shape[0], number, confidence, seed)


def _check(number: int, confidence: float) -> None:
    if number < 0 or not 0 < confidence < 1:
        raise ValueError(f"number must be at least 0 and confidence between 0 and 1, got {number} and {confidence}")


def _intervals(
    names: tuple[str, ...],
    measured: Callable[[np.ndarray], Sequence[float]],
    users: int,
    number: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    value = measured(np.ones(users))
    several = users > 1  # Of one user there is but one resample, which tells nothing.
    drawn = np.array([measured(weights) for weights in counts(users, number, seed)] if several else [], np.float64)
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    out = {}
    for at, name in enumerate(names):
        of_name = drawn[:, at] if drawn.size else np.zeros(0)
        of_name = of_name[~np.isnan(of_name)]  # A resample may lack one class; the others tell of it.
        low, high = np.quantile(of_name, tails).tolist() if of_name.size else (float("nan"),) * 2
        out[name] = Interval(value[at], low, high)
    return out


def _sums(scores: np.ndarray, labels: np.ndarray, codes: np.ndarray, users: int, kind: str) -> np.ndarray:
    """Returns what is added up of each user, float64 [U, S]."""

    def of_users(values: np.ndarray) -> np.ndarray:
        return np.bincount(codes, values, minlength=users)

    columns = [np.bincount(codes, minlength=users).astype(np.float64), of_users(labels), of_users(scores)]
    if kind == "regression":
        error = scores - labels
        return np.stack([*columns, of_users(np.abs(error)), of_users(np.square(error))], axis=1)
    group, area, size = metrics.group_areas(scores, labels > 0, codes)
    of_both = np.zeros((2, users))
    of_both[0, group], of_both[1, group] = area * size, size
    return np.stack([*columns, of_users(metrics.log_losses(scores, labels)), *of_both], axis=1)


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")


def _of_binary(total: np.ndarray) -> list[float]:
    examples, label, score, loss, area, size = total.tolist()
    log_loss = _ratio(loss, examples)
    floor = metrics.entropy(min(_ratio(label, examples), 1.0))
    return [_ratio(area, size), log_loss, log_loss / floor if floor > 0 else float("nan"), _ratio(score, label)]


def _of_regression(total: np.ndarray) -> list[float]:
    examples, label, score, absolute, squared = total.tolist()
    return [_ratio(absolute, examples), float(np.sqrt(_ratio(squared, examples))), _ratio(score, label)]


class _Area:
    """The AUC with users' counts as weights."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray, codes: np.ndarray) -> None:
        order = np.argsort(scores)
        ordered = scores[order]
        self._codes, self._positive = codes[order], positive[order]
        new = np.ones(scores.shape, np.bool_)
        new[1:] = ordered[1:] != ordered[:-1]
        self._starts = None if new.all() else np.flatnonzero(new)  # Without ties every example is a cell of its own.

    def __call__(self, weights: np.ndarray) -> float:
        if not self._codes.size:
            return float("nan")
        negatives = weights[self._codes]
        positives = negatives * self._positive
        negatives -= positives
        if self._starts is not None:
            positives, negatives = (np.add.reduceat(one, self._starts) for one in (positives, negatives))
        pairs = positives.sum() * negatives.sum()
        below = np.cumsum(negatives)
        below -= negatives / 2
        return float(np.dot(positives, below) / pairs) if pairs > 0 else float("nan")
