"""Logistic regression and the factorisation machine (Rendle 2010), of T tasks. They have no layers.

The first T floats of a vector are its first-order weights, one a task; in a factorisation machine the others are its factors,
which the tasks share. So one task with factors of weight 1 is Rendle's model of order 2. Dense values are of first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from monolith_jax.models.layers import InputShapes, ModelInputs, pairs
from monolith_jax.tables.update import float_dtype


@dataclass(frozen=True)
class LinearConfig:
    """A logistic regression. It has no sizes: a vector is the id's weights, so `TableConfig.dim` is the number of heads."""


@dataclass(frozen=True)
class FMConfig:
    """A factorisation machine. It has no sizes: `TableConfig.dim` is the number of heads and of factors together."""


class FactorisationMachine(nnx.Module):
    """Logits of T tasks: bias, first-order weights of ids and dense values, and with factors the sum over all pairs of ids."""

    def __init__(self, config: LinearConfig | FMConfig, shapes: InputShapes, num_tasks: int, rngs: nnx.Rngs) -> None:
        """Makes the weights outside the tables: zeros, and ones for what a task makes of each factor.

        Raises:
            ValueError: The dims of the tables are not those of the config.
        """
        del rngs  # Tables draw the first values.
        dims = sorted({dim for _, dim in shapes.fields})
        if isinstance(config, LinearConfig) and dims != [num_tasks]:
            raise ValueError(
                f"a logistic regression of {num_tasks} heads needs TableConfig.dim = {num_tasks} for all tables, a weight a "
                f"head; got {dims}"
            )
        if isinstance(config, FMConfig) and (len(dims) != 1 or dims[0] <= num_tasks):
            raise ValueError(
                f"a factorisation machine of {num_tasks} heads needs one TableConfig.dim of at least {num_tasks + 1} for all "
                f"tables, a weight a head and then the factors; got {dims}"
            )
        self.bias = nnx.Param(jnp.zeros((num_tasks,), float_dtype()))
        self.dense = nnx.Param(jnp.zeros((shapes.num_dense, num_tasks), float_dtype())) if shapes.num_dense else None
        factors = dims[0] - num_tasks
        self.factors = nnx.Param(jnp.ones((num_tasks, factors), float_dtype())) if factors else None

    def __call__(self, inputs: ModelInputs) -> jax.Array:
        """Returns logits, float32 [B, T]."""
        fields, tasks = jnp.concatenate(inputs.fields, axis=1), self.bias.shape[0]
        logits = fields[:, :, :tasks].sum(1) + self.bias[...]
        if self.dense is not None:
            logits += inputs.dense.astype(float_dtype()) @ self.dense[...]
        if self.factors is not None:
            logits += pairs(fields[:, :, tasks:]) @ self.factors[...].T
        return logits
