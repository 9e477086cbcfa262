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
    inner,
    jit,
    load,
    mix,
    prefetch,
    second_bucket,
    shard_of,
    slot_of,
    store,
    unmix,
)

QUEUE = 256
"""Buckets that the search for a free slot visits before an insertion is given up."""

_WAITING = 64
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
    per_shard = tables.lines_per_shard
    address, number = np.int64(lines.ctypes.data), ids.size
    hashes = np.empty((3, _AHEAD), np.uint64)
    lines_1 = np.empty((3, _AHEAD), np.int64)
    lines_2 = np.empty((2, _AHEAD), np.int64)
    missing = np.empty((2, _AHEAD + 1), np.int64)
    num_missing = 0
    now, before, last = 0, 2, 1
    for block in range((number + _AHEAD - 1) // _AHEAD + 2):
        first = block * _AHEAD
        size = max(min(_AHEAD, number - first), 0)
        for j in range(size):
            h = mix(ids[first + j] ^ seed)
            hashes[now, j] = h
            shard = shard_of(h, tables)
            start = address + 64 * (shard * per_shard + offset)
            lines_1[now, j] = start + 64 * first_bucket(h, buckets)
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
            h = hashes[before, missing[side, m]]
            start = address + 64 * (shard_of(h, tables) * per_shard + offset)
            lines_2[side, m] = start + 64 * second_bucket(h, buckets)
            prefetch(lines_2[side, m])
        for m in range(was_missing):
            j, line = missing[1 - side, m], lines_2[1 - side, m]
            slot = slot_of(line, hashes[last, j])
            rows[first - _AHEAD + j] = load(line + 32 + 4 * (slot & 3)) | -np.int32(slot >> 2)
        now, before, last = last, now, before


@inline
def start_of(tables, table, h):
    """Returns the first line of a hash's table and shard."""
    return shard_of(h, tables) * tables.lines_per_shard + tables.bucket_offsets[table]


@inline
def _seen(line, slot, seen_s, touch):
    """Returns the row in a slot, ABSENT for slot 4, and with `touch` keeps the later one of its time and `seen_s`."""
    at = line + 48 + 4 * (slot & 3)
    if touch:
        was_s = np.uint32(load(at))
        # Always written: there is no telling which way a branch would go.
        store(at, np.int32(seen_s) if slot < SLOTS and seen_s > was_s else np.int32(was_s))
    return load(line + 32 + 4 * (slot & 3)) | -np.int32(slot >> 2)


@jit
def find(tables, lines, distinct, from_range, to_range, touch):
    """Writes the rows of distinct ids, and lists those that have none; with `touch` their last-seen becomes the later time.

    Nothing is fresh afterwards.

    Returns:
        How many ids needed a look into their second bucket.
    """
    starts, numbers, hashes, of, seen_s = distinct.starts, distinct.numbers, distinct.hashes, distinct.tables, distinct.seen_s
    rows, fresh, absent, num_absent = distinct.rows, distinct.fresh, distinct.absent, distinct.num_absent
    offsets, num_buckets, per_shard = tables.bucket_offsets, tables.num_buckets, tables.lines_per_shard
    address = np.int64(lines.ctypes.data)
    lines_1 = np.empty((2, _AHEAD), np.int64)
    lines_2 = np.empty((2, _AHEAD), np.int64)
    missing = np.empty((2, _AHEAD + 1), np.int64)
    second_looks = 0
    for r in range(from_range, to_range):
        end, num_missing, at_absent = starts[r] + numbers[r], 0, starts[r]
        for block in range((numbers[r] + _AHEAD - 1) // _AHEAD + 2):
            first, side = starts[r] + block * _AHEAD, block & 1
            for j in range(min(_AHEAD, end - first)):
                # Unsigned: numba would look whether an index of a signed array is negative.
                h, table = hashes[first + j], np.uint32(of[first + j])
                start = address + 64 * (shard_of(h, tables) * per_shard + offsets[table])
                lines_1[side, j] = start + 64 * first_bucket(h, num_buckets[table])
            for j in range(min(_AHEAD, end - first)):
                prefetch(lines_1[side, j])
                fresh[first + j] = False
            was_missing, num_missing = num_missing, 0
            first -= _AHEAD
            for j in range(min(_AHEAD, end - first) if block > 0 else 0):
                i, line = first + j, lines_1[1 - side, j]
                slot = slot_of(line, hashes[i])
                rows[i] = _seen(line, slot, seen_s[i], touch)
                missing[side, num_missing] = i
                num_missing += slot >> 2
            for m in range(num_missing):
                h, table = hashes[missing[side, m]], np.uint32(of[missing[side, m]])
                start = address + 64 * (shard_of(h, tables) * per_shard + offsets[table])
                lines_2[side, m] = start + 64 * second_bucket(h, num_buckets[table])
                prefetch(lines_2[side, m])
            for m in range(was_missing):
                i, line = missing[1 - side, m], lines_2[1 - side, m]
                slot = slot_of(line, hashes[i])
                rows[i] = _seen(line, slot, seen_s[i], touch)
                if slot == SLOTS:
                    absent[at_absent] = i
                    at_absent += 1
            second_looks += was_missing
        num_absent[r] = at_absent - starts[r]
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


@inline
def _other_bucket(h, num_buckets, bucket):
    first = first_bucket(h, num_buckets)
    return second_bucket(h, num_buckets) if first == bucket else first


@inline
def _ask_for_others(keys, start, num_buckets, h):
    """Asks for the lines that the ids in a hash's two buckets could move to."""
    for bucket in (first_bucket(h, num_buckets), second_bucket(h, num_buckets)):
        for slot in range(SLOTS):
            other = _other_bucket(keys[start + bucket, slot], num_buckets, bucket)
            prefetch(np.int64(keys.ctypes.data) + 64 * (start + other))


@inner
def make_room(keys, meta, start, num_buckets, h, queue):
    """Frees a slot in one of a hash's full buckets by moving ids to their other bucket; returns line * SLOTS + slot or -1.

    Breadth first, so the path is a shortest one. `queue` is int64 [QUEUE, 3] scratch: bucket, parent, slot in the parent.
    """
    queue[0, 0], queue[0, 1], queue[0, 2] = first_bucket(h, num_buckets), -1, -1
    queue[1, 0], queue[1, 1], queue[1, 2] = second_bucket(h, num_buckets), -1, -1
    head, tail = 0, 2
    while head < tail:
        bucket = queue[head, 0]
        for slot in range(SLOTS):
            other = _other_bucket(keys[start + bucket, slot], num_buckets, bucket)
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
def place_for(meta, start, num_buckets, h):
    """Returns a free slot of a hash's buckets as line * SLOTS + slot, -1 if both are full."""
    line = start + first_bucket(h, num_buckets)
    slot = _free_slot(meta, line)
    if slot < 0:
        line = start + second_bucket(h, num_buckets)
        slot = _free_slot(meta, line)
    return line * SLOTS + slot if slot >= 0 else np.int64(-1)


@inline
def write_slot(keys, meta, place, h, row, seen_s):
    """Writes an id into a place as `place_for` and `make_room` return it."""
    line, slot = place // SLOTS, place % SLOTS
    keys[line, slot] = h
    meta[line, 8 + slot] = row
    meta[line, 12 + slot] = np.int32(seen_s)


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


@inline
def _ask_for_both(tables, address, distinct, first, last, waiting):
    """Asks for the lines of some of the listed ids; returns how many are still ABSENT, and in `waiting` which."""
    number = 0
    for k in range(first, last):
        i = np.int64(distinct.absent[k])
        if distinct.rows[i] == ABSENT:
            h, buckets = distinct.hashes[i], tables.num_buckets[distinct.tables[i]]
            line = address + 64 * start_of(tables, distinct.tables[i], h)
            prefetch(line + 64 * first_bucket(h, buckets))
            prefetch(line + 64 * second_bucket(h, buckets))
            waiting[number] = i
            number += 1
    return number


@jit
def insert(tables, maps, distinct, from_range, to_range, refused):
    """Gives rows to the distinct ids that `find` listed and that are still ABSENT; those that stay so are counted.

    Blocks of ids go through three steps, so that few wait for memory: ask for both lines; take a row and a free slot there,
    or ask for the lines where the ids of the full buckets could go; move those.

    Args:
        tables, maps, distinct: Sizes, maps, ids as `find` left them. The rows of ids that are fresh are set.
        from_range, to_range: Ranges of ids to work on; two threads must not work on one shard.
        refused: int64 [L, T, 2] out, added to: ids refused at the cap; ids for which no path to a free slot was found.
    """
    hashes, of, seen_s, rows, fresh = distinct.hashes, distinct.tables, distinct.seen_s, distinct.rows, distinct.fresh
    num_buckets, words, caps = tables.num_buckets, tables.word_offsets, tables.caps
    used, counts, cursors = maps.used, maps.counts, maps.cursors
    keys, meta, address = maps.lines.view(np.uint64), maps.lines.view(np.int32), np.int64(maps.lines.ctypes.data)
    queue, waiting, crowded = np.empty((QUEUE, 3), np.int64), np.empty(_WAITING, np.int64), np.empty(_WAITING, np.int64)
    for r in range(from_range, to_range):
        end = distinct.starts[r] + distinct.num_absent[r]
        for k in range(distinct.starts[r], end, _WAITING):
            number, num_crowded = _ask_for_both(tables, address, distinct, k, min(k + _WAITING, end), waiting), 0
            for w in range(number):
                i = waiting[w]
                h, table = hashes[i], of[i]
                shard, start = shard_of(h, tables), start_of(tables, table, h)
                if counts[shard, table] >= caps[table]:
                    refused[shard, table, 0] += 1
                    continue
                row = _take_row(used, shard, words[table], caps[table], np.int64(cursors[shard, table]))
                cursors[shard, table] = row // 32
                counts[shard, table] += 1
                rows[i], fresh[i] = row, True
                place = place_for(meta, start, num_buckets[table], h)
                if place >= 0:
                    write_slot(keys, meta, place, h, row, seen_s[i])
                else:
                    _ask_for_others(keys, start, num_buckets[table], h)
                    crowded[num_crowded] = i
                    num_crowded += 1
            for w in range(num_crowded):
                i = crowded[w]
                h, table = hashes[i], of[i]
                shard, start = shard_of(h, tables), start_of(tables, table, h)
                place = place_for(meta, start, num_buckets[table], h)
                if place < 0:
                    place = make_room(keys, meta, start, num_buckets[table], h, queue)
                if place >= 0:
                    write_slot(keys, meta, place, h, rows[i], seen_s[i])
                    continue
                used[shard, words[table] + rows[i] // 32] &= ~(np.uint32(1) << np.uint32(rows[i] % 32))
                counts[shard, table] -= 1
                refused[shard, table, 1] += 1
                rows[i], fresh[i] = ABSENT, False


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
        shards[i] = shard_of(h, tables)
        rows[i] = ABSENT
        if slot < SLOTS:
            row = meta[line, 8 + slot]
            meta[line, 8 + slot] = -1
            maps.used[shards[i], tables.word_offsets[table] + row // 32] &= ~(np.uint32(1) << np.uint32(row % 32))
            maps.counts[shards[i], table] -= 1
            rows[i] = row


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
