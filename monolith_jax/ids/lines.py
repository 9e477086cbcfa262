"""The byte layout of the id maps: lines, hashes and buckets, and what all kernels are compiled with.

Layout (the contract; another backend may replace the kernels). A *line* is 64 bytes, 16 words of uint32: words 0-7 are four
hashes (uint64, little endian), words 8-11 their rows in the shard's table (int32, -1: the slot is empty), words 12-15 when each
id was last seen (uint32 seconds of event time). Emptiness is the row's, so every id is legal. An id may live in two buckets of
its table and shard, a bucket being one line. Lines of all tables of a shard are neighbours:
`lines[shard, bucket_offset[table] + bucket]`.

hash = mix(id ^ seed of the table), a bijection (Stafford's variant 13 of the 64-bit murmur3 finaliser), so the hash is as good
a key as the id. Its top bits are the shard, its low 32 bits choose the first bucket, the high half of a second product the
other one, both by multiply-shift (Lemire 2019, "Fast random integer generation in an interval"), so that any number of buckets
will do.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from monolith_jax.types import Array

SLOTS = 4
LINE_WORDS = 16
ABSENT = -1
"""In `rows`: the id has no row."""
NOT_ADMITTED = -2
"""In `rows`: the id has no row and must not get one."""

_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_M1_INVERSE = np.uint64(pow(0xBF58476D1CE4E5B9, -1, 2**64))
_M2_INVERSE = np.uint64(pow(0x94D049BB133111EB, -1, 2**64))
_M3 = np.uint64(0x9E3779B97F4A7C15)
_S27 = np.uint64(27)
_S30 = np.uint64(30)
_S31 = np.uint64(31)
_S32 = np.uint64(32)
_S54 = np.uint64(54)
_S60 = np.uint64(60)
_S62 = np.uint64(62)
_LOW32 = np.uint64(0xFFFFFFFF)


class Tables(NamedTuple):
    """The sizes of the tables of a group in one shard; T tables."""

    seeds: Array
    """uint64 [T]"""
    bucket_offsets: Array
    """int64 [T], where each table's lines start in a shard."""
    num_buckets: Array
    """int64 [T]"""
    word_offsets: Array
    """int64 [T], where each table's bits of used rows start in a shard."""
    caps: Array
    """int64 [T], most rows."""
    lines_per_shard: int
    shard_shift: Any
    """uint64: 64 - log2 L."""
    shard_mask: Any
    """uint64: shards of this process - 1. They are neighbours, and counted from its first one."""


class Maps(NamedTuple):
    """The arrays of the maps."""

    lines: Array
    """uint32 [L * lines_per_shard, 16], 64-byte aligned."""
    used: Array
    """uint32 [L, words]: a bit for each row, set while an id has it."""
    counts: Array
    """int32 [L, T], rows in use."""
    cursors: Array
    """int32 [L, T], the word where the search for a free row starts."""


class Distinct(NamedTuple):
    """Distinct ids in ranges: those of range s are `starts[s]` to `starts[s] + numbers[s]`."""

    starts: Array
    """int64 [L or 1]"""
    numbers: Array
    """int64, like `starts`."""
    hashes: Array
    """uint64 [N], as all that follow."""
    tables: Array
    """int32, index of each id's table."""
    counts: Array
    """int32, how often the batch holds the id."""
    seen_s: Array
    """uint32, latest event time in the batch, seconds."""
    rows: Array
    """int32, row in the shard's table, ABSENT or NOT_ADMITTED."""
    fresh: Array
    """bool, whether the row was given in this plan."""
    absent: Array
    """int32 [N], of each range, from its start on: which ids had no row."""
    num_absent: Array
    """int64, like `starts`."""


def make_distinct(size: int, num_ranges: int) -> Distinct:
    """Returns room for `size` ids in so many ranges, all of them empty."""
    starts, numbers, num_absent = (np.zeros(num_ranges, np.int64) for _ in range(3))
    tables, counts, rows, absent = (np.empty(size, np.int32) for _ in range(4))
    hashes, seen_s, fresh = np.empty(size, np.uint64), np.empty(size, np.uint32), np.empty(size, np.bool_)
    return Distinct(starts, numbers, hashes, tables, counts, seen_s, rows, fresh, absent, num_absent)


def places_of(starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns the places in ranges, one range after the other: `starts[r]` to `starts[r] + numbers[r]`, int64 [N]."""
    return np.arange(numbers.sum()) + np.repeat(starts - (numbers.cumsum() - numbers), numbers)


@functools.cache
def _stamp(folder: Path) -> tuple[tuple[float, int], ...]:
    files = sorted({*Path(__file__).parent.glob("*.py"), *folder.glob("*.py")})
    return tuple((path.stat().st_mtime, path.stat().st_size) for path in files)


def jit(function: Any = None, **options: Any) -> Any:
    """Compiles with numba at the first call; cached on disk where some folder can be written."""
    if function is None:
        return functools.partial(jit, **options)
    options |= {"nogil": True, "boundscheck": False, "error_model": "numpy", "no_cfunc_wrapper": True}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder for its cache
        return numba.njit(**options)(function)
    # numba's cache does not see edits in another module whose functions were inlined, and would run the old ones. Such a
    # module is one of these, or lies beside the caller.
    file = compiled._cache._cache_file  # pyright: ignore[reportAttributeAccessIssue]
    file._source_stamp = (file._source_stamp, _stamp(Path(function.__code__.co_filename).parent))
    return compiled


def inline(function: Any) -> Any:
    """Compiles into its callers."""
    return jit(function, inline="always")


def inner(function: Any) -> Any:
    """Compiles for other kernels to call; to call it from Python is a crash. Wrappers took a fifth of the time of compiling."""
    return jit(function, no_cpython_wrapper=True)


_BYTES = ir.PointerType(ir.IntType(8))


_intrinsic: Any = intrinsic


def _pointer(builder: Any, address: Any, to: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(to))


@_intrinsic
def prefetch(typing_context, address):
    """Asks for the cache line at an int64 address."""

    def codegen(context, builder, signature, arguments):
        int32 = ir.IntType(32)
        signature_ir = ir.FunctionType(ir.VoidType(), [_BYTES, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, signature_ir, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(arguments[0], _BYTES), int32(0), int32(3), int32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@_intrinsic
def slot_of(typing_context, address, key):
    """Returns the slot of a hash in the line at an int64 address, 4 if it is not there: one vector compare, no branch."""

    def codegen(context, builder, signature, arguments):
        int32, int64 = ir.IntType(32), ir.IntType(64)
        keys = builder.load(_pointer(builder, arguments[0], ir.VectorType(int64, 4)), align=32)
        rows_at = builder.add(arguments[0], int64(32))
        rows = builder.load(_pointer(builder, rows_at, ir.VectorType(int32, 4)), align=16)
        one = builder.insert_element(ir.Constant(ir.VectorType(int64, 4), ir.Undefined), arguments[1], int32(0))
        all_lanes = ir.Constant(ir.VectorType(int32, 4), [0, 0, 0, 0])
        wanted = builder.shuffle_vector(one, one, all_lanes)
        there = builder.icmp_signed(">=", rows, ir.Constant(ir.VectorType(int32, 4), [0, 0, 0, 0]))
        match = builder.and_(builder.icmp_unsigned("==", keys, wanted), there)
        mask = builder.zext(builder.bitcast(match, ir.IntType(4)), int64)
        return builder.cttz(builder.or_(mask, int64(16)), ir.IntType(1)(1))

    return types.int64(types.int64, types.uint64), codegen


@_intrinsic
def load(typing_context, address):
    """Returns the int32 at an int64 address."""

    def codegen(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0], ir.IntType(32)))

    return types.int32(types.int64), codegen


@_intrinsic
def store(typing_context, address, value):
    """Writes an int32 to an int64 address."""

    def codegen(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], ir.IntType(32)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int32), codegen


@inline
def mix(x):
    """Returns the hash of a uint64, a bijection of the 64-bit integers."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@inline
def unmix(x):
    """Returns what `mix` made x of."""
    x = (x ^ (x >> _S31) ^ (x >> _S62)) * _M2_INVERSE
    x = (x ^ (x >> _S27) ^ (x >> _S54)) * _M1_INVERSE
    return x ^ (x >> _S30) ^ (x >> _S60)


@inline
def shard_of(h, tables):
    """Returns the shard of a hash, counted from the process's first one."""
    return np.int64((h >> tables.shard_shift) & tables.shard_mask)


@inline
def first_bucket(h, num_buckets):
    """Returns the bucket that an id is looked for first."""
    return np.int64(((h & _LOW32) * np.uint64(num_buckets)) >> _S32)


@inline
def second_bucket(h, num_buckets):
    """Returns the other bucket, never the first one where there are two."""
    bucket = np.int64((((h * _M3) >> _S32) * np.uint64(num_buckets)) >> _S32)
    if bucket == first_bucket(h, num_buckets):
        bucket += 1
        if bucket == num_buckets:
            bucket = 0
    return bucket
