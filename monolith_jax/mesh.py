"""The mesh and every PartitionSpec. The only file that names a mesh axis.

Axes: `shard` splits the batch in the towers, `model` splits the towers. Tables are split over all devices, by their leading
axis of logical shards, and so is the batch on its way to and from them. Dense weights carry logical axes; `weight_spec` says
which mesh axis each of them is split over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

SHARD, MODEL = "shard", "model"
PROCESS = "process"
"""Of the exchange between processes, which has devices of its own."""

ROWS = PartitionSpec((SHARD, MODEL))
"""Group arrays [L, R, W] and the index arrays of a plan, [S, ...]."""
BATCH_ALL = PartitionSpec((SHARD, MODEL))
"""The batch on its way from and to the tables: one slice a device."""
BATCH = PartitionSpec(SHARD)
"""The batch in the towers: devices that share a tower's weights see the same slice."""
REPLICATED = PartitionSpec()
"""Scalars, and dense weights that are not split."""
OF_PROCESSES = PartitionSpec(PROCESS)
"""What each process has of an array on the exchange's devices: host state by shard or by partition."""
LOGICAL_AXES = {"hidden": MODEL, "stack": MODEL}
"""Logical axis of a dense weight -> mesh axis: units of a hidden layer; experts, gates or task towers computed together."""


@dataclass(frozen=True)
class MeshConfig:
    """The devices of a run, and the logical shards of its tables."""

    num_devices: int = 0
    """Devices to use; 0: all there are. A power of two that divides the batch."""
    model_parallel: int = 1
    """Devices among which the towers are split; divides the number of devices. 1: every device holds whole towers."""
    num_shards: int = 64
    """L, logical shards of every table for the model's whole life: a power of two, at least the largest mesh ever meant."""
    cpu_devices: int = 1
    """Virtual devices a CPU host is split into. One a core is fastest for large batches."""


def split_cpu(config: MeshConfig) -> None:
    """Splits a CPU host into virtual devices, one more where there are several processes: the exchange's.

    Once jax has started its devices, those stay as they are.
    """
    try:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices + jax.distributed.is_initialized())
    except RuntimeError:
        return


def exchange_mesh() -> Mesh:
    """Returns a CPU device of each process, in the order of the processes: its last one, which no mesh of a run has."""
    last = {device.process_index: device for device in jax.devices("cpu")}
    devices = [last[process] for process in range(jax.process_count())]
    return Mesh(np.array(devices), (PROCESS,), axis_types=(AxisType.Auto,))


def _devices() -> list[Any]:
    """Returns the devices that runs can have, those of a process next to each other."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return devices
    taken = set(exchange_mesh().devices.flat)
    return [device for device in devices if device not in taken]


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns the mesh of a run: neighbouring devices, which several processes share evenly.

    Raises:
        ValueError: There are fewer devices, they do not divide the shards, `model_parallel` does not divide those of a process,
            or the processes have unequal numbers of them.
    """
    there, num_processes = _devices(), jax.process_count()
    num_devices = config.num_devices or len(there)
    if num_devices > len(there):
        hint = "MeshConfig.cpu_devices splits a CPU host into several" if jax.default_backend() == "cpu" else "ask for fewer"
        raise ValueError(
            f"MeshConfig.num_devices is {num_devices}, but there are {len(there)} {jax.default_backend()} devices; {hint}"
        )
    of_process = [sum(device.process_index == process for device in there) for process in range(num_processes)]
    if num_processes > 1 and (len(set(of_process)) > 1 or num_devices != len(there)):
        raise ValueError(
            f"{num_processes} processes have {', '.join(map(str, of_process))} devices, MeshConfig.num_devices is "
            f"{config.num_devices}: give each process as many, and use all of them (MeshConfig.num_devices = 0)"
        )
    if num_processes > 1 and (config.model_parallel < 1 or of_process[0] % config.model_parallel):
        raise ValueError(
            f"MeshConfig.model_parallel is {config.model_parallel}, which does not divide the {of_process[0]} devices of a "
            "process: devices that share a tower must belong to one process"
        )
    sizes = _axis_sizes(config, num_devices)
    # Not jax.make_mesh, which may change the order: those of a process stay together.
    return Mesh(np.array(there[:num_devices]).reshape(sizes), (SHARD, MODEL), axis_types=(AxisType.Auto,) * 2)


def make_abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Returns a mesh of `num_devices` devices that need not be there: programs can be traced on it, not run.

    Raises:
        ValueError: The devices do not divide the shards, or `model_parallel` does not divide them.
    """
    return AbstractMesh(_axis_sizes(config, config.num_devices), (SHARD, MODEL), axis_types=(AxisType.Auto,) * 2)


def _axis_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int]:
    if num_devices < 1 or config.num_shards % num_devices:
        raise ValueError(
            f"{num_devices} devices do not divide MeshConfig.num_shards = {config.num_shards}; use a power of two, and raise "
            "MeshConfig.num_shards where there are more devices"
        )
    if config.model_parallel < 1 or num_devices % config.model_parallel:
        raise ValueError(
            f"MeshConfig.model_parallel is {config.model_parallel}, which does not divide {num_devices} devices; "
            "use 1 or another power of two up to their number"
        )
    return num_devices // config.model_parallel, config.model_parallel


def sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """Returns where an array of this spec lives."""
    return NamedSharding(mesh, spec)


def weight_spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Returns how a dense weight is split: by the first of its logical axes whose size the mesh axis divides, else not at all.

    Args:
        mesh: The mesh.
        axes: Logical axis of each dimension, None for those that are never split; () for a weight that is never split.
        shape: Its shape.
    """
    assert not axes or len(axes) == len(shape), (axes, shape)
    for dimension, (name, size) in enumerate(zip(axes, shape, strict=False)):
        ways = mesh.shape[LOGICAL_AXES[name]] if name else 1
        if name and ways > 1 and size % ways == 0:
            return PartitionSpec(*[None] * dimension, LOGICAL_AXES[name])
    return REPLICATED


def is_shared(mesh: Mesh | AbstractMesh) -> bool:
    """Returns whether several processes have the devices of a mesh."""
    return isinstance(mesh, Mesh) and mesh.is_multi_process  # An abstract one has no devices.


def own_part(mesh: Mesh) -> Mesh:
    """Returns a mesh of this process's devices of a mesh, in their order: the mesh itself where there is one process."""
    if not is_shared(mesh):
        return mesh
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return Mesh(np.array(mine).reshape(-1, 1), (SHARD, MODEL), axis_types=(AxisType.Auto,) * 2)


def num_devices(mesh: Mesh) -> int:
    """Returns S."""
    return mesh.size
