"""MMoE (Ma et al., KDD 2018): experts shared by all tasks, and for each task a gate over them and a tower."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from monolith_jax.models.layers import ComputeDtype, InputShapes, Mlp, ModelInputs, StackedMlp, flat, pairs
from monolith_jax.tables.update import float_dtype


@dataclass(frozen=True)
class MMoEConfig:
    """The sizes of an MMoE."""

    num_experts: int = 4
    """E"""
    expert_hidden: tuple[int, ...] = (128, 64)
    """Units of an expert's layers."""
    tower_hidden: tuple[int, ...] = (32,)
    """Units of a task's tower below its logit."""
    trunk_hidden: tuple[int, ...] = ()
    """Units of layers below experts and gates, shared by all; none by default."""
    compute_dtype: ComputeDtype = "float32"
    """Type of the matrix products; weights, gates, sums and the loss stay float32."""


class MMoE(nnx.Module):
    """Logits of T tasks: tower_t(sum over e of softmax(gate_t(x))_e expert_e(x)).

    x is all vectors, the dense values, and the sum of the products of all pairs of vectors (the bi-interaction of He and Chua
    2017, arXiv 1708.05027): relu layers alone are slow to learn that a user's and a video's vectors match.
    """

    def __init__(self, config: MMoEConfig, shapes: InputShapes, num_tasks: int, rngs: nnx.Rngs) -> None:
        """Makes experts, gates and towers."""
        dtype = config.compute_dtype
        seen = shapes.flat + sum(dim for _, dim in shapes.fields)
        size = config.trunk_hidden[-1] if config.trunk_hidden else seen
        self.trunk = Mlp((seen, *config.trunk_hidden), True, dtype, rngs)
        self.experts = StackedMlp(config.num_experts, (size, *config.expert_hidden), True, dtype, rngs)
        self.gates = StackedMlp(num_tasks, (size, config.num_experts), False, "float32", rngs)
        self.towers = StackedMlp(num_tasks, (config.expert_hidden[-1], *config.tower_hidden, 1), False, dtype, rngs)

    def __call__(self, inputs: ModelInputs) -> jax.Array:
        """Returns logits, float32 [B, T]."""
        x_BI = self.trunk(jnp.concatenate([flat(inputs), *(pairs(fields) for fields in inputs.fields)], axis=1))
        experts_BED = self.experts(x_BI)
        gates_BTE = jax.nn.softmax(self.gates(x_BI)).astype(experts_BED.dtype)
        mixed_BTD = jnp.einsum("bte,bed->btd", gates_BTE, experts_BED)
        return self.towers(mixed_BTD)[:, :, 0].astype(float_dtype())
