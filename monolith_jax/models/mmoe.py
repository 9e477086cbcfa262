"""MMoE (Ma et al., KDD 2018): experts shared by all tasks, and for each task a gate over them and a tower."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from monolith_jax.models.layers import ComputeDtype, InputShapes, Mlp, ModelInputs, StackedMlp, flat_and_pairs
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

    x is all vectors, the dense values, and the sum of the products of all pairs of vectors (`layers.flat_and_pairs`).
    """

    def __init__(self, config: MMoEConfig, shapes: InputShapes, num_tasks: int, rngs: nnx.Rngs) -> None:
        """Makes experts, gates and towers."""
        dtype = config.compute_dtype
        size = config.trunk_hidden[-1] if config.trunk_hidden else shapes.flat_and_pairs
        self.trunk = Mlp((shapes.flat_and_pairs, *config.trunk_hidden), True, dtype, rngs)
        self.experts = StackedMlp(config.num_experts, (size, *config.expert_hidden), True, dtype, rngs)
        self.gates = StackedMlp(num_tasks, (size, config.num_experts), False, "float32", rngs)
        self.towers = StackedMlp(num_tasks, (config.expert_hidden[-1], *config.tower_hidden, 1), False, dtype, rngs)

    def __call__(self, inputs: ModelInputs) -> jax.Array:
        """Returns logits, float32 [B, T]."""
        x_BI = self.trunk(flat_and_pairs(inputs))
        experts_BED = self.experts(x_BI)
        gates_BTE = jax.nn.softmax(self.gates(x_BI)).astype(experts_BED.dtype)
        mixed_BTD = jnp.einsum("bte,bed->btd", gates_BTE, experts_BED)
        return self.towers(mixed_BTD)[:, :, 0].astype(float_dtype())
