"""Threads that each own neighbouring shards, spread over the NUMA nodes of the host.

In: a task over a range of shards. Out: the task done for all shards. Thread t always has the same shards, so on a host with
several nodes it is pinned to one of them, touches its pages first there, and finds them near ever after. What comes out never
depends on the number of threads: a shard's work reads and writes that shard's state only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class MapperConfig:
    """How the host maps ids to rows."""

    threads: int = 0
    """Threads that share the shards; 0: a quarter of the cores that this process may use, at least one a NUMA node."""
    numa: Literal["auto", "off"] = "auto"
    """auto: on a host with several NUMA nodes, shards and their threads are spread over them; off: the system decides."""


def parse_cpus(text: str) -> frozenset[int]:
    """Returns the numbers in a list as Linux writes it: `0-3,8,10-11`.

    Raises:
        ValueError: It is no such list.
    """
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, dash, last = part.partition("-")
            numbers = range(int(first), int(last if dash else first) + 1)
            if not numbers:
                raise ValueError(f"{part!r} in a list of CPUs ends before it begins")
            cpus.update(numbers)
    return frozenset(cpus)


def numa_nodes(allowed: frozenset[int], root: Path = Path("/sys/devices/system/node")) -> tuple[frozenset[int], ...]:
    """Returns the CPUs of each NUMA node, of those that this process may use; nodes without any are left out.

    A host that does not tell its nodes has one.
    """
    nodes = []
    for folder in sorted(root.glob("node[0-9]*"), key=lambda folder: int(folder.name[4:])):
        try:
            nodes.append(parse_cpus((folder / "cpulist").read_text()) & allowed)
        except (OSError, ValueError):
            return (allowed,)
    return tuple(node for node in nodes if node) or (allowed,)


class ShardThreads:
    """Runs tasks over ranges of shards. One caller at a time."""

    def __init__(self, num_threads: int, nodes: Sequence[frozenset[int]]) -> None:
        """Threads start with the first task that needs them.

        Args:
            num_threads: How many; with 1 and no nodes to pin to, tasks run in the caller's thread.
            nodes: CPUs of each NUMA node, to which threads are pinned; empty or one: they are not.
        """
        self.num_threads = num_threads
        self._nodes = tuple(nodes) if len(nodes) > 1 else ()
        self._workers: list[ThreadPoolExecutor] = []
        self._process = os.getpid()

    def ranges(self, num_shards: int) -> list[tuple[int, int]]:
        """Returns first shard and last shard (exclusive) of each thread."""
        return [
            (thread * num_shards // self.num_threads, (thread + 1) * num_shards // self.num_threads)
            for thread in range(self.num_threads)
        ]

    def run(self, task: Callable[[int, int], object], num_shards: int) -> None:
        """Calls task(first, last) for every thread's range of shards and waits for all.

        Raises:
            Exception: The first that a task raised, after all have ended.
        """
        ranges = self.ranges(num_shards)
        if self.num_threads == 1 and not self._nodes:
            task(*ranges[0])
            return
        if self._process != os.getpid():  # a fork has the executors but not their threads
            self._workers, self._process = [], os.getpid()
        own = 0 if self._nodes else 1  # parts of the caller, who would only wait; but he is pinned nowhere
        if not self._workers:
            self._workers = [
                ThreadPoolExecutor(1, f"shards-{thread}", self._pin, (thread,)) for thread in range(own, self.num_threads)
            ]
        futures = [worker.submit(task, *part) for worker, part in zip(self._workers, ranges[own:], strict=True)]
        errors: list[BaseException] = []
        for part in ranges[:own]:
            try:
                task(*part)
            except Exception as error:
                errors.append(error)
        errors += [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]

    def _pin(self, thread: int) -> None:
        if self._nodes:
            os.sched_setaffinity(threading.get_native_id(), self._nodes[thread * len(self._nodes) // self.num_threads])


def make_threads(config: MapperConfig) -> ShardThreads:
    """Returns the threads of a config on this host.

    Raises:
        ValueError: A number below zero.
    """
    if config.threads < 0:
        raise ValueError(f"MapperConfig.threads must be 0 (chosen by the host) or more, got {config.threads}")
    can_pin = hasattr(os, "sched_getaffinity")
    allowed = frozenset(os.sched_getaffinity(0) if can_pin else range(os.cpu_count() or 1))
    nodes = numa_nodes(allowed) if config.numa == "auto" and can_pin else (allowed,)
    number = config.threads or max(len(allowed) // 4, len(nodes))
    return ShardThreads(number, nodes if number >= len(nodes) else ())
