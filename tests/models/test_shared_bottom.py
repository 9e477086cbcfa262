"""Shared bottom against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monolith_jax.models.losses import HeadConfig, multi_task_loss
from monolith_jax.models.shared_bottom import SharedBottom, SharedBottomConfig
from tests.models.precision import assert_bfloat16_is_close
from tests.models.test_dcn import SHAPES, array, draw
from tests.models.test_mmoe import seen

CONFIG = SharedBottomConfig((9, 6), (4,))


def both() -> tuple[np.ndarray, jax.Array]:
    """Returns the logits of the formula, in float64, and the model's."""
    model, inputs, rng = SharedBottom(CONFIG, SHAPES, 3, nnx.Rngs(0)), draw(), np.random.default_rng(1)
    for bias in (*(layer.bias for layer in model.bottom.layers), *model.towers.biases):
        assert bias is not None
        bias[...] = jnp.asarray(rng.normal(size=bias.shape), bias.dtype)
    x = seen(inputs).astype(np.float64)
    for layer in model.bottom.layers:
        x = np.maximum(x @ array(layer.kernel) + array(layer.bias), 0)
    expected = []
    for task in range(3):
        of_task = x
        for index, (kernel, bias) in enumerate(zip(model.towers.kernels, model.towers.biases, strict=True)):
            of_task = np.maximum(of_task, 0) if index else of_task
            of_task = of_task @ array(kernel)[task] + array(bias)[task]
        expected.append(of_task[:, 0])
    return np.stack(expected, 1), model(inputs)


def test_logits_are_those_of_the_formula() -> None:
    expected, logits = both()
    assert logits.shape == (6, 3) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_bottom_learns_from_every_head_and_a_tower_from_its_own() -> None:
    graph, weights = nnx.split(SharedBottom(CONFIG, SHAPES, 2, nnx.Rngs(0)))
    heads = (HeadConfig("like"), HeadConfig("skip"))

    def gradients(of_head: int) -> dict:
        def loss(weights: nnx.State) -> jax.Array:
            masks = jnp.zeros((64, 2)).at[:, of_head].set(1.0)
            return multi_task_loss(nnx.merge(graph, weights)(draw(64)), jnp.ones((64, 2)), masks, heads)

        return nnx.to_pure_dict(jax.grad(loss)(weights))

    for of_head in range(2):
        found = gradients(of_head)
        for leaf in jax.tree.leaves(found["bottom"]):
            assert np.abs(leaf).max() > 0
        for leaf in jax.tree.leaves(found["towers"]):
            assert np.abs(leaf[of_head]).max() > 0 and not np.any(leaf[1 - of_head])


def test_bfloat16_keeps_float32_where_it_matters() -> None:
    exact, rough = (
        SharedBottom(SharedBottomConfig((32, 16), (8,), dtype), SHAPES, 2, nnx.Rngs(0)) for dtype in ("float32", "bfloat16")
    )
    assert_bfloat16_is_close(exact, rough, draw(64))


def test_nothing_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bottom_hidden is empty, so that tasks share no layer"):
        SharedBottom(SharedBottomConfig(()), SHAPES, 1, nnx.Rngs(0))
