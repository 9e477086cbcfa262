"""A point that compares models: what it measures, how it counts parameters, heads alone, and going on after a kill."""

import dataclasses
import math
from pathlib import Path

import pytest

from launch import run as training
from launch.points.measured import Base, Measured
from launch.points.towers import TowersPoint, dense_parameters, run, runs_of
from monolith_jax.evaluate.report import read
from monolith_jax.experiment import Experiment
from tests.test_flow import ROOT

FILES = tuple(str(ROOT / "configs" / name) for name in ("data/synthetic.gin", "models/shared_bottom.gin"))
BINDINGS = (
    "SyntheticConfig.live_users = 50",
    "SyntheticConfig.live_videos = 50",
    "SyntheticConfig.num_examples = 600",
    "Experiment.train = @TrainConfig()",
    "TrainConfig.batch_size = 100",
    "SharedBottomConfig.bottom_hidden = (6,)",
    "SharedBottomConfig.tower_hidden = (3,)",
    "Experiment.mesh = @MeshConfig()",
    "MeshConfig.num_devices = 1",
    "MeshConfig.cpu_devices = 8",  # as in all tests, should this process not have computed yet
    "MeshConfig.num_shards = 8",
    *(f"{name}/TableConfig.max_rows = 1000" for name in ("user", "video", "author", "sound")),
)
BASE = Base(FILES, BINDINGS, 0)


def by_name(rows: list[Measured]) -> dict[tuple[str, str], float]:
    """Returns values by metric and head."""
    return {(row.metric, row.head): row.value for row in rows}


def few_heads(experiment: Experiment) -> Experiment:
    """Returns an experiment with two binary heads of which 600 examples tell enough, and its regression."""
    of_label = {head.label: head for head in experiment.heads}
    return dataclasses.replace(experiment, heads=tuple(of_label[label] for label in ("complete", "skip", "play_ratio")))


@pytest.fixture(autouse=True)
def with_few_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Base.load
    monkeypatch.setattr(Base, "load", lambda base, *more: few_heads(whole(base, *more)))


@pytest.mark.parametrize("separately", [False, True])
def test_a_point_measures_each_head_and_counts_what_was_learned(tmp_path: Path, separately: bool) -> None:
    found = by_name(run(TowersPoint(separately), BASE, tmp_path))
    experiment = BASE.load()
    binary = [head.label for head in experiment.heads[:2]]
    regression = experiment.heads[2].label
    expected = {(metric, head) for metric in ("auc", "gauc", "log_loss") for head in (*binary, "mean")}
    counts = {(name, "") for name in ("dense_parameters", "table_parameters", "rows")}
    assert found.keys() == expected | {("rmse", regression)} | counts
    for metric in ("auc", "gauc", "log_loss"):
        assert found[metric, "mean"] == pytest.approx(sum(found[metric, head] for head in binary) / 2)
    folders = [f"alone_{head.label}" for head in experiment.heads] if separately else ["together"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folders)
    runs = [read(tmp_path / name) for name in folders]
    assert found["rows", ""] == sum(one.summary["rows"] for one in runs)
    assert found["table_parameters", ""] == found["rows", ""] * experiment.tables[0].dim
    totals = {row["head"]: row["auc"] for one in runs for row in one.totals if "auc" in row}
    assert {head: found["auc", head] for head in binary} == totals
    assert not list(tmp_path.rglob("snapshots")), "a sweep of many points would fill the disk"


def test_parameters_are_those_of_the_layers() -> None:
    together, alone = (runs_of(TowersPoint(separately), BASE.load()) for separately in (False, True))
    (whole,) = together.values()
    tasks = 3

    def tower(number: int) -> int:
        return number * (6 * 3 + 3 + 3 + 1)

    bottom = dense_parameters(whole) - tower(tasks)
    assert bottom > 0 and (bottom - 6) % 6 == 0
    assert [dense_parameters(one) for one in alone.values()] == [bottom + tower(1)] * tasks
    assert [one.heads for one in alone.values()] == [(head,) for head in whole.heads]
    assert {one.features for one in alone.values()} == {whole.features}


def test_runs_that_ended_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train(experiment: Experiment, workdir: Path, console: object) -> None:
        trained.append(workdir.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        workdir.mkdir(parents=True)
        label, tables = experiment.heads[0].label, '{"kind": "summary", "rows": 7}'
        quality = '"auc": 0.75, "gauc": null, "log_loss": 0.5' if experiment.heads[0].kind == "binary" else '"rmse": 2.0'
        (workdir / "metrics.jsonl").write_text(f'{{"kind": "total", "head": "{label}", {quality}}}\n{tables}\n')

    monkeypatch.setattr(training, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(TowersPoint(True), BASE, tmp_path)
    first, second, third = (f"alone_{head.label}" for head in BASE.load().heads)
    assert trained == [first, second]
    found = by_name(run(TowersPoint(True), BASE, tmp_path))
    assert trained == [first, second, second, third]
    assert found["auc", "mean"] == 0.75 and math.isnan(found["gauc", "mean"]) and found["rows", ""] == 21


def test_a_run_that_was_stopped_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(experiment: Experiment, workdir: Path, console: object) -> None:
        workdir.mkdir(parents=True)
        (workdir / "metrics.jsonl").write_text("")

    monkeypatch.setattr(training, "train", train)
    with pytest.raises(ValueError, match=r"the run was stopped before its end"):
        run(TowersPoint(), BASE, tmp_path)


def test_an_experiment_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Experiment.heads is empty"):
        runs_of(TowersPoint(), dataclasses.replace(BASE.load(), heads=()))
