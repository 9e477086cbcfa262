"""Sums of the gradients of equal ids: the same numbers on every way, and the way that each platform takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.bench import workload
from monolith_jax.mesh import MeshConfig, make_mesh
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.tables import lookup
from monolith_jax.tables.lookup import sum_by_index
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.train.state import first_state
from monolith_jax.train.step import make_read, make_write


def drawn(number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    return rng.normal(size=(number, 3)).astype(np.float32), rng.integers(0, size + 3, number).astype(np.int32)


@pytest.mark.parametrize(("number", "size"), [(1, 1), (50, 7), (2000, 300)])
def test_sums_are_numpys(number: int, size: int) -> None:
    values, indices = drawn(number, size)
    expected = np.zeros((size, 3))
    np.add.at(expected, indices[indices < size], values[indices < size].astype(np.float64))
    np.testing.assert_allclose(jax.jit(sum_by_index, static_argnums=2)(values, indices, size), expected, atol=1e-4)


def test_both_ways_give_the_same_bits_here(monkeypatch: pytest.MonkeyPatch) -> None:
    values, indices = drawn(5000, 40)
    here = np.asarray(sum_by_index(jnp.asarray(values), jnp.asarray(indices), 40))
    # On a CPU the way of GPUs can be taken too.
    monkeypatch.setattr(lookup.jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    there = np.asarray(sum_by_index(jnp.asarray(values), jnp.asarray(indices), 40))
    assert (here == there).all() and here.any()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_update_on_cuda_adds_runs_of_equal_indices(num_devices: int) -> None:
    mesh = make_mesh(MeshConfig(num_devices=num_devices))
    batches = workload.make_batches(64, pool=1)
    work = workload.make_workload(mesh, DeepFMConfig(hidden=(8,)), batches, OptimizerConfig(name="adam"), 2000)
    inputs, state = work.inputs()[0], first_state(work.model, work.weights)
    group = work.model.groups[0]
    rows = jax.ShapeDtypeStruct((num_devices, inputs.plans[0].touched.shape[1], group.shape[2]), jnp.float32)
    gradients = jax.ShapeDtypeStruct((64, workload.NUM_FEATURES, group.dim), jnp.float32)
    traced = make_write(work.model).trace(state.groups, (rows,), (gradients,), state.step, inputs.plans)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")}
    scatters = {platform: text.count('"stablehlo.scatter"') for platform, text in texts.items()}
    assert scatters == {"cpu": num_devices + 1, "cuda": num_devices + 1}  # One device exchanges nothing: it sums once.
    assert texts["cuda"].count("indices_are_sorted = true") == num_devices
    assert texts["cpu"].count('"stablehlo.sort"') == 0 and texts["cuda"].count('"stablehlo.sort"') == num_devices


def test_one_device_reads_past_lists_of_another_length() -> None:
    # A snapshot of several devices can bring sizes with more touched rows than sent ones.
    work = workload.make_workload(
        make_mesh(MeshConfig(num_devices=1)), DeepFMConfig(hidden=(8,)), workload.make_batches(64, pool=1),
        OptimizerConfig(name="sgd", learning_rate=1.0), 2000,
    )  # fmt: skip
    model, plan = work.model, work.inputs()[0].plans[0]
    sent, touched = np.asarray(plan.sent), np.asarray(plan.touched)
    used = int((sent < touched.shape[1]).sum())
    positions = np.where(
        np.arange(plan.positions.size).reshape(plan.positions.shape) % 3 == 0, used, np.asarray(plan.positions)
    )
    shorter = plan._replace(sent=sent[:, :, :used], positions=positions.astype(np.int32))
    array = (jnp.ones(model.groups[0].shape, jnp.float32),)
    rows, vectors, _ = make_read(model)(array, (shorter,))
    assert (np.asarray(vectors[0])[positions == used] == 0).all() and (np.asarray(vectors[0])[positions < used] == 1).all()
    gradients = (jnp.ones((*positions.shape, model.groups[0].dim), jnp.float32),)
    after = np.asarray(make_write(model)(array, rows, gradients, jnp.int32(0), (shorter,))[0])
    assert (1 - after).sum() == pytest.approx((positions < used).sum() * model.groups[0].dim)
