"""Versions on their way from the devices to the folder, in threads of their own.

In: vectors that the devices are reading. Out: committed versions. A write that fails is tried again with the same content under
the same version, so nothing is lost; after a while it is given up, and the run ends with its error.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from monolith_jax.sync.delta import Content, DeltaFolder, Manifest, Rows, Version
from monolith_jax.sync.gather import Gathered, fetch_dense
from monolith_jax.sync.quantise import Format
from monolith_jax.sync.touched import GroupRows
from monolith_jax.types import Cut

_NICE = 10
"""On a CPU host they take after the devices' threads."""
_PARTS_S, _BASE_PARTS_S = 600.0, 3600.0
"""How long the first process waits for what the others write. Those that die are told of elsewhere."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0


@dataclass(frozen=True)
class Job:
    """A version to write."""

    version: Version
    previous: Version | None
    is_base: bool
    cut: Cut
    rows: tuple[tuple[tuple[str, ...], Gathered, GroupRows], ...]
    """Of each group the names of its tables, the vectors, and whose they are."""
    deleted: Mapping[str, np.ndarray]
    dense: Any
    """Copied weights on the devices, or None."""
    began: float
    """By time.monotonic: when the state was there, as far as the host knows."""
    then: Job | None = None
    """A base of the same state, written once this is durable, while further deltas are."""


class Writer:
    """Writes this process's parts; the first process commits."""

    def __init__(
        self,
        folder: DeltaFolder,
        process: tuple[int, int],
        format: Format,
        retry_s: float,
        gin: str,
        durable: Callable[[Job], None],
    ) -> None:
        """Starts no thread yet.

        Args:
            folder: Where to.
            process: The number of this process, and how many there are.
            format: Of the vectors.
            retry_s: Seconds after which a write that fails is given up.
            gin: Configuration kept with bases.
            durable: Is called in a thread when this process's part of a job is durable, and in the first one committed.
        """
        self._folder, (self._process, self._num_processes) = folder, process
        self._format: Format = format
        self._retry_s, self._gin, self._durable = retry_s, gin, durable
        self._deltas, self._bases = (ThreadPoolExecutor(1, f"publish {what}", _give_way) for what in ("deltas", "bases"))
        self._futures: list[Future[None]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.base: Version | None = None
        """The newest base."""
        self.retries = 0
        """Writes that failed and were tried again."""
        self.told: dict[str, Any] = {}
        """Of the last delta."""

    def start(self, job: Job) -> None:
        """Starts to write; deltas are written in their order, and bases in theirs."""
        pool = self._bases if job.is_base and job.previous is not None else self._deltas
        with self._lock:
            self._futures = [future for future in self._futures if not future.done() or future.exception()]
            self._futures.append(pool.submit(self._write, job))

    def check(self) -> None:
        """Raises what has kept a thread from writing."""
        for future in self._futures:
            if future.done():
                future.result()

    def wait(self) -> None:
        """Waits until all that was started is durable.

        Raises:
            Exception: Whatever kept a thread from writing.
        """
        # A delta starts the base that goes with it before it is done.
        while open_ones := [future for future in self._futures if not future.done()]:
            open_ones[0].result()
        self.check()

    def close(self) -> None:
        """Gives up what is not written yet, and ends the threads."""
        self._closing.set()
        for pool in (self._deltas, self._bases):
            pool.shutdown(wait=True, cancel_futures=True)

    def _write(self, job: Job) -> None:
        rows = dict(pair for group in job.rows for pair in _by_table(*group, job.cut.step))
        started = time.monotonic()  # From here on the devices have nothing to do with it.
        dense = fetch_dense(job.dense) if job.dense is not None and self._process == 0 else None
        for name, weight in (dense or {}).items():
            _check_finite(weight, f"dense weight {name}", job.cut.step)
        content = Content(rows=rows, deleted=job.deleted, dense=dense)
        self._again(lambda: self._folder.write_part(job.version, self._process, content, self._format))
        if self._process == 0:
            wait_s = max(self._retry_s, _BASE_PARTS_S if job.is_base else _PARTS_S)
            commit = partial(self._folder.commit, self._manifest(job), self._num_processes, wait_s)
            self._again(commit, lambda: self._is_committed(job))
            if job.is_base:
                self.base = job.version
        now = time.monotonic()
        if not job.is_base or job.previous is None:
            self.told = {
                "published_version": job.version.folder,
                "publish_rows": sum(of_table.ids.size for of_table in rows.values()),
                "publish_s": round(now - started, 4),
                "publish_lag_s": round(now - job.began, 4),
                "publish_retries": self.retries,
            }
        self._durable(job)
        if job.then is not None and not self._closing.is_set():
            self.start(job.then)

    def _is_committed(self, job: Job) -> bool:
        """Says whether a commit that failed had come far enough: the manifest is there, what failed came after it."""
        return job.version in self._folder.versions()

    def _manifest(self, job: Job) -> Manifest:
        base = job.version if job.is_base else self.base
        assert base is not None, "a delta without a base"
        cut = job.cut
        return Manifest(
            kind="base" if job.is_base else "delta",
            version=job.version,
            previous=job.previous,
            base=base,
            step=cut.step,
            event_time_ms=cut.event_time_ms,
            created_ms=int(time.time() * 1000),
            position=list(cut.position),
            format=self._format,
            config=self._gin if job.is_base else "",
        )

    def _again(self, write: Callable[[], object], is_done: Callable[[], bool] = lambda: False) -> None:
        """Writes; tries again where the folder fails, unless it is done all the same."""
        until, wait_s = time.monotonic() + self._retry_s, _FIRST_WAIT_S
        while True:
            try:
                write()
                return
            except OSError as error:
                if time.monotonic() > until or self._closing.wait(wait_s):
                    error.add_note(
                        f"publishing into {self._folder.root} failed for {self._retry_s:g} s (PublisherConfig.retry_s); what "
                        "was not published is after the next start"
                    )
                    raise
                self.retries += 1
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                with contextlib.suppress(OSError):
                    if is_done():
                        return


def _by_table(names: tuple[str, ...], gathered: Gathered, whose: GroupRows, step: int) -> list[tuple[str, Rows]]:
    vectors, found = gathered.fetch(), []
    for table in np.unique(whose.tables).tolist():
        which = np.flatnonzero(whose.tables == table)
        rows = Rows(whose.ids[which], vectors[which])
        _check_finite(rows.vectors, f"a row of table {names[table]}", step)
        found.append((names[table], rows))
    return found


def _check_finite(values: np.ndarray, what: str, step: int) -> None:
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{what} is not finite after step {step}; it was not published. Lower the learning rate (OptimizerConfig)"
        )


def _give_way() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
