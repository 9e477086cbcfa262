"""Blocks of int8 vectors, and the kernel that scores one against a query: as fast as memory gives the bytes.

Layout (the contract). A block has 32 lanes, one vector each, and its bytes lie as [D / 4, 32 lanes, 4]: of each vector four
bytes, then four of the next one. So one 64-byte load holds four numbers of 16 vectors, one instruction (vpdpbusd of AVX-512
VNNI) multiplies them by four of the query's and adds them up in each lane, and no sum across lanes is ever needed. Bytes are
unsigned, the number plus 128, because that instruction wants one side unsigned. A vector is its numbers times its scale; an
empty lane has the scale NaN, so that its score is above no threshold.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from monolith_jax.ids.lines import inline

LANES = 32
OFFSET = 128
"""Added to a number so that it is unsigned."""

_HALF = 16
"""Lanes of one register."""
_INT8, _INT32, _INT64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_INT32, _HALF), ir.VectorType(_FLOAT, _HALF)

_intrinsic: Any = intrinsic
_given: str | None = config.CPU_FEATURES  # pyright: ignore[reportAttributeAccessIssue]
_FEATURES = get_host_cpu_features() if _given is None else _given
HAS_VNNI = "+avx512vnni" in _FEATURES
"""Whether kernels are compiled for a machine with that instruction; on others plain vectors give the same sums."""
_HAS_HALVES = "+f16c" in _FEATURES or platform.machine() not in ("x86_64", "AMD64")
"""Whether a float16 becomes a float32 by one instruction; on old x86 LLVM would call a function that numba does not have."""


def _at(builder: Any, address: Any, offset: Any, to: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), ir.PointerType(to))


def _splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _INT32(0))
    lanes = ir.Constant(ir.VectorType(_INT32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, one, lanes)


def _dot4(builder: Any, total: Any, words: Any, query: Any) -> Any:
    """Adds to each lane the product of its four unsigned bytes and the four signed ones of int32 `query`."""
    if HAS_VNNI:
        bytes_64 = ir.VectorType(_INT8, 64)
        signature = ir.FunctionType(_WORDS, [_WORDS, bytes_64, bytes_64])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512.vpdpbusd.512")
        of_query = _splat(builder, query, _WORDS)
        return builder.call(function, [total, builder.bitcast(words, bytes_64), builder.bitcast(of_query, bytes_64)])
    for byte in range(4):
        shift = ir.Constant(_WORDS, [8 * byte] * _HALF)
        low = builder.and_(builder.lshr(words, shift), ir.Constant(_WORDS, [255] * _HALF))
        signed = builder.ashr(builder.shl(query, _INT32(24 - 8 * byte)), _INT32(24))
        total = builder.add(total, builder.mul(low, _splat(builder, signed, _WORDS)))
    return total


@_intrinsic
def score_block(typing_context, block, query, groups, start, scale, scales, threshold, out):
    """Scores a block; returns a bit for each lane whose score is above the threshold.

    Args:
        block: Address of its bytes, 64-byte aligned, as `scales` must be.
        query: Address of the query's int8 numbers [D].
        groups: D / 4.
        start: int32: minus OFFSET times the sum of the query's numbers.
        scale: float32 of the query.
        scales: Address of float32 [32].
        threshold: float32.
        out: Address of float32 [32], the scores.
    """

    def codegen(context, builder, signature, arguments):
        block, query, groups, start, scale, scales, threshold, out = arguments
        totals = [cgutils.alloca_once_value(builder, _splat(builder, start, _WORDS)) for _ in range(2)]
        with cgutils.for_range(builder, groups) as loop:
            four = builder.load(_at(builder, query, builder.mul(loop.index, _INT64(4)), _INT32))
            place = builder.mul(loop.index, _INT64(4 * LANES))
            for half, total in enumerate(totals):
                at = builder.add(place, _INT64(64 * half))
                words = builder.load(_at(builder, block, at, _WORDS), align=64)
                builder.store(_dot4(builder, builder.load(total), words, four), total)
        mask = _INT64(0)
        for half, total in enumerate(totals):
            at = _INT64(64 * half)
            scores = builder.sitofp(builder.load(total), _FLOATS)
            of_lanes = builder.load(_at(builder, scales, at, _FLOATS), align=64)
            scores = builder.fmul(builder.fmul(scores, of_lanes), _splat(builder, scale, _FLOATS))
            builder.store(scores, _at(builder, out, at, _FLOATS), align=4)
            above = builder.fcmp_ordered(">", scores, _splat(builder, threshold, _FLOATS))
            bits = builder.zext(builder.bitcast(above, ir.IntType(16)), _INT64)
            mask = builder.or_(mask, builder.shl(bits, _INT64(16 * half)))
        return mask

    int64 = types.int64
    return int64(int64, int64, int64, types.int32, types.float32, int64, types.float32, int64), codegen


@_intrinsic
def first_bit(typing_context, mask):
    """Returns the place of the lowest bit of an int64 that is not 0."""

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), codegen


@_intrinsic
def float_of_half(typing_context, bits):
    """Returns the float32 of the finite float16 whose bits are a uint16."""

    def codegen(context, builder, signature, arguments):
        if _HAS_HALVES:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), _FLOAT)
        bits = builder.zext(arguments[0], _INT32)
        size = builder.shl(builder.and_(bits, _INT32(0x7FFF)), _INT32(13))  # as a float32 with the exponent's smaller bias
        signed = builder.or_(size, builder.shl(builder.and_(bits, _INT32(0x8000)), _INT32(16)))
        return builder.fmul(builder.bitcast(signed, _FLOAT), _FLOAT(2.0**112))

    return types.float32(types.uint16), codegen


@inline
def scale_of(vector):
    """Returns the scale of a float32 [D] as int8, 0 for zeros."""
    most = np.float32(0)
    for d in range(vector.size):
        most = max(most, abs(vector[d]))
    return most / np.float32(127)


@inline
def quantise(vector, numbers):
    """Writes float32 [D] as int8 `numbers` [padded D], which is zeros before; returns their scale and `start`."""
    scale = scale_of(vector)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    total = np.int32(0)
    for d in range(vector.size):
        number = np.int32(np.rint(vector[d] * inverse))
        numbers[d] = number
        total += number
    return scale, np.int32(-OFFSET * total)


@inline
def write_lane(data, scales, block, lane, vector):
    """Writes float32 [D] to a lane of `data` uint8 [B, G, 32, 4] and its scale to float32 `scales` [B, 32]."""
    scale = scale_of(vector)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for d in range(vector.size):
        data[block, d >> 2, lane, d & 3] = np.uint8(np.int32(np.rint(vector[d] * inverse)) + OFFSET)
    scales[block, lane] = scale
