"""What an index learns when it is built at once: the metric of the queries, the codes (k-means), the budget of a search.

In: vectors, a sample of queries. Out: `Codes`, and how many videos a search must look at for a stated recall.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from monolith_jax.ids.lines import jit
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.serve.exact import exact_top_k
from monolith_jax.serve.index_codes import Codes, nearest_codes, set_codes

_SAMPLE = 64
"""Vectors a code."""
_ROUNDS = 8
_RIDGE = 0.01
"""Of the mean of S' diagonal, added to it: also what no query of the sample asks for counts a little."""
_JUDGED = 256
"""Queries that the budget is found with, at most a half of them: S is learned from the others."""
_FOUND = 100
"""Videos of each that should be found."""
_STEP = 1.15
_LEAST = 2048
"""Videos that are always looked at: so few cost nothing beside the codes, and a drift is borne longer."""


def checked_queries(queries: np.ndarray | None, dim: int) -> np.ndarray:
    """Returns queries [Q, D] as float32 of length 1, without those of length zero; none is Q = 0.

    Raises:
        ValueError: One is not finite or of another length.
    """
    queries = np.zeros((0, dim), np.float32) if queries is None else np.asarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != dim or not np.isfinite(queries).all():
        raise ValueError(f"the sample of queries must be finite float32 [Q, {dim}], got {queries.dtype} {queries.shape}")
    length = np.linalg.norm(queries, axis=1, keepdims=True)
    some = length[:, 0] > 0
    return queries[some] / length[some]


def halves_of(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the queries to learn S from, and others to judge by."""
    if len(queries) < 2:
        return queries, queries[:0]
    judged = np.linspace(0, len(queries) - 1, min(_JUDGED, len(queries) // 2)).astype(np.int64)
    return np.delete(queries, judged, 0), queries[judged]


def metric(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns W = S^(1/2) and W^-1, float32 [D, D], of queries float32 [Q, D] of length 1; the identity for Q = 0."""
    dim = queries.shape[1]
    if not len(queries):
        return np.eye(dim, dtype=np.float32), np.eye(dim, dtype=np.float32)
    exact = queries.astype(np.float64)
    moment = exact.T @ exact * (dim / len(queries))  # its diagonal's mean is 1
    # What few queries say is taken with as much reserve.
    values, directions = np.linalg.eigh(moment + (_RIDGE + 1 / len(queries)) * np.eye(dim))
    root = np.sqrt(values)
    return ((directions * root) @ directions.T).astype(np.float32), ((directions / root) @ directions.T).astype(np.float32)


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


def learn_codes(vectors: np.ndarray, codes: Codes, threads: ShardThreads) -> None:
    """Makes the codes the centres of vectors float32 [N, D], N > 0; the same for the same vectors, whatever the threads."""
    rng, num_codes = np.random.default_rng(0), len(codes.sums)
    sample = vectors
    if len(vectors) > _SAMPLE * num_codes:
        sample = vectors[rng.choice(len(vectors), _SAMPLE * num_codes, replace=False)]
    codes.centre[:] = sample.mean(0, dtype=np.float64)
    first = rng.permutation(len(sample))[:num_codes]
    clusters, counts = np.empty(len(sample), np.int32), np.zeros(num_codes, np.int32)
    codes.sums[:] = 0
    codes.sums[: first.size], counts[: first.size] = sample[first], 1
    set_codes(codes, counts)
    for _ in range(_ROUNDS):
        threads.run(lambda a, b: nearest_codes(sample[a:b], codes, clusters[a:b]), len(sample))
        _sum_up(sample, clusters, codes.sums, counts)
        _move_idle(sample, clusters, codes, counts, rng)
        set_codes(codes, counts)


def _move_idle(sample: np.ndarray, clusters: np.ndarray, codes: Codes, counts: np.ndarray, rng: np.random.Generator) -> None:
    """Moves codes that hardly anybody is near to videos of the largest clusters."""
    idle = np.flatnonzero(counts < len(sample) / len(counts) / 8)
    crowded = np.argsort(-counts, kind="stable")[: idle.size]
    crowded = crowded[counts[crowded] > 2 * len(sample) / len(counts)]
    if crowded.size:
        by_cluster = np.argsort(clusters, kind="stable")
        ends = counts.cumsum()
        picked = by_cluster[ends[crowded] - 1 - rng.integers(counts[crowded])]
        codes.sums[idle[: crowded.size]], counts[idle[: crowded.size]] = sample[picked], 1


def budget_for(
    wanted: float, vectors: np.ndarray, queries: np.ndarray, search: Callable[[np.ndarray, int, int], np.ndarray]
) -> tuple[int, float]:
    """Returns how many videos a search must look at for a recall, and the recall then; all of them if nothing less does.

    Args:
        wanted: Of the best 100.
        vectors: float32 [N, D], all videos.
        queries: float32 [Q, D].
        search: From queries, k and a budget to scores [Q, k].
    """
    k = min(_FOUND, len(vectors))
    # A video is one of the best if its score is that of the last one or more; the sums may differ by rounding.
    least = exact_top_k(vectors, queries, k)[1][:, -1:] - np.float32(1e-6)
    steps = int(np.ceil(np.log(max(len(vectors) / _LEAST, 1)) / np.log(_STEP)))
    budgets = [min(int(_LEAST * _STEP**step), len(vectors)) for step in range(steps + 1)]

    def recall(place: int) -> float:
        return float((search(queries, k, budgets[place]) >= least).mean())

    low, high = 0, steps
    while low < high:
        middle = (low + high) // 2
        if recall(middle) >= wanted:
            high = middle
        else:
            low = middle + 1
    return budgets[low], recall(low)
