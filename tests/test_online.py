"""Online training from a log: killed anywhere, it learns what a run that nobody interrupted learns from the same cuts."""

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.bench import kill
from launch.bench.kafka_broker import Broker, free_port
from launch.identity import identity
from launch.readers import corrected_heads
from launch.run import assemble, train
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


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_runs_lose_and_repeat_nothing(tmp_path: Path, log: str, number: int) -> None:
    partitions = "TrainConfig.partitions = 2"
    for step in (12, 30):
        assert kill_at(launch(tmp_path / "run", log, number, partitions), tmp_path / "run", step)
    assert "going on from the snapshot" in done(launch(tmp_path / "run", log, number, partitions))[0]
    found = summary(tmp_path / "run")
    assert (found["examples"], found["rejected"]) == (IMPRESSIONS, {})
    assert found["stream"]["late_impressions"] == found["stream"]["late_or_orphan_actions"] == 0
    assert_equals_replay(tmp_path / "run", tmp_path / "replay", log, number, partitions)


def test_from_kafka_too_and_through_the_death_of_its_broker(tmp_path: Path, mortal_broker: Broker) -> None:
    url = mortal_broker.url
    with closing(Feed(url)) as feed:
        feed.send_world(make_world(IMPRESSIONS))
    assert kill_at(launch(tmp_path / "run", url, 1), tmp_path / "run", 24)
    (tmp_path / "run" / "config.gin").unlink()
    processes = launch(tmp_path / "run", url, 1)
    kill.wait_for_training(processes[0], tmp_path / "run")
    mortal_broker.kill()
    time.sleep(0.5)
    mortal_broker.start()
    assert "going on from the snapshot" in done(processes)[0]
    assert (summary(tmp_path / "run")["examples"], summary(tmp_path / "run")["rejected"]) == (IMPRESSIONS, {})
    assert_equals_replay(tmp_path / "run", tmp_path / "replay", url, 1)


def test_a_run_without_events_ends_when_it_is_told(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/log"
    with closing(Feed(url)) as feed:
        feed.send_world(make_world(200))
    (process,) = launch(tmp_path / "run", url, 1, "LogConfig.ends = False", "LogConfig.idle_s = 0.2", "TrainConfig.steps = 0")
    until = time.monotonic() + 100
    while not kill.rows_of(tmp_path / "run") and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    time.sleep(2.0)  # Nothing comes any more.
    process.terminate()
    began = time.monotonic()
    (out,) = done([process])
    assert "stopped by SIGTERM after step" in out and time.monotonic() - began < 20
    # What was open is joined when more comes.
    with closing(Feed(url)) as feed:
        later = make_world(200, seed=1)
        for row in (*later.impressions, *later.actions):
            row.update(event_time_ms=row["event_time_ms"] + 3_600_000, request_id=row["request_id"] + 1000)
        feed.send_world(later)
    done(launch(tmp_path / "run", url, 1))
    assert summary(tmp_path / "run")["examples"] == 400


PLAIN = """
include 'configs/models/deepfm.gin'
Experiment.source = @LogConfig()
LogConfig.url = %LOG
LogConfig.joiner = @JoinerConfig()
LogConfig.ends = True
LogConfig.idle_s = 1.0
LogConfig.poll_bytes = 10_000
JoinerConfig.window_s = 3.0
Experiment.features = (@user/IdFeatureConfig(), @video/IdFeatureConfig())
user/IdFeatureConfig.name = 'user'
user/IdFeatureConfig.column = 'user_id'
user/IdFeatureConfig.table = 'user'
video/IdFeatureConfig.name = 'video'
video/IdFeatureConfig.column = 'video_id'
video/IdFeatureConfig.table = 'video'
Experiment.tables = (@user/TableConfig(), @video/TableConfig())
user/TableConfig.name = 'user'
user/TableConfig.max_rows = 100
video/TableConfig.name = 'video'
video/TableConfig.max_rows = 4000
TableConfig.dim = 4
Experiment.heads = (@like/HeadConfig(), @skip/HeadConfig())
like/HeadConfig.label = 'like'
skip/HeadConfig.label = 'skip'
Experiment.train = @TrainConfig()
TrainConfig.batch_size = 64
TrainConfig.log_every = 1
Experiment.mesh = @MeshConfig()
MeshConfig.num_devices = 1
MeshConfig.num_shards = 8
"""
"""Features without histories."""


def run_here(workdir: Path, log: str, *overrides: str) -> dict[str, Any]:
    """Trains in this process; returns the summary."""
    (file := workdir.parent / "plain.gin").write_text(PLAIN)
    train(load([file], [f"LOG = '{log}'", *overrides]), workdir, Console(file=io.StringIO(), width=200))
    return summary(workdir)


def test_at_once_each_impression_is_learned_and_each_first_action_again(tmp_path: Path, log: str) -> None:
    world = make_world(IMPRESSIONS)
    kinds = {(row["request_id"], row["video_id"], row["action"]) for row in world.actions}
    found = run_here(tmp_path / "run", log, "JoinerConfig.emit = 'at_once'")
    assert found["examples"] == IMPRESSIONS + len(kinds)
    likes = sum(row["like"] for row in world.examples.values()) / IMPRESSIONS
    (row,) = (row for row in rows_of(tmp_path / "run") if row["kind"] == "total" and row["head"] == "like")
    # Predictions are of the impressions, of which 40 % are liked; so are 28 % of the examples that tell whether.
    assert abs(row["calibration"] * row["positives"] / row["examples"] - likes) < 0.09


def test_sampled_negatives_leave_predictions_where_they_were(tmp_path: Path, log: str) -> None:
    world = make_world(IMPRESSIONS)
    likes = sum(row["like"] for row in world.examples.values())
    found = run_here(tmp_path / "run", log, "JoinerConfig.positive = 'like'", "JoinerConfig.negative_rate = 0.25")
    assert abs(found["examples"] - likes - 0.25 * (IMPRESSIONS - likes)) < 80
    assert found["stream"]["negatives_dropped"] == IMPRESSIONS - found["examples"]
    (row,) = (row for row in rows_of(tmp_path / "run") if row["kind"] == "total" and row["head"] == "like")
    assert row["positives"] == likes
    assert abs(row["calibration"] * row["positives"] / row["examples"] - likes / IMPRESSIONS) < 0.06


def rows_of(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_impressions_shown_twice_go_with_neither_histories_nor_counters(tmp_path: Path, log: str) -> None:
    experiment = load(["configs/online.gin"], bindings(log, "JoinerConfig.emit = 'at_once'"))
    with pytest.raises(ValueError, match="they would count it twice, and show the model what it is to predict"):
        assemble(experiment)


def test_heads_take_the_corrections_that_the_joiner_makes_necessary(log: str) -> None:
    sampled = load(["configs/online.gin"], bindings(log, "JoinerConfig.positive = 'like'", "JoinerConfig.negative_rate = 0.25"))
    assert {head.label: head.negative_rate for head in corrected_heads(sampled) if head.negative_rate < 1} == {"like": 0.25}
    early = load(["configs/online.gin"], bindings(log, "JoinerConfig.emit = 'at_once'"))
    labels = {head.label for head in corrected_heads(early) if head.early_negatives}
    assert labels == {"like", "comment", "share", "follow", "profile", "dislike"}
