"""How unlike the videos of a feed are: the numba kernels of greedy DPP and of MMR.

In: a vector of each candidate, its relevance, and the rows picked so far. Out: what a candidate would add to the feed.

A candidate meets the feed only when it competes, so a feed costs as many products of vectors as there were candidates in
the race, times picks, whatever the size of the pool.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

NONE, DPP, MMR = 0, 1, 2
KINDS = {"none": NONE, "dpp": DPP, "mmr": MMR}

_FLOOR = 1e-6
"""Least squared distance from the span of the feed: a copy of a video in it is bad, not impossible, and logs stay finite."""


class Diversity(NamedTuple):
    """What is known of each candidate's likeness to the feed. K candidates, feed of at most N."""

    kind: int
    """NONE, DPP or MMR."""
    weight: float
    """From 0, relevance alone, to 1, diversity alone."""
    vectors: np.ndarray
    """float32 [K, D]."""
    norms: np.ndarray
    """float32 [K], the lengths of the vectors; 0: no usable vector, its similarity to all others is 0."""
    met: np.ndarray
    """int64 [K], with how many of the feed's first videos each was compared."""
    left: np.ndarray
    """float64 [K]. DPP: the squared distance from the span of those. MMR: the greatest similarity to one of those."""
    factors: np.ndarray
    """float64 [K, N] for DPP, the rows of the Cholesky factor of the similarities; [K, 0] for MMR."""


def diversity_of(kind: int, weight: float, vectors: np.ndarray, number: int) -> Diversity:
    """Returns the state of an empty feed of at most `number` videos, for `vectors` float32 [K, D]."""
    size = len(vectors)
    left = np.ones(size) if kind == DPP else np.zeros(size)
    norms = np.zeros(size, np.float32)
    return Diversity(
        kind, weight, vectors, norms, np.zeros(size, np.int64), left, np.zeros((size, number if kind == DPP else 0))
    )


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dot(vectors, i, j):
    total = np.float32(0)
    for d in range(vectors.shape[1]):
        total += vectors[i, d] * vectors[j, d]
    return total


@numba.njit(cache=True, nogil=True)
def measure(diversity, rows):
    """Fills the norms of some rows, int64 [M]; returns how many of them have no usable vector (NaN, inf or length 0)."""
    without = 0
    for row in rows:
        norm = np.sqrt(_dot(diversity.vectors, row, row))
        usable = np.isfinite(norm) and norm > 0
        diversity.norms[row] = norm if usable else np.float32(0)
        without += not usable
    return without


@numba.njit(cache=True, nogil=True)
def meet(diversity, rows, picked, size):
    """Compares candidates with those of the feed that they were not yet compared with.

    DPP: one step of the incremental Cholesky factor a video (Chen, Zhang and Zhou, Fast Greedy MAP Inference for Determinantal
    Point Processes, NeurIPS 2018, algorithm 1).

    Args:
        diversity: The state.
        rows: int64 [M], candidates, none of them in the feed.
        picked: int64 [N], the feed's rows; each met those before it.
        size: How many of them there are.
    """
    vectors, norms, met, left = diversity.vectors, diversity.norms, diversity.met, diversity.left
    factors, is_dpp = diversity.factors, diversity.kind == DPP
    for row in rows:
        for step in range(met[row], size):
            other = picked[step]
            product = norms[row] * norms[other]
            similarity = float(_dot(vectors, row, other)) / product if product > 0 else 0.0
            if not is_dpp:
                left[row] = similarity if step == 0 else max(left[row], similarity)
            elif left[other] > _FLOOR:  # otherwise it lies in the span of those before it and takes nothing from others
                for earlier in range(step):
                    similarity -= factors[row, earlier] * factors[other, earlier]
                factors[row, step] = similarity / np.sqrt(left[other])
                left[row] -= factors[row, step] ** 2
        met[row] = size


@numba.njit(cache=True, nogil=True)
def gains(diversity, rows, relevance):
    """Returns what candidates that met the feed add to it, float64 [M]; `rows` is int64 [M], `relevance` float64 [M].

    DPP: their part of log det L, L = diag(q) S diag(q), S the cosines and q = exp(relevance * (1 - weight) / (2 weight)), times
    the weight: that is (1 - weight) * relevance + weight * log(squared distance), and defined for a weight of 0 too.
    MMR: (1 - weight) * relevance - weight * greatest similarity (Carbonell and Goldstein, SIGIR 1998, lambda = 1 - weight).
    """
    likeness = np.zeros(rows.size)
    if diversity.kind == DPP:
        likeness = -np.log(np.maximum(diversity.left[rows], _FLOOR))
    elif diversity.kind == MMR:
        likeness = diversity.left[rows]
    return (1 - diversity.weight) * relevance - diversity.weight * likeness
