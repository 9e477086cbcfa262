"""The update of rows: the same as plain optax on each row alone, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_jax.mesh import MeshConfig, make_mesh
from monolith_jax.tables.lookup import write_rows
from monolith_jax.tables.table import TableConfig, make_groups
from monolith_jax.tables.update import OptimizerConfig, first_rows, learning_rate, make_optimizer, row_layout, updated_rows
from monolith_jax.types import GroupPlan
from tests.small_model import make_small

DIM, ROWS, RATE = 3, 5, 0.07
READY = {
    "sgd": OptimizerConfig(name="sgd"),
    "momentum": OptimizerConfig(name="sgd", arguments=(("momentum", 0.9), ("nesterov", True))),
    "adagrad": OptimizerConfig(name="adagrad", arguments=(("initial_accumulator_value", 0.3),)),
    "adam": OptimizerConfig(name="adam", arguments=(("b1", 0.8),)),
    "rmsprop": OptimizerConfig(name="rmsprop", arguments=(("momentum", 0.5), ("centered", True))),
    "adamw": OptimizerConfig(name="adamw", arguments=(("weight_decay", 0.01),)),
    "lion": OptimizerConfig(name="lion"),
    "yogi": OptimizerConfig(name="yogi"),
    "lamb": OptimizerConfig(name="lamb", arguments=(("weight_decay", 0.1),)),
}


@pytest.mark.parametrize("config", READY.values(), ids=READY)
def test_rows_learn_as_if_each_were_alone(config: OptimizerConfig) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    layout = row_layout(config, DIM)
    rows = np.array(first_rows(layout, jnp.asarray(vectors)))
    assert rows.shape == (ROWS, layout.width)
    # rmsprop's momentum sums updates that the rate has multiplied already, a row's slots are those of rate 1.
    alone, slots_alone = (getattr(optax, config.name)(learning_rate=rate, **dict(config.arguments)) for rate in (RATE, 1.0))
    weights = [jnp.asarray(vector) for vector in vectors]
    states = [alone.init(vector) for vector in weights]
    slots = [slots_alone.init(vector) for vector in weights]
    for _ in range(6):
        # Rows come and go: their counts and moments are their own.
        touched = rng.random(ROWS) < 0.6
        gradients = rng.normal(size=(ROWS, DIM)).astype(np.float32)
        updated = np.asarray(updated_rows(layout, jnp.asarray(rows), jnp.asarray(gradients), jnp.float32(RATE)))
        rows = np.where(touched[:, None], updated, rows)
        for row in np.flatnonzero(touched):
            with jax.numpy_dtype_promotion("standard"):
                _, slots[row] = slots_alone.update(jnp.asarray(gradients[row]), slots[row], weights[row])
                update, states[row] = alone.update(jnp.asarray(gradients[row]), states[row], weights[row])
            weights[row] = jnp.asarray(optax.apply_updates(weights[row], update))
    np.testing.assert_allclose(rows[:, :DIM], np.stack(weights), rtol=2e-6, atol=1e-7)
    for row, state in enumerate(slots):
        leaves = [np.ravel(leaf).astype(np.float32) for leaf in jax.tree.leaves(state)]
        expected = np.concatenate([np.zeros(0, np.float32), *leaves])
        np.testing.assert_allclose(rows[row, DIM:], expected, rtol=2e-6, atol=1e-7)


def test_counts_survive_in_floats() -> None:
    layout = row_layout(OptimizerConfig(name="adam"), DIM)
    assert layout.dtypes == ("int32", "float32", "float32")
    rows = np.array(first_rows(layout, jnp.zeros((2, DIM))))
    rows[:, DIM] = (2**24 - 2, 7)
    after = updated_rows(layout, jnp.asarray(rows), jnp.ones((2, DIM)), jnp.float32(0.1))
    assert np.array(after[:, DIM]).tolist() == [2**24 - 1, 8]
    # A count so high must not turn into a number that is no number.
    assert np.isfinite(np.array(updated_rows(layout, after, jnp.ones((2, DIM)), jnp.float32(0.1)))).all()


def test_no_rows_at_all() -> None:
    layout = row_layout(OptimizerConfig(name="adam"), DIM)
    rows = first_rows(layout, jnp.zeros((0, DIM)))
    assert rows.shape == updated_rows(layout, rows, jnp.zeros((0, DIM)), jnp.float32(1)).shape == (0, layout.width)


def test_first_rows_hold_the_vector_and_the_first_state() -> None:
    config = OptimizerConfig(name="adagrad", arguments=(("initial_accumulator_value", 0.25),))
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    rows = np.array(first_rows(row_layout(config, 3), jnp.asarray(vectors)))
    assert rows.tolist() == [[0, 1, 2, 0.25, 0.25, 0.25], [3, 4, 5, 0.25, 0.25, 0.25]]


def test_schedule() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, decay_steps=10, end_factor=0.1)
    rates = [float(learning_rate(config, jnp.int32(step))) for step in (0, 1, 3, 4, 9, 14, 1000)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 2.0, 2.0, 2 * 0.55, 0.2, 0.2], rtol=1e-6)
    flat = OptimizerConfig(learning_rate=2.0)
    assert [float(learning_rate(flat, jnp.int32(step))) for step in (0, 1_000_000)] == [2.0, 2.0]
    only_warm = OptimizerConfig(learning_rate=2.0, warmup_steps=2)
    assert [float(learning_rate(only_warm, jnp.int32(step))) for step in (0, 1, 5)] == [1.0, 2.0, 2.0]


def test_each_group_goes_by_its_own_schedule() -> None:
    schedules = {
        "warm": OptimizerConfig("sgd", 0.4, warmup_steps=4),
        "flat": OptimizerConfig("sgd", 0.4),
        "cosine": OptimizerConfig("sgd", 0.4, decay_steps=4, end_factor=0.5),
    }
    groups = make_groups([TableConfig(name, 8, DIM, config) for name, config in schedules.items()], 2)
    assert [group.maps.names for group in groups] == [("warm",), ("flat",), ("cosine",)]
    mesh = make_mesh(MeshConfig(num_devices=1, num_shards=2))
    write = jax.jit(write_rows, static_argnums=(0, 1))
    rates = {"warm": (0.1, 0.4), "flat": (0.4, 0.4), "cosine": (0.4, 0.4 * (0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * 0.75))))}
    for group in groups:
        touched = np.array([[2, 0]], np.int32)
        plan = GroupPlan(touched, None, None, None, None, None, None)
        for step, rate in zip((0, 3), rates[group.maps.names[0]], strict=True):
            after = write(
                mesh, group, jnp.ones(group.shape), jnp.ones((1, 2, DIM)), jnp.ones((1, 2, DIM)), jnp.int32(step), plan
            )
            expected = np.ones(group.shape, np.float32)
            expected[0, [0, 2]] -= rate
            np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_rate_multiplies_the_update() -> None:
    layout = row_layout(OptimizerConfig(name="adam"), DIM)
    rows = first_rows(layout, jnp.ones((1, DIM)))
    moved = [np.array(updated_rows(layout, rows, jnp.ones((1, DIM)), jnp.float32(rate)))[0, 0] - 1 for rate in (0.0, 0.1, 0.2)]
    np.testing.assert_allclose(moved, [0, -0.1, -0.2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adafactor", "adafactor cannot update rows: its factored state needs matrices"),
        ("sm3", "sm3 cannot update rows: its accumulators are shared"),
        ("lbfgs", "lbfgs cannot update rows"),
        ("noisy_sgd", "noisy_sgd cannot update rows"),
        ("optimistic_gradient_descent", "keeps bool state, rows hold float32"),
        ("fromage", "its learning rate does not only scale the update"),
        ("adagard", "no optimizer 'adagard'; did you mean adagrad"),
        ("chain", "no optimizer 'chain'"),
        ("__name__", "no optimizer '__name__'"),
    ],
)
def test_what_cannot_work_per_row_is_refused_by_name(name: str, told: str) -> None:
    with pytest.raises(ValueError, match="OptimizerConfig.name.*" + told):
        row_layout(OptimizerConfig(name=name), DIM)


def test_group_lasso_of_dense_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group_lasso shortens rows of tables; Experiment\.dense_optimizer has none"):
        make_small(dense_optimizer=OptimizerConfig(name="sgd", group_lasso=0.1))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"OptimizerConfig.arguments: sgd takes momentum, nesterov.*got 'b1'"):
        make_optimizer(OptimizerConfig(name="sgd", arguments=(("b1", 0.9),)))
    with pytest.raises(ValueError, match="got 'learning_rate'"):
        make_optimizer(OptimizerConfig(name="sgd", arguments=(("learning_rate", 0.9),)))
