"""The numba kernels of the id maps: functions over plain arrays, GIL released, one writer at a time.

In: ids as uint64 and the byte layout below. Out: rows in shards, and the index arrays of a plan.

Layout (the contract; another backend may replace these kernels). A *line* is 64 bytes, 16 words of uint32:
words 0-7 are four ids (uint64, little endian), words 8-11 their rows in the shard's table (int32, -1: the slot is empty),
words 12-15 when each id was last seen (uint32 seconds of event time). Emptiness is the row's, so every id is legal.
An id may live in two buckets of its table and shard, a bucket being one line. Lines of all tables of a shard are neighbours:
`lines[shard, bucket_offset[table] + bucket]`.

hash = mix(id ^ seed of the table), a bijection (Stafford's variant 13 of the 64-bit murmur3 finaliser). Its top bits are
the shard, its low 32 bits choose the first bucket, the high half of a second product the other one, both by
multiply-shift (Lemire 2019, "Fast random integer generation in an interval"), so that any number of buckets will do.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

SLOTS = 4
LINE_WORDS = 16
QUEUE = 256
"""Buckets that the search for a free slot visits before an insertion is given up."""

_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_M3 = np.uint64(0x9E3779B97F4A7C15)
_S27 = np.uint64(27)
_S30 = np.uint64(30)
_S31 = np.uint64(31)
_S32 = np.uint64(32)
_LOW32 = np.uint64(0xFFFFFFFF)

_PREFETCH_DISTANCE = 48

_jit = numba.njit(cache=True, nogil=True, boundscheck=False)
_inline = numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")


@intrinsic
def _prefetch(typing_context, address):
    """Asks for the cache line at an int64 address."""

    def codegen(context, builder, signature, arguments):
        pointer = ir.PointerType(ir.IntType(8))
        int32 = ir.IntType(32)
        signature_ir = ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, signature_ir, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(arguments[0], pointer), int32(0), int32(3), int32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@_inline
def mix(x):
    """Returns the hash of a uint64, a bijection of the 64-bit integers."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@_inline
def first_bucket(h, num_buckets):
    """Returns the bucket that an id is looked for first."""
    return np.int64(((h & _LOW32) * np.uint64(num_buckets)) >> _S32)


@_inline
def second_bucket(h, num_buckets):
    """Returns the other bucket, never the first one where there are two."""
    bucket = np.int64((((h * _M3) >> _S32) * np.uint64(num_buckets)) >> _S32)
    if bucket == first_bucket(h, num_buckets):
        bucket += 1
        if bucket == num_buckets:
            bucket = 0
    return bucket


@_inline
def _find(keys, meta, line, key):
    for slot in range(SLOTS):
        if keys[line, slot] == key and meta[line, 8 + slot] >= 0:
            return slot
    return -1


@_inline
def _locate(keys, meta, start, num_buckets, h, key):
    """Returns line and slot of an id among the lines of its table and shard, which begin at `start`; slot -1: not there."""
    line = start + first_bucket(h, num_buckets)
    slot = _find(keys, meta, line, key)
    if slot < 0:
        line = start + second_bucket(h, num_buckets)
        slot = _find(keys, meta, line, key)
    return line, slot


@_inline
def _free_slot(meta, line):
    for slot in range(SLOTS):
        if meta[line, 8 + slot] < 0:
            return slot
    return -1


@_inline
def _move(keys, meta, from_line, from_slot, to_line, to_slot):
    keys[to_line, to_slot] = keys[from_line, from_slot]
    meta[to_line, 8 + to_slot] = meta[from_line, 8 + from_slot]
    meta[to_line, 12 + to_slot] = meta[from_line, 12 + from_slot]
    meta[from_line, 8 + from_slot] = -1


@_jit
def _make_room(keys, meta, start, num_buckets, seed, bucket_a, bucket_b, queue):
    """Frees a slot in one of two full buckets by moving ids to their other bucket; returns line * SLOTS + slot or -1.

    Breadth first, so the path is a shortest one. `queue` is int64 [QUEUE, 3] scratch: bucket, parent, slot in the parent.
    """
    queue[0, 0], queue[0, 1], queue[0, 2] = bucket_a, -1, -1
    queue[1, 0], queue[1, 1], queue[1, 2] = bucket_b, -1, -1
    head, tail = 0, 2
    while head < tail:
        bucket = queue[head, 0]
        line = start + bucket
        for slot in range(SLOTS):
            h = mix(keys[line, slot] ^ seed)
            other = first_bucket(h, num_buckets)
            if other == bucket:
                other = second_bucket(h, num_buckets)
            free = _free_slot(meta, start + other)
            if free >= 0:
                node, to_line, to_slot, from_slot = head, start + other, free, slot
                while node >= 0:
                    from_line = start + queue[node, 0]
                    _move(keys, meta, from_line, from_slot, to_line, to_slot)
                    to_line, to_slot, from_slot = from_line, from_slot, queue[node, 2]
                    node = queue[node, 1]
                return to_line * SLOTS + to_slot
            if tail < QUEUE and not _on_path(queue, head, other):
                queue[tail, 0], queue[tail, 1], queue[tail, 2] = other, head, slot
                tail += 1
        head += 1
    return np.int64(-1)


@_inline
def _on_path(queue, node, bucket):
    # A bucket met twice on one path would have its slot moved twice.
    found = False
    while node >= 0:
        if queue[node, 0] == bucket:
            found = True
            break
        node = queue[node, 1]
    return found


@_jit
def _place_for(keys, meta, start, num_buckets, seed, h, queue):
    """Returns a free slot for a hash as line * SLOTS + slot, moving other ids if need be; -1: none was found."""
    bucket_a, bucket_b = first_bucket(h, num_buckets), second_bucket(h, num_buckets)
    for bucket in (bucket_a, bucket_b):
        slot = _free_slot(meta, start + bucket)
        if slot >= 0:
            return (start + bucket) * SLOTS + slot
    return _make_room(keys, meta, start, num_buckets, seed, bucket_a, bucket_b, queue)


@_jit
def _take_row(used, word_start, num_rows, cursor):
    """Marks the next free row after `cursor` as used; returns it, or -1. `used` is one shard's bit set, uint32 words."""
    num_words = (num_rows + 31) // 32
    word = cursor
    for _ in range(num_words + 1):
        bits = used[word_start + word]
        if bits != np.uint32(0xFFFFFFFF):
            for bit in range(32):
                row = word * 32 + bit
                if row >= num_rows:
                    break
                if not (bits >> np.uint32(bit)) & np.uint32(1):
                    used[word_start + word] = bits | (np.uint32(1) << np.uint32(bit))
                    return np.int64(row)
        word += 1
        if word == num_words:
            word = 0
    return np.int64(-1)


@_jit
def lookup(hashes, ids, table, bucket_offsets, num_buckets, shard_shift, keys, meta, lines_per_shard, rows):
    """Writes shard and row of each id of one table into int32 `rows` [N, 2]; row -1 where the id has none."""
    buckets = num_buckets[table]
    for i in range(ids.size):
        shard = np.int64(hashes[i] >> shard_shift)
        start = shard * lines_per_shard + bucket_offsets[table]
        line, slot = _locate(keys, meta, start, buckets, hashes[i], ids[i])
        rows[i, 0] = shard
        rows[i, 1] = meta[line, 8 + slot] if slot >= 0 else -1


@_jit
def hash_ids(ids, seed, hashes):
    """Writes the hashes of uint64 `ids` [N] of one table."""
    for i in range(ids.size):
        hashes[i] = mix(ids[i] ^ seed)


@_jit
def lookup_or_insert(
    hashes, ids, tables, seen_s, seeds, bucket_offsets, num_buckets, word_offsets, max_rows, shard_shift,
    keys, meta, lines_per_shard, used, counts, cursors, queue, insert, shards, rows, fresh,
):  # fmt: skip
    """Finds or makes the row of each distinct (table, id).

    Args:
        hashes, ids: uint64 [N], distinct within their table.
        tables: int32 [N], index of each id's table.
        seen_s: uint32 [N], event time of each id in seconds; the stored one becomes the larger of both.
        seeds, bucket_offsets, num_buckets, word_offsets, max_rows: per table [T]; `max_rows` is the cap of one shard.
        shard_shift: 64 - log2 L, as uint64.
        keys, meta: uint64 [L * lines, 8] and int32 [L * lines, 16] views of the lines.
        lines_per_shard: Lines of all tables in one shard.
        used, counts, cursors: per shard [L, ...]: bit set of used rows, rows in use, where the search for a free row starts.
        queue: int64 [QUEUE, 3] scratch.
        insert: Whether ids without a row get one, and times are kept; if not, nothing is changed.
        shards, rows, fresh: int32, int32, bool [N] out: shard, row in the shard's table (-1: refused), whether it is new.

    Returns:
        Ids refused because their shard is at its cap, and ids refused because no path to a free slot was found.
    """
    at_cap, no_path = 0, 0
    address = np.int64(keys.ctypes.data)
    for i in range(ids.size):
        if i + _PREFETCH_DISTANCE < ids.size:
            ahead = i + _PREFETCH_DISTANCE
            line = np.int64(hashes[ahead] >> shard_shift) * lines_per_shard + bucket_offsets[tables[ahead]]
            _prefetch(address + 64 * (line + first_bucket(hashes[ahead], num_buckets[tables[ahead]])))  # pyright: ignore
        key, table, h = ids[i], tables[i], hashes[i]
        shard = np.int64(h >> shard_shift)
        buckets = num_buckets[table]
        start = shard * lines_per_shard + bucket_offsets[table]
        shards[i] = shard
        line, slot = _locate(keys, meta, start, buckets, h, key)
        if slot >= 0:
            rows[i], fresh[i] = meta[line, 8 + slot], False
            if insert and seen_s[i] > np.uint32(meta[line, 12 + slot]):
                meta[line, 12 + slot] = np.int32(seen_s[i])
            continue
        rows[i], fresh[i] = -1, False
        if not insert:
            continue
        if counts[shard, table] >= max_rows[table]:
            at_cap += 1
            continue
        place = _place_for(keys, meta, start, buckets, seeds[table], h, queue)
        if place < 0:
            no_path += 1
            continue
        row = _take_row(used[shard], word_offsets[table], max_rows[table], cursors[shard, table])
        cursors[shard, table] = row // 32
        counts[shard, table] += 1
        line, slot = place // SLOTS, place % SLOTS
        keys[line, slot] = key
        meta[line, 8 + slot] = row
        meta[line, 12 + slot] = np.int32(seen_s[i])
        rows[i], fresh[i] = row, True
    return at_cap, no_path


@_jit
def erase(
    hashes, ids, table, bucket_offsets, num_buckets, word_offsets, shard_shift, keys, meta, lines_per_shard, used, counts, rows
):
    """Removes ids of one table; writes shard and freed row of each into int32 `rows` [N, 2], row -1 where there was none."""
    buckets = num_buckets[table]
    for i in range(ids.size):
        h = hashes[i]
        shard = np.int64(h >> shard_shift)
        start = shard * lines_per_shard + bucket_offsets[table]
        line, slot = _locate(keys, meta, start, buckets, h, ids[i])
        rows[i, 0] = shard
        rows[i, 1] = -1
        if slot < 0:
            continue
        row = meta[line, 8 + slot]
        meta[line, 8 + slot] = -1
        used[shard, word_offsets[table] + row // 32] &= ~(np.uint32(1) << np.uint32(row % 32))
        counts[shard, table] -= 1
        rows[i, 1] = row


@_jit
def is_sound(
    seeds, bucket_offsets, num_buckets, word_offsets, max_rows, shard_shift, keys, meta, lines_per_shard, used, counts
):
    """Returns whether every id stands where it is looked for, with a used row that no other id has, and all are counted."""
    num_shards, num_tables = counts.shape
    unclaimed = used.copy()
    for shard in range(num_shards):
        for table in range(num_tables):
            start, buckets, number = shard * lines_per_shard + bucket_offsets[table], num_buckets[table], 0
            for place in range(buckets * SLOTS):
                bucket, slot = place // SLOTS, place % SLOTS
                row = np.int64(meta[start + bucket, 8 + slot])
                if row < 0:
                    continue
                h = mix(keys[start + bucket, slot] ^ seeds[table])
                if row >= max_rows[table] or np.int64(h >> shard_shift) != shard:
                    return False
                if bucket != first_bucket(h, buckets) and bucket != second_bucket(h, buckets):
                    return False
                word, bit = word_offsets[table] + row // 32, np.uint32(1) << np.uint32(row % 32)
                if not unclaimed[shard, word] & bit:
                    return False
                unclaimed[shard, word] ^= bit
                number += 1
            if number != counts[shard, table]:
                return False
    return not unclaimed.any()


@_jit
def dedup(ids, valid, position_tables, seen_s, seeds, scratch, inverse, out_ids, out_hashes, out_tables, out_seen_s, places):
    """Finds the distinct (table, id) of a batch, in order of first appearance.

    Args:
        ids: uint64 [B, P].
        valid: bool [B, P], whether the position holds an id.
        position_tables: int32 [P], the table of each position's ids.
        seen_s: uint32 [B], event times in seconds.
        seeds: uint64 [T].
        scratch: int32 [M], M a power of two of at least 2 B P, all -1; left so again.
        inverse: int32 [B, P] out: index of the distinct id, -1 where the position is empty.
        out_ids, out_hashes, out_tables, out_seen_s: uint64, uint64, int32, uint32 [B * P] out; the latest event time of each.
        places: int32 [B * P] scratch.

    Returns:
        How many distinct ids there are.
    """
    mask = np.uint64(scratch.size - 1)
    count = 0
    for b in range(ids.shape[0]):
        for p in range(ids.shape[1]):
            if not valid[b, p]:
                inverse[b, p] = -1
                continue
            key, table = ids[b, p], position_tables[p]
            h = mix(key ^ seeds[table])
            place = np.int64(h & mask)
            while True:
                found = scratch[place]
                if found < 0:
                    scratch[place] = count
                    places[count] = place
                    out_ids[count], out_hashes[count], out_tables[count] = key, h, table
                    out_seen_s[count] = seen_s[b]
                    found = count
                    count += 1
                    break
                if out_ids[found] == key and out_tables[found] == table:
                    out_seen_s[found] = max(out_seen_s[found], seen_s[b])
                    break
                place = np.int64(np.uint64(place + 1) & mask)
            inverse[b, p] = found
    for i in range(count):
        scratch[places[i]] = -1
    return count
