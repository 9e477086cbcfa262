"""Tables, and the groups in which the device keeps them.

In: `TableConfig`s. Out: groups (tables of equal dim, dtype and optimizer share one array `[L, R, W]`, W = weights and optimizer
slots side by side: one gather and one scatter a step), their arrays, and first values of rows that depend on (seed, table, id)
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.cuckoo import MapLayout, text_seed
from monolith_jax.ids.tier import Tier
from monolith_jax.mesh import ROWS, sharding
from monolith_jax.tables.half_words import mixed
from monolith_jax.tables.update import OptimizerConfig, RowDtype, RowLayout, row_layout


@dataclass(frozen=True)
class TableConfig:
    """A name space of ids with vectors of one length."""

    name: str
    """Name, unique; features refer to it."""
    max_rows: int
    """Distinct ids the table can hold. Memory is taken for all of them at the start. A full table refuses new ids and counts
    them, or with `ttl_s` frees the least recently seen. A larger number takes effect at the next start."""
    dim: int = 16
    """D, floats of a vector."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How rows learn; its state lies beside the vector."""
    init_scale: float = 0.05
    """New vectors are uniform in [-init_scale, init_scale)."""
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    """Which new ids get a row."""
    ttl_s: int = 0
    """Seconds of event time after which an id that was not seen loses its row; near `max_rows` the least recently seen lose
    theirs earlier. 0: ids stay for ever."""
    dtype: RowDtype = "float32"
    """Type of the vector: bfloat16 takes half the memory, and each update is rounded up or down at random so that the expected
    value is kept. The optimizer's state stays float32."""
    memory: Literal["device", "tiered"] = "device"
    """Where rows are: all on the device; or in two tiers, the hot ones there and all in the host's memory. What is learned is
    the same, bit for bit; a run may go on with the other."""
    device_rows: int = 0
    """Rows of a tiered table that the devices together have room for: at least the distinct ids of a batch, better several
    times as many. Tables of equal dim, dtype and optimizer share their room. May change at any start."""


@dataclass(frozen=True)
class Group:
    """Tables that share one device array."""

    tables: tuple[TableConfig, ...]
    maps: MapLayout
    rows: RowLayout

    @property
    def dim(self) -> int:
        """D of all tables of the group."""
        return self.tables[0].dim

    @property
    def shape(self) -> tuple[int, int, int]:
        """[L, R, W], all rows."""
        return self.maps.num_shards, self.maps.rows_per_shard, self.rows.width

    @property
    def tiered(self) -> bool:
        """Whether the device holds only a part of the rows: any table of the group is tiered."""
        return any(table.memory == "tiered" for table in self.tables)

    @property
    def slots(self) -> list[int]:
        """Rows of each table in one shard that the device has room for; where it holds all of the group, the tables' caps."""
        shares = [-(-table.device_rows // self.maps.num_shards) for table in self.tables]
        # A table of memory "device" has a slot for every row, in whatever group it is.
        parts = zip(self.tables, shares, self.maps.caps.tolist(), strict=True)
        return [min(share, cap) if table.memory == "tiered" else cap for table, share, cap in parts]

    @property
    def slots_per_shard(self) -> int:
        """C: rows of a shard that the device has room for; R where it holds all."""
        return sum(self.slots) if self.tiered else self.maps.rows_per_shard

    @property
    def device_shape(self) -> tuple[int, int, int]:
        """[L, C, W], what the devices hold."""
        return self.maps.num_shards, self.slots_per_shard, self.rows.width


def make_groups(tables: Sequence[TableConfig], num_shards: int) -> tuple[Group, ...]:
    """Puts tables of equal dim, dtype and optimizer into groups, in order of first appearance.

    Groups do not depend on where rows are kept, so that a snapshot does not either.

    Raises:
        ValueError: A name is used twice, a dim is below 1, a dtype or memory is unknown, or the optimizer cannot work per row.
    """
    names = [table.name for table in tables]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tables need unique names; used more than once: {', '.join(twice)}")
    members: dict[tuple[int, RowDtype, OptimizerConfig], list[TableConfig]] = {}
    for table in tables:
        if table.dim < 1:
            raise ValueError(f"TableConfig.dim of table {table.name!r} must be at least 1, got {table.dim}")
        if not 0 <= table.ttl_s < 2**32:
            raise ValueError(f"TableConfig.ttl_s of table {table.name!r} must be 0 (for ever) to 2^32 - 1, got {table.ttl_s}")
        if table.dtype not in get_args(RowDtype):
            raise ValueError(f"TableConfig.dtype of table {table.name!r} must be float32 or bfloat16, got {table.dtype!r}")
        _check_memory(table)
        members.setdefault((table.dim, table.dtype, table.optimizer), []).append(table)
    groups = []
    for (dim, dtype, optimizer), of_group in members.items():
        layout = MapLayout(tuple(table.name for table in of_group), tuple(table.max_rows for table in of_group), num_shards)
        groups.append(Group(tuple(of_group), layout, row_layout(optimizer, dim, dtype)))
    return tuple(groups)


def _check_memory(table: TableConfig) -> None:
    if table.memory not in ("device", "tiered"):
        raise ValueError(f"TableConfig.memory of table {table.name!r} must be device or tiered, got {table.memory!r}")
    if table.memory == "tiered" and table.device_rows < 1:
        raise ValueError(
            f"TableConfig.device_rows of table {table.name!r} must be at least 1 where memory is 'tiered', got "
            f"{table.device_rows}; they must hold the distinct ids of a batch, hit_rate in metrics.jsonl tells how well they do"
        )
    if table.memory == "device" and table.device_rows:
        raise ValueError(
            f"TableConfig.device_rows of table {table.name!r} is {table.device_rows}, but with memory 'device' all rows are on "
            "the device; set memory to 'tiered', or device_rows to 0"
        )


def make_tier(group: Group, num_processes: int = 1) -> Tier | None:
    """Returns the empty slots of a group for its mapper, None where slots are rows.

    Args:
        group: The group.
        num_processes: Processes that share the shards evenly.
    """
    if not group.tiered:
        return None
    stays = [table.memory == "device" for table in group.tables]
    sizes = (group.maps.rows_per_shard, group.slots_per_shard, group.maps.num_shards // num_processes)
    return Tier(group.maps.names, group.maps.row_offsets, stays, *sizes)


def empty_array(group: Group, mesh: Mesh) -> jax.Array:
    """Returns the group's array on the mesh, all zeros: rows get their first value when an id takes them."""
    make = jax.jit(lambda: jnp.zeros(group.device_shape, group.rows.array_dtype), out_shardings=sharding(mesh, ROWS))
    return make()


def table_seeds(group: Group, seed: int) -> np.ndarray:
    """Returns uint32 [T, 2], from which and an id the first value of a row is made."""
    seeds = [text_seed(table.name, seed + 1) for table in group.tables]
    return np.array(seeds, np.uint64).view(np.uint32).reshape(-1, 2)


def rounding_seed(group: Group) -> int:
    """Returns 32 bits from which the random bits of a group's rounding are made: by its first table, not by the run."""
    return text_seed(group.tables[0].name, 0) & 0xFFFFFFFF


def first_vectors(group: Group, seed: int, ids: jax.Array, tables: jax.Array) -> jax.Array:
    """Returns the first vectors of rows, float32 [V, D], uniform in [-init_scale, init_scale).

    A hash of (seed, table, id, position), so the same on every backend and whatever the order in which ids came.

    Args:
        group: The group of the rows.
        seed: Seed of the run.
        ids: uint32 [V, 2], low and high halves.
        tables: int32 [V], index of each id's table in the group.
    """
    seeds = jnp.asarray(table_seeds(group, seed))[tables]
    # Two words of state: with one, of a million ids a hundred pairs would start with equal vectors.
    one = mixed(mixed(ids[:, 0] ^ seeds[:, 0]) ^ ids[:, 1])
    two = mixed(mixed(ids[:, 1] ^ seeds[:, 1]) ^ ids[:, 0])
    positions = jnp.arange(group.dim, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = mixed(mixed(one[:, None] + positions[None, :]) ^ two[:, None])
    unit = (bits >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-24)
    scales = jnp.asarray([table.init_scale for table in group.tables], jnp.float32)[tables]
    return (unit * 2 - 1) * scales[:, None]
