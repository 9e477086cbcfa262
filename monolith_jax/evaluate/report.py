"""A run as tables and one figure.

In: `<workdir>/metrics.jsonl`, one JSON object a line, told apart by `kind`: "step" (step, examples, loss, examples_per_s,
event_time_ms, counts of the plan), "period" and "total" (rows of `prequential`), "test" (name, head and metrics on a source
that was held out), "summary" (counts of the run). Out: rich tables, and `<workdir>/report/report.png`.

A killed run is a run too: a torn line is left out with a note, and where a resumed run wrote the same step, period or head
again, the later row counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STALENESS = {
    "lag_s": "age of the next event to be read",
    "watermark_age_s": "age of the watermark",
    "event_age_p50_s": "age of events when learned, half of a row's",
    "event_age_p99_s": "age of events when learned, 99 % of a row's",
    "publish_lag_s": "from the latest cut to its delta",
}
"""What rows of kind "step" of a live or published run tell of how old things were."""
Row = Mapping[str, Any]

_COLOURS = ("#2563a8", "#d1662b", "#3a8f5c", "#b83a4b", "#7a58b0", "#8a6a3f", "#c95fa0", "#5f6b76", "#a39a1f", "#1f9fa8")
_GREY, _GRID = "#5f6b76", "#e4e7ea"
_DASHED = (0, (4, 2.5))
_PANELS = (
    ("auc", "optimal_auc", "AUC"),
    ("gauc", None, "AUC within users (GAUC)"),
    ("log_loss", "optimal_log_loss", "log-loss"),
    ("rmse", "optimal_rmse", "root mean squared error"),
    ("calibration", None, "calibration (1 is right)"),
)
"""Metric, the same of the best possible model, and title of the panels by event time; those without values are left out."""

_MOST_PERIODS = 24


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run wrote, in order and without repeats."""

    steps: tuple[Row, ...]
    """Rows of kind "step", by rising step."""
    periods: tuple[Row, ...]
    """Rows of kind "period", by rising event time; heads in the order of the run."""
    totals: tuple[Row, ...]
    """Rows of kind "total", one a head; none when the run has not ended."""
    tests: tuple[Row, ...]
    """Rows of kind "test", one a name and head."""
    summary: Row
    """The row of kind "summary", empty when the run has not ended."""
    notes: tuple[str, ...]
    """What was left out, for a person to read."""

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the heads, in the order of the run."""
        return tuple(dict.fromkeys(row["head"] for row in (*self.totals, *self.periods, *self.tests)))


def read(workdir: str | Path) -> Run:
    """Reads what a run wrote.

    Raises:
        ValueError: The folder has no metrics.jsonl.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is not there: expected the working folder of a run, which `python -m launch.train` writes to")
    rows: dict[str, dict[tuple[Any, ...], Row]] = {"step": {}, "period": {}, "total": {}, "test": {}, "summary": {}}
    keys = {
        "step": ("step",),
        "period": ("period_start_ms", "head"),
        "total": ("head",),
        "test": ("name", "head"),
        "summary": (),
    }
    broken, repeated = [], 0
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            kind = row["kind"]
            key = tuple(row[name] for name in keys.get(kind, ()))
        except (ValueError, KeyError, TypeError):
            broken += [number] if line.strip() else []
            continue
        if kind in rows:
            repeated += key in rows[kind]
            rows[kind][key] = row
    notes = []
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        notes.append(f"{len(broken)} broken line(s) of {path.name} left out (line {lines}): the run was stopped while it wrote")
    if repeated:
        notes.append(f"{repeated} row(s) were written again after a resume; the later ones count")
    if not rows["total"]:
        notes.append("no totals: the run has not ended, or was stopped before its end")
    return Run(
        steps=tuple(sorted(rows["step"].values(), key=lambda row: row["step"])),
        periods=tuple(sorted(rows["period"].values(), key=lambda row: row["period_start_ms"])),
        totals=tuple(rows["total"].values()),
        tests=tuple(rows["test"].values()),
        summary=rows["summary"].get((), {}),
        notes=tuple(notes),
    )


def _number(value: Any, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _table(title: str, *names: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
    )
    for position, name in enumerate(names):
        table.add_column(name, justify="right" if position else "left", no_wrap=not position)
    return table


def closing_table(totals: Mapping[str, Row] | Iterable[Row], tests: Iterable[Row] = ()) -> Table:
    """Returns the table that ends a training: one line per head and source.

    Args:
        totals: What `Prequential.totals` returned, or rows of kind "total".
        tests: Rows of kind "test": `name` of the source, `head` and metrics named as in the totals.
    """
    rows = list(totals.values() if isinstance(totals, Mapping) else totals)
    tests = list(tests)
    regression = any(row.get("rmse") is not None for row in (*rows, *tests))
    table = _table(
        "Quality, scored before training on it" + (" (online), and on held-out sources" if tests else ""),
        *(("head", "on") if tests else ("head",)),
        *("examples", "AUC", "best\nAUC", "GAUC", "learned", "log-loss", "calib."),
        *(("RMSE",) if regression else ()),
    )
    heads = list(dict.fromkeys(row["head"] for row in (*rows, *tests)))
    for head in heads:
        for row in (*rows, *tests):
            if row["head"] != head:
                continue
            cells = [head, row.get("name", "online")] if tests else [head]
            cells += [_number(row.get("examples"), ",")]
            cells += [_number(row.get("auc")), _number(row.get("optimal_auc")), _number(row.get("gauc"))]
            cells += [_number(row.get("learned"), ".1%"), _number(row.get("log_loss"))]
            cells += [_number(row.get("calibration"), ".3f")]
            table.add_row(*cells, *([_number(row.get("rmse"))] if regression else []))
    if any(row.get("learned") is not None for row in rows):
        table.caption = "learned: 0% always predicts the mean, 100% is the best possible"
    return table


def _flat(row: Row, prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}: ")
        elif name != "kind":
            whole = isinstance(value, int) and not isinstance(value, bool)
            yield prefix + name, f"{value:,}" if whole else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _snapshot_sizes(folder: Path) -> dict[int, int]:
    """Returns the bytes on disk of each snapshot in a folder, by step."""
    there = [child for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []
    sizes = {int(child.name): sum(path.stat().st_size for path in child.rglob("*") if path.is_file()) for child in there}
    return dict(sorted(sizes.items()))


def _run_table(run: Run, snapshots: dict[int, int]) -> Table:
    table = _table("Run", "what", "value")
    for name, value in _flat(run.summary):
        table.add_row(name, value)
    if run.steps:
        last = run.steps[-1]
        speeds = [row["examples_per_s"] for row in run.steps if row.get("examples_per_s") is not None]
        table.add_row("last step", f"{last['step']:,}")
        table.add_row("last loss", _number(last.get("loss")))
        if speeds:
            table.add_row("examples/s, median of the steps", f"{np.median(speeds):,.0f}")
    for name, what in _STALENESS.items():
        if (values := _values(run.steps, name)).size and not np.isnan(values).all():
            half, most = np.nanquantile(values, (0.5, 0.99))
            table.add_row(f"staleness: {what}", f"{half:.3g} s in half of the rows, {most:.3g} s in 99 %")
    for step, size in snapshots.items():
        table.add_row(f"snapshot of step {step:,}, on disk", f"{size / 1e6:,.1f} MB")
    table.caption = "\n".join(f"note: {note}" for note in run.notes) or None
    return table


def _clock(time_ms: int) -> str:
    return f"{datetime.fromtimestamp(time_ms / 1000, UTC):%Y-%m-%d %H:%M}"


def _period_table(run: Run) -> Table:
    starts = list(dict.fromkeys(row["period_start_ms"] for row in run.periods))
    shown = starts[-_MOST_PERIODS:]
    cut = f", last {len(shown)} of {len(starts)}" if len(shown) < len(starts) else ""
    table = _table(f"AUC by event time (UTC){cut}", "from", "examples", *run.heads)
    by_key = {(row["period_start_ms"], row["head"]): row for row in run.periods}
    for start in shown:
        rows = [by_key.get((start, head), {}) for head in run.heads]
        values = [row.get("auc") if row.get("auc") is not None else row.get("rmse") for row in rows]
        most = max((row.get("examples", 0) for row in rows), default=0)
        table.add_row(_clock(start), f"{most:,}", *map(_number, values))
    if any(row.get("rmse") is not None for row in run.periods):
        table.caption = "regression heads: RMSE"
    return table


def tables(workdir: str | Path) -> list[Table]:
    """Returns a run as tables to print: the run, its heads, and its last periods of event time.

    Raises:
        ValueError: The folder has no metrics.jsonl.
    """
    run = read(workdir)
    out = [_run_table(run, _snapshot_sizes(Path(workdir) / "snapshots"))]
    out += [closing_table(run.totals, run.tests)] if run.totals or run.tests else []
    return out + ([_period_table(run)] if run.periods else [])


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install 'monolith_jax[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _values(rows: Sequence[Row], name: str) -> np.ndarray:
    """Returns a column as float64 [N], NaN where there is none."""
    return np.array([np.nan if row.get(name) is None else row[name] for row in rows], np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns running medians over a thirtieth of the values: a line that noise and single outliers do not bend."""
    reach = max(values.size // 60, 1)
    padded = np.pad(values, reach, mode="symmetric")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def _line(axes: Axes, x: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draws few values as they are, with marks; many faintly, with running medians over them."""
    if values.size <= 30:
        axes.plot(x, values, color=colour, linewidth=1.7, marker="o", markersize=3.5)
        return
    axes.plot(x, values, color=colour, linewidth=0.7, alpha=0.25)
    axes.plot(x, _smooth(values), color=colour, linewidth=1.8)


def _draw_steps(axes: Axes, run: Run, name: str, title: str, colour: str) -> None:
    from matplotlib.ticker import MaxNLocator

    # More points than pixels draw slowly and show nothing more.
    rows = run.steps[:: max(len(run.steps) // 4000, 1)]
    values = _values(rows, name)
    step, values = _values(rows, "step")[np.isfinite(values)], values[np.isfinite(values)]
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if not values.size:
        return
    _line(axes, step, values, colour)
    low, high = np.quantile(values, [0, 0.99])
    axes.set_ylim(top=high + 0.15 * (high - low) + 1e-9)  # a few wild first steps must not flatten the rest
    if name == "examples_per_s":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_periods(axes: Axes, run: Run, metric: str, optimal: str | None, title: str) -> None:
    from matplotlib import dates

    for position, head in enumerate(run.heads):
        rows = [row for row in run.periods if row["head"] == head]
        time = np.array([row["period_start_ms"] for row in rows], "datetime64[ms]")
        values, best = _values(rows, metric), _values(rows, optimal or "")
        colour = _COLOURS[position % len(_COLOURS)]
        there = np.isfinite(values)
        _line(axes, time[there], values[there], colour)
        there = np.isfinite(best)
        best = _smooth(best[there]) if there.sum() > 30 else best[there]
        axes.plot(time[there], best, color=colour, linewidth=1.2, linestyle=_DASHED, marker="_" if best.size == 1 else "")
    if metric == "calibration":
        axes.axhline(1, color=_GREY, linewidth=1, zorder=1)
    axes.set_title(title)
    starts = [row["period_start_ms"] for row in run.periods]
    margin = max((max(starts) - min(starts)) // 40, 600_000)  # one period alone would get an axis of years
    axes.set_xlim(*np.array([min(starts) - margin, max(starts) + margin], "datetime64[ms]"))
    locator = dates.AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))


def _style() -> dict[str, Any]:
    return {
        "font.size": 9,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _GREY,
        "axes.grid": True,
        "grid.color": _GRID,
        "axes.axisbelow": True,
        "xtick.color": _GREY,
        "ytick.color": _GREY,
        "axes.labelcolor": _GREY,
    }


def _legend(run: Run) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=_COLOURS[position % len(_COLOURS)], linewidth=2) for position in range(len(run.heads))]
    names = list(run.heads)
    if any(row.get(optimal) is not None for row in run.periods for _, optimal, _ in _PANELS if optimal):
        lines.append(Line2D([], [], color=_GREY, linewidth=1.2, linestyle=_DASHED))
        names.append("best possible")
    return lines, names


def _layout(steps: bool, panels: int) -> list[tuple[int, slice]]:
    """Returns the row of each axes and its columns of 6: loss and speed, then the first panel alone, then the others."""
    cells = [(0, slice(0, 3)), (0, slice(3, 6))] if steps else []
    row = 1 if steps else 0
    if panels:
        cells.append((row, slice(0, 6)))
    rest, columns = panels - 1, 3 if panels == 4 else 2
    for panel in range(rest):
        width = 6 // min(columns, rest)
        across = panel % columns
        cells.append((row + 1 + panel // columns, slice(across * width, (across + 1) * width)))
    return cells


def plot(workdir: str | Path) -> list[Path]:
    """Draws a run: loss and speed by step, the metrics of each head by event time, the best possible ones dashed.

    Returns:
        The files written: `<workdir>/report/report.png`.

    Raises:
        ValueError: The folder has no metrics.jsonl, or nothing to draw is in it.
        ImportError: matplotlib is not installed.
    """
    run, pyplot = read(workdir), _pyplot()
    panels = [panel for panel in _PANELS if any(row.get(panel[0]) is not None for row in run.periods)]
    if not run.steps and not panels:
        raise ValueError(
            f"{Path(workdir) / 'metrics.jsonl'} has no rows of kind step or period, so there is nothing to draw yet"
        )
    cells = _layout(bool(run.steps), len(panels))
    heights = [1.0] * (cells[-1][0] + 1)
    if panels:
        heights[1 if run.steps else 0] = 1.4
    with pyplot.rc_context(_style()):
        figure = pyplot.figure(figsize=(12, 0.9 + 2.6 * sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
        axes = [figure.add_subplot(grid[row, columns]) for row, columns in cells]
        if run.steps:
            _draw_steps(axes.pop(0), run, "loss", "loss by step", _COLOURS[0])
            _draw_steps(axes.pop(0), run, "examples_per_s", "examples per second by step", _COLOURS[2])
        for panel in panels:
            _draw_periods(axes.pop(0), run, *panel)
        if panels:
            figure.legend(*_legend(run), loc="outside lower center", ncols=6, frameon=False)
        name = Path(workdir).resolve().name
        figure.suptitle(f"{name}: examples scored before training on them (event time in UTC; bold over faint: running median)")
        out = Path(workdir) / "report" / "report.png"
        out.parent.mkdir(exist_ok=True)
        figure.savefig(out, dpi=130)
        pyplot.close(figure)
    return [out]
