"""A training run as a point: what it measured online, on its test source, and of itself."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.points.measured import Base, Measured

if TYPE_CHECKING:
    from monolith_jax.evaluate.report import Row, Run
    from monolith_jax.experiment import Experiment

_METRICS = ("auc", "gauc", "log_loss", "calibration", "learned", "optimal_auc", "rmse", "mae")
_OF_RUN = ("rows", "steps", "examples")
_LARGE = ("snapshots", "deltas", "stream")


@dataclass(frozen=True)
class TrainPoint:
    """Trains the experiment, or goes on training it."""

    keep: bool = False
    """Whether snapshots and deltas stay; metrics and the configuration do."""


def run(point: TrainPoint, base: Base, folder: Path) -> list[Measured]:
    """Trains in a folder; returns its totals (and `test_...` of a test source), their means over heads, and `auc` by hour.

    Raises:
        ValueError: As `trained`.
    """
    run = trained(base.load(), folder)
    if not point.keep:
        for name in _LARGE:
            shutil.rmtree(folder / name, ignore_errors=True)
    measured = of_heads(run.totals) + of_heads(run.tests, "test_")
    measured += [Measured(name, float(run.summary[name])) for name in _OF_RUN if name in run.summary]
    measured += [Measured(name, float(value)) for name, value in run.summary.items() if name.startswith("retrieval_")]
    return measured + _by_hour(run.periods)


def trained(experiment: Experiment, folder: Path) -> Run:
    """Trains to the end, unless a killed try did, and returns what the run wrote.

    Raises:
        ValueError: As `launch.run.train`; or it was stopped by SIGTERM: what is half learned would give figures like any other.
    """
    from rich.console import Console

    from launch.run import train
    from monolith_jax.evaluate.report import read

    def whole() -> bool:
        return (folder / "metrics.jsonl").is_file() and bool(read(folder).summary)

    if not whole():
        train(experiment, folder, Console(quiet=True))
    if not whole():
        raise ValueError(f"{folder}: the run was stopped before its end; start again, it goes on from there")
    return read(folder)


def of_heads(rows: Iterable[Row], prefix: str = "") -> list[Measured]:
    """Returns the metrics of rows of heads, and their means over the heads that have them all."""
    rows = list(rows)
    out = [Measured(prefix + name, _number(row.get(name)), row["head"]) for row in rows for name in _METRICS if name in row]
    binary = [row for row in rows if row.get("log_loss") is not None]
    for name in ("auc", "gauc", "log_loss", "learned", "optimal_auc"):
        values = [row[name] for row in binary if row.get(name) is not None]
        if values and len(values) == len(binary):
            out.append(Measured(prefix + name, statistics.fmean(values), "mean"))
    return out


def _by_hour(rows: Iterable[Row]) -> list[Measured]:
    """Returns the mean AUC along the hours, over the heads that have one in each: others would make it jump as they come."""
    by_time: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.get("log_loss") is not None:
            by_time.setdefault(row["period_start_ms"], {})[row["head"]] = _number(row.get("auc"))
    heads = {head for of_hour in by_time.values() for head in of_hour}
    always = [head for head in heads if all(math.isfinite(one.get(head, math.nan)) for one in by_time.values())]
    if not always:
        return []
    first = min(by_time)
    return [
        Measured("auc", statistics.fmean(of_hour[head] for head in sorted(always)), "mean", "hour", (start - first) / 3.6e6)
        for start, of_hour in sorted(by_time.items())
    ]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
