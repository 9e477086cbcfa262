"""Strings to 64-bit ids, once, at the edge.

In: an Arrow array of strings. Out: int64 ids, XXH64 with seed 0 of the UTF-8 bytes (the public algorithm of the xxHash
specification 0.2.0), so that any other system can compute the same ids. Two strings share an id with a chance of 2^-64.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.ids.lines import inline, jit

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)


@inline
def _rotate(x, bits):
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@inline
def _word(data, at, num_bytes):
    value = np.uint64(0)
    for k in range(num_bytes):
        value |= np.uint64(data[at + k]) << np.uint64(8 * k)
    return value


@inline
def _round(lane, value):
    return _rotate(lane + value * _P2, 31) * _P1


@jit
def _hash(data, start, stop):
    size = stop - start
    at = start
    if size >= 32:
        a, b, c, d = _P1 + _P2, _P2, np.uint64(0), np.uint64(0) - _P1
        while at + 32 <= stop:
            a, b = _round(a, _word(data, at, 8)), _round(b, _word(data, at + 8, 8))
            c, d = _round(c, _word(data, at + 16, 8)), _round(d, _word(data, at + 24, 8))
            at += 32
        h = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        for lane in (a, b, c, d):
            h = (h ^ _round(np.uint64(0), lane)) * _P1 + _P4
    else:
        h = _P5
    h += np.uint64(size)
    while at + 8 <= stop:
        h = _rotate(h ^ _round(np.uint64(0), _word(data, at, 8)), 27) * _P1 + _P4
        at += 8
    if at + 4 <= stop:
        h = _rotate(h ^ (_word(data, at, 4) * _P1), 23) * _P2 + _P3
        at += 4
    while at < stop:
        h = _rotate(h ^ (np.uint64(data[at]) * _P5), 11) * _P1
        at += 1
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return h ^ (h >> np.uint64(32))


@jit
def _hash_all(data, offsets, out):
    for i in range(out.size):
        out[i] = _hash(data, offsets[i], offsets[i + 1])


def string_ids(strings: pa.Array) -> np.ndarray:
    """Returns the int64 ids of an Arrow array of strings (null becomes the id of the empty string)."""
    strings = strings.cast(pa.large_string())
    if strings.null_count:  # A null may cover bytes in the buffer.
        strings = pc.fill_null(strings, "")
    _, offsets, data = strings.buffers()
    first = (
        np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
        if len(strings)
        else np.zeros(1, int)
    )
    raw = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)
    out = np.empty(len(strings), np.uint64)
    _hash_all(raw, first, out)
    return out.view(np.int64)
