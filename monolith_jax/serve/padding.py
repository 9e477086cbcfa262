"""Requests of any size to the few that are compiled: padded to the next one, or cut into parts of the largest.

In: features of examples. Out: features of as many as a size says; what was added has no ids and zeros, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monolith_jax.features import FeatureLayout, Features
from monolith_jax.types import GroupIds


def checked_sizes(sizes: Sequence[int], name: str) -> tuple[int, ...]:
    """Returns sizes ascending.

    Raises:
        ValueError: No size, or one below 1.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name} must be one or more sizes of at least 1, got {tuple(sizes)}")
    return tuple(sorted(set(sizes)))


def part_sizes(number: int, sizes: Sequence[int]) -> list[int]:
    """Returns the sizes of the parts of a request of so many examples; one where there are none."""
    largest = sizes[-1]
    whole = max(number - 1, 0) // largest
    return [largest] * whole + [next(size for size in sizes if size >= number - whole * largest)]


def padded(features: Features, size: int) -> Features:
    """Pads as training does: no ids, zeros."""
    missing = size - features.dense.shape[0]
    if not missing:
        return features

    def pad(array: np.ndarray) -> np.ndarray:
        out = np.zeros((size, *array.shape[1:]), array.dtype)
        out[: array.shape[0]] = array
        return out

    groups = tuple(GroupIds(pad(group.ids), pad(group.valid)) for group in features.groups)
    weights = tuple(None if of_group is None else pad(of_group) for of_group in features.weights)
    return Features(groups, weights, pad(features.dense))


def no_features(layout: FeatureLayout, size: int) -> Features:
    """Returns features of examples of which nothing is known."""
    shapes = [(size, layout.num_positions(group)) for group in range(len(layout.groups))]
    groups = tuple(GroupIds(np.zeros(shape, np.int64), np.zeros(shape, np.bool_)) for shape in shapes)
    weights = tuple(
        np.ones(shape, np.float32) if any(slot.weighted for slot in slots) else None
        for shape, slots in zip(shapes, layout.groups, strict=True)
    )
    return Features(groups, weights, np.zeros((size, layout.num_dense), np.float32))
