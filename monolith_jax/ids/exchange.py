"""What the planners of several processes tell one another, over CPU devices of its own (`types.Exchange`).

In: this process's words of uint32. Out: the others'. Each call is one collective; all processes make the same calls in the same
order, from one thread each: two threads that dispatch to the same CPU devices can get each other's data. jax's arrays hold 32
bits here, so 64-bit ids travel as two words. Host state that a snapshot splits by process lies on the same devices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from monolith_jax.mesh import OF_PROCESSES, PROCESS, REPLICATED, exchange_mesh, sharding


class Exchange:
    """The collectives of one process's planner."""

    def __init__(self) -> None:
        """Takes the exchange's device of every process; jax must know of all of them."""
        self.mesh = exchange_mesh()
        self.process_id, self.num_processes = jax.process_index(), jax.process_count()
        self._gather, self._swap = _compiled(self.mesh)

    def gather(self, words: np.ndarray) -> np.ndarray:
        """Returns everyone's words, uint32 [P, n], from this process's [n]; n is the same everywhere."""
        return _local(self._gather(self.spread(words[None])))

    def swap(self, blocks: np.ndarray) -> np.ndarray:
        """Returns what each has for this process, uint32 [P, n], from what this one has for each; n is the same everywhere."""
        return _local(self._swap(self.spread(blocks[None])))[0]

    def spread(self, mine: np.ndarray) -> jax.Array:
        """Returns an array of all processes, each of which gives the same number of neighbouring rows. No one waits."""
        shape = (mine.shape[0] * self.num_processes, *mine.shape[1:])
        # A copy of its own: jax may take an aligned array as it is.
        part = jax.device_put(mine.copy(), self.mesh.devices.flat[self.process_id])
        return jax.make_array_from_single_device_arrays(shape, sharding(self.mesh, OF_PROCESSES), [part])

    def mine(self, array: jax.Array) -> np.ndarray:
        """Returns this process's rows of such an array."""
        return _local(array)


def _compiled(mesh: Mesh) -> tuple[Any, Any]:
    whole = partial(jax.shard_map, mesh=mesh, in_specs=OF_PROCESSES, check_vma=False)
    gather = whole(lambda words: jax.lax.all_gather(words[0], PROCESS), out_specs=REPLICATED)
    swap = whole(lambda blocks: jax.lax.all_to_all(blocks[0], PROCESS, 0, 0)[None], out_specs=OF_PROCESSES)
    return jax.jit(gather), jax.jit(swap)


def _local(array: jax.Array) -> np.ndarray:
    """Returns this process's part of an array, once it is there."""
    return np.array(array.addressable_shards[0].data)
