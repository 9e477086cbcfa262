"""The mesh and every PartitionSpec. The only file that names a mesh axis.

Axes: `shard` splits the rows of the tables and the batch; `model` is for splitting towers (size 1 so far). Tables are split
over all devices, by their leading axis of logical shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

SHARD, MODEL = "shard", "model"

ROWS = PartitionSpec((SHARD, MODEL))
"""Group arrays [L, R, W] and the index arrays of a plan, [S, ...]."""
BATCH = PartitionSpec(SHARD)
"""Everything with the batch as leading axis."""
REPLICATED = PartitionSpec()
"""Dense weights, scalars."""


@dataclass(frozen=True)
class MeshConfig:
    """The devices of a run, and the logical shards of its tables."""

    num_devices: int = 0
    """Devices to use; 0: all there are. A power of two that divides the batch."""
    num_shards: int = 64
    """L, logical shards of every table for the model's whole life: a power of two, at least the largest mesh ever meant."""
    cpu_devices: int = 1
    """Virtual devices a CPU host is split into. One a core is fastest for large batches."""


def split_cpu(config: MeshConfig) -> None:
    """Splits a CPU host into virtual devices. Once jax has started its devices, those stay as they are."""
    try:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    except RuntimeError:
        return


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns the mesh of a run.

    Raises:
        ValueError: There are fewer devices, or they do not divide the shards.
    """
    there = len(jax.devices())
    num_devices = config.num_devices or there
    if num_devices > there:
        hint = "MeshConfig.cpu_devices splits a CPU host into several" if jax.default_backend() == "cpu" else "ask for fewer"
        raise ValueError(
            f"MeshConfig.num_devices is {num_devices}, but there are {there} {jax.default_backend()} devices; {hint}"
        )
    if config.num_shards % num_devices:
        raise ValueError(f"{num_devices} devices do not divide MeshConfig.num_shards = {config.num_shards}; use a power of two")
    return jax.make_mesh((num_devices, 1), (SHARD, MODEL), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:num_devices])


def make_abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Returns a mesh of `num_devices` devices that need not be there: programs can be traced on it, not run.

    Raises:
        ValueError: The devices do not divide the shards.
    """
    if config.num_devices < 1 or config.num_shards % config.num_devices:
        raise ValueError(
            f"{config.num_devices} devices do not divide MeshConfig.num_shards = {config.num_shards}; use a power of two, and "
            "raise MeshConfig.num_shards where there are more devices"
        )
    return AbstractMesh((config.num_devices, 1), (SHARD, MODEL), axis_types=(AxisType.Auto,) * 2)


def sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """Returns where an array of this spec lives."""
    return NamedSharding(mesh, spec)


def num_devices(mesh: Mesh) -> int:
    """Returns S."""
    return mesh.size
