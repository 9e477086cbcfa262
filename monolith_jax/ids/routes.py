"""Which row goes from which device to which slice of the batch: the numba kernels behind the index arrays of a plan.

In: the distinct ids of a batch by shard with their rows, and where each stands in the batch. Out: the arrays of `GroupPlan`.
A device owns neighbouring shards, so what it touches is what its shards touch, one after the other.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.lines import inner, jit


@jit
def count_routes(distinct, ends, positions, inverse, slice_positions, from_shard, to_shard, last_slice, num_touched, num_sent):
    """Counts the rows that each shard touches, and those that each slice of the batch asks of it.

    Args:
        distinct: Distinct ids with their rows.
        ends, positions, inverse: Occurrences by shard, as from `batch`.
        slice_positions: Positions of one of the S slices of the batch.
        from_shard, to_shard: Range of shards.
        last_slice: int32 [N] scratch.
        num_touched, num_sent: int64 [L] and [L, S] out, zeroed by the caller.
    """
    starts, rows = distinct.starts, distinct.rows
    for shard in range(from_shard, to_shard):
        start = starts[shard]
        for i in range(start, start + distinct.numbers[shard]):
            last_slice[i] = -1
            num_touched[shard] += rows[i] >= 0
        if num_sent.shape[1] == 1:
            num_sent[shard, 0] = num_touched[shard]
            continue
        s, slice_end = 0, slice_positions
        for k in range(start, ends[shard]):
            while positions[k] >= slice_end:
                s += 1
                slice_end += slice_positions
            i = start + inverse[k]
            if rows[i] >= 0 and last_slice[i] != s:
                last_slice[i] = s
                num_sent[shard, s] += 1


@inner
def _fill_for_one(distinct, ends, positions, inverse, shard, touched_at, sent, out_positions):
    """One device: it sends itself what it touches, in that order."""
    start, rows = distinct.starts[shard], distinct.rows
    refused = np.int32(sent.shape[2])
    for i in range(start, start + distinct.numbers[shard]):
        if rows[i] >= 0:
            sent[0, 0, touched_at[i]] = touched_at[i]
        else:
            touched_at[i] = refused
    for k in range(start, ends[shard]):
        out_positions[positions[k]] = touched_at[start + inverse[k]]


@inner
def _fill_for_slices(
    distinct, ends, positions, inverse, slice_positions, shard, owner, first_sent, last_slice, sent_at, touched_at, sent,
    out_positions,
):  # fmt: skip
    """Several devices: each slice is sent what it asks for, in the order in which it first asks."""
    start, rows, size = distinct.starts[shard], distinct.rows, sent.shape[2]
    s, slice_end = 0, slice_positions
    for k in range(start, ends[shard]):
        while positions[k] >= slice_end:
            s += 1
            slice_end += slice_positions
        i = start + inverse[k]
        if rows[i] < 0:
            out_positions[positions[k]] = sent.shape[0] * size
            continue
        if last_slice[i] != s:
            last_slice[i] = s
            u = first_sent[shard, s]
            first_sent[shard, s] = u + 1
            sent[owner, s, u] = touched_at[i]
            sent_at[i] = owner * size + u
        out_positions[positions[k]] = sent_at[i]


@jit
def fill_routes(
    distinct, ends, positions, inverse, slice_positions, from_shard, to_shard, shards_per_device, rows_per_shard, row_offsets,
    first_touched, first_sent, last_slice, sent_at, touched_at, touched, sent, out_positions,
):  # fmt: skip
    """Writes what owners gather and send, and where each position finds its vector.

    Args:
        distinct, ends, positions, inverse, slice_positions, from_shard, to_shard: As in `count_routes`.
        shards_per_device, rows_per_shard: L / S and R.
        row_offsets: int64 [T], where each table's rows start in a shard.
        first_touched, first_sent: int64 [L] and [L, S], where each shard's part starts in its device's lists; the latter is
            advanced.
        last_slice, sent_at, touched_at: int32 [N] scratch.
        touched: int32 [S, V] out: rows in the device's part of the group.
        sent: int32 [S owners, S slices, U] out: index into `touched`.
        out_positions: int32 [B P] out: index into what a slice receives, owner * U + u; S U: the id has no row.
    """
    starts, rows, of = distinct.starts, distinct.rows, distinct.tables
    for shard in range(from_shard, to_shard):
        owner = shard // shards_per_device
        first_row, at = (shard - owner * shards_per_device) * rows_per_shard, first_touched[shard]
        for i in range(starts[shard], starts[shard] + distinct.numbers[shard]):
            last_slice[i] = -1
            touched_at[i] = at
            if rows[i] >= 0:
                touched[owner, at] = first_row + row_offsets[of[i]] + rows[i]
                at += 1
        if sent.shape[1] == 1:
            _fill_for_one(distinct, ends, positions, inverse, shard, touched_at, sent, out_positions)
        else:
            _fill_for_slices(
                distinct, ends, positions, inverse, slice_positions, shard, owner, first_sent, last_slice, sent_at, touched_at,
                sent, out_positions,
            )  # fmt: skip


@jit
def count_states(distinct, not_admitted):
    """Returns how many ids there are, how many got a fresh row, and how many have the mark `not_admitted` as row."""
    unique, fresh, marked = 0, 0, 0
    for r in range(distinct.starts.size):
        unique += distinct.numbers[r]
        for i in range(distinct.starts[r], distinct.starts[r] + distinct.numbers[r]):
            fresh += distinct.fresh[i]
            marked += distinct.rows[i] == not_admitted
    return unique, fresh, marked


@jit
def list_fresh(distinct, shards_per_device, rows_per_shard, row_offsets, hashes, tables, rows, numbers):
    """Lists the fresh rows: hashes, tables and rows in the device's part [N] out, and their numbers [S] out, zeroed before."""
    at = 0
    for shard in range(distinct.starts.size):
        device = shard // shards_per_device
        first_row = (shard - device * shards_per_device) * rows_per_shard
        for i in range(distinct.starts[shard], distinct.starts[shard] + distinct.numbers[shard]):
            if distinct.fresh[i]:
                hashes[at], tables[at] = distinct.hashes[i], distinct.tables[i]
                rows[at] = first_row + row_offsets[distinct.tables[i]] + distinct.rows[i]
                numbers[device] += 1
                at += 1
