"""Vectors read from the devices, by row, whatever the type and however many."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monolith_jax.mesh import ROWS, MeshConfig, make_mesh, sharding
from monolith_jax.sync import gather
from monolith_jax.sync.gather import VectorReader, fetch_dense, make_copy
from monolith_jax.tables.table import TableConfig, make_groups
from monolith_jax.tables.update import first_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("number", [0, 1, 300, 2000])
def test_reads_the_rows_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, dtype: Any, devices: int, number: int) -> None:
    monkeypatch.setattr(gather, "LARGEST", 512)
    mesh = make_mesh(MeshConfig(devices, num_shards=8))
    (group,) = make_groups([TableConfig("a", 2000, dim=5, dtype=dtype), TableConfig("b", 900, dim=5, dtype=dtype)], 8)
    rng = np.random.default_rng(0)
    size = group.shape[0] * group.shape[1]
    values = rng.normal(size=(size, 5)).astype(np.float32)
    expected = values.astype(jnp.bfloat16).astype(np.float32) if dtype == "bfloat16" else values
    array = jax.device_put(first_rows(group.rows, jnp.asarray(values)).reshape(group.shape), sharding(mesh, ROWS))
    reader = VectorReader(group, mesh)
    reader.compile(array)
    # Most of them on one device.
    rows = np.sort(rng.permutation(size)[:number]) if number < 2000 else np.arange(number)
    read = reader.read(array, rows)
    array.delete()  # As the next step does.
    np.testing.assert_array_equal(read.fetch(), expected[rows])


def test_copies_of_dense_weights_are_named_by_their_path() -> None:
    mesh = make_mesh(MeshConfig(8, 2, num_shards=8))
    tree = {"towers": {0: {"kernel": jnp.ones((2, 3))}}, "bias": jnp.zeros(())}
    found = fetch_dense(make_copy(mesh)(tree))
    assert found.keys() == {"towers/0/kernel", "bias"}
    np.testing.assert_array_equal(found["towers/0/kernel"], np.ones((2, 3)))
