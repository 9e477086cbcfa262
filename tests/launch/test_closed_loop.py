"""The closed loop, end to end: what is shown is logged, what is logged is learned, once and as it was seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from launch import closed_loop, evaluate
from launch.closed_loop import checked, close_loop
from launch.loop.report import POLICIES, draw, table
from launch.loop.trainer import Trainer
from launch.points.closed_loop import CURVES, ClosedLoopPoint, measured
from launch.points.measured import Base
from launch.run import alone
from monolith_jax import reader
from monolith_jax.experiment import to_gin
from monolith_jax.serve.pipeline import Pipeline
from monolith_jax.stream import world
from monolith_jax.stream.kuairand import KuaiRandConfig
from monolith_jax.stream.synthetic import examples_of
from tests.launch.small_loop import CONFIG, POINT, SMALL, run, small

ROOT = CONFIG.parent.parent


class Run(NamedTuple):
    """A loop that has run, and what passed through it."""

    folder: Path
    rows: list[dict[str, Any]]
    shown: list[pa.RecordBatch]
    """Impressions, by feed."""
    trained: list[pa.RecordBatch]
    """Examples that the online trainer made features of, by batch."""


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder, shown, trained = tmp_path_factory.mktemp("loop"), [], []
    recommend, featurize = Pipeline.recommend, reader.featurize

    def recommended(self: Pipeline, request: Any) -> Any:
        feed = recommend(self, request)
        shown.append(feed.impressions)
        return feed

    def featurized(examples: pa.RecordBatch, layout: Any) -> Any:
        if "position" in examples.schema.names:
            trained.append(examples)
        return featurize(examples, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "recommend", recommended)
        patch.setattr(reader, "featurize", featurized)
        rows = run(folder)
    yield Run(folder, rows, shown, trained)


def keys(batch: pa.RecordBatch) -> list[tuple[int, int]]:
    return list(zip(batch.column("request_id").to_pylist(), batch.column("video_id").to_pylist(), strict=True))


def system_row(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "closed_loop.jsonl").read_text().splitlines()[-1])


def test_every_impression_is_learned_exactly_once(loop: Run) -> None:
    shown, trained = (pa.concat_batches(batches) for batches in (loop.shown, loop.trained))
    learned = keys(trained)
    assert len(set(learned)) == len(learned) > 100
    # All those whose window has closed: the later ones still wait for what may follow.
    assert set(learned) == set(keys(shown)[: len(learned)])
    told = system_row(loop.folder)
    assert told["shown"] == shown.num_rows and told["learned"] == told["learnable"] == len(learned)
    assert told["faults"] == 0
    last = [json.loads(line) for line in (loop.folder / "online" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["examples"] == len(learned)
    for name in ("late_impressions", "late_or_orphan_actions", "unknown_actions", "duplicates", "dropped_impressions"):
        assert last[name] == 0, name


def test_features_are_learned_as_they_were_served(loop: Run) -> None:
    shown, trained = (pa.concat_batches(batches) for batches in (loop.shown, loop.trained))
    rows = {key: row for row, key in enumerate(keys(shown))}
    served = shown.take(pa.array([rows[key] for key in keys(trained)]))
    logged = served.schema.names
    assert {"history_video_id", "history_tag_id", "positive_video_id", "content", "tag_id", "duration_ms"} <= set(logged)
    for name in logged:
        assert trained.column(name).to_pylist() == served.column(name).to_pylist(), name
    assert sum(map(len, served.column("history_video_id").to_pylist())) > trained.num_rows


def test_labels_are_the_world_s(loop: Run) -> None:
    config, _ = checked(small())
    trained = pa.concat_batches(loop.trained)
    user, video = (
        world.indexes_of(config.seed, space, trained.column(f"{space}_id").to_numpy()) for space in ("user", "video")
    )
    truth = examples_of(config, trained.column("event_time_ms").to_numpy(), user, video)
    for name in ("play_time_ms", "dwell_ms", "like", "click", "comment"):
        none = 0 if name.endswith("_ms") else False
        assert [one or none for one in trained.column(name).to_pylist()] == truth.column(name).to_pylist(), name


def test_the_next_feed_has_the_last_actions_in_its_history(loop: Run) -> None:
    users: dict[int, list[pa.RecordBatch]] = {}
    for batch in loop.shown:
        users.setdefault(batch.column("user_id")[0].as_py(), []).append(batch)
    told = 0
    for feeds in users.values():
        for before, after in pairwise(feeds):
            if after.column("event_time_ms")[0].as_py() > before.column("event_time_ms")[0].as_py() + 600_000:
                history = after.column("history_video_id")[0].as_py()
                assert set(before.column("video_id").to_pylist()) <= set(history[:5])
                told += 1
    assert told > 3


def test_nothing_is_shown_twice(loop: Run) -> None:
    shown = pa.concat_batches(loop.shown)
    pairs = list(zip(*(shown.column(name).to_pylist() for name in ("user_id", "video_id")), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert all(row["repeated"] == 0 for row in loop.rows)


def test_rows_are_as_they_should_be(loop: Run) -> None:
    hours = [row for row in loop.rows if row["kind"] == "hour"]
    assert [(row["hour"], row["policy"]) for row in hours] == [(hour, name) for hour in range(3) for name in POLICIES]
    for hour in range(3):
        of = {row["policy"]: row for row in hours if row["hour"] == hour}
        assert len({row["feeds"] for row in of.values()}) == 1
        assert all(of["oracle"]["reward"] > row["reward"] for name, row in of.items() if name != "oracle")
        assert all(row["regret"] > 0 for name, row in of.items() if name != "oracle")
        assert of["oracle"]["regret"] == pytest.approx(0, abs=1e-12)
    totals = {row["policy"]: row for row in loop.rows if row["kind"] == "total"}
    assert totals["system"]["reward"] > totals["random"]["reward"]
    written = [json.loads(line) for line in (loop.folder / "closed_loop.jsonl").read_text().splitlines()]
    assert written[:-1] == loop.rows and written[-1]["kind"] == "system"
    assert table(loop.rows).row_count == 4


def test_versions_follow_what_is_learned(loop: Run) -> None:
    manifests = [json.loads(path.read_text()) for path in (loop.folder / "deltas").glob("*/manifest.json")]
    steps = {manifest["step"] for manifest in manifests if manifest["version"][0] == 2}
    assert max(steps) == system_row(loop.folder)["steps"] > 5


def test_a_point_gives_curves_and_totals(loop: Run) -> None:
    found = measured(loop.rows)
    assert {one.metric for one in found} == set(CURVES) and {one.head for one in found} == set(POLICIES)
    curve = [one for one in found if one.along == "hour" and (one.metric, one.head) == ("regret", "system")]
    assert [one.at for one in curve] == [0.0, 1.0, 2.0]
    whole = [one for one in found if not one.along]
    assert len(whole) == len(CURVES) * len(POLICIES) and all(np.isnan(one.at) for one in whole)


def test_figure_is_drawn(loop: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(loop.rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_same_seed_gives_the_same_rows(loop: Run, tmp_path: Path) -> None:
    again = run(tmp_path)
    assert [row for row in again if row["policy"] != "system"] == [row for row in loop.rows if row["policy"] != "system"]
    mine, theirs = ([row for row in rows if row["policy"] == "system"] for rows in (again, loop.rows))
    # The last bits of sums may differ, and with them now and then what is best of two that are much alike.
    assert [row["reward"] for row in mine] == pytest.approx([row["reward"] for row in theirs], rel=0.02)
    other = run(tmp_path, replace(POINT, hours=1), seed=1)
    assert other[0]["feeds"] != loop.rows[0]["feeds"] or other[0]["reward"] != loop.rows[0]["reward"]


@pytest.mark.slow
def test_point_in_a_sweep_starts_afresh(tmp_path: Path) -> None:
    from launch.points.closed_loop import run as run_point

    (tmp_path / "log" / "impressions" / "7").mkdir(parents=True)
    (tmp_path / "online").mkdir()
    (tmp_path / "online" / "metrics.jsonl").write_text("half of a li")
    (tmp_path / "closed_loop.jsonl").write_text("{half of a li")
    point = replace(POINT, hours=1, learns=False)
    found = run_point(point, Base((str(CONFIG),), SMALL, 3), tmp_path)
    assert {one.at for one in found if one.along} == {0.0}
    assert system_row(tmp_path)["learned"] == 0 and not (tmp_path / "online").exists()


@pytest.mark.parametrize(
    ("experiment", "match"),
    [
        (replace(small(), serving=None), "needs a ranker and a way to serve"),
        (replace(small(), model=None), "needs a ranker and a way to serve"),
        (replace(small(), source=KuaiRandConfig(folder="x")), "a KuaiRandConfig; only a synthetic world"),
        (small("Experiment.counters = @CountersConfig()", "CountersConfig.labels = ('like',)"), "do not log counters"),
        (small("SyntheticConfig.start_ms = 4000000000000"), "in the future"),
    ],
)
def test_what_is_no_loop_is_refused(experiment: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        close_loop(experiment, POINT, tmp_path / "new", Console(quiet=True))
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "deltas").mkdir()
    with pytest.raises(ValueError, match="has deltas of something else"):
        close_loop(small(), POINT, tmp_path, Console(quiet=True))
    assert (tmp_path / "deltas").exists()


def test_two_loops_do_not_share_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(ValueError, match="another process trains in"):
        close_loop(small(), POINT, tmp_path, Console(quiet=True))
    assert not (tmp_path / "closed_loop.jsonl").exists()


@pytest.mark.parametrize("field", [{"hours": 0}, {"sync_s": -1.0}, {"requests_per_hour": float("nan")}, {"warm_hours": 0.0}])
def test_point_out_of_range_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ClosedLoopPoint.{next(iter(field))} must be"):
        ClosedLoopPoint(**field)


def waiting_trainer(monkeypatch: pytest.MonkeyPatch, train: Any, timeout_s: float = 0.2) -> Trainer:
    monkeypatch.setattr("launch.loop.trainer.train", train)
    return Trainer(small(), Path("nowhere"), timeout_s)


def test_a_trainer_that_brings_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    trainer = waiting_trainer(monkeypatch, lambda *_: free.wait(10))
    with pytest.raises(ValueError, match=r"brought nothing for 0.2 s: examples is at 0, expected 7.*nowhere.*timeout_s"):
        trainer.wait("examples", lambda: trainer.examples, 7)
    free.set()
    trainer.stop()


def test_slow_progress_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    free, began_s = threading.Event(), time.monotonic()
    trainer = waiting_trainer(monkeypatch, lambda *_: free.wait(10))
    trainer.wait("time", lambda: int(10 * (time.monotonic() - began_s)), 6)
    assert time.monotonic() - began_s > 0.5
    free.set()
    trainer.stop()


def test_what_ends_the_trainer_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise FloatingPointError("the loss of step 3 is nan")

    trainer = waiting_trainer(monkeypatch, fails)
    with pytest.raises(FloatingPointError, match="step 3 is nan"):
        trainer.wait("examples", lambda: 0, 1)
    trainer.stop()
    with pytest.raises(FloatingPointError, match="step 3 is nan"):
        waiting_trainer(monkeypatch, fails).stop()  # Nobody was told yet.
    ended = waiting_trainer(monkeypatch, lambda *_: None)
    with pytest.raises(RuntimeError, match="ended by itself"):
        ended.wait("examples", lambda: 0, 1)


def command(folder: Path, *more: str) -> list[str]:
    gin = [f"--gin.{binding.replace(' = ', '=')}" for binding in SMALL]
    return [sys.executable, "-m", "launch.closed_loop", f"--gin_file={CONFIG}", f"--workdir={folder}", *gin, *more]


def test_help_and_bad_input() -> None:
    told = subprocess.run([sys.executable, "-m", "launch.closed_loop", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and closed_loop.EXAMPLE in told.stdout and "--requests_per_hour" in told.stdout
    with pytest.raises(SystemExit):
        closed_loop.main(["--gin_file=x", "--workdir=y", "--hour=3"])


def test_a_config_that_cannot_serve_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [f"--gin_file={ROOT / 'configs' / 'quickstart.gin'}", f"--workdir={tmp_path}"]
    assert closed_loop.main(asked) == 1
    assert "needs a ranker and a way to serve" in capsys.readouterr().err
    assert closed_loop.main([*asked, "--hours=0"]) == 1
    assert "ClosedLoopPoint.hours" in capsys.readouterr().err


@pytest.mark.slow
def test_command_ends_in_good_order_when_it_is_told_to(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, "--hours=20", "--warm_hours=2"),
        cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    rows, until = tmp_path / "closed_loop.jsonl", time.monotonic() + 240
    while not (rows.exists() and rows.read_text().count("\n") >= 8):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "the rows so far are in closed_loop.jsonl" in told
    assert list((tmp_path / "online" / "snapshots").iterdir())


@pytest.mark.slow
def test_command_prints_table_figure_and_numbers(tmp_path: Path) -> None:
    told = subprocess.run(
        command(tmp_path, "--hours=2", "--warm_hours=2", "--requests_per_hour=40"), cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["oracle_reward"] > found["system_reward"] and 0 < found["advantage"] < 1
    assert "popularity" in told.stdout and (tmp_path / "closed_loop.png").exists()


def test_evaluate_closes_the_loop_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"--workdir={tmp_path}", "--loop=1"]) == 1
    assert "has no config.gin" in capsys.readouterr().err
    (tmp_path / "config.gin").write_text(to_gin(replace(small(), serving=None)), encoding="utf-8")
    assert evaluate.main([f"--workdir={tmp_path}", "--loop=1"]) == 1
    assert "the loop needs a ranker and a way to serve" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_writes_the_loop_beside_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.gin").write_text(to_gin(small()), encoding="utf-8")
    assert evaluate.main([f"--workdir={tmp_path}", "--loop=1"]) == 0
    assert "oracle" in capsys.readouterr().out and (tmp_path / "report" / "loop" / "closed_loop.jsonl").is_file()
