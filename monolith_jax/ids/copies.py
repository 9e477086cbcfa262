"""Copies of large arrays that many parts may hold, in memory that is used again once nobody does.

In: an array that goes on changing. Out: a copy of it. Of memory that the system has not given to the process yet, a third of a
gigabyte can take 0.7 s to fill where a used one takes 0.03 s (2 cores of a virtual machine).
"""

from __future__ import annotations

import weakref

import numpy as np


class _Lent:
    """Stands behind a copy and all views of it: it is gone when they are."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__


class Copies:
    """Makes copies of one array after another."""

    def __init__(self) -> None:
        """Takes no memory yet."""
        self._free: dict[tuple[str, tuple[int, ...], str], list[np.ndarray]] = {}

    def copy(self, name: str, array: np.ndarray) -> np.ndarray:
        """Returns a copy; where an earlier one of that name and form is not used any more, in its memory."""
        free = self._free.setdefault((name, array.shape, array.dtype.str), [])
        memory = free.pop() if free else np.empty(array.shape, array.dtype)
        np.copyto(memory, array)
        lent = _Lent(memory)
        weakref.finalize(lent, free.append, memory).atexit = False
        return np.asarray(lent)
