"""Rows taken back from ids: those not seen for long, and at the cap the least recently seen.

In: the maps after a plan's insertions, the plan's ids (which are pinned), and the time. Out: freed ids with their rows, which
the maps give out again from the next plan on.

Each plan sweeps a part of each shard's lines and frees what was not seen for `ttl_s`. Once a shard holds its share of
`max_rows`, a table frees ahead of need: it keeps as many rows free as new ids came in one plan lately, so that the next plan's
find room; whom it frees is decided by one exact selection among all ids of the table and shard, for many rows at once, so that
its cost spreads over many plans. Tables without `ttl_s` free nothing. State is by shard, results depend neither on the mesh nor
on threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monolith_jax.ids.lines import SLOTS, inner, jit
from monolith_jax.types import Array

SWEEP_PLANS = 64
"""A full sweep takes at least this many plans."""
CAP_PARTS = 64
"""A selection at the cap frees this part of a shard's cap."""


class Freed(NamedTuple):
    """Ids whose rows were taken, as the kernels note them; by shard, from `starts[shard]` on."""

    hashes: Array
    """uint64 [N]"""
    tables: Array
    """int32 [N]"""
    rows: Array
    """int32 [N], row in the shard's table."""


@inner
def _free(maps, meta, shard, table, line, slot, word_start, freed, at):
    """Takes a slot's row from its id; notes hash, table and row at `at` of the freed."""
    row = meta[line, 8 + slot]
    meta[line, 8 + slot] = -1
    maps.used[shard, word_start + row // 32] &= ~(np.uint32(1) << np.uint32(row % 32))
    maps.counts[shard, table] -= 1
    freed.hashes[at] = maps.lines.view(np.uint64)[line, slot]
    freed.tables[at] = table
    freed.rows[at] = row


@inner
def _is_pinned(pinned, word_start, row):
    return (pinned[word_start + row // 32] >> np.uint32(row % 32)) & np.uint32(1)


@inner
def _oldest(meta, start, num_lines, pinned, word_start, number):
    """Selects the `number` least recently seen ids of a table and shard that are not pinned, by the digits of their times.

    Args:
        meta, start, num_lines: The lines of the table and shard.
        pinned, word_start: uint32 [words] bit set of the shard, and where the table's part starts.
        number: At least 1, at most all that are not pinned.

    Returns:
        The time of the last of them, and how many of exactly that time are among them.
    """
    prefix, known = np.uint32(0), np.uint32(0)
    histogram = np.empty(2048, np.int64)
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        histogram[:] = 0
        for line in range(start, start + num_lines):
            for slot in range(SLOTS):
                row, time = meta[line, 8 + slot], np.uint32(meta[line, 12 + slot])
                if row >= 0 and (time & known) == prefix and not _is_pinned(pinned, word_start, row):
                    histogram[(time >> np.uint32(shift)) & np.uint32((1 << bits) - 1)] += 1
        digit = 0
        while histogram[digit] < number:
            number -= histogram[digit]
            digit += 1
        prefix |= np.uint32(digit << shift)
        known |= np.uint32(((1 << bits) - 1) << shift)
    return prefix, number


@inner
def _free_oldest(tables, maps, meta, pinned, shard, table, number, freed, at):
    """Frees the `number` least recently seen that are not pinned, first slots first among equals."""
    start, num_lines = shard * tables.lines_per_shard + tables.bucket_offsets[table], tables.num_buckets[table]
    word_start = tables.word_offsets[table]
    time, ties = _oldest(meta, start, num_lines, pinned, word_start, number)
    for line in range(start, start + num_lines):
        for slot in range(SLOTS):
            row, seen_s = meta[line, 8 + slot], np.uint32(meta[line, 12 + slot])
            if row < 0 or seen_s > time or _is_pinned(pinned, word_start, row):
                continue
            if seen_s == time:
                ties -= 1
                if ties < 0:
                    continue
            _free(maps, meta, shard, table, line, slot, word_start, freed, at)
            at += 1


@inner
def _sweep(tables, maps, meta, pinned, shard, table, cursor, num_buckets, unseen_since_s, freed, at, end):
    """Frees what was last seen at `unseen_since_s` or before in some buckets; returns where both sweep and freed go on."""
    start, word_start = shard * tables.lines_per_shard + tables.bucket_offsets[table], tables.word_offsets[table]
    for _ in range(num_buckets):
        if at + SLOTS > end:
            break
        line = start + cursor
        for slot in range(SLOTS):
            row = meta[line, 8 + slot]
            if row < 0 or np.int64(np.uint32(meta[line, 12 + slot])) > unseen_since_s or _is_pinned(pinned, word_start, row):
                continue
            _free(maps, meta, shard, table, line, slot, word_start, freed, at)
            at += 1
        cursor = cursor + 1 if cursor + 1 < tables.num_buckets[table] else 0
    return cursor, at


@inner
def _pin(tables, distinct, shard, ttl_s, pinned, num_pinned, num_fresh):
    """Sets the bits of the plan's rows in tables that free any, and counts them and those that are fresh."""
    rows, of = distinct.rows, distinct.tables
    for i in range(distinct.starts[shard], distinct.starts[shard] + distinct.numbers[shard]):
        if rows[i] >= 0 and ttl_s[of[i]] > 0:
            pinned[tables.word_offsets[of[i]] + rows[i] // 32] |= np.uint32(1) << np.uint32(rows[i] % 32)
            num_pinned[of[i]] += 1
            num_fresh[of[i]] += distinct.fresh[i]


@inner
def _unpin(tables, distinct, shard, ttl_s, pinned):
    rows, of = distinct.rows, distinct.tables
    for i in range(distinct.starts[shard], distinct.starts[shard] + distinct.numbers[shard]):
        if rows[i] >= 0 and ttl_s[of[i]] > 0:
            pinned[tables.word_offsets[of[i]] + rows[i] // 32] = 0


@jit
def free_unseen(
    tables, maps, distinct, refused, ttl_s, shares, now_s, from_shard, to_shard, pinned, sweeps, wanted, starts, limits, freed,
    numbers,
):  # fmt: skip
    """Frees the rows of ids that were not seen for `ttl_s`, and of the oldest where a table is near its cap.

    Args:
        tables, maps: Sizes and maps, after the plan's insertions.
        distinct: The plan's ids with their rows; never freed.
        refused: int64 [L, T, 2], from `insert`.
        ttl_s: int64 [T], seconds; 0: the table frees nothing.
        shares: int64 [T], a shard's share of `max_rows`; its cap has room for more.
        now_s: The time, seconds.
        from_shard, to_shard: Range of shards.
        pinned: uint32, shape of `maps.used`, all 0; left so again.
        sweeps: int32 [L, T], the bucket where each sweep goes on; advanced.
        wanted: int32 [L, T], new ids in one plan lately, since the shard was full; advanced.
        starts, limits: int64 [L], where each shard's freed begin in `freed`, and how many fit.
        freed: `Freed` out.
        numbers: int64 [L, 2] out: rows freed of each shard; how many of them because of the cap.
    """
    meta = maps.lines.view(np.int32)
    num_fresh, num_pinned = np.empty(ttl_s.size, np.int64), np.empty(ttl_s.size, np.int64)
    for shard in range(from_shard, to_shard):
        for table in range(ttl_s.size):
            num_fresh[table] = 0
            num_pinned[table] = 0
        _pin(tables, distinct, shard, ttl_s, pinned[shard], num_pinned, num_fresh)
        at, end = starts[shard], starts[shard] + limits[shard]
        numbers[shard, 1] = 0
        for table in range(ttl_s.size):
            if ttl_s[table] == 0:
                continue
            # A sweep never costs more than the batch itself, however large the table.
            buckets = min((tables.num_buckets[table] + SWEEP_PLANS - 1) // SWEEP_PLANS, max(distinct.numbers[shard], 1))
            cursor = np.int64(sweeps[shard, table])
            cursor, at = _sweep(
                tables, maps, meta, pinned[shard], shard, table, cursor, buckets, now_s - ttl_s[table], freed, at, end
            )
            sweeps[shard, table] = cursor
            lately = np.int64(wanted[shard, table])
            # While a shard holds less than its share of max_rows, new ids say nothing about what comes once it is full; and to
            # keep its share free for them would be to hold less than max_rows.
            was_full = maps.counts[shard, table] - num_fresh[table] >= shares[table]
            new = min(num_fresh[table], max(tables.caps[table] - shares[table], 1)) if was_full else 0
            new += refused[shard, table, 0]
            wanted[shard, table] = min(max(new, lately - (lately + 15) // 16), tables.caps[table])
            short = wanted[shard, table] - (tables.caps[table] - maps.counts[shard, table])
            if short > 0:
                number = max(short, tables.caps[table] // CAP_PARTS)
                number = min(number, maps.counts[shard, table] - num_pinned[table], end - at)
                if number > 0:
                    _free_oldest(tables, maps, meta, pinned[shard], shard, table, number, freed, at)
                    at += number
                    numbers[shard, 1] += number
        numbers[shard, 0] = at - starts[shard]
        _unpin(tables, distinct, shard, ttl_s, pinned[shard])
