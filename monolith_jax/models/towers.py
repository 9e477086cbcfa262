"""The towers of a config, and vectors to logits: what training and serving share.

In: the config of a model, the layout of its features and its heads. Out: `Towers` (the static half), their first weights, and
`forward`, which both sides compile, so that what is served is what was trained. Weights have names, by which files keep them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from monolith_jax.features import FeatureLayout
from monolith_jax.models.deepfm import DeepFM, DeepFMConfig
from monolith_jax.models.layers import InputShapes, ModelInputs, combine, num_fields
from monolith_jax.models.losses import HeadConfig, check_heads, offsets
from monolith_jax.models.mmoe import MMoE, MMoEConfig
from monolith_jax.types import Array

ModelConfig = DeepFMConfig | MMoEConfig


@dataclass(frozen=True)
class Towers:
    """The static half of the towers: what is compiled, not what is learned."""

    graph: nnx.GraphDef
    layout: FeatureLayout
    heads: tuple[HeadConfig, ...]


def make_towers(
    config: ModelConfig, layout: FeatureLayout, dims: Sequence[int], heads: Sequence[HeadConfig], seed: int
) -> tuple[Towers, nnx.State]:
    """Returns towers and their first weights.

    Args:
        config: Their sizes.
        layout: The features.
        dims: D of each group of tables.
        heads: What is predicted.
        seed: Of the first weights.

    Raises:
        ValueError: There is no head, or the configs do not fit together.
    """
    if not heads:
        raise ValueError("Experiment.heads is empty: name at least one HeadConfig, the model has to predict something")
    check_heads(heads)
    fields = tuple((num_fields(slots), dim) for slots, dim in zip(layout.groups, dims, strict=True))
    shapes = InputShapes(fields, layout.num_dense)
    rngs = nnx.Rngs(seed)
    match config:
        case DeepFMConfig():
            module = DeepFM(config, shapes, len(heads), rngs)
        case MMoEConfig():
            module = MMoE(config, shapes, len(heads), rngs)
    graph, weights = nnx.split(module, nnx.Param)
    return Towers(graph, layout, tuple(heads)), weights


def forward(
    towers: Towers,
    weights: Any,
    vectors: Sequence[Array],
    valid: Sequence[Array],
    list_weights: Sequence[Array | None],
    dense: Array,
) -> jax.Array:
    """Returns logits [B, T].

    Args:
        towers: The towers.
        weights: Their weights, as a plain tree.
        vectors: Of each group the vectors at the id positions, [B, P, D], zeros where there is no id or it has no row.
        valid: Of each group whether there is an id, bool [B, P].
        list_weights: Of each group the weights of list items, float32 [B, P], None where it has none.
        dense: float32 [B, n].
    """
    parts = zip(towers.layout.groups, vectors, valid, list_weights, strict=True)
    fields = tuple(combine(slots, of_group, there, of_items) for slots, of_group, there, of_items in parts)
    module = nnx.merge(towers.graph, nnx.State(weights))
    return module(ModelInputs(fields, dense)) + offsets(towers.heads)


def named_weights(weights: Any) -> dict[str, Any]:
    """Returns the leaves of a plain tree of weights by their paths: `deep/layers/0/kernel`."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(weights)}


def weights_of(named: Mapping[str, np.ndarray], like: Any) -> Any:
    """Returns the tree that `named_weights` took apart.

    Args:
        named: Weights by their paths.
        like: A tree of weights, or of their shapes and types.

    Raises:
        ValueError: Names, shapes or types are not those of `like`.
    """
    wanted = named_weights(like)
    if wanted.keys() != named.keys():
        missing, unknown = sorted(wanted.keys() - named.keys()), sorted(named.keys() - wanted.keys())
        raise ValueError(
            f"the dense weights are of another model: missing are {', '.join(missing) or 'none'}, unknown "
            f"{', '.join(unknown) or 'none'}; use the ModelConfig, features and heads that they were trained with"
        )
    for name, leaf in wanted.items():
        if named[name].shape != leaf.shape or named[name].dtype != leaf.dtype:
            raise ValueError(
                f"the dense weight {name!r} is {named[name].dtype} {named[name].shape}, this model has {leaf.dtype} "
                f"{leaf.shape}; use the ModelConfig, features and heads that it was trained with"
            )
    return jax.tree.unflatten(jax.tree.structure(like), list(map(named.__getitem__, wanted)))
