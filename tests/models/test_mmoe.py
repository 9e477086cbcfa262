"""MMoE against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monolith_jax.models.layers import InputShapes, ModelInputs, StackedMlp, flat
from monolith_jax.models.mmoe import MMoE, MMoEConfig
from tests.models.precision import assert_bfloat16_is_close

SHAPES = InputShapes(((3, 4), (2, 6)), 5)


def draw(number: int = 6) -> ModelInputs:
    rng = np.random.default_rng(0)
    fields = tuple(jnp.asarray(rng.normal(size=(number, *shape)) * 0.3, jnp.float32) for shape in SHAPES.fields)
    return ModelInputs(fields, jnp.asarray(rng.normal(size=(number, SHAPES.num_dense)), jnp.float32))


def seen(inputs: ModelInputs) -> np.ndarray:
    """Returns all that a model sees of each example: vectors, dense values, and for each group the products of all pairs."""
    parts = [np.asarray(flat(inputs))]
    for fields in map(np.asarray, inputs.fields):
        products = np.zeros_like(fields[:, 0])
        for i in range(fields.shape[1]):
            for j in range(i + 1, fields.shape[1]):
                products += fields[:, i] * fields[:, j]
        parts.append(products)
    return np.concatenate(parts, axis=1)


def one_of(stack: StackedMlp, index: int, x: np.ndarray) -> np.ndarray:
    """Returns what one Mlp of a stack makes of [B, I]."""
    for kernel, bias in zip(stack.kernels, stack.biases, strict=True):
        last = kernel is stack.kernels[-1] and not stack.activate_last
        x = x @ np.asarray(kernel[...])[index] + np.asarray(bias[...])[index]
        x = x if last else np.maximum(x, 0)
    return x


@pytest.mark.parametrize("trunk", [(), (9,)])
def test_each_task_mixes_the_experts_by_its_own_gate(trunk: tuple[int, ...]) -> None:
    model = MMoE(MMoEConfig(3, (8, 4), (5,), trunk), SHAPES, 2, nnx.Rngs(0))
    inputs = draw()
    x = np.asarray(model.trunk(jnp.asarray(seen(inputs))))
    experts = np.stack([one_of(model.experts, index, x) for index in range(3)], 1)
    expected = []
    for task in range(2):
        gate = np.exp(one_of(model.gates, task, x))
        gate /= gate.sum(1, keepdims=True)
        expected.append(one_of(model.towers, task, np.einsum("be,bed->bd", gate, experts))[:, 0])
    logits = model(inputs)
    assert logits.shape == (6, 2) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.stack(expected, 1), rtol=1e-4, atol=1e-5)


def test_gates_sum_to_one() -> None:
    """Between equal experts a gate cannot change the mix, whatever it says, because its shares sum to one."""
    model = MMoE(MMoEConfig(4, (8,), ()), SHAPES, 2, nnx.Rngs(0))
    for kernel in model.experts.kernels:
        kernel[...] = jnp.broadcast_to(kernel[...][:1], kernel[...].shape)
    inputs = draw()
    before = model(inputs)
    model.gates.kernels[0][...] = model.gates.kernels[0][...] * 10
    np.testing.assert_allclose(model(inputs), before, rtol=1e-4, atol=1e-5)


def test_a_gate_that_is_sure_takes_one_expert() -> None:
    model = MMoE(MMoEConfig(2, (8,), ()), SHAPES, 1, nnx.Rngs(0))
    model.gates.kernels[0][...] = jnp.zeros_like(model.gates.kernels[0][...])
    model.gates.biases[0][...] = jnp.asarray([[-50.0, 50.0]])
    inputs = draw()
    expected = one_of(model.towers, 0, one_of(model.experts, 1, seen(inputs)))
    np.testing.assert_allclose(model(inputs), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_float32_where_it_matters() -> None:
    exact, rough = (
        MMoE(MMoEConfig(3, (32, 16), (8,), (24,), dtype), SHAPES, 2, nnx.Rngs(0)) for dtype in ("float32", "bfloat16")
    )
    assert_bfloat16_is_close(exact, rough, draw(64))
