"""Starts the processes that a test needs, and ends them. Out: what each printed and how it ended."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MEMBER = str(Path(__file__).parent / "member.py")
CONFIG = ["--gin_file=configs/quickstart.gin", "--gin.Experiment.mesh=@MeshConfig()", "--gin.MeshConfig.cpu_devices=2"]


def environment(**variables: str) -> dict[str, str]:
    """Returns this process' environment without a cluster's variables and the tests' eight devices, but with those given."""
    names = ("SLURM_", "OMPI_", "JAX_COORDINATOR", "JOB_COMPLETION", "KUBERNETES_", "XLA_FLAGS")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    return plain | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}


def start(command: Sequence[str], variables: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    """Starts a process of this checkout."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**variables), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def start_member(duty: str, workdir: Path, *flags: str, variables: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    """Starts one process that joins a run and does its duty (`member.py`)."""
    return start([sys.executable, MEMBER, duty, *CONFIG, f"--workdir={workdir}", *flags], variables)


def finish(*processes: subprocess.Popen[str], within_s: float = 60) -> list[tuple[int, str, str]]:
    """Waits for all; returns status, output and errors of each; kills what is still there when the time is over."""
    until = time.monotonic() + within_s
    found: list[tuple[int, str, str]] = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 0.1))
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def joined(out: str) -> dict[str, Any]:
    """Returns what a member printed when it had joined."""
    line = next(line for line in out.splitlines() if "{" in line and '"process"' in line)
    return json.loads(line[line.index("{") :])


def wait_for_joined(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Waits until a member has joined; returns what it printed."""
    assert process.stdout is not None
    for line in process.stdout:
        if '"process"' in line:
            return joined(line)
    raise AssertionError(f"it ended before: {finish(process)}")
