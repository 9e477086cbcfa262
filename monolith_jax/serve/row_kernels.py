"""The numba kernels of the serving copy: ids to places of rows, rows written as they are stored, rows read as float32.

A place is shard * R + the row in the shard, -1 where an id has no row. The GIL is released, and memory is asked for ahead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from monolith_jax.ids.lines import SLOTS, first_bucket, jit, load, mix, prefetch, second_bucket, shard_of, slot_of

_BLOCK = 64
"""Ids whose lines are asked for before the first of them is looked for."""
_AHEAD = 16
"""Rows ahead that are asked for."""

_intrinsic: Any = intrinsic


@_intrinsic
def _float_of_half(typing_context, bits):
    """Returns the float32 of the float16 whose bits are a uint16: one instruction where the machine has it."""

    def codegen(context, builder, signature, arguments):
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.uint16), codegen


@jit
def places_of_batch(ids, valid, position_tables, tables, row_offsets, rows_per_shard, lines, places):
    """Writes the place of each id of a batch.

    Args:
        ids: uint64 [B, P].
        valid: bool [B, P], whether the position holds an id.
        position_tables: int32 [P], the table of each position's ids.
        tables: Sizes of the maps.
        row_offsets: int64 [T], where each table's rows start in a shard.
        rows_per_shard: R.
        lines: uint32 [L * lines_per_shard, 16], the maps.
        places: int64 [B, P] out; -1 too where there is no id.
    """
    address, num_positions = np.int64(lines.ctypes.data), ids.shape[1]
    flat_ids, flat_valid, flat_places = ids.reshape(-1), valid.reshape(-1), places.reshape(-1)
    hashes, starts = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.int64)
    position = 0
    for first in range(0, flat_ids.size, _BLOCK):
        size, first_position = min(_BLOCK, flat_ids.size - first), position
        for j in range(size):
            table = position_tables[position]
            position = position + 1 if position + 1 < num_positions else 0
            h = mix(flat_ids[first + j] ^ tables.seeds[table])
            hashes[j] = h
            starts[j] = address + 64 * (shard_of(h, tables) * tables.lines_per_shard + tables.bucket_offsets[table])
            prefetch(starts[j] + 64 * first_bucket(h, tables.num_buckets[table]))
        position = first_position
        for j in range(size):
            table = position_tables[position]
            position = position + 1 if position + 1 < num_positions else 0
            flat_places[first + j] = -1
            if not flat_valid[first + j]:
                continue
            h, buckets = hashes[j], tables.num_buckets[table]
            line = starts[j] + 64 * first_bucket(h, buckets)
            slot = slot_of(line, h)
            if slot == SLOTS:
                line = starts[j] + 64 * second_bucket(h, buckets)
                slot = slot_of(line, h)
            if slot < SLOTS:
                row = np.int64(load(line + 32 + 4 * slot))
                flat_places[first + j] = shard_of(h, tables) * rows_per_shard + row_offsets[table] + row


@jit
def write_rows(rows, places, source):
    """Copies `source` [N, D] to the places int64 [N] of `rows` [R, D] of equal type; those at -1 are left out."""
    address, width = np.int64(rows.ctypes.data), rows.shape[1] * rows.itemsize
    for i in range(places.size):
        ahead = places[min(i + _AHEAD, places.size - 1)]
        for byte in range(0, width, 64):
            prefetch(address + ahead * width + byte)
        if places[i] >= 0:
            for d in range(rows.shape[1]):
                rows[places[i], d] = source[i, d]


@jit
def write_scales(scales, places, source):
    """Copies float32 `source` [N] to the places int64 [N] of `scales`; those at -1 are left out."""
    for i in range(places.size):
        if places[i] >= 0:
            scales[places[i]] = source[i]


@jit
def read_float32(rows, places, out):
    """Writes the rows of float32 `rows` [R, D] at places int64 [N] into float32 `out` [N, D]; zeros for places of -1."""
    address, width = np.int64(rows.ctypes.data), rows.shape[1] * rows.itemsize
    for i in range(places.size):
        prefetch(address + places[min(i + _AHEAD, places.size - 1)] * width)
        place = places[i]
        if place < 0:
            out[i, :] = 0
        else:
            for d in range(rows.shape[1]):
                out[i, d] = rows[place, d]


@jit
def read_float16(bits, places, out):
    """Does what `read_float32` does for the bits of float16 rows, uint16 [R, D]."""
    address, width = np.int64(bits.ctypes.data), bits.shape[1] * bits.itemsize
    for i in range(places.size):
        prefetch(address + places[min(i + _AHEAD, places.size - 1)] * width)
        place = places[i]
        if place < 0:
            out[i, :] = 0
        else:
            for d in range(bits.shape[1]):
                out[i, d] = _float_of_half(bits[place, d])


@jit
def read_int8(rows, scales, places, out):
    """Does what `read_float32` does for int8 rows [R, D], each times its float32 scale [R]."""
    address, width = np.int64(rows.ctypes.data), rows.shape[1] * rows.itemsize
    for i in range(places.size):
        prefetch(address + places[min(i + _AHEAD, places.size - 1)] * width)
        place = places[i]
        if place < 0:
            out[i, :] = 0
        else:
            for d in range(rows.shape[1]):
                out[i, d] = np.float32(rows[place, d]) * scales[place]
