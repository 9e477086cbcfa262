"""The rows of a group in two tiers: all of them in the host's memory, the hot ones on the device too.

In: the device array [L, C, W] after step t - 1 and what plan t moves. Out: that array with the rows of step t in their slots.
Whole rows move, with their optimizer state, so that the host's array and the slots together are bit for bit what one array
[L, R, W] on the device would be. The order of things, all of it in the loop's thread between two steps:

    gather the slots that change hands, start their way to the host    their values are those after step t - 1
    write to the host what earlier steps sent there                    so that a row that left at t - 1 can come back at t
    read from the host the rows that come, send them, put them in place

A row moves in one direction a plan: the rows that a plan touches keep their slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from monolith_jax.mesh import ROWS, own_part, sharding
from monolith_jax.tables.table import Group
from monolith_jax.types import Moves

PINNED = "pinned_host"
_SIZES = tuple(2**k for k in range(6, 31))


class _Leaving(NamedTuple):
    """Rows on their way to the host."""

    values: jax.Array
    """[S, E, W]"""
    devices: np.ndarray
    """int64 [N], of each row which of this process's devices it comes from, as the three that follow."""
    places: np.ndarray
    """int64 [N], its place in that device's list."""
    shards: np.ndarray
    rows: np.ndarray


class HostRows:
    """The host's part of a group in two tiers, for the shards of this process's devices. Not thread safe."""

    def __init__(self, group: Group, mesh: Mesh, pinned: bool | None = None) -> None:
        """Takes memory for all rows; it is used as rows are written.

        Args:
            group: The group.
            mesh: The mesh of its device array.
            pinned: Whether rows pass through page-locked memory of the host, which a device reads and writes by itself; None:
                if the devices are not this host's processors and have such memory.

        Raises:
            ValueError: The devices have no such memory.
        """
        self._group, self._mesh, here = group, mesh, own_part(mesh)
        num_shards, rows_per_shard, width = group.shape
        devices, mine = list(mesh.devices.flat), list(here.devices.flat)
        self._num_devices, self._shards_per_device = len(mine), num_shards // len(devices)
        kinds = {memory.kind for memory in mine[0].addressable_memories()}
        if pinned and PINNED not in kinds:
            raise ValueError(f"the devices have no memory {PINNED!r}, only {', '.join(sorted(kinds))}")
        if pinned is None:
            pinned = PINNED in kinds and mine[0].platform != "cpu"
        # Rows move between a process and its own devices only, in programs that no other process need run.
        self._on_device = sharding(here, ROWS)
        self._staging = NamedSharding(here, ROWS, memory_kind=PINNED) if pinned else None
        number = self._num_devices * self._shards_per_device
        self._rows = np.zeros((number, rows_per_shard, width), group.rows.array_dtype)
        self._row_at = np.full((number, group.slots_per_shard), -1, np.int32)
        self._leaving: list[_Leaving] = []
        self._take, self._put = _make_take(here), _make_put(here)

    def move(self, array: jax.Array, moves: Moves) -> jax.Array:
        """Returns the device array [L, C, W] with a plan's rows in their slots; the one passed in is used up.

        Args:
            array: As the step before this plan left it.
            moves: Of the plan. Plans come in order, none is left out.
        """
        here = _parts(array, self._on_device)
        leaving = self._gather(here, moves)
        self._settle()
        here = self._load(here, moves)
        self._row_at[moves.shards, moves.slots] = moves.rows
        if leaving is not None:
            self._leaving.append(leaving)
        return _parts(here, sharding(self._mesh, ROWS), array.shape)

    def whole(self, array: jax.Array) -> np.ndarray:
        """Returns all rows of this process's shards, [L, R, W] or its part, as they are after the steps so far.

        The array is this object's own: the next move changes it. The rows on the device stay there.

        Args:
            array: The device array after the last step.
        """
        self._settle()
        slots = jax.device_get(_parts(array, self._on_device))
        shards, places = np.nonzero(self._row_at >= 0)
        self._rows[shards, self._row_at[shards, places]] = slots[shards, places]
        return self._rows

    def fill(self, rows: np.ndarray) -> None:
        """Takes over all rows of this process's shards, as `whole` returns them; none is on the device any more."""
        assert rows.shape == self._rows.shape, f"rows of shape {rows.shape}, expected {self._rows.shape}"
        self._rows[:] = rows
        self._row_at[:] = -1
        self._leaving.clear()

    def _gather(self, array: jax.Array, moves: Moves) -> _Leaving | None:
        """Starts the way to the host of the rows that lose their slots."""
        goes = moves.evicted >= 0
        if not goes.any():
            return None
        devices, slots, places = self._listed(moves, goes)
        values = self._take(array, self._send(slots))
        if self._staging is not None:
            values = jax.device_put(values, self._staging)
        values.copy_to_host_async()
        return _Leaving(values, devices, places, moves.shards[goes], moves.evicted[goes])

    def _settle(self) -> None:
        """Writes to the host's array what earlier plans sent there."""
        for leaving in self._leaving:
            values = jax.device_get(leaving.values)
            self._rows[leaving.shards, leaving.rows] = values[leaving.devices, leaving.places]
        self._leaving.clear()

    def _load(self, array: jax.Array, moves: Moves) -> jax.Array:
        """Puts the rows that come from the host into their slots."""
        if not moves.loaded.any():
            return array
        devices, slots, places = self._listed(moves, moves.loaded)
        # Fresh memory each time: a device may read it long after this returns, or for ever.
        values = np.empty((*slots.shape, self._rows.shape[2]), self._rows.dtype)
        values[devices, places] = self._rows[moves.shards[moves.loaded], moves.rows[moves.loaded]]
        return self._put(array, self._send(slots), self._send(values, staged=True))

    def _listed(self, moves: Moves, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns for some of the moves their devices and places in the padded list of slots [S, E], and that list."""
        shards = moves.shards[which].astype(np.int64)
        devices = shards // self._shards_per_device
        numbers = np.bincount(devices, minlength=self._num_devices)
        # By shard, hence by device.
        places = np.arange(devices.size) - (numbers.cumsum() - numbers)[devices]
        size = next(size for size in _SIZES if size >= numbers.max())
        there = self._shards_per_device * self._group.slots_per_shard
        slots = np.tile(np.arange(there, there + size, dtype=np.int32), (self._num_devices, 1))
        of_shard = (shards - devices * self._shards_per_device) * self._group.slots_per_shard
        slots[devices, places] = of_shard + moves.slots[which]
        return devices, slots, places

    def _send(self, values: np.ndarray, staged: bool = False) -> jax.Array:
        """Returns lists of this process's devices [S, ...] on the devices."""
        if not staged or self._staging is None:
            return jax.device_put(values, self._on_device)
        return jax.device_put(jax.device_put(values, self._staging), self._on_device)


def _parts(array: jax.Array, where: NamedSharding, shape: tuple[int, ...] = ()) -> jax.Array:
    """Returns the parts of an array on this process's devices as another: of its own devices, or, of `shape`, of all."""
    if array.sharding == where:
        return array
    parts = sorted(array.addressable_shards, key=lambda part: part.index[0].start or 0)
    shape = shape or (sum(part.data.shape[0] for part in parts), *array.shape[1:])
    return jax.make_array_from_single_device_arrays(shape, where, [part.data for part in parts])


@cache
def _make_take(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns what gathers slots [S, E] of the parts of an array [L, C, W]; any row where a slot lies beyond the end."""

    def local(array: jax.Array, slots: jax.Array) -> jax.Array:
        return array.reshape(-1, array.shape[-1]).at[slots[0]].get(mode="clip", unique_indices=True)[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=ROWS, check_vma=False)
    return jax.jit(mapped, out_shardings=sharding(mesh, ROWS))


@cache
def _make_put(mesh: Mesh) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns what writes rows [S, E, W] into slots [S, E] of an array [L, C, W], but those beyond the end. Donated."""

    def local(array: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
        flat = array.reshape(-1, array.shape[-1])
        return flat.at[slots[0]].set(rows[0], mode="drop", unique_indices=True).reshape(array.shape)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS,) * 3, out_specs=ROWS, check_vma=False)
    return jax.jit(mapped, donate_argnums=0, out_shardings=sharding(mesh, ROWS))
