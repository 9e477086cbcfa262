"""Users and videos to the vectors of the two-tower, by what is served.

In: features of users or of videos. Out: float32 [B, D], of length 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from monolith_jax.features import FeatureLayout, Features, restricted
from monolith_jax.models.towers import RETRIEVAL, Towers, user_vectors, video_vectors
from monolith_jax.serve.padding import checked_sizes, no_features, padded
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.types import GroupIds


class Encoder:
    """The compiled two-tower of a served model. Any number of threads may call it."""

    def __init__(
        self, model: ServedModel, user_sizes: Sequence[int] = (1, 64), video_sizes: Sequence[int] = (64, 1024)
    ) -> None:
        """Compiles both towers for each size.

        Args:
            model: The served model, with a two-tower.
            user_sizes: Numbers of users that calls are padded to; more are done in blocks of the largest.
            video_sizes: The same of videos.

        Raises:
            ValueError: The model has no two-tower, or the sizes are none.
        """
        config = model.towers.two_tower
        if config is None:
            raise ValueError("this model has no two-tower; set Experiment.retrieval, train with it, and give it as `two_tower`")
        self._model, self.dim = model, config.dim
        self.user_layout = restricted(model.layout, config.user_features)
        self.video_layout = restricted(model.layout, config.video_features)
        self._of_users = _Side(model, self.user_layout, user_vectors, checked_sizes(user_sizes, "user_sizes"))
        self._of_videos = _Side(model, self.video_layout, video_vectors, checked_sizes(video_sizes, "video_sizes"))

    def users(self, features: Features) -> np.ndarray:
        """Returns the vectors of users, float32 [B, D]; `features` are of `user_layout`. A block is of one version."""
        return self._of_users(features)

    def videos(self, features: Features) -> np.ndarray:
        """Returns the vectors of videos, float32 [B, D]; `features` are of `video_layout`. A block is of one version."""
        return self._of_videos(features)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(vectors: Callable[..., jax.Array], towers: Towers, layout: FeatureLayout, weights: Any, *inputs: Any) -> jax.Array:
    return vectors(towers, weights, layout, *inputs)


class _Side:
    def __init__(
        self, model: ServedModel, layout: FeatureLayout, vectors: Callable[..., jax.Array], sizes: Sequence[int]
    ) -> None:
        config = model.towers.two_tower
        assert config is not None
        self._model, self._sizes, self._dim = model, sizes, config.dim
        self._tables = model.position_tables(layout)
        self._vectors, self._towers, self._layout = vectors, model.towers, layout
        for size in sizes:
            self(no_features(layout, size))

    def __call__(self, features: Features) -> np.ndarray:
        number = features.dense.shape[0]
        out = np.empty((number, self._dim), np.float32)
        for start in range(0, number, self._sizes[-1]):
            rows = min(number - start, self._sizes[-1])
            size = next(size for size in self._sizes if size >= rows)
            block = padded(_rows(features, slice(start, start + rows)), size)
            (vectors,), weights = self._model.gather([(block.groups, self._tables)])
            valid = tuple(group.valid for group in block.groups)
            of_two_tower = {RETRIEVAL: weights[RETRIEVAL]}
            inputs = tuple(vectors), valid, block.weights, block.dense
            encoded = _encode(self._vectors, self._towers, self._layout, of_two_tower, *inputs)
            out[start : start + rows] = np.asarray(encoded)[:rows]
        return out


def _rows(features: Features, where: slice) -> Features:
    groups = tuple(GroupIds(ids[where], valid[where]) for ids, valid in features.groups)
    weights = tuple(None if of_group is None else of_group[where] for of_group in features.weights)
    return Features(groups, weights, features.dense[where])
