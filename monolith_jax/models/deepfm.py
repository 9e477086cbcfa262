"""DeepFM (Guo et al. 2017, arXiv 1703.04247): a factorisation machine and a deep tower over the same vectors."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from monolith_jax.models.layers import ComputeDtype, InputShapes, Mlp, ModelInputs, flat, pairs
from monolith_jax.tables.update import float_dtype


@dataclass(frozen=True)
class DeepFMConfig:
    """The sizes of a DeepFM."""

    hidden: tuple[int, ...] = (400, 400, 400)
    """Units of the deep tower's layers."""
    compute_dtype: ComputeDtype = "float32"
    """Type of the matrix products; weights, sums and the loss stay float32."""


class DeepFM(nnx.Module):
    """Logits of T tasks. The first float of a vector is its first-order weight, the others are its factors (order 2)."""

    def __init__(self, config: DeepFMConfig, shapes: InputShapes, num_tasks: int, rngs: nnx.Rngs) -> None:
        """Makes the towers.

        Raises:
            ValueError: The tables have several dims, or less than two floats a vector.
        """
        dims = {dim for _, dim in shapes.fields}
        if len(dims) != 1 or min(dims) < 2:
            raise ValueError(f"DeepFM needs one TableConfig.dim of at least 2 for all tables, got {sorted(dims)}")
        self.deep = Mlp((shapes.flat, *config.hidden, num_tasks), False, config.compute_dtype, rngs)
        self.wide = nnx.Param(jnp.ones((num_tasks,), float_dtype()))

    def __call__(self, inputs: ModelInputs) -> jax.Array:
        """Returns logits, float32 [B, T]."""
        fields = jnp.concatenate(inputs.fields, axis=1)
        wide = fields[:, :, 0].sum(1) + pairs(fields[:, :, 1:]).sum(1)
        return self.deep(flat(inputs)).astype(float_dtype()) + wide[:, None] * self.wide[...]
