"""A new run from an old one's snapshot: what is taken over is right, and what is told of it too."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.snapshot import Restored, SnapshotConfig, Snapshots
from monolith_jax.tables.table import TableConfig
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.train.step import make_predict_step, make_train_step
from monolith_jax.train.warm_start import take_over
from tests.small_model import ADAGRAD, FEATURES, TABLES, Small, make_examples, make_small


def trained(num_devices: int = 1) -> Small:
    small = make_small(num_devices)
    train_step, state = make_train_step(small.model), small.state
    for step in range(3):
        state, _ = train_step(state, small.inputs_of(make_examples(16, step))[0])
    return dataclasses.replace(small, state=state)


def host_of(small: Small) -> dict[str, Any]:
    return {"maps": small.mapper.get_state(), "parts": np.zeros((1, 1, 2**20), np.uint8)}


def identity(tables: tuple[TableConfig, ...] = TABLES) -> dict[str, Any]:
    return json.loads(json.dumps({"tables": [dataclasses.asdict(table) for table in tables], "num_shards": 8}))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Small, Restored]:
    """Returns a trained model, and its snapshot as it comes from the disk."""
    small = trained()
    snapshots = Snapshots(SnapshotConfig(), tmp_path_factory.mktemp("old"))
    snapshots.save(3, small.state, host_of(small), {"arrays": {}}, identity())
    snapshots.wait()
    restored = snapshots.restore_plain(3)
    snapshots.close()
    return small, restored


def rows_by_id(small: Small, table: str, arrays: Any = None) -> dict[int, list[float]]:
    """Returns the whole row of each id of a table."""
    for group, mapper, array in zip(small.model.groups, small.mapper.groups, arrays or small.state.groups, strict=True):
        if table in group.maps.names:
            index = group.maps.names.index(table)
            ids, shards, rows, _ = mapper.maps.entries(index)
            values = np.asarray(array)[shards, group.maps.row_offsets[index] + rows]
            return dict(zip(ids.tolist(), values.tolist(), strict=True))
    raise AssertionError(table)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_same_model_goes_on_as_it_was(old: tuple[Small, Restored], num_devices: int) -> None:
    small, snapshot = old
    new = make_small(num_devices, seed=99)
    state, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    new = dataclasses.replace(new, state=state)
    for table in TABLES:
        rows = rows_by_id(small, table.name)
        assert len(rows) > 10 and rows_by_id(new, table.name) == rows
        assert f"table {table.name}: {len(rows)} rows taken over" in lines
    assert [line for line in lines if line.startswith("weight")] == [
        "weight deep.layers.0.bias: taken over",
        "weight deep.layers.0.kernel: taken over",
        "weight wide: taken over",
    ]
    scores = [
        np.asarray(make_predict_step(one.model)(one.state, one.inputs_of(make_examples(16, 1))[0])) for one in (small, new)
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)


def test_another_model_keeps_the_tables(old: tuple[Small, Restored]) -> None:
    small, snapshot = old
    new = make_small(1, MMoEConfig(2, (4,), ()))
    state, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    for one, other in zip(jax.tree.leaves(state.weights), jax.tree.leaves(new.state.weights), strict=True):
        np.testing.assert_array_equal(one, other)
    told = [line for line in lines if line.startswith("weight")]
    assert len(told) == len(jax.tree.leaves(state.weights))
    assert all(line.endswith("starts anew (not in the snapshot)") for line in told)
    assert rows_by_id(dataclasses.replace(new, state=state), "user") == rows_by_id(small, "user")


def test_weights_of_another_shape_start_anew(old: tuple[Small, Restored]) -> None:
    _, snapshot = old
    new = make_small(1, DeepFMConfig(hidden=(6,)))
    state, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    assert any(line.startswith("weight deep.layers.0.kernel: starts anew (shape (") for line in lines)
    assert "weight deep.layers.1.kernel: starts anew (not in the snapshot)" in lines
    assert "weight wide: taken over" in lines
    np.testing.assert_array_equal(state.weights["wide"], snapshot.state["weights"]["wide"])


def test_more_and_fewer_rows(old: tuple[Small, Restored]) -> None:
    small, snapshot = old
    sizes = {"user": 5000, "tag": 2, "video": 500}
    new = make_small(1, tables=[dataclasses.replace(table, max_rows=sizes[table.name]) for table in TABLES])
    state, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    new = dataclasses.replace(new, state=state)
    assert rows_by_id(new, "user") == rows_by_id(small, "user")
    kept, all_tags = rows_by_id(new, "tag"), rows_by_id(small, "tag")
    assert 0 < len(kept) < len(all_tags)
    assert all(all_tags[one] == row for one, row in kept.items())
    assert f"table tag: {len(kept)} rows taken over, {len(all_tags) - len(kept)} did not fit" in lines


def test_latest_seen_are_kept_first(old: tuple[Small, Restored]) -> None:
    small, snapshot = old
    new = make_small(1, tables=[dataclasses.replace(table, max_rows=1) for table in TABLES])
    take_over(new.model, new.state, new.mapper, snapshot, identity())
    group = next(index for index, one in enumerate(small.model.groups) if "user" in one.maps.names)
    table = small.model.groups[group].maps.names.index("user")
    ids, shards, _, seen_s = small.mapper.groups[group].maps.entries(table)
    kept = new.mapper.groups[group].maps.lookup(ids, table)[1] >= 0
    for shard in np.unique(shards):
        mine = shards == shard
        assert kept[mine].sum() == 1
        assert seen_s[mine & kept][0] == seen_s[mine].max()


def test_another_dim_starts_empty(old: tuple[Small, Restored]) -> None:
    _, snapshot = old
    tables = [dataclasses.replace(table, dim=6) for table in TABLES[:1]] + list(TABLES[1:])
    new = make_small(1, MMoEConfig(2, (4,), ()), tables=tables)
    _, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    assert "table user: starts empty (dim 6 here, 4 in the snapshot)" in lines
    assert rows_by_id(new, "user") == {}


def test_a_table_that_is_new_starts_empty(old: tuple[Small, Restored]) -> None:
    _, snapshot = old
    features = [dataclasses.replace(one, table="tog") if getattr(one, "table", "") == "tag" else one for one in FEATURES]
    tables = [dataclasses.replace(table, name="tog") if table.name == "tag" else table for table in TABLES]
    new = make_small(1, tables=tables, features=features)
    _, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    assert "table tog: starts empty (not in the snapshot)" in lines


def test_another_optimizer_keeps_the_vectors(old: tuple[Small, Restored]) -> None:
    small, snapshot = old
    new = make_small(1, tables=[dataclasses.replace(table, optimizer=OptimizerConfig(name="adam")) for table in TABLES])
    state, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    new = dataclasses.replace(new, state=state)
    for table in TABLES:
        rows, old_rows = rows_by_id(new, table.name), rows_by_id(small, table.name)
        assert {one: row[:4] for one, row in rows.items()} == {one: row[:4] for one, row in old_rows.items()}
        assert not np.array([row[4:] for row in rows.values()]).any()
        assert f"table {table.name}: {len(rows)} rows taken over, optimizer slots start anew" in lines


def test_another_learning_rate_keeps_the_slots(old: tuple[Small, Restored]) -> None:
    small, snapshot = old
    slower = dataclasses.replace(ADAGRAD, learning_rate=0.001, warmup_steps=5)
    new = make_small(
        1, tables=[dataclasses.replace(table, optimizer=slower) for table in TABLES[1:2]], features=_tag_features()
    )
    state, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    rows = rows_by_id(dataclasses.replace(new, state=state), "tag")
    assert rows == rows_by_id(small, "tag")
    assert f"table tag: {len(rows)} rows taken over" in lines
    other = dataclasses.replace(ADAGRAD, arguments=(("eps", 1e-3),))
    new = make_small(1, tables=[dataclasses.replace(table, optimizer=other) for table in TABLES[1:2]], features=_tag_features())
    _, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    assert f"table tag: {len(rows)} rows taken over, optimizer slots start anew" in lines


def test_another_dtype_rounds_the_vectors_and_keeps_the_slots(old: tuple[Small, Restored]) -> None:
    small, snapshot = old
    new = make_small(1, tables=[dataclasses.replace(table, dtype="bfloat16") for table in TABLES])
    state, lines = take_over(new.model, new.state, new.mapper, snapshot, identity())
    rows, old_rows = rows_by_id(dataclasses.replace(new, state=state), "tag"), rows_by_id(small, "tag")
    assert rows.keys() == old_rows.keys() and f"table tag: {len(rows)} rows taken over" in lines
    rows = {one: rows[one] for one in old_rows}
    vectors = np.array([row[:4] for row in old_rows.values()], np.float32).astype(jnp.bfloat16)
    assert len(vectors) > 10
    np.testing.assert_array_equal([row[:2] for row in rows.values()], vectors.view(np.uint16).view(np.float32))
    assert [row[2:] for row in rows.values()] == [row[4:] for row in old_rows.values()]


def test_words_of_bfloat16_come_back_from_the_disk_to_the_bit(tmp_path: Path) -> None:
    tables = tuple(dataclasses.replace(table, dtype="bfloat16") for table in TABLES)
    small = make_small(8, tables=tables)
    state, _ = make_train_step(small.model)(small.state, small.inputs_of(make_examples(16))[0])
    # Every 32 bits that a word can start with: as float32 many are denormal or no numbers.
    every = [np.resize(np.arange(2**16, dtype=np.uint32) << 16 | 1, array.shape).view(np.float32) for array in state.groups]
    groups = tuple(jax.device_put(one, array.sharding) for one, array in zip(every, state.groups, strict=True))
    state = state._replace(groups=groups)
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    snapshots.save(
        1,
        state,
        {"maps": small.mapper.get_state(), "parts": np.zeros((1, 1, 2**20), np.uint8)},
        {"arrays": {}},
        identity(tables),
    )
    snapshots.wait()
    restored = snapshots.restore(1, state, identity(tables)).state.groups
    snapshots.close()
    for one, array in zip(every, restored, strict=True):
        np.testing.assert_array_equal(np.asarray(array).view(np.uint32), one.view(np.uint32))


def _tag_features() -> Any:
    return [one for one in FEATURES if getattr(one, "table", "") == "tag"]


def test_an_empty_old_table_gives_nothing(tmp_path: Path) -> None:
    small = make_small(1)
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    snapshots.save(
        0,
        small.state,
        {"maps": small.mapper.get_state(), "parts": np.zeros((1, 1, 2**20), np.uint8)},
        {"arrays": {}},
        identity(),
    )
    snapshots.wait()
    adam = [dataclasses.replace(table, optimizer=OptimizerConfig(name="adam")) for table in TABLES]
    new = make_small(1, tables=adam)
    _, lines = take_over(new.model, new.state, new.mapper, snapshots.restore_plain(0), identity())
    snapshots.close()
    assert "table user: 0 rows taken over, optimizer slots start anew" in lines
