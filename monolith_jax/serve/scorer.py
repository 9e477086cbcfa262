"""Vectors of a request to scores: the towers, compiled for few batch sizes.

In: features of examples and what gives their vectors and weights. Out: scores float32 [B, T], those that training would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from monolith_jax.features import Features
from monolith_jax.models.losses import scores
from monolith_jax.models.towers import Towers, forward

Gather = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], tuple[Sequence[np.ndarray], Any]]
"""Ids and valid, [B, P] of each group, to vectors [B, P, D] of each and the weights that belong to them, of one version."""


class Scorer:
    """The compiled towers."""

    def __init__(self, towers: Towers, batch_sizes: Sequence[int]) -> None:
        """Compiles nothing yet.

        Raises:
            ValueError: No size, or one below 1.
        """
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be one or more sizes of at least 1, got {tuple(batch_sizes)}")
        self.batch_sizes, self.num_heads = tuple(sorted(set(batch_sizes))), len(towers.heads)

        def predict(weights: Any, vectors: Any, valid: Any, list_weights: Any, dense: Any) -> jax.Array:
            return scores(forward(towers, weights, vectors, valid, list_weights, dense), towers.heads)

        self._predict = jax.jit(predict)

    def score(self, features: Features, gather: Gather) -> np.ndarray:
        """Returns the scores of examples, float32 [B, T]: padded to the next size, or in several parts of the largest.

        All are of one version, however many parts there are.
        """
        number = features.dense.shape[0]
        sizes = self._sizes(number)
        padded = _padded(features, sum(sizes))
        valid = [group.valid for group in padded.groups]
        vectors, weights = gather([group.ids for group in padded.groups], valid)
        scored, start = [], 0
        for size in sizes:
            part = slice(start, start + size)
            inputs = jax.tree.map(lambda array, part=part: array[part], (vectors, valid, padded.weights, padded.dense))
            scored.append(self._predict(weights, *inputs))
            start += size
        return np.concatenate([np.asarray(one) for one in scored])[:number]

    def _sizes(self, number: int) -> list[int]:
        """Returns the sizes of the parts of a request of so many examples."""
        largest = self.batch_sizes[-1]
        whole = max(number - 1, 0) // largest
        return [largest] * whole + [next(size for size in self.batch_sizes if size >= number - whole * largest)]

    def warm_up(self, features: Features, gather: Gather) -> None:
        """Compiles the towers for each size, so that no request waits for that.

        Args:
            features: Of no examples.
            gather: As in `score`.
        """
        for size in self.batch_sizes:
            self.score(_padded(features, size), gather)


def _padded(features: Features, size: int) -> Features:
    """Pads as training does: no ids, zeros."""
    missing = size - features.dense.shape[0]
    if not missing:
        return features

    def pad(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])

    groups = tuple(group._replace(ids=pad(group.ids), valid=pad(group.valid)) for group in features.groups)
    weights = tuple(None if of_group is None else pad(of_group) for of_group in features.weights)
    return Features(groups, weights, pad(features.dense))
