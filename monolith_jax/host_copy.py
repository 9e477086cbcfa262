"""Copies of what CPU devices hold, in memory that is used again.

In: a tree of arrays, jax's on CPU devices or numpy's. Out: the same tree, its arrays in memory of their own, so that the next
step can go on in place while the copy is being written to disk. XLA shares the memory of a CPU device with whoever reads it; a
step that is given shared arrays copies them whole into new memory, and to touch new memory takes several times as long as to
copy into old.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64
"""Bytes at multiples of which memory has to start for XLA to use it as it is."""


def on_cpu(tree: Any) -> bool:
    """Returns whether all arrays of a tree lie on CPU devices of this process, or are numpy's."""
    return all(
        leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.sharding.device_set)
        for leaf in jax.tree.leaves(tree)
        if not isinstance(leaf, np.ndarray)
    )


class HostCopies:
    """Memory for one copy of a tree."""

    def __init__(self) -> None:
        """Takes no memory yet."""
        self._buffers: dict[tuple[Any, ...], np.ndarray] = {}
        self._preparing: threading.Thread | None = None

    def prepare(self, tree: Any) -> None:
        """Takes the memory for a copy of arrays of such shapes, in the background."""
        self._wait()
        places = [place for index, leaf in enumerate(jax.tree.leaves(tree)) for place, _ in _parts(index, leaf)]

        def take() -> None:
            for place in places:
                self._buffer(place).fill(0)  # The system gives memory only when it is written to.

        self._preparing = threading.Thread(target=take, name="host copy")
        self._preparing.start()

    def copy(self, tree: Any) -> Any:
        """Returns a copy of a tree of arrays on CPU devices. The copy before it must not be in use any more."""
        self._wait()
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten([self._copied(index, leaf) for index, leaf in enumerate(leaves)])

    def _copied(self, index: int, array: Any) -> Any:
        parts = []
        for place, part in _parts(index, array):
            buffer = self._buffer(place)
            if part is array:  # numpy's
                np.copyto(buffer, array)
                return buffer
            np.copyto(buffer, np.asarray(part.data))
            # XLA uses the memory as it is, or copies it, as it likes; either is right.
            parts.append(jax.device_put(buffer, part.device, may_alias=True))
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    def _buffer(self, place: tuple[Any, ...]) -> np.ndarray:
        if place not in self._buffers:
            _, _, shape, dtype = place
            size = math.prod(shape) * np.dtype(dtype).itemsize
            raw = np.empty(size + _ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % _ALIGNMENT
            self._buffers[place] = raw[start : start + size].view(dtype).reshape(shape)
        return self._buffers[place]

    def _wait(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None


def _parts(index: int, array: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Returns the parts of an array on its devices, or all of numpy's, each with what its memory is known by."""
    if isinstance(array, np.ndarray):
        return [((index, -1, array.shape, array.dtype), array)]
    return [((index, part.device.id, part.data.shape, array.dtype), part) for part in array.addressable_shards]
