"""The towers of a config, and vectors to logits: what training and serving share.

In: the configs of a ranker, of a two-tower, or of both, the layout of their features and the heads. Out: `Towers` (the static
half), their first weights, and `forward`, `user_vectors` and `video_vectors`, which both sides compile, so that what is served
is what was trained. Weights have names, by which files keep them; the two-tower's begin with `retrieval/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monolith_jax.features import FeatureLayout
from monolith_jax.models.dcn import DCN, DCNConfig
from monolith_jax.models.deepfm import DeepFM, DeepFMConfig
from monolith_jax.models.fm import FactorisationMachine, FMConfig, LinearConfig
from monolith_jax.models.layers import InputShapes, ModelInputs, combine, num_fields
from monolith_jax.models.losses import HeadConfig, check_heads, offsets
from monolith_jax.models.mmoe import MMoE, MMoEConfig
from monolith_jax.models.shared_bottom import SharedBottom, SharedBottomConfig
from monolith_jax.models.two_tower import TwoTower, TwoTowerConfig, tower_inputs
from monolith_jax.tables.update import float_dtype
from monolith_jax.types import Array

RETRIEVAL = "retrieval"
"""Under which the weights of the two-tower are, beside the ranker's."""

ModelConfig = LinearConfig | FMConfig | DeepFMConfig | DCNConfig | SharedBottomConfig | MMoEConfig


@dataclass(frozen=True)
class Towers:
    """The static half of the towers: what is compiled, not what is learned."""

    graph: nnx.GraphDef | None
    """Of the ranker; None: there is none."""
    layout: FeatureLayout
    heads: tuple[HeadConfig, ...]
    retrieval: nnx.GraphDef | None = None
    """Of the two-tower; None: there is none."""
    two_tower: TwoTowerConfig | None = None


def make_towers(
    config: ModelConfig | None,
    layout: FeatureLayout,
    dims: Sequence[int],
    heads: Sequence[HeadConfig],
    seed: int,
    two_tower: TwoTowerConfig | None = None,
) -> tuple[Towers, nnx.State]:
    """Returns towers and their first weights.

    Args:
        config: Sizes of the ranker; None: none.
        layout: The features.
        dims: D of each group of tables.
        heads: What the ranker predicts; none without one.
        seed: Of the first weights.
        two_tower: Sizes of the two-tower; None: none.

    Raises:
        ValueError: There is nothing to learn, or the configs do not fit together.
    """
    if config is None and two_tower is None:
        raise ValueError("there is neither a ranker nor a two-tower: set Experiment.model, Experiment.retrieval or both")
    graph, weights = (None, nnx.State({})) if config is None else _ranker(config, layout, dims, heads, seed)
    if config is None and heads:
        raise ValueError("Experiment.heads are the ranker's, and Experiment.model is not set: set it, or leave the heads empty")
    if two_tower is None:
        return Towers(graph, layout, tuple(heads)), weights
    retrieval, of_retrieval = nnx.split(TwoTower(two_tower, layout, dims, nnx.Rngs(seed)), nnx.Param)
    weights = nnx.State({**weights, RETRIEVAL: of_retrieval})
    return Towers(graph, layout, tuple(heads), retrieval, two_tower), weights


def _ranker(
    config: ModelConfig, layout: FeatureLayout, dims: Sequence[int], heads: Sequence[HeadConfig], seed: int
) -> tuple[nnx.GraphDef, nnx.State]:
    if not heads:
        raise ValueError("Experiment.heads is empty: name at least one HeadConfig, the model has to predict something")
    check_heads(heads)
    fields = tuple((num_fields(slots), dim) for slots, dim in zip(layout.groups, dims, strict=True))
    shapes = InputShapes(fields, layout.num_dense)
    rngs = nnx.Rngs(seed)
    match config:
        case LinearConfig() | FMConfig():
            module = FactorisationMachine(config, shapes, len(heads), rngs)
        case DCNConfig():
            module = DCN(config, shapes, len(heads), rngs)
        case SharedBottomConfig():
            module = SharedBottom(config, shapes, len(heads), rngs)
        case DeepFMConfig():
            module = DeepFM(config, shapes, len(heads), rngs)
        case MMoEConfig():
            module = MMoE(config, shapes, len(heads), rngs)
    return nnx.split(module, nnx.Param)


def forward(
    towers: Towers,
    weights: Any,
    vectors: Sequence[Array],
    valid: Sequence[Array],
    list_weights: Sequence[Array | None],
    dense: Array,
) -> jax.Array:
    """Returns the ranker's logits [B, T]; [B, 0] where there is none.

    Args:
        towers: The towers.
        weights: Their weights, as a plain tree.
        vectors: Of each group the vectors at the id positions, [B, P, D], zeros where there is no id or it has no row.
        valid: Of each group whether there is an id, bool [B, P].
        list_weights: Of each group the weights of list items, float32 [B, P], None where it has none.
        dense: float32 [B, n].
    """
    if towers.graph is None:
        return jnp.zeros((dense.shape[0], 0), float_dtype())
    parts = zip(towers.layout.groups, vectors, valid, list_weights, strict=True)
    fields = tuple(combine(slots, of_group, there, of_items) for slots, of_group, there, of_items in parts)
    of_ranker = {name: weight for name, weight in weights.items() if name != RETRIEVAL}
    module = nnx.merge(towers.graph, nnx.State(of_ranker))
    return module(ModelInputs(fields, dense)) + offsets(towers.heads)


def user_vectors(
    towers: Towers,
    weights: Any,
    layout: FeatureLayout,
    vectors: Sequence[Array],
    valid: Sequence[Array],
    list_weights: Sequence[Array | None],
    dense: Array,
) -> jax.Array:
    """Returns the two-tower's vectors of users, float32 [B, D] of length 1.

    Args:
        towers: The towers, with a two-tower.
        weights: Their weights, as a plain tree.
        layout: By which the inputs are laid out: `towers.layout`, or that of the user's features alone (`features.restricted`).
        vectors, valid, list_weights, dense: As of `forward`.
    """
    config = _two_tower(towers)
    inputs = tower_inputs(layout, config.user_features, config, vectors, valid, list_weights, dense)
    return _merged(towers, weights).user(inputs)


def video_vectors(
    towers: Towers,
    weights: Any,
    layout: FeatureLayout,
    vectors: Sequence[Array],
    valid: Sequence[Array],
    list_weights: Sequence[Array | None],
    dense: Array,
) -> jax.Array:
    """Returns the two-tower's vectors of videos, float32 [B, D] of length 1; arguments as of `user_vectors`."""
    config = _two_tower(towers)
    inputs = tower_inputs(layout, config.video_features, config, vectors, valid, list_weights, dense)
    return _merged(towers, weights).video(inputs)


def _two_tower(towers: Towers) -> TwoTowerConfig:
    if towers.two_tower is None:
        raise ValueError("these towers have no two-tower; set Experiment.retrieval, and train with it")
    return towers.two_tower


def _merged(towers: Towers, weights: Any) -> TwoTower:
    assert towers.retrieval is not None
    return nnx.merge(towers.retrieval, nnx.State(weights[RETRIEVAL]))


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
