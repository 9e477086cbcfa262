"""The way of vectors to the batch and of gradients back, against plain numpy, on 1, 2 and 8 devices."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from monolith_jax.ids.group import GroupMapper
from monolith_jax.mesh import BATCH, ROWS, MeshConfig, make_mesh, sharding
from monolith_jax.tables.lookup import gather_rows, return_gradients, send_vectors, write_fresh_rows, write_rows
from monolith_jax.tables.table import Group, TableConfig, empty_array, make_groups
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.types import GroupIds, GroupPlan

DIM, BATCH_SIZE, SHARDS = 3, 16, 8
TABLES = (TableConfig("a", 400, DIM), TableConfig("b", 1, DIM, init_scale=1.0))
POSITIONS = [0, 0, 0, 1, 1]
"""Of each example: three ids of table a, two of b. Table b can hold few ids, so many are refused."""


class Setting:
    """A group on a mesh, and its maps."""

    def __init__(
        self,
        num_devices: int,
        optimizer: str = "sgd",
        tables: tuple[TableConfig, ...] = TABLES,
        positions: Sequence[int] = POSITIONS,
        shards: int = SHARDS,
    ) -> None:
        rows = OptimizerConfig(name=optimizer, learning_rate=0.5)
        self.mesh: Mesh = make_mesh(MeshConfig(num_devices=num_devices, num_shards=shards))
        self.group: Group
        (self.group,) = make_groups([dataclasses.replace(table, optimizer=rows) for table in tables], shards)
        self.mapper = GroupMapper(self.group.maps, positions, num_devices)

    def plan(self, ids: np.ndarray, valid: np.ndarray) -> GroupPlan:
        plan, *_ = self.mapper.plan(GroupIds(ids, valid), np.zeros(len(ids), np.uint32), 0, 0)
        rows, batch = sharding(self.mesh, ROWS), sharding(self.mesh, BATCH)
        return jax.device_put(plan, GroupPlan(rows, rows, batch, rows, rows, rows, rows))

    def rows_of(self, ids: np.ndarray, table: int) -> np.ndarray:
        """Returns the place of ids in the array seen as [L R, W], -1 for refused ones."""
        shards, rows = self.mapper.maps.lookup(ids, table)
        layout = self.group.maps
        flat = shards.astype(np.int64) * layout.rows_per_shard + layout.row_offsets[table] + rows
        return np.where(rows >= 0, flat, -1)

    def step(
        self, array: jax.Array, plan: GroupPlan, gradients: np.ndarray, step_number: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns vectors [B, P, D], gradients of the rows [S, V, D] and the new array [L R, W]."""

        def step(array: jax.Array, plan: GroupPlan, gradients: jax.Array) -> tuple[jax.Array, ...]:
            rows = gather_rows(self.mesh, array, plan)
            vectors = send_vectors(self.mesh, self.group, rows, plan)
            of_rows = return_gradients(self.mesh, gradients, plan)
            after = write_rows(self.mesh, self.group, array, rows, of_rows, jnp.int32(step_number), plan)
            return vectors, of_rows, after.reshape(-1, after.shape[-1])

        vectors, of_rows, after = jax.jit(step)(array, plan, jax.device_put(gradients, sharding(self.mesh, BATCH)))
        return np.asarray(vectors), np.asarray(of_rows), np.asarray(after)

    def freshen(self, array: jax.Array, plan: GroupPlan, seed: int) -> jax.Array:
        return jax.jit(write_fresh_rows, static_argnums=(0, 1, 2))(self.mesh, self.group, seed, array, plan)

    def random_array(self, seed: int = 0) -> tuple[jax.Array, np.ndarray]:
        values = np.random.default_rng(seed).normal(size=self.group.shape).astype(np.float32)
        return jax.device_put(values, sharding(self.mesh, ROWS)), values.reshape(-1, self.group.shape[-1])


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids with many repeats, where there are some, and gradients."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 40, (BATCH_SIZE, len(POSITIONS))) * (2**57 - 1)
    valid = rng.random(ids.shape) < 0.8
    return ids, valid, rng.normal(size=(*ids.shape, DIM)).astype(np.float32)


def places(setting: Setting, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Returns the place of each position's row, [B, P], -1 where there is none."""
    columns = [setting.rows_of(ids[:, position], table) for position, table in enumerate(POSITIONS)]
    return np.where(valid, np.stack(columns, 1), -1)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_vectors_reach_their_positions(num_devices: int) -> None:
    setting = Setting(num_devices)
    ids, valid, gradients = draw()
    plan = setting.plan(ids, valid)
    array, values = setting.random_array()
    vectors, _, _ = setting.step(array, plan, gradients)
    at = places(setting, ids, valid)
    assert (at[:, 3:] < 0)[valid[:, 3:]].any(), "some ids should have been refused"
    np.testing.assert_array_equal(vectors, np.where(at[:, :, None] >= 0, values[at, :DIM], 0))


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_gradients_are_summed_and_written_once(num_devices: int) -> None:
    setting = Setting(num_devices)
    ids, valid, gradients = draw()
    plan = setting.plan(ids, valid)
    array, values = setting.random_array()
    _, _, after = setting.step(array, plan, gradients)
    at = places(setting, ids, valid)
    expected = values.astype(np.float64)
    np.add.at(expected, at[at >= 0], -0.5 * gradients[at >= 0].astype(np.float64))
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
    # All that the batch did not touch is the same to the last bit: padding wrote nowhere.
    untouched = np.setdiff1d(np.arange(len(values)), at[at >= 0])
    assert len(untouched) > 100
    np.testing.assert_array_equal(after[untouched], values[untouched])


@pytest.mark.parametrize("num_devices", [2, 8])
def test_fresh_rows_get_the_same_values_on_every_mesh(num_devices: int) -> None:
    arrays = []
    for devices in (1, num_devices):
        setting = Setting(devices, "adagrad")
        first = draw(1)
        array = setting.freshen(empty_array(setting.group, setting.mesh), setting.plan(first[0], first[1]), 7)
        before = np.asarray(array).reshape(-1, setting.group.shape[-1])
        owned = places(setting, first[0], first[1])
        owned = np.unique(owned[owned >= 0])
        assert (np.abs(before[owned, :DIM]) > 0).all() and (before[owned, DIM:] > 0).all()
        assert not before[np.setdiff1d(np.arange(len(before)), owned)].any()
        second = draw(2)
        plan = setting.plan(second[0], second[1])
        after = np.asarray(setting.freshen(array, plan, 7))
        np.testing.assert_array_equal(after.reshape(before.shape)[owned], before[owned])
        arrays.append(after)
    np.testing.assert_array_equal(arrays[0], arrays[1])


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_batch_without_ids_touches_no_row(optimizer: str) -> None:
    setting = Setting(8, optimizer)
    ids, valid, gradients = draw()
    setting.plan(ids, valid)
    plan = setting.plan(ids, np.zeros_like(valid))
    array, values = setting.random_array()
    vectors, of_rows, after = setting.step(setting.freshen(array, plan, 0), plan, gradients)
    assert not vectors.any() and not of_rows.any()
    np.testing.assert_array_equal(after, values)


def test_one_row_a_group_of_one_table() -> None:
    setting = Setting(1, tables=(TableConfig("only", 1, 1),), positions=[0], shards=2)
    assert setting.group.shape == (2, 1, 1)
    plan = setting.plan(np.array([[5]]), np.array([[True]]))
    array = setting.freshen(empty_array(setting.group, setting.mesh), plan, 0)
    vectors, _, after = setting.step(array, plan, np.ones((1, 1, 1), np.float32))
    (at,) = setting.rows_of(np.array([5]), 0)
    assert vectors.item() == np.asarray(array).ravel()[at] != 0
    assert after[at, 0] == vectors.item() - np.float32(0.5)


@pytest.mark.parametrize("optimizer", ["adam", "ftrl", "rowwise_adagrad"])
def test_one_device_equals_eight_in_float64(optimizer: str) -> None:
    results = []
    with jax.enable_x64(True):
        for num_devices in (1, 8):
            setting = Setting(num_devices, optimizer)
            array = empty_array(setting.group, setting.mesh)
            for number in range(2):
                ids, valid, gradients = draw(number)
                plan = setting.plan(ids, valid)
                vectors, of_rows, after = setting.step(setting.freshen(array, plan, 7), plan, gradients.astype(np.float64))
                assert vectors.dtype == of_rows.dtype == after.dtype == np.float64
                array = jax.device_put(after.reshape(setting.group.shape), sharding(setting.mesh, ROWS))
            results.append(after)
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-13 * np.abs(results[0]).max())
    assert not np.array_equal(results[0], results[0].astype(np.float32))
