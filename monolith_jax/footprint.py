"""What a run will hold and move, before it runs: on each device, on each host, on disk.

In: a model on a mesh whose devices need not be there, and the host's configs. Out: a `Footprint`, all in bytes, or a
`ValueError` that names the table for which it does not fit. Nothing is allocated: training's own functions are traced on shapes
(`jax.eval_shape`), so that their sizes are those of training. Exact: tables, dense weights, optimizer, id maps, filters,
histories, counters. By an assumption on distinct ids: index arrays and exchange. By XLA's analysis, for the backend of this
process: the towers. Transient arrays beside the towers are counted as if all of a program's were there at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from monolith_jax.ids.footprint import (
    DistinctIds,
    array_bytes,
    bytes_of_tables,
    most_distinct,
    plan_sizes,
    tier_bytes,
    work_bytes,
    zipf_distinct,
)
from monolith_jax.ids.group import Rule
from monolith_jax.ids.sizes import rows_per_device
from monolith_jax.negatives import sampler_bytes
from monolith_jax.planner import AHEAD
from monolith_jax.stream.counters import CountersConfig, counters_bytes
from monolith_jax.stream.history import HistoryConfig, history_bytes
from monolith_jax.tables.table import Group
from monolith_jax.tables.wire import vector_bytes
from monolith_jax.train.loop import IN_FLIGHT
from monolith_jax.train.shapes import bytes_by, exchanged, input_shapes, local_bytes, tower_bytes, whole_bytes
from monolith_jax.train.state import Model, TrainState, first_state, input_shardings, state_shardings
from monolith_jax.train.step import make_read, make_train_step

NOISE_LEFT, MAPS_LEFT = 0.92, 0.70
"""What Orbax's zstd leaves of float32 noise, and of full id maps with random ids (measured)."""


@dataclass(frozen=True)
class TableBytes:
    """A table's part of each device and host."""

    name: str
    max_rows: int
    device_rows: int
    """As configured; 0: all rows are on the devices."""
    rows: int
    """Rows a device that are reserved: its part of `max_rows`, and the headroom of `MapLayout.caps`; or of `device_rows`."""
    dim: int
    optimizer: str
    vectors: float
    """Bytes a device, of all rows that are reserved."""
    slots: float
    """Bytes a device of the optimizer's state beside them."""
    host: float
    """Bytes a host of id map and filter."""
    host_rows: float
    """Bytes a host of all rows, where it holds them, and of which are on the devices."""


@dataclass(frozen=True)
class DeviceBytes:
    """What a device holds in the costliest moment of a step."""

    tables: int
    weights: int
    """Dense weights."""
    optimizer: int
    """State of their optimizer, and the step."""
    inputs: int
    """Index arrays and values of all steps planned or running."""
    rows: int
    """Touched rows, before and after their update, and their vectors in the batch; in two tiers, rows that come and go."""
    exchange: int
    """What `all_to_all` takes and gives, whole blocks of either kind of exchange."""
    towers: int
    """Activations and gradients at the device's part of the batch."""

    @property
    def total(self) -> int:
        """Sum."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Traffic:
    """What one step moves, a device, under one assumption on the distinct ids of a batch."""

    to_batch: int
    """Bytes that leave a device with vectors, padding included (with `WireConfig.kind` ragged there is none)."""
    to_owners: int
    """Bytes that leave it with gradients, padding included."""
    needed: float
    """Both without padding: distinct ids of its slice whose owner is another device, times dim and the bytes of a number."""
    dense: int
    """Bytes that leave a device in the ring all-reduce of the gradients of the dense weights."""
    inputs: int
    """Bytes from the host to a device."""
    index_arrays: int
    """Those of them that are plans."""


@dataclass(frozen=True)
class HostBytes:
    """What a host holds."""

    maps: int
    filters: int
    tables: int
    """All rows of the groups that are in two tiers, and which of them are on the devices."""
    memories: int
    """Histories and counters of the host's partitions."""
    work: int
    """The mapper's scratch, and the inputs of the plan being made."""
    frozen: int
    """At a snapshot: the copy of maps, filters and memories as they were after its plan, and Orbax's copy of that; of memories
    one more, while they are packed."""
    state: int
    """At a snapshot: what the host's devices hold, and Orbax's copy of `tables`, on their way to disk."""

    @property
    def total(self) -> int:
        """Sum, at a snapshot."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Footprint:
    """What a run holds and moves, in bytes."""

    num_devices: int
    num_hosts: int
    num_shards: int
    parameters: int
    """Floats that can be learned: `max_rows` times dim, and the dense weights."""
    tables: tuple[TableBytes, ...]
    device: DeviceBytes
    """With all ids of a batch distinct."""
    all_distinct: Traffic
    """Upper bound: all ids of a batch are distinct as far as `max_rows` goes."""
    zipf: Traffic
    """Estimate: ids follow rank^-1.05 over `max_rows` ids."""
    host: HostBytes
    """With all ids of a batch distinct."""
    snapshot: int
    """One snapshot when the tables are full, before compression."""
    written: int
    """Estimate of its size on disk, at most: as if all floats were noise."""


def measure(
    model: Model,
    weights: Any,
    batch_size: int,
    num_hosts: int,
    history: HistoryConfig | None = None,
    counters: CountersConfig | None = None,
    partitions: int = 1,
) -> Footprint:
    """Returns the footprint of a run.

    Args:
        model: On a mesh of `make_abstract_mesh`, or a real one.
        weights: Its dense weights; shapes are enough.
        batch_size: B, over all devices.
        num_hosts: Hosts that share the devices and the shards of the id maps evenly.
        history: Kept for each partition.
        counters: Kept for each partition.
        partitions: Of the stream, divided among the hosts.

    Raises:
        ValueError: The devices do not divide batch or shards, the hosts do not divide the devices, or a device would have more
            rows of a group than int32 counts.
    """
    num_devices = model.mesh.size
    if num_hosts < 1 or num_devices % num_hosts:
        raise ValueError(f"{num_devices} devices cannot be divided among {num_hosts} hosts; use a power of two")
    for group in model.groups:
        rows_per_device(group.maps, num_devices, group.slots_per_shard)
    if batch_size % num_devices:
        raise ValueError(f"TrainConfig.batch_size {batch_size} is no multiple of the {num_devices} devices")
    if model.num_drawn % num_devices:
        raise ValueError(f"TwoTowerConfig.num_negatives {model.num_drawn} is no multiple of the {num_devices} devices")
    state = jax.eval_shape(lambda weights: first_state(model, weights), weights)
    of_state = bytes_by(state_shardings(model), state)
    most = _Step(model, state, batch_size, most_distinct)
    host = _host_bytes(model, most, num_hosts, history, counters, partitions)
    tiered = sum(_host_rows(group) for group in model.groups)
    host = dataclasses.replace(host, state=sum(jax.tree.leaves(of_state)) * (num_devices // num_hosts) + tiered // num_hosts)
    saved = state._replace(groups=[_all_rows(group) for group in model.groups])
    whole = sum(whole_bytes(leaf) for leaf in jax.tree.leaves(saved))
    maps = (host.maps + host.filters) * num_hosts
    memories = host.memories * min(num_hosts, partitions)
    floats = sum(table.max_rows * group.dim for group in model.groups for table in group.tables)
    return Footprint(
        num_devices=num_devices,
        num_hosts=num_hosts,
        num_shards=model.groups[0].maps.num_shards,
        parameters=floats + sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)),
        tables=tuple(_table_bytes(model, of_state, num_hosts)),
        device=_device_bytes(most, of_state),
        all_distinct=most.traffic(of_state),
        zipf=_Step(model, state, batch_size, zipf_distinct).traffic(of_state),
        host=host,
        snapshot=whole + maps + memories,
        written=round(NOISE_LEFT * whole + MAPS_LEFT * maps) + memories,
    )


def refuse(found: Footprint, device_memory: float, host_memory: float | None) -> None:
    """Refuses what does not fit.

    Args:
        found: What is needed.
        device_memory: Bytes of a device.
        host_memory: Bytes of a host; None: whatever is needed is there.

    Raises:
        ValueError: It does not fit. The message names the largest table and what to change.
    """
    device, host = found.device, found.host
    if device.total > device_memory:
        of_tables = {table.name: table.vectors + table.slots for table in found.tables}
        shared = device.weights + device.optimizer + device.inputs + device.exchange
        numbers = (found.num_devices, found.num_shards)
        raise ValueError(_refusal(found, "device", numbers, (device.total, shared, device_memory), of_tables))
    if host_memory is not None and host.total > host_memory:
        devices = found.num_devices // found.num_hosts
        # The map, its two copies at a snapshot, and the rows on their way to disk.
        of_tables = {
            table.name: 3 * table.host + 2 * table.host_rows + devices * (table.vectors + table.slots) for table in found.tables
        }
        numbers = (found.num_hosts, found.num_devices)
        raise ValueError(_refusal(found, "host", numbers, (host.total, 3 * host.memories, host_memory), of_tables))


def _refusal(
    found: Footprint, what: str, numbers: tuple[int, int], sizes: tuple[float, float, float], of_tables: dict[str, float]
) -> str:
    """Returns why it does not fit.

    Args:
        found: What is needed.
        what: "device" or "host".
        numbers: How many of them there are, and could be.
        sizes: Bytes that one needs, the part of it that more of them would not make less, and what one has.
        of_tables: Bytes of one for each table.
    """
    (number, most), (needed, shared, there) = numbers, sizes
    name = max(of_tables, key=lambda name: of_tables[name])
    table = next(table for table in found.tables if table.name == name)

    def fits(more: int) -> bool:
        return (needed - shared) * number / more + shared <= there

    more = number
    while not fits(more) and 2 * more <= most:
        more *= 2
    ways = [f"--{what}s={more}"] if fits(more) else []
    of_device = what == "device" and table.device_rows > 0
    rows = int((table.device_rows if of_device else table.max_rows) * (1 - (needed - there) / of_tables[name]) * 0.99)
    if rows > 0:
        ways += [f"a TableConfig.{'device_rows' if of_device else 'max_rows'} of {rows:,} for it"]
        if what == "device":
            ways += ["a smaller TableConfig.dim", "an OptimizerConfig with fewer slots"]
    if what == "device" and not of_device:
        ways += ["TableConfig.memory 'tiered' for it"]
    if not ways or of_tables[name] < needed / 2:
        ways += ["a smaller TrainConfig.batch_size", "smaller towers" if what == "device" else "smaller histories and counters"]
    return (
        f"a {what} would need {needed / 1e9:,.3f} GB and has {there / 1e9:,.3f} GB. Of the tables {name!r} takes the most, "
        f"{of_tables[name] / 1e9:,.3f} GB: max_rows {table.max_rows:,}, dim {table.dim}, optimizer {table.optimizer}, "
        f"on {number} {what}{'s' * (number > 1)}. Use {', or '.join(ways)}"
    )


class _Step:
    """One step's shapes under an assumption."""

    def __init__(self, model: Model, state: TrainState, batch_size: int, distinct: DistinctIds) -> None:
        num_devices, groups = model.mesh.size, model.groups
        tables = [model.layout.position_tables(index, group.maps.names) for index, group in enumerate(groups)]
        self.model, self.state, self.num_rows = model, state, batch_size + model.num_drawn
        self.sizes = [
            plan_sizes(group.maps, of_group, self.num_rows, num_devices, distinct)
            for group, of_group in zip(groups, tables, strict=True)
        ]
        self.inputs = input_shapes(model, batch_size, self.sizes)

    def traffic(self, of_state: TrainState) -> Traffic:
        """Returns what it moves, from the `all_to_all`s in its program."""
        model, plans = self.model, self.inputs.plans
        leaving = (model.mesh.size - 1) / model.mesh.size
        to_batch = sum(exchanged(jax.make_jaxpr(make_read(model))(self.state.groups, plans)))
        both = sum(exchanged(jax.make_jaxpr(make_train_step(model))(self.state, self.inputs)))
        parts = zip(self.sizes, model.groups, strict=True)
        of_vectors = [(sizes.in_slice, *vector_bytes(group.dim, model.wire)) for sizes, group in parts]
        needed = sum(2 * number * least for number, _, least in of_vectors)
        if model.wire.kind == "ragged":
            # Only what is in the blocks leaves, and before it how much that is.
            of_sizes = 4 * model.mesh.size
            to_batch = sum(number * size + of_sizes for number, size, _ in of_vectors)
            both = 2 * to_batch
        of_inputs = bytes_by(input_shardings(model, self.inputs), self.inputs)
        return Traffic(
            to_batch=round(to_batch * leaving),
            to_owners=round((both - to_batch) * leaving),
            needed=needed * leaving,
            dense=round(2 * leaving * sum(jax.tree.leaves(of_state.weights))),
            inputs=sum(jax.tree.leaves(of_inputs)),
            index_arrays=sum(jax.tree.leaves(of_inputs.plans)),
        )


def _device_bytes(step: _Step, of_state: TrainState) -> DeviceBytes:
    model, plans = step.model, step.inputs.plans
    read = make_read(model)
    rows, vectors, valid = jax.eval_shape(read, step.state.groups, plans)
    gathered = [sum(local_bytes(leaf) for leaf in jax.tree.leaves(part)) for part in (rows, vectors, valid)]
    of_inputs = bytes_by(input_shardings(model, step.inputs), step.inputs)
    moved = [local_bytes(of_group) for of_group, group in zip(rows, model.groups, strict=True) if group.tiered]
    taken = sum(exchanged(jax.make_jaxpr(read)(step.state.groups, plans)))
    return DeviceBytes(
        tables=sum(jax.tree.leaves(of_state.groups)),
        weights=sum(jax.tree.leaves(of_state.weights)),
        optimizer=sum(jax.tree.leaves((of_state.optimizer, of_state.step))),
        inputs=(AHEAD + IN_FLIGHT) * sum(jax.tree.leaves(of_inputs)),
        rows=2 * gathered[0] + gathered[1] + gathered[2] + 2 * sum(moved),
        exchange=2 * taken,
        towers=tower_bytes(model, step.state, step.inputs),
    )


def _rules(group: Group) -> list[Rule]:
    return [Rule(table.admission, table.ttl_s) for table in group.tables]


def _all_rows(group: Group) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(group.shape, group.rows.array_dtype)


def _host_rows(group: Group) -> int:
    """Returns the bytes of all rows, over all hosts, where hosts hold them."""
    return whole_bytes(_all_rows(group)) if group.tiered else 0


def _slot_bytes(group: Group) -> int:
    """Returns the bytes of what says which rows are on the devices, over all hosts."""
    return tier_bytes(group.maps.num_shards, group.maps.rows_per_shard, group.slots_per_shard) if group.tiered else 0


def _table_bytes(model: Model, of_state: TrainState, num_hosts: int) -> Iterator[TableBytes]:
    for group, arrays in zip(model.groups, of_state.groups, strict=True):
        shards = group.maps.num_shards // model.mesh.size
        of_device = np.array(group.slots) * (sum(jax.tree.leaves(arrays)) / sum(group.slots))
        slots = sum(math.prod(shape) for shape in group.rows.shapes) / group.rows.width
        share = group.maps.caps / group.maps.caps.sum()
        of_rows = share * (_host_rows(group) + _slot_bytes(group)) / num_hosts
        of_maps = bytes_of_tables(group.maps, _rules(group)) / num_hosts
        parts = (group.tables, group.slots, of_device.tolist(), of_maps.tolist(), of_rows.tolist())
        for table, rows, size, host, host_rows in zip(*parts, strict=True):
            sizes = (size * (1 - slots), size * slots, host, host_rows)
            numbers = (table.max_rows, table.device_rows, rows * shards)
            yield TableBytes(table.name, *numbers, table.dim, table.optimizer.name, *sizes)


def _host_bytes(
    model: Model,
    step: _Step,
    num_hosts: int,
    history: HistoryConfig | None,
    counters: CountersConfig | None,
    partitions: int,
) -> HostBytes:
    maps = filters = work = tables = 0
    for index, group in enumerate(model.groups):
        arrays = array_bytes(group.maps, _rules(group))
        of_filters = sum(size for name, size in arrays.items() if name.startswith("filter"))
        maps, filters = maps + sum(arrays.values()) - of_filters, filters + of_filters
        tables += _host_rows(group) + _slot_bytes(group)
        work += work_bytes(group.maps, _rules(group), step.num_rows * model.layout.num_positions(index))
    inputs = sum(whole_bytes(leaf) for leaf in jax.tree.leaves(step.inputs))
    memories = (history_bytes(history) if history else 0) + (counters_bytes(counters) if counters else 0)
    two_tower = model.towers.two_tower
    memories += sampler_bytes(two_tower, model.layout) if two_tower else 0
    memories *= -(-partitions // num_hosts)
    maps, filters = -(-maps // num_hosts), -(-filters // num_hosts)
    of_plans = (work + inputs) // num_hosts
    return HostBytes(maps, filters, tables // num_hosts, memories, of_plans, 2 * (maps + filters) + 3 * memories, 0)
