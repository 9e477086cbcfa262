"""Sweeps that run: in worker processes, killed and gone on, over their limits, failing, and as a job array."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch import sweep
from launch.sweeps.config import Sweep
from launch.sweeps.folder import is_finished, locked, read_json
from launch.sweeps.pool import Pool, held_bytes
from launch.sweeps.worker import run_point
from tests.launch.small_sweep import ROOT, attempts, write_sweep

SHORT = {"axes": "(@method/AxisConfig(),)", "seeds": "(0,)"}


@pytest.fixture(autouse=True)
def from_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def one_axis(tmp_path: Path, **changed: str) -> Path:
    """A sweep of the two methods alone."""
    path = write_sweep(tmp_path, **{**SHORT, **changed})
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("rate/")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def command(file: Path, workdir: Path, *more: str) -> list[str]:
    return [f"--gin_file={file}", f"--workdir={workdir}", *more]


def test_it_runs_and_the_same_command_runs_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(one_axis(tmp_path), tmp_path / "out")
    assert sweep.main(argv) == 0
    said = capsys.readouterr().out
    assert "2 of 2 points finished" in said and "Figures" in said and "Against method popularity" in said
    out = tmp_path / "out"
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert {row["method"] for row in rows} == {"popularity", "EASE"} and all(row["seed"] == 0 for row in rows)
    assert (out / "results.md").is_file() and (out / "report.html").is_file()
    plan = read_json(out / "sweep.json")
    assert plan["versions"]["jax"] and plan["machine"]["cores"] >= 1 and "launch.sweep" in plan["command"]
    assert all((out / "points" / point["key"] / "config.gin").is_file() for point in plan["points"])
    assert sweep.main(argv) == 0 and "2 of 2 points are finished and stay" in capsys.readouterr().out
    assert sorted(attempts(out, "start")) == [0, 1]


def test_another_sweep_or_another_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = one_axis(tmp_path)
    out = tmp_path / "out"
    assert sweep.main(command(file, out)) == 0
    capsys.readouterr()
    assert sweep.main(command(file, out, "--gin.Sweep.seeds=(0,1)")) == 1
    assert "holds another sweep" in (said := capsys.readouterr().err) and "-Sweep.seeds = (0,)" in said
    assert sweep.main(command(file, out, "--gin.TableConfig.dim=64")) == 1
    assert "with another configuration" in (said := capsys.readouterr().err) and "TableConfig.dim = 64" in said
    assert sweep.main(command(file, out, "--gin.Sweep.workers=1", "--gin.Sweep.metrics=('ndcg_at_20',)")) == 0
    assert "ndcg_at_20" in capsys.readouterr().out
    with locked(out / ".lock"):
        probe = [sys.executable, "-m", "launch.sweep", *command(file, out)]
        done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "another process drives the sweep in" in done.stderr


def test_a_point_that_fails_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = one_axis(tmp_path)
    text = file.read_text(encoding="utf-8")
    text = text.replace("('RetrievalPoint.method',)", "('RetrievalPoint.method', 'RetrievalPoint.data')")
    values = f"(('popularity', '{tmp_path / 'none'}'), ('ease', '{tmp_path / 'data'}'))"
    text = text.replace("(('popularity',), ('ease',))", values)
    file.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    assert sweep.main(command(file, out)) == 1
    said = capsys.readouterr().out
    assert "failed: method popularity, seed 0: ValueError" in said and "has no interactions.parquet" in said
    assert "1 of 2 points are not finished" in said and "Without a result" in said
    assert attempts(out, "failed") == [0] and attempts(out, "end") == [1]
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "none").symlink_to(tmp_path / "moved")
    assert sweep.main(command(file, out)) == 0
    assert attempts(out, "end") == [1, 0] and attempts(out, "start").count(1) == 1


@pytest.mark.parametrize(("limit", "said"), [("memory_gb", "more than Sweep.memory_gb 0.05"), ("timeout_s", "took more than")])
def test_a_worker_over_its_limit_is_ended(limit: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert sweep.main(command(one_axis(tmp_path, **{limit: "0.05"}), out)) == 1
    assert capsys.readouterr().out.count(said) >= 2
    assert not attempts(out, "end")
    assert held_bytes(os.getpid()) > 1e7 and held_bytes(2**22 + 1) == 0


def alive(workdir: Path) -> list[int]:
    """Returns the processes whose command line names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(workdir).encode() in words and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def ended_when(workdir: Path, number: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 200
    while time.monotonic() < until:
        if (workdir / "attempts.jsonl").is_file() and len(attempts(workdir, "end")) >= number:
            return
        assert process.poll() is None, "the sweep ended before it was killed"
        time.sleep(0.05)
    raise AssertionError("the sweep does not come forward")


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_in_the_middle_it_goes_on_and_runs_no_point_twice(kills: int, tmp_path: Path) -> None:
    # 2 x 3 x 3 points.
    file, out = write_sweep(tmp_path), tmp_path / "out"
    argv = [sys.executable, "-m", "launch.sweep", *command(file, out)]
    for kill in range(kills):
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ended_when(out, 3 * kill + 3, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until = time.monotonic() + 10
        while alive(out) and time.monotonic() < until:
            time.sleep(0.05)
        assert not alive(out), "workers outlive the sweep"
    finished = sorted(attempts(out, "end"))
    started = {point: attempts(out, "start").count(point) for point in finished}
    subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    keys = [point["key"] for point in read_json(out / "sweep.json")["points"]]
    assert len(keys) == 18 and all(is_finished(out, key) for key in keys), "none is lost"
    assert sorted(attempts(out, "end")) == list(range(18)), "none ends twice"
    assert all(attempts(out, "start").count(point) == number for point, number in started.items()), "what ended is not started"
    table = pq.read_table(out / "results.parquet")
    assert len(set(zip(*(table.column(name).to_pylist() for name in ("method", "rate", "seed")), strict=True))) == 18


def test_sigterm_ends_it_in_good_order(tmp_path: Path) -> None:
    file, out = write_sweep(tmp_path), tmp_path / "out"
    argv = [sys.executable, "-m", "launch.sweep", *command(file, out)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    ended_when(out, 1, process)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on with them" in said and not alive(out)


def test_as_a_job_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Not importorskip: how it is imported is a matter of `launch.sweeps.cluster`.
    if not find_spec("submitit"):
        pytest.skip("submitit is not installed")
    file, out = one_axis(tmp_path), tmp_path / "out"
    assert sweep.main(command(file, out, "--executor=submitit_local", "--executor_options=timeout_min=3")) == 0
    assert sorted(attempts(out, "end")) == [0, 1] and "2 of 2 points finished" in capsys.readouterr().out
    keys = [point["key"] for point in read_json(out / "sweep.json")["points"]]
    (out / "points" / keys[0] / "result.json").unlink()
    assert sweep.main(command(file, out, "--executor=submitit_local", "--executor_options=nonsense")) == 1
    assert "expected NAME=VALUE by commas, got 'nonsense'" in capsys.readouterr().err
    assert sweep.main(command(file, out, "--executor=submitit_local", "--executor_options=no_such_option=1")) == 1
    assert "no_such_option" in capsys.readouterr().err
    assert json.loads((out / "sweep.json").read_text(encoding="utf-8"))["points"][0]["key"] == keys[0]


def test_submitit_leaves_the_handlers_of_others_alone() -> None:
    if not find_spec("submitit"):
        pytest.skip("submitit is not installed")
    code = """
import io, logging, os, sys
stream = sys.stderr = io.StringIO()
from absl import logging as absl_logging
absl_logging.use_absl_handler()
sys.stderr = sys.__stderr__
from launch.sweeps.cluster import import_submitit
import_submitit()
print(stream.closed, "SUBMITIT_LOG_LEVEL" in os.environ)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], "absl's stream is open, and no variable of ours is left"


def test_files_that_change_meanwhile_and_odd_words_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = one_axis(tmp_path, axes="()", name="'[/x] [y]'"), tmp_path / "out"
    other = tmp_path / "other.gin"
    other.write_text(f"include '{ROOT}/configs/tiktok.gin'\nTrainConfig.steps = 3\n")
    text = file.read_text(encoding="utf-8").replace("'configs/tiktok.gin'", f"'{other}'").replace("Sweep.baseline", "# ")
    file.write_text("\n".join(line for line in text.splitlines() if not line.startswith("method/")), encoding="utf-8")
    data = f"--gin.RetrievalPoint.data={tmp_path}/[/no] [such]"
    assert sweep.main(command(file, out, "--gin.RetrievalPoint.method=popularity", data)) == 1
    assert "[/no] [such] has no interactions.parquet" in capsys.readouterr().out
    (out / "points" / "0000-seed0" / "config.gin").write_text("# Another text.", encoding="utf-8")
    with pytest.raises(ValueError, match="no longer those that the sweep began with"):
        run_point(out, 0)


def test_no_more_workers_than_have_cores_and_memory(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))

    def workers(**limits: float) -> int:
        return len(Pool(Sweep(name="s", gin_files=(), **limits), tmp_path, []).free)  # pyright: ignore[reportArgumentType]

    assert workers(memory_gb=1e-6) == cores and workers(memory_gb=1e9) == 1
    assert workers(workers=5) == 5 and workers(cores=cores, memory_gb=1e-6) == 1
    with pytest.raises(ValueError, match="this machine has"):
        workers(cores=cores + 1)
