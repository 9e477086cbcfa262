"""The numba kernels that search an index: the best codes of a query, the best lanes of their clusters, exact scores of those.

In: queries, and the arrays of `index_lists`. Out: slots and scores. The GIL is released.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.lines import inline, inner, jit, prefetch
from monolith_jax.serve.int8_blocks import LANES, first_bit, float_of_half, quantise, score_block

_AHEAD = 2
"""Blocks ahead that are asked for: a block takes about as long to score as a line to come."""


@inner
def keep_best(scores, places, count, most):
    """Moves the `most` best of `count` to the front, the worst of them last (quickselect, Hoare 1961)."""
    low, high, wanted = 0, count - 1, most - 1
    while low < high:
        a, b, c = scores[low], scores[(low + high) >> 1], scores[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while scores[i] > pivot:
                i += 1
            while scores[j] < pivot:
                j -= 1
            if i <= j:
                scores[i], scores[j] = scores[j], scores[i]
                places[i], places[j] = places[j], places[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break


@inner
def sort_best(scores, places, count):
    """Sorts the first `count`, best first; of equal scores the lower place first (shell sort, gaps of Ciura 2001)."""
    for gap in (1750, 701, 301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, count):
            score, place, j = scores[i], places[i], i
            while j >= gap and (scores[j - gap] < score or (scores[j - gap] == score and places[j - gap] > place)):
                scores[j], places[j] = scores[j - gap], places[j - gap]
                j -= gap
            scores[j], places[j] = score, place


@inner
def scan(data, scales, biases, blocks, num_blocks, numbers, scale, start, most, scores, places):
    """Scores blocks, and keeps the best lanes.

    Args:
        data: uint8 [B, G, 32, 4].
        scales: float32 [B, 32].
        biases: float32 [B, 32] that are added to scores, or [1, 32], the same for all blocks.
        blocks: int32 [>= num_blocks].
        num_blocks: How many of them to score.
        numbers: int8 [4 G], the query; `scale` and `start` of it as `quantise` returns them.
        scale: See above.
        start: See above.
        most: How many lanes to keep.
        scores: float32 [C] out, C >= most + 32, in no order.
        places: int32 [C] out, block * 32 + lane.

    Returns:
        How many there are, at most `most`.
    """
    out = np.empty(LANES, np.float32)
    groups, width, room = data.shape[1], data.shape[1] * LANES * 4, scores.size - LANES
    at_data, at_scales = np.int64(data.ctypes.data), np.int64(scales.ctypes.data)
    at_numbers, at_out = np.int64(numbers.ctypes.data), np.int64(out.ctypes.data)
    at_biases, bias_step = np.int64(biases.ctypes.data), np.int64(4 * LANES if biases.shape[0] == data.shape[0] else 0)
    count, threshold = 0, np.float32(-np.inf)
    for b in range(num_blocks):
        ahead = np.int64(blocks[min(b + _AHEAD, num_blocks - 1)])
        for byte in range(0, width, 64):
            prefetch(at_data + ahead * width + byte)
        prefetch(at_scales + ahead * 4 * LANES)
        prefetch(at_scales + ahead * 4 * LANES + 64)
        block = np.int64(blocks[b])
        of_block = at_scales + block * 4 * LANES
        with_bias = at_biases + block * bias_step
        mask = score_block(at_data + block * width, at_numbers, groups, start, scale, of_block, with_bias, threshold, at_out)
        while mask != 0:
            lane = first_bit(mask)
            mask &= mask - 1
            scores[count], places[count] = out[lane], block * LANES + lane
            count += 1
        if count > room:
            keep_best(scores, places, count, most)
            count, threshold = most, scores[0]
            for i in range(1, most):
                threshold = min(threshold, scores[i])
    if count > most:
        keep_best(scores, places, count, most)
        count = most
    return count


@inner
def multiply(matrix, vector, out):
    """Writes the product of a symmetric float32 matrix [D, D] and a vector [D]."""
    out[:] = 0
    for d in range(vector.size):
        for e in range(out.size):
            out[e] += matrix[d, e] * vector[d]


@inline
def _length(vector):
    total = np.float32(0)
    for d in range(vector.size):
        total += vector[d] * vector[d]
    return np.sqrt(total)


@inline
def _list_blocks(lists, clusters, num_clusters, budget, blocks):
    """Writes the blocks of clusters, until they hold `budget` videos or `blocks` is full; returns how many."""
    number, videos = 0, 0
    for c in range(num_clusters):
        block = lists.heads[clusters[c]]
        while block >= 0 and number < blocks.size:
            blocks[number] = block
            number += 1
            block = lists.nexts[block]
        videos += lists.counts[clusters[c]]
        if videos >= budget:
            break
    return number


@jit(no_cpython_wrapper=True, fastmath={"reassoc", "contract", "nsz"})
def _dot(halves, slot, query):
    total = np.float32(0)  # without leave to reorder the sum, it would not be vectorised
    for d in range(query.size):
        total += float_of_half(halves[slot, d]) * query[d]
    return total


@inner
def _exact(lists, videos, query, places, count, scores):
    """Turns places into slots, and scores into inner products with the float16 vectors."""
    at_halves, width = np.int64(videos.halves.ctypes.data), videos.halves.shape[1] * 2
    for i in range(count):
        slot = lists.slots[places[i] // LANES, places[i] % LANES]
        places[i] = slot
        for byte in range(0, width, 64):
            prefetch(at_halves + slot * width + byte)
    for i in range(count):
        scores[i] = _dot(videos.halves, np.int64(places[i]), query)


@jit
def search(queries, codes, lists, videos, num_clusters, budget, num_exact, ids, scores):
    """Searches for queries float32 [Q, D].

    Args:
        queries: See above.
        codes: `Codes`.
        lists: `Lists`.
        videos: `Videos`.
        num_clusters: The most clusters to look at, at least 1.
        budget: No further cluster is looked at once so many videos were.
        num_exact: How many of the best are scored exactly, >= k.
        ids: int64 [Q, k] out.
        scores: float32 [Q, k] out, -inf where there are fewer; best first.
    """
    k, groups = ids.shape[1], lists.data.shape[1]
    turned, no_biases = np.empty(queries.shape[1], np.float32), np.zeros((1, LANES), np.float32)
    numbers = np.zeros(4 * groups, np.int8)
    room = 2 * max(num_clusters, num_exact) + 2 * LANES
    found, places = np.empty(room, np.float32), np.empty(room, np.int32)
    blocks = np.empty(min(lists.nexts.size, budget // LANES + lists.counts.max() // LANES + num_clusters + 2), np.int32)
    # Before the room is full all lanes are kept: the first threshold should come soon.
    room_codes, room_videos = 2 * num_clusters + 2 * LANES, 2 * num_exact + 2 * LANES
    for q in range(queries.shape[0]):
        query = queries[q]
        multiply(codes.inverse, query, turned)
        scale, start = quantise(turned, numbers)
        scale /= max(_length(turned), np.float32(1e-30))
        sizes = (codes.blocks, codes.blocks.size, numbers, scale, start, num_clusters)
        count = scan(codes.data, codes.scales, codes.spreads, *sizes, found[:room_codes], places[:room_codes])
        sort_best(found, places, count)
        num_blocks = _list_blocks(lists, places, count, budget, blocks)
        scale, start = quantise(query, numbers)
        sizes = (blocks, num_blocks, numbers, scale, start, num_exact)
        count = scan(lists.data, lists.scales, no_biases, *sizes, found[:room_videos], places[:room_videos])
        _exact(lists, videos, query, places, count, found)
        if count > k:
            keep_best(found, places, count, k)
            count = k
        sort_best(found, places, count)
        for i in range(k):
            ids[q, i] = videos.ids[places[i]] if i < count else 0
            scores[q, i] = found[i] if i < count else -np.inf


@jit
def read_vectors(halves, slots, out):
    """Writes the float16 vectors of slots int64 [N], as bits in uint16 [S, D], to float32 `out` [N, D]; zeros for -1."""
    for i in range(slots.size):
        for d in range(out.shape[1]):
            out[i, d] = float_of_half(halves[slots[i], d]) if slots[i] >= 0 else np.float32(0)
