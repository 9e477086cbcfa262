"""DCN-v2 (Wang et al. 2021, arXiv 2008.13535), stacked: cross layers over all inputs, and a deep tower above them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from monolith_jax.models.layers import ComputeDtype, InputShapes, Mlp, ModelInputs, flat, product_dtype
from monolith_jax.tables.update import float_dtype


@dataclass(frozen=True)
class DCNConfig:
    """The sizes of a DCN-v2."""

    cross_layers: int = 3
    """Number of cross layers; with l of them the products of up to l + 1 inputs are seen."""
    rank: int = 0
    """R of a layer's matrix U V with U [I, R] and V [R, I]; 0: a full matrix [I, I]."""
    hidden: tuple[int, ...] = (400, 400, 400)
    """Units of the deep tower's layers, above the cross layers; none: logits are linear in the last cross layer."""
    compute_dtype: ComputeDtype = "float32"
    """Type of the matrix products; weights, sums and the loss stay float32."""


class DCN(nnx.Module):
    """Logits of T tasks: deep(x_L), with x_0 all vectors and dense values, and x_l+1 = x_0 * (W_l x_l + b_l) + x_l."""

    def __init__(self, config: DCNConfig, shapes: InputShapes, num_tasks: int, rngs: nnx.Rngs) -> None:
        """Makes the cross layers and the tower.

        Raises:
            ValueError: There are no cross layers, or a rank that saves nothing.
        """
        size, rank = shapes.flat, config.rank
        if config.cross_layers < 1:
            raise ValueError(
                f"DCNConfig.cross_layers must be at least 1, got {config.cross_layers}; for no crosses take another model"
            )
        if not 0 <= 2 * rank < size:
            raise ValueError(
                f"DCNConfig.rank must be 0 (full matrices) or less than half of the {size} inputs, above which full matrices "
                f"are smaller; got {rank}"
            )
        dtype = product_dtype(config.compute_dtype)

        def layers(inputs: int, outputs: int, bias: bool) -> nnx.List:
            return nnx.List(
                [
                    nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=float_dtype(), rngs=rngs)
                    for _ in range(config.cross_layers)
                ]
            )

        self.down = layers(size, rank, False) if rank else nnx.List([])
        self.up = layers(rank or size, size, True)
        if rank:  # As two layers in a row of an Mlp are split among the devices of the model axis.
            for down, up in zip(self.down, self.up, strict=True):
                down.kernel.set_metadata(axes=(None, "hidden"))
                up.kernel.set_metadata(axes=("hidden", None))
        self.deep = Mlp((size, *config.hidden, num_tasks), False, config.compute_dtype, rngs)

    def __call__(self, inputs: ModelInputs) -> jax.Array:
        """Returns logits, float32 [B, T]."""
        first = x = flat(inputs)
        for index, up in enumerate(self.up):
            seen = self.down[index](x) if self.down else x
            x = first * up(seen).astype(float_dtype()) + x
        return self.deep(x).astype(float_dtype())
