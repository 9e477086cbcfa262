"""The records of a run: no step stands there twice, and a loss that is no number stops it."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from monolith_jax.planner import Planned
from monolith_jax.reader import Observed
from monolith_jax.train.log import RunLog


class Sums:
    """Measures that add up scores; a row for every third batch."""

    def __init__(self) -> None:
        self.batches = 0
        self.total = 0.0

    def add(
        self,
        event_time_ms: np.ndarray,
        groups: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray,
        optimal: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        self.batches += 1
        self.total += float(scores.sum())
        return [{"kind": "period", "head": "like", "total": self.total}] if self.batches % 3 == 0 else []

    def close(self) -> list[dict[str, Any]]:
        return [{"kind": "period", "head": "like", "total": self.total}]

    def totals(self) -> dict[str, dict[str, Any]]:
        return {"like": {"kind": "total", "head": "like", "auc": 0.5, "total": self.total}}

    def get_state(self) -> dict[str, np.ndarray]:
        return {"batches": np.array([self.batches]), "total": np.array([self.total])}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.batches, self.total = int(state["batches"][0]), float(state["total"][0])


def planned(step: int, epoch: int = 0, number: int = 4) -> Planned:
    observed = Observed(
        np.arange(4) + 1000 * step, np.zeros(4, np.int64), np.zeros((4, 1), np.float32), np.ones((4, 1), np.float32), None
    )
    inputs: Any = None
    return Planned(inputs, observed, number, epoch, {"unique": 12.34567}, (), [{"position": {"chunk": step}, "row": 0}], None)


def log_of(folder: Path, **options: Any) -> RunLog:
    console = Console(file=io.StringIO(), width=200)
    return RunLog(folder, Sums(), 2, console=console, **options)


def take(log: RunLog, *steps: int, epoch: int = 0) -> None:
    for step in steps:
        log.step(planned(step, epoch), 1.0 / step, np.full((4, 1), step, np.float32))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [{k: v for k, v in json.loads(line).items() if k != "examples_per_s"} for line in text.splitlines()]


def test_rows_of_steps_and_periods(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        take(log, 1, 2, 3, 4)
    assert rows_of(tmp_path) == [
        {"kind": "step", "step": 2, "examples": 8, "epoch": 0, "event_time_ms": 2003, "loss": 0.5, "unique": 12.3457},
        {"kind": "period", "head": "like", "total": 24.0},
        {"kind": "step", "step": 4, "examples": 16, "epoch": 0, "event_time_ms": 4003, "loss": 0.25, "unique": 12.3457},
    ]
    assert (log.steps, log.examples) == (4, 16)


def test_nothing_is_written_before_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("what an earlier run left\n")
    with log_of(tmp_path) as log:
        take(log, 1)
        assert (tmp_path / "metrics.jsonl").read_text() == "what an earlier run left\n"
        take(log, 2)
    assert [row["step"] for row in rows_of(tmp_path)] == [2]


@pytest.mark.parametrize("saved_at", [1, 2, 3, 4])
def test_a_resumed_run_writes_what_the_uninterrupted_one_does(tmp_path: Path, saved_at: int) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    with log_of(tmp_path / "whole") as whole:
        take(whole, *range(1, 9))
        whole.write(list(whole.close_measures().values()))
    with log_of(tmp_path / "killed") as killed:
        take(killed, *range(1, saved_at + 1))
        state = json.loads(json.dumps({name: value for name, value in killed.get_state().items() if name != "arrays"}))
        arrays = killed.get_state()["arrays"]
        take(killed, *range(saved_at + 1, 8))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # killed in the middle of a line
    with log_of(tmp_path / "killed") as resumed:
        resumed.set_state({**state, "arrays": arrays})
        assert (resumed.steps, resumed.examples) == (saved_at, 4 * saved_at)
        assert len((tmp_path / "killed" / "metrics.jsonl").read_bytes()) == state["bytes"]
        take(resumed, *range(saved_at + 1, 9))
        resumed.write(list(resumed.close_measures().values()))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        take(log, 1, 2)
        state = log.get_state()
    (tmp_path / "metrics.jsonl").write_text("short\n")
    with (
        log_of(tmp_path) as log,
        pytest.raises(ValueError, match=r"metrics\.jsonl has 6 bytes, the snapshot knows \d+; the file"),
    ):
        log.set_state(state)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, loss: float) -> None:
    with log_of(tmp_path) as log:
        take(log, 1, 2)
        log.last_snapshot = "step 2 in runs/a/snapshots"
        with pytest.raises(FloatingPointError) as caught:
            log.step(planned(3), loss, np.zeros((4, 1), np.float32))
    told = str(caught.value)
    assert f"the loss of step 3 is {loss}" in told
    assert '"position": {"chunk": 3}, "row": 0' in told
    assert "Last good snapshot: step 2 in runs/a/snapshots." in told
    assert [row["step"] for row in rows_of(tmp_path)] == [2]


def test_no_snapshot_yet(tmp_path: Path) -> None:
    with log_of(tmp_path) as log, pytest.raises(FloatingPointError, match=r"Last good snapshot: none yet\."):
        log.step(planned(1), float("nan"), np.zeros((4, 1), np.float32))


def test_later_passes_are_no_test(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        take(log, 1, 2)
        take(log, 3, 4, epoch=1)
    assert [row["kind"] for row in rows_of(tmp_path)] == ["step", "step"]
    assert log.close_measures()["like"]["total"] == 4 * (1 + 2)


def test_progress_tells_rate_and_time_left(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=True)
    with RunLog(tmp_path, Sums(), 2, total_examples=400, console=console) as log:
        take(log, 1)
    assert "step 1  4 examples" in text.getvalue() and "left" in text.getvalue()


def test_tensorboard_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with log_of(tmp_path, tensorboard=True) as log:
        take(log, 1, 2, 3)
    (file,) = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()
    assert b"step/loss" in written and b"period/like/total" in written


def test_a_process_to_which_nothing_came_tells_no_ages(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for step, number in ((1, 0), (2, 0), (3, 1), (4, 0)):
        one = planned(step)
        log.step(replace(one, told={"lag_s": 0.5}, times_ms=np.zeros(number, np.int64)), 1.0, np.zeros((4, 1), np.float32))
    first, second = (row for row in rows_of(tmp_path) if row["kind"] == "step")
    assert first["lag_s"] == 0.5 and "event_age_p50_s" not in first
    assert second["event_age_p50_s"] > 1e9


def test_what_was_skipped_is_told_once(tmp_path: Path) -> None:
    def texts(log: RunLog, *skipped: float) -> str:
        for step, many in enumerate(skipped, 1):
            log.step(replace(planned(step), told={"skipped_messages": many}), 1.0, np.zeros((4, 1), np.float32))
        return log._console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]

    log = log_of(tmp_path)
    assert texts(log, 0, 5, 5, 7).count("SKIPPED") == 2
    resumed = log_of(tmp_path)
    resumed.set_state(json.loads(json.dumps(log.get_state(), default=lambda array: array.tolist())))
    assert "SKIPPED" not in texts(resumed, 7) and "SKIPPED 2 messages" in texts(resumed, 9)


def test_history_tells_no_ages(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.step(replace(planned(1), told={"agreement_user_mismatched": 3.0}), 1.0, np.zeros((4, 1), np.float32))
    log.step(replace(planned(2), told={"agreement_user_mismatched": 4.0}), 1.0, np.zeros((4, 1), np.float32))
    (row,) = (row for row in rows_of(tmp_path) if row["kind"] == "step")
    assert row["agreement_user_mismatched"] == 4.0 and "event_age_p50_s" not in row
