"""Holds the planner's bytes against what training really allocates, writes and moves."""

import dataclasses
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from launch.identity import identity
from launch.plan import plan
from launch.run import Parts, assemble
from monolith_jax.experiment import Experiment, load
from monolith_jax.footprint import Footprint, measure, refuse
from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.ids.group import GroupMapper
from monolith_jax.mesh import MeshConfig, make_abstract_mesh
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.packing import pack, stacked
from monolith_jax.snapshot import SnapshotConfig, Snapshots
from monolith_jax.train.shapes import trace_model
from monolith_jax.train.state import Inputs, input_shardings, make_model
from monolith_jax.types import GroupIds
from tests.small_model import FEATURES, HEADS, SGD, TABLES

ROOT = Path(__file__).parent.parent
MESH = ("Experiment.mesh = @MeshConfig()",)
SIZES = {"quickstart": 8, "kuairand": 2, "movielens": 4}
"""Devices with which each config is held."""


def loaded(name: str, devices: int, overrides: Sequence[str] = ()) -> Experiment:
    mesh = (*MESH, f"MeshConfig.num_devices = {devices}", *overrides)
    return load([ROOT / "configs" / f"{name}.gin"], mesh)


def most_distinct_ids(parts: Parts, batch_size: int) -> list[GroupIds]:
    """Returns ids of a batch that are distinct as far as `max_rows` goes, all lists full."""
    batch = []
    for index, group in enumerate(parts.model.groups):
        tables = np.array(parts.model.layout.position_tables(index, group.maps.names))
        ids = np.zeros((batch_size, tables.size), np.int64)
        for table, config in enumerate(group.tables):
            where = tables == table
            ids[:, where] = (np.arange(batch_size * where.sum()) % config.max_rows).reshape(batch_size, -1)
        batch.append(GroupIds(ids, np.ones(ids.shape, np.bool_)))
    return batch


def first_inputs(parts: Parts, batch_size: int) -> Inputs:
    """Returns the inputs of a first step, on the devices."""
    plans = parts.mapper.plan(most_distinct_ids(parts, batch_size), np.zeros(batch_size, np.int64)).groups
    layout, tasks = parts.model.layout, np.zeros((batch_size, len(parts.model.heads)), np.float32)
    weighted = [any(slot.weighted for slot in slots) for slots in layout.groups]
    weights = tuple(
        np.zeros((batch_size, layout.num_positions(index)), np.float32) if there else None
        for index, there in enumerate(weighted)
    )
    inputs = Inputs(plans, weights, np.zeros((batch_size, layout.num_dense), np.float32), tasks, tasks)
    return jax.device_put(inputs, input_shardings(parts.model, inputs))


def on_device(tree: Any) -> int:
    """Returns the bytes that the first device holds of a tree."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == first
    )


@pytest.fixture(
    scope="module",
    params=["quickstart", pytest.param("kuairand", marks=pytest.mark.slow), pytest.param("movielens", marks=pytest.mark.slow)],
)
def run(request: pytest.FixtureRequest) -> tuple[Experiment, Parts, Footprint]:
    experiment = loaded(request.param, SIZES[request.param])
    return experiment, assemble(experiment), plan(experiment, hosts=1)


def test_device_holds_what_was_said(run: tuple[Experiment, Parts, Footprint]) -> None:
    experiment, parts, found = run
    state, device = parts.state, found.device
    assert device.tables == on_device(state.groups)
    assert device.weights == on_device(state.weights)
    assert device.optimizer == on_device((state.optimizer, state.step))
    assert sum(table.vectors + table.slots for table in found.tables) == pytest.approx(device.tables)
    inputs = first_inputs(parts, experiment.train.batch_size)
    assert found.all_distinct.inputs == pytest.approx(on_device(inputs), rel=0.1)
    assert found.all_distinct.index_arrays == pytest.approx(on_device(inputs.plans), rel=0.1)


def test_host_holds_what_was_said(run: tuple[Experiment, Parts, Footprint]) -> None:
    _, parts, found = run
    filters = maps = 0
    for group in parts.mapper.groups:
        state = group._state()
        of_filters = sum(array.nbytes for name, array in state.items() if name.startswith("filter"))
        maps += sum(array.nbytes for array in (*group.maps.arrays, *state.values(), group._pinned)) - of_filters
        filters += of_filters
    assert (found.host.maps, found.host.filters) == (maps, filters)
    memories = sum(array.nbytes for memory in parts.memories[0] for array in memory.get_state().values())
    assert found.host.memories == pytest.approx(memories, rel=0.001)
    assert sum(table.host for table in found.tables) == pytest.approx(maps + filters)


def test_exchange_is_what_a_plan_sends() -> None:
    experiment = loaded("movielens", 8, ["TrainConfig.batch_size = 8192"])
    parts, found = assemble(experiment), plan(experiment)
    plans = parts.mapper.plan(most_distinct_ids(parts, 8192), np.zeros(8192, np.int64)).groups
    needed = padded = 0.0
    for group, of_group in zip(parts.model.groups, plans, strict=True):
        others = ~np.eye(8, dtype=bool)
        needed += 2 * 4 * group.dim * (of_group.sent < of_group.touched.shape[1])[others].sum() / 8
        padded += 4 * group.dim * of_group.sent[others].size / 8
    assert found.all_distinct.needed == pytest.approx(needed, rel=0.02)
    assert found.all_distinct.to_batch == found.all_distinct.to_owners == pytest.approx(padded, rel=0.1)
    assert found.zipf.needed < found.all_distinct.needed
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.state.weights))
    assert found.all_distinct.dense == round(weights * 2 * 7 / 8)


def test_what_is_on_the_wire_is_counted() -> None:
    exchange = ("Experiment.wire = @WireConfig()", "WireConfig.dtype = 'bfloat16'")
    ragged = (*exchange, "WireConfig.kind = 'ragged'")
    padded, half, least = (plan(loaded("movielens", 8, overrides)) for overrides in ((), exchange, ragged))
    for one, other in ((padded.all_distinct, half.all_distinct), (padded.zipf, half.zipf)):
        assert (other.to_batch, other.to_owners) == (one.to_batch // 2, one.to_owners // 2)
        assert other.needed == one.needed / 2
    assert half.device.exchange == padded.device.exchange // 2
    # The sizes that tell of it, 4 bytes a device and group, are all that ragged adds.
    assert 0 < least.zipf.to_batch + least.zipf.to_owners - least.zipf.needed <= 2 * 4 * 8
    assert least.zipf.to_batch < half.zipf.to_batch
    with pytest.raises(ValueError, match=r"WireConfig\.kind is 'ragged'"):
        assemble(loaded("movielens", 8, ragged))


def test_snapshot_of_full_tables_takes_what_was_said(tmp_path: Path) -> None:
    experiment = loaded("quickstart", 8)
    parts, found = assemble(experiment), plan(experiment, hosts=1)
    rng = np.random.default_rng(0)

    def noise(array: Any) -> Any:
        return jax.device_put(rng.normal(size=array.shape).astype(array.dtype), array.sharding)

    for group, mapper in zip(parts.model.groups, parts.mapper.groups, strict=True):
        for index, table in enumerate(group.tables):
            ids = rng.integers(-(2**63), 2**63, table.max_rows)
            mapper.maps.lookup_or_insert(ids, index, rng.integers(1_700_000_000, 1_701_000_000, ids.size).astype(np.uint32))
    memories = [memory.get_state() for memory in parts.memories[0]]
    memories = [{name: np.frombuffer(rng.bytes(array.nbytes), array.dtype) for name, array in of.items()} for of in memories]
    snapshots = Snapshots(SnapshotConfig(), tmp_path)
    host = {"maps": parts.mapper.get_state(), "parts": stacked([pack(memories)])}
    snapshots.save(1, jax.tree.map(noise, parts.state), host, {"arrays": {}}, identity(experiment))
    snapshots.close()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert found.written == pytest.approx(size, rel=0.1)
    assert found.snapshot > size


def test_two_tiers_hold_what_was_said() -> None:
    overrides = ["TableConfig.memory = 'tiered'", "TableConfig.device_rows = 4_096"]
    experiment = loaded("quickstart", 8, overrides)
    parts, found, before = assemble(experiment), plan(experiment, hosts=1), plan(loaded("quickstart", 8), hosts=1)
    assert found.device.tables == on_device(parts.state.groups) < before.device.tables
    rows = slots = 0
    for host, mapper in zip(parts.tiers._hosts, parts.mapper.groups, strict=True):
        assert host is not None and mapper.tier is not None
        tier = mapper.tier
        rows += host._rows.nbytes
        slots += sum(array.nbytes for array in (tier._slot_of, tier._row_at, tier._marks, tier._hands, host._row_at))
    assert found.host.tables == rows + slots
    assert sum(table.host_rows for table in found.tables) == pytest.approx(rows + slots)
    assert sum(table.vectors + table.slots for table in found.tables) == pytest.approx(found.device.tables)
    assert {table.rows * 8 for table in found.tables if table.max_rows > 4_096} == {4_096}
    # A snapshot is the same, whatever is where, but needs a copy of the rows that are on the host.
    assert (found.snapshot, found.written) == (before.snapshot, before.written)
    assert found.host.state == before.host.state + 8 * (found.device.tables - before.device.tables) + rows
    inputs = first_inputs(parts, experiment.train.batch_size)
    assert found.all_distinct.index_arrays == pytest.approx(on_device(inputs.plans), rel=0.1)


def small_footprint(
    num_devices: int = 8, num_hosts: int = 1, max_rows: int = 10**9, num_shards: int = 64, device_rows: int = 0
) -> Footprint:
    mesh = make_abstract_mesh(MeshConfig(num_devices=num_devices, num_shards=num_shards))
    video = dataclasses.replace(TABLES[2], max_rows=max_rows, device_rows=device_rows)
    tables = (TABLES[0], TABLES[1], dataclasses.replace(video, memory="tiered" if device_rows else "device"))
    towers = DeepFMConfig(hidden=(8,))
    model, weights = trace_model(
        lambda: make_model(towers, tables, FEATURES, HEADS, SGD, 0, num_shards, mesh)  # pyright: ignore[reportArgumentType]
    )
    return measure(model, weights, 8192, num_hosts)


def test_what_does_not_fit_is_refused_with_a_size_that_does() -> None:
    found = small_footprint()
    refuse(found, found.device.total, found.host.total)
    with pytest.raises(ValueError, match=r"Of the tables 'video' takes the most") as caught:
        refuse(found, 1e9, None)
    devices, rows = re.findall(r"--devices=(\d+), or a TableConfig.max_rows of ([\d,]+)", str(caught.value))[0]
    assert int(devices) == 32
    for changed in (small_footprint(int(devices)), small_footprint(max_rows=int(rows.replace(",", "")))):
        refuse(changed, 1e9, None)
    with pytest.raises(ValueError, match="a device would need"):
        refuse(small_footprint(16), 1e9, None)


def test_the_way_out_of_too_small_a_device_is_the_host() -> None:
    with pytest.raises(ValueError, match=r"or TableConfig.memory 'tiered' for it"):
        refuse(small_footprint(), 1e9, None)
    found = small_footprint(device_rows=10**8)
    refuse(found, 1e9, None)
    with pytest.raises(ValueError, match=r"or a TableConfig.device_rows of ([\d,]+) for it") as caught:
        refuse(found, 0.15e9, None)
    assert "TableConfig.memory" not in str(caught.value)
    rows = int(re.findall(r"device_rows of ([\d,]+)", str(caught.value))[0].replace(",", ""))
    refuse(small_footprint(device_rows=rows), 0.15e9, None)
    # All rows are on the host, and once more while they are saved.
    assert found.host.total > small_footprint().host.total + 10**9 * 4 * 4
    assert found.snapshot == small_footprint().snapshot


def test_a_host_that_is_too_small_is_refused() -> None:
    found = small_footprint()
    with pytest.raises(ValueError, match=r"a host would need .* 'video' .*--hosts=4, or a TableConfig.max_rows") as caught:
        refuse(found, 80e9, found.host.total / 3)
    assert "fewer slots" not in str(caught.value)
    refuse(small_footprint(num_hosts=4), 80e9, found.host.total / 3)


def test_more_rows_than_int32_counts_are_refused_as_in_training() -> None:
    with pytest.raises(ValueError) as ours:
        small_footprint(1, max_rows=3 * 10**9)
    layout = MapLayout(("user", "video"), (500, 3 * 10**9), 64)
    with pytest.raises(ValueError) as theirs:
        GroupMapper(layout, [0, 1], 1)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("devices", "hosts", "told"),
    [(3, 1, "do not divide MeshConfig.num_shards"), (128, 1, "raise MeshConfig.num_shards"), (8, 3, "among 3 hosts")],
)
def test_sizes_that_do_not_divide_are_refused(devices: int, hosts: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small_footprint(devices, hosts)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TrainConfig.batch_size 4 is no multiple of the 8 devices"):
        plan(loaded("quickstart", 8, ["TrainConfig.batch_size = 4"]))


def test_a_million_million_parameters_on_4096_devices_take_no_memory() -> None:
    before, started = sum(array.nbytes for array in jax.live_arrays()), time.perf_counter()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = small_footprint(4096, 512, max_rows=25 * 10**10, num_shards=4096)
    assert found.parameters > 10**12
    assert sum(array.nbytes for array in jax.live_arrays()) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 300_000  # kB
    assert time.perf_counter() - started < 30  # 3 s on free cores
    # SGD keeps nothing beside the vector; the headroom of a shard is small when the shard is large.
    assert found.device.tables == pytest.approx(10**12 * 4 / 4096, rel=0.01)
    refuse(found, 80e9, None)
