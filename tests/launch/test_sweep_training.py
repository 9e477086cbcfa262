"""Points that train: what they measure, stopped and killed in the middle of training, and a job that dies."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch import run as training
from launch.points import train as training_point
from launch.points.measured import Base
from launch.points.train import TrainPoint, run
from launch.sweeps.folder import Stopped, is_finished, note, note_lost_ends, read_json, write_json
from launch.sweeps.worker import run_point
from tests.launch.small_sweep import ROOT, attempts, write_result, write_results

FILES = tuple(str(ROOT / "configs" / name) for name in ("data/synthetic.gin", "models/shared_bottom.gin"))
BINDINGS = (
    "SyntheticConfig.live_users = 50",
    "SyntheticConfig.live_videos = 50",
    "SyntheticConfig.num_examples = 20000",
    "Experiment.train = @TrainConfig()",
    "TrainConfig.batch_size = 40",
    "TrainConfig.log_every = 5",
    "Experiment.snapshots = @SnapshotConfig()",
    "SnapshotConfig.period_steps = 50",
    "SharedBottomConfig.bottom_hidden = (6,)",
    "SharedBottomConfig.tower_hidden = (3,)",
    "Experiment.mesh = @MeshConfig()",
    "MeshConfig.num_devices = 1",
    "MeshConfig.cpu_devices = 8",  # as in all tests, should this process not have computed yet
    "MeshConfig.num_shards = 8",
    *(f"{name}/TableConfig.max_rows = 1000" for name in ("user", "video", "author", "sound")),
)
SHORT = (
    "SyntheticConfig.num_examples = 1200",
    "Experiment.test_source = @held/SyntheticConfig()",
    "held/SyntheticConfig.seed = 9",
)


@pytest.fixture
def sigterm_is_harmless() -> Iterator[None]:
    """Keeps a signal that comes late from ending the tests."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    yield
    signal.signal(signal.SIGTERM, before)


def write_gin(path: Path, seeds: str = "(0, 1)", *more: str) -> Path:
    lines = ["Sweep.name = 'training'", f"Sweep.gin_files = {FILES!r}", f"Sweep.bindings = {(*BINDINGS, *more)!r}"]
    path.write_text("\n".join([*lines, f"Sweep.seeds = {seeds}", "Sweep.metrics = ('auc',)"]) + "\n", encoding="utf-8")
    return path


def is_training(workdir: Path, number: int = 1) -> bool:
    """Tells whether so many points have written rows of steps."""
    return sum('"step"' in path.read_text() for path in workdir.glob("points/*/run/metrics.jsonl")) >= number


def wait_for(what: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    until = time.monotonic() + 200
    while not what():
        assert time.monotonic() < until and (process is None or process.poll() is None), "it does not come to that"
        time.sleep(0.01)


def rows_of(workdir: Path, key: str) -> list[dict]:
    return read_json(workdir / "points" / key / "result.json")["rows"]


def test_a_run_is_measured_by_head_and_hour_and_its_snapshots_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(FILES, (*BINDINGS, *SHORT), 0)
    rows = run(TrainPoint(keep=True), base, tmp_path)
    assert (tmp_path / "snapshots").is_dir()
    found = {(row.metric, row.head): row.value for row in rows if not row.along}
    labels = [head.label for head in base.load().heads if head.kind == "binary"]
    for prefix in ("", "test_"):
        of_heads = [found[f"{prefix}log_loss", label] for label in labels]
        assert found[f"{prefix}log_loss", "mean"] == pytest.approx(sum(of_heads) / len(labels))
        # So few examples leave a rare head without an AUC: a mean over the others would be that of other heads.
        defined = [not math.isnan(found[f"{prefix}auc", label]) for label in labels]
        assert any(defined) and ((f"{prefix}auc", "mean") in found) == all(defined)
    assert found["steps", ""] == 30 and found["examples", ""] == 1200 and found["rows", ""] > 50
    assert all(row.along == "hour" and row.metric == "auc" for row in rows if row.along)
    # As after a kill between the run's end and the result: nothing is trained again.
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained twice"))
    assert {(row.metric, row.head): row.value for row in run(TrainPoint(), base, tmp_path) if not row.along} == pytest.approx(
        found, nan_ok=True
    )
    assert not (tmp_path / "snapshots").exists() and (tmp_path / "config.gin").is_file()


def test_a_point_that_is_stopped_has_no_result_and_goes_on(tmp_path: Path, sigterm_is_harmless: None) -> None:
    write_gin(tmp_path / "sweep.gin")
    points = [{"key": key, "overrides": [], "gin_files": FILES, "bindings": BINDINGS, "seed": 0} for key in ("a", "b")]
    write_json(tmp_path / "sweep.json", {"points": points})

    def stop() -> None:
        wait_for(lambda: is_training(tmp_path))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped):
        run_point(tmp_path, 0)
    thread.join()
    assert not is_finished(tmp_path, "a") and not (tmp_path / "points" / "a" / "failed.json").exists()
    assert attempts(tmp_path, "stopped") == [0] and not attempts(tmp_path, "end") and not attempts(tmp_path, "failed")
    saved = [int(path.name) for path in (tmp_path / "points/a/run/snapshots").iterdir() if path.name.isdigit()]
    assert saved and max(saved) < 500, "the run was not stopped in its middle, or what it learned is lost"
    run_point(tmp_path, 0)
    run_point(tmp_path, 1)
    assert rows_of(tmp_path, "a") == rows_of(tmp_path, "b"), "it went on from elsewhere than where it stopped"


def test_an_end_that_was_not_noted_is_noted(tmp_path: Path) -> None:
    points = write_results(tmp_path, {"a": ["x", "y", "z"]}, [0])
    for point in points[:2]:
        note(tmp_path, what="start", point=point["index"])
        write_result(tmp_path, point, ("auc", 0.5))
    note(tmp_path, what="end", point=0)
    for _ in range(2):
        note_lost_ends(tmp_path, [point["key"] for point in points])
    assert attempts(tmp_path, "end") == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_a_sweep_ended_while_points_train_gives_the_same_results(number: signal.Signals, tmp_path: Path) -> None:
    file = write_gin(tmp_path / "training.gin", "(0, 1)", "SyntheticConfig.num_examples = 30000")
    results = {}
    for name in ("whole", "ended"):
        argv = [sys.executable, "-m", "launch.sweep", f"--gin_file={file}", f"--workdir={tmp_path / name}"]
        if name == "ended":
            process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
            wait_for(lambda: is_training(tmp_path / "ended"), process)
            # Ctrl-C reaches all that a terminal started.
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            said, _ = process.communicate(timeout=60)
            assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
            assert number == signal.SIGKILL or "the same command goes on with them" in said
            assert not attempts(tmp_path / "ended", "failed") and "failed" not in said
            assert not attempts(tmp_path / "ended", "end")
        subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        keys = [point["key"] for point in read_json(tmp_path / name / "sweep.json")["points"]]
        results[name] = [rows_of(tmp_path / name, key) for key in keys]
    assert results["whole"] == results["ended"]
    assert sorted(attempts(tmp_path / "ended", "end")) == [0, 1]


@pytest.mark.slow
def test_a_job_that_dies_is_recorded(tmp_path: Path) -> None:
    # Not importorskip: how it is imported is a matter of `launch.sweeps.cluster`.
    if not find_spec("submitit"):
        pytest.skip("submitit is not installed")
    file, out = write_gin(tmp_path / "training.gin", "(0,)", "SyntheticConfig.num_examples = 6000000"), tmp_path / "out"
    argv = [f"--gin_file={file}", f"--workdir={out}", "--executor=submitit_local"]
    process = subprocess.Popen([sys.executable, "-m", "launch.sweep", *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: is_training(out), process)
    (line,) = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    os.kill(line["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    (key,) = [path.name for path in (out / "points").iterdir()]
    reason = read_json(out / "points" / key / "failed.json")["reason"]
    assert process.returncode == 1 and reason.startswith("job ") and f"failed: seed 0: {reason}" in said
    assert attempts(out, "failed") == [0] and not is_finished(out, key)


def test_a_curve_is_over_the_heads_that_have_every_hour() -> None:
    def row(hour: int, head: str, auc: float | None) -> dict[str, Any]:
        return {"period_start_ms": hour * 3_600_000, "head": head, "auc": auc, "log_loss": 0.5}

    rows = [row(5, "a", 0.6), row(5, "b", 0.8), row(6, "a", 0.7), row(6, "b", None), row(7, "a", 0.8), row(7, "b", 0.9)]
    curve = training_point._by_hour([*rows, {"period_start_ms": 5 * 3_600_000, "head": "ratio", "log_loss": None}])
    assert [(one.at, one.value) for one in curve] == [(0.0, 0.6), (1.0, 0.7), (2.0, 0.8)]
    assert training_point._by_hour([]) == []
