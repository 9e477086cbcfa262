"""The way of vectors from their owners to the batch, and of gradients back.

In: group arrays [L, R, W] and plans. Out: vectors [B, P, D] for the towers; on the way back gradients [V, D] summed per row at
its owner. Each function is one `jax.shard_map` over all devices:

    owner: gather touched rows -> pick what each slice asked for -> all_to_all -> slice: put vectors where the ids stood
    slice: sum gradients of equal ids -> all_to_all -> owner: sum over slices -> update -> write each touched row once

With one device there is nothing to exchange: a plan's positions are places in its touched rows.

Padding indices lie beyond the end. What they read on the way is never looked at, positions without an id read 0, and writes to
them are dropped. Gradients are taken with respect to the vectors, never
the table, so the cost of a step grows with the distinct ids of the batch, not with the table.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from monolith_jax.mesh import BATCH_ALL, MODEL, REPLICATED, ROWS, SHARD
from monolith_jax.tables.half_words import noise_of
from monolith_jax.tables.table import Group, first_vectors, rounding_seed
from monolith_jax.tables.update import first_rows, learning_rate, updated_rows, vectors_of
from monolith_jax.tables.wire import PADDED, WireConfig, check_wire, swap_blocks
from monolith_jax.types import GroupPlan


def _flat(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1])


def _places(positions: jax.Array, sent: jax.Array, num_rows: int) -> jax.Array:
    """Returns the places of positions in the touched rows of the only device; those without a row lie beyond the end."""
    # The lists have other lengths where their sizes come from a snapshot of several devices.
    return jnp.where(positions < sent.shape[2], positions, num_rows) if sent.shape[2] < num_rows else positions


def sum_by_index(values: jax.Array, indices: jax.Array, size: int) -> jax.Array:
    """Returns [size, D]: the sums of the values [N, D] that have each index; those of indices from `size` on are left out.

    Values of one index are added in their order. On a CPU that is a loop over N. jaxlib turns the same program for a GPU into a
    compare-and-swap a number (openxla/xla 46225), hundreds of times slower where indices repeat: there, runs of equal indices
    are added.

    Args:
        values: float [N, D].
        indices: int32 [N], none below 0.
        size: Sums.
    """
    zeros = jnp.zeros((size, values.shape[1]), values.dtype)

    def in_place(values: jax.Array, indices: jax.Array) -> jax.Array:
        return zeros.at[indices].add(values, mode="drop")

    def in_runs(values: jax.Array, indices: jax.Array) -> jax.Array:
        in_order, order = jax.lax.sort_key_val(indices, jnp.arange(indices.size, dtype=jnp.int32))
        return zeros.at[in_order].add(values[order], mode="drop", indices_are_sorted=True)

    return jax.lax.platform_dependent(values, indices, cpu=in_place, default=in_runs)


def write_fresh_rows(mesh: Mesh, group: Group, seed: int, array: jax.Array, plan: GroupPlan) -> jax.Array:
    """Returns the array [L, R, W] with first values in the plan's fresh rows."""

    def local(array: jax.Array, rows: jax.Array, ids: jax.Array, tables: jax.Array) -> jax.Array:
        first = first_rows(group.rows, first_vectors(group, seed, ids[0], tables[0]))
        return _flat(array).at[rows[0]].set(first, mode="drop", unique_indices=True).reshape(array.shape)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS,) * 4, out_specs=ROWS, check_vma=False)
    return mapped(array, plan.fresh_rows, plan.fresh_ids, plan.fresh_tables)


def gather_rows(mesh: Mesh, array: jax.Array, plan: GroupPlan) -> jax.Array:
    """Returns the touched rows, [S, V, W], split like the array."""

    def local(array: jax.Array, touched: jax.Array) -> jax.Array:
        return _flat(array).at[touched[0]].get(mode="clip", unique_indices=True)[None]

    return jax.shard_map(local, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=ROWS, check_vma=False)(array, plan.touched)


def send_vectors(mesh: Mesh, group: Group, rows: jax.Array, plan: GroupPlan, wire: WireConfig = PADDED) -> jax.Array:
    """Returns the vectors at the id positions of the batch, [B, P, D]; zeros where there is no id or it was refused.

    Raises:
        ValueError: The devices cannot do such an exchange.
    """
    check_wire(wire, mesh)

    def local(rows: jax.Array, sent: jax.Array, num_sent: jax.Array, positions: jax.Array) -> jax.Array:
        vectors = vectors_of(group.rows, rows[0])
        if mesh.size == 1:
            return vectors.at[_places(positions, sent, rows.shape[1])].get(mode="fill", fill_value=0)
        received = swap_blocks(vectors.at[sent[0]].get(mode="clip"), num_sent[0], False, wire)
        return _flat(received).at[positions].get(mode="fill", fill_value=0)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS, ROWS, ROWS, BATCH_ALL), out_specs=BATCH_ALL, check_vma=False)
    return mapped(rows, plan.sent, plan.num_sent, plan.positions)


def return_gradients(mesh: Mesh, gradients: jax.Array, plan: GroupPlan, wire: WireConfig = PADDED) -> jax.Array:
    """Returns the gradients of the touched rows, [S, V, D], from those at the id positions [B, P, D].

    Raises:
        ValueError: The devices cannot do such an exchange.
    """
    check_wire(wire, mesh)

    def local(gradients: jax.Array, sent: jax.Array, num_sent: jax.Array, positions: jax.Array) -> jax.Array:
        num_devices, size = sent.shape[1:]
        num_rows = plan.touched.shape[1]
        if num_devices == 1:
            return sum_by_index(_flat(gradients), _places(positions, sent, num_rows).reshape(-1), num_rows)[None]
        of_ids = sum_by_index(_flat(gradients), positions.reshape(-1), num_devices * size)
        received = swap_blocks(of_ids.reshape(num_devices, size, -1), num_sent[0], True, wire)
        return sum_by_index(_flat(received), sent[0].reshape(-1), num_rows)[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(BATCH_ALL, ROWS, ROWS, BATCH_ALL), out_specs=ROWS, check_vma=False)
    return mapped(gradients, plan.sent, plan.num_sent, plan.positions)


def write_rows(
    mesh: Mesh, group: Group, array: jax.Array, rows: jax.Array, gradients: jax.Array, step: jax.Array, plan: GroupPlan
) -> jax.Array:
    """Returns the array [L, R, W] after the update of the touched rows.

    Args:
        mesh: The mesh.
        group: The group of the rows.
        array: [L, R, W].
        rows: The touched rows before the update, [S, V, W].
        gradients: Their gradients, [S, V, D].
        step: int32 scalar, steps done: the learning rate and the rounding of bfloat16 vectors go by it.
        plan: Names the touched rows.
    """
    layout, config = group.rows, group.rows.config
    in_tiers = plan.touched_rows is not None

    def local(
        array: jax.Array, rows: jax.Array, gradients: jax.Array, step: jax.Array, touched: jax.Array, numbers: jax.Array
    ) -> jax.Array:
        noise = None
        if layout.vector_dtype == "bfloat16":
            num_shards, rows_per_shard = array.shape[:2]
            shards = jax.lax.axis_index((SHARD, MODEL)) * num_shards + touched[0] // rows_per_shard
            # Rounding goes by the row, whatever slot it is in.
            of_shard = numbers[0] if in_tiers else touched[0] % rows_per_shard
            noise = noise_of(rounding_seed(group), step, shards, of_shard, layout.vector_width)
        updated = updated_rows(layout, rows[0], gradients[0], learning_rate(config, step), noise)
        return _flat(array).at[touched[0]].set(updated, mode="drop", unique_indices=True).reshape(array.shape)

    in_specs = (ROWS, ROWS, ROWS, REPLICATED, ROWS, ROWS)
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=ROWS, check_vma=False)(local)
    return mapped(array, rows, gradients, step, plan.touched, plan.touched_rows if in_tiers else plan.touched)
