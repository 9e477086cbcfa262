"""Combining lists, and the pieces of towers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monolith_jax.features import Combiner, FeatureConfig, IdFeatureConfig, Slot, feature_layout
from monolith_jax.models.layers import InputShapes, Mlp, ModelInputs, StackedMlp, combine, flat, num_fields

COMBINERS: tuple[Combiner, ...] = ("sum", "mean", "sqrtn", "first", "none")


def by_loop(slots: tuple[Slot, ...], vectors: np.ndarray, valid: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the fields [B, F, D], worked out example by example."""
    out = []
    for example in range(vectors.shape[0]):
        fields: list[np.ndarray] = []
        for slot in slots:
            at = range(slot.start, slot.start + slot.length)
            items = [vectors[example, p] * (weights[example, p] if slot.weighted else 1) for p in at]
            count = max(sum(valid[example, p] for p in at), 1)
            match slot.combiner:
                case "none":
                    fields += items
                case "first":
                    fields.append(items[0])
                case "sum" | "mean" | "sqrtn":
                    fields.append(
                        sum(items, np.zeros(vectors.shape[2])) / {"sum": 1, "mean": count, "sqrtn": count**0.5}[slot.combiner]
                    )
        out.append(fields)
    return np.array(out)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_every_combiner_in_every_order(length: int, weighted: bool) -> None:
    rng = np.random.default_rng(length)
    for shift in range(len(COMBINERS)):
        features: list[FeatureConfig] = [
            IdFeatureConfig(name, name, "t", length, name, "w" if weighted and name != "mean" else "")
            for name in (*COMBINERS[shift:], *COMBINERS[:shift])
        ]
        features.insert(2, IdFeatureConfig("single", "single", "t"))
        (slots,) = feature_layout(features, [["t"]]).groups
        positions = sum(slot.length for slot in slots)
        valid = rng.random((6, positions)) < 0.7
        vectors = (rng.normal(size=(6, positions, 2)) * valid[:, :, None]).astype(np.float32)
        weights = rng.normal(size=valid.shape).astype(np.float32)
        got = combine(slots, jnp.asarray(vectors), jnp.asarray(valid), jnp.asarray(weights) if weighted else None)
        assert got.shape == (6, num_fields(slots), 2)
        np.testing.assert_allclose(got, by_loop(slots, vectors, valid, weights), rtol=1e-5, atol=1e-6)


def test_an_empty_list_is_zero_and_a_refused_id_counts() -> None:
    (slots,) = feature_layout([IdFeatureConfig("l", "l", "t", 2, "mean")], [["t"]]).groups
    vectors = jnp.asarray([[[0.0], [0.0]], [[3.0], [0.0]], [[3.0], [0.0]]])
    valid = jnp.asarray([[False, False], [True, False], [True, True]])
    assert combine(slots, vectors, valid, None).ravel().tolist() == [0.0, 3.0, 1.5]


def test_flat_puts_everything_side_by_side() -> None:
    inputs = ModelInputs((jnp.ones((2, 3, 4)), jnp.full((2, 1, 2), 2.0)), jnp.full((2, 5), 3.0))
    assert flat(inputs).shape == (2, InputShapes(((3, 4), (1, 2)), 5).flat) == (2, 19)
    assert np.asarray(flat(inputs))[0].tolist() == [1.0] * 12 + [2.0] * 2 + [3.0] * 5


def test_mlp_is_its_formula() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for activate_last in (False, True):
        mlp = Mlp((3, 5, 2), activate_last, "float32", nnx.Rngs(0))
        first, second = mlp.layers
        assert first.bias is not None and second.bias is not None
        hidden = np.maximum(x @ np.asarray(first.kernel[...]) + np.asarray(first.bias[...]), 0)
        expected = hidden @ np.asarray(second.kernel[...]) + np.asarray(second.bias[...])
        got = np.asarray(mlp(jnp.asarray(x)))
        np.testing.assert_allclose(got, np.maximum(expected, 0) if activate_last else expected, rtol=1e-5, atol=1e-6)


def test_mlp_computes_in_bfloat16_with_float32_weights() -> None:
    mlp = Mlp((3, 5, 2), False, "bfloat16", nnx.Rngs(0))
    assert mlp(jnp.ones((4, 3))).dtype == jnp.bfloat16
    assert all(layer.kernel[...].dtype == jnp.float32 for layer in mlp.layers)


def test_mlp_without_layers_passes_its_input_on() -> None:
    x = jnp.ones((4, 3))
    assert Mlp((3,), True, "bfloat16", nnx.Rngs(0))(x) is x


def test_stack_of_mlps_is_each_alone() -> None:
    stack = StackedMlp(3, (4, 6, 2), False, "float32", nnx.Rngs(0))
    for bias in stack.biases:
        bias[...] = jnp.asarray(np.random.default_rng(1).normal(size=bias[...].shape), jnp.float32)
    shared = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    own = np.random.default_rng(2).normal(size=(5, 3, 4)).astype(np.float32)
    for x in (shared, own):
        got = np.asarray(stack(jnp.asarray(x)))
        assert got.shape == (5, 3, 2)
        for one in range(3):
            of_one = x if x.ndim == 2 else x[:, one]
            hidden = np.maximum(of_one @ np.asarray(stack.kernels[0][...])[one] + np.asarray(stack.biases[0][...])[one], 0)
            expected = hidden @ np.asarray(stack.kernels[1][...])[one] + np.asarray(stack.biases[1][...])[one]
            np.testing.assert_allclose(got[:, one], expected, rtol=1e-4, atol=1e-5)


def test_stacked_mlps_start_different_and_scaled_by_their_inputs() -> None:
    kernels = np.asarray(StackedMlp(50, (64, 32), False, "float32", nnx.Rngs(0)).kernels[0][...])
    assert not np.array_equal(kernels[0], kernels[1])
    np.testing.assert_allclose(kernels.std() * 8, 1, rtol=0.05)
