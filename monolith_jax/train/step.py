"""One step: read rows, learn, write rows. Pure, jitted, donated.

In: state and inputs. Out: the next state, and the loss and scores of the batch from before it was trained on. Ranker and
two-tower learn from the same vectors in one backward pass; only the two-tower sees the rows of drawn videos.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from monolith_jax.mesh import BATCH, BATCH_ALL, REPLICATED, ROWS, is_shared, sharding
from monolith_jax.models.losses import multi_task_loss, scores
from monolith_jax.models.towers import forward, user_vectors, video_vectors
from monolith_jax.models.two_tower import RetrievalLoss, retrieval_loss
from monolith_jax.negatives import num_blocks
from monolith_jax.tables.lookup import gather_rows, return_gradients, send_vectors, write_fresh_rows, write_rows
from monolith_jax.tables.update import apply_updates, learning_rate
from monolith_jax.train.state import Inputs, Model, TrainState, state_shardings
from monolith_jax.types import Array, GroupPlan

Groups = tuple[Any, ...]
"""An array for each group of tables."""
Plans = tuple[GroupPlan, ...]


class Metrics(NamedTuple):
    """What a step tells."""

    loss: Array
    """float32 scalar"""
    scores: Array
    """float32 [B, T]"""
    retrieval: RetrievalLoss | None = None
    """Of the two-tower; None: there is none."""


def make_train_step(model: Model) -> Callable[[TrainState, Inputs], tuple[TrainState, Metrics]]:
    """Returns the compiled step. The state that is passed in is used up.

    Four programs: XLA's CPU backend runs the towers a third slower when tables and towers share one (113 ms for what takes
    84 ms in parts), and the padded number of fresh rows changes more often than any other shape.
    """
    fresh, read, learn, write = make_fresh(model), make_read(model), make_learn(model), make_write(model)

    def step(state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
        groups = fresh(state.groups, inputs.plans)
        rows, vectors, valid = read(groups, inputs.plans)
        # Without the plans, whose padded sizes change: the towers are compiled once.
        seen = inputs._replace(plans=())
        number, weights, optimizer, metrics, gradients = learn(state.step, state.weights, state.optimizer, vectors, valid, seen)
        groups = write(groups, rows, gradients, state.step, inputs.plans)
        return TrainState(number, weights, optimizer, groups), metrics

    return step


def make_fresh(model: Model) -> Callable[..., Groups]:
    """Returns what gives fresh rows their first value."""

    def fresh(arrays: Groups, plans: Plans) -> Groups:
        parts = zip(model.groups, arrays, plans, strict=True)
        return tuple(write_fresh_rows(model.mesh, group, model.seed, array, plan) for group, array, plan in parts)

    return jax.jit(fresh, donate_argnums=0, out_shardings=state_shardings(model).groups)


def make_read(model: Model) -> Callable[..., tuple[Groups, Groups, Groups]]:
    """Returns what gathers the touched rows [S, V, W] of each group and brings their vectors to the batch [B, P, D].

    The third result is whether there is an id at each position, bool [B, P].
    """

    def read(arrays: Groups, plans: Plans) -> tuple[Groups, Groups, Groups]:
        rows = tuple(gather_rows(model.mesh, array, plan) for array, plan in zip(arrays, plans, strict=True))
        parts = zip(model.groups, rows, plans, strict=True)
        vectors = tuple(send_vectors(model.mesh, group, of_group, plan, model.wire) for group, of_group, plan in parts)
        return rows, vectors, tuple(plan.positions <= plan.sent.shape[0] * plan.sent.shape[2] for plan in plans)

    batch = sharding(model.mesh, BATCH)
    return jax.jit(read, out_shardings=(sharding(model.mesh, ROWS), batch, batch))


def make_learn(model: Model) -> Callable[..., tuple[jax.Array, Any, Any, Metrics, Groups]]:
    """Returns the forward and backward pass of the towers, with the update of their weights."""

    def losses(weights: Any, vectors: Groups, valid: Groups, inputs: Inputs) -> tuple[jax.Array, Any]:
        seen = (vectors, valid, inputs.weights, inputs.dense)
        if inputs.retrieval is None:
            logits = forward(model.towers, weights, *seen)
            return multi_task_loss(logits, inputs.labels, inputs.masks, model.heads), (logits, None)
        num_examples, num_rows = len(inputs.labels), len(inputs.dense)
        blocks = num_blocks(num_examples, num_rows - num_examples, model.groups[0].maps.num_shards)
        of_examples = partial(_of_examples, blocks, num_examples)
        examples = jax.tree.map(of_examples, seen)
        logits = forward(model.towers, weights, *examples)
        users_BD = user_vectors(model.towers, weights, model.layout, *examples)
        videos_RD = video_vectors(model.towers, weights, model.layout, *seen)
        config = model.towers.two_tower
        assert config is not None
        own = (of_examples(videos_RD), of_examples(inputs.retrieval.log_q), of_examples(inputs.retrieval.key))
        found = retrieval_loss(users_BD, *own, videos_RD, inputs.retrieval, config.temperature)
        loss = multi_task_loss(logits, inputs.labels, inputs.masks, model.heads) + config.loss_weight * found.loss
        return loss, (logits, found)

    def learn(
        number: jax.Array, weights: Any, optimizer: Any, vectors: Groups, valid: Groups, inputs: Inputs
    ) -> tuple[Any, ...]:
        value_and_grad = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)
        (loss, (logits, found)), (of_weights, of_vectors) = value_and_grad(weights, vectors, valid, inputs)
        updates, optimizer = model.transformation.update(of_weights, optimizer, weights)
        weights = apply_updates(model.optimizer, weights, updates, learning_rate(model.optimizer, number))
        # A good loss can still lead to weights that are no numbers; those must not reach a snapshot.
        total = sum(jnp.sum(weight) for weight in jax.tree.leaves(weights))
        loss = jnp.where(jnp.isfinite(total), loss, jnp.nan)
        return number + 1, weights, optimizer, Metrics(loss, scores(logits, model.heads), found), of_vectors

    replicated, batch, where = sharding(model.mesh, REPLICATED), sharding(model.mesh, BATCH), state_shardings(model)
    of_state = (where.step, where.weights, where.optimizer)
    in_shardings = (*of_state, batch, batch, batch)
    of_retrieval: Any = replicated
    out_shardings = (*of_state, Metrics(replicated, _score_sharding(model), of_retrieval), sharding(model.mesh, BATCH_ALL))
    return jax.jit(learn, donate_argnums=(1, 2), in_shardings=in_shardings, out_shardings=out_shardings)


def _of_examples(number: int, num_examples: int, rows: jax.Array) -> jax.Array:
    """Returns the rows of examples, [B, ...] from [R, ...]: the first of every block, so that none leaves its device."""
    blocks = rows.reshape(number, -1, *rows.shape[1:])
    return blocks[:, : num_examples // number].reshape(num_examples, *rows.shape[1:])


def _score_sharding(model: Model) -> Any:
    """Returns where scores lie: with the batch, or in all processes where there are several, since each reads them."""
    return sharding(model.mesh, REPLICATED if is_shared(model.mesh) else BATCH)


def make_write(model: Model) -> Callable[..., Groups]:
    """Returns what takes gradients back to the owners and updates the touched rows."""

    def write(arrays: Groups, rows: Groups, gradients: Groups, number: jax.Array, plans: Plans) -> Groups:
        written = []
        for group, array, of_group, gradient, plan in zip(model.groups, arrays, rows, gradients, plans, strict=True):
            of_rows = return_gradients(model.mesh, gradient, plan, model.wire)
            written.append(write_rows(model.mesh, group, array, of_group, of_rows, number, plan))
        return tuple(written)

    return jax.jit(write, donate_argnums=0, out_shardings=state_shardings(model).groups)


def make_predict_step(model: Model) -> Callable[[TrainState, Inputs], jax.Array]:
    """Returns what scores a batch [B, T] and changes nothing. Ids without a row read zeros."""
    read = make_read(model)

    def predict(weights: Any, vectors: Groups, valid: Groups, inputs: Inputs) -> jax.Array:
        logits = forward(model.towers, weights, vectors, valid, inputs.weights, inputs.dense)
        return scores(logits, model.heads)

    batch = sharding(model.mesh, BATCH)
    in_shardings = (state_shardings(model).weights, batch, batch, batch)
    compiled = jax.jit(predict, in_shardings=in_shardings, out_shardings=_score_sharding(model))

    def step(state: TrainState, inputs: Inputs) -> jax.Array:
        _, vectors, valid = read(state.groups, inputs.plans)
        return compiled(state.weights, vectors, valid, inputs._replace(plans=()))

    return step
