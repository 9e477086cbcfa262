"""Several processes train one model, as `launch.train` starts them: the same rows and, but for rounding, the same values."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from launch.bench import kill
from launch.bench.kafka_broker import free_port
from launch.run import newest_snapshot
from monolith_jax.ids.messages import everyone
from monolith_jax.rounds import Go, may_go_on
from monolith_jax.snapshot import SnapshotConfig, Snapshots
from tests import test_flow
from tests.ids.threads_exchange import together
from tests.launch.processes import finish, start

FOUR = (
    "TrainConfig.partitions = 4",
    "SyntheticConfig.num_examples = 5_000",
    "Experiment.counters = @CountersConfig()",
    "CountersConfig.max_rows = 500",
)
compile_cache = test_flow.compile_cache
from_the_root = test_flow.from_the_root


def launch(workdir: Path, num_processes: int, steps: int, *overrides: str, devices: int = 1) -> list[subprocess.Popen[str]]:
    """Starts `launch.train` as so many processes of so many devices each."""
    port, of_mesh = free_port(), ("MeshConfig.num_devices = 0", f"MeshConfig.cpu_devices = {devices}")
    bindings = [*test_flow.SMALL, f"TrainConfig.steps = {steps}", *FOUR, *of_mesh, *overrides]
    command = [sys.executable, "-m", "launch.train", "--gin_file=configs/quickstart.gin", f"--workdir={workdir}"]
    command += [f"--gin.{binding.replace(' = ', '=')}" for binding in bindings]
    command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}"]
    return [start([*command, f"--process_id={process}"], {"NPROC": "16"}) for process in range(num_processes)]


def train_together(workdir: Path, num_processes: int, steps: int, *overrides: str, devices: int = 1) -> list[str]:
    """Trains to the end; returns what each process printed."""
    done = finish(*launch(workdir, num_processes, steps, *overrides, devices=devices), within_s=200)
    assert all(status == 0 for status, _, _ in done), done
    return [out for _, out, _ in done]


def last(workdir: Path) -> Any:
    snapshots = Snapshots(SnapshotConfig(), workdir / "snapshots", read_only=True)
    step = snapshots.latest()
    assert step is not None
    restored = snapshots.restore_plain(step)
    snapshots.close()
    return restored


def assert_close(one: Path, other: Path) -> None:
    """Checks that two runs have the same host state, to the bit, and the same learned state, but for rounding."""
    a, b = last(one), last(other)
    assert a.step == b.step
    for mine, theirs in zip(a.host["maps"], b.host["maps"], strict=True):
        for name in set(mine) - {"sizes"}:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    np.testing.assert_array_equal(a.host["parts"], b.host["parts"])
    for mine, theirs in zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * max(float(np.abs(theirs).max()), 1e-30))
    losses = [[row["loss"] for row in test_flow.rows(folder, "step")] for folder in (one, other)]
    assert len(losses[0]) == len(losses[1]) == a.step
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run of 50 steps of one process with one device."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(test_flow.ROOT)
        test_flow.run(folder, *FOUR, steps=50)
    return folder


def test_a_run_changes_size_and_learns_the_same(whole: Path, tmp_path: Path) -> None:
    printed = train_together(tmp_path, 2, 16, devices=2)
    assert "16 steps, 1,024 examples" in printed[0] and "complete" in printed[0]
    assert printed[1].replace("[Gloo]", "").count("steps") == 0, "process 0 alone prints"
    test_flow.run(tmp_path, *FOUR, "MeshConfig.num_devices = 8", steps=32)
    train_together(tmp_path, 2, 50)
    assert_close(whole, tmp_path)


@pytest.mark.slow
def test_four_processes_and_models_split_inside_them(whole: Path, tmp_path: Path) -> None:
    train_together(tmp_path, 4, 20)
    train_together(tmp_path, 2, 35, "MeshConfig.model_parallel = 2", devices=4)
    test_flow.run(tmp_path, *FOUR, steps=50)
    assert_close(whole, tmp_path)


def wait_for_step(workdir: Path, processes: list[subprocess.Popen[str]], step: int) -> None:
    until = time.monotonic() + 120
    while len(test_flow.rows(workdir, "step")) < step:
        assert all(process.poll() is None for process in processes), finish(*processes)
        assert time.monotonic() < until
        time.sleep(0.05)


def test_sigterm_to_one_stops_all_at_one_step_and_they_go_on(tmp_path: Path) -> None:
    processes = launch(tmp_path, 2, 0, "SyntheticConfig.num_examples = 1_000_000", "SnapshotConfig.period_steps = 0")
    wait_for_step(tmp_path, processes, 5)
    processes[1].send_signal(signal.SIGTERM)
    (status, out, err), (other_status, _, other_err) = finish(*processes, within_s=60)
    assert (status, other_status) == (0, 0), (err, other_err)
    assert "stopped by SIGTERM after step" in out
    steps = last(tmp_path).step
    assert steps >= 5 and len(test_flow.rows(tmp_path, "step")) == steps
    assert f"{steps + 2} steps" in train_together(tmp_path, 2, steps + 2, "SyntheticConfig.num_examples = 1_000_000")[0]


@pytest.mark.slow
def test_killed_and_started_again_equals_uninterrupted(tmp_path: Path) -> None:
    every = ("SnapshotConfig.period_steps = 5", "SyntheticConfig.num_examples = 20_000")
    train_together(tmp_path / "whole", 2, 40, *every)
    processes = launch(tmp_path / "killed", 2, 40, *every)
    wait_for_step(tmp_path / "killed", processes, 12)
    os.kill(processes[1].pid, signal.SIGKILL)
    (status, _, err), _ = finish(*processes, within_s=60)
    assert status and "process 1 of 2 (host" in err and "was lost" in err
    train_together(tmp_path / "killed", 2, 40, *every)
    assert kill.compare(tmp_path / "whole", tmp_path / "killed") == []


def test_one_process_has_nothing_to_read(tmp_path: Path) -> None:
    # One example, of one user, in one partition.
    printed = train_together(tmp_path, 2, 0, "SyntheticConfig.num_examples = 1")
    assert "1 steps, 1 examples" in printed[0]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("TrainConfig.partitions = 1",), "TrainConfig.partitions is 1, which 2 processes cannot share evenly"),
        (("MeshConfig.num_devices = 1",), "2 processes have 1, 1 devices, MeshConfig.num_devices is 1"),
        (("MeshConfig.model_parallel = 2",), "which does not divide the 1 devices of a process"),
    ],
)
def test_what_processes_cannot_share_is_refused(tmp_path: Path, overrides: tuple[str, ...], told: str) -> None:
    done = finish(*launch(tmp_path, 2, 3, *overrides), within_s=60)
    assert all(status == 1 for status, _, _ in done)
    assert any(told in err for _, _, err in done), done
    assert not (tmp_path / "config.gin").exists()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([(True, False, False, False), (False, True, False, False)], Go(True, False, False, None)),
        ([(True, False, False, False), (True, False, True, False)], Go(True, False, True, None)),
        ([(True, False, False, False), (True, False, False, True)], Go(True, False, False, 1)),
        ([(False, False, False, False), (False, True, False, False)], Go(False, False, False, None)),
        ([(False, True, False, False), (False, True, False, False)], Go(False, True, False, None)),
    ],
)
def test_all_come_to_the_same_end(flags: list[tuple[bool, bool, bool, bool]], found: Go) -> None:
    assert together(2, lambda exchange: may_go_on(exchange, *flags[exchange.process_id])) == [found, found]


def test_different_views_of_the_folder_are_refused() -> None:
    def newest(exchange: Any, steps: Sequence[int | None]) -> int | None:
        parts: Any = SimpleNamespace(exchange=exchange)
        snapshots: Any = SimpleNamespace(latest=lambda: steps[exchange.process_id])
        return newest_snapshot(parts, snapshots)

    assert together(2, lambda exchange: newest(exchange, [7, 7])) == [7, 7]
    with pytest.raises(ValueError, match=r"different newest snapshots, of steps 10, None: is --workdir on a file system"):
        together(2, lambda exchange: newest(exchange, [10, None]))


def test_everyone_hears_everyone() -> None:
    values: Iterator[Any] = ({"a": [1, "ä"]}, "a longer word than the other")  # pyright: ignore[reportAssignmentType]
    of_all = together(2, lambda exchange: everyone(exchange, list(values)[exchange.process_id]))
    assert of_all == [list(values), list(values)]
