"""The numba kernels of the rerank: which rows may be shown, which rules a row would break, and the picks of a feed.

In: the arrays of a pool. Out: rows in the order of the feed, the chance of each, and the rules that it breaks.

A rule is a bit, larger where it is relaxed later, so the rows to choose from are those of the least sum of broken bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from monolith_jax.ids.lines import mix
from monolith_jax.serve.diversity import NONE, gains, measure, meet

NEVER = 128
"""Bit of a rule that is never relaxed."""


class Traits(NamedTuple):
    """What the rules look at. K candidates, G tags."""

    authors: np.ndarray
    """int64 [K]."""
    author_known: np.ndarray
    """bool [K]."""
    sounds: np.ndarray
    """int64 [K]."""
    sound_known: np.ndarray
    """bool [K]."""
    tags: np.ndarray
    """int64 [K, G]."""
    tag_known: np.ndarray
    """bool [K, G]."""


class Rules(NamedTuple):
    """The sizes and bits of the rules."""

    author_gap: int
    sound_gap: int
    tag_window: int
    max_of_tag: int
    author_bit: int
    sound_bit: int
    tag_bit: int


@numba.njit(cache=True, nogil=True)
def eligible(ids, scores, by_score, unsafe, blocked, explore, kept, drawable, aside):
    """Finds the rows that may be shown: of each video the best scored one, none if any row of the video is unsafe or blocked.

    Args:
        ids: uint64 [K].
        scores: float32 [K]; rows that are not finite are out.
        by_score: int64 [K], the rows from the best to the worst.
        unsafe: bool [K].
        blocked: bool [K].
        explore: bool [K].
        kept: int64 [K] out, the rows that may be shown, from the best to the worst.
        drawable: bool [K] out, by row: the video has a row in `explore`.
        aside: int64 [4] out, rows that are unsafe, blocked, without a score, repeated; each is counted once, by the first.

    Returns:
        The number of rows kept.
    """
    size = np.int64(16)
    while size < 2 * ids.size:
        size *= 2
    slots = np.full(size, -1, np.int64)
    first = np.empty(ids.size, np.int64)
    flags = np.zeros((ids.size, 4), np.bool_)
    for row in range(ids.size):
        slot = np.int64(mix(ids[row]) & np.uint64(size - 1))
        while slots[slot] >= 0 and ids[slots[slot]] != ids[row]:
            slot = (slot + 1) & (size - 1)
        if slots[slot] < 0:
            slots[slot] = row
        first[row] = slots[slot]
        flags[first[row], 0] |= unsafe[row]
        flags[first[row], 1] |= blocked[row]
        flags[first[row], 2] |= explore[row]
    number = 0
    for row in by_score:
        of_video = flags[first[row]]
        if of_video[0]:
            aside[0] += 1
        elif of_video[1]:
            aside[1] += 1
        elif not np.isfinite(scores[row]):
            aside[2] += 1
        elif of_video[3]:
            aside[3] += 1
        else:
            of_video[3] = True
            kept[number], drawable[row] = row, of_video[2]
            number += 1
    return number


@numba.njit(cache=True, nogil=True)
def _has_tag(tags, known, row, tag, end):
    # Whether one of the first `end` tags of a row is this one.
    for g in range(end):
        if known[row, g] and tags[row, g] == tag:
            return True
    return False


@numba.njit(cache=True, nogil=True)
def _full_tags(tags, known, picked, start, size, most, full):
    # Writes the tags that `most` of the rows picked[start:size] have; returns how many they are.
    number = 0
    for step in range(start, size):
        row = picked[step]
        for g in range(tags.shape[1]):
            if not known[row, g] or _has_tag(tags, known, row, tags[row, g], g):
                continue
            count, listed = 0, False
            for other in range(start, size):
                has = _has_tag(tags, known, picked[other], tags[row, g], tags.shape[1])
                listed |= has and other < step
                count += has
            if count >= most and not listed:
                full[number] = tags[row, g]
                number += 1
    return number


@numba.njit(cache=True, nogil=True)
def _mark_tags(tags, known, rows, full, bit, broken):
    # Adds the bit to the rows that have one of these tags.
    for tag in full:
        for k in range(rows.size):
            if _has_tag(tags, known, rows[k], tag, tags.shape[1]):
                broken[k] |= bit


@numba.njit(cache=True, nogil=True)
def _mark_again(values, known, rows, last, bit, broken):
    # Adds the bit to the rows that have the author, or the sound, of one of the last rows of the feed.
    for other in last:
        if known[other]:
            for k in range(rows.size):
                if known[rows[k]] and values[rows[k]] == values[other]:
                    broken[k] |= bit


@numba.njit(cache=True, nogil=True)
def _mark(traits, rules, rows, picked, size, full, broken):
    # Writes the bits of the rules that each row would break as the next of the feed; returns the least sum of bits.
    broken[:] = 0
    start = max(0, size - rules.tag_window + 1)
    number = _full_tags(traits.tags, traits.tag_known, picked, start, size, rules.max_of_tag, full)
    _mark_tags(traits.tags, traits.tag_known, rows, full[:number], rules.tag_bit, broken)
    last = picked[max(0, size - rules.sound_gap) : size]
    _mark_again(traits.sounds, traits.sound_known, rows, last, rules.sound_bit, broken)
    last = picked[max(0, size - rules.author_gap) : size]
    _mark_again(traits.authors, traits.author_known, rows, last, rules.author_bit, broken)
    return broken.min()


@numba.njit(cache=True, nogil=True)
def _choose(rows, broken, least, relevance, limit, diversity, picked, size):
    # The index of the row that adds most, among the best `limit` that break no more than they must; ties: the better score.
    competing = np.flatnonzero(broken == least)[:limit]
    if diversity.kind == NONE:
        return competing[0]
    meet(diversity, rows[competing], picked, size)
    return competing[np.argmax(gains(diversity, rows[competing], relevance[competing]))]


@numba.njit(cache=True, nogil=True)
def _draw(rows, broken, least, drawable, u):
    # One of the drawable rows that break no more than they must, by u in [0, 1); its index (-1: none), and their number.
    number = 0
    for k in range(rows.size):
        number += broken[k] == least and drawable[rows[k]]
    at = min(np.int64(u * number), number - 1)
    for k in range(rows.size):
        if broken[k] == least and drawable[rows[k]]:
            if at == 0:
                return k, number
            at -= 1
    return -1, number


@numba.njit(cache=True, nogil=True)
def _relevance(scores, rows, limit):
    # Scores in standard deviations from the mean, both of the best `limit` rows.
    best = scores[rows[:limit]].astype(np.float64)
    spread = best.std() if best.size else 0.0
    return (scores[rows].astype(np.float64) - (best.mean() if best.size else 0.0)) / (spread if spread > 0 else 1.0)


@numba.njit(cache=True, nogil=True)
def fill(rows, scores, traits, rules, drawable, share, limit, diversity, uniform, picked, chance, explored, broken_at):
    """Fills a feed, from the first position to the last.

    Args:
        rows: int64 [M], the rows that may be shown, from the best to the worst; used up.
        scores: float32 [K].
        traits: Traits of the K candidates.
        rules: Rules.
        drawable: bool [K], which may be drawn to explore.
        share: Chance that a position explores.
        limit: How many of the best admissible rows compete by what they add.
        diversity: State of the empty feed.
        uniform: float64 [N, 2] in [0, 1), the random numbers of each position: whether it explores, what it draws.
        picked: int64 [N] out, the feed's rows.
        chance: float64 [N] out, the probability of each row given those before it.
        explored: bool [N] out.
        broken_at: int64 [N] out, the bits of the rules broken.

    Returns:
        The length of the feed, and the number of rows without a usable vector.
    """
    without = 0 if diversity.kind == NONE else measure(diversity, rows)
    relevance = _relevance(scores, rows, limit)
    broken = np.zeros(rows.size, np.int64)
    full = np.empty(picked.size * traits.tags.shape[1], np.int64)
    total = rows.size
    for size in range(picked.size):
        rows, relevance, broken = rows[: total - size], relevance[: total - size], broken[: total - size]
        least = _mark(traits, rules, rows, picked, size, full, broken)
        if least >= NEVER:
            return size, without
        best = _choose(rows, broken, least, relevance, limit, diversity, picked, size)
        drawn, number = _draw(rows, broken, least, drawable, uniform[size, 1])
        explored[size] = number > 0 and uniform[size, 0] < share
        pick = drawn if explored[size] else best
        chance[size] = 1.0 if pick == best and number == 0 else (1 - share) * (pick == best)
        if number > 0 and drawable[rows[pick]]:
            chance[size] += share / number
        if diversity.kind != NONE:
            meet(diversity, rows[pick : pick + 1], picked, size)
        picked[size], broken_at[size] = rows[pick], least
        for k in range(pick, rows.size - 1):
            rows[k], relevance[k] = rows[k + 1], relevance[k + 1]
    return picked.size, without
