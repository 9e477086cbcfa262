"""Transformations of ours against their closed forms in float64, and clipping and group lasso with any optimizer."""

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_jax.tables.row_optimizers import ftrl, rowwise_adagrad, shrunk_rows
from monolith_jax.tables.update import (
    OptimizerConfig,
    apply_updates,
    first_rows,
    learning_rate,
    make_optimizer,
    row_layout,
    updated_rows,
)

DIM, ROWS, STEPS = 4, 6, 12
FTRL = OptimizerConfig(name="ftrl", learning_rate=0.1, arguments=(("beta", 0.5), ("l1", 0.6), ("l2", 0.2)))


@pytest.fixture
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def train(config: OptimizerConfig, vectors: np.ndarray, gradients: np.ndarray, touched: np.ndarray) -> np.ndarray:
    """Returns the rows after each step, [steps, V, W]; only touched ones are written."""
    layout = row_layout(config, vectors.shape[1])
    rows, after = np.array(first_rows(layout, jnp.asarray(vectors))), []
    update = jax.jit(updated_rows, static_argnums=0)
    for step, (gradient, mask) in enumerate(zip(gradients, touched, strict=True)):
        rate = learning_rate(config, jnp.int32(step))
        updated = np.asarray(update(layout, jnp.asarray(rows), jnp.asarray(gradient), rate))
        rows = np.where(mask[:, None], updated, rows)
        after.append(rows)
    return np.stack(after)


def drawn(dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=(STEPS, ROWS, DIM)) * rng.choice([0.1, 1, 10], (1, ROWS, 1))
    return rng.normal(size=(ROWS, DIM)).astype(dtype), gradients.astype(dtype), rng.random((STEPS, ROWS)) < 0.7


def test_rowwise_adagrad_equals_its_formula(_float64: None) -> None:
    config = OptimizerConfig(name="rowwise_adagrad", learning_rate=0.3, arguments=(("initial_accumulator_value", 0.2),))
    vectors, gradients, touched = drawn()
    after = train(config, vectors, gradients, touched)
    assert after.shape[2] == DIM + 1
    weights, sums = vectors.copy(), np.full(ROWS, 0.2)
    for step in range(STEPS):
        for row in np.flatnonzero(touched[step]):
            gradient = gradients[step, row]
            sums[row] += (gradient**2).sum() / DIM
            weights[row] -= 0.3 * gradient / (np.sqrt(sums[row]) + 1e-8)
        np.testing.assert_allclose(after[step, :, :DIM], weights, rtol=1e-12)
        np.testing.assert_allclose(after[step, :, DIM], sums, rtol=1e-12)


def test_rowwise_adagrad_of_dense_weights_goes_by_the_last_axis() -> None:
    rng = np.random.default_rng(0)
    weights = {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32), "scale": np.float32(1)}
    gradients = jax.tree.map(lambda weight: jnp.asarray(rng.normal(size=weight.shape), jnp.float32), weights)
    transformation = rowwise_adagrad(1.0, eps=0.0)
    updates, state = transformation.update(gradients, transformation.init(jax.tree.map(jnp.asarray, weights)), None)
    assert jax.tree.map(jnp.shape, state.sums) == {"kernel": (3,), "bias": (), "scale": ()}
    for name, update in updates.items():
        gradient = np.asarray(gradients[name])
        mean = (gradient**2).mean(-1, keepdims=True) if gradient.ndim else gradient**2
        np.testing.assert_allclose(update, -gradient / np.sqrt(mean), rtol=1e-6)
    # A row that has seen nothing but zeros stays, and divides nothing by zero.
    updates, _ = transformation.update({"x": jnp.zeros((2, 3))}, transformation.init({"x": jnp.ones((2, 3))}), None)
    assert not np.any(np.asarray(updates["x"])) and np.isfinite(np.asarray(updates["x"])).all()


def test_ftrl_minimises_what_it_says(_float64: None) -> None:
    """The weights minimise g w + sum of s (w - w_s)^2 / 2 + (beta / alpha + l2) w^2 / 2 + l1 |w| over all steps so far."""
    alpha, beta, l1, l2 = 0.1, 0.5, 0.6, 0.2
    _, gradients, touched = drawn()
    after = train(FTRL, np.zeros((ROWS, DIM)), gradients, touched)[:, :, :DIM]
    totals, squares, pulls, strength = (np.zeros((ROWS, DIM)) for _ in range(4))
    weights = np.zeros((ROWS, DIM))
    for step in range(STEPS):
        gradient = gradients[step] * touched[step][:, None]
        sigma = (np.sqrt(squares + gradient**2) - np.sqrt(squares)) / alpha
        totals, squares, pulls, strength = totals + gradient, squares + gradient**2, pulls + sigma * weights, strength + sigma
        weights = after[step]
        slope = totals + strength * weights - pulls + (beta / alpha + l2) * weights
        zero = weights == 0
        np.testing.assert_allclose((slope + l1 * np.sign(weights))[~zero], 0, atol=1e-10)
        assert (np.abs(slope[zero]) <= l1 + 1e-12).all()
    assert 0 < np.count_nonzero(weights == 0) < weights.size, "l1 should have taken some weights and left some"


@pytest.mark.parametrize(("gradient", "expected"), [(2.0, -1 / 30), (-2.0, 1 / 30), (0.9, 0.0), (-0.9, 0.0)])
def test_l1_of_ftrl_pulls_towards_zero(gradient: float, expected: float) -> None:
    # With the wrong sign of l1 a gradient of 2 gives -1/15 and one of -2 gives 1/10.
    config = OptimizerConfig(name="ftrl", learning_rate=0.1, arguments=(("l1", 1.0), ("beta", 1.0)))
    after = train(config, np.zeros((1, 1), np.float32), np.full((1, 1, 1), gradient, np.float32), np.ones((1, 1), bool))
    np.testing.assert_allclose(after[0, 0, 0], expected, rtol=1e-6)
    dense, weights = make_optimizer(config), {"w": jnp.zeros((1,))}
    updates, _ = dense.update({"w": jnp.full((1,), gradient)}, dense.init(weights), weights)
    np.testing.assert_allclose(apply_updates(config, weights, updates, jnp.float32(0.1))["w"], [expected], rtol=1e-6)


def test_ftrl_keeps_the_first_weights_until_gradients_speak() -> None:
    vectors, gradients, touched = drawn(np.float32)
    still = train(FTRL, vectors, np.zeros_like(gradients), touched)
    np.testing.assert_allclose(still[-1, :, :DIM], vectors, rtol=1e-5)
    small = train(FTRL, vectors, gradients * 1e-4, np.ones_like(touched))[0]
    assert 0 < np.abs(small[:, :DIM] - vectors).max() < 1e-3


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (OptimizerConfig(name="ftrl", warmup_steps=5), "warmup_steps, decay_steps: ftrl has no schedule"),
        (OptimizerConfig(name="ftrl", decay_steps=5), "warmup_steps, decay_steps: ftrl has no schedule"),
        (OptimizerConfig(name="ftrl", learning_rate=0.0), "ftrl needs a learning_rate above 0, got 0.0"),
        (OptimizerConfig(name="ftrl", arguments=(("l1", -1.0),)), "of at least 0"),
        (OptimizerConfig(name="ftrl", arguments=(("beta", 0.0),)), "would divide by 0"),
        (OptimizerConfig(name="ftrl", arguments=(("momentum", 0.9),)), "ftrl takes beta, l1, l2.*got 'momentum'"),
        (OptimizerConfig(name="sgd", clip_norm=-1.0), "clip_norm must be 0"),
        (OptimizerConfig(name="sgd", group_lasso=float("nan")), "group_lasso must be 0"),
        (OptimizerConfig(name="rprop"), "rprop cannot be used: its learning rate is a first step size"),
        (OptimizerConfig(name="scale_by_rprop"), "no optimizer 'scale_by_rprop'"),
        (OptimizerConfig(name="rowise_adagrad"), "did you mean rowwise_adagrad"),
    ],
)
def test_what_does_not_fit_is_refused(config: OptimizerConfig, told: str) -> None:
    with pytest.raises(ValueError, match=r"OptimizerConfig\..*" + told):
        row_layout(config, DIM)


def rates_of_optax() -> list[str]:
    """Returns the optimizers of optax that a table accepts."""
    names = []
    for name in set(dir(optax)) - {"optimistic_adam"}:  # deprecated
        try:
            takes = name.islower() and "learning_rate" in inspect.signature(getattr(optax, name)).parameters
            if takes and row_layout(OptimizerConfig(name=name), DIM):
                names.append(name)
        except (TypeError, ValueError):
            continue
    return sorted(names)


def test_every_accepted_optimizer_of_optax_only_scales_with_its_rate() -> None:
    names = rates_of_optax()
    assert {"adam", "adagrad", "lion", "lamb", "sgd"} <= set(names)
    rng = np.random.default_rng(0)
    for name in names:
        inside, outside = getattr(optax, name)(learning_rate=0.03), make_optimizer(OptimizerConfig(name=name))
        weights = others = jnp.asarray(rng.normal(size=DIM), jnp.float32)
        state, other_state = inside.init(weights), outside.init(weights)
        for _ in range(3):
            gradient = jnp.asarray(rng.normal(size=DIM), jnp.float32)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = inside.update(gradient, state, weights)
            weights = weights + updates
            updates, other_state = outside.update(gradient, other_state, others)
            others = apply_updates(OptimizerConfig(name=name), others, updates, jnp.float32(0.03))
        np.testing.assert_allclose(others, weights, rtol=1e-5, atol=1e-6, err_msg=name)


def with_lasso(name: str, group_lasso: float, clip_norm: float = 0.0) -> OptimizerConfig:
    arguments = {"ftrl": (("l1", 0.01),)}.get(name, ())
    return OptimizerConfig(name, 0.1, arguments, clip_norm=clip_norm, group_lasso=group_lasso)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"])
def test_group_lasso_shortens_what_the_optimizer_made(name: str, _float64: None) -> None:
    vectors, gradients, _ = drawn()
    vectors, gradients = vectors * np.linspace(0.05, 3, ROWS)[:, None], gradients * 0.1
    once = np.ones((1, ROWS), bool)
    once[0, -1] = False
    plain = train(with_lasso(name, 0.0), vectors, gradients[:1], once)[0]
    after = train(with_lasso(name, 15.0), vectors, gradients[:1], once)[0]
    lengths = np.linalg.norm(plain[:, :DIM], axis=1, keepdims=True)
    expected = plain[:, :DIM] * np.maximum(0, 1 - 0.1 * 15 / lengths)
    np.testing.assert_allclose(after[:-1, :DIM], expected[:-1], rtol=1e-12)
    np.testing.assert_array_equal(after[-1], plain[-1])
    np.testing.assert_allclose(after[:, DIM:], plain[:, DIM:], rtol=1e-12)
    gone = ~after[:, :DIM].any(1)
    assert 0 < gone.sum() < ROWS, "some rows should be zero, some not"


def test_shrunk_rows_minimise_the_objective() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 3)).astype(np.float32)
    shrunk = np.asarray(shrunk_rows(jnp.asarray(vectors), jnp.float32(1.2))).astype(np.float64)

    def objective(points: np.ndarray) -> np.ndarray:
        return ((points - vectors) ** 2).sum(1) / 2 + 1.2 * np.linalg.norm(points, axis=1)

    assert 20 < np.count_nonzero(~shrunk.any(1)) < 180
    for _ in range(50):
        near = shrunk + rng.normal(size=shrunk.shape) * 0.01
        assert (objective(near) >= objective(shrunk) - 1e-9).all()
    assert not np.asarray(shrunk_rows(jnp.zeros((2, 3)), jnp.float32(0))).any()


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "ftrl"])
def test_clipping_is_a_rows_own(name: str, _float64: None) -> None:
    vectors, gradients, touched = drawn()
    lengths = np.linalg.norm(gradients, axis=2, keepdims=True)
    assert (lengths > 2).any() and (lengths < 2).any()
    shortened = gradients * np.minimum(1, 2 / lengths)
    clipped = train(with_lasso(name, 0.0, clip_norm=2.0), vectors, gradients, touched)
    np.testing.assert_allclose(clipped, train(with_lasso(name, 0.0), vectors, shortened, touched), rtol=1e-12)


def test_clipping_of_dense_weights_takes_them_as_one() -> None:
    transformation: Any = make_optimizer(OptimizerConfig(name="sgd", clip_norm=1.0))
    gradients = {"a": jnp.full((2, 2), 3.0), "b": jnp.full((4,), 4.0)}
    updates, _ = transformation.update(gradients, transformation.init(gradients), gradients)
    np.testing.assert_allclose(updates["a"], np.full((2, 2), -0.3), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], np.full(4, -0.4), rtol=1e-6)


def test_ftrl_is_the_same_for_rows_and_for_dense_weights() -> None:
    vectors, gradients, _ = drawn(np.float32)
    after = train(FTRL, vectors, gradients, np.ones((STEPS, ROWS), bool))
    transformation = ftrl(0.1, 0.5, 0.6, 0.2)
    weights = jnp.asarray(vectors)
    state = transformation.init(weights)
    for gradient in gradients:
        updates, state = transformation.update(jnp.asarray(gradient), state, weights)
        weights = weights + updates
    np.testing.assert_allclose(after[-1, :, :DIM], weights, rtol=1e-4, atol=1e-6)
