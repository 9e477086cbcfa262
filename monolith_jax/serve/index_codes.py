"""The codes of an index: means of clusters in the metric of the queries, and the choice of a video's cluster.

In: the sums of clusters, vectors. Out: codes that searches scan, clusters of vectors.

A search wants the error of scores small, so what a video v loses by standing behind a mean e is E[(q.v - q.e)^2] =
(v - e)' S (v - e) with S = E[q q'] (the idea of score-aware quantisation, ScaNN, arXiv 1908.10396, with the queries that there
are). With W = S^(1/2) that is the Euclidean distance of the *points* W (v - c) and W (e - c), for any centre c, and a query's
score of a code is that of its point: q.e = q.c + (W^-1 q).W (e - c), of which the first term is the same for all. So codes are
kept as points, and c, the mean of the videos, keeps the range that int8 has to cover small. The best videos of a wide cluster
are further above its mean than those of a narrow one, so a search adds to a code's score a multiple of the deviation that the
cluster's scores have for an average query: the root of the mean of |W e - W v|^2 / D.

The choice of the cluster is that of streaming vector quantisation (arXiv 2501.08695): argmin of |W e - W v|^2 r, where
r = min(s n / mean(n), 1) lets clusters of few videos n look near.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monolith_jax.ids.lines import inner, jit
from monolith_jax.serve.index_kernels import multiply, scan, sort_best
from monolith_jax.serve.int8_blocks import LANES, quantise, write_lane
from monolith_jax.types import Array

NEIGHBOURS = 16
"""Codes that a video may go to: the nearest ones by int8."""

_WIDE = 2.0
"""Deviations above its mean that a cluster is taken for when clusters are ordered."""


class Codes(NamedTuple):
    """The K codes; one without videos is never found."""

    data: Array
    """uint8 [K / 32, G, 32, 4], their points as int8."""
    scales: Array
    """float32 [K / 32, 32]"""
    biases: Array
    """float32 [K / 32, 32], minus half of their points' squared lengths."""
    spreads: Array
    """float32 [K / 32, 32], what a search adds to a code's score, as if the query's point had the length 1."""
    blocks: Array
    """int32 [K / 32]: 0, 1, 2, ..."""
    sums: Array
    """float64 [K, D], of the clusters' vectors, which are float16: as good as exact."""
    squares: Array
    """float64 [K], sums of the squared lengths of the clusters' points."""
    points: Array
    """float32 [K, D]"""
    weights: Array
    """float32 [D, D], W, symmetric."""
    inverse: Array
    """float32 [D, D], W^-1."""
    centre: Array
    """float32 [D], c."""


def aligned(shape: tuple[int, ...], dtype: type, fill: float | None = None) -> np.ndarray:
    """Returns an array whose lines are cache lines (and its huge pages whole ones), not touched without `fill`."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    align = 2**21 if size > 2**22 else 64
    raw = np.empty(size + align, np.uint8)
    start = -raw.ctypes.data % align
    array = raw[start : start + size].view(dtype).reshape(shape)
    if fill is not None:
        array[:] = fill
    return array


def make_codes(num_codes: int, weights: np.ndarray, inverse: np.ndarray, centre: np.ndarray) -> Codes:
    """Returns codes of which none is set; the arrays are those of `Codes`."""
    blocks, dim = num_codes // LANES, centre.size
    return Codes(
        aligned((blocks, -(-dim // 4), LANES, 4), np.uint8, 128),
        aligned((blocks, LANES), np.float32, np.nan),
        aligned((blocks, LANES), np.float32, 0),
        aligned((blocks, LANES), np.float32, 0),
        np.arange(blocks, dtype=np.int32),
        np.zeros((num_codes, dim)),
        np.zeros(num_codes),
        np.zeros((num_codes, dim), np.float32),
        weights,
        inverse,
        centre,
    )


@inner
def to_point(codes, vector, point):
    """Writes the point of a vector float32 [D]."""
    multiply(codes.weights, vector - codes.centre, point)


@inner
def set_code(codes, count, cluster):
    """Makes the code of a cluster of so many videos their mean; one without videos is never found."""
    if count == 0:
        codes.scales[cluster // LANES, cluster % LANES] = np.nan
        return
    mean, point, length = np.empty(codes.centre.size, np.float32), codes.points[cluster], np.float32(0)
    for d in range(mean.size):
        mean[d] = codes.sums[cluster, d] / count
    to_point(codes, mean, point)
    for d in range(mean.size):
        length += point[d] * point[d]
    codes.biases[cluster // LANES, cluster % LANES] = np.float32(-0.5) * length
    variance = max(codes.squares[cluster] / count - length, 0.0) / mean.size
    codes.spreads[cluster // LANES, cluster % LANES] = _WIDE * np.sqrt(variance)
    write_lane(codes.data, codes.scales, cluster // LANES, cluster % LANES, point)


@jit
def set_codes(codes, counts):
    """Makes all codes the means of clusters of so many videos, int32 [K]."""
    for cluster in range(codes.sums.shape[0]):
        set_code(codes, counts[cluster], cluster)


@inner
def room_to_choose(codes):
    """Returns what `choose_code` works in."""
    numbers, point = np.zeros(4 * codes.data.shape[1], np.int8), np.empty(codes.centre.size, np.float32)
    return point, numbers, np.empty(NEIGHBOURS + 2 * LANES, np.float32), np.empty(NEIGHBOURS + 2 * LANES, np.int32)


@inner
def choose_code(vector, codes, counts, mean, crowding, avoid, point, numbers, scores, places):
    """Returns the cluster for a vector float32 [D], -1 where there is no code; never `avoid`."""
    to_point(codes, vector, point)
    scale, start = quantise(point, numbers)
    sizes = (codes.blocks, codes.blocks.size, numbers, scale, start, NEIGHBOURS)
    count = scan(codes.data, codes.scales, codes.biases, *sizes, scores, places)
    sort_best(scores, places, count)
    best, nearest = -1, np.float32(np.inf)
    for i in range(count):
        cluster, distance = places[i], np.float32(0)
        for d in range(point.size):
            apart = point[d] - codes.points[cluster, d]
            distance += apart * apart
        if mean > 0:
            distance *= min(crowding * counts[cluster] / mean, np.float32(1))
        if distance < nearest and cluster != avoid:
            best, nearest = cluster, distance
    return best


@jit
def nearest_codes(vectors, codes, clusters):
    """Writes the nearest code of each of float32 vectors [N, D] to int32 `clusters` [N], crowded or not."""
    room, nobody = room_to_choose(codes), np.zeros(1, np.int32)
    zero, one = np.float32(0), np.float32(1)
    for i in range(vectors.shape[0]):
        clusters[i] = choose_code(vectors[i], codes, nobody, zero, one, -1, *room)
