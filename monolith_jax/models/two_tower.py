"""Two-tower retrieval: a vector of the user and one of the video, whose product says how well they match.

In: vectors of the id positions and dense values, the user's features by one tower, the video's by the other. Out: vectors of
length 1, and the loss: a sampled softmax over all videos of the batch, each corrected by how often it is there (Yi et al.,
Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations, RecSys 2019), with uniformly drawn videos among
them (Yang et al., Mixed Negative Sampling for Learning Two-tower Neural Networks in Recommendations, WWW 2020).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from monolith_jax.features import DenseFeatureConfig, FeatureLayout, Slot, restricted
from monolith_jax.models.layers import Mlp, combined
from monolith_jax.tables.update import float_dtype
from monolith_jax.types import Array, Retrieval

_ATTENTION_HIDDEN = 32
_NEVER = -1e30
"""The logit of what is no candidate: no infinity, whose differences are no numbers."""
_CENTRE = 0.02
"""Deviation of the first biases of a vector: of who nothing is known of has a direction too, of length 1 like all."""


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """The two towers, and what they learn from."""

    user_features: tuple[str, ...]
    """Features that the user's tower sees: of the user, the history and the context; none that depends on the video."""
    video_features: tuple[str, ...]
    """Features that the video's tower sees: none that depends on the user or on when the video is shown."""
    video_column: str = "video_id"
    """Column of the video's id, int64 or string; null: the example teaches nothing here."""
    dim: int = 64
    """D, floats of both vectors."""
    user_hidden: tuple[int, ...] = (128,)
    """Units of the user's tower below its vector."""
    video_hidden: tuple[int, ...] = (128,)
    """Units of the video's tower below its vector."""
    attention: tuple[str, ...] = ()
    """Lists of the user that lie side by side, newest first (`history`, `history_action`): the vectors of an item, one from
    each, are joined, and the items averaged with learned weights, by what they are and by their place. An item counts where the
    first of these lists has an id. Lists that are not named here are combined as their feature says."""
    summed: tuple[str, ...] = ()
    """Features of ids, of either tower, whose combined vectors are added to what the layers make of the others, before that is
    brought to length 1; their tables' dim must be `dim`. A tower of these alone has no layers, only one vector for all."""
    temperature: float = 0.1
    """A logit is the product of the two vectors over this."""
    positives: tuple[str, ...] = ("like",)
    """Labels, as heads name them, that make an example a positive."""
    positive_weights: tuple[float, ...] = (1.0,)
    """Of each of these labels: what it adds to the weight of an example, times the label."""
    num_negatives: int = 256
    """M, videos drawn uniformly for each step, over all devices, beside those of the examples. Being drawn does not keep an id
    from expiring; it does count where a table admits ids that were seen so many times, and gives an expired one a row again."""
    pool_size: int = 65_536
    """Videos that each partition draws them from: the last that were shown, but for those whose place a later one took. Costs
    the video's features each. About the number of live videos is best: a larger pool holds videos that are shown no more."""
    frequency_size: int = 2**18
    """Cells in which each partition counts how often a video is shown; costs 40 bytes each. A few times the live videos."""
    frequency_alpha: float = 0.01
    """Share of the newest interval in the running mean of the intervals between two showings of a video."""
    loss_weight: float = 1.0
    """Weight in the sum of the losses, beside the heads'."""


class TowerInputs(NamedTuple):
    """What one tower sees of a batch."""

    flat: jax.Array
    """[B, n]"""
    items: jax.Array | None
    """[B, N, d] what attention pools; None where there is none."""
    there: jax.Array | None
    """bool [B, N]"""
    summed: tuple[jax.Array, ...] = ()
    """[B, D] each, what is added to the tower's vector."""


class TowerShapes(NamedTuple):
    """The shapes of `TowerInputs` without the batch."""

    flat: int
    items: int
    """N, 0 without attention."""
    item_dim: int


class Tower(nnx.Module):
    """Inputs to vectors of length 1."""

    def __init__(self, shapes: TowerShapes, hidden: Sequence[int], dim: int, rngs: nnx.Rngs) -> None:
        """Makes the tower."""
        inputs = shapes.flat + shapes.item_dim
        self.mlp = Mlp((inputs, *hidden, dim), False, "float32", rngs) if inputs else None
        centre = _CENTRE * jax.random.normal(rngs.params(), (dim,), float_dtype())
        if self.mlp is None:
            self.centre = nnx.Param(centre)
        else:
            bias = self.mlp.layers[-1].bias
            assert bias is not None
            bias[...] = centre
        self.attention = Mlp((shapes.item_dim, _ATTENTION_HIDDEN), True, "float32", rngs) if shapes.items else None
        if shapes.items:
            initial = nnx.initializers.lecun_normal()(rngs.params(), (_ATTENTION_HIDDEN, 1), float_dtype())
            self.score = nnx.Param(initial[:, 0])
            self.place = nnx.Param(jnp.zeros((shapes.items,), float_dtype()))

    def __call__(self, inputs: TowerInputs) -> jax.Array:
        """Returns [B, D]."""
        seen = [inputs.flat]
        if self.attention is not None:
            assert inputs.items is not None and inputs.there is not None
            scores_BN = self.attention(inputs.items) @ self.score[...] + self.place[...]
            shares_BN = jnp.where(inputs.there, jax.nn.softmax(jnp.where(inputs.there, scores_BN, _NEVER)), 0.0)
            seen.append(jnp.einsum("bn,bnd->bd", shares_BN, inputs.items))
        vectors = self.centre[...] if self.mlp is None else self.mlp(jnp.concatenate(seen, axis=1))
        vectors = functools.reduce(
            operator.add, inputs.summed, jnp.broadcast_to(vectors, (inputs.flat.shape[0], vectors.shape[-1]))
        )
        return vectors * jax.lax.rsqrt(jnp.maximum(jnp.square(vectors).sum(1, keepdims=True), 1e-12))


class TwoTower(nnx.Module):
    """Both towers."""

    def __init__(self, config: TwoTowerConfig, layout: FeatureLayout, dims: Sequence[int], rngs: nnx.Rngs) -> None:
        """Makes the towers.

        Args:
            config: Their sizes.
            layout: All features.
            dims: D of each group of tables.
            rngs: Of the first weights.

        Raises:
            ValueError: The config does not fit the features.
        """
        check_two_tower(config, layout)
        _check_summed(config, layout, dims)
        self.user = Tower(_shapes(layout, config.user_features, config, dims), config.user_hidden, config.dim, rngs)
        self.video = Tower(_shapes(layout, config.video_features, config, dims), config.video_hidden, config.dim, rngs)


def check_two_tower(config: TwoTowerConfig, layout: FeatureLayout) -> None:
    """Raises ValueError where a field is out of its range or does not fit the features."""
    for side in ("user_features", "video_features"):
        names = getattr(config, side)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"TwoTowerConfig.{side} must name one or more features, each once, got {names}")
        restricted(layout, names)
    if both := sorted(set(config.user_features) & set(config.video_features)):
        raise ValueError(
            f"TwoTowerConfig: {', '.join(both)} cannot be the user's and the video's: the vectors must not depend on both"
        )
    if outside := sorted(set(config.attention) - set(config.user_features)):
        raise ValueError(f"TwoTowerConfig.attention names {', '.join(outside)}, which is not among user_features")
    slots = [slot for of_group in layout.groups for slot in of_group if slot.feature in config.attention]
    lengths = {slot.feature: slot.length for slot in slots}
    if len(slots) < len(set(config.attention)) or len(set(lengths.values())) > 1:
        raise ValueError(f"TwoTowerConfig.attention needs lists of ids of one max_length, got {lengths or config.attention}")
    if not config.positives or len(config.positives) != len(config.positive_weights) or min(config.positive_weights) <= 0:
        raise ValueError(
            "TwoTowerConfig: positives needs one or more labels, and positive_weights a number above 0 for each, got "
            f"{config.positives} and {config.positive_weights}"
        )
    for name in ("dim", "pool_size", "frequency_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"TwoTowerConfig.{name} must be at least 1, got {getattr(config, name)}")
    if config.num_negatives < 0 or not config.temperature > 0 or not 0 < config.frequency_alpha <= 1:
        raise ValueError(
            "TwoTowerConfig: num_negatives must be at least 0, temperature above 0, frequency_alpha above 0 and at most 1, got "
            f"{config.num_negatives}, {config.temperature}, {config.frequency_alpha}"
        )


def _check_summed(config: TwoTowerConfig, layout: FeatureLayout, dims: Sequence[int]) -> None:
    """Raises ValueError where vectors of `TwoTowerConfig.summed` cannot be added."""
    if outside := sorted(set(config.summed) - set(config.user_features) - set(config.video_features)):
        raise ValueError(f"TwoTowerConfig.summed names {', '.join(outside)}, which is among neither tower's features")
    if both := sorted(set(config.summed) & set(config.attention)):
        raise ValueError(f"TwoTowerConfig: {', '.join(both)} cannot be in attention and in summed; name it in one of them")
    found = {slot.feature: (slot, dims[group]) for group, slot in _slots_of(layout, config.summed)}
    for name in config.summed:
        if name not in found or found[name][0].combiner == "none":
            raise ValueError(
                f"TwoTowerConfig.summed: {name!r} has no one vector; it must be of ids, with a combiner other than none"
            )
        if found[name][1] != config.dim:
            raise ValueError(
                f"TwoTowerConfig.summed: the vectors of {name!r} have {found[name][1]} floats and TwoTowerConfig.dim is "
                f"{config.dim}; set its TableConfig.dim and TwoTowerConfig.dim to the same"
            )


def _slots_of(layout: FeatureLayout, names: Sequence[str]) -> list[tuple[int, Slot]]:
    """Returns group and slot of features, in an order that all layouts with them share."""
    return [(group, slot) for group, slots in enumerate(layout.groups) for slot in slots if slot.feature in names]


def _dense_of(layout: FeatureLayout, names: Sequence[str]) -> list[tuple[int, int]]:
    """Returns where the dense values of features start and end."""
    places, at = [], 0
    for feature in layout.features:
        if isinstance(feature, DenseFeatureConfig):
            if feature.name in names:
                places.append((at, at + feature.size))
            at += feature.size
    return places


def _shapes(layout: FeatureLayout, names: Sequence[str], config: TwoTowerConfig, dims: Sequence[int]) -> TowerShapes:
    flat, items, item_dim = sum(end - start for start, end in _dense_of(layout, names)), 0, 0
    for group, slot in _slots_of(layout, names):
        if slot.feature in config.attention:
            items, item_dim = slot.length, item_dim + dims[group]
        elif slot.feature not in config.summed:
            flat += dims[group] * (slot.length if slot.combiner == "none" else 1)
    return TowerShapes(flat, items, item_dim)


def tower_inputs(
    layout: FeatureLayout,
    names: Sequence[str],
    config: TwoTowerConfig,
    vectors: Sequence[Array],
    valid: Sequence[Array],
    list_weights: Sequence[Array | None],
    dense: Array,
) -> TowerInputs:
    """Returns what the tower of some features sees, given vectors, valid, list_weights and dense as of `towers.forward`.

    Args:
        layout: By which those are laid out: that of all features, or of these.
        names: The tower's features.
        config: Which of them attention pools, and which are summed.
    """
    flat, items, there, summed = [], [], None, []
    for group, slot in _slots_of(layout, names):
        if slot.feature not in config.attention:
            of_slot = combined(slot, vectors[group], valid[group], list_weights[group])
            (summed if slot.feature in config.summed else flat).append(of_slot.reshape(of_slot.shape[0], -1))
            continue
        kept = combined(replace(slot, combiner="none"), vectors[group], valid[group], list_weights[group])
        items.append(kept)
        if slot.feature == config.attention[0]:
            there = valid[group][:, slot.start : slot.start + slot.length]
    flat += [dense[:, start:end].astype(float_dtype()) for start, end in _dense_of(layout, names)]
    whole = jnp.concatenate(flat, axis=1) if flat else jnp.zeros((dense.shape[0], 0), float_dtype())
    return TowerInputs(whole, jnp.concatenate(items, axis=2) if items else None, there, tuple(summed))


class RetrievalLoss(NamedTuple):
    """What a batch tells of the two towers. float32 scalars."""

    loss: jax.Array
    hits: jax.Array
    """Weight of the examples whose own video was among the 10 best of the batch's distinct videos."""
    weight: jax.Array
    """Weight of all examples."""


def retrieval_loss(
    users_BD: jax.Array, own_BD: jax.Array, own_log_q: jax.Array, own_key: jax.Array, videos_RD: jax.Array, seen: Retrieval,
    temperature: float,
) -> RetrievalLoss:  # fmt: skip
    """Returns the sampled softmax loss: its mean over the whole batch, so that an example weighs the same in every batch.

    Args:
        users_BD: The queries, of length 1.
        own_BD: The video of each query.
        own_log_q, own_key: As in `seen`, float32 and uint32 [B], of these.
        videos_RD: The videos of all rows, of length 1.
        seen: Weights, log q and keys.
        temperature: Of `TwoTowerConfig`.
    """
    weight = seen.weight.astype(users_BD.dtype)
    log_q, own_log_q = seen.log_q.astype(users_BD.dtype), own_log_q.astype(users_BD.dtype)
    logits_BR = users_BD @ videos_RD.T / temperature
    own_B = (users_BD * own_BD).sum(1) / temperature
    # Where the query's own video is among the others, by chance, it is no negative.
    others = jnp.isfinite(log_q) & (seen.key != own_key[:, None])
    corrected = jnp.where(others, logits_BR - jnp.where(jnp.isfinite(log_q), log_q, 0.0), _NEVER)
    own_corrected = own_B - jnp.where(jnp.isfinite(own_log_q), own_log_q, 0.0)
    # -log(e^own / (e^own + sum of e^others))
    losses = jax.nn.softplus(jax.nn.logsumexp(corrected, axis=1) - own_corrected)
    better = others & (logits_BR > own_B[:, None])
    # A video that is there several times is one.
    times_R = (jnp.isfinite(log_q) & (seen.key[:, None] == seen.key)).astype(users_BD.dtype).sum(1)
    above = (better.astype(users_BD.dtype) / jnp.maximum(times_R, 1.0)).sum(1)
    return RetrievalLoss((weight * losses).mean(), jnp.where(above < 9.5, weight, 0.0).sum(), weight.sum())
