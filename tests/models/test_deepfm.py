"""DeepFM against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monolith_jax.models.deepfm import DeepFM, DeepFMConfig
from monolith_jax.models.layers import InputShapes, ModelInputs, flat
from tests.models.precision import assert_bfloat16_is_close

SHAPES = InputShapes(((3, 4), (2, 4)), 5)


def draw(number: int = 6, seed: int = 0) -> ModelInputs:
    rng = np.random.default_rng(seed)
    fields = tuple(jnp.asarray(rng.normal(size=(number, *shape)), jnp.float32) for shape in SHAPES.fields)
    return ModelInputs(fields, jnp.asarray(rng.normal(size=(number, SHAPES.num_dense)), jnp.float32))


def test_wide_part_is_the_sum_over_all_pairs() -> None:
    model = DeepFM(DeepFMConfig(hidden=(7,)), SHAPES, 2, nnx.Rngs(0))
    model.wide[...] = jnp.asarray([1.0, -2.0])
    inputs = draw()
    wide = model(inputs) - model.deep(flat(inputs))
    fields = np.concatenate([np.asarray(field, np.float64) for field in inputs.fields], axis=1)
    expected = np.zeros(fields.shape[0])
    for i in range(fields.shape[1]):
        expected += fields[:, i, 0]
        for j in range(i + 1, fields.shape[1]):
            expected += (fields[:, i, 1:] * fields[:, j, 1:]).sum(1)
    np.testing.assert_allclose(wide, expected[:, None] * [1.0, -2.0], rtol=1e-4, atol=1e-5)


def test_shapes_and_types() -> None:
    logits = DeepFM(DeepFMConfig(hidden=(8, 4)), SHAPES, 3, nnx.Rngs(0))(draw(5))
    assert logits.shape == (5, 3) and logits.dtype == jnp.float32


def test_bfloat16_keeps_float32_where_it_matters() -> None:
    exact, rough = (DeepFM(DeepFMConfig((32, 16), dtype), SHAPES, 2, nnx.Rngs(0)) for dtype in ("float32", "bfloat16"))
    assert_bfloat16_is_close(exact, rough, draw(64))


@pytest.mark.parametrize("fields", [((3, 4), (2, 8)), ((3, 1),)])
def test_tables_that_do_not_fit_are_refused(fields: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"DeepFM needs one TableConfig.dim of at least 2 for all tables, got \["):
        DeepFM(DeepFMConfig(), InputShapes(fields, 0), 1, nnx.Rngs(0))
