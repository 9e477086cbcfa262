"""The ranker's logits of one user and K candidates, the user's side computed once.

In: the vectors of the features that all candidates share, [1, P, D], and of those that each has for itself, [K, P, D]. Out:
logits [K, T], equal to what `towers.forward` makes of K whole examples but for rounding. The first layer is linear, so
W x = W_once x_once + W_each x_each; only the second product, and what lies above it, is done K times. Experts are kept apart
and candidates stay the rows of all products, which spares the CPU the copies that turn one layout into another. A model without
such a first layer (DCN-v2's crosses take all inputs at every layer) or without any is given K whole examples.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monolith_jax.features import DenseFeatureConfig, FeatureLayout, restricted
from monolith_jax.models.dcn import DCN
from monolith_jax.models.deepfm import DeepFM
from monolith_jax.models.fm import FactorisationMachine
from monolith_jax.models.layers import InputShapes, Mlp, ModelInputs, StackedMlp, combine, flat, num_fields, pairs
from monolith_jax.models.losses import offsets
from monolith_jax.models.mmoe import MMoE
from monolith_jax.models.shared_bottom import SharedBottom
from monolith_jax.models.towers import RETRIEVAL, Towers
from monolith_jax.tables.update import float_dtype
from monolith_jax.types import Array


@dataclass(frozen=True)
class Split:
    """Which features all candidates share, and which each has for itself. Made by `split`."""

    towers: Towers
    once: FeatureLayout
    each: FeatureLayout
    once_rows: tuple[int, ...]
    """Which of the model's flat inputs are those of `once`, in its order."""
    each_rows: tuple[int, ...]
    """The same of `each`."""
    shapes: InputShapes
    """Of both together, as the model takes them."""


class SideInputs(NamedTuple):
    """What `towers.forward` takes of an example, of one side."""

    vectors: Sequence[Array]
    """Of each group float32 [1 or K, P, D]."""
    valid: Sequence[Array]
    """Of each group bool [1 or K, P]."""
    list_weights: Sequence[Array | None]
    """Of each group float32 [1 or K, P], or None."""
    dense: Array
    """float32 [1 or K, n]"""


class Layer(NamedTuple):
    """Weights of a layer, in the type of its product."""

    kernel: Array
    """[I, O], of stacked layers [N, I, O]."""
    bias: Array
    """[O], of stacked layers [N, O]."""


class FirstLayer(NamedTuple):
    """A layer whose inputs come from both sides."""

    once: Array
    """[I of the once side, O]"""
    each: Array
    """[I of the each side and the pairs, O]"""
    bias: Array
    """[O]"""


class Prepared(NamedTuple):
    """The weights, cut and ordered for candidates. What a model does not have is empty."""

    first: tuple[FirstLayer, ...] = ()
    """The layers that see the inputs: deep's, bottom's or trunk's first one; or those of all experts, and of the gates last."""
    above: tuple[Layer, ...] = ()
    """The other layers of deep, bottom or trunk."""
    experts: tuple[tuple[Layer, ...], ...] = ()
    """Of each expert the layers that do not see the inputs."""
    gates: Layer | None = None
    """The gates [I, T E] above a trunk."""
    towers: tuple[Layer, ...] = ()
    """Stacked over the tasks."""
    wide: Array | None = None
    """[T]"""
    whole: Any = None
    """All weights, of a model that takes whole examples."""


def split(towers: Towers, dims: Sequence[int], each: Collection[str]) -> Split:
    """Splits the features of a ranker.

    Args:
        towers: The ranker.
        dims: D of each group of tables.
        each: Names of the features that each candidate has for itself.

    Raises:
        ValueError: There is no such feature, or no ranker.
    """
    if towers.graph is None:
        raise ValueError("this model has no ranker; set Experiment.model, and train with it")
    layout = towers.layout
    names = [feature.name for feature in layout.features]
    of_each = restricted(layout, list(each))
    of_once = restricted(layout, [name for name in names if name not in each])
    # `restricted` keeps the order, so a side's inputs are those of the whole that are its own.
    owners = [
        slot.feature
        for slots, dim in zip(layout.groups, dims, strict=True)
        for slot in slots
        for _ in range(num_fields((slot,)) * dim)
    ]
    owners += [one.name for one in layout.features if isinstance(one, DenseFeatureConfig) for _ in range(one.size)]
    rows = [[row for row, name in enumerate(owners) if (name in each) == side] for side in (False, True)]
    fields = tuple((num_fields(slots), dim) for slots, dim in zip(layout.groups, dims, strict=True))
    return Split(towers, of_once, of_each, tuple(rows[0]), tuple(rows[1]), InputShapes(fields, layout.num_dense))


def prepare(split: Split, weights: Any) -> Prepared:
    """Returns a ranker's weights for `candidate_logits`; once for each version of them.

    Args:
        split: The sides.
        weights: As `towers.forward` takes them.
    """
    assert split.towers.graph is not None
    of_ranker = {name: weight for name, weight in weights.items() if name != RETRIEVAL}
    module = nnx.merge(split.towers.graph, nnx.State(of_ranker))
    match module:
        case DeepFM():
            first, *above = _layers(module.deep)
            return Prepared((_first(split, first),), tuple(above), wide=module.wide[...])
        case SharedBottom():
            first, *above = _layers(module.bottom)
            return Prepared((_first(split, first),), tuple(above), towers=_stacked(module.towers))
        case MMoE():
            experts = _unstacked(module.experts)
            (gates,) = _stacked(module.gates)
            gates = Layer(jnp.concatenate(list(gates.kernel), axis=1), gates.bias.reshape(-1))
            towers = _stacked(module.towers)
            if module.trunk.layers:
                first, *above = _layers(module.trunk)
                return Prepared((_first(split, first),), tuple(above), experts, gates, towers)
            firsts = tuple(_first(split, layer) for layer in (*(one[0] for one in experts), gates))
            return Prepared(firsts, (), tuple(one[1:] for one in experts), None, towers)
        case FactorisationMachine() | DCN():
            return Prepared(whole=of_ranker)
    raise AssertionError(f"{type(module).__name__} is none of the rankers of towers.ModelConfig")


def _layers(mlp: Mlp) -> list[Layer]:
    layers = []
    for one in mlp.layers:
        assert one.bias is not None
        layers.append(Layer(one.kernel[...].astype(one.dtype), one.bias[...].astype(one.dtype)))
    return layers


def _stacked(stack: StackedMlp) -> tuple[Layer, ...]:
    both = zip(stack.kernels, stack.biases, strict=True)
    return tuple(Layer(kernel[...].astype(stack.dtype), bias[...].astype(stack.dtype)) for kernel, bias in both)


def _unstacked(stack: StackedMlp) -> tuple[tuple[Layer, ...], ...]:
    layers = _stacked(stack)
    return tuple(tuple(Layer(one.kernel[n], one.bias[n]) for one in layers) for n in range(layers[0].bias.shape[0]))


def _first(split: Split, layer: Layer) -> FirstLayer:
    rows = len(split.once_rows) + len(split.each_rows)
    of_each = layer.kernel[np.array(split.each_rows, np.int32)]
    return FirstLayer(
        layer.kernel[np.array(split.once_rows, np.int32)],
        jnp.concatenate([of_each, layer.kernel[rows:]]),  # What lies behind the inputs sees the pairs.
        layer.bias,
    )


def candidate_logits(split: Split, prepared: Prepared, once: SideInputs, each: SideInputs) -> jax.Array:
    """Returns logits [K, T].

    Args:
        split: The sides.
        prepared: The weights.
        once: Of one example, laid out by `split.once`.
        each: Of K examples, laid out by `split.each`.
    """
    of_once, of_each = _inputs(split.once, once), _inputs(split.each, each)
    if prepared.whole is not None:
        logits = _whole(split, prepared.whole, of_once, of_each)
    elif prepared.wide is not None:
        logits = _deepfm(prepared, prepared.wide, of_once, of_each)
    elif prepared.experts:
        logits = _mmoe(prepared, of_once, of_each)
    else:
        logits = _shared_bottom(prepared, of_once, of_each)
    return logits + offsets(split.towers.heads)


def _inputs(layout: FeatureLayout, side: SideInputs) -> ModelInputs:
    parts = zip(layout.groups, side.vectors, side.valid, side.list_weights, strict=True)
    return ModelInputs(tuple(combine(*of_group) for of_group in parts), side.dense)


def _first_product(layer: FirstLayer, once: jax.Array, each: jax.Array) -> jax.Array:
    """Returns [K, O] in the layer's type; both products and their sum are of full precision, as that of one product is."""
    dtype = layer.bias.dtype
    of_once, of_each = (
        jnp.matmul(x.astype(dtype), kernel, preferred_element_type=float_dtype())
        for x, kernel in ((once, layer.once), (each, layer.each))
    )
    return (of_once + of_each).astype(dtype) + layer.bias


def _above(x: jax.Array, layer: Layer) -> jax.Array:
    return jnp.matmul(nnx.relu(x).astype(layer.bias.dtype), layer.kernel) + layer.bias


def _deepfm(prepared: Prepared, wide_T: Array, once: ModelInputs, each: ModelInputs) -> jax.Array:
    x = _first_product(prepared.first[0], flat(once), flat(each))
    for layer in prepared.above:
        x = _above(x, layer)
    fields = [jnp.concatenate(side.fields, axis=1) for side in (once, each)]
    linear = fields[0][:, :, 0].sum(1) + fields[1][:, :, 0].sum(1)
    wide = linear + pairs(*(side[:, :, 1:] for side in fields)).sum(1)
    return x.astype(float_dtype()) + wide[:, None] * wide_T


def _whole(split: Split, weights: Any, once: ModelInputs, each: ModelInputs) -> jax.Array:
    x_once, x_each = flat(once), flat(each)
    x_once = jnp.broadcast_to(x_once, (x_each.shape[0], x_once.shape[1]))
    x = jnp.concatenate([x_once, x_each], axis=1)[:, np.argsort([*split.once_rows, *split.each_rows])]
    ends = np.cumsum([number * dim for number, dim in split.shapes.fields])
    *fields, dense = jnp.split(x, ends, axis=1)
    fields = tuple(field.reshape(-1, *shape) for field, shape in zip(fields, split.shapes.fields, strict=True))
    assert split.towers.graph is not None
    return nnx.merge(split.towers.graph, nnx.State(weights))(ModelInputs(fields, dense))


def _sides(once: ModelInputs, each: ModelInputs) -> tuple[jax.Array, jax.Array]:
    """Returns the inputs of a first layer that sees the pairs: they are each candidate's."""
    products = [pairs(*sides) for sides in zip(once.fields, each.fields, strict=True)]
    return flat(once), jnp.concatenate([flat(each), *products], axis=1)


def _shared_bottom(prepared: Prepared, once: ModelInputs, each: ModelInputs) -> jax.Array:
    x = _first_product(prepared.first[0], *_sides(once, each))
    for layer in prepared.above:
        x = _above(x, layer)
    x = nnx.relu(x).astype(prepared.towers[0].bias.dtype)
    return _of_towers(prepared, jnp.broadcast_to(x, (prepared.towers[0].bias.shape[0], *x.shape)))


def _of_towers(prepared: Prepared, x_TKD: jax.Array) -> jax.Array:
    """Returns logits [K, T] of what each task's tower sees."""
    for index, layer in enumerate(prepared.towers):
        x_TKD = nnx.relu(x_TKD) if index else x_TKD
        x_TKD = jnp.einsum("tki,tio->tko", x_TKD, layer.kernel) + layer.bias[:, None]
    return x_TKD[:, :, 0].T.astype(float_dtype())


def _mmoe(prepared: Prepared, once: ModelInputs, each: ModelInputs) -> jax.Array:
    x_once, x_each = _sides(once, each)
    firsts = [_first_product(layer, x_once, x_each) for layer in prepared.first]
    if prepared.gates is None:
        *experts, gates = firsts
        above = prepared.experts
    else:
        x = firsts[0]
        for layer in prepared.above:
            x = _above(x, layer)
        experts = [_above(x, layers[0]) for layers in prepared.experts]
        gates, above = _above(x, prepared.gates), [layers[1:] for layers in prepared.experts]
    mixed = []
    for expert, layers in zip(experts, above, strict=True):
        for layer in layers:
            expert = _above(expert, layer)
        mixed.append(nnx.relu(expert))
    # Rounded as the factors of one product are, and summed in full.
    shares_KTE = jax.nn.softmax(gates.reshape(gates.shape[0], -1, len(mixed))).astype(mixed[0].dtype).astype(float_dtype())
    terms = [shares_KTE[:, :, e].T[:, :, None] * expert.astype(float_dtype()) for e, expert in enumerate(mixed)]
    return _of_towers(prepared, functools.reduce(operator.add, terms).astype(prepared.towers[0].bias.dtype))
