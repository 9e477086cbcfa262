"""Metrics of predictions, in numpy.

In: scores or probabilities, labels (above 0 is positive) and, where needed, groups, as arrays of one length [N]. Out: a
float, NaN where the metric is undefined (no examples, or one class missing); never an exception for that. Scores that are
not a number are refused: they have no place in an order.

`StreamingAuc` is the one thing with state: it takes scores batch by batch and tells the AUC of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CLIP = 1e-7
"""Probabilities are kept this far from 0 and 1 before a logarithm is taken."""

_CELL_DTYPES = {"low": np.uint32, "high": np.uint32, "positives": np.int64, "negatives": np.int64}
_Cells = dict[str, np.ndarray]


def _same_length(**arrays: np.ndarray) -> None:
    if len({array.shape for array in arrays.values()}) > 1 or any(array.ndim != 1 for array in arrays.values()):
        got = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"metrics take arrays of one shape [N], got {got}; pass one head at a time")


def _refuse_nan(scores: np.ndarray) -> None:
    bad = int(np.isnan(scores).sum())
    if bad:
        raise ValueError(
            f"{bad} of {scores.size} scores are NaN and cannot be ordered; mask them out, or look why the model diverged"
        )


def _keys(scores: np.ndarray) -> np.ndarray:
    """Returns uint32 keys in the order of the scores: equal keys for equal scores, above 0 for every score."""
    _refuse_nan(scores)
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (scores + np.float32(0)).view(np.uint32)  # the sum turns -0.0 into 0.0, which is equal to it but has other bits
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _starts(sorted_values: np.ndarray) -> np.ndarray:
    """Returns the positions at which a new value begins."""
    new = np.ones(sorted_values.shape, bool)
    new[1:] = sorted_values[1:] != sorted_values[:-1]
    return np.flatnonzero(new)


def auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Returns the area under the ROC curve: how often a positive outranks a negative, ties counted half.

    Args:
        scores: [N], any order-preserving scale.
        labels: [N], above 0 is positive.
        weights: [N] weights of the examples, at least 0; None: 1 each.

    Returns:
        A value in [0, 1], exact but for rounding; NaN when one class has no weight.

    Raises:
        ValueError: The shapes differ, or a score is NaN.
    """
    scores, positive = np.asarray(scores), np.asarray(labels) > 0
    weight = np.ones(scores.shape) if weights is None else np.asarray(weights, np.float64)
    _same_length(scores=scores, labels=positive, weights=weight)
    _refuse_nan(scores)
    if not scores.size:
        return float("nan")
    order = np.argsort(scores)
    starts = _starts(scores[order])
    positive_w = np.add.reduceat(np.where(positive[order], weight[order], 0.0), starts)
    negative_w = np.add.reduceat(np.where(positive[order], 0.0, weight[order]), starts)
    return _area(positive_w, negative_w)


def _area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Returns the AUC of cells in rising order of score; within a cell all are tied."""
    positives, negatives = positives.astype(np.float64), negatives.astype(np.float64)
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives
    return float(np.dot(positives, below + negatives / 2) / pairs) if pairs > 0 else float("nan")


def gauc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Returns the AUC within each group, averaged with the groups' numbers of examples as weights.

    The groups are those of one user (Zhu et al. 2017, "Optimized Cost per Click in Taobao Display Advertising", section
    4.1): a feed ranks for one user, so order between users is of no use. Groups with one class have no AUC and are left out.

    Args:
        scores: [N].
        labels: [N], above 0 is positive.
        groups: [N], any values; equal values make a group.

    Returns:
        The weighted mean, NaN when no group has both classes; and the share of the examples that counted, NaN when there
        are none.

    Raises:
        ValueError: The shapes differ, or a score is NaN.
    """
    scores, positive, groups = np.asarray(scores), np.asarray(labels) > 0, np.asarray(groups)
    _same_length(scores=scores, labels=positive, groups=groups)
    if not scores.size:
        return float("nan"), float("nan")
    codes = np.unique(groups, return_inverse=True)[1]
    weighted, counted = gauc_sums(scores, positive, codes)
    return (weighted / counted if counted else float("nan")), counted / scores.size


def gauc_sums(scores: np.ndarray, positive: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """Returns the sum over groups of AUC x examples, and the number of examples in groups that have both classes.

    Args:
        scores: [N].
        positive: bool [N].
        codes: [N] numbers of the groups, in [0, 2^31).

    Raises:
        ValueError: A score is NaN.
    """
    _, area, size = group_areas(scores, positive, codes)
    return float(np.dot(area, size)), float(size.sum())


def group_areas(scores: np.ndarray, positive: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each group that has both classes its code int64 [G], its AUC float64 [G] and its examples int64 [G].

    Args:
        scores: [N].
        positive: bool [N].
        codes: [N] numbers of the groups, in [0, 2^31).

    Raises:
        ValueError: A score is NaN.
    """
    if not scores.size:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64)
    # Group, score and label fit one word of 31 + 32 + 1 bits: one sort of plain integers, several times faster than a lexsort.
    packed = np.sort((codes.astype(np.uint64) << 33) | (_keys(scores).astype(np.uint64) << 1) | positive)
    cells = _starts(packed >> 1)
    positives = np.add.reduceat((packed & 1).astype(np.int64), cells)
    examples = np.diff(np.append(cells, packed.size))
    negatives = examples - positives
    groups = _starts(packed[cells] >> 33)
    negatives_before = np.cumsum(negatives) - negatives
    below = negatives_before - np.repeat(negatives_before[groups], np.diff(np.append(groups, cells.size)))
    twice_won = np.add.reduceat(positives * (2 * below + negatives), groups)
    P, N = np.add.reduceat(positives, groups), np.add.reduceat(negatives, groups)
    both = (P > 0) & (N > 0)
    code = (packed[cells[groups[both]]] >> 33).astype(np.int64)
    return code, twice_won[both] / (2.0 * P[both] * N[both]), (P + N)[both]


def log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns each example's -log(probability of what happened), float64, with probabilities clipped to [1e-7, 1 - 1e-7]."""
    clipped = np.clip(np.asarray(probabilities, np.float64), CLIP, 1 - CLIP)
    return -np.log(np.where(np.asarray(labels) > 0, clipped, 1 - clipped))


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of -log(probability of what happened), in nats; NaN without examples."""
    losses = log_losses(probabilities, labels)
    return float(losses.mean()) if losses.size else float("nan")


def entropy(mean_label: float) -> float:
    """Returns the log-loss, in nats, of always predicting the mean label: 0 for 0 and 1, NaN for NaN."""
    p = np.array([mean_label, 1 - mean_label])
    return float(-np.sum(p * np.log(np.where(p == 0, 1, p))))


def normalised_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the log-loss divided by that of always predicting the mean label: below 1 is better than knowing nothing.

    He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", section 3. NaN when one class is missing.
    """
    positive = np.asarray(labels) > 0
    floor = entropy(float(positive.mean())) if positive.size else 0.0
    return log_loss(probabilities, labels) / floor if floor > 0 else float("nan")


def calibration(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns mean prediction / mean label: 1 is right, above 1 promises too much. NaN when the labels sum to 0."""
    total = float(np.sum(labels, dtype=np.float64))
    return float(np.sum(predictions, dtype=np.float64)) / total if total else float("nan")


@dataclass(frozen=True)
class CalibrationBins:
    """Predictions in rising order, cut into bins of equal numbers of examples."""

    prediction: np.ndarray
    """float64 [bins]: mean prediction."""
    label: np.ndarray
    """float64 [bins]: mean label; equal to the mean prediction where the model is calibrated."""
    examples: np.ndarray
    """int64 [bins]."""


def calibration_bins(predictions: np.ndarray, labels: np.ndarray, bins: int = 20) -> CalibrationBins:
    """Returns the reliability curve: mean prediction against mean label.

    Args:
        predictions: [N].
        labels: [N].
        bins: At most this many; fewer when there are fewer examples.

    Raises:
        ValueError: The shapes differ, or `bins` is below 1.
    """
    predictions, labels = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    _same_length(predictions=predictions, labels=labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    bins = min(bins, predictions.size)
    if not bins:
        return CalibrationBins(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))
    order = np.argsort(predictions, kind="stable")
    edges = np.arange(bins + 1) * predictions.size // bins
    examples = np.diff(edges)
    prediction = np.add.reduceat(predictions[order], edges[:-1]) / examples
    return CalibrationBins(prediction, np.add.reduceat(labels[order], edges[:-1]) / examples, examples)


def mean_absolute_error(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of |prediction - label|; NaN without examples."""
    error = np.asarray(predictions, np.float64) - labels
    return float(np.abs(error).mean()) if error.size else float("nan")


def root_mean_squared_error(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the root of the mean of (prediction - label)^2; NaN without examples."""
    error = np.asarray(predictions, np.float64) - labels
    return float(np.sqrt(np.square(error).mean())) if error.size else float("nan")


def _sorted(parts: Sequence[_Cells]) -> _Cells:
    """Returns the cells of all parts in rising order."""
    parts = [part for part in parts if part["low"].size] or [parts[0]]
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([part["low"] for part in parts]), kind="stable")
    return {name: np.concatenate([part[name] for part in parts])[order] for name in _CELL_DTYPES}


def _join(cells: _Cells, shift: int, max_cells: int) -> tuple[_Cells, int]:
    """Joins neighbours that agree in all bits but the last `shift`, or but as many more as it takes to fit `max_cells`."""
    low = cells["low"]
    while (starts := _starts(low >> np.uint32(shift))).size > max_cells:
        shift += 1
    if starts.size == low.size:
        return cells, shift
    joined = {name: np.add.reduceat(cells[name], starts) for name in ("positives", "negatives")}
    return {"low": low[starts], "high": np.maximum.reduceat(cells["high"], starts), **joined}, shift


def _cells_of(keys: np.ndarray, positive: np.ndarray) -> _Cells:
    packed = np.sort((keys.astype(np.uint64) << 1) | positive)
    starts = _starts(packed >> 1)
    low = (packed[starts] >> 1).astype(np.uint32)
    positives = np.add.reduceat((packed & 1).astype(np.int64), starts) if starts.size else np.zeros(0, np.int64)
    return {"low": low, "high": low, "positives": positives, "negatives": np.diff(np.append(starts, packed.size)) - positives}


class StreamingAuc:
    """The AUC of all examples added so far, in bounded memory.

    Holds the distinct float32 scores with their numbers of positives and negatives, and is exact as long as there are at
    most `max_scores` of them. Past that, cells are joined in aligned pairs: first scores that differ in the last bit of
    their float32, then in the last two, and so on, as far as needed. Joined scores count as ties; `error_bound` says what
    that can cost. The grid is fixed, so the result does not depend on the order of `add` and `merge`.
    """

    def __init__(self, max_scores: int = 2**18) -> None:
        """Starts with no examples.

        Args:
            max_scores: Cells to keep, 24 bytes each.

        Raises:
            ValueError: `max_scores` is below 2.
        """
        if max_scores < 2:
            raise ValueError(f"max_scores must be at least 2, got {max_scores}")
        self.max_scores = max_scores
        self._shift = 0
        self._cells: _Cells = {name: np.zeros(0, dtype) for name, dtype in _CELL_DTYPES.items()}
        self._raw: list[tuple[np.ndarray, np.ndarray]] = []
        self._raw_size = 0

    def add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Adds examples; a copy is kept until enough have come to be sorted at once.

        Args:
            scores: [N], taken as float32.
            labels: [N], above 0 is positive.

        Raises:
            ValueError: The shapes differ, or a score is NaN.
        """
        scores, positive = np.asarray(scores, np.float32), np.asarray(labels) > 0
        _same_length(scores=scores, labels=positive)
        self._raw.append((_keys(scores), positive))
        self._raw_size += scores.size
        if self._raw_size >= self.max_scores:
            self._consolidate()

    def merge(self, other: StreamingAuc) -> None:
        """Adds the examples of another accumulator, which keeps its own."""
        other._consolidate()
        self._consolidate(other)

    def _consolidate(self, other: StreamingAuc | None = None) -> None:
        """Sorts what came raw (and the cells of another) into the cells, coarser if there are too many."""
        if not self._raw and other is None:
            return
        parts = [self._cells]
        if self._raw:
            keys, positive = zip(*self._raw, strict=True)
            parts.append(_cells_of(np.concatenate(keys), np.concatenate(positive)))
        if other is not None:
            cells, self._shift = _join(other._cells, max(self._shift, other._shift), self.max_scores)
            parts.append(cells)
        self._raw, self._raw_size = [], 0
        self._cells, self._shift = _join(_sorted(parts), self._shift, self.max_scores)

    @property
    def examples(self) -> int:
        """Examples added."""
        return int(self._cells["positives"].sum() + self._cells["negatives"].sum()) + self._raw_size

    def value(self) -> float:
        """Returns the AUC, ties counted half; NaN while one class is missing."""
        self._consolidate()
        return _area(self._cells["positives"], self._cells["negatives"])

    def error_bound(self) -> float:
        """Returns the largest possible distance of `value` from the exact AUC: 0 while it is exact, NaN as `value`.

        Within a cell of p positives and n negatives with different scores the truth lies between 0 and p n pairs won,
        half of which are counted.
        """
        self._consolidate()
        positives, negatives = self._cells["positives"].astype(np.float64), self._cells["negatives"].astype(np.float64)
        pairs = positives.sum() * negatives.sum()
        joined = self._cells["low"] != self._cells["high"]
        return float(np.dot(positives[joined], negatives[joined]) / 2 / pairs) if pairs > 0 else float("nan")

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns all state as arrays of its own: `low`, `high`, `positives`, `negatives` (one length) and `shift`."""
        self._consolidate()
        return {**{name: array.copy() for name, array in self._cells.items()}, "shift": np.array(self._shift, np.int64)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned; `max_scores` stays this one's own."""
        self._cells = {name: np.array(state[name], dtype) for name, dtype in _CELL_DTYPES.items()}
        self._raw, self._raw_size = [], 0
        self._shift = int(state["shift"])
