"""The way of vectors from their owners to the batch, and of gradients back.

In: group arrays [L, R, W] and plans. Out: vectors [B, P, D] for the towers; on the way back gradients [V, D] summed per row at
its owner. Each function is one `jax.shard_map` over all devices:

    owner: gather touched rows -> pick what each slice asked for -> all_to_all -> slice: put vectors where the ids stood
    slice: sum gradients of equal ids -> all_to_all -> owner: sum over slices -> update -> write each touched row once

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
from monolith_jax.tables.table import Group, first_vectors
from monolith_jax.tables.update import first_rows, updated_rows
from monolith_jax.types import GroupPlan


def _flat(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1])


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


def send_vectors(mesh: Mesh, group: Group, rows: jax.Array, plan: GroupPlan) -> jax.Array:
    """Returns the vectors at the id positions of the batch, [B, P, D]; zeros where there is no id or it was refused."""

    def local(rows: jax.Array, sent: jax.Array, positions: jax.Array) -> jax.Array:
        vectors = rows[0, :, : group.dim].at[sent[0]].get(mode="clip")
        received = jax.lax.all_to_all(vectors, (SHARD, MODEL), 0, 0)
        return _flat(received).at[positions].get(mode="fill", fill_value=0)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS, ROWS, BATCH_ALL), out_specs=BATCH_ALL, check_vma=False)
    return mapped(rows, plan.sent, plan.positions)


def return_gradients(mesh: Mesh, gradients: jax.Array, plan: GroupPlan) -> jax.Array:
    """Returns the gradients of the touched rows, [S, V, D], from those at the id positions [B, P, D]."""

    def local(gradients: jax.Array, sent: jax.Array, positions: jax.Array) -> jax.Array:
        num_devices, size = sent.shape[1:]
        dim = gradients.shape[-1]
        of_ids = jnp.zeros((num_devices * size, dim), jnp.float32).at[positions.reshape(-1)].add(_flat(gradients), mode="drop")
        received = jax.lax.all_to_all(of_ids.reshape(num_devices, size, dim), (SHARD, MODEL), 0, 0)
        of_rows = jnp.zeros((plan.touched.shape[1], dim), jnp.float32)
        return of_rows.at[sent[0].reshape(-1)].add(_flat(received), mode="drop")[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(BATCH_ALL, ROWS, BATCH_ALL), out_specs=ROWS, check_vma=False)
    return mapped(gradients, plan.sent, plan.positions)


def write_rows(
    mesh: Mesh, group: Group, array: jax.Array, rows: jax.Array, gradients: jax.Array, rate: jax.Array, plan: GroupPlan
) -> jax.Array:
    """Returns the array [L, R, W] after the update of the touched rows."""

    def local(array: jax.Array, rows: jax.Array, gradients: jax.Array, rate: jax.Array, touched: jax.Array) -> jax.Array:
        updated = updated_rows(group.rows, rows[0], gradients[0], rate)
        return _flat(array).at[touched[0]].set(updated, mode="drop", unique_indices=True).reshape(array.shape)

    in_specs = (ROWS, ROWS, ROWS, REPLICATED, ROWS)
    mapped = partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=ROWS, check_vma=False)(local)
    return mapped(array, rows, gradients, rate, plan.touched)
