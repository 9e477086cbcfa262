"""Points in worker processes on this machine: so many at a time, each on cores of its own, within limits of memory and time.

In: a sweep's folder and the points to run. Out: `Told` as they start, end or fail. What runs is ended when the pool closes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from launch.sweeps.config import Point, Sweep
from launch.sweeps.folder import is_finished, machine, note, reason_of, write_json
from launch.sweeps.worker import BUSY

_TURN_S = 0.25
_MOST_BUSY = 3
"""Times that a point is tried again while another process holds its lock."""
_TERM_S = 15.0
"""For a run to save where it is."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Told(NamedTuple):
    """What became of a point."""

    point: Point
    what: Literal["started", "finished", "failed", "busy"]
    reason: str = ""


@dataclass
class _Worker:
    point: Point
    process: subprocess.Popen[bytes]
    log: TextIO
    cores: tuple[int, ...]
    began: float
    ended_for: str = ""


class Pool:
    """Runs points; iterate over it for what becomes of them, with None for each turn in which nothing did."""

    def __init__(self, sweep: Sweep, workdir: Path, points: Sequence[Point]) -> None:
        """Starts nothing yet.

        Args:
            sweep: Its limits.
            workdir: Its folder.
            points: To run, in this order.

        Raises:
            ValueError: The machine has fewer cores than a worker wants.
        """
        cores = sorted(os.sched_getaffinity(0))
        if sweep.cores > len(cores):
            raise ValueError(
                f"Sweep.cores is {sweep.cores}, and this machine has {len(cores)}; set it to {len(cores)} or fewer"
            )
        fit = int(machine()["memory_gb"] // sweep.memory_gb)
        most = sweep.workers or max(min(len(cores) // sweep.cores, fit), 1)
        # More workers than cores share them by turns.
        blocks = [[cores[(worker * sweep.cores + one) % len(cores)] for one in range(sweep.cores)] for worker in range(most)]
        self.free = deque(tuple(sorted(block)) for block in blocks)
        """Cores of workers that nobody runs on."""
        self._sweep, self._workdir, self._todo = sweep, workdir, deque(points)
        self._busy: Counter[int] = Counter()
        self.running: list[_Worker] = []
        """What runs now."""

    def __iter__(self) -> Iterator[Told | None]:
        """Yields until all points have ended."""
        while self._todo or self.running:
            while self._todo and self.free:
                yield self._start(self._todo.popleft())
            ended = [told for told in map(self._look_at, list(self.running)) if told]
            yield from ended
            if not ended:
                yield None
                time.sleep(_TURN_S)

    def close(self) -> None:
        """Ends what runs: SIGTERM, then SIGKILL."""
        until = time.monotonic() + _TERM_S
        for worker in self.running:
            worker.process.terminate()
        for worker in self.running:
            try:
                worker.process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                _kill(worker.process)
                worker.process.wait()
            worker.log.close()
        self.running = []

    def _start(self, point: Point) -> Told:
        cores = self.free.popleft()
        folder = self._workdir / "points" / point.key
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "log.txt").open("a", encoding="utf-8")
        of_point = [f"--workdir={self._workdir}", f"--index={point.index}", f"--parent={os.getpid()}"]
        command = [sys.executable, "-m", "launch.sweeps.worker", *of_point, f"--cores={','.join(map(str, cores))}"]
        # In a session of its own: Ctrl-C ends the sweep, which ends its workers in good order, and limits end their children.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.running.append(_Worker(point, process, log, cores, time.monotonic()))
        return Told(point, "started")

    def _look_at(self, worker: _Worker) -> Told | None:
        status = worker.process.poll()
        if status is None:
            self._hold_to_limits(worker)
            return None
        self.running.remove(worker)
        self.free.append(worker.cores)
        worker.log.close()
        point = worker.point
        if is_finished(self._workdir, point.key):
            return Told(point, "finished")
        if status == BUSY:
            # Perhaps a worker of a sweep that was just killed, which holds the lock until it is gone.
            if self._busy[point.index] < _MOST_BUSY:
                self._busy[point.index] += 1
                self._todo.append(point)
                return None
            return Told(point, "busy", "another process runs it")
        if worker.ended_for or not reason_of(self._workdir, point.key):
            reason = worker.ended_for or _of_status(status, self._workdir / "points" / point.key / "log.txt")
            write_json(self._workdir / "points" / point.key / "failed.json", {"reason": reason, "traceback": []})
            note(self._workdir, what="failed", point=point.index)
        return Told(point, "failed", reason_of(self._workdir, point.key))

    def _hold_to_limits(self, worker: _Worker) -> None:
        if worker.ended_for:
            return
        sweep, took = self._sweep, time.monotonic() - worker.began
        if (held := held_bytes(worker.process.pid) / 2**30) > sweep.memory_gb:
            worker.ended_for = f"held {held:.2f} GB, more than Sweep.memory_gb {sweep.memory_gb:g}"
        elif took > sweep.timeout_s:
            worker.ended_for = f"took more than Sweep.timeout_s {sweep.timeout_s:g}"
        if worker.ended_for:
            _kill(worker.process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a worker that was not waited for yet, and what it started."""
    os.killpg(process.pid, signal.SIGKILL)


def held_bytes(pid: int) -> int:
    """Returns the memory that a process and those that it started hold, 0 once it is gone."""
    held = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        held = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            held += sum(held_bytes(int(child)) for child in children.read_text().split())
    return held


def _of_status(status: int, log: Path) -> str:
    how = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"{how}{': ' + lines[-1] if lines else ''}"
