"""Several "processes" as threads: an exchange that needs no jax."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


class ThreadsExchange:
    """One thread's end of it."""

    def __init__(self, process_id: int, num_processes: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.process_id, self.num_processes = process_id, num_processes
        self._board, self._barrier = board, barrier

    def _all(self, mine: np.ndarray) -> list[np.ndarray]:
        assert mine.dtype == np.uint32
        self._board[self.process_id] = mine.copy()
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        assert len({one.shape for one in found}) == 1, "sizes differ between processes"
        return found

    def gather(self, words: np.ndarray) -> np.ndarray:
        """As `types.Exchange` says."""
        return np.stack(self._all(words))

    def swap(self, blocks: np.ndarray) -> np.ndarray:
        """As `types.Exchange` says."""
        return np.stack([blocks_of[self.process_id] for blocks_of in self._all(blocks)])


def together(num_processes: int, work: Callable[[ThreadsExchange], Any]) -> list[Any]:
    """Returns what each process's `work` returned."""
    barrier, board = threading.Barrier(num_processes, timeout=60), [None] * num_processes

    def run(process_id: int) -> Any:
        try:
            return work(ThreadsExchange(process_id, num_processes, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(num_processes) as pool:
        futures = [pool.submit(run, process_id) for process_id in range(num_processes)]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
