"""The command: a run and its export are judged alike, as the trainer's own test was; every part writes its rows."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import evaluate
from launch.evaluation import written
from launch.evaluation.feed import STAGES
from launch.evaluation.held_out import test_files as files_held_out
from launch.export import export
from monolith_jax.evaluate import report
from monolith_jax.experiment import load
from tests.launch import judged_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(judged_run.ROOT)
        return judged_run.trained(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export(run, run.parent / "exported", "float32")
    return run.parent / "exported"


def rows_of(folder: Path, part: str, kind: str = "") -> list[dict[str, Any]]:
    return [dict(row) for row in written.read(folder, part) if not kind or row["kind"] == kind]


def test_a_run_and_its_export_have_the_auc_of_the_trainers_test(run: Path, exported: Path, tmp_path: Path) -> None:
    flags = ["--ranking", "--bootstrap=20", "--segments=new_user,new_video,activity,duration_ms,tag_id"]
    assert evaluate.main([f"--workdir={run}", *flags]) == 0
    # The export may be read-only: nothing is written there.
    assert evaluate.main([f"--workdir={exported}", f"--output={tmp_path}", "--no-figures", *flags]) == 0
    of_run, of_export = rows_of(run / "report", "ranking", "ranking"), rows_of(tmp_path, "ranking", "ranking")
    assert of_run == of_export and not (exported / "report").exists()
    tests = {row["head"]: row for row in report.read(run).tests}
    whole = {row["head"]: row for row in of_run if row["segment"] == "all"}
    assert set(whole) == set(tests)
    for head, test in tests.items():
        for name in ("auc", "log_loss", "calibration", "rmse"):
            if test.get(name) is not None:
                assert whole[head][name] == pytest.approx(test[name], abs=1e-6), (head, name)
    for segment in ("new_user", "new_video", "activity", "duration_ms", "tag_id"):
        parts = [row for row in of_run if row["segment"] == segment and row["head"] == "like"]
        assert sum(row["examples"] for row in parts) == whole["like"]["examples"] and parts
    like = whole["like"]
    assert like["auc_low"] <= like["auc"] <= like["auc_high"]
    curve = [row for row in rows_of(run / "report", "ranking", "calibration") if row["head"] == "like"]
    assert sum(row["examples"] for row in curve) == like["examples"]
    assert (run / "report" / "reliability.png").stat().st_size > 1000
    (told,) = rows_of(run / "report", "ranking", "evaluated")
    assert told["step"] == judged_run.STEPS


def test_retrieval_is_judged_beside_popularity(run: Path, tmp_path: Path) -> None:
    written.write(tmp_path, "retrieval", [{"kind": "retrieval", "by": "an earlier one"}], {})
    written.write(tmp_path, "ranking", [{"kind": "ranking"}], {})
    assert evaluate.main([f"--workdir={run}", f"--output={tmp_path}", "--retrieval", "--k=5,20", "--bootstrap=10"]) == 0
    assert len(rows_of(tmp_path, "ranking")) == 2, "rows of other parts stay"
    rows = rows_of(tmp_path, "retrieval", "retrieval")
    assert [(row["by"], row["k"]) for row in rows] == [(by, k) for by in ("two_tower", "popularity") for k in (5, 20)]
    for short, long in (rows[:2], rows[2:]):
        assert 0 <= short["recall"] <= long["recall"] <= 1 and short["hit_rate"] <= long["hit_rate"]
        assert short["recall_low"] <= short["recall"] <= short["recall_high"]
        assert 0 < short["coverage"] <= 1 and short["novelty"] > 0 and -1 <= short["intra_list_diversity"] <= 2
        assert short["users"] <= judged_run.WORLD.live_users * 2 and short["wanted"] > 0
    assert (tmp_path / "retrieval.png").is_file()


def test_the_whole_way_is_judged_by_sessions(run: Path, tmp_path: Path) -> None:
    assert evaluate.main([f"--workdir={run}", f"--output={tmp_path}", "--feed", "--bootstrap=10", "--requests=40"]) == 0
    stages = rows_of(tmp_path, "feed", "feed_stage")
    assert [row["stage"] for row in stages] == list(STAGES)
    (whole,) = rows_of(tmp_path, "feed", "feed")
    assert 0 < whole["requests"] <= 40 and 0 < whole["coverage"] <= 1
    assert stages[0]["in_pool"] == stages[1]["in_pool"] > 0
    assert all(0 <= row["hit_rate_at_10"] <= 1 for row in stages)
    sources = rows_of(tmp_path, "feed", "feed_source")
    assert sum(row["fed"] for row in sources) == 10 * whole["requests"]
    assert math.isclose(sum(row["share"] for row in sources), 1.0)
    assert {"recall", "rank", "total"} <= {row["stage"] for row in rows_of(tmp_path, "feed", "latency")}
    assert (tmp_path / "feed.png").is_file()


def test_without_flags_it_shows_what_the_run_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"--workdir={run}", "--no-figures"]) == 0
    assert "AUC by event time" in capsys.readouterr().out


def test_what_cannot_be_judged_says_what_to_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*flags: str, workdir: Path = run) -> str:
        assert evaluate.main([f"--workdir={workdir}", f"--output={tmp_path / 'out'}", *flags]) == 1
        return capsys.readouterr().err

    with pytest.raises(ValueError, match=r"--gin\.Experiment\.test_source="):
        files_held_out(load(["configs/quickstart.gin"]))
    assert "no config.gin" in refused("--ranking", workdir=tmp_path)
    assert "'nothing' is none of new_user" in refused("--ranking", "--segments=nothing")
    assert "expected lengths of lists" in refused("--retrieval", "--k=ten")
    assert "--requests must be at least 1" in refused("--feed", "--requests=0")
    assert "--segments is for --ranking" in refused("--feed", "--segments=tag_id")
    assert "--k is for --retrieval" in refused("--k=5") and "--requests is for --feed" in refused("--requests=5")
    assert "expected lengths of lists" in refused("--ranking", "--retrieval", "--k=0") and not (tmp_path / "out").exists()
    (tmp_path / "config.gin").write_text((run / "config.gin").read_text())
    assert "neither snapshots nor an exported base" in refused("--ranking", workdir=tmp_path)
    (tmp_path / "file").write_text("")
    assert evaluate.main([f"--workdir={run}", f"--output={tmp_path / 'file'}", "--retrieval", "--bootstrap=0"]) == 1
    assert "name another folder as --output" in capsys.readouterr().err


def test_an_export_without_flags_says_which_work(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"--workdir={exported}"]) == 1
    assert "ask for --ranking, --retrieval or --feed" in capsys.readouterr().err


def test_all_parts_are_written_without_matplotlib_or_a_column(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    both = ["--ranking", "--retrieval", "--bootstrap=0", f"--output={tmp_path}", f"--workdir={run}"]
    assert evaluate.main(both) == 1 and "pip install" in capsys.readouterr().err
    assert rows_of(tmp_path, "ranking", "evaluated")[0]["set_aside"] == {}
    assert rows_of(tmp_path, "ranking") and rows_of(tmp_path, "retrieval")
    again = tmp_path / "again"
    assert evaluate.main([*both, f"--output={again}", "--no-figures", "--segments=nothing"]) == 1
    assert not rows_of(again, "ranking") and rows_of(again, "retrieval")


def test_an_export_of_other_files_is_refused(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = re.search(r"Experiment.source = @(\S+)\(\)", (exported / "config.gin").read_text())
    assert named
    flags = ["--ranking", "--no-figures", f"--output={tmp_path}", f"--gin.{named[1]}.part=(0.0, 0.1)"]
    assert evaluate.main([f"--workdir={exported}", *flags]) == 1
    assert "ended before the place that the export stands at" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        evaluate.main(["--help"])
    assert evaluate.EXAMPLE in capsys.readouterr().out
