"""One user and K candidates, the user's side computed once, against `forward` over K whole examples."""

import dataclasses
import functools
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.features import Combiner, DenseFeatureConfig, FeatureConfig, IdFeatureConfig, feature_layout
from monolith_jax.models.candidates import SideInputs, candidate_logits, prepare, split
from monolith_jax.models.dcn import DCNConfig
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.fm import FMConfig, LinearConfig
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.models.shared_bottom import SharedBottomConfig
from monolith_jax.models.towers import ModelConfig, Towers, forward, make_towers
from monolith_jax.tables.update import float_dtype

LISTS: tuple[tuple[str, Combiner, int, bool], ...] = (
    ("small", "sum", 1, False),
    ("large", "mean", 3, False),
    ("small", "sqrtn", 2, False),
    ("large", "first", 2, False),
    ("small", "none", 2, False),
    ("large", "sum", 2, True),
    ("large", "mean", 1, True),
)
"""Table, combiner, length, and whether it has weights."""
HEADS = (HeadConfig("like", base_rate=0.1), HeadConfig("play_ratio", "regression", base_rate=0.7), HeadConfig("skip"))
FEATURES: tuple[FeatureConfig, ...] = (
    *(
        IdFeatureConfig(f"{side}_{combiner}{'_w' * weighted}", "c", table, length, combiner, "w" if weighted else "")
        for side in ("once", "each")
        for table, combiner, length, weighted in LISTS
    ),
    IdFeatureConfig("once_id", "c", "large"),
    IdFeatureConfig("each_id", "c", "large"),
    DenseFeatureConfig("each_number", "c", size=2),
    DenseFeatureConfig("once_number", "c", size=3),
    DenseFeatureConfig("each_other", "c"),
)
MODELS: dict[str, ModelConfig] = {
    "mmoe": MMoEConfig(3, (16, 8), (6,)),
    "mmoe of one layer": MMoEConfig(1, (8,), ()),
    "mmoe with a trunk": MMoEConfig(2, (8, 8), (6, 4), (24, 20)),
    "deepfm": DeepFMConfig((16, 8)),
    "deepfm without layers": DeepFMConfig(()),
    "shared bottom": SharedBottomConfig((16, 8), (6,)),
    "shared bottom of one layer": SharedBottomConfig((8,), ()),
    "dcn": DCNConfig(2, 0, (16, 8)),
    "dcn of low rank": DCNConfig(2, 4, ()),
    "linear": LinearConfig(),
    "fm": FMConfig(),
}


def sides_of(inputs: Any, layouts: tuple[Any, Any]) -> tuple[SideInputs, SideInputs]:
    """Returns of one example, and of all of them, the positions and numbers that a layout keeps of the whole one."""
    whole, of_groups, dense = inputs
    out = []
    for layout, number in zip(layouts, (1, dense.shape[0]), strict=True):
        kept = [
            [p for slot in slots for p in range(start[slot.feature], start[slot.feature] + slot.length)]
            for slots, start in zip(layout.groups, [{s.feature: s.start for s in slots} for slots in whole.groups], strict=True)
        ]
        names = [feature.name for feature in layout.features]
        numbers = [one for one in whole.features if isinstance(one, DenseFeatureConfig)]
        columns = np.flatnonzero(np.repeat([one.name in names for one in numbers], [one.size for one in numbers]))
        parts = [[array[:number, of_group] for array in arrays] for arrays, of_group in zip(of_groups, kept, strict=True)]
        vectors, valid, weights = zip(*parts, strict=True)
        out.append(SideInputs(vectors, valid, weights, dense[:number, columns]))
    return out[0], out[1]


def whole_inputs(towers: Towers, dims: list[int], once: set[str], number: int, seed: int) -> Any:
    """Returns random inputs of examples that agree in what is `once`."""
    rng, of_groups = np.random.default_rng(seed), []
    for slots, dim in zip(towers.layout.groups, dims, strict=True):
        positions = sum(slot.length for slot in slots)
        valid = rng.random((number, positions)) < 0.7
        vectors, weights = rng.normal(size=(number, positions, dim)) * valid[:, :, None], rng.normal(size=(number, positions))
        for slot in slots:
            if slot.feature in once:
                where = slice(slot.start, slot.start + slot.length)
                for array in (valid, vectors, weights):
                    array[:, where] = array[:1, where]
        of_groups.append((vectors.astype(float_dtype()), valid, weights.astype(np.float32)))
    dense = rng.normal(size=(number, towers.layout.num_dense)).astype(np.float32)
    numbers = [one for one in towers.layout.features if isinstance(one, DenseFeatureConfig)]
    shared = np.repeat([one.name in once for one in numbers], [one.size for one in numbers])
    dense[:, shared] = dense[:1, shared]
    return towers.layout, of_groups, dense


@functools.cache
def made(config: ModelConfig) -> tuple[Towers, list[int], Any]:
    """Returns towers, dims and weights."""
    match config:
        case LinearConfig():
            dims = [3, 3]
        case FMConfig() | DeepFMConfig():
            dims = [6, 6]
        case _:
            dims = [4, 6]
    towers, state = make_towers(config, feature_layout(FEATURES, [["small"], ["large"]]), dims, HEADS, 0)
    rng = np.random.default_rng(1)
    # Not the first weights: those of biases are zeros.
    return (
        towers,
        dims,
        jax.tree.map(lambda one: one + rng.normal(size=one.shape).astype(one.dtype) * 0.2, nnx.to_pure_dict(state)),
    )


def both(config: ModelConfig, each: set[str], number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits of candidates, and those of whole examples."""
    towers, dims, weights = made(config)
    once = {feature.name for feature in FEATURES} - each
    inputs = whole_inputs(towers, dims, once, number, seed)
    vectors, valid, list_weights = (list(one) for one in zip(*inputs[1], strict=True))
    sides = split(towers, dims, each)
    of_once, of_each = sides_of(inputs, (sides.once, sides.each))

    @jax.jit
    def logits(weights: Any, once: SideInputs, each: SideInputs, *whole: Any) -> tuple[jax.Array, jax.Array]:
        return candidate_logits(sides, prepare(sides, weights), once, each), forward(towers, weights, *whole)

    got, expected = logits(weights, of_once, of_each, vectors, valid, list_weights, inputs[2])
    assert got.dtype == float_dtype()
    return np.asarray(got), np.asarray(expected)


EACH = {feature.name for feature in FEATURES if feature.name.startswith("each")}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_candidates_equal_whole_examples(config: ModelConfig) -> None:
    got, expected = both(config, EACH, 9, 0)
    assert got.shape == (9, 3) and np.unique(expected[:, 0]).size > 6
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=4, deadline=None)
@given(st.sets(st.sampled_from([feature.name for feature in FEATURES])), st.sampled_from(list(MODELS)), st.integers(0, 99))
def test_any_features_may_be_either_side(each: set[str], model: str, seed: int) -> None:
    got, expected = both(MODELS[model], each, 3, seed)
    if not each:
        got = np.broadcast_to(got[:1], expected.shape)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("model", ["mmoe with a trunk", "deepfm", "shared bottom"])
def test_bfloat16_products_round_as_forward_does(model: str) -> None:
    exact = both(MODELS[model], EACH, 40, 1)[1]
    got, expected = both(dataclasses.replace(MODELS[model], compute_dtype="bfloat16"), EACH, 40, 1)  # pyright: ignore
    apart = np.linalg.norm(got - expected) / np.linalg.norm(expected - exact)
    assert 0 < np.linalg.norm(expected - exact) and apart < 1


def test_an_unknown_feature_is_told() -> None:
    towers, dims, _ = made(MODELS["deepfm"])
    with pytest.raises(ValueError, match="there is no feature video"):
        split(towers, dims, {"video"})


def test_in_float64_only_the_last_digits_differ() -> None:
    code = (
        "import jax; jax.config.update('jax_enable_x64', True)\n"
        "import numpy as np\n"
        "from tests.models.test_candidates import EACH, MODELS, both\n"
        "for config in map(MODELS.get, ('mmoe', 'deepfm', 'shared bottom', 'dcn', 'fm')):\n"
        "    got, expected = both(config, EACH, 5, 0)\n"
        "    assert got.dtype == np.float64 and np.abs(got - expected).max() < 1e-12, (config, np.abs(got - expected).max())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
