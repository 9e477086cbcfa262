"""DCN-v2 against its formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monolith_jax.models.dcn import DCN, DCNConfig
from monolith_jax.models.layers import InputShapes, ModelInputs, flat
from monolith_jax.tables.update import float_dtype
from tests.models.precision import assert_bfloat16_is_close

SHAPES = InputShapes(((3, 4), (2, 6)), 5)
CONFIGS = {"full": DCNConfig(2, 0, (7, 5)), "of low rank": DCNConfig(3, 4, (7,)), "crosses alone": DCNConfig(1, 0, ())}


def draw(number: int = 6) -> ModelInputs:
    rng = np.random.default_rng(0)
    fields = tuple(jnp.asarray(rng.normal(size=(number, *shape)), float_dtype()) for shape in SHAPES.fields)
    return ModelInputs(fields, jnp.asarray(rng.normal(size=(number, SHAPES.num_dense)), jnp.float32))


def array(weight: Any) -> np.ndarray:
    return np.asarray(weight[...], np.float64)


def both(config: DCNConfig) -> tuple[np.ndarray, jax.Array]:
    """Returns the logits of the formula, in float64, and the model's."""
    model, inputs, rng = DCN(config, SHAPES, 3, nnx.Rngs(0)), draw(), np.random.default_rng(1)
    for layer in (*model.up, *model.deep.layers):
        assert layer.bias is not None
        layer.bias[...] = jnp.asarray(rng.normal(size=layer.bias.shape), float_dtype())
    first = x = np.asarray(flat(inputs), np.float64)
    for index, up in enumerate(model.up):
        matrix = array(model.down[index].kernel) @ array(up.kernel) if config.rank else array(up.kernel)
        assert matrix.shape == (SHAPES.flat, SHAPES.flat)
        x = np.stack([x0 * (xl @ matrix + array(up.bias)) + xl for x0, xl in zip(first, x, strict=True)])
    for index, layer in enumerate(model.deep.layers):
        x = x @ array(layer.kernel) + array(layer.bias)
        x = np.maximum(x, 0) if index < len(config.hidden) else x
    return x, model(inputs)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_formula(config: DCNConfig) -> None:
    expected, logits = both(config)
    assert logits.shape == (6, 3) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_cross_layer_multiplies_two_inputs_and_two_layers_three() -> None:
    """Along one input a model of l cross layers and no tower is a polynomial of degree l + 1."""
    for layers, degree in ((1, 2), (2, 3)):
        model, rng = DCN(DCNConfig(layers, 0, ()), SHAPES, 1, nnx.Rngs(0)), np.random.default_rng(2)
        one = ModelInputs(tuple(jnp.asarray(rng.normal(size=(1, *shape))) for shape in SHAPES.fields), jnp.zeros((1, 5)))
        steps = jnp.arange(8.0)[:, None]
        line = ModelInputs(tuple(jnp.repeat(field, 8, 0) * steps[:, :, None] for field in one.fields), jnp.zeros((8, 5)))
        values = np.asarray(model(line), np.float64)[:, 0]
        largest = np.abs(values).max()
        assert np.abs(np.diff(values, degree)).max() > 0.01 * largest / 8**degree
        assert np.abs(np.diff(values, degree + 1)).max() < 1e-4 * largest


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_weight_and_input_learns(config: DCNConfig) -> None:
    graph, weights = nnx.split(DCN(config, SHAPES, 3, nnx.Rngs(0)))

    def loss(weights: nnx.State, inputs: ModelInputs) -> jax.Array:
        return jnp.square(nnx.merge(graph, weights)(inputs) - 1).sum()

    for leaf in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(weights, draw(64))):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_bfloat16_keeps_float32_where_it_matters() -> None:
    for config in (DCNConfig(2, 0, (32, 16)), DCNConfig(2, 8, (16,))):
        exact, rough = (
            DCN(DCNConfig(config.cross_layers, config.rank, config.hidden, dtype), SHAPES, 2, nnx.Rngs(0))
            for dtype in ("float32", "bfloat16")
        )
        assert_bfloat16_is_close(exact, rough, draw(64))


def test_low_rank_is_smaller() -> None:
    def parameters(rank: int) -> int:
        state = nnx.state(DCN(DCNConfig(2, rank, (3,)), SHAPES, 1, nnx.Rngs(0)), nnx.Param)
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    size = SHAPES.flat
    tower = size * 3 + 3 + 3 + 1
    assert [parameters(0), parameters(4)] == [2 * (size * size + size) + tower, 2 * (2 * size * 4 + size) + tower]


@pytest.mark.parametrize(("layers", "rank"), [(0, 0), (-1, 0), (1, -1), (1, 15)])
def test_bad_configs_are_refused(layers: int, rank: int) -> None:
    with pytest.raises(ValueError, match=r"DCNConfig\.(cross_layers must be at least 1|rank must be 0 .* got -?\d+)"):
        DCN(DCNConfig(layers, rank), SHAPES, 1, nnx.Rngs(0))
