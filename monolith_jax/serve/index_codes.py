"""The codes of an index that is built at once: spherical k-means on a sample.

In: vectors. Out: directions that are the codes.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.lines import jit
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.serve.index_lists import Codes, nearest_codes, set_codes

_SAMPLE = 64
"""Vectors a code."""
_ROUNDS = 8


@jit
def _sum_up(vectors, clusters, sums, counts):
    """Writes the sums float64 [K, D] and counts int32 [K] of vectors float32 [N, D] by their clusters int32 [N]."""
    sums[:] = 0
    counts[:] = 0
    for i in range(clusters.size):
        if clusters[i] >= 0:
            counts[clusters[i]] += 1
            for d in range(vectors.shape[1]):
                sums[clusters[i], d] += vectors[i, d]


def learned_codes(vectors: np.ndarray, codes: Codes, threads: ShardThreads) -> None:
    """Makes the codes the centres of vectors float32 [N, D], N > 0; the same for the same vectors, whatever the threads."""
    rng, num_codes = np.random.default_rng(0), len(codes.sums)
    sample = vectors
    if len(vectors) > _SAMPLE * num_codes:
        sample = vectors[rng.choice(len(vectors), _SAMPLE * num_codes, replace=False)]
    first = rng.permutation(len(sample))[:num_codes]
    codes.sums[:] = 0
    codes.sums[: first.size] = sample[first]
    set_codes(codes)
    clusters, counts = np.empty(len(sample), np.int32), np.zeros(num_codes, np.int32)
    for _ in range(_ROUNDS):
        threads.run(lambda a, b: nearest_codes(sample[a:b], codes, clusters[a:b]), len(sample))
        _sum_up(sample, clusters, codes.sums, counts)
        _move_idle(sample, clusters, codes, counts, rng)
        set_codes(codes)


def _move_idle(sample: np.ndarray, clusters: np.ndarray, codes: Codes, counts: np.ndarray, rng: np.random.Generator) -> None:
    """Moves codes that hardly anybody is near to videos of the largest clusters."""
    idle = np.flatnonzero(counts < len(sample) / len(counts) / 8)
    crowded = np.argsort(-counts, kind="stable")[: idle.size]
    crowded = crowded[counts[crowded] > 2 * len(sample) / len(counts)]
    if crowded.size:
        by_cluster = np.argsort(clusters, kind="stable")
        ends = counts.cumsum()
        picked = by_cluster[ends[crowded] - 1 - rng.integers(counts[crowded])]
        codes.sums[idle[: crowded.size]] = sample[picked]
