"""One point in a process of its own: `python -m launch.sweeps.worker --workdir=SWEEP --index=3`, which `launch.sweep` starts.

In: the folder of a sweep, the number of a point. Out: `result.json` in the point's folder, or `failed.json` and status 1.
A worker dies with who started it, takes the cores that it is given, and leaves a point alone that another process runs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launch.sweeps.folder import Busy, Stopped, is_finished, locked, machine, note, read_json, versions, write_json

if TYPE_CHECKING:
    from launch.points.measured import Measured

BUSY = 75
"""Exit status where another process runs the point (EX_TEMPFAIL)."""
STOPPED = 128 + signal.SIGTERM
"""Exit status where SIGTERM came before the point had ended."""
_PR_SET_PDEATHSIG = 1
_MOST_LINES = 12


def run_point(workdir: Path, index: int) -> None:
    """Runs a point of a sweep, if it is not finished.

    Raises:
        Busy: Another process runs it.
        Stopped: SIGTERM came before it had ended; it has no result, and has not failed.
        Exception: Whatever the point raised; `failed.json` tells of it.
    """
    plan = read_json(workdir / "sweep.json")
    point = plan["points"][index]
    folder = workdir / "points" / point["key"]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        if is_finished(workdir, point["key"]):
            return
        note(workdir, what="start", point=index)
        (folder / "failed.json").unlink(missing_ok=True)
        try:
            rows, seconds = _measured(workdir, point, folder / "run")
        except Stopped:
            note(workdir, what="stopped", point=index)
            raise
        except Exception as error:
            lines = traceback.format_exception(error)[-_MOST_LINES:]
            write_json(folder / "failed.json", {"reason": f"{type(error).__name__}: {error}", "traceback": lines})
            note(workdir, what="failed", point=index)
            raise
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result = {"rows": rows, "seconds": round(seconds, 1), "peak_rss_mb": round(peak, 1), "ended": time.time()}
        result |= {"versions": versions(), "cpu": machine()["cpu"]}
        write_json(folder / "result.json", result)
        note(workdir, what="end", point=index)


def _measured(workdir: Path, point: dict, folder: Path) -> tuple[list[dict], float]:
    from launch.points.kinds import measure
    from launch.points.measured import Base
    from launch.sweeps.config import load_sweep
    from monolith_jax.experiment import to_gin

    began = time.monotonic()
    config = load_sweep([workdir / "sweep.gin"], point["overrides"]).point
    folder.mkdir(exist_ok=True)
    base = Base(tuple(point["gin_files"]), tuple(point["bindings"]), point["seed"])
    began_with = folder.parent / "config.gin"
    if base.gin_files and began_with.is_file() and to_gin(base.load()) != began_with.read_text(encoding="utf-8"):
        raise ValueError(
            f"the gin files are no longer those that the sweep began with ({began_with}): give them back their text, or take "
            "another --workdir"
        )
    rows = _unless_stopped(lambda: measure(config, base, folder))
    # NaN is no JSON.
    return [
        {name: None if value != value else value for name, value in row._asdict().items()} for row in rows
    ], time.monotonic() - began


def _unless_stopped(measured: Callable[[], list[Measured]]) -> list[Measured]:
    """Returns what a point measured, if SIGTERM did not come meanwhile.

    A run takes SIGTERM for itself, saves, and returns before its end as if that were all. What a point makes of such a run is
    no result, and the error that it may raise is none of its own.
    """
    with _hearing_sigterm() as came:
        try:
            rows = measured()
        except (Exception, KeyboardInterrupt) as error:
            if came():
                raise Stopped from error
            raise
        if came():
            raise Stopped
        return rows


@contextmanager
def _hearing_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields what tells whether SIGTERM came in the block, whoever handles it: handlers are replaced, this pipe is not."""
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    heard = bytearray()

    def came() -> bool:
        with contextlib.suppress(BlockingIOError):
            heard.extend(os.read(reading, 4096))
        return signal.SIGTERM in heard

    try:
        yield came
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


def _die_with(parent: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # Linux alone has it.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("who started this is gone")


def _take_cores(cores: Sequence[int]) -> None:
    """Before jax is imported: it makes as many threads as it sees cores."""
    os.sched_setaffinity(0, cores)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, str(len(cores)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one point; returns 0, 1 where it failed, `BUSY` or `STOPPED`."""
    parser = argparse.ArgumentParser(prog="python -m launch.sweeps.worker", description="Runs one point of a sweep.")
    parser.add_argument("--workdir", type=Path, required=True, metavar="SWEEP", help="the folder of a sweep")
    parser.add_argument("--index", type=int, required=True, metavar="N", help="of the point")
    parser.add_argument("--parent", type=int, metavar="PID", help="dies with this process")
    parser.add_argument("--cores", default="", metavar="LIST", help="numbers of the cores to take, by commas")
    asked = parser.parse_args(argv)
    if asked.parent is not None:
        _die_with(asked.parent)
    if asked.cores:
        _take_cores([int(core) for core in asked.cores.split(",")])
    try:
        run_point(asked.workdir, asked.index)
    except Busy:
        return BUSY
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
