"""The candidates of a request: the lists of all sources made one, each video once and none that was seen.

In: a list of videos of each source, best first, and how many are wanted of each. Out: the candidates, and which sources have
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from monolith_jax.ids.lines import jit, mix

SOURCES = ("two_tower", "fresh", "trending", "followed", "explore", "similar")
"""By their numbers. A video that several would give is given by the first of these, and the others give others."""
FILLS = ("two_tower", "similar", "trending", "fresh", "followed", "explore")
"""Who takes, in this order, the places that sources could not fill."""


class Merged(NamedTuple):
    """Candidates: first each source's own, in the order of `SOURCES`, then those that filled up."""

    ids: np.ndarray
    """int64 [K], distinct."""
    source: np.ndarray
    """int8 [K], the number of the source that gave each."""
    sources: np.ndarray
    """uint8 [K], bit s: source s has it in its list."""


@jit
def _distinct(ids, lists, firsts, masks):
    # firsts int32 [T] out: where each id stands first; masks uint8 [T] out, at the firsts: bits of the lists that have it.
    room = 16
    while room < 2 * ids.size:
        room *= 2
    mask, table = np.uint64(room - 1), np.full(room, -1, np.int32)
    for i in range(ids.size):
        at = mix(np.uint64(ids[i])) & mask
        while table[at] >= 0 and ids[table[at]] != ids[i]:
            at = (at + np.uint64(1)) & mask
        if table[at] < 0:
            table[at] = i
            masks[i] = 0
        firsts[i] = table[at]
        masks[table[at]] |= np.uint8(1) << np.uint8(lists[i])


@jit
def _choose(firsts, fine, quotas, order, fills, starts, taken, places, source):
    # Writes places and sources of candidates; returns how many. order, fills: numbers of sources, n. starts int64 [n + 1].
    number, total = 0, 0
    for s in quotas:
        total += s
    for turn in range(2):
        for s in order if turn == 0 else fills:
            left = min(quotas[s], total - number) if turn == 0 else total - number
            for i in range(starts[s], starts[s + 1]):
                if left <= 0:
                    break
                first = firsts[i]
                if fine[first] and not taken[first]:
                    taken[first] = True
                    places[number], source[number] = first, s
                    number += 1
                    left -= 1
    return number


def merge(
    lists: Mapping[str, np.ndarray], quotas: Mapping[str, int], unseen: Callable[[np.ndarray], np.ndarray] | None = None
) -> Merged:
    """Merges the lists of sources.

    Each source gives as many as its quota says, in its order, of those that no source before it in `SOURCES` has given. What is
    then still missing is taken from the rest of the lists, in the order of `FILLS`. So lists should be longer than the quotas.

    Args:
        lists: By names of `SOURCES`, int64 [N] each; those that are not there are empty.
        quotas: By names of `SOURCES`; those that are not there, or 0, are switched off: their lists are not looked at.
        unseen: Of ids, int64 [N]: which may be shown, bool [N].

    Raises:
        ValueError: There is no such source, or a quota is negative.
    """
    for name in (*lists, *quotas):
        if name not in SOURCES or quotas.get(name, 0) < 0:
            raise ValueError(f"{name!r} is no source with a quota of at least 0; sources are {', '.join(SOURCES)}")
    wanted = np.array([quotas.get(name, 0) for name in SOURCES], np.int64)
    none = np.zeros(0, np.int64)
    parts = [lists.get(name, none) if wanted[number] else none for number, name in enumerate(SOURCES)]
    sizes = [part.size for part in parts]
    ids = np.concatenate(parts).astype(np.int64, copy=False)
    numbers = np.repeat(np.arange(len(SOURCES), dtype=np.int8), sizes)
    firsts, masks = np.empty(ids.size, np.int32), np.zeros(ids.size, np.uint8)
    _distinct(ids, numbers, firsts, masks)
    fine = np.ones(ids.size, np.bool_) if unseen is None else unseen(ids)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    places, source = np.empty(ids.size, np.int64), np.empty(ids.size, np.int8)
    order, fills = np.arange(len(SOURCES)), np.array([SOURCES.index(name) for name in FILLS])
    number = _choose(firsts, fine, wanted, order, fills, starts, np.zeros(ids.size, np.bool_), places, source)
    places = places[:number]
    return Merged(ids[places], source[:number], masks[places])
