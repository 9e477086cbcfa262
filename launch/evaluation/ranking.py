"""How well a model ranks what was held out: of each head, of all examples and of segments, with intervals over users.

In: a `Subject`. Out: rows of `monolith_jax.evaluate.ranking`, a table, and the reliability curve of each head as a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from launch.evaluation.held_out import held_out
from launch.evaluation.subject import Subject
from launch.evaluation.written import Row, table, with_interval
from launch.readers import log_of
from monolith_jax.evaluate import ranking
from monolith_jax.serve.crosses import table_of
from monolith_jax.stream.history import ids_of

if TYPE_CHECKING:
    from monolith_jax.experiment import Experiment
    from monolith_jax.serve.served_model import ServedModel

BUILT_IN = ("new_user", "new_video", "activity", "hour")
"""Segments that are no column: whether training knows the user and the video, how many examples it had of the user,
and the hour of event time."""
_CURVES = 12
"""Panels of the figure at most."""


def measure(subject: Subject, segments: Sequence[str], number: int, seed: int = 0) -> list[Row]:
    """Returns the rows: metrics by segment, then reliability curves.

    Args:
        subject: The model.
        segments: Columns of the examples, or names of `BUILT_IN`.
        number: Resamples of users for the intervals; 0: none.
        seed: Of the draws.

    Raises:
        ValueError: There is no ranker, no test source, or no such column.
    """
    check(subject.experiment)
    heads = [(head.label, head.kind) for head in subject.experiment.heads]
    scored, columns = scores(subject, segments)
    of_columns = [
        ranking.hours(scored.event_time_ms)
        if name == "hour"
        else ranking.flags(name, column, ("known", "new"))
        if name in BUILT_IN[:2]
        else ranking.segment(name, column)
        for name, column in columns.items()
    ]
    return [*ranking.table(scored, heads, of_columns, number, seed=seed), *ranking.reliability(scored, heads)]


def check(experiment: Experiment) -> None:
    """Refuses what this part cannot judge.

    Raises:
        ValueError: There is no ranker.
    """
    if experiment.model is None or not experiment.heads:
        raise ValueError("this run has no ranking model (Experiment.model and heads): ask for --retrieval alone")


def scores(subject: Subject, segments: Sequence[str] = ()) -> tuple[ranking.Scored, dict[str, Any]]:
    """Returns the held-out examples with their scores, and the columns of segments."""
    model = subject.model((subject.experiment.train.batch_size,))
    parts: list[tuple[np.ndarray, ...]] = []
    columns: dict[str, list[Any]] = {name: [] for name in segments}
    active = _activity(subject) if "activity" in segments else {}
    try:
        for examples, seen in held_out(subject.experiment, subject.memories(), subject.aside):
            of_batch = model.predict(examples)
            parts.append((seen.event_time_ms, seen.groups, of_batch, seen.labels, seen.masks))
            for name, of_name in columns.items():
                of_name.append(_column(subject, model, examples, name, active))
    finally:
        model.close()
    if not parts:
        raise ValueError("the test source has no examples")
    scored = ranking.Scored(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return scored, {name: _joined(of_name) for name, of_name in columns.items()}


def _joined(parts: Sequence[Any]) -> Any:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else pa.chunked_array(parts)


def _column(subject: Subject, model: ServedModel, examples: pa.RecordBatch, name: str, active: dict[int, int]) -> Any:
    match name:
        case "new_user" | "new_video":
            column = "user_id" if name == "new_user" else "video_id"
            of_table = table_of(subject.experiment.features, column)
            if not of_table:
                raise ValueError(
                    f"segment {name} looks at the rows of {column}, and no feature of this model reads that column"
                )
            return ~model.vectors(of_table, ids_of(examples, column, "an example")[0])[1]
        case "activity":
            users = ids_of(examples, "user_id", "an example")[0].tolist()
            return pa.array([active.get(user, 0) for user in users], pa.float64())
        case "hour":
            return examples.column("event_time_ms")
        case _ if name in examples.schema.names:
            return examples.column(name)
        case _:
            there = ", ".join(sorted(examples.schema.names))
            raise ValueError(f"--segments: {name!r} is none of {', '.join(BUILT_IN)} and no column; columns are {there}")


def _activity(subject: Subject) -> dict[int, int]:
    """Returns how many examples of each user the model learned from, as `Subject.training` tells."""
    source = subject.experiment.source
    if log_of(source):
        raise ValueError("segment activity counts the examples of the training source, which a log no longer has")
    parts = [np.zeros(0, np.int64)]
    for examples in subject.training():
        parts.append(ids_of(examples, "user_id", "an example")[0])
    users, number = np.unique(np.concatenate(parts), return_counts=True)
    return dict(zip(users.tolist(), number.tolist(), strict=True))


def tables(rows: Sequence[Row]) -> list[Any]:
    """Returns the rows as tables: all examples, then each segment."""
    out = []
    metrics = [row for row in rows if row["kind"] == "ranking"]
    for name in dict.fromkeys(row["segment"] for row in metrics):
        of_segment = [row for row in metrics if row["segment"] == name]
        title = "Ranking, held-out examples" if name == ranking.ALL else f"By {name}"
        shown = ("auc", "gauc", "log_loss", "normalised_entropy", "calibration")
        names = ("head", *(() if name == ranking.ALL else (name,)), "examples", "users", *shown)
        note = "with intervals of resampled users" if name == ranking.ALL else ""
        one = table(title, *(each.replace("_", " ") for each in names), caption=note)
        for row in sorted(of_segment, key=lambda row: list(dict.fromkeys(one["head"] for one in metrics)).index(row["head"])):
            value = () if name == ranking.ALL else (row["value"],)
            cells = [_cell(row, metric, name == ranking.ALL or metric in shown[:2]) for metric in shown]
            one.add_row(row["head"], *value, f"{row['examples']:,}", f"{row['users']:,}", *cells)
        out.append(one)
        regression = [row for row in of_segment if "rmse" in row]
        if regression and name == ranking.ALL:
            one = table("Regression heads", "head", "examples", "RMSE", "MAE")
            for row in regression:
                one.add_row(row["head"], f"{row['examples']:,}", with_interval(row, "rmse"), with_interval(row, "mae"))
            out.append(one)
    return out


def _cell(row: Row, metric: str, with_bounds: bool) -> str:
    form = ".3f" if metric == "calibration" else ".4f"
    if with_bounds:
        return with_interval(row, metric, form)
    return "-" if row.get(metric) is None else f"{row[metric]:{form}}"


def plot(rows: Sequence[Row], output: Path) -> list[Path]:
    """Draws the reliability curve of each head; returns the file, `reliability.png`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from launch.evaluation.figures import pyplot

    curves = [row for row in rows if row["kind"] == "calibration"]
    heads = list(dict.fromkeys(row["head"] for row in curves))[:_CURVES]
    if not heads:
        return []
    draw = pyplot()
    columns = min(4, len(heads))
    lines = -(-len(heads) // columns)
    figure, every = draw.subplots(lines, columns, figsize=(3 * columns, 2.9 * lines), squeeze=False, layout="constrained")
    for axes in every.flat[len(heads) :]:
        axes.set_axis_off()
    for axes, head in zip(every.flat, heads, strict=False):
        of_head = [row for row in curves if row["head"] == head]
        x, y = [row["prediction"] for row in of_head], [row["label"] for row in of_head]
        most = max(*x, *y, 1e-6) * 1.05
        axes.plot([0, most], [0, most], color="#9aa4ae", linewidth=1, linestyle=(0, (4, 2.5)))
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.5, color="#2563a8")
        axes.set_xlim(0, most)
        axes.set_ylim(0, most)
        axes.set_title(head)
    figure.supxlabel("mean prediction of a bin", fontsize=9)
    figure.supylabel("mean label", fontsize=9)
    path = output / "reliability.png"
    figure.savefig(path, dpi=130)
    draw.close(figure)
    return [path]
