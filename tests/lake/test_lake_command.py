"""The command that writes the lake: what it is asked, what it refuses, and that it goes on after kill -9."""

import importlib.util
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from launch.lake import main
from tests.stream.event_log import Feed, make_world

ROOT = Path(__file__).parents[2]
needs_lake = pytest.mark.skipif(not importlib.util.find_spec("pypaimon"), reason="the extra lake is not installed")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def arguments(folder: Path, *jobs: str) -> list[str]:
    macros = (f"--gin.LOG=file://{folder}/log", f"--gin.WAREHOUSE={folder}/warehouse", "--gin.JoinerConfig.window_s=3.0")
    return [*jobs, "--gin_file=configs/train_lake.gin", f"--workdir={folder}/work", *macros]


@pytest.mark.parametrize(
    ("jobs", "more", "why"),
    [
        (("ingest", "ingest"), (), "name each job once"),
        (("show", "tidy"), (), "show or tag alone"),
        (("profiles",), (), "give --postgres"),
        (("tag",), (), "--name is missing"),
        (("tag",), ("--name=7",), "means a snapshot"),
        (("ingest",), ("--gin.Experiment.source=@LogConfig()",), "never used"),
        (("ingest",), ("--gin.LakeJobsConfig.commit_s=0.0",), "commit_s must be above 0"),
        (("ingest",), ("--gin.WAREHOUSE=",), "WarehouseConfig.path is empty"),
        (("ingest",), ("--gin.WarehouseConfig.options=(('s3.secret-key', 'x'),)",), "put keys into the environment"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: tuple[str, ...], more: tuple[str, ...], why: str
) -> None:
    assert main([*arguments(tmp_path, *jobs), *more]) == 1
    assert why in capsys.readouterr().err


def test_a_source_that_is_no_lake_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", "--gin_file=configs/online.gin", f"--workdir={tmp_path}"]) == 1
    assert "expected a LakeConfig" in capsys.readouterr().err


@pytest.mark.skipif(bool(importlib.util.find_spec("pypaimon")), reason="the extra lake is installed")
def test_without_the_extra_it_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "show")) == 1
    assert "pip install 'monolith_jax[lake]'" in capsys.readouterr().err


@needs_lake
def test_jobs_run_to_the_end_of_the_log_and_tell_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Feed(f"file://{tmp_path}/log")) as feed:
        feed.send_world(make_world(300))
    assert main([*arguments(tmp_path, "ingest", "examples"), "--until_end"]) == 0
    assert main([*arguments(tmp_path, "tidy"), "--until_end"]) == 0
    assert main([*arguments(tmp_path, "tag"), "--name=now"]) == 0
    capsys.readouterr()
    assert main(arguments(tmp_path, "show")) == 0
    shown = capsys.readouterr().out
    assert "examples" in shown and "300" in shown and "now" in shown


@needs_lake
def test_a_job_that_fails_ends_the_others_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Feed(f"file://{tmp_path}/log")) as feed:
        feed.send_world(make_world(50))
    assert main([*arguments(tmp_path, "ingest", "examples"), "--gin.LogConfig.actions=nothing"]) == 1
    assert "nothing" in capsys.readouterr().err


@needs_lake
def test_it_ends_well_when_it_is_told_to(tmp_path: Path) -> None:
    with closing(Feed(f"file://{tmp_path}/log")) as feed:
        feed.send_world(make_world(200))
    command = [sys.executable, "-m", "launch.lake", *arguments(tmp_path, "ingest")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("warehouse/lake.db/video_features/snapshot/snapshot-1")) and time.monotonic() < until:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    told, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and "ingest ended" in told, told
