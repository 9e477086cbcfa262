"""The kernels behind snapshots of the id maps: checksums, whether maps are sound, and ids put into maps of another size.

In: the arrays of `lines`. Out: sums, verdicts, filled maps.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.kernels import QUEUE, make_room, place_for, start_of, write_slot
from monolith_jax.ids.lines import SLOTS, first_bucket, jit, mix, second_bucket, shard_of, slot_of

_ODD = np.uint64(0x9E3779B97F4A7C15)


@jit
def checksum(words, seeds, sums):
    """Writes a checksum of the lines of each shard, uint64 [L, words], and of the tables' seeds, into uint64 `sums` [L]."""
    start = np.uint64(0)
    for seed in seeds:
        start = mix(start ^ seed)
    for shard in range(words.shape[0]):
        h = start
        for k in range(words.shape[1]):
            h = (h ^ words[shard, k]) * _ODD
            h ^= h >> np.uint64(32)
        sums[shard] = h


@jit
def is_sound(tables, maps):
    """Returns whether every id stands once, where it is looked for, with a used row of its own, and all are counted."""
    keys, meta = maps.lines.view(np.uint64), maps.lines.view(np.int32)
    num_shards, num_tables = maps.counts.shape
    address = np.int64(maps.lines.ctypes.data)
    unclaimed = maps.used.copy()
    for shard in range(num_shards):
        for table in range(num_tables):
            start, buckets, number = shard * tables.lines_per_shard + tables.bucket_offsets[table], tables.num_buckets[table], 0
            for place in range(buckets * SLOTS):
                bucket, slot = place // SLOTS, place % SLOTS
                row = np.int64(meta[start + bucket, 8 + slot])
                if row < 0:
                    continue
                h = keys[start + bucket, slot]
                first, second = first_bucket(h, buckets), second_bucket(h, buckets)
                if row >= tables.caps[table] or shard_of(h, tables) != shard or bucket not in (first, second):
                    return False
                if slot_of(address + 64 * (start + bucket), h) != slot:
                    return False
                if bucket == second and first != second and slot_of(address + 64 * (start + first), h) < SLOTS:
                    return False
                word, bit = tables.word_offsets[table] + row // 32, np.uint32(1) << np.uint32(row % 32)
                if not unclaimed[shard, word] & bit:
                    return False
                unclaimed[shard, word] ^= bit
                number += 1
            if number != maps.counts[shard, table]:
                return False
    return not unclaimed.any()


@jit
def place(tables, maps, table, hashes, rows, seen_s):
    """Puts distinct hashes of one table into empty maps with the rows that they have already.

    Args:
        tables, maps: Sizes and maps, without these ids.
        table: Index of the table.
        hashes: uint64 [N].
        rows: int32 [N], distinct within a shard and below the cap.
        seen_s: uint32 [N].

    Returns:
        Whether all found a place. If not, the maps are half filled.
    """
    keys, meta = maps.lines.view(np.uint64), maps.lines.view(np.int32)
    buckets = tables.num_buckets[table]
    queue = np.empty((QUEUE, 3), np.int64)
    for i in range(hashes.size):
        h = hashes[i]
        shard, start = shard_of(h, tables), start_of(tables, table, h)
        found = place_for(meta, start, buckets, h)
        if found < 0:
            found = make_room(keys, meta, start, buckets, h, queue)
        if found < 0:
            return False
        write_slot(keys, meta, found, h, rows[i], seen_s[i])
        maps.used[shard, tables.word_offsets[table] + rows[i] // 32] |= np.uint32(1) << np.uint32(rows[i] % 32)
        maps.counts[shard, table] += 1
    return True
