"""Versions of rows: how they are written, read, and walked through.

The layout: a row is one block of int64. Of each group, in order: how many versions are held (V + 1: V, and older ones were
pushed out); the earliest time of those pushed out; then V versions, each its time and the group's words (`rows`), in the
order of their times from the newest backwards, whatever the order in which they came. So a read of now waits for one or two
cache lines a group.
"""

# The counts that kernels add to are those of `versions.COUNTED`: written, ignored, refused, ..., reads, too_old.
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monolith_jax.ids.lines import inner, jit, prefetch
from monolith_jax.lake.rows import FeatureRows
from monolith_jax.types import Array

_COUNT, _DROPPED, _VERSIONS = range(3)
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
    """Returns the layout of rows of so many versions."""
    starts = np.concatenate([[0], np.cumsum(_VERSIONS + depth * (1 + np.diff(rows.offsets)))])
    return Layout(depth, starts, rows.offsets, rows.fresh_ms, rows.absent, rows.nulls)


@inner
def _put(table, row, layout, group, time_ms, words, i):
    # Writes the words at i as a version of a group into a row. Returns 0: it was taken, 1: there is no room for one so old.
    depth, base, first = layout.depth, layout.starts[group], layout.offsets[group]
    step = layout.offsets[group + 1] - first + 1
    start, held = base + _VERSIONS, min(table[row, base + _COUNT], depth)
    newer = 0
    while newer < held and table[row, start + newer * step] > time_ms:
        newer += 1
    at = start + newer * step
    if newer == held or table[row, at] != time_ms:
        if held == depth:
            pushed_ms = time_ms if newer == depth else table[row, start + (depth - 1) * step]
            if table[row, base + _COUNT] == depth or pushed_ms < table[row, base + _DROPPED]:
                table[row, base + _DROPPED] = pushed_ms
            table[row, base + _COUNT] = depth + 1
            if newer == depth:
                return 1
        else:
            table[row, base + _COUNT] = held + 1
        for word in range(start + min(held + 1, depth) * step - 1, at + step - 1, -1):
            table[row, word] = table[row, word - step]
        table[row, at] = time_ms
    for word in range(step - 1):
        table[row, at + 1 + word] = words[i, first + word]
    return 0


@inner
def _get(table, row, layout, wanted, time_ms, there, times_ms, words, i):
    # One row as of a time, into the words at i. Returns of how many groups anything had been told, and how many are too old.
    depth = layout.depth
    known = too_old = 0
    for group in range(wanted.size):
        if not wanted[group]:
            continue
        first = layout.offsets[group]
        size = layout.offsets[group + 1] - first
        there[i, group], times_ms[i, group] = False, 0
        for word in range(size):
            words[first + word, i] = 0
        words[first, i] = layout.absent[group]
        if row < 0:
            continue
        base, step = layout.starts[group], size + 1
        count, seen = table[row, base + _COUNT], False
        for k in range(min(count, depth)):
            at = base + _VERSIONS + k * step
            of_version = table[row, at]
            if of_version < time_ms:
                seen = True
                if layout.fresh_ms[group] == 0 or time_ms - of_version <= layout.fresh_ms[group]:
                    there[i, group], times_ms[i, group] = True, of_version
                    for word in range(size):
                        words[first + word, i] = table[row, at + 1 + word]
                break
        if not seen and count > depth and table[row, base + _DROPPED] < time_ms:
            seen = True
            too_old += 1
            words[first, i] = layout.nulls[group]
        known += seen
    return known, too_old


@jit
def clear(table, layout, rows):
    """Forgets the versions of rows, int64 [N]."""
    for row in rows:
        for group in range(layout.fresh_ms.size):
            table[row, layout.starts[group] + _COUNT] = 0


@jit
def write(table, layout, rows, entry_rows, entry_groups, times_ms, words, told):
    """Writes entries, in their order."""
    for entry in range(entry_rows.size):
        i, group = entry_rows[entry], entry_groups[entry]
        if rows[i] < 0:
            told[2] += 1
        else:
            told[_put(table, rows[i], layout, group, times_ms[i, group], words, i)] += 1


@jit
def read(table, layout, wanted, rows, at_ms, known, there, times_ms, words):
    """Reads the wanted groups of rows as of times; returns how many were too old."""
    total, address, row_bytes = 0, np.int64(table.ctypes.data), 8 * table.shape[1]
    for i in range(rows.size):
        ahead = i + _AHEAD
        if ahead < rows.size and rows[ahead] >= 0:
            for group in range(wanted.size):
                if wanted[group]:
                    # Of each group the newest version.
                    first = address + row_bytes * rows[ahead] + 8 * layout.starts[group]
                    last = first + 8 * (_VERSIONS + layout.offsets[group + 1] - layout.offsets[group])
                    for line in range(first & ~63, last + 1, 64):
                        prefetch(line)
        of_row, too_old = _get(table, rows[i], layout, wanted, at_ms[i], there, times_ms, words, i)
        known[i] = of_row > 0
        total += too_old
    return total


@jit
def walk(
    table,
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
                told[_put(table, changed[i], layout, group, change_ms[i, group], changes, i)] += 1
            entry += 1
        of_row, too_old = _get(table, rows[at], layout, wanted, at_ms[at], there, times_ms, words, at)
        known[at] = of_row > 0
        told[5] += there.shape[1]
        told[6] += too_old
