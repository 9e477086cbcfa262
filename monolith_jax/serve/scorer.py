"""Vectors of a request to scores: the towers, compiled for few batch sizes.

In: features of examples and what gives their vectors and weights. Out: scores float32 [B, T], those that training would give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from monolith_jax.features import Features
from monolith_jax.models.losses import scores
from monolith_jax.models.towers import Towers, forward
from monolith_jax.serve.padding import checked_sizes, no_features, padded, part_sizes
from monolith_jax.types import GroupIds

Gather = Callable[[Sequence[GroupIds]], tuple[Sequence[np.ndarray], Any]]
"""Ids of each group, [B, P], to vectors [B, P, D] of each and the weights that belong to them, of one version."""


@functools.partial(jax.jit, static_argnums=0)
def _predict(towers: Towers, weights: Any, vectors: Any, valid: Any, list_weights: Any, dense: Any) -> jax.Array:
    return scores(forward(towers, weights, vectors, valid, list_weights, dense), towers.heads)


class Scorer:
    """The compiled towers."""

    def __init__(self, towers: Towers, batch_sizes: Sequence[int]) -> None:
        """Compiles nothing yet.

        Raises:
            ValueError: No size, or one below 1.
        """
        self.batch_sizes = checked_sizes(batch_sizes, "batch_sizes")
        self._towers, self._layout = towers, towers.layout

    def score(self, features: Features, gather: Gather) -> np.ndarray:
        """Returns the scores of examples, float32 [B, T]: padded to the next size, or in several parts of the largest.

        All are of one version, however many parts there are.
        """
        number = features.dense.shape[0]
        sizes = part_sizes(number, self.batch_sizes)
        whole = padded(features, sum(sizes))
        valid = [group.valid for group in whole.groups]
        vectors, weights = gather(whole.groups)
        scored, start = [], 0
        for size in sizes:
            part = slice(start, start + size)
            inputs = jax.tree.map(lambda array, part=part: array[part], (vectors, valid, whole.weights, whole.dense))
            scored.append(_predict(self._towers, weights, *inputs))
            start += size
        return np.concatenate([np.asarray(one) for one in scored])[:number]

    def warm_up(self, gather: Gather) -> None:
        """Compiles the towers for each size, so that no request waits for that."""
        for size in self.batch_sizes:
            self.score(no_features(self._layout, size), gather)
