"""Several models judged on the same examples.

In: per step what was observed of its examples, and the scores that each model gave. Out: AUC and log-loss of each binary head,
over all steps or some. All scores are held: 4 bytes a head, model and example.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from launch.points.measured import Measured

if TYPE_CHECKING:
    from monolith_jax.models.losses import HeadConfig
    from monolith_jax.reader import Observed

MEAN = "mean"
"""The head of a mean over binary heads."""
BEST = "best"
"""The model that knows the true probabilities, where the source tells them."""


class _Step(NamedTuple):
    """Of one step: float32 [B, T] each, labels NaN where masked."""

    labels: np.ndarray
    scores: dict[str, np.ndarray]


class Judged:
    """Scores of several models, in the order of the stream."""

    def __init__(self, heads: Sequence[HeadConfig]) -> None:
        """Starts with no examples.

        Args:
            heads: In the order of the columns. Only binary ones are judged.
        """
        self.heads = {head.label: column for column, head in enumerate(heads) if head.kind == "binary"}
        """Their columns."""
        self._steps: list[_Step] = []

    def add(self, seen: Observed, scores: Mapping[str, np.ndarray]) -> None:
        """Takes a step.

        Args:
            seen: Its examples.
            scores: float32 [B, T] of each model, the same models at every step.
        """
        labels = np.where(np.asarray(seen.masks) == 0, np.float32(np.nan), seen.labels)
        best = {} if seen.optimal is None else {BEST: seen.optimal}
        self._steps.append(_Step(labels, {**scores, **best}))

    def __len__(self) -> int:
        """Returns the number of steps."""
        return len(self._steps)

    @property
    def models(self) -> tuple[str, ...]:
        """Their names, `BEST` among them where it is known."""
        return tuple(self._steps[0].scores) if self._steps else ()

    def auc(self, model: str, steps: Sequence[int] | None = None) -> dict[str, float]:
        """Returns the AUC of each binary head over some steps, None: all; NaN where one class is missing."""
        from monolith_jax.evaluate import metrics

        return {head: metrics.auc(*pair) for head, pair in self._pairs(model, steps).items()}

    def log_loss(self, model: str, steps: Sequence[int] | None = None) -> dict[str, float]:
        """Returns the log-loss of each binary head over some steps, None: all; NaN without examples."""
        from monolith_jax.evaluate import metrics

        return {head: metrics.log_loss(*pair) for head, pair in self._pairs(model, steps).items()}

    def _pairs(self, model: str, steps: Sequence[int] | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        chosen = self._steps if steps is None else [self._steps[step] for step in steps]
        labels = np.concatenate([step.labels for step in chosen])
        scores = np.concatenate([step.scores[model] for step in chosen])
        there = ~np.isnan(labels)
        return {
            head: (scores[there[:, column], column], labels[there[:, column], column]) for head, column in self.heads.items()
        }


def mean_of(values: Mapping[str, float]) -> float:
    """Returns the mean of the values that are defined; NaN where none is."""
    there = [value for value in values.values() if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def with_mean(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the values of heads, and under `MEAN` their mean."""
    return {**values, MEAN: mean_of(values)}


def less(values: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    """Returns by head how far values are above others."""
    return {head: value - others[head] for head, value in values.items()}


def of_heads(metric: str, values: Mapping[str, float]) -> Iterator[Measured]:
    """Yields a metric of each head, and its mean."""
    yield from (Measured(metric, value, head) for head, value in with_mean(values).items())
