"""Which row goes from which device to which slice of the batch: the numba kernels behind the index arrays of a plan.

In: the distinct ids of a batch with their owners and rows, and where each stands in the batch. Out: the arrays of `GroupPlan`.
"""

from __future__ import annotations

import numba


@numba.njit(cache=True, nogil=True)
def count_routes(inverse, owners, local_rows, num_devices, touched_at, sent_at, num_touched, num_sent):
    """Numbers the rows that each device touches, and those that each slice of the batch asks of each device.

    Args:
        inverse: int32 [B, P], index of the distinct id at each position, -1 where empty. Slice s is the s-th of S equal parts.
        owners: int32 [N], the device that owns each distinct id.
        local_rows: int64 [N], its row in the device's part of the group, -1: refused.
        num_devices: S.
        touched_at: int32 [N] out: position in the owner's list of touched rows.
        sent_at: int32 [S, N] out: position in the list that the owner sends to slice s, -1 where not asked for.
        num_touched, num_sent: int64 [S] and [S owners, S slices] out, zeroed by the caller.
    """
    for i in range(owners.size):
        if local_rows[i] >= 0:
            touched_at[i] = num_touched[owners[i]]
            num_touched[owners[i]] += 1
    slice_size = inverse.shape[0] // num_devices
    for s in range(num_devices):
        for i in range(owners.size):
            sent_at[s, i] = -1
        for b in range(s * slice_size, (s + 1) * slice_size):
            for p in range(inverse.shape[1]):
                i = inverse[b, p]
                if i >= 0 and local_rows[i] >= 0 and sent_at[s, i] < 0:
                    owner = owners[i]
                    sent_at[s, i] = num_sent[owner, s]
                    num_sent[owner, s] += 1


@numba.njit(cache=True, nogil=True)
def fill_padding(touched, sent, first_padding):
    """Fills `touched` [S, V] with first_padding, + 1, ... and `sent` [S, S, U] with V."""
    for device in range(touched.shape[0]):
        for v in range(touched.shape[1]):
            touched[device, v] = first_padding + v
        for s in range(sent.shape[1]):
            for u in range(sent.shape[2]):
                sent[device, s, u] = touched.shape[1]


@numba.njit(cache=True, nogil=True)
def fill_rows(owners, local_rows, touched_at, sent_at, touched, sent):
    """Writes what owners gather and send, over the padding.

    Args:
        owners: int32 [N], the device that owns each distinct id.
        local_rows: int64 [N], its row in the device's part of the group, -1: refused.
        touched_at, sent_at: As in `count_routes`.
        touched: int32 [S, V] out: rows to gather.
        sent: int32 [S owners, S slices, U] out: index into `touched`.
    """
    for i in range(owners.size):
        if local_rows[i] >= 0:
            touched[owners[i], touched_at[i]] = local_rows[i]
            for s in range(sent.shape[1]):
                if sent_at[s, i] >= 0:
                    sent[owners[i], s, sent_at[s, i]] = touched_at[i]


@numba.njit(cache=True, nogil=True)
def fill_positions(inverse, owners, local_rows, sent_at, sent_size, positions):
    """Writes int32 `positions` [B, P]: index into what a slice receives, owner * U + u; S U: refused id; S U + 1: empty."""
    num_devices = sent_at.shape[0]
    slice_size = inverse.shape[0] // num_devices
    for b in range(inverse.shape[0]):
        s = b // slice_size
        for p in range(inverse.shape[1]):
            i = inverse[b, p]
            if i < 0:
                positions[b, p] = num_devices * sent_size + 1
            elif local_rows[i] < 0:
                positions[b, p] = num_devices * sent_size
            else:
                positions[b, p] = owners[i] * sent_size + sent_at[s, i]
