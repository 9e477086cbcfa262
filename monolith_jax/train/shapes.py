"""A step as shapes: what training would allocate and move, from its own functions, traced and not run.

In: a model, its state and the sizes of its plans. Out: shapes of the inputs, bytes a device of arrays and of exchanges, and
XLA's analysis of the towers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from monolith_jax.ids.footprint import PlanSizes
from monolith_jax.mesh import BATCH, REPLICATED, MeshConfig, make_mesh, sharding
from monolith_jax.train.state import Inputs, Model, TrainState
from monolith_jax.train.step import make_learn, make_read
from monolith_jax.types import GroupPlan, Retrieval


def trace_model(make: Callable[[], tuple[Model, Any]]) -> tuple[Model, Any]:
    """Returns what `make` returns, a model and its dense weights, the weights as shapes only."""
    made: list[Model] = []

    def weights() -> Any:
        model, of_model = make()
        made.append(model)
        return of_model

    shapes = jax.eval_shape(weights)
    return made[0], shapes


def input_shapes(model: Model, batch_size: int, sizes: Sequence[PlanSizes]) -> Inputs:
    """Returns the inputs of a step of B examples as shapes, given the padded sizes of each group's plan."""

    def shape(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, dtype)

    num_devices, plans, weights = model.mesh.size, [], []
    num_rows, retrieval = batch_size + model.num_drawn, None
    if model.towers.two_tower:
        retrieval = Retrieval(shape(batch_size), shape(num_rows), shape(num_rows, dtype=jnp.uint32))
    for index, (group, of_plan) in enumerate(zip(model.groups, sizes, strict=True)):
        positions = (num_rows, model.layout.num_positions(index))
        plans.append(
            GroupPlan(
                shape(num_devices, of_plan.touched, dtype=jnp.int32),
                shape(num_devices, num_devices, of_plan.sent, dtype=jnp.int32),
                shape(*positions, dtype=jnp.int32),
                shape(num_devices, of_plan.fresh, dtype=jnp.int32),
                shape(num_devices, of_plan.fresh, 2, dtype=jnp.uint32),
                shape(num_devices, of_plan.fresh, dtype=jnp.int32),
                shape(num_devices, num_devices, dtype=jnp.int32),
                shape(num_devices, of_plan.touched, dtype=jnp.int32) if group.tiered else None,
            )
        )
        weights.append(shape(*positions) if any(slot.weighted for slot in model.layout.groups[index]) else None)
    of_tasks = shape(batch_size, len(model.heads))
    return Inputs(tuple(plans), tuple(weights), shape(num_rows, model.layout.num_dense), of_tasks, of_tasks, retrieval)


def tower_bytes(model: Model, state: TrainState, inputs: Inputs) -> int:
    """Returns what XLA needs for the towers at one device's part of the batch, beside their arguments.

    They are compiled for one device that is here, whole. Towers that are split over devices need less than that.
    """
    mesh = make_mesh(MeshConfig(num_devices=1, num_shards=model.groups[0].maps.num_shards))
    here = sharding(mesh, REPLICATED)
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), model.weights)
    alone = dataclasses.replace(model, mesh=mesh, weights=weights)

    def part(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sharding(model.mesh, BATCH).shard_shape(leaf.shape), leaf.dtype)

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    _, vectors, valid = jax.eval_shape(make_read(model), state.groups, inputs.plans)
    parts = jax.tree.map(part, (vectors, valid, inputs._replace(plans=())))
    of_state = jax.tree.map(whole, (state.step, state.weights, state.optimizer))
    found = make_learn(alone).lower(*of_state, *parts).compile().memory_analysis()
    assert found is not None, "this backend's XLA tells nothing about memory"
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def exchanged(program: Any) -> Iterator[int]:
    """Yields the bytes that a device gives into each `all_to_all` of a program."""
    for equation in getattr(program, "jaxpr", program).eqns:
        if equation.primitive.name in ("all_to_all", "ragged_all_to_all"):
            yield whole_bytes(equation.invars[0].aval)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from exchanged(value)


def _is_program(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def whole_bytes(shape: Any) -> int:
    """Returns the bytes of an array."""
    return math.prod(shape.shape) * shape.dtype.itemsize


def local_bytes(shape: Any, sharding: Any = None) -> int:
    """Returns the bytes that each device holds of an array; its own sharding unless another is given."""
    sharding = sharding or shape.sharding
    return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize


def bytes_by(shardings: Any, tree: Any) -> Any:
    """Returns the bytes a device of each array of a tree, given a prefix tree of shardings."""

    def of_part(sharding: Any, part: Any) -> Any:
        return jax.tree.map(lambda leaf: local_bytes(leaf, sharding), part)

    return jax.tree.map(of_part, shardings, tree)
