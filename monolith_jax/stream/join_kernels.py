"""The numba kernels of the joiner: keys of impressions and actions against each other.

In: int64 columns of keys (request, video), and actions as rows of int64 [N, 6]. Out: which row an action belongs to, and what
the actions make of a row. The GIL is released.

A row of actions: request, video, value, event id, event time, and bits: the kind in the low eight (0: play, 1: dwell, then
`ACTIONS`), then whether there is a value, whether there is an event id, and from bit `ARRIVAL` on the number of the arrival.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.lines import jit, mix, prefetch

REQUEST, VIDEO, VALUE, EVENT, TIME, BITS = range(6)
HAS_VALUE = 256
HAS_EVENT = 512
ARRIVAL = 10
NONE = np.iinfo(np.int64).min
"""A time that was not told."""

_SALT = np.uint64(0x2545F4914F6CDD1D)
_AHEAD = 16


@jit
def hash_keys(requests, videos, hashes):
    """Writes the uint64 [N] hashes of int64 [N] keys."""
    for i in range(requests.size):
        hashes[i] = mix(np.uint64(videos[i]) ^ mix(np.uint64(requests[i]) + _SALT))


@jit
def build_index(requests, videos, hashes, table, first):
    """Fills an open-addressed table, int32 of a power of two, with rows; writes each row's first one of the same key."""
    mask = np.uint64(table.size - 1)
    table[:] = -1
    for i in range(hashes.size):
        if i + _AHEAD < hashes.size:
            prefetch(np.int64(table.ctypes.data) + np.int64(4) * np.int64(hashes[i + _AHEAD] & mask))
        at = hashes[i] & mask
        while True:
            row = table[at]
            if row < 0:
                table[at] = i
                first[i] = i
                break
            if requests[row] == requests[i] and videos[row] == videos[i]:
                first[i] = row
                break
            at = (at + np.uint64(1)) & mask


@jit
def find(requests, videos, hashes, index_requests, index_videos, table, rows):
    """Writes the row of each key in an index, int32 [N], -1 where it has none; returns how many have one."""
    mask, found = np.uint64(table.size - 1), 0
    for i in range(hashes.size):
        if i + _AHEAD < hashes.size:
            prefetch(np.int64(table.ctypes.data) + np.int64(4) * np.int64(hashes[i + _AHEAD] & mask))
        at = hashes[i] & mask
        rows[i] = -1
        while True:
            row = table[at]
            if row < 0:
                break
            if index_requests[row] == requests[i] and index_videos[row] == videos[i]:
                rows[i] = row
                found += 1
                break
            at = (at + np.uint64(1)) & mask
    return found


@jit
def refill_seen(old_rows, old_ids, seen_rows, seen_ids):
    """Moves the event ids that were seen into larger arrays."""
    mask = np.uint64(seen_rows.size - 1)
    for k in range(old_rows.size):
        if old_rows[k] >= 0:
            at = mix(np.uint64(old_ids[k]) ^ (np.uint64(old_rows[k]) << np.uint64(32))) & mask
            while seen_rows[at] >= 0:
                at = (at + np.uint64(1)) & mask
            seen_rows[at], seen_ids[at] = old_rows[k], old_ids[k]


@jit
def apply(actions, rows, play, dwell, came, seen_rows, seen_ids, fresh):
    """Adds actions to their rows, in order; those of row -1 are skipped.

    Args:
        actions: int64 [N, 6].
        rows: int32 [N].
        play, dwell: int64 [R], the largest so far, NONE: none.
        came: uint16 [R], bit k: an action of kind k came.
        seen_rows, seen_ids: int32 and int64, a set of (row, event id), row -1: empty. It has room.
        fresh: uint8 [N] out: 0: a repeated event or no row; 1: a kind that had come; 2: the first of its kind.

    Returns:
        How many event ids were new, and how many events were repeated.
    """
    mask = np.uint64(seen_rows.size - 1)
    added, repeated = 0, 0
    for i in range(rows.size):
        row, bits, fresh[i] = rows[i], actions[i, 5], 0
        if row < 0:
            continue
        if bits & HAS_EVENT:
            event = actions[i, 3]
            at, known = mix(np.uint64(event) ^ (np.uint64(row) << np.uint64(32))) & mask, False
            while seen_rows[at] >= 0:
                if seen_rows[at] == row and seen_ids[at] == event:
                    known = True
                    break
                at = (at + np.uint64(1)) & mask
            if known:
                repeated += 1
                continue
            seen_rows[at], seen_ids[at] = row, event
            added += 1
        kind = bits & 255
        if kind < 2:
            if not bits & HAS_VALUE:
                continue
            if kind == 0:
                play[row] = max(play[row], actions[i, 2])
            else:
                dwell[row] = max(dwell[row], actions[i, 2])
        bit = np.uint16(1) << np.uint16(kind)
        fresh[i] = 1 if came[row] & bit else 2
        came[row] |= bit
    return added, repeated
