"""The lists of an index: which cluster each video is in, and the kernels that change it.

In: vectors by slot. Out: blocks of each cluster, codes that are the means of their clusters. A cluster is a chain of blocks;
only its first one has empty lanes, so a video that leaves is replaced by the one that came last. A code is the exact mean of
its cluster, kept up to date with each change; there is no other training of it. What int8 holds of a video is its vector minus
the centre of the codes: all scores of a query are less by the same, and rounded less.

A cluster that grows too large is split, into a code that nobody has or the one of the smallest cluster, whose videos go to
their next neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monolith_jax.ids.lines import inline, inner, jit
from monolith_jax.serve.index_codes import aligned, choose_code, room_to_choose, set_code, to_point
from monolith_jax.serve.int8_blocks import LANES, float_of_half, write_lane
from monolith_jax.types import Array

SMALLEST = 2 * LANES
"""Videos of a cluster that is never split."""


class Lists(NamedTuple):
    """The videos of K clusters in B blocks."""

    data: Array
    """uint8 [B, G, 32, 4], as `int8_blocks` lays it out."""
    scales: Array
    """float32 [B, 32], NaN: nobody is there."""
    slots: Array
    """int32 [B, 32]"""
    nexts: Array
    """int32 [B], the next block of the cluster, -1: none."""
    owners: Array
    """int32 [B], the cluster."""
    heads: Array
    """int32 [K], the first block, -1: none."""
    counts: Array
    """int32 [K], videos."""
    free: Array
    """int32 [B], the first `num_free[0]` are blocks that nobody uses."""
    num_free: Array
    """int64 [1]"""


class Videos(NamedTuple):
    """What is known of each of S slots."""

    ids: Array
    """int64 [S]"""
    places: Array
    """int32 [S], block * 32 + lane, -1: there is no video."""
    halves: Array
    """uint16 [S, D], bits of float16."""


def make_lists(num_slots: int, num_codes: int, dim: int) -> tuple[Lists, Videos]:
    """Returns empty lists for so many videos. Their blocks always suffice: full ones, and one of each cluster that is not."""
    groups, blocks = -(-dim // 4), -(-num_slots // LANES) + num_codes
    lists = Lists(
        aligned((blocks, groups, LANES, 4), np.uint8),
        aligned((blocks, LANES), np.float32, np.nan),
        aligned((blocks, LANES), np.int32),
        np.full(blocks, -1, np.int32),
        np.full(blocks, -1, np.int32),
        np.full(num_codes, -1, np.int32),
        np.zeros(num_codes, np.int32),
        np.arange(blocks, dtype=np.int32)[::-1].copy(),
        np.array([blocks]),
    )
    videos = Videos(np.empty(num_slots, np.int64), np.full(num_slots, -1, np.int32), aligned((num_slots, dim), np.uint16))
    return lists, videos


@inner
def _follow(lists, codes, cluster):
    """Makes a cluster's code its mean."""
    set_code(codes, lists.counts[cluster], cluster)


@inner
def _add(codes, halves, slot, cluster, sign):
    """Adds the vector of a slot to a cluster's sums, or takes it away."""
    vector, point = np.empty(halves.shape[1], np.float32), np.empty(halves.shape[1], np.float32)
    for d in range(vector.size):
        vector[d] = float_of_half(halves[slot, d])
        codes.sums[cluster, d] += sign * np.float64(vector[d])
    to_point(codes, vector, point)
    for d in range(point.size):
        codes.squares[cluster] += sign * np.float64(point[d]) ** 2


@inner
def _insert(lists, codes, videos, slot, cluster, vector):
    """Puts a video, whose vector [D] is in `videos`, into a cluster."""
    lane = lists.counts[cluster] % LANES
    if lane == 0:
        lists.num_free[0] -= 1
        block = lists.free[lists.num_free[0]]
        lists.nexts[block], lists.owners[block], lists.heads[cluster] = lists.heads[cluster], cluster, block
        lists.scales[block, :] = np.nan
    block = lists.heads[cluster]
    write_lane(lists.data, lists.scales, block, lane, vector - codes.centre)
    lists.slots[block, lane] = slot
    lists.counts[cluster] += 1
    videos.places[slot] = block * LANES + lane
    _add(codes, videos.halves, slot, cluster, 1.0)


@inner
def _take_out(lists, codes, videos, slot):
    """Takes a video out of its cluster, which is returned. The one that came last takes its lane."""
    block, lane = videos.places[slot] // LANES, videos.places[slot] % LANES
    cluster = lists.owners[block]
    _add(codes, videos.halves, slot, cluster, -1.0)
    lists.counts[cluster] -= 1
    last, last_lane = lists.heads[cluster], lists.counts[cluster] % LANES
    moved = lists.slots[last, last_lane]
    for group in range(lists.data.shape[1]):
        for byte in range(4):
            lists.data[block, group, lane, byte] = lists.data[last, group, last_lane, byte]
    lists.scales[block, lane], lists.slots[block, lane] = lists.scales[last, last_lane], moved
    videos.places[moved] = block * LANES + lane
    lists.scales[last, last_lane] = np.nan
    videos.places[slot] = -1
    if last_lane == 0:
        lists.heads[cluster] = lists.nexts[last]
        lists.free[lists.num_free[0]] = last
        lists.num_free[0] += 1
    if lists.counts[cluster] == 0:
        codes.sums[cluster, :], codes.squares[cluster] = 0, 0
    return cluster


@jit
def choose(vectors, swept, lists, codes, videos, crowding, clusters):
    """Writes which cluster each vector should be in; changes nothing.

    Args:
        vectors: float32 [N, D].
        swept: int64 [M], slots of videos that are looked at, too.
        lists: `Lists`.
        codes: `Codes`.
        videos: `Videos`.
        crowding: float32, s.
        clusters: int32 [N + M] out, -1 where there is no code at all, or no video.
    """
    room = room_to_choose(codes)
    total, used, number = 0, 0, vectors.shape[0]
    for cluster in range(lists.counts.size):
        total += lists.counts[cluster]
        used += lists.counts[cluster] > 0
    mean = np.float32(total / max(used, 1))
    for i in range(number):
        clusters[i] = choose_code(vectors[i], codes, lists.counts, mean, crowding, -1, *room)
    vector = np.empty(vectors.shape[1], np.float32)
    for i in range(swept.size):
        clusters[number + i] = -1
        if videos.places[swept[i]] >= 0:
            for d in range(vector.size):
                vector[d] = float_of_half(videos.halves[swept[i], d])
            clusters[number + i] = choose_code(vector, codes, lists.counts, mean, crowding, -1, *room)


@jit
def put(slots, ids, halves, vectors, clusters, lists, codes, videos, follow):
    """Puts videos into clusters, new ones and such as are in another one.

    Args:
        slots: int64 [N], -1: left out.
        ids: int64 [N].
        halves: uint16 [N, D], bits of float16.
        vectors: float32 [N, D], the same numbers.
        clusters: int32 [>= N], -1 where there is no code yet: such a video gets the first one.
        lists: `Lists`.
        codes: `Codes`.
        videos: `Videos`.
        follow: Whether the codes follow at once.
    """
    for i in range(slots.size):
        slot, cluster = slots[i], max(clusters[i], 0)
        if slot < 0:
            continue
        if videos.places[slot] >= 0:
            was = _take_out(lists, codes, videos, slot)
            if follow and was != cluster:
                _follow(lists, codes, was)
        for d in range(vectors.shape[1]):
            videos.halves[slot, d] = halves[i, d]
        videos.ids[slot] = ids[i]
        _insert(lists, codes, videos, slot, cluster, vectors[i])
        if follow:
            _follow(lists, codes, cluster)


@jit
def take_out(slots, lists, codes, videos):
    """Takes the videos of slots int64 [N] out; -1 is left out. Codes follow."""
    for i in range(slots.size):
        if slots[i] >= 0:
            _follow(lists, codes, _take_out(lists, codes, videos, slots[i]))


@jit
def add_up(lists, codes, videos):
    """Adds all videos to the sums of `codes`, which are zeros before, and sets the codes."""
    for slot in range(videos.places.size):
        if videos.places[slot] >= 0:
            _add(codes, videos.halves, slot, lists.owners[videos.places[slot] // LANES], 1.0)
    for cluster in range(lists.counts.size):
        _follow(lists, codes, cluster)


@inner
def _move(slot, cluster, lists, codes, videos, vector):
    """Moves a video to a cluster; codes do not follow."""
    _take_out(lists, codes, videos, slot)
    _insert(lists, codes, videos, slot, cluster, vector)


@jit
def move(slots, clusters, lists, codes, videos):
    """Moves videos that are there to clusters int32 [N], but for -1; codes follow. Returns how many were in another one."""
    vector, moved = np.empty(codes.sums.shape[1], np.float32), 0
    for i in range(slots.size):
        place, cluster = videos.places[slots[i]], clusters[i]
        if place < 0 or cluster < 0:
            continue
        was = lists.owners[place // LANES]
        if was != cluster:
            for d in range(vector.size):
                vector[d] = float_of_half(videos.halves[slots[i], d])
            _move(slots[i], cluster, lists, codes, videos, vector)
            _follow(lists, codes, was)
            _follow(lists, codes, cluster)
            moved += 1
    return moved


@inline
def _members(lists, cluster, slots):
    """Writes the slots of a cluster; returns how many."""
    number, block, lanes = 0, lists.heads[cluster], (lists.counts[cluster] - 1) % LANES + 1
    while block >= 0:
        for lane in range(lanes):
            slots[number] = lists.slots[block, lane]
            number += 1
        block, lanes = lists.nexts[block], LANES
    return number


@inner
def _read(halves, slots, number, vectors):
    """Writes the vectors of the first `number` slots to float32 [N, D]."""
    for i in range(number):
        for d in range(vectors.shape[1]):
            vectors[i, d] = float_of_half(halves[slots[i], d])


@jit
def dissolve(cluster, lists, codes, videos):
    """Moves the videos of a cluster to their next neighbours, whose codes follow; returns whether it is empty now."""
    room = room_to_choose(codes)
    slots = np.empty(lists.counts[cluster], np.int32)
    vectors, zero, one = np.empty((slots.size, codes.sums.shape[1]), np.float32), np.float32(0), np.float32(1)
    _read(videos.halves, slots, _members(lists, cluster, slots), vectors)
    for i in range(slots.size):
        to = choose_code(vectors[i], codes, lists.counts, zero, one, cluster, *room)
        if to >= 0:
            _move(slots[i], to, lists, codes, videos, vectors[i])
            _follow(lists, codes, to)
    _follow(lists, codes, cluster)
    return lists.counts[cluster] == 0


@inner
def _project(vectors, direction, along):
    """Writes the products of float32 vectors [N, D] with a direction [D]."""
    for i in range(along.size):
        along[i] = 0
        for d in range(direction.size):
            along[i] += vectors[i, d] * direction[d]


@jit
def split(cluster, into, lists, codes, videos):
    """Moves half of a cluster to the empty cluster `into`: those nearer to the second of two means, as queries tell them."""
    number, dim = lists.counts[cluster], codes.sums.shape[1]
    slots, along = np.empty(number, np.int32), np.empty(number, np.float32)
    vectors, points = np.empty((number, dim), np.float32), np.empty((number, dim), np.float32)
    _read(videos.halves, slots, _members(lists, cluster, slots), vectors)
    farthest, most = 0, np.float32(-1)
    for i in range(number):
        to_point(codes, vectors[i], points[i])
        points[i] -= codes.points[cluster]
        distance = (points[i] * points[i]).sum()
        if distance > most:
            farthest, most = i, distance
    # The difference of the two means: first, from the mean to the video that is the farthest from it.
    apart, middle = points[farthest].copy(), np.float32(0)
    for _ in range(4):
        _project(points, apart, along)
        middle = np.median(along)  # halves of equal size: balance is what a split is for
        apart[:] = 0
        for i in range(number):
            sign = np.float32(1) if along[i] > middle else np.float32(-1)
            for d in range(dim):
                apart[d] += sign * points[i, d]
    for i in range(number):
        if along[i] > middle:
            _move(slots[i], into, lists, codes, videos, vectors[i])
    _follow(lists, codes, cluster)
    _follow(lists, codes, into)
