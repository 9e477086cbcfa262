"""The numba kernels of the id maps: functions over the arrays of `lines`, each shard written by one thread at a time.

In: ids or their hashes. Out: rows in shards. The GIL is released.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.lines import (
    ABSENT,
    SLOTS,
    first_bucket,
    inline,
    jit,
    load,
    mix,
    prefetch,
    second_bucket,
    slot_of,
    store,
    unmix,
)

QUEUE = 256
"""Buckets that the search for a free slot visits before an insertion is given up."""

_ODD = np.uint64(0x9E3779B97F4A7C15)
_WAITING = 32
"""New ids whose lines are asked for before the first of them is inserted."""
_AHEAD = 96
"""Ids of a block. The lines of a block are asked for while the block before is worked on."""


@jit
def lookup(ids, table, tables, lines, shards, rows):
    """Writes shard and row of uint64 `ids` [N] of one table into int32 `shards` and `rows` [N]; row ABSENT: the id has none.

    Blocks of ids go through three steps, one block apart, so that no id waits for memory: hash, and ask for the line of the
    first bucket; look there, and ask for the second line of those that are not there; look there.
    """
    seed, buckets, offset = tables.seeds[table], tables.num_buckets[table], tables.bucket_offsets[table]
    shift, per_shard = tables.shard_shift, tables.lines_per_shard
    address, number = np.int64(lines.ctypes.data), ids.size
    hashes = np.empty((3, _AHEAD), np.uint64)
    lines_1 = np.empty((3, _AHEAD), np.int64)
    lines_2 = np.empty((3, _AHEAD), np.int64)
    missing = np.empty((2, _AHEAD + 1), np.int64)
    num_missing = 0
    now, before, last = 0, 2, 1
    for block in range((number + _AHEAD - 1) // _AHEAD + 2):
        first = block * _AHEAD
        size = max(min(_AHEAD, number - first), 0)
        for j in range(size):
            h = mix(ids[first + j] ^ seed)
            hashes[now, j] = h
            shard = np.int64(h >> shift)
            start = address + 64 * (shard * per_shard + offset)
            lines_1[now, j] = start + 64 * first_bucket(h, buckets)
            lines_2[now, j] = start + 64 * second_bucket(h, buckets)
            shards[first + j] = shard
        for j in range(size, _AHEAD):
            lines_1[now, j] = address
        if block == 0:
            for j in range(_AHEAD):
                prefetch(lines_1[now, j])
        was_missing, num_missing = num_missing, 0
        first -= _AHEAD
        side = block & 1
        for j in range(min(_AHEAD, number - first) if block > 0 else 0):
            prefetch(lines_1[now, j])
            line = lines_1[before, j]
            slot = slot_of(line, hashes[before, j])
            rows[first + j] = load(line + 32 + 4 * (slot & 3)) | -np.int32(slot >> 2)
            missing[side, num_missing] = j
            num_missing += slot >> 2
        for m in range(num_missing):
            prefetch(lines_2[before, missing[side, m]])
        for m in range(was_missing):
            j = missing[1 - side, m]
            line = lines_2[last, j]
            slot = slot_of(line, hashes[last, j])
            rows[first - _AHEAD + j] = load(line + 32 + 4 * (slot & 3)) | -np.int32(slot >> 2)
        now, before, last = last, now, before


@inline
def start_of(tables, table, h):
    """Returns the first line of a hash's table and shard."""
    return np.int64(h >> tables.shard_shift) * tables.lines_per_shard + tables.bucket_offsets[table]


@inline
def _seen(line, slot, seen_s, touch):
    """Returns the row in a slot, and keeps the later one of its time and `seen_s`."""
    at = line + 48 + 4 * slot
    if touch and seen_s > np.uint32(load(at)):
        store(at, np.int32(seen_s))
    return load(line + 32 + 4 * slot)


@jit
def find(tables, lines, distinct, from_range, to_range, touch):
    """Writes the rows of distinct ids, ABSENT where they have none; with `touch` their last-seen becomes the later time.

    Returns:
        How many ids needed a look into their second bucket.
    """
    starts, numbers, hashes, of, seen_s = distinct.starts, distinct.numbers, distinct.hashes, distinct.tables, distinct.seen_s
    rows, num_buckets = distinct.rows, tables.num_buckets
    address = np.int64(lines.ctypes.data)
    lines_1, missing, lines_2 = (
        np.empty((2, _AHEAD), np.int64),
        np.empty((2, _AHEAD), np.int64),
        np.empty((2, _AHEAD), np.int64),
    )
    second_looks = 0
    for r in range(from_range, to_range):
        end, num_missing = starts[r] + numbers[r], 0
        for block in range((numbers[r] + _AHEAD - 1) // _AHEAD + 2):
            first, side = starts[r] + block * _AHEAD, block & 1
            for j in range(min(_AHEAD, end - first)):
                h, table = hashes[first + j], of[first + j]
                lines_1[side, j] = address + 64 * (start_of(tables, table, h) + first_bucket(h, num_buckets[table]))
                prefetch(lines_1[side, j])
            was_missing, num_missing = num_missing, 0
            first -= _AHEAD
            for j in range(min(_AHEAD, end - first) if block > 0 else 0):
                i, line = first + j, lines_1[1 - side, j]
                slot = slot_of(line, hashes[i])
                if slot < SLOTS:
                    rows[i] = _seen(line, slot, seen_s[i], touch)
                    continue
                line = address + 64 * (start_of(tables, of[i], hashes[i]) + second_bucket(hashes[i], num_buckets[of[i]]))
                prefetch(line)
                missing[side, num_missing], lines_2[side, num_missing] = i, line
                num_missing += 1
            for m in range(was_missing):
                i, line = missing[1 - side, m], lines_2[1 - side, m]
                slot = slot_of(line, hashes[i])
                rows[i] = _seen(line, slot, seen_s[i], touch) if slot < SLOTS else ABSENT
            second_looks += was_missing
    return second_looks


@inline
def _free_slot(meta, line):
    for slot in range(SLOTS):
        if meta[line, 8 + slot] < 0:
            return slot
    return -1


@inline
def _on_path(queue, node, bucket):
    # A bucket met twice on one path would have its slot moved twice.
    found = False
    while node >= 0:
        if queue[node, 0] == bucket:
            found = True
            break
        node = queue[node, 1]
    return found


@jit
def _make_room(keys, meta, start, num_buckets, bucket_a, bucket_b, queue):
    """Frees a slot in one of two full buckets by moving ids to their other bucket; returns line * SLOTS + slot or -1.

    Breadth first, so the path is a shortest one. `queue` is int64 [QUEUE, 3] scratch: bucket, parent, slot in the parent.
    """
    queue[0, 0], queue[0, 1], queue[0, 2] = bucket_a, -1, -1
    queue[1, 0], queue[1, 1], queue[1, 2] = bucket_b, -1, -1
    address = np.int64(meta.ctypes.data)
    for bucket in (bucket_a, bucket_b):
        for slot in range(SLOTS):  # all at once, not one after the other
            h = keys[start + bucket, slot]
            first, second = first_bucket(h, num_buckets), second_bucket(h, num_buckets)
            prefetch(address + 64 * (start + (second if first == bucket else first)))
    head, tail = 0, 2
    while head < tail:
        bucket = queue[head, 0]
        for slot in range(SLOTS):
            h = keys[start + bucket, slot]
            other = first_bucket(h, num_buckets)
            if other == bucket:
                other = second_bucket(h, num_buckets)
            free = _free_slot(meta, start + other)
            if free >= 0:
                node, to_line, to_slot, from_slot = head, start + other, free, slot
                while node >= 0:
                    from_line = start + queue[node, 0]
                    keys[to_line, to_slot] = keys[from_line, from_slot]
                    meta[to_line, 8 + to_slot] = meta[from_line, 8 + from_slot]
                    meta[to_line, 12 + to_slot] = meta[from_line, 12 + from_slot]
                    meta[from_line, 8 + from_slot] = -1
                    to_line, to_slot, from_slot = from_line, from_slot, queue[node, 2]
                    node = queue[node, 1]
                return to_line * SLOTS + to_slot
            if tail < QUEUE and not _on_path(queue, head, other):
                queue[tail, 0], queue[tail, 1], queue[tail, 2] = other, head, slot
                tail += 1
        head += 1
    return np.int64(-1)


@inline
def _place_for(keys, meta, start, num_buckets, h, queue):
    """Returns a free slot for a hash as line * SLOTS + slot, moving other ids if need be; -1: none was found."""
    bucket_a, bucket_b = first_bucket(h, num_buckets), second_bucket(h, num_buckets)
    line, slot = start + bucket_a, _free_slot(meta, start + bucket_a)
    if slot < 0:
        line, slot = start + bucket_b, _free_slot(meta, start + bucket_b)
    if slot < 0:
        return _make_room(keys, meta, start, num_buckets, bucket_a, bucket_b, queue)
    return line * SLOTS + slot


@inline
def _take_row(used, shard, word_start, num_rows, cursor):
    """Marks the next free row after the word `cursor` as used; returns it, or -1. `used` is uint32 [L, words]."""
    num_words = (num_rows + 31) // 32
    word, row = cursor, np.int64(-1)
    for _ in range(num_words + 1):
        free, bit = ~used[shard, word_start + word], np.int64(0)
        if free:
            while not (free >> np.uint32(bit)) & np.uint32(1):
                bit += 1
            if word * 32 + bit < num_rows:
                used[shard, word_start + word] |= np.uint32(1) << np.uint32(bit)
                row = word * 32 + bit
                break
        word = word + 1 if word + 1 < num_words else 0
    return row


@jit
def insert(tables, maps, distinct, from_range, to_range, refused):
    """Gives rows to the distinct ids that are ABSENT; those that stay so are counted.

    Args:
        tables, maps, distinct: Sizes, maps, ids with their rows as `find` left them. The rows of ids that are fresh are set.
        from_range, to_range: Ranges of ids to work on; two threads must not work on one shard.
        refused: int64 [L, T, 2] out, added to: ids refused at the cap; ids for which no path to a free slot was found.
    """
    starts, numbers, hashes, of, _, seen_s, rows, fresh = distinct
    _, offsets, num_buckets, words, caps, per_shard, shift = tables
    lines, used, counts, cursors = maps
    keys, meta, address = lines.view(np.uint64), lines.view(np.int32), np.int64(lines.ctypes.data)
    queue, waiting = np.empty((QUEUE, 3), np.int64), np.empty(_WAITING, np.int64)
    for r in range(from_range, to_range):
        i, end = starts[r], starts[r] + numbers[r]
        while i < end:
            number = 0
            while i < end and number < _WAITING:
                fresh[i] = False
                if rows[i] == ABSENT:
                    h, buckets = hashes[i], num_buckets[of[i]]
                    line = address + 64 * (np.int64(h >> shift) * per_shard + offsets[of[i]])
                    prefetch(line + 64 * first_bucket(h, buckets))
                    prefetch(line + 64 * second_bucket(h, buckets))
                    waiting[number] = i
                    number += 1
                i += 1
            for k in range(number):
                one = waiting[k]
                h, table = hashes[one], of[one]
                shard = np.int64(h >> shift)
                if counts[shard, table] >= caps[table]:
                    refused[shard, table, 0] += 1
                    continue
                start = shard * per_shard + offsets[table]
                found = _place_for(keys, meta, start, num_buckets[table], h, queue)
                if found < 0:
                    refused[shard, table, 1] += 1
                    continue
                line, slot = found // SLOTS, found % SLOTS
                row = _take_row(used, shard, words[table], caps[table], np.int64(cursors[shard, table]))
                cursors[shard, table] = row // 32
                counts[shard, table] += 1
                keys[line, slot] = h
                meta[line, 8 + slot] = row
                meta[line, 12 + slot] = np.int32(seen_s[one])
                rows[one] = row
                fresh[one] = True


@jit
def erase(ids, table, tables, maps, shards, rows):
    """Removes uint64 `ids` [N] of one table; writes shards and freed rows into int32 [N] arrays, ABSENT: had none."""
    meta, address = maps.lines.view(np.int32), np.int64(maps.lines.ctypes.data)
    buckets = tables.num_buckets[table]
    for i in range(ids.size):
        h = mix(ids[i] ^ tables.seeds[table])
        line = start_of(tables, table, h) + first_bucket(h, buckets)
        slot = slot_of(address + 64 * line, h)
        if slot == SLOTS:
            line = start_of(tables, table, h) + second_bucket(h, buckets)
            slot = slot_of(address + 64 * line, h)
        shards[i] = np.int64(h >> tables.shard_shift)
        rows[i] = ABSENT
        if slot < SLOTS:
            row = meta[line, 8 + slot]
            meta[line, 8 + slot] = -1
            maps.used[shards[i], tables.word_offsets[table] + row // 32] &= ~(np.uint32(1) << np.uint32(row % 32))
            maps.counts[shards[i], table] -= 1
            rows[i] = row


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
                if row >= tables.caps[table] or np.int64(h >> tables.shard_shift) != shard or bucket not in (first, second):
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
def hash_ids(ids, seed, hashes):
    """Writes the hashes of uint64 `ids` [N] of a table of this seed."""
    for i in range(ids.size):
        hashes[i] = mix(ids[i] ^ seed)


@jit
def unhash(hashes, seeds, tables, ids):
    """Writes the ids of uint64 `hashes` [N] of int32 `tables` [N]."""
    for i in range(hashes.size):
        ids[i] = unmix(hashes[i]) ^ seeds[tables[i]]


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
        shard, start = np.int64(h >> tables.shard_shift), start_of(tables, table, h)
        found = _place_for(keys, meta, start, buckets, h, queue)
        if found < 0:
            return False
        line, slot = found // SLOTS, found % SLOTS
        keys[line, slot] = h
        meta[line, 8 + slot] = rows[i]
        meta[line, 12 + slot] = np.int32(seen_s[i])
        maps.used[shard, tables.word_offsets[table] + rows[i] // 32] |= np.uint32(1) << np.uint32(rows[i] % 32)
        maps.counts[shard, table] += 1
    return True
