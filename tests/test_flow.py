"""The whole way from events to metrics and snapshots: it learns, stops, goes on and refuses as it should."""

import fcntl
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from launch import train as train_command
from launch.bench import kill
from launch.run import train
from monolith_jax.experiment import load
from monolith_jax.snapshot import SnapshotConfig, Snapshots

ROOT = Path(__file__).parent.parent
SMALL = (
    "SyntheticConfig.live_users = 200",
    "SyntheticConfig.live_videos = 100",
    "SyntheticConfig.chunk_rows = 500",
    "SyntheticConfig.num_examples = 3_000",
    "HistoryConfig.max_users = 500",
    "TableConfig.dim = 8",
    *(f"{name}/TableConfig.max_rows = 1000" for name in ("video", "author", "sound")),
    "user/TableConfig.max_rows = 20",
    "user/TableConfig.ttl_s = 100_000_000",
    "video/TableConfig.ttl_s = 60",
    "sound/TableConfig.admission = @AdmissionConfig()",
    "AdmissionConfig.rule = 'seen'",
    "AdmissionConfig.times = 2",
    "MMoEConfig.num_experts = 2",
    "MMoEConfig.expert_hidden = (16, 8)",
    "MMoEConfig.tower_hidden = (8,)",
    "TrainConfig.batch_size = 64",
    "TrainConfig.log_every = 1",
    "SnapshotConfig.period_steps = 7",
    "PrequentialConfig.period_s = 600.0",
    "Experiment.mesh = @MeshConfig()",
    "MeshConfig.num_devices = 1",
    "MeshConfig.cpu_devices = 8",  # as in all tests, should this process not have computed yet
    "MeshConfig.num_shards = 8",
)
STEPS = 30


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles each program of this module once, in this process and those it starts."""
    folder = str(tmp_path_factory.mktemp("xla"))
    variables = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    settings = ("jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(workdir: Path, *overrides: str, steps: int = STEPS) -> tuple[dict[str, dict[str, Any]], str]:
    """Trains in this process; returns the totals and what was printed."""
    text = io.StringIO()
    experiment = load(["configs/quickstart.gin"], [*SMALL, f"TrainConfig.steps = {steps}", *overrides])
    totals = train(experiment, workdir, Console(file=text, width=200))
    return totals, text.getvalue()


def start(workdir: Path, *overrides: str, steps: int = STEPS) -> subprocess.Popen[str]:
    """Starts the real command."""
    bindings = [one.replace(" = ", "=") for one in (*SMALL, f"TrainConfig.steps = {steps}", *overrides)]
    command = [sys.executable, "-m", "launch.train", "--gin_file=configs/quickstart.gin", f"--workdir={workdir}"]
    command += [f"--gin.{binding}" for binding in bindings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_snapshot(process: subprocess.Popen[str], workdir: Path) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(child.name.isdigit() for child in (workdir / "snapshots").glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rows(workdir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in kill.rows_of(workdir) if row["kind"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run of `STEPS` steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run(folder)
    return folder


def test_it_learns(tmp_path: Path) -> None:
    totals, text = run(tmp_path, "SyntheticConfig.num_examples = 10_000", "SnapshotConfig.period_steps = 50", steps=120)
    losses = [row["loss"] for row in rows(tmp_path, "step")]
    assert len(losses) == 120
    assert np.mean(losses[-30:]) < 0.97 * np.mean(losses[:30])
    complete = totals["complete"]
    assert complete["examples"] == 120 * 64
    assert 0.55 < complete["auc"] < complete["optimal_auc"] + 0.02
    assert "complete" in text and "120 steps, 7,680 examples" in text
    assert {"config.gin", "metrics.jsonl", "snapshots"} <= {child.name for child in tmp_path.iterdir()}
    assert load([tmp_path / "config.gin"]).train.batch_size == 64


def test_ids_come_and_go(whole: Path) -> None:
    steps = rows(whole, "step")
    sums = {name: sum(row[name] for row in steps) for name in ("fresh", "expired", "freed_at_cap", "not_admitted")}
    assert min(sums.values()) > 0, sums
    assert steps[-1]["rows"] == sums["fresh"] - sums["expired"] - sums["freed_at_cap"]
    assert 0 < steps[-1]["load"] < 0.85 and 1 <= steps[-1]["probe_length"] < 2


def test_to_the_end_of_the_stream(tmp_path: Path) -> None:
    totals, text = run(tmp_path, "SyntheticConfig.num_examples = 500", steps=0)
    # 500 examples are seven batches of 64 and one of 52.
    assert [row["examples"] for row in rows(tmp_path, "step")] == [64, 128, 192, 256, 320, 384, 448, 500]
    assert totals["skip"]["examples"] == 500
    assert "8 steps, 500 examples" in text
    assert "saved step 7: " in text and "saved step 8: " in text and " MB on disk" in text
    # The same command again finds nothing to do, and leaves the same metrics.
    before = kill.rows_of(tmp_path)
    _, text = run(tmp_path, "SyntheticConfig.num_examples = 500", steps=0)
    assert "going on from the snapshot of step 8" in text
    assert kill.rows_of(tmp_path) == before


@pytest.mark.parametrize("first", [1, 14, 17])
def test_stopped_and_continued_equals_uninterrupted(whole: Path, tmp_path: Path, first: int) -> None:
    run(tmp_path, steps=first)
    assert rows(tmp_path, "summary")[0]["steps"] == first
    _, text = run(tmp_path)
    assert f"going on from the snapshot of step {first}" in text
    assert kill.compare(whole, tmp_path) == []
    assert len(rows(tmp_path, "step")) == STEPS and len(rows(tmp_path, "summary")) == 1


def test_compare_sees_a_difference(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, "rows/OptimizerConfig.learning_rate = 0.019")
    assert any("groups" in line for line in kill.compare(whole, tmp_path))


def test_a_snapshot_at_every_step_equals_few(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, "SnapshotConfig.period_steps = 1", "SnapshotConfig.keep = 100")
    assert kill.compare(whole, tmp_path) == []
    # Each of them is what the few are at that step.
    for step in (7, 14):
        folder = tmp_path / f"until {step}"
        run(folder, steps=step)
        snapshots = Snapshots(SnapshotConfig(), tmp_path / "snapshots", read_only=True)
        stopped = Snapshots(SnapshotConfig(), folder / "snapshots", read_only=True)
        one, other = snapshots.restore_plain(step), stopped.restore_plain(step)
        assert kill.compare_trees((one.state, one.host), (other.state, other.host)) == []
        snapshots.close()
        stopped.close()


def test_sigterm_saves_and_the_same_command_goes_on(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_snapshot(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    if "stopped by SIGTERM" not in out:
        pytest.fail(f"the run had ended before it was stopped:\n{out}")
    process = start(tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "going on from the snapshot of step" in out
    assert kill.compare(whole, tmp_path) == []


def test_killed_and_continued_equals_uninterrupted(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_snapshot(process, tmp_path)
    time.sleep(random.random() * 0.5)
    process.kill()
    process.communicate()
    process = start(tmp_path)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert kill.compare(whole, tmp_path) == []


def test_larger_tables_at_a_restart(tmp_path: Path) -> None:
    run(tmp_path, steps=10)
    _, text = run(tmp_path, "user/TableConfig.max_rows = 400", "video/TableConfig.ttl_s = 0")
    assert "every id keeps its row" in text
    steps = rows(tmp_path, "step")
    assert len(steps) == STEPS and not any(row["expired"] for row in steps[10:])


def test_another_config_in_the_same_folder_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (whole / "config.gin").read_bytes()
    overrides = ("user/TableConfig.max_rows = 10", "like/HeadConfig.loss_weight = 2.0", "TrainConfig.batch_size = 32")
    with pytest.raises(ValueError, match="is of another config") as caught:
        run(whole, *overrides)
    told = str(caught.value)
    assert "tables.user.max_rows: 20 in the snapshot, 10 here" in told
    assert "heads.like.loss_weight: 1.0 in the snapshot, 2.0 here" in told
    assert "batch_size: 64 in the snapshot, 32 here" in told
    assert told.count("in the snapshot") == 3
    assert (whole / "config.gin").read_bytes() == config
    # What a run may change on its way: its length, its logs, its snapshots.
    run(whole, "TrainConfig.log_every = 5", "SnapshotConfig.keep = 3")


def test_command_line_errors_end_with_status_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gin_file=configs/quickstart.gin", f"--workdir={tmp_path}"]
    assert train_command.main([*arguments, "--gin.TrainConfig.stepz=1"]) == 1
    assert "stepz" in capsys.readouterr().err
    assert (
        train_command.main(
            [
                *arguments,
                "--gin.Experiment.mesh=@MeshConfig()",
                "--gin.MeshConfig.num_devices=64",
                "--gin.MeshConfig.cpu_devices=8",
            ]
        )
        == 1
    )
    assert "MeshConfig.num_devices is 64, but there are" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bindings = [
        one.replace(" = ", "=") for one in (*SMALL, "dense/OptimizerConfig.learning_rate = 1e30", "TrainConfig.steps = 20")
    ]
    arguments = ["--gin_file=configs/quickstart.gin", f"--workdir={tmp_path}", *(f"--gin.{one}" for one in bindings)]
    assert train_command.main(arguments) == 1
    told = capsys.readouterr().err
    assert "FloatingPointError: the loss of step 2 is nan" in told or "FloatingPointError: the loss of step 2 is inf" in told
    assert '{"position": {}, "row": 64}' in told
    assert "Last good snapshot: none yet" in told
    snapshots = Snapshots(SnapshotConfig(), tmp_path / "snapshots", read_only=True)
    assert snapshots.latest() is None
    snapshots.close()


def test_one_device_and_eight_learn_the_same(whole: Path, tmp_path: Path) -> None:
    totals, _ = run(tmp_path, "MeshConfig.num_devices = 8")
    one, eight = rows(whole, "step"), rows(tmp_path, "step")
    np.testing.assert_allclose([row["loss"] for row in eight], [row["loss"] for row in one], rtol=1e-4)
    for name in ("unique", "fresh", "occurrences", "rows"):
        assert [row[name] for row in eight] == [row[name] for row in one]
    for row in rows(whole, "total"):
        if row.get("auc") is not None:
            assert abs(totals[row["head"]]["auc"] - row["auc"]) < 1e-3
        assert abs(totals[row["head"]]["calibration"] - row["calibration"]) < 1e-3 * row["calibration"]


def test_a_run_goes_on_with_other_devices(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, "MeshConfig.num_devices = 8", steps=14)
    run(tmp_path, "MeshConfig.num_devices = 1", steps=22)
    run(tmp_path, "MeshConfig.num_devices = 4")
    losses = [[row["loss"] for row in rows(folder, "step")] for folder in (whole, tmp_path)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_warm_start(whole: Path, tmp_path: Path) -> None:
    before = sorted((path.relative_to(whole), path.stat().st_mtime_ns) for path in whole.rglob("*"))
    overrides = (f"TrainConfig.warm_start = '{whole}'", "MMoEConfig.num_experts = 3", "user/TableConfig.max_rows = 3000")
    _, text = run(tmp_path, *overrides, steps=5)
    assert f"warm start from step {STEPS} of {whole}" in text
    assert "rows taken over" in text and "weight towers" in text
    known, first = rows(whole, "summary")[0]["rows"], rows(tmp_path, "step")[0]
    assert first["rows"] == known + first["fresh"] - first["expired"] - first["freed_at_cap"]
    # The first batch had been seen; only users, whose table was full, may have lost their rows.
    assert first["fresh"] < 0.2 * rows(whole, "step")[0]["fresh"]
    assert rows(tmp_path, "step")[0]["loss"] != rows(whole, "step")[0]["loss"]
    assert sorted((path.relative_to(whole), path.stat().st_mtime_ns) for path in whole.rglob("*")) == before
    # Once there is a snapshot, the run goes on from that.
    _, text = run(tmp_path, *overrides, steps=6)
    assert "going on from the snapshot of step 5" in text and "warm start" not in text
    with pytest.raises(ValueError, match=r"no snapshot in .*nowhere"):
        run(tmp_path / "new", "TrainConfig.warm_start = 'nowhere'")


def test_held_out_examples_change_nothing(whole: Path, tmp_path: Path) -> None:
    overrides = (
        "Experiment.test_source = @test/SyntheticConfig()",
        "test/SyntheticConfig.num_examples = 500",
        "test/SyntheticConfig.seed = 1",
    )
    run(tmp_path, *overrides)
    tests = rows(tmp_path, "test")
    assert {row["head"] for row in tests} == {row["head"] for row in rows(tmp_path, "total")}
    assert [row["examples"] for row in tests if row["head"] == "skip"] == [500]
    one, other = (
        [row for row in kill.rows_of(folder) if row["kind"] not in ("test", "summary")] for folder in (whole, tmp_path)
    )
    assert one == other


@pytest.mark.slow
def test_killed_twice_at_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kill.main(["--times", "2", "--workdir", str(tmp_path), "--steps", "60", "--seed", "1"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["kills"] == summary["equal"] == 2 and summary["uninterrupted_runs_equal"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("what the first has written\n")
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process trains in"):
            run(tmp_path, steps=1)
    assert (tmp_path / "metrics.jsonl").read_text() == "what the first has written\n"
