"""Rings of versions: how they are written, read, and walked through.

The layout: a row is one block of int64, so that a read of it waits for memory once. Of each group, in order: where in the ring
the newest version stands; how many versions are held (V + 1: V, and older ones were pushed out); the earliest time of those
pushed out; then V versions, each its time and the group's words (`rows`). Versions are in the order of their times from the
newest backwards, whatever the order in which they came.
"""

# The counts that kernels add to are those of `versions.COUNTED`: written, ignored, refused, ..., reads, too_old.
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monolith_jax.ids.lines import inner, jit, prefetch
from monolith_jax.lake.rows import FeatureRows
from monolith_jax.types import Array

_HEAD, _COUNT, _DROPPED, _RING = range(4)
_AHEAD = 8
"""Rows whose memory is asked for before it is needed."""


class Layout(NamedTuple):
    """Where the groups stand in a row, and how they are read; G groups."""

    depth: int
    """V"""
    starts: Array
    """int64 [G + 1], where each begins in a row, and where the last ends."""
    offsets: Array
    """int64 [G + 1], where the words of each begin."""
    fresh_ms: Array
    """int64 [G]"""
    absent: Array
    """int64 [G], first word where nothing is there."""
    nulls: Array
    """int64 [G], first word where all is null."""


def layout_of(rows: FeatureRows, depth: int) -> Layout:
    """Returns the layout of rings of so many versions."""
    starts = np.concatenate([[0], np.cumsum(_RING + depth * (1 + np.diff(rows.offsets)))])
    return Layout(depth, starts, rows.offsets, rows.fresh_ms, rows.absent, rows.nulls)


@inner
def _put(ring, layout, group, time_ms, words):
    # Writes a version of a group into a row. Returns 0: it was taken, 1: there is no room for one so old.
    depth, base, first = layout.depth, layout.starts[group], layout.offsets[group]
    size = layout.offsets[group + 1] - first
    step, start = size + 1, base + _RING
    head, count = ring[base + _HEAD], ring[base + _COUNT]
    held = min(count, depth)
    newer = 0
    while newer < held and ring[start + (head - newer) % depth * step] > time_ms:
        newer += 1
    at = start + (head - newer) % depth * step
    if newer == held or ring[at] != time_ms:
        if held == depth:
            pushed_ms = time_ms if newer == depth else ring[start + (head + 1) % depth * step]
            if count == depth or pushed_ms < ring[base + _DROPPED]:
                ring[base + _DROPPED] = pushed_ms
            ring[base + _COUNT] = depth + 1
            if newer == depth:
                return 1
        else:
            ring[base + _COUNT] = held + 1
        head = (head + 1) % depth
        ring[base + _HEAD] = head
        for k in range(newer):
            to, of = start + (head - k) % depth * step, start + (head - k - 1) % depth * step
            ring[to : to + step] = ring[of : of + step]
        at = start + (head - newer) % depth * step
        ring[at] = time_ms
    ring[at + 1 : at + step] = words[first : first + size]
    return 0


@inner
def _get(rings, row, layout, wanted, time_ms, there, times_ms, words):
    # One row as of a time. Returns of how many groups anything had been told, and of how many the version is too old.
    depth = layout.depth
    known = too_old = 0
    for group in range(wanted.size):
        first = layout.offsets[group]
        size = layout.offsets[group + 1] - first
        there[group], times_ms[group] = False, 0
        for word in range(size):
            words[first + word] = 0
        words[first] = layout.absent[group]
        if row < 0 or not wanted[group]:
            continue
        base, step = layout.starts[group], size + 1
        head, count = rings[row, base + _HEAD], rings[row, base + _COUNT]
        seen = False
        for k in range(min(count, depth)):
            place = head - k if head >= k else head - k + depth
            at = base + _RING + place * step
            of_version = rings[row, at]
            if of_version < time_ms:
                seen = True
                if layout.fresh_ms[group] == 0 or time_ms - of_version <= layout.fresh_ms[group]:
                    there[group], times_ms[group] = True, of_version
                    for word in range(size):
                        words[first + word] = rings[row, at + 1 + word]
                break
        if not seen and count > depth and rings[row, base + _DROPPED] < time_ms:
            seen = True
            too_old += 1
            words[first] = layout.nulls[group]
        known += seen
    return known, too_old


@jit
def clear(rings, layout, rows):
    """Forgets the versions of rows, int64 [N]."""
    for row in rows:
        for group in range(layout.fresh_ms.size):
            rings[row, layout.starts[group] + _COUNT] = 0


@jit
def write(rings, layout, rows, entry_rows, entry_groups, times_ms, words, told):
    """Writes entries, in their order."""
    for entry in range(entry_rows.size):
        i, group = entry_rows[entry], entry_groups[entry]
        if rows[i] < 0:
            told[2] += 1
        else:
            told[_put(rings[rows[i]], layout, group, times_ms[i, group], words[i])] += 1


@jit
def read(rings, layout, wanted, rows, at_ms, known, there, times_ms, words):
    """Reads the wanted groups of rows as of times; returns how many were too old."""
    total, address, row_bytes = 0, np.int64(rings.ctypes.data), 8 * rings.shape[1]
    for i in range(rows.size):
        ahead = i + _AHEAD
        if ahead < rows.size and rows[ahead] >= 0:
            for group in range(wanted.size):
                if wanted[group]:
                    row = address + row_bytes * rows[ahead]
                    for line in range(8 * layout.starts[group] & ~63, 8 * layout.starts[group + 1], 64):
                        prefetch(row + line)
        of_row, too_old = _get(rings, rows[i], layout, wanted, at_ms[i], there[i], times_ms[i], words[i])
        known[i] = of_row > 0
        total += too_old
    return total


@jit
def walk(
    rings,
    layout,
    rows,
    at_ms,
    order,
    changed,
    entry_rows,
    entry_groups,
    change_ms,
    changes,
    known,
    there,
    times_ms,
    words,
    told,
):
    """Reads rows in `order`, that of time, and before each writes the entries that are earlier; they are in that order, too."""
    entry, wanted = 0, np.ones(there.shape[1], np.bool_)
    for n in range(order.size):
        at = order[n]
        while entry < entry_rows.size and change_ms[entry_rows[entry], entry_groups[entry]] < at_ms[at]:
            i, group = entry_rows[entry], entry_groups[entry]
            if changed[i] < 0:
                told[2] += 1
            else:
                told[_put(rings[changed[i]], layout, group, change_ms[i, group], changes[i])] += 1
            entry += 1
        of_row, too_old = _get(rings, rows[at], layout, wanted, at_ms[at], there[at], times_ms[at], words[at])
        known[at] = of_row > 0
        told[5] += there.shape[1]
        told[6] += too_old
