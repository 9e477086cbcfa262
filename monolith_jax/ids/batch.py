"""The ids of a batch to distinct ids by shard: the numba kernels of the first stage of a plan.

In: ids [B, P]. Out: occurrences grouped by shard (in the order of their positions), and within each shard the distinct ids in
order of first appearance with count and latest event time. A shard's part fits into the cache, and parts need no locks.
Neither depends on how the work is divided among threads.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.lines import jit, mix, prefetch

_AHEAD = 12
"""Occurrences ahead whose place in the scratch is asked for: it does not fit into the first-level cache."""


@jit
def count_occurrences(ids, valid, position_tables, seeds, shard_shift, first, last, counts):
    """Counts the ids of examples `first` to `last` by shard.

    Args:
        ids: uint64 [B, P].
        valid: bool [B, P], whether the position holds an id.
        position_tables: int32 [P], the table of each position's ids.
        seeds: uint64 [T].
        shard_shift: 64 - log2 L, uint64.
        first, last: Range of examples.
        counts: int64 [L] out, zeroed by the caller.
    """
    num_positions = ids.shape[1]
    of_row, position_seeds = np.empty(num_positions, np.int64), seeds[position_tables]
    for b in range(first, last):
        for p in range(num_positions):  # a loop of its own, which the compiler vectorizes
            of_row[p] = np.int64(mix(ids[b, p] ^ position_seeds[p]) >> shard_shift)
        for p in range(num_positions):
            counts[of_row[p]] += valid[b, p]


@jit
def group_by_shard(ids, valid, position_tables, seeds, shard_shift, first, last, places, hashes, positions):
    """Writes hash and position of each id of examples `first` to `last` to its shard's part.

    Args:
        ids, valid, position_tables, seeds, shard_shift, first, last: As in `count_occurrences`.
        places: int64 [L], where these examples' occurrences start in each shard's part; advanced.
        hashes, positions: uint64 and int32 [B P] out; a position is b P + p.
    """
    num_positions = ids.shape[1]
    of_row, position_seeds = np.empty(num_positions, np.uint64), seeds[position_tables]
    for b in range(first, last):
        for p in range(num_positions):
            of_row[p] = mix(ids[b, p] ^ position_seeds[p])
        for p in range(num_positions):
            if valid[b, p]:
                shard = np.int64(of_row[p] >> shard_shift)
                k = places[shard]
                places[shard] = k + 1
                hashes[k] = of_row[p]
                positions[k] = b * num_positions + p


@jit
def dedup(ends, hashes, positions, position_tables, seen_s, from_shard, to_shard, scratch, distinct, inverse):
    """Finds the distinct ids of each shard.

    Args:
        ends: int64 [L], where each shard's part of the occurrences ends; they start at `distinct.starts`.
        hashes, positions: As from `group_by_shard`.
        position_tables: int32 [P].
        seen_s: uint32 [B], event times in seconds.
        from_shard, to_shard: Range of shards.
        scratch: int32 [M], M a power of two of at least twice the largest part.
        distinct: `Distinct` out, but for rows and fresh.
        inverse: int32 [B P] out: for each occurrence, the index of its distinct id within the shard.
    """
    starts, out_hashes, out_tables = distinct.starts, distinct.hashes, distinct.tables
    counts, out_seen_s = distinct.counts, distinct.seen_s
    num_positions = position_tables.size
    per_position = 1.0 / num_positions
    address = np.int64(scratch.ctypes.data)
    for shard in range(from_shard, to_shard):
        start, end = starts[shard], ends[shard]
        size = 16
        while size < 2 * (end - start):
            size *= 2
        for place in range(size):
            scratch[place] = -1
        for k in range(start, end):
            counts[k] = 0
            out_seen_s[k] = 0
        mask = np.uint64(size - 1)
        number = 0
        for k in range(start, end):
            h = hashes[k]
            prefetch(address + 4 * np.int64(hashes[min(k + _AHEAD, end - 1)] & mask))
            # Exact for all int32, and no division: half a unit is far more than the rounding of a float64.
            b = np.int64((positions[k] + 0.5) * per_position)
            table = position_tables[positions[k] - b * num_positions]
            place = np.int64(h & mask)
            found = np.int64(scratch[place])
            while found >= 0 and (out_hashes[start + found] != h or out_tables[start + found] != table):
                place = np.int64(np.uint64(place + 1) & mask)
                found = np.int64(scratch[place])
            if found < 0:
                found = number
                number += 1
                scratch[place] = found
                out_hashes[start + found], out_tables[start + found] = h, table
            counts[start + found] += 1
            out_seen_s[start + found] = max(out_seen_s[start + found], seen_s[b])
            inverse[k] = found
        distinct.numbers[shard] = number
