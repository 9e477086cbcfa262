"""Online training from a log: killed anywhere, it learns what a run that nobody interrupted learns from the same cuts."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from launch.bench import kill
from launch.bench.kafka_broker import free_port
from launch.run import identity
from monolith_jax.experiment import load
from tests import test_flow
from tests.launch.processes import finish, start
from tests.stream.event_log import Feed, make_world

compile_cache = test_flow.compile_cache
from_the_root = test_flow.from_the_root
IMPRESSIONS = 3000
LIVE = (
    *(one for one in test_flow.SMALL if not one.startswith("SyntheticConfig")),
    "LogConfig.ends = True",
    "LogConfig.idle_s = 1.0",
    "LogConfig.poll_bytes = 20_000",
    "JoinerConfig.window_s = 3.0",
)


def bindings(log: str, *overrides: str) -> list[str]:
    return [*LIVE, f"LOG = '{log}'", *overrides]


def command(workdir: Path, log: str, *overrides: str) -> list[str]:
    flags = [f"--gin.{one.replace(' = ', '=')}" for one in bindings(log, *overrides)]
    return [sys.executable, "-m", "launch.train", "--gin_file=configs/online.gin", f"--workdir={workdir}", *flags]


def launch(workdir: Path, log: str, number: int, *overrides: str) -> list[subprocess.Popen[str]]:
    """Starts one process, or several that share two partitions."""
    overrides = ("MeshConfig.num_devices = 0", "MeshConfig.cpu_devices = 1", *overrides)
    if number == 1:
        return [start(command(workdir, log, *overrides), {"NPROC": "16"})]
    flags = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={number}"]
    one = [*command(workdir, log, *overrides), *flags]
    return [start([*one, f"--process_id={process}"], {"NPROC": "16"}) for process in range(number)]


def done(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    found = finish(*processes, within_s=200)
    assert all(status == 0 for status, _, _ in found), found
    return [out for _, out, _ in found]


def kill_at(processes: Sequence[subprocess.Popen[str]], workdir: Path, step: int) -> bool:
    """Kills all when a step is written; returns whether they were still running."""
    until = time.monotonic() + 120
    while all(process.poll() is None for process in processes) and time.monotonic() < until:
        if max((row["step"] for row in kill.rows_of(workdir) if row["kind"] == "step"), default=0) >= step:
            break
        time.sleep(0.01)
    running = all(process.poll() is None for process in processes)
    for process in processes:
        process.kill()
        process.communicate()
    return running


def summary(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


def assert_equals_replay(workdir: Path, replay: Path, log: str, number: int, *overrides: str) -> None:
    """Runs by the same cuts, without interruption, and compares all that was learned."""
    shutil.copytree(workdir / "stream", replay / "stream")
    done(launch(replay, log, number, *overrides))
    assert kill.compare(workdir, replay) == []


def test_what_decides_what_messages_become_is_part_of_a_runs_identity() -> None:
    def of(*overrides: str) -> Any:
        return identity(load(["configs/online.gin"], overrides))

    assert of("LOG = 'kafka://broker:9092'", "LogConfig.idle_s = 60.0", "JoinerConfig.memory_mb = 9.0") == of()
    for override in ("LogConfig.future_s = 60.0", "LogConfig.format = 'json'", "JoinerConfig.window_s = 60.0"):
        assert of(override) != of(), override


@pytest.fixture
def log(tmp_path: Path) -> str:
    url = f"file://{tmp_path}/log"
    with closing(Feed(url)) as feed:
        feed.send_world(make_world(IMPRESSIONS))
    return url


@pytest.mark.parametrize("number", [1, 2])
def test_killed_runs_lose_and_repeat_nothing(tmp_path: Path, log: str, number: int) -> None:
    partitions = "TrainConfig.partitions = 2"
    rng = random.Random(number)
    for _ in range(2):
        assert kill_at(launch(tmp_path / "run", log, number, partitions), tmp_path / "run", rng.randint(12, 30))
    assert "going on from the snapshot" in done(launch(tmp_path / "run", log, number, partitions))[0]
    found = summary(tmp_path / "run")
    assert (found["examples"], found["rejected"]) == (IMPRESSIONS, {})
    assert found["stream"]["late_impressions"] == found["stream"]["late_or_orphan_actions"] == 0
    assert_equals_replay(tmp_path / "run", tmp_path / "replay", log, number, partitions)
