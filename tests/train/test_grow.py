"""A run goes on with larger tables and other rules: every id keeps its row, its vector and its optimizer state."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.snapshot import SnapshotConfig, Snapshots
from monolith_jax.tables.table import TableConfig
from monolith_jax.train.grow import can_grow, restore_grown
from monolith_jax.train.step import make_train_step
from tests.small_model import TABLES, Small, make_examples, make_small


def identity(tables: tuple[TableConfig, ...]) -> dict[str, Any]:
    return {"tables": [dataclasses.asdict(table) for table in tables], "seed": 0}


def trained(small: Small) -> Small:
    step = make_train_step(small.model)
    for seed in range(4):
        small.state, _ = step(small.state, small.inputs_of(make_examples(16, seed))[0])
    return small


def rows_by_id(small: Small) -> dict[tuple[str, int], np.ndarray]:
    """Returns the whole row of each id of each table."""
    found = {}
    for group, mapper, array in zip(small.model.groups, small.mapper.groups, small.state.groups, strict=True):
        values = np.asarray(array)
        for index, table in enumerate(group.tables):
            ids, shards, rows, _ = mapper.maps.entries(index)
            for one, shard, row in zip(ids.tolist(), shards, rows, strict=True):
                found[table.name, one] = values[shard, group.maps.row_offsets[index] + row]
    return found


@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_id_keeps_its_row(tmp_path: Path, num_devices: int) -> None:
    old = trained(make_small(num_devices))
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    host = {"maps": old.mapper.get_state(), "parts": np.zeros((1, 1, 2**20), np.uint8)}
    snapshots.save(4, old.state, host, {"arrays": {"none": np.zeros(1)}}, identity(TABLES))
    snapshots.wait()
    seen = AdmissionConfig(rule="seen", times=2)
    larger = tuple(dataclasses.replace(t, max_rows=3 * t.max_rows + 5, ttl_s=100, admission=seen) for t in TABLES)
    assert can_grow(identity(TABLES), identity(larger))
    new = make_small(num_devices, tables=larger)
    restored = restore_grown(snapshots, 4, new.model, new.state, new.mapper, larger)
    snapshots.close()
    new.mapper.set_state(restored.host["maps"])
    new.state = restored.state
    before, after = rows_by_id(old), rows_by_id(new)
    assert before.keys() == after.keys()
    assert before
    assert all(np.array_equal(before[key], after[key]) for key in before)
    for a, b in zip(jax.tree.leaves(old.state.weights), jax.tree.leaves(new.state.weights), strict=True):
        assert np.array_equal(a, b)
    trained(new)


def test_what_may_change() -> None:
    larger = (dataclasses.replace(TABLES[0], max_rows=TABLES[0].max_rows + 1), *TABLES[1:])
    assert can_grow(identity(TABLES), identity(larger))
    assert not can_grow(identity(larger), identity(TABLES))
    assert not can_grow(identity(TABLES), identity(TABLES))
    assert not can_grow(identity(TABLES), {**identity(larger), "seed": 1})
    assert not can_grow(identity(TABLES), identity(larger[1:]))
    assert not can_grow(identity(TABLES), identity((dataclasses.replace(larger[0], dim=larger[0].dim + 8), *TABLES[1:])))
    assert can_grow(identity(TABLES), identity((dataclasses.replace(TABLES[0], ttl_s=5), *TABLES[1:])))
