"""Which bucket an impression is in, told by its key: four bytes an impression.

In: hashes of keys, and the number of a bucket below `BUCKETS` for each. Out: the buckets that a key may be in; a bucket that it
is not in is named once in some hundred thousand times, the one that it is in always.

An entry is uint32: a tag of 22 bits of the hash, never 0, above ten bits of the bucket; 0: empty. A *line* is 16 entries, a
cache line. An entry stands in the emptier one of two lines (Mitzenmacher 2001, "The power of two choices in randomized load
balancing"), so that lines fill evenly and few are full before nine tenths of all entries are taken. The other line follows from
line and tag (Fan et al. 2014, "Cuckoo Filter"): keys that are taken for one another share both lines, and of their entries any
may be removed for any. What finds both lines full, as a key does that came in very many buckets, goes to a sorted list.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable

import numpy as np

from monolith_jax.ids.lines import inline, jit, places_of, prefetch

BUCKETS = 1024
NOWHERE = -1
"""No bucket may have the key."""
SEVERAL = -2
"""More than one bucket may have it: ask `candidates`."""

FULL = 0.86
"""The part of all entries that is taken when the lines are made more."""

_WIDTH = 16
_AHEAD = 12
_M = np.uint64(0x9E3779B97F4A7C15)
_S32 = np.uint64(32)
_S10 = np.uint64(10)


@inline
def _first_line(h, num_lines):
    return np.int64(((h >> _S32) * np.uint64(num_lines)) >> _S32)


@inline
def _tag_of(h, tag_mask):
    return np.uint32(max(h & tag_mask, np.uint64(1)))


@inline
def _other_line(line, tag, num_lines):
    other = np.int64((((np.uint64(tag) * _M) >> _S32) * np.uint64(num_lines)) >> _S32) - line
    return other + num_lines if other < 0 else other


@inline
def _ask(lines, h, tag_mask):
    address, line = np.int64(lines.ctypes.data), _first_line(h, lines.shape[0])
    prefetch(address + 64 * line)
    prefetch(address + 64 * _other_line(line, _tag_of(h, tag_mask), lines.shape[0]))


@jit
def _route(hashes, lines, tag_mask, buckets):
    for i in range(hashes.size):
        if i + _AHEAD < hashes.size:
            _ask(lines, hashes[i + _AHEAD], tag_mask)
        h = hashes[i]
        tag = _tag_of(h, tag_mask)
        a = _first_line(h, lines.shape[0])
        b = _other_line(a, _tag_of(h, tag_mask), lines.shape[0])
        most, least = np.int32(-1), np.int32(BUCKETS)
        for k in range(_WIDTH):
            entry = lines[a, k]
            bucket = np.int32(entry & np.uint32(1023))
            same = (entry >> np.uint32(10)) == tag
            most = max(most, bucket if same else np.int32(-1))
            least = min(least, bucket if same else np.int32(BUCKETS))
            entry = lines[b, k]
            bucket = np.int32(entry & np.uint32(1023))
            same = (entry >> np.uint32(10)) == tag
            most = max(most, bucket if same else np.int32(-1))
            least = min(least, bucket if same else np.int32(BUCKETS))
        buckets[i] = most if most == least or most < 0 else np.int32(SEVERAL)


@jit
def _candidates(hashes, lines, tag_mask, which, buckets):
    number = 0
    for i in range(hashes.size):
        h = hashes[i]
        tag = _tag_of(h, tag_mask)
        a = _first_line(h, lines.shape[0])
        b = _other_line(a, _tag_of(h, tag_mask), lines.shape[0])
        start = number
        for k in range(2 * _WIDTH):
            entry = lines[a if k < _WIDTH else b, k % _WIDTH]
            if (entry >> np.uint32(10)) != tag:
                continue
            bucket, known = np.int32(entry & np.uint32(1023)), False
            for j in range(start, number):
                known |= buckets[j] == bucket
            if not known:
                which[number], buckets[number] = i, bucket
                number += 1
    return number


@jit
def _insert(hashes, buckets, lines, tag_mask, crowded):
    """Writes the places of those that found both of their lines full; returns how many."""
    number = 0
    for i in range(hashes.size):
        if i + _AHEAD < hashes.size:
            _ask(lines, hashes[i + _AHEAD], tag_mask)
        h = hashes[i]
        a = _first_line(h, lines.shape[0])
        b = _other_line(a, _tag_of(h, tag_mask), lines.shape[0])
        # Entries of a line are kept together at its start, so that the number of taken ones is the place of the next.
        taken_a, taken_b = 0, 0
        for k in range(_WIDTH):
            taken_a += lines[a, k] != 0
            taken_b += lines[b, k] != 0
        line, taken = (a, taken_a) if taken_a <= taken_b else (b, taken_b)
        if taken == _WIDTH:
            crowded[number] = i
            number += 1
        else:
            lines[line, taken] = (_tag_of(h, tag_mask) << np.uint32(10)) | np.uint32(buckets[i])
    return number


@jit
def _remove(hashes, buckets, lines, tag_mask, missing):
    """Writes the places of those that were not there; returns how many."""
    number = 0
    for i in range(hashes.size):
        if i + _AHEAD < hashes.size:
            _ask(lines, hashes[i + _AHEAD], tag_mask)
        h = hashes[i]
        entry = (_tag_of(h, tag_mask) << np.uint32(10)) | np.uint32(buckets[i])
        a, place = _first_line(h, lines.shape[0]), -1
        for line in (a, _other_line(a, _tag_of(h, tag_mask), lines.shape[0])):
            last = -1
            for k in range(_WIDTH):
                place = k if lines[line, k] == entry else place
                last = k if lines[line, k] != 0 else last
            if place >= 0:
                lines[line, place] = lines[line, last]
                lines[line, last] = 0
                break
        if place < 0:
            missing[number] = i
            number += 1
    return number


@jit
def _codes(hashes, lines, tag_mask, codes):
    """Writes what is the same for keys that are taken for one another, above ten bits of zeros."""
    for i in range(hashes.size):
        tag = _tag_of(hashes[i], tag_mask)
        a = _first_line(hashes[i], lines.shape[0])
        b = _other_line(a, tag, lines.shape[0])
        codes[i] = (np.uint64(min(a, b)) << _S32) | (np.uint64(tag) << _S10)


def _empty_lines(number: int) -> np.ndarray:
    """Returns uint32 [number, 16] of zeros, in pages of their own: lines that are dropped go back to the system at once."""
    align = 2**21 if number * 64 > 2**22 else 64
    pages = mmap.mmap(-1, number * 64 + align)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(pages, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + number * 64].view(np.uint32).reshape(number, _WIDTH)


class Router:
    """The lines. One caller at a time."""

    def __init__(self, min_lines: int = 1024, tag_bits: int = 22, growth: float = 1.5) -> None:
        """Makes an empty one.

        Args:
            min_lines: Lines to begin with.
            tag_bits: Bits of the tag; fewer than 22 only to see what false matches do.
            growth: By which factor lines become more.
        """
        self._lines = _empty_lines(min_lines)
        self._mask = np.uint64(2**tag_bits - 1)
        self._growth = growth
        self._crowded = np.empty(0, np.uint64)
        self.num_entries = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        return self._lines.nbytes + self._crowded.nbytes

    def route(self, hashes: np.ndarray) -> np.ndarray:
        """Returns the bucket that may have each key, NOWHERE or SEVERAL; int32 [N]."""
        buckets = np.empty(hashes.size, np.int32)
        _route(hashes, self._lines, self._mask, buckets)
        if self._crowded.size:
            first, last = self._crowded_of(hashes)
            buckets[first < last] = SEVERAL
        return buckets

    def candidates(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns pairs: which of the hashes, int64 [P] ascending, and a bucket that may have it, int32 [P]."""
        which, buckets = np.empty(2 * _WIDTH * hashes.size, np.int64), np.empty(2 * _WIDTH * hashes.size, np.int32)
        number = _candidates(hashes, self._lines, self._mask, which, buckets)
        which, buckets = which[:number], buckets[:number]
        if self._crowded.size:
            first, last = self._crowded_of(hashes)
            further = np.repeat(np.arange(hashes.size), last - first)
            there = self._crowded[places_of(first, last - first)] % BUCKETS
            pairs = np.unique(np.concatenate([which * BUCKETS + buckets, further * BUCKETS + there.astype(np.int64)]))
            which, buckets = pairs // BUCKETS, (pairs % BUCKETS).astype(np.int32)
        return which, buckets

    def _crowded_of(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = self._codes(hashes)
        return np.searchsorted(self._crowded, codes), np.searchsorted(self._crowded, codes + np.uint64(BUCKETS))

    def _codes(self, hashes: np.ndarray) -> np.ndarray:
        codes = np.empty(hashes.size, np.uint64)
        _codes(hashes, self._lines, self._mask, codes)
        return codes

    def insert(
        self, hashes: np.ndarray, buckets: np.ndarray, everything: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
    ) -> None:
        """Adds keys.

        Args:
            hashes: uint64 [N]
            buckets: int32 [N]
            everything: Called when the lines become more: yields hashes and buckets of all keys there are, these included.
                Which keys are taken for one another changes then.
        """
        self.num_entries += hashes.size
        if self.num_entries <= FULL * self._lines.size:
            self._place(hashes, buckets)
            return
        number = int(max(self._lines.shape[0] * self._growth, self.num_entries / (FULL * _WIDTH) * 1.05)) + 1
        del self._lines  # The keys are read anew, so that old and new lines never stand side by side.
        self._lines, self._crowded = _empty_lines(number), self._crowded[:0]
        for part in everything():
            self._place(*part)

    def remove(self, hashes: np.ndarray, buckets: np.ndarray) -> None:
        """Takes keys out that were inserted with these buckets."""
        missing = np.empty(hashes.size, np.int64)
        missing = missing[: _remove(hashes, buckets, self._lines, self._mask, missing)]
        if missing.size:
            codes, numbers = np.unique(self._codes(hashes[missing]) + buckets[missing].astype(np.uint64), return_counts=True)
            places = places_of(np.searchsorted(self._crowded, codes), numbers)
            there = self._crowded[np.minimum(places, self._crowded.size - 1)] if self._crowded.size else codes[:0]
            assert np.array_equal(there, np.repeat(codes, numbers)), "keys are removed that were not in the router"
            self._crowded = np.delete(self._crowded, places)
        self.num_entries -= hashes.size

    def _place(self, hashes: np.ndarray, buckets: np.ndarray) -> None:
        crowded = np.empty(hashes.size, np.int64)
        crowded = crowded[: _insert(hashes, buckets, self._lines, self._mask, crowded)]
        if crowded.size:
            codes = self._codes(hashes[crowded]) + buckets[crowded].astype(np.uint64)
            self._crowded = np.sort(np.concatenate([self._crowded, codes]))
