"""Transformations that optax lacks, written as optax writes its own, and the shrinking of whole rows.

In: gradients, state and weights, of one row [D] (under `jax.vmap`) or a tree of dense weights. Out: updates that are added to
the weights. `ftrl` keeps its learning rate inside, since its weights are no sum of updates that a later rate could scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RowwiseAdagradState(NamedTuple):
    """State of `rowwise_adagrad`."""

    sums: Any
    """For each row the sum over its updates of the mean square of its gradient."""


def rowwise_adagrad(learning_rate: float, initial_accumulator_value: float = 0.0, eps: float = 1e-8) -> Any:
    """Adagrad with one accumulator for a whole row, so its state is one float instead of D.

    n += mean(g^2), w -= learning_rate g / (sqrt(n) + eps): "row-wise sparse Adagrad" of DLRM (Mudigere et al. 2022, "Software-
    hardware co-design for fast and scalable training of deep learning recommendation models", section 4.1). A row is what the
    last axis of a weight runs over; a scalar is its own row.

    Args:
        learning_rate: Factor of the updates.
        initial_accumulator_value: n before the first update.
        eps: Added to the root.
    """

    def mean_square(gradient: jax.Array) -> jax.Array:
        square = jnp.square(gradient)
        return square.mean(-1) if square.ndim else square

    def init(weights: Any) -> RowwiseAdagradState:
        return RowwiseAdagradState(
            jax.tree.map(lambda weight: jnp.full_like(mean_square(weight), initial_accumulator_value), weights)
        )

    def update(gradients: Any, state: RowwiseAdagradState, weights: Any = None) -> tuple[Any, RowwiseAdagradState]:
        del weights
        sums = jax.tree.map(lambda total, gradient: total + mean_square(gradient), state.sums, gradients)

        def of_rows(gradient: jax.Array, total: jax.Array) -> jax.Array:
            root = jnp.sqrt(total) + eps
            # Without eps a row that has only seen zeros would divide zero by zero.
            factor = jnp.where(root > 0, -learning_rate / jnp.where(root > 0, root, 1), 0)
            return gradient * (factor[..., None] if gradient.ndim else factor)

        return jax.tree.map(of_rows, gradients, sums), RowwiseAdagradState(sums)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


class FtrlState(NamedTuple):
    """State of `ftrl`."""

    z: Any
    """Gradients summed, less what the moving centre of the regulariser took."""
    n: Any
    """Squared gradients summed."""


def ftrl(
    learning_rate: float, beta: float = 1.0, l1: float = 0.0, l2: float = 0.0, initial_accumulator_value: float = 0.0
) -> Any:
    """FTRL-Proximal, for each coordinate: algorithm 1 of McMahan et al. 2013, "Ad click prediction: a view from the trenches".

    w = 0 where |z| <= l1, else -(z - sign(z) l1) / ((beta + sqrt(n)) / learning_rate + l2). The paper starts at w = 0; here z
    starts where this formula gives the first weight, so that weights drawn at random are not lost at the first update. A
    coordinate whose gradient is 0 stays: updates of touched rows only and of all rows are the same.

    Args:
        learning_rate: alpha; above 0.
        beta: Slows the first updates.
        l1: Weights are exactly 0 while |z| is not above it.
        l2: Strength of the pull towards 0.
        initial_accumulator_value: n before the first update.

    Raises:
        ValueError: The learning rate is not above 0, another argument is negative, or all that could divide is 0.
    """
    if not learning_rate > 0:
        raise ValueError(f"ftrl needs a learning_rate above 0, got {learning_rate}")
    if not min(beta, l1, l2, initial_accumulator_value) >= 0:
        raise ValueError("ftrl needs beta, l1, l2 and initial_accumulator_value of at least 0")
    if not max(beta, l2, initial_accumulator_value) > 0:
        raise ValueError("ftrl with beta, l2 and initial_accumulator_value of 0 would divide by 0; set one of them above 0")

    def divisor(n: jax.Array) -> jax.Array:
        return (beta + jnp.sqrt(n)) / learning_rate + l2

    def init(weights: Any) -> FtrlState:
        n = jax.tree.map(lambda weight: jnp.full_like(weight, initial_accumulator_value), weights)
        z = jax.tree.map(lambda weight, of_weight: -weight * divisor(of_weight) - jnp.sign(weight) * l1, weights, n)
        return FtrlState(z, n)

    def update(gradients: Any, state: FtrlState, weights: Any) -> tuple[Any, FtrlState]:
        n = jax.tree.map(lambda total, gradient: total + jnp.square(gradient), state.n, gradients)

        def moved(z: jax.Array, gradient: jax.Array, weight: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
            return z + gradient - (jnp.sqrt(new) - jnp.sqrt(old)) / learning_rate * weight

        z = jax.tree.map(moved, state.z, gradients, weights, n, state.n)

        def step(z: jax.Array, n: jax.Array, weight: jax.Array) -> jax.Array:
            return jnp.where(jnp.abs(z) <= l1, 0, (jnp.sign(z) * l1 - z) / divisor(n)) - weight

        return jax.tree.map(step, z, n, weights), FtrlState(z, n)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def shrunk_rows(vectors: jax.Array, by: jax.Array) -> jax.Array:
    """Returns vectors [V, D] shortened by `by`, zero where they were not longer: the proximal step of the group lasso.

    It minimises |v - w|^2 / 2 + by |v| over v (Yuan and Lin 2006, "Model selection and estimation in regression with grouped
    variables", the solution of its equation 2.4 for one group), so whole rows become exactly 0.
    """
    lengths = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    longer = lengths > by
    return jnp.where(longer, vectors * (1 - by / jnp.where(longer, lengths, 1)), 0)
