"""The pieces that models are made of.

In: vectors of the id positions of a batch [B, P, D] and dense values [B, n]. Out: fields (one vector a feature), and modules
over them. Weights carry the logical axes that `mesh.weight_spec` splits them by, as metadata `axes`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from monolith_jax.features import Slot
from monolith_jax.tables.update import float_dtype

ComputeDtype = Literal["float32", "bfloat16"]


def product_dtype(dtype: ComputeDtype) -> jnp.dtype:
    """Returns the type of matrix products; "float32" means `float_dtype`."""
    return float_dtype() if dtype == "float32" else jnp.dtype(dtype)


def axes_of(weights: nnx.State) -> dict[str, Any]:
    """Returns the logical axes of each weight, () where it is not split, as a tree of the form of `nnx.to_pure_dict`."""
    return nnx.to_pure_dict(nnx.map_state(lambda _, weight: weight.get_metadata().get("axes", ()), weights))


class ModelInputs(NamedTuple):
    """What a model sees of a batch."""

    fields: tuple[jax.Array, ...]
    """Of each group of tables float32 [B, F, D]: one vector a feature (N for a list that is kept)."""
    dense: jax.Array
    """float32 [B, n]"""


class InputShapes(NamedTuple):
    """The shapes of `ModelInputs` without the batch."""

    fields: tuple[tuple[int, int], ...]
    num_dense: int

    @property
    def flat(self) -> int:
        """Floats of an example."""
        return sum(number * dim for number, dim in self.fields) + self.num_dense

    @property
    def flat_and_pairs(self) -> int:
        """Floats that `flat_and_pairs` makes of an example."""
        return self.flat + sum(dim for _, dim in self.fields)


def num_fields(slots: Sequence[Slot]) -> int:
    """Returns F, the vectors that `combine` makes of a group's slots."""
    return sum(slot.length if slot.combiner == "none" else 1 for slot in slots)


def combine(slots: Sequence[Slot], vectors: jax.Array, valid: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Combines the vectors of lists.

    Args:
        slots: The group's slots, those of one unweighted id first.
        vectors: float32 [B, P, D], zeros where there is no id.
        valid: bool [B, P].
        weights: float32 [B, P], or None.

    Returns:
        float32 [B, F, D].
    """
    singles = sum(1 for slot in slots if slot.length == 1 and slot.combiner != "none" and not slot.weighted)
    fields = [vectors[:, :singles]]
    fields += [combined(slot, vectors, valid, weights) for slot in slots[singles:]]
    return jnp.concatenate(fields, axis=1) if len(fields) > 1 else fields[0]


def combined(slot: Slot, vectors: jax.Array, valid: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Returns what `combine` makes of one slot, float32 [B, 1, D], or [B, N, D] of a list that is kept."""
    where = slice(slot.start, slot.start + slot.length)
    of_list = vectors[:, where]
    if slot.weighted and weights is not None:
        of_list = of_list * weights[:, where, None].astype(vectors.dtype)
    count = valid[:, where].astype(vectors.dtype).sum(1)[:, None, None]
    match slot.combiner:
        case "none":
            return of_list
        case "first":
            return of_list[:, :1]
        case "sum":
            return of_list.sum(1, keepdims=True)
        case "mean":
            return of_list.sum(1, keepdims=True) / jnp.maximum(count, 1.0)
        case "sqrtn":
            return of_list.sum(1, keepdims=True) / jnp.sqrt(jnp.maximum(count, 1.0))


def flat(inputs: ModelInputs) -> jax.Array:
    """Returns all that is known of an example side by side, [B, flat]."""
    fields = [field.reshape(field.shape[0], -1) for field in inputs.fields]
    return jnp.concatenate([*fields, inputs.dense.astype(float_dtype())], axis=1)


def pairs(*fields: jax.Array) -> jax.Array:
    """Returns the sum over all pairs of fields of their elementwise products, [B, D], in time linear in their number.

    Args:
        fields: [B, F, D], or several of them whose fields are taken together; one of them may have a B of 1.
    """
    total = functools.reduce(operator.add, [part.sum(1) for part in fields])
    squares = functools.reduce(operator.add, [(part * part).sum(1) for part in fields])
    return 0.5 * (total * total - squares)


def flat_and_pairs(inputs: ModelInputs) -> jax.Array:
    """Returns what is known of an example and, of each group, the sum over all pairs of its fields, [B, flat_and_pairs].

    The sums are the bi-interaction of He and Chua (2017, arXiv 1708.05027): relu layers alone are slow to learn that a user's
    and a video's vectors match.
    """
    return jnp.concatenate([flat(inputs), *map(pairs, inputs.fields)], axis=1)


class Mlp(nnx.Module):
    """Dense layers with relu between them; weights are float32, products in the compute dtype.

    Two layers in a row are split among the devices of the model axis as in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053,
    section 3): the first by its outputs, the second by its inputs, so that only the second's sums are exchanged. A last layer
    without a partner is not split.
    """

    def __init__(self, sizes: Sequence[int], activate_last: bool, dtype: ComputeDtype, rngs: nnx.Rngs) -> None:
        """Makes the layers from sizes[0] inputs to sizes[-1] outputs."""
        self.layers = nnx.List(
            [
                nnx.Linear(inputs, outputs, dtype=product_dtype(dtype), param_dtype=float_dtype(), rngs=rngs)
                for inputs, outputs in pairwise(sizes)
            ]
        )
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=False):
            first.kernel.set_metadata(axes=(None, "hidden"))
            assert first.bias is not None
            first.bias.set_metadata(axes=("hidden",))
            second.kernel.set_metadata(axes=("hidden", None))
        self.activate_last = activate_last

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., sizes[0]] to [..., sizes[-1]], in the compute dtype."""
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if self.activate_last or index + 1 < len(self.layers):
                x = nnx.relu(x)
        return x


class StackedMlp(nnx.Module):
    """N Mlps of equal sizes, computed together: few large products instead of many small ones.

    Whole Mlps are split among the devices of the model axis.
    """

    def __init__(self, number: int, sizes: Sequence[int], activate_last: bool, dtype: ComputeDtype, rngs: nnx.Rngs) -> None:
        """Makes N times the layers from sizes[0] inputs to sizes[-1] outputs."""
        initial = nnx.initializers.lecun_normal(batch_axis=0)
        kernels = [initial(rngs.params(), (number, *pair), float_dtype()) for pair in pairwise(sizes)]
        self.kernels = nnx.List([nnx.Param(kernel, axes=("stack", None, None)) for kernel in kernels])
        biases = [jnp.zeros((number, size), float_dtype()) for size in sizes[1:]]
        self.biases = nnx.List([nnx.Param(bias, axes=("stack", None)) for bias in biases])
        self.activate_last = activate_last
        self.dtype = product_dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps one input for all, [B, I], or one each, [B, N, I], to [B, N, O], in the compute dtype."""
        x = x.astype(self.dtype)
        for index, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            weights_NIO = kernel[...].astype(self.dtype)
            x = jnp.einsum("bi,nio->bno" if x.ndim == 2 else "bni,nio->bno", x, weights_NIO) + bias[...].astype(self.dtype)
            if self.activate_last or index + 1 < len(self.kernels):
                x = nnx.relu(x)
        return x
