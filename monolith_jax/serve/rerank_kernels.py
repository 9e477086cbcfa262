"""The numba kernels of the rerank: which rows may be shown, which rules a row would break, what it adds, the picks of a feed.

In: the arrays of a pool. Out: rows in the order of the feed, the chance of each, and the rules that it breaks.

A rule is a bit, larger where it is relaxed later, so the rows to choose from are those of the least sum of broken bits. A row
meets the feed only when it competes, so a feed costs as many products of vectors as rows competed, times picks. All kernels are
in this file because numba's cache does not see edits in another.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from monolith_jax.ids.lines import mix

NONE, DPP, MMR = 0, 1, 2
KINDS = {"none": NONE, "dpp": DPP, "mmr": MMR}

_FLOOR = 1e-6
"""Least squared distance from the span of the feed: a copy of a video in it is bad, not impossible, and logs stay finite."""
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


class Diversity(NamedTuple):
    """What is known of each candidate's likeness to the feed. K candidates, feed of at most N."""

    kind: int
    """NONE, DPP or MMR."""
    weight: float
    """From 0, relevance alone, to 1, diversity alone."""
    vectors: np.ndarray
    """float32 [K, D]."""
    norms: np.ndarray
    """float32 [K], the lengths of the vectors; 0: no usable vector, its cosine with all others is taken as 0."""
    met: np.ndarray
    """int64 [K], with how many of the feed's first videos each was compared."""
    left: np.ndarray
    """float64 [K]. DPP: the squared distance from the span of those. MMR: the greatest cosine with one of those."""
    factors: np.ndarray
    """float64 [K, N] for DPP, the rows of the Cholesky factor of the similarities; [K, 0] for MMR."""


def diversity_of(kind: int, weight: float, vectors: np.ndarray, number: int) -> Diversity:
    """Returns the state of an empty feed of at most `number` videos, for `vectors` float32 [K, D]."""
    size = len(vectors)
    left = np.ones(size) if kind == DPP else np.zeros(size)
    norms = np.zeros(size, np.float32)
    return Diversity(
        kind, weight, vectors, norms, np.zeros(size, np.int64), left, np.zeros((size, number if kind == DPP else 0))
    )


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
def _has_tag(tags, known, row, tag):
    for g in range(tags.shape[1]):
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
            if not known[row, g]:
                continue
            count, listed = 0, False
            for other in range(start, size):
                has = _has_tag(tags, known, picked[other], tags[row, g])
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
            if _has_tag(tags, known, rows[k], tag):
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


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dot(vectors, i, j):
    total = np.float32(0)
    for d in range(vectors.shape[1]):
        total += vectors[i, d] * vectors[j, d]
    return total


@numba.njit(cache=True, nogil=True)
def _measure(diversity, rows):
    """Fills the norms of some rows, int64 [M]; returns how many of them have no usable vector (NaN, inf or length 0)."""
    without = 0
    for row in rows:
        norm = np.sqrt(_dot(diversity.vectors, row, row))
        usable = np.isfinite(norm) and norm > 0
        diversity.norms[row] = norm if usable else np.float32(0)
        without += not usable
    return without


@numba.njit(cache=True, nogil=True)
def _meet(diversity, rows, picked, size):
    """Compares candidates with those of the feed that they were not yet compared with.

    DPP: one step of the incremental Cholesky factor a video (Chen, Zhang and Zhou, Fast Greedy MAP Inference for Determinantal
    Point Processes, NeurIPS 2018, algorithm 1), of (1 + cosine) / 2 as there: with bare cosines opposites would be alike.

    Args:
        diversity: The state.
        rows: int64 [M], candidates, none of them in the feed.
        picked: int64 [N], the feed's rows; each met those before it.
        size: How many of them there are.
    """
    vectors, norms, met, left = diversity.vectors, diversity.norms, diversity.met, diversity.left
    factors, is_dpp = diversity.factors, diversity.kind == DPP
    for row in rows:
        for step in range(met[row], size):
            other = picked[step]
            product = norms[row] * norms[other]
            cosine = float(_dot(vectors, row, other)) / product if product > 0 else 0.0
            if not is_dpp:
                left[row] = cosine if step == 0 else max(left[row], cosine)
            elif left[other] > _FLOOR:  # otherwise it lies in the span of those before it and takes nothing from others
                similarity = (1 + cosine) / 2
                for earlier in range(step):
                    similarity -= factors[row, earlier] * factors[other, earlier]
                factors[row, step] = similarity / np.sqrt(left[other])
                left[row] -= factors[row, step] ** 2
        met[row] = size


@numba.njit(cache=True, nogil=True)
def _gains(diversity, rows, relevance):
    """Returns what candidates that met the feed add to it, float64 [M]; `rows` is int64 [M], `relevance` float64 [M].

    DPP: their part of log det L, L = diag(q) S diag(q), S the similarities, q = exp((1 - weight) / (2 weight) * relevance),
    times the weight: that is (1 - weight) * relevance + weight * log(squared distance), and defined for a weight of 0 too.
    MMR: (1 - weight) * relevance - weight * greatest cosine (Carbonell and Goldstein, SIGIR 1998, lambda = 1 - weight).
    """
    likeness = np.zeros(rows.size)
    if diversity.kind == DPP:
        likeness = -np.log(np.maximum(diversity.left[rows], _FLOOR))
    elif diversity.kind == MMR:
        likeness = diversity.left[rows]
    return (1 - diversity.weight) * relevance - diversity.weight * likeness


@numba.njit(cache=True, nogil=True)
def _choose(rows, broken, least, relevance, limit, diversity, picked, size):
    # The index of the row that adds most, among the best `limit` that break no more than they must; ties: the better score.
    competing = np.flatnonzero(broken == least)[:limit]
    if diversity.kind == NONE:
        return competing[0]
    _meet(diversity, rows[competing], picked, size)
    return competing[np.argmax(_gains(diversity, rows[competing], relevance[competing]))]


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
    without = 0 if diversity.kind == NONE else _measure(diversity, rows)
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
            _meet(diversity, rows[pick : pick + 1], picked, size)
        picked[size], broken_at[size] = rows[pick], least
        for k in range(pick, rows.size - 1):
            rows[k], relevance[k] = rows[k + 1], relevance[k + 1]
    return picked.size, without
