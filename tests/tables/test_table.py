"""Groups of tables, and first values of rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from monolith_jax.mesh import MeshConfig, make_mesh
from monolith_jax.tables.table import Group, TableConfig, empty_array, first_vectors, make_groups
from monolith_jax.tables.update import OptimizerConfig

DIM = 8


def group_of(*names: str, scale: float = 0.05) -> Group:
    (group,) = make_groups([TableConfig(name, 100, DIM, init_scale=scale) for name in names], 8)
    return group


def vectors_of(group: Group, seed: int, ids: np.ndarray, table: int | np.ndarray = 0) -> np.ndarray:
    halves = np.ascontiguousarray(ids, np.int64).view(np.uint32).reshape(-1, 2)
    tables = np.broadcast_to(np.asarray(table, np.int32), ids.shape)
    return np.asarray(first_vectors(group, seed, jnp.asarray(halves), jnp.asarray(tables)))


def test_first_values_do_not_depend_on_the_order_or_the_company() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 500)
    group = group_of("a")
    together = vectors_of(group, 3, ids)
    order = np.random.default_rng(1).permutation(500)
    np.testing.assert_array_equal(vectors_of(group, 3, ids[order]), together[order])
    np.testing.assert_array_equal(vectors_of(group, 3, ids[:1]), together[:1])
    # Nor on the other tables of the group, nor on the place among them.
    np.testing.assert_array_equal(vectors_of(group_of("b", "c", "a"), 3, ids, 2), together)


def test_first_values_are_uniform_in_the_range() -> None:
    ids = np.arange(-20_000, 20_000)
    for scale in (0.05, 2.0):
        values = vectors_of(group_of("a", scale=scale), 0, ids) / scale
        assert values.min() >= -1 and values.max() < 1
        counts = np.histogram(values, 50, (-1, 1))[0]
        expected = values.size / 50
        assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-squared, 49 degrees of freedom: p of 1e-6
        # Consecutive ids and neighbouring positions have nothing to do with each other.
        assert np.abs(np.corrcoef(values, rowvar=False) - np.eye(DIM)).max() < 0.03
        assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.01


def test_first_values_differ_by_seed_table_and_id() -> None:
    ids = np.array([0, 1, -1, 2**32, 1 + 2**32, 2**63 - 1, -(2**63), 5])
    group = group_of("a", "b")
    every = [vectors_of(group, seed, ids, table) for seed in (0, 1, 2**63) for table in (0, 1)]
    assert np.unique(np.concatenate(every), axis=0).shape[0] == 6 * ids.size


def test_no_two_of_many_ids_start_with_one_vector() -> None:
    ids = np.arange(2**18, dtype=np.int64) * 2**20
    assert np.unique(vectors_of(group_of("a"), 0, ids)[:, :3], axis=0).shape[0] == ids.size


def test_each_table_has_its_own_scale() -> None:
    (group,) = make_groups([TableConfig("a", 9, DIM, init_scale=0.0), TableConfig("b", 9, DIM, init_scale=3.0)], 8)
    values = vectors_of(group, 0, np.arange(100), np.arange(100) % 2)
    assert not values[::2].any()
    assert np.abs(values[1::2]).max() > 2.5


def test_tables_of_equal_dim_and_optimizer_share_a_group() -> None:
    adam = OptimizerConfig(name="adam")
    tables = [
        TableConfig("a", 100, 4),
        TableConfig("b", 100, 8),
        TableConfig("c", 50, 4, adam),
        TableConfig("d", 70, 4, init_scale=1.0),
    ]
    groups = make_groups(tables, 8)
    assert [group.maps.names for group in groups] == [("a", "d"), ("b",), ("c",)]
    assert [group.dim for group in groups] == [4, 8, 4]
    assert [group.rows.width for group in groups] == [8, 16, 4 + 1 + 8]
    assert groups[0].shape == (8, groups[0].maps.rows_per_shard, 8)


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="used more than once: a"):
        make_groups([TableConfig("a", 1), TableConfig("a", 1)], 8)
    with pytest.raises(ValueError, match="dim of table 'a' must be at least 1, got 0"):
        make_groups([TableConfig("a", 1, 0)], 8)
    with pytest.raises(ValueError, match="max_rows of table 'a' must be at least 1"):
        make_groups([TableConfig("a", 0)], 8)
    with pytest.raises(ValueError, match="power of two"):
        make_groups([TableConfig("a", 1)], 6)


def test_empty_array_is_split_over_the_devices() -> None:
    group = group_of("a")
    array = empty_array(group, make_mesh(MeshConfig(num_devices=4, num_shards=8)))
    assert array.shape == group.shape
    assert not np.asarray(array).any()
    assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
    assert len({shard.device for shard in array.addressable_shards}) == 4


def test_meshes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_devices is 16, but there are 8 cpu devices; MeshConfig.cpu_devices"):
        make_mesh(MeshConfig(num_devices=16, num_shards=16))
    with pytest.raises(ValueError, match=r"3 devices do not divide MeshConfig\.num_shards = 64"):
        make_mesh(MeshConfig(num_devices=3))
