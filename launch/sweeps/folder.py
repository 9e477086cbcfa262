"""What a sweep keeps on disk, and who may write it. Imports nothing heavy.

    sweep.gin          the sweep, defaults included        sweep.json        its points, command, versions, machine
    attempts.jsonl     a line for each start and end       points/<key>/     point.json, config.gin, log.txt, run/
    points/<key>/result.json    written last and at once: the point is finished
    points/<key>/failed.json    why the last try ended without

A point is run by whoever holds the lock of its folder; a sweep is driven by whoever holds its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("monolith_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "numba", "pyarrow", "scipy")


class Busy(Exception):
    """Another process holds the lock."""


class Stopped(Exception):
    """A point was told to end before it had."""

    def __init__(self) -> None:
        """Says so."""
        super().__init__("stopped by SIGTERM before its end")


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_json(path: Path) -> Any:
    """Returns what a file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which the system lets go of when the process ends, however it ends.

    Raises:
        Busy: Another process holds it.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(str(path)) from None
        yield


def note(workdir: Path, **what: Any) -> None:
    """Adds a line to attempts.jsonl."""
    line = json.dumps({**what, "time": round(time.time(), 3), "pid": os.getpid(), "host": platform.node()})
    with (workdir / "attempts.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def note_lost_ends(workdir: Path, keys: Sequence[str]) -> None:
    """Adds the lines of points that were killed between their result and the line that tells of it; `keys` by index."""
    path, ended = workdir / "attempts.jsonl", set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # A line that is not whole.
            row = json.loads(line)
            ended |= {row["point"]} if row["what"] == "end" else set()
    for index, key in enumerate(keys):
        if index not in ended and is_finished(workdir, key):
            note(workdir, what="end", point=index, late=True)


def is_finished(workdir: Path, key: str) -> bool:
    """Tells whether a point has its result."""
    return (workdir / "points" / key / "result.json").is_file()


def reason_of(workdir: Path, key: str) -> str:
    """Returns why the last try of a point failed; empty: it did not."""
    path = workdir / "points" / key / "failed.json"
    return "" if is_finished(workdir, key) or not path.is_file() else read_json(path)["reason"]


def versions() -> dict[str, str]:
    """Returns the versions of what a result may depend on, and the commit where this is a checkout of git."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    here = Path(__file__).parent
    for name, command in (("commit", ["rev-parse", "--short=12", "HEAD"]), ("uncommitted files", ["status", "--porcelain"])):
        try:
            told = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            break
        found[name] = told.strip() if name == "commit" else str(len(told.splitlines()))
    return found


def machine() -> dict[str, Any]:
    """Returns what this machine is, in words and numbers."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        memory = float("nan")
    cores = len(os.sched_getaffinity(0))
    return {"cpu": model, "cores": cores, "memory_gb": round(memory, 1), "system": f"{platform.system()} {platform.machine()}"}


def command_line(argv: list[str]) -> str:
    """Returns the command as a person would type it."""
    import shlex

    return f"python -m launch.sweep {shlex.join(argv)}" if argv else shlex.join(sys.argv)
