"""One device and eight learn the same.

Rows, weights and sums are float32 by construction; only the order of sums can differ. After 20 steps the losses agree to
1e-5 and every float of the state to 1e-5 of the largest value. Ids have the same rows whatever the mesh, exactly.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from monolith_jax.mesh import MeshConfig, make_mesh
from monolith_jax.models.dcn import DCNConfig
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.tables.wire import PADDED, WireConfig
from monolith_jax.train.state import ModelConfig
from monolith_jax.train.step import make_train_step
from tests.float64_run import MESHES, OPTIMIZERS
from tests.small_model import make_examples, make_small

MODELS: dict[str, ModelConfig] = {
    "deepfm": DeepFMConfig(hidden=(16, 8)),
    "mmoe": MMoEConfig(4, (16, 8), (4,)),
    "dcn": DCNConfig(2, 8, (16, 8)),
}


@functools.cache
def learn(
    num_devices: int, config: ModelConfig, run: int, model_parallel: int = 1, wire: WireConfig = PADDED
) -> tuple[list[float], Any, list[dict[str, np.ndarray]], list[Any]]:
    optimizer = OptimizerConfig(name="adagrad", learning_rate=0.05)
    small = make_small(num_devices, config, dense_optimizer=optimizer, model_parallel=model_parallel, wire=wire)
    train_step, state = make_train_step(small.model), small.state
    losses, scores = [], []
    for step in range(20):
        inputs, _, _ = small.inputs_of(make_examples(32, seed=step % 7, num_ids=100))
        state, metrics = train_step(state, inputs)
        losses.append(float(metrics.loss))
        scores.append(np.asarray(metrics.scores))
    maps = [{name: array for name, array in one.items() if name != "sizes"} for one in small.mapper.get_state()]
    return losses, jax.device_get(state), maps, scores


@pytest.mark.parametrize("model_parallel", [1, 2, 4])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_one_device_equals_eight(config: ModelConfig, model_parallel: int) -> None:
    losses, state, maps, scores = learn(1, config, 0)
    assert losses[-1] < losses[0]
    other_losses, other_state, other_maps, other_scores = learn(8, config, 0, model_parallel)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(other_scores, scores, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * float(np.abs(one).max()))
    for one, other in zip(maps, other_maps, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array)


def test_two_runs_on_eight_devices_are_equal_to_the_bit() -> None:
    runs = [learn(8, MODELS["mmoe"], run) for run in range(2)]
    assert runs[0][0] == runs[1][0]
    for one, other in zip(*(jax.tree.leaves(run[1]) for run in runs), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_bfloat16_on_the_wire_learns_what_float32_does(config: ModelConfig) -> None:
    losses, state, maps, _ = learn(8, config, 0)
    half_losses, half_state, half_maps, _ = learn(8, config, 0, wire=WireConfig(dtype="bfloat16"))
    assert half_losses != losses and half_losses[-1] < half_losses[0]
    # Each number is rounded by at most a part in 256 on its way.
    np.testing.assert_allclose(half_losses, losses, rtol=2e-3)
    assert losses[-1] - losses[0] == pytest.approx(half_losses[-1] - half_losses[0], rel=0.02)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(half_state), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=0.05 * float(np.abs(one).max()))
    for one, other in zip(maps, half_maps, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array)


def test_ragged_is_refused_before_the_first_step_on_cpu_devices() -> None:
    with pytest.raises(ValueError, match=r"WireConfig\.kind is 'ragged', but XLA has no ragged_all_to_all for CPU"):
        make_small(8, wire=WireConfig("ragged"))


def test_tables_and_batch_are_split() -> None:
    small = make_small(8)
    inputs, _, _ = small.inputs_of(make_examples(32))
    state, metrics = make_train_step(small.model)(small.state, inputs)
    for array in state.groups:
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {1}
    assert {shard.data.shape[0] for shard in metrics.scores.addressable_shards} == {4}
    assert {shard.data.shape[0] for shard in inputs.labels.addressable_shards} == {4}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.weights))


def local_shapes(tree: Any) -> list[tuple[int, ...]]:
    return [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(tree)]


def test_towers_and_their_optimizer_are_split() -> None:
    adam = OptimizerConfig(name="adam", learning_rate=0.01)
    small = make_small(8, MODELS["deepfm"], dense_optimizer=adam, model_parallel=4)
    inputs, _, _ = small.inputs_of(make_examples(32))
    before = jax.tree.map(lambda leaf: leaf.sharding, small.state)
    state, metrics = make_train_step(small.model)(small.state, inputs)
    layers = state.weights["deep"]["layers"]
    inputs_of_tower = layers[0]["kernel"].shape[0]
    expected = {0: ((inputs_of_tower, 4), (4,)), 1: ((4, 8), (8,)), 2: ((8, 2), (2,))}
    for number, (kernel, bias) in expected.items():
        assert local_shapes([layers[number]["kernel"], layers[number]["bias"]]) == [kernel, bias]
    moments = [leaf for leaf in local_shapes(state.optimizer) if leaf]
    assert sorted(moments) == sorted(local_shapes(state.weights) * 2)
    assert {shard.data.shape[0] for shard in metrics.scores.addressable_shards} == {16}
    assert {shard.data.shape[0] for shard in state.groups[0].addressable_shards} == {1}
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        assert one.sharding.is_equivalent_to(other, one.ndim)


def test_experts_are_split_and_a_number_that_does_not_divide_is_not() -> None:
    four, three = (make_small(8, MMoEConfig(n, (16,), (4,)), model_parallel=2).state.weights for n in (4, 3))
    kernel = four["experts"]["kernels"][0]
    assert local_shapes(kernel) == [(2, *kernel.shape[1:])]
    assert three["experts"]["kernels"][0].sharding.is_fully_replicated


@pytest.mark.parametrize("model_parallel", [0, 3, 16])
def test_towers_that_the_devices_cannot_share_are_refused(model_parallel: int) -> None:
    with pytest.raises(ValueError, match=rf"MeshConfig\.model_parallel is {model_parallel}, which does not divide 8 devices"):
        make_mesh(MeshConfig(num_devices=8, model_parallel=model_parallel))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float64_learns_the_same_on_every_mesh(name: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.float64_run", name]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(MESHES) + 1 and max(found.values()) < 1e-9, found
