"""Shared bottom (Caruana 1997, "Multitask Learning"): layers shared by all tasks, and for each task a tower above them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from monolith_jax.models.layers import ComputeDtype, InputShapes, Mlp, ModelInputs, StackedMlp, flat_and_pairs
from monolith_jax.tables.update import float_dtype


@dataclass(frozen=True)
class SharedBottomConfig:
    """The sizes of a shared bottom. With one head it is a plain deep tower."""

    bottom_hidden: tuple[int, ...] = (256, 128)
    """Units of the shared layers, at least one."""
    tower_hidden: tuple[int, ...] = (32,)
    """Units of a task's tower below its logit."""
    compute_dtype: ComputeDtype = "float32"
    """Type of the matrix products; weights, sums and the loss stay float32."""


class SharedBottom(nnx.Module):
    """Logits of T tasks: tower_t(bottom(x)), with the x of an MMoE."""

    def __init__(self, config: SharedBottomConfig, shapes: InputShapes, num_tasks: int, rngs: nnx.Rngs) -> None:
        """Makes bottom and towers.

        Raises:
            ValueError: Nothing is shared.
        """
        if not config.bottom_hidden:
            raise ValueError("SharedBottomConfig.bottom_hidden is empty, so that tasks share no layer; give at least one")
        dtype = config.compute_dtype
        self.bottom = Mlp((shapes.flat_and_pairs, *config.bottom_hidden), True, dtype, rngs)
        self.towers = StackedMlp(num_tasks, (config.bottom_hidden[-1], *config.tower_hidden, 1), False, dtype, rngs)

    def __call__(self, inputs: ModelInputs) -> jax.Array:
        """Returns logits, float32 [B, T]."""
        return self.towers(self.bottom(flat_and_pairs(inputs)))[:, :, 0].astype(float_dtype())
