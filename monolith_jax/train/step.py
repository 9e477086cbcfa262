"""One step: gather, forward, loss, backward, update. Pure, jitted, donated.

In: state and inputs. Out: the next state, and the loss and scores of the batch from before it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from monolith_jax.mesh import BATCH, REPLICATED, sharding
from monolith_jax.models.layers import ModelInputs, combine
from monolith_jax.models.losses import multi_task_loss, offsets, scores
from monolith_jax.tables.lookup import gather_rows, return_gradients, send_vectors, write_fresh_rows, write_rows
from monolith_jax.tables.update import learning_rate
from monolith_jax.train.state import Inputs, Model, TrainState, state_shardings


class Metrics(NamedTuple):
    """What a step tells."""

    loss: jax.Array
    """float32 scalar"""
    scores: jax.Array
    """float32 [B, T]"""


def forward(model: Model, weights: Any, vectors: tuple[jax.Array, ...], inputs: Inputs) -> jax.Array:
    """Returns logits [B, T] from the vectors at the id positions, [B, P, D] of each group."""
    fields = []
    for slots, of_group, plan, list_weights in zip(model.layout.groups, vectors, inputs.plans, inputs.weights, strict=True):
        num_devices, _, size = plan.sent.shape
        fields.append(combine(slots, of_group, plan.positions <= num_devices * size, list_weights))
    module = nnx.merge(model.graph, nnx.State(weights))
    return module(ModelInputs(tuple(fields), inputs.dense)) + offsets(model.heads)


def make_train_step(model: Model) -> Callable[[TrainState, Inputs], tuple[TrainState, Metrics]]:
    """Returns the compiled step. The state that is passed in is used up."""

    def loss_and_logits(weights: Any, vectors: tuple[jax.Array, ...], inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        logits = forward(model, weights, vectors, inputs)
        return multi_task_loss(logits, inputs.labels, inputs.masks, model.heads), logits

    def step(state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
        mesh, parts = model.mesh, list(zip(model.groups, inputs.plans, strict=True))
        rows = [gather_rows(mesh, array, plan) for array, plan in zip(state.groups, inputs.plans, strict=True)]
        vectors = tuple(send_vectors(mesh, group, r, plan) for (group, plan), r in zip(parts, rows, strict=True))
        value_and_grad = jax.value_and_grad(loss_and_logits, argnums=(0, 1), has_aux=True)
        (loss, logits), (of_weights, of_vectors) = value_and_grad(state.weights, vectors, inputs)
        updates, optimizer = model.transformation.update(of_weights, state.optimizer, state.weights)
        rate = learning_rate(model.optimizer, state.step)
        weights = jax.tree.map(lambda weight, update: weight + rate * update, state.weights, updates)
        groups = []
        for (group, plan), array, r, gradient in zip(parts, state.groups, rows, of_vectors, strict=True):
            of_rows = return_gradients(mesh, gradient, plan)
            groups.append(write_rows(mesh, group, array, r, of_rows, learning_rate(group.rows.config, state.step), plan))
        state = TrainState(state.step + 1, weights, optimizer, tuple(groups))
        return state, Metrics(loss, scores(logits, model.heads))

    replicated, batch = sharding(model.mesh, REPLICATED), sharding(model.mesh, BATCH)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(model), Metrics(replicated, batch)))  # pyright: ignore
    fresh = make_fresh_step(model)
    return lambda state, inputs: compiled(fresh(state, inputs), inputs)


def make_fresh_step(model: Model) -> Callable[[TrainState, Inputs], TrainState]:
    """Returns what gives fresh rows their first value, ahead of the step's own program.

    A program of its own: its padded size changes with the number of new ids, the step's does not.
    """

    def write(groups: tuple[jax.Array, ...], inputs: Inputs) -> tuple[jax.Array, ...]:
        parts = zip(model.groups, groups, inputs.plans, strict=True)
        return tuple(write_fresh_rows(model.mesh, group, model.seed, array, plan) for group, array, plan in parts)

    compiled = jax.jit(write, donate_argnums=0, out_shardings=state_shardings(model).groups)
    return lambda state, inputs: state._replace(groups=compiled(state.groups, inputs))


def make_predict_step(model: Model) -> Callable[[TrainState, Inputs], jax.Array]:
    """Returns what scores a batch [B, T] and changes nothing. Ids without a row read zeros."""

    def predict(state: TrainState, inputs: Inputs) -> jax.Array:
        vectors = []
        for group, array, plan in zip(model.groups, state.groups, inputs.plans, strict=True):
            vectors.append(send_vectors(model.mesh, group, gather_rows(model.mesh, array, plan), plan))
        return scores(forward(model, state.weights, tuple(vectors), inputs), model.heads)

    return jax.jit(predict, out_shardings=sharding(model.mesh, BATCH))
