"""A trainer in a thread of this process, for who feeds its log and waits until it has learned.

In: an experiment over a live log, and a run folder. Out: how many examples it has learned from. It is `launch.run.train` as any
run has it, but that it is stopped by a call instead of SIGTERM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from launch.run import train
from monolith_jax.experiment import Experiment
from monolith_jax.planner import Planner
from monolith_jax.train.log import RunLog

_LOOK_S = 0.005


class Trainer:
    """One run in a thread."""

    def __init__(self, experiment: Experiment, workdir: Path, timeout_s: float) -> None:
        """Starts it; `timeout_s`: how long it may bring nothing while it is waited for."""
        self._workdir, self._timeout_s = workdir, timeout_s
        self._planner: Planner | None = None
        self._log: RunLog | None = None
        self._error: BaseException | None = None
        self._stopping = self._told = False
        self._thread = threading.Thread(target=self._run, args=(experiment,), name="trainer", daemon=True)
        self._thread.start()

    def _run(self, experiment: Experiment) -> None:
        try:
            train(experiment, self._workdir, Console(quiet=True), self._held)
        except BaseException as error:  # Whoever waits raises it.
            self._error = error

    @contextmanager
    def _held(self, planner: Planner, log: RunLog) -> Iterator[None]:
        self._log, self._planner = log, planner
        if self._stopping:
            planner.stop()
        yield

    @property
    def examples(self) -> int:
        """Examples that it has learned from."""
        return self._log.examples if self._log else 0

    @property
    def steps(self) -> int:
        """Steps that it has done."""
        return self._log.steps if self._log else 0

    def wait(self, what: str, progress: Callable[[], float], target: float) -> None:
        """Waits until some progress is at a target.

        Args:
            what: Its name, for the error.
            progress: Returns how far it is.
            target: How far it is to come.

        Raises:
            ValueError: It has not moved for too long.
            Exception: What ended the trainer.
        """
        moved_s, before = time.monotonic(), progress()
        while (now := progress()) < target:
            self.check()
            if now > before:
                moved_s, before = time.monotonic(), now
            if time.monotonic() - moved_s > self._timeout_s:
                raise ValueError(
                    f"the trainer has brought nothing for {self._timeout_s:g} s: {what} is at {now:,.0f}, expected "
                    f"{target:,.0f}. Look at metrics.jsonl and dead_letters.jsonl in {self._workdir}; on a slow machine "
                    "raise ClosedLoopPoint.timeout_s"
                )
            time.sleep(_LOOK_S)

    def check(self) -> None:
        """Raises what ended the trainer, if it has ended."""
        if self._error is not None:
            self._told = True
            raise self._error
        if not self._thread.is_alive():
            raise RuntimeError(f"the trainer in {self._workdir} has ended by itself")

    def stop(self) -> None:
        """Ends it in good order: what is planned is learned, published and saved.

        Raises:
            Exception: What ended it before, if nobody was told yet.
            RuntimeError: It does not end.
        """
        self._stopping = True
        if self._planner is not None:
            self._planner.stop()
        self._thread.join(self._timeout_s)
        if self._error is not None and not self._told:
            self.check()
        if self._thread.is_alive():
            raise RuntimeError(f"the trainer in {self._workdir} has not ended {self._timeout_s:g} s after it was told to")
