"""What bfloat16 products may change, and what they may not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monolith_jax.models.layers import ModelInputs


def assert_bfloat16_is_close(exact: nnx.Module, rough: nnx.Module, inputs: ModelInputs) -> None:
    """Compares logits and gradients of two equal models, the second of which computes in bfloat16."""
    (logits, gradients), (rough_logits, rough_gradients) = (_results(model, inputs) for model in (exact, rough))
    assert rough_logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(rough_gradients)} == {jnp.dtype("float32")}
    assert not np.array_equal(logits, rough_logits), "the second model computes in float32 too"
    assert _distance(logits, rough_logits) < 0.02
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(rough_gradients), strict=True):
        assert _distance(one, other) < 0.1


def _results(model: nnx.Module, inputs: ModelInputs) -> tuple[Any, Any]:
    graph, weights = nnx.split(model)

    @jax.jit
    def results(weights: nnx.State, inputs: ModelInputs) -> tuple[Any, Any]:
        def loss(weights: nnx.State, inputs: ModelInputs) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(graph, weights)(inputs)  # pyright: ignore[reportCallIssue]
            return jnp.square(logits).sum(), logits

        gradients, logits = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, inputs)
        return logits, gradients

    return results(weights, inputs)


def _distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(np.asarray(one) - np.asarray(other)) / np.linalg.norm(np.asarray(one)))
