"""Vectors of some rows from the devices, without stopping them.

In: a group's array as a step left it, and places of rows. Out: their vectors, float32, once the devices have come that far. The
read is put into the devices' queue behind the step, so the next step may use the array up as soon as the call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from monolith_jax.mesh import REPLICATED, ROWS, own_part, sharding
from monolith_jax.tables.table import Group
from monolith_jax.tables.update import RowLayout, vectors_of

SMALLEST, LARGEST = 256, 2**15
"""Rows of a device that one program reads: powers of two between these, so few programs are compiled."""


@dataclass(frozen=True)
class Gathered:
    """Vectors on their way from the devices."""

    parts: Sequence[tuple[jax.Array, np.ndarray]]
    """Blocks [S, E, D], and how many of each device's E are meant, int64 [S]."""
    starts: np.ndarray
    """int64 [S], where the rows of each device start in the result."""
    shape: tuple[int, int]

    def fetch(self) -> np.ndarray:
        """Returns the vectors, float32 [N, D], in the order of the rows. Waits for the devices."""
        result, at = np.empty(self.shape, np.float32), self.starts.copy()
        for block, numbers in self.parts:
            values = jax.device_get(block)
            for device, number in enumerate(numbers.tolist()):
                result[at[device] : at[device] + number] = values[device, :number]
            at += numbers
        return result


class VectorReader:
    """Reads vectors of one group from this process's devices; no other process need do the same."""

    def __init__(self, group: Group, mesh: Mesh) -> None:
        """Prepares for arrays of the group on the mesh."""
        here = own_part(mesh)
        self._num_devices, self._dim = here.size, group.dim
        self._rows_per_device = group.maps.num_shards // mesh.size * group.maps.rows_per_shard
        self._where = sharding(here, ROWS)
        self._read = _make_read(here, group.rows)

    def read(self, array: jax.Array, rows: np.ndarray) -> Gathered:
        """Starts to read.

        Args:
            array: [L, R, W], as the last step left it.
            rows: int64 [N], ascending places in this process's part of the group.
        """
        array = self._own(array)
        edges = np.arange(self._num_devices + 1) * self._rows_per_device
        ends = np.searchsorted(rows, edges)
        starts, counts = ends[:-1], np.diff(ends)
        parts, done = [], np.zeros_like(counts)
        while (counts > done).any():
            left = counts - done
            numbers = np.minimum(left, LARGEST)
            size = max(SMALLEST, 1 << (int(numbers.max()) - 1).bit_length())
            places = np.tile(np.arange(size, dtype=np.int32), (self._num_devices, 1))
            for device, (start, number) in enumerate(zip((starts + done).tolist(), numbers.tolist(), strict=True)):
                places[device, :number] = rows[start : start + number] - edges[device]
            block = self._read(array, jax.device_put(places, self._where))
            block.copy_to_host_async()
            parts.append((block, numbers))
            done += numbers
        return Gathered(parts, starts, (rows.size, self._dim))

    def compile(self, array: jax.Array) -> None:
        """Compiles the programs ahead of their use: a step would have to wait for it."""
        array, size = self._own(array), SMALLEST
        while size <= LARGEST:
            self._read(array, jax.device_put(np.zeros((self._num_devices, size), np.int32), self._where))
            size *= 2

    def _own(self, array: jax.Array) -> jax.Array:
        if array.sharding == self._where:
            return array
        parts = sorted(array.addressable_shards, key=lambda part: part.index[0].start or 0)
        shape = (sum(part.data.shape[0] for part in parts), *array.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._where, [part.data for part in parts])


@cache
def _make_read(mesh: Mesh, layout: RowLayout) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns what reads the vectors [S, E, D] at places [S, E] of the parts of an array [L, R, W]."""

    def local(array: jax.Array, places: jax.Array) -> jax.Array:
        rows = array.reshape(-1, array.shape[-1]).at[places[0]].get(mode="clip")
        return vectors_of(layout, rows).astype(jnp.float32)[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=ROWS, check_vma=False)
    return jax.jit(mapped, out_shardings=sharding(mesh, ROWS))


def make_copy(mesh: Mesh) -> Callable[[object], object]:
    """Returns what copies a tree of dense weights, so that the next step may use up what it copied.

    All processes call it together. Every device gets all of each weight.
    """
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=sharding(mesh, REPLICATED))


def fetch_dense(tree: object) -> dict[str, np.ndarray]:
    """Returns copied dense weights by their path, `experts/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(_name, path)): np.asarray(leaf.addressable_data(0)) for path, leaf in leaves}


def _name(key: object) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise AssertionError(f"a dense weight lies at {key!r}")
