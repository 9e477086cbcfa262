"""The state of a model on the mesh, and the parts that make it.

In: configs of tables, features, heads and model. Out: `Model` (everything static: graph, groups, layout, optimizer), the first
`TrainState`, and the shardings of both state and inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from monolith_jax.features import FeatureConfig, FeatureLayout, feature_layout
from monolith_jax.mesh import BATCH, BATCH_ALL, REPLICATED, ROWS, is_shared, sharding, weight_spec
from monolith_jax.models.layers import axes_of
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.towers import ModelConfig, Towers, make_towers
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.tables.table import Group, TableConfig, empty_array, make_groups
from monolith_jax.tables.update import OptimizerConfig, make_optimizer
from monolith_jax.tables.wire import PADDED, WireConfig, check_wire
from monolith_jax.types import Array, GroupPlan, Retrieval


class TrainState(NamedTuple):
    """All that a step changes on the device."""

    step: Array
    """int32 scalar, steps done."""
    weights: Any
    """Dense weights of the model, split by their logical axes."""
    optimizer: Any
    """State of their optimizer, split like them."""
    groups: tuple[Array, ...]
    """Of each group of tables float32 [L, R, W], split over all devices; [L, C, W] of one in two tiers (`train.tiers`)."""


class Inputs(NamedTuple):
    """What the device gets for one step, beside nothing else.

    R is B, or with a two-tower B + M: they stand in blocks (`negatives.num_blocks`), in each its
    share of the examples and then its share of the drawn videos, so that every device has some of both.
    """

    plans: tuple[GroupPlan, ...]
    weights: tuple[Array, ...]
    """Weights of list items, float32 [R, P] of each group that has some."""
    dense: Array
    """float32 [R, n]"""
    labels: Array
    """float32 [B, T]"""
    masks: Array
    """float32 [B, T], the example's weight where a label is defined."""
    retrieval: Retrieval | None = None
    """What the two-tower learns from; None: it does not, and R is B."""


@dataclass(frozen=True)
class Model:
    """The static half of a model: what is compiled, not what is learned."""

    towers: Towers
    groups: tuple[Group, ...]
    optimizer: OptimizerConfig
    seed: int
    mesh: Mesh
    weights: Any
    """Shape, type and sharding of each dense weight."""
    wire: WireConfig = PADDED
    """How vectors and gradients cross between the devices."""

    @property
    def layout(self) -> FeatureLayout:
        """The features."""
        return self.towers.layout

    @property
    def heads(self) -> tuple[HeadConfig, ...]:
        """What is predicted."""
        return self.towers.heads

    @property
    def num_drawn(self) -> int:
        """M, videos that are drawn for each step beside the examples; 0 without a two-tower."""
        return self.towers.two_tower.num_negatives if self.towers.two_tower else 0

    @property
    def transformation(self) -> optax.GradientTransformation:
        """The optimizer of the dense weights, with learning rate 1."""
        return make_optimizer(self.optimizer)


def make_model(
    config: ModelConfig | None,
    tables: Sequence[TableConfig],
    features: Sequence[FeatureConfig],
    heads: Sequence[HeadConfig],
    optimizer: OptimizerConfig,
    seed: int,
    num_shards: int,
    mesh: Mesh,
    wire: WireConfig = PADDED,
    two_tower: TwoTowerConfig | None = None,
) -> tuple[Model, Any]:
    """Returns a model and its first dense weights: of a ranker (`config`), of a two-tower, or of both.

    Raises:
        ValueError: The configs do not fit together, or the devices cannot do such an exchange.
    """
    check_wire(wire, mesh)
    if optimizer.group_lasso:
        raise ValueError(
            "OptimizerConfig.group_lasso shortens rows of tables; Experiment.dense_optimizer has none: set it to 0"
        )
    groups = make_groups(tables, num_shards)
    layout = feature_layout(features, [group.maps.names for group in groups])
    towers, weights = make_towers(config, layout, [group.dim for group in groups], heads, seed, two_tower)
    pure = nnx.to_pure_dict(weights)
    shapes = jax.tree.map(partial(_shape, mesh), pure, axes_of(weights))
    return Model(towers, groups, optimizer, seed, mesh, shapes, wire), pure


def _shape(mesh: Mesh, weight: jax.Array, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    where = sharding(mesh, weight_spec(mesh, axes, weight.shape))
    return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=where)


def first_state(model: Model, weights: Any) -> TrainState:
    """Returns the state before the first step: these dense weights, and empty tables."""
    where = state_shardings(model)
    weights = jax.tree.map(_placed, weights, where.weights)
    optimizer = jax.jit(model.transformation.init, out_shardings=where.optimizer)(weights)
    step = _placed(jnp.zeros((), jnp.int32), where.step)
    return TrainState(step, weights, optimizer, tuple(empty_array(group, model.mesh) for group in model.groups))


def _placed(value: jax.Array, where: NamedSharding) -> jax.Array:
    """Puts a value that all processes have onto the mesh; jax.device_put would compare them first, by a collective."""
    if not is_shared(where.mesh):
        return jax.device_put(value, where)
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def state_shardings(model: Model) -> Any:
    """Returns where each part of the state lives, as a tree of the same form."""
    weights = jax.tree.map(lambda weight: weight.sharding, model.weights)
    rows = tuple(sharding(model.mesh, ROWS) for _ in model.groups)
    return TrainState(sharding(model.mesh, REPLICATED), weights, _optimizer_shardings(model), rows)


def _optimizer_shardings(model: Model) -> Any:
    """A leaf that stands at the path of a weight and has its shape (a moment, an accumulator) is split like that weight."""
    weights = dict(jax.tree.leaves_with_path(model.weights))

    def where(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        for start in range(len(path)):
            weight = weights.get(path[start:])
            if weight is not None and weight.shape == leaf.shape:
                return weight.sharding
        return sharding(model.mesh, REPLICATED)

    return jax.tree.map_with_path(where, jax.eval_shape(model.transformation.init, model.weights))


def place_inputs(model: Model, inputs: Inputs) -> Inputs:
    """Copies the inputs of a step to the devices; with several processes each has its devices' and slices' part of them."""
    where = input_shardings(model, inputs)
    if not is_shared(model.mesh):
        return jax.device_put(inputs, where)
    return jax.tree.map(lambda part, sharding: jax.make_array_from_process_local_data(sharding, part), inputs, where)


def input_shardings(model: Model, inputs: Inputs) -> Any:
    """Returns where each part of the inputs goes, as a tree of the same form."""
    rows, batch = sharding(model.mesh, ROWS), sharding(model.mesh, BATCH)
    plan = GroupPlan(rows, rows, sharding(model.mesh, BATCH_ALL), rows, rows, rows, rows)
    weights = tuple(None if array is None else batch for array in inputs.weights)
    plans = tuple(plan if of_group.touched_rows is None else plan._replace(touched_rows=rows) for of_group in inputs.plans)
    retrieval = Retrieval(batch, batch, batch) if inputs.retrieval is not None else None
    return Inputs(plans, weights, batch, batch, batch, retrieval)
