"""Points as a job array of a cluster, through submitit (extra `sweep`): SLURM, or its local executor to try the same at home.

In: a sweep's folder, the points to run, options of the jobs. Out: `Told`, as `launch.sweeps.pool` has it. The folder must be on
a file system that all hosts share. Jobs that wait or run are cancelled when the sweep is.
"""

from __future__ import annotations

import ast
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.sweeps.config import Point, Sweep
from launch.sweeps.folder import Busy, is_finished, note, reason_of, write_json
from launch.sweeps.pool import Told

EXECUTORS = {"slurm": "slurm", "submitit_local": "local"}
"""What `--executor` says, and submitit's name of it."""
_TURN_S = 1.0
_LOG_LEVEL = "SUBMITIT_LOG_LEVEL"
_BUSY = "another process runs it"


def import_submitit() -> Any:
    """Returns the module submitit.

    Raises:
        ImportError: It is not installed.
    """
    # It would set up logging for the whole process, which closes the handlers of others: absl's closes the stream that it
    # writes to. Jobs do not inherit this: what submitit tells there goes to their logs.
    said = os.environ.get(_LOG_LEVEL)
    os.environ[_LOG_LEVEL] = "NOCONFIG"
    try:
        import submitit
    except ImportError as error:
        raise ImportError("--executor needs submitit: pip install 'monolith_jax[sweep]'") from error
    finally:
        del os.environ[_LOG_LEVEL]
        if said is not None:
            os.environ[_LOG_LEVEL] = said
    return submitit


def parse_options(text: str) -> dict[str, Any]:
    """Returns `partition=gpu,timeout_min=60` as a dict; numbers become numbers.

    Raises:
        ValueError: A part is not NAME=VALUE.
    """
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(
                f"--executor_options: expected NAME=VALUE by commas, got {part!r}; as in partition=gpu,timeout_min=60"
            )
        try:
            options[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name.strip()] = value
    return options


def run_job(workdir: Path, index: int) -> str:
    """Runs a point in a job; returns nothing, or why it did not."""
    from launch.sweeps.worker import run_point

    try:
        run_point(workdir, index)
    except Busy:
        return _BUSY
    except Exception as error:  # failed.json tells of it; the job itself did its work.
        return f"{type(error).__name__}: {error}"
    return ""


class JobArray:
    """Runs points as jobs; iterate over it as over `sweeps.pool.Pool`."""

    def __init__(self, sweep: Sweep, workdir: Path, points: Sequence[Point], executor: str, options: dict[str, Any]) -> None:
        """Submits nothing yet.

        Raises:
            ImportError: submitit is not installed.
            ValueError: An option is not known to submitit.
        """
        made = import_submitit().AutoExecutor(folder=workdir / "jobs", cluster=EXECUTORS[executor])
        settings: dict[str, Any] = {
            "name": f"sweep_{sweep.name}",
            "cpus_per_task": sweep.cores,
            "mem_gb": sweep.memory_gb,
            "timeout_min": max(1, round(sweep.timeout_s / 60)),
        }
        if executor == "slurm" and sweep.workers:
            settings["slurm_array_parallelism"] = sweep.workers
        try:
            made.update_parameters(**{**settings, **options})
        except (TypeError, NameError) as error:
            raise ValueError(f"--executor_options: {error}") from error
        self._workdir, self._points, self._executor = workdir, tuple(points), made
        self.running: list[tuple[Point, Any]] = []
        """Jobs that have not ended, with their points."""

    def __iter__(self) -> Iterator[Told | None]:
        """Submits all points as one array, and yields until all jobs have ended."""
        folders, indexes = [self._workdir] * len(self._points), [point.index for point in self._points]
        self.running = list(zip(self._points, self._executor.map_array(run_job, folders, indexes), strict=True))
        started: set[int] = set()
        while self.running:
            for point, job in list(self.running):
                if point.index not in started and str(job.state).upper() == "RUNNING":
                    started.add(point.index)
                    yield Told(point, "started")
                if job.done():
                    self.running.remove((point, job))
                    yield self._ended(point, job)
            yield None
            time.sleep(_TURN_S)

    def close(self) -> None:
        """Cancels what has not ended."""
        for _, job in self.running:
            job.cancel()
        self.running = []

    def _ended(self, point: Point, job: Any) -> Told:
        if is_finished(self._workdir, point.key):
            return Told(point, "finished")
        try:
            reason = job.result()
        except Exception as error:  # The job itself died: of memory, of time, of its host.
            reason = f"job {job.job_id}: {str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__}"
        reason = reason or f"job {job.job_id} ended well, but {point.key}/result.json is not to be seen on this host"
        if reason == _BUSY:
            return Told(point, "busy", reason)
        if not reason_of(self._workdir, point.key):
            write_json(self._workdir / "points" / point.key / "failed.json", {"reason": reason, "traceback": []})
            note(self._workdir, what="failed", point=point.index)
        return Told(point, "failed", reason_of(self._workdir, point.key))
