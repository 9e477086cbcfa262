"""Logistic regression and the factorisation machine against their formulas, written out pair by pair."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monolith_jax.models.fm import FactorisationMachine, FMConfig, LinearConfig
from monolith_jax.models.layers import InputShapes, ModelInputs
from monolith_jax.models.losses import HeadConfig, multi_task_loss
from monolith_jax.tables.update import float_dtype

CONFIGS = {"linear": (LinearConfig(), 2), "fm": (FMConfig(), 6)}
"""Config, and the dim of the tables for two heads."""


def draw(config: LinearConfig | FMConfig, dim: int, num_dense: int = 3) -> tuple[FactorisationMachine, ModelInputs]:
    """Returns a model whose weights are not its first ones, and inputs."""
    rng, shapes = np.random.default_rng(0), InputShapes(((3, dim), (2, dim)), num_dense)
    model = FactorisationMachine(config, shapes, 2, nnx.Rngs(0))
    for weight in (model.bias, model.dense, model.factors):
        if weight is not None:
            weight[...] = jnp.asarray(rng.normal(size=weight.shape), float_dtype())
    fields = tuple(jnp.asarray(rng.normal(size=(6, *shape)), float_dtype()) for shape in shapes.fields)
    return model, ModelInputs(fields, jnp.asarray(rng.normal(size=(6, num_dense)), jnp.float32))


def expected(model: FactorisationMachine, inputs: ModelInputs) -> np.ndarray:
    """Returns logits by the formula, in float64."""
    fields, dense = np.concatenate([np.asarray(one, np.float64) for one in inputs.fields], axis=1), np.asarray(inputs.dense)
    logits = np.zeros((fields.shape[0], 2))
    for example, vectors in enumerate(fields):
        for task in range(2):
            logit = float(model.bias[task]) + sum(vector[task] for vector in vectors)
            if model.dense is not None:
                logit += float(dense[example].astype(np.float64) @ np.asarray(model.dense[:, task], np.float64))
            if model.factors is not None:
                of_task = np.asarray(model.factors[task], np.float64)
                for i in range(len(vectors)):
                    logit += sum((of_task * vectors[i][2:] * vectors[j][2:]).sum() for j in range(i))
            logits[example, task] = logit
    return logits


@pytest.mark.parametrize("num_dense", [3, 0])
@pytest.mark.parametrize(("config", "dim"), CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_formula(config: LinearConfig | FMConfig, dim: int, num_dense: int) -> None:
    model, inputs = draw(config, dim, num_dense)
    logits = model(inputs)
    assert logits.shape == (6, 2) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected(model, inputs), rtol=1e-4, atol=1e-5)


def test_one_task_at_first_is_rendles_model() -> None:
    model = FactorisationMachine(FMConfig(), InputShapes(((4, 3),), 0), 1, nnx.Rngs(0))
    vectors = np.random.default_rng(0).normal(size=(4, 3))
    pairs = sum(float(vectors[i, 1:] @ vectors[j, 1:]) for i in range(4) for j in range(i))
    logit = model(ModelInputs((jnp.asarray(vectors[None], jnp.float32),), jnp.zeros((1, 0))))
    np.testing.assert_allclose(logit, [[vectors[:, 0].sum() + pairs]], rtol=1e-5)


@pytest.mark.parametrize(("config", "dim"), CONFIGS.values(), ids=CONFIGS)
def test_a_masked_head_learns_nothing_of_its_own(config: LinearConfig | FMConfig, dim: int) -> None:
    model, inputs = draw(config, dim)
    graph, weights = nnx.split(model)
    masks = jnp.ones((6, 2)).at[:, 1].set(0.0)

    def loss(weights: nnx.State, inputs: ModelInputs) -> jax.Array:
        logits = nnx.merge(graph, weights)(inputs)
        return multi_task_loss(logits, jnp.ones((6, 2)), masks, (HeadConfig("like"), HeadConfig("skip")))

    of_weights, of_inputs = jax.grad(loss, argnums=(0, 1))(weights, inputs)
    gradients = nnx.to_pure_dict(of_weights)
    for name, axis in (("bias", 0), ("dense", 1), ("factors", 0)):
        if name in gradients:
            first, second = np.moveaxis(np.asarray(gradients[name]), axis, 0)
            assert np.all(first != 0) and not np.any(second), name
    for field in of_inputs.fields:
        assert np.all(np.asarray(field[:, :, 0]) != 0) and not np.any(np.asarray(field[:, :, 1]))
        assert dim == 2 or np.all(np.asarray(field[:, :, 2:]) != 0)


@pytest.mark.parametrize("fields", [((3, 2), (2, 3)), ((3, 1),), ((3, 3),)])
def test_tables_that_do_not_fit_a_regression_are_refused(fields: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"of 2 heads needs TableConfig.dim = 2 for all tables, a weight a head; got \["):
        FactorisationMachine(LinearConfig(), InputShapes(fields, 0), 2, nnx.Rngs(0))


@pytest.mark.parametrize("fields", [((3, 4), (2, 8)), ((3, 2),)])
def test_tables_that_do_not_fit_a_factorisation_machine_are_refused(fields: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"of 2 heads needs one TableConfig.dim of at least 3 .* got \["):
        FactorisationMachine(FMConfig(), InputShapes(fields, 0), 2, nnx.Rngs(0))


def test_in_float64_only_the_last_digits_differ() -> None:
    code = (
        "import jax; jax.config.update('jax_enable_x64', True)\n"
        "import numpy as np\n"
        "from tests.models import test_dcn, test_fm, test_shared_bottom\n"
        "cases = [test_fm.draw(*one) for one in test_fm.CONFIGS.values()]\n"
        "pairs = [(test_fm.expected(*one), one[0](one[1])) for one in cases]\n"
        "pairs += [test_dcn.both(config) for config in test_dcn.CONFIGS.values()] + [test_shared_bottom.both()]\n"
        "for expected, got in pairs:\n"
        "    assert got.dtype == np.float64 and np.abs(got - expected).max() < 1e-12, np.abs(got - expected).max()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
