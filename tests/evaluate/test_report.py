"""The report of a run: what it reads, what it leaves out and says so, what it prints and draws."""

import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console
from rich.table import Table

from launch import evaluate
from monolith_jax.evaluate import report

HEADS = ("long_view", "like")
HOUR = 3_600_000
START = 1_700_000_000_000 // HOUR * HOUR


def _period(hour: int, head: str, **values: Any) -> dict[str, Any]:
    return {"kind": "period", "period_start_ms": START + hour * HOUR, "head": head, "examples": 1000, **values}


def _rows(hours: int = 3, heads: Sequence[str] = HEADS, steps: int = 40) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        yield {
            "kind": "step",
            "step": step,
            "examples": 4096,
            "loss": 1 / step,
            "examples_per_s": rng.uniform(1e4, 2e4),
            "unique": 9,
        }
    for hour in range(hours):
        for head in heads:
            auc = {"auc": 0.6 + hour / 1000, "optimal_auc": 0.8, "gauc": None, "log_loss": 0.5, "optimal_log_loss": 0.4}
            yield _period(hour, head, **auc, calibration=1.1, rmse=None)
        yield _period(hour, "play_ratio", auc=None, rmse=0.25, optimal_rmse=0.2, calibration=0.9)
    for head in heads:
        yield {
            "kind": "total",
            "head": head,
            "examples": 3000,
            "auc": 0.6543,
            "optimal_auc": 0.8,
            "learned": 0.421,
            "log_loss": 0.5,
        }
    yield {"kind": "test", "name": "next day", "head": heads[0], "auc": 0.6789, "log_loss": 0.45}
    yield {"kind": "summary", "steps": steps, "rejected": {"duplicate": 1234}}


def _write(folder: Path, rows: Iterable[dict[str, Any]], tail: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def _text(*tables: Table) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_tables_tell_the_run(tmp_path: Path) -> None:
    for step, size in ((200, 2_500_000), (1000, 1_500_000)):
        part = tmp_path / "snapshots" / str(step) / "state"
        part.mkdir(parents=True)
        (part / "data").write_bytes(bytes(size))
    (tmp_path / "snapshots" / "1200.orbax-checkpoint-tmp-1").mkdir()
    text = _text(*report.tables(_write(tmp_path, _rows())))
    assert text.index("snapshot of step 200, on disk") < text.index("snapshot of step 1,000, on disk")
    for wanted in (
        "2.5 MB",
        "1.5 MB",
        "long_view",
        "0.6543",
        "0.8000",
        "42.1%",
        "next day",
        "0.6789",
        "rejected: duplicate",
        "1,234",
        "0.2500",
        "0.0250",
    ):
        assert wanted in text, wanted
    assert "note" not in text
    assert "2023-11-14 22:00" in text


def test_only_the_last_periods_are_printed(tmp_path: Path) -> None:
    text = _text(*report.tables(_write(tmp_path, _rows(hours=60))))
    assert "last 24 of 60" in text
    assert "0.6590" in text and "0.6350" not in text


def test_a_torn_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    run = report.read(_write(tmp_path, list(_rows())[:40], tail='{"kind": "step", "st'))
    assert len(run.steps) == 40
    assert any("line 41" in note for note in run.notes)
    assert any("not ended" in note for note in run.notes)
    assert "line 41" in _text(*report.tables(tmp_path)).replace("\n", " ")


def test_rows_written_again_after_a_resume_count_once(tmp_path: Path) -> None:
    rows = list(_rows())
    again = [{**row, "loss": 7.0} for row in rows[30:40]] + [_period(1, "like", auc=0.77)]
    run = report.read(_write(tmp_path, [*rows[:40], *rows[40:49], *again]))
    assert [row["step"] for row in run.steps] == list(range(1, 41))
    assert [row["loss"] for row in run.steps[29:31]] == [1 / 30, 7.0]
    assert [row["auc"] for row in run.periods if row["head"] == "like"] == [0.6, 0.77, 0.602]
    assert any("11 row(s)" in note for note in run.notes)


def test_closing_table_takes_totals_with_and_without_tests() -> None:
    total = {
        "head": "like",
        "examples": 5,
        "auc": 0.71,
        "optimal_auc": None,
        "learned": None,
        "log_loss": 0.2,
        "calibration": 0.98,
    }
    text = _text(report.closing_table({"like": total}))
    assert "0.7100" in text and "0.980" in text and "online" not in text
    text = _text(report.closing_table([total], [{"name": "held out", "head": "like", "rmse": 0.1234}]))
    assert "held out" in text and "online" in text and "0.1234" in text


@pytest.mark.parametrize(
    ("hours", "heads", "steps"),
    [(1, ["like"], 1), (3, ["a", "b"], 40), (50, list("abcdefghi"), 100), (0, ["like"], 3), (2, ["like"], 0)],
)
def test_plot_writes_a_figure(tmp_path: Path, hours: int, heads: list[str], steps: int) -> None:
    (path,) = report.plot(_write(tmp_path, _rows(hours, heads, steps)))
    assert path == tmp_path / "report" / "report.png"
    pixels = image.imread(path)
    assert pixels.shape[1] == 1560
    assert pixels[..., :3].std() > 0.02  # something is drawn


def test_plot_bears_losses_that_are_not_numbers(tmp_path: Path) -> None:
    rows = [{"kind": "step", "step": 1, "loss": float("nan"), "examples_per_s": None}]
    assert report.plot(_write(tmp_path, rows))[0].is_file()


def test_plot_says_how_to_get_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'monolith_jax\[report\]'"):
        report.plot(_write(tmp_path, _rows()))


def test_launch_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"--workdir={_write(tmp_path, _rows())}"]) == 0
    out = capsys.readouterr().out
    assert "0.6543" in out
    assert str(tmp_path / "report" / "report.png") in out


def test_launch_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([f"--workdir={tmp_path}"]) == 1
    assert f"{tmp_path / 'metrics.jsonl'} is not there" in capsys.readouterr().err
    _write(tmp_path, [])
    assert evaluate.main([f"--workdir={tmp_path}"]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    assert stop.value.code == 0
    assert "--workdir=checkpoints/" in capsys.readouterr().out


def test_staleness_of_a_live_run(tmp_path: Path) -> None:
    rows = [{"kind": "step", "step": step, "lag_s": step / 10, "event_age_p99_s": None} for step in range(1, 101)]
    console = Console(file=io.StringIO(), width=120)
    console.print(report.tables(_write(tmp_path, [*rows, {"kind": "step", "step": 101}]))[0])
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "staleness: age of the next event to be read" in text and "5.05 s in half of the rows, 9.9 s in 99 %" in text
    assert "when learned" not in text
