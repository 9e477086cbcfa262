"""What the points of a sweep measured, and the tables that tell of it. Imports nothing heavy.

In: the folder of a sweep, finished or not. Out: `Results`, and from them `Grid`s of text, which Markdown, a terminal and
a report show each in its way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from launch.sweeps.folder import is_finished, read_json, reason_of
from monolith_jax.evaluate.spread import Spread, paired, spread

_MOST_COLUMNS = 8
_MOST_PLACES = 12


class Value(NamedTuple):
    """One number of one point."""

    point: int
    labels: tuple[str, ...]
    """Of the axes, in their order."""
    seed: int
    head: str
    metric: str
    along: str
    at: float
    value: float


class Column(NamedTuple):
    """A figure that is shown."""

    metric: str
    head: str

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.metric}, {self.head}" if self.head else self.metric


class Grid(NamedTuple):
    """A table of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[tuple[int, int]] = frozenset()
    """Cells that stand out, as (row, column)."""
    note: str = ""
    num_labels: int = 1
    """Columns that hold words; the others hold numbers."""


@dataclass(frozen=True)
class Results:
    """A sweep's plan, and what is there of its figures."""

    plan: dict[str, Any]
    """sweep.json."""
    values: tuple[Value, ...]
    points: tuple[dict[str, Any], ...]
    """One for each point: index, labels, seed, status (finished, failed, missing), seconds, peak_rss_mb, reason."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Names."""
        return tuple(axis["name"] for axis in self.plan["axes"])

    @property
    def combinations(self) -> tuple[tuple[str, ...], ...]:
        """Of labels, in the order of the points."""
        return tuple(dict.fromkeys(tuple(point["labels"].values()) for point in self.plan["points"]))

    def by_seed(self, labels: tuple[str, ...], column: Column, along: str = "", at: float = math.nan) -> dict[int, float]:
        """Returns a figure of a combination for each seed that has it."""
        return dict(self._by_figure.get((labels, *column, along, at if along else None), {}))

    @cached_property
    def _by_figure(self) -> dict[tuple[Any, ...], dict[int, float]]:
        # Tables and figures ask for thousands of cells: a pass over all values for each took minutes.
        found: dict[tuple[Any, ...], dict[int, float]] = {}
        for one in self.values:
            key = (one.labels, one.metric, one.head, one.along, one.at if one.along else None)
            found.setdefault(key, {})[one.seed] = one.value
        return found

    def columns(self, along: str | None = None) -> list[Column]:
        """Returns the figures to show: those that the sweep names, else a choice; `along`: those of a curve."""
        known = dict.fromkeys(Column(one.metric, one.head) for one in self.values if bool(one.along) == (along is not None))
        metrics = self.plan["metrics"] or _choice(known)
        out = []
        for metric in metrics:
            heads = [column.head for column in known if column.metric == metric]
            chosen = [head for head in self.plan["heads"] if head in heads]
            chosen = chosen or [head for head in ("mean", "") if head in heads][:1] or heads
            out += [Column(metric, head) for head in chosen]
        return out

    @property
    def baseline(self) -> tuple[str, str] | None:
        """Axis and label that others are compared with."""
        axis, equals, label = self.plan["baseline"].partition("=")
        return (axis.strip(), label.strip()) if equals else None


def _choice(known: Iterable[Column]) -> list[str]:
    metrics = list(dict.fromkeys(column.metric for column in known))
    return [name for name in ("test_auc", "auc") if name in metrics][:1] or metrics[:_MOST_COLUMNS]


def read_results(workdir: Path) -> Results:
    """Reads a sweep.

    Raises:
        ValueError: The folder holds no sweep.
    """
    if not (workdir / "sweep.json").is_file():
        raise ValueError(f"{workdir} holds no sweep.json: expected the folder of a sweep, which `python -m launch.sweep` makes")
    plan = read_json(workdir / "sweep.json")
    values, points = [], []
    for point in plan["points"]:
        told = {"index": point["index"], "labels": point["labels"], "seed": point["seed"], "seconds": math.nan, "versions": {}}
        told |= {"peak_rss_mb": math.nan, "reason": reason_of(workdir, point["key"])}
        told["status"] = "failed" if told["reason"] else "missing"
        if is_finished(workdir, point["key"]):
            result = read_json(workdir / "points" / point["key"] / "result.json")
            told |= {"status": "finished", "seconds": result["seconds"], "peak_rss_mb": result["peak_rss_mb"]}
            told["versions"] = result.get("versions", {})
            labels = tuple(point["labels"].values())
            for row in result["rows"]:
                at, value = (math.nan if row[name] is None else float(row[name]) for name in ("at", "value"))
                values.append(Value(point["index"], labels, point["seed"], row["head"], row["metric"], row["along"], at, value))
        points.append(told)
    return Results(plan, tuple(values), tuple(points))


def main_grid(results: Results) -> Grid:
    """Returns mean and standard deviation over seeds of each figure; the best of a column stands out."""
    columns, combinations = results.columns(), results.combinations
    spreads = [[spread(list(results.by_seed(labels, column).values())) for column in columns] for labels in combinations]
    rows = tuple(
        (*labels, *(cell(one, len(results.plan["seeds"])) for one in of_row))
        for labels, of_row in zip(combinations, spreads, strict=True)
    )
    best = set()
    for place, column in enumerate(columns):
        worth = [_worth(results, column.metric, of_row[place].mean) for of_row in spreads]
        known = [one for one in worth if math.isfinite(one)]
        if known and len({one for one in worth if not math.isnan(one)}) > 1:
            best |= {(row, place + len(results.axes)) for row, one in enumerate(worth) if one == max(known)}
    seeds = ", ".join(map(str, results.plan["seeds"]))
    note = f"Mean ± standard deviation over seeds {seeds}; (n): of fewer. Bold: the best mean, where a best is known."
    titles = tuple(column.title for column in columns)
    return Grid("Figures", (*results.axes, *titles), rows, frozenset(best), note, len(results.axes))


_MORE = ("auc", "gauc", "recall", "ndcg", "hit_rate", "mrr", "learned", "reward", "advantage", "gain")
_LESS = ("loss", "rmse", "mae", "regret", "lost")


def _worth(results: Results, metric: str, mean: float) -> float:
    """Returns what is higher the better a mean is; NaN where nobody said which is better."""
    words = metric.removeprefix("shard_").removeprefix("test_")
    if "calibration" in words:
        return -abs(mean - 1)
    if metric in results.plan["lower_is_better"] or any(word in words for word in _LESS):
        return -mean
    return mean if any(word in words for word in _MORE) else math.nan


def compared_grid(results: Results) -> Grid | None:
    """Returns differences to the baseline seed by seed with 95 % intervals; those that exclude 0 stand out."""
    if results.baseline is None:
        return None
    axis, label = results.baseline
    place, columns = results.axes.index(axis), results.columns()
    rows, strong = [], set()
    for labels in results.combinations:
        if labels[place] == label:
            continue
        against = (*labels[:place], label, *labels[place + 1 :])
        spreads = [paired(results.by_seed(labels, one), results.by_seed(against, one)) for one in columns]
        sure = [(one.is_above or one.is_below) and one.sd > 1e-9 * abs(one.mean) for one in spreads]
        strong |= {(len(rows), column + len(results.axes)) for column, is_sure in enumerate(sure) if is_sure}
        rows.append((*labels, *(difference(one, len(results.plan["seeds"])) for one in spreads)))
    note = "Mean difference by seed and its 95 % interval (Student's t); (n): of fewer seeds. Bold: the interval excludes 0."
    titles = tuple(column.title for column in columns)
    return Grid(f"Against {axis} {label}", (*results.axes, *titles), tuple(rows), frozenset(strong), note, len(results.axes))


def curve_grids(results: Results) -> list[Grid]:
    """Returns a table for each figure that runs along something: a column for each place, of many an even choice."""
    grids = []
    for along in dict.fromkeys(one.along for one in results.values if one.along):
        for column in results.columns(along):
            places = places_of(results, column, along)
            if not places:
                continue
            number = min(len(places), _MOST_PLACES)
            places = [places[round(one * (len(places) - 1) / max(number - 1, 1))] for one in range(number)]
            rows = tuple(
                (*labels, *(_cell(results, labels, column, along, at) for at in places)) for labels in results.combinations
            )
            titles = (*results.axes, *(f"{along} {at:g}" for at in places))
            grids.append(Grid(f"{column.title}, by {along}", titles, rows, num_labels=len(results.axes)))
    return grids


def places_of(results: Results, column: Column, along: str) -> list[float]:
    """Returns where a curve has values, rising."""
    of_curve = (one.at for one in results.values if (one.metric, one.head, one.along) == (*column, along))
    return sorted({at for at in of_curve if not math.isnan(at)})


def missing_grid(results: Results) -> Grid | None:
    """Returns the points that have no result; None: all have."""
    rows = tuple(
        (*point["labels"].values(), str(point["seed"]), point["status"], point["reason"])
        for point in results.points
        if point["status"] != "finished"
    )
    return Grid("Without a result", (*results.axes, "seed", "status", "reason"), rows, num_labels=99) if rows else None


def all_grids(results: Results) -> list[Grid]:
    """Returns every table of a sweep, in the order in which they are shown."""
    grids = [main_grid(results), compared_grid(results), *curve_grids(results), missing_grid(results)]
    return [grid for grid in grids if grid is not None]


def number(value: float, scale: float | None = None) -> str:
    """Returns a number with as many digits as help: four of a fraction, none of a count, two that count of what is tiny.

    Args:
        value: The number.
        scale: The size whose digits it gets; None: its own.
    """
    if math.isnan(value):
        return "-"
    if math.isinf(value) or value == 0:
        return f"{value:.0f}".removeprefix("-" if value == 0 else "")
    size = abs(value if scale is None else scale)
    whole = value == round(value) and (size >= 10 if scale is None else size >= 1000)
    form = ",.0f" if whole or size >= 1000 else ".2f" if size >= 10 else ".4f" if size >= 1e-3 else ".1e"
    text = format(value, form)
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def _cell(results: Results, labels: tuple[str, ...], column: Column, along: str, at: float) -> str:
    return cell(spread(list(results.by_seed(labels, column, along, at).values())), len(results.plan["seeds"]))


def cell(one: Spread, seeds: int) -> str:
    """Returns mean ± standard deviation, and of how many where that is fewer than the seeds."""
    if not one.number:
        return "-"
    fewer = f" ({one.number})" if one.number < seeds else ""
    if not one.sd > 1e-9 * abs(one.mean):  # Sums of equal numbers round.
        return number(one.mean) + fewer
    # The digits of the mean, unless the spread would vanish in them.
    sd = number(one.sd, one.mean)
    return f"{number(one.mean, one.mean)} ± {sd if float(sd.replace(',', '')) else number(one.sd)}{fewer}"


def difference(one: Spread, seeds: int) -> str:
    """Returns a mean difference with its interval, and of how many seeds where these are fewer; copies give no interval."""
    if not one.number:
        return "-"
    same = math.isnan(one.low) or one.high - one.low <= 1e-9 * abs(one.mean)
    scale = abs(one.mean) if same else max(abs(one.low), abs(one.high))
    signed = ("+" if one.mean > 0 else "") + number(one.mean, scale)
    fewer = f" ({one.number})" if one.number < seeds else ""
    return (signed if same else f"{signed} ({number(one.low, scale)} to {number(one.high, scale)})") + fewer


def facts(results: Results) -> list[tuple[str, str]]:
    """Returns what a reader has to know of a sweep, as name and text."""
    import datetime

    plan = results.plan
    started = datetime.datetime.fromtimestamp(plan["started"], datetime.UTC)
    took = [point["seconds"] for point in results.points if point["status"] == "finished"]
    machine = plan["machine"]
    work = f"{sum(took):,.0f} s in all, the longest {max(took, default=0):,.0f} s"
    lost = {what: sum(point["status"] == what for point in results.points) for what in ("failed", "missing")}
    without = "".join(f", {number} {what}" for what, number in lost.items() if number)
    return [
        ("command", plan["command"]),
        ("date", f"{started:%Y-%m-%d}"),
        ("points", f"{len(took)} of {len(results.points)} finished{without}; {work}"),
        ("seeds", ", ".join(map(str, plan["seeds"]))),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}"),
        *_versions(results),
    ]


def _versions(results: Results) -> list[tuple[str, str]]:
    """Returns what the finished points ran with; several where the sweep went on with others."""
    found = [point["versions"] for point in results.points if point["versions"]] or [results.plan["versions"]]
    told = list(dict.fromkeys(", ".join(f"{name} {version}" for name, version in one.items()) for one in found))
    points = {text: sum(", ".join(f"{a} {b}" for a, b in one.items()) == text for one in found) for text in told}
    if len(told) == 1:
        return [("versions", told[0])]
    return [(f"versions of {points[text]} points", text) for text in told]


def unknown_names(results: Results) -> list[str]:
    """Returns metrics and heads that the sweep names and no finished point has."""
    metrics, heads = ({getattr(one, name) for one in results.values} for name in ("metric", "head"))
    plan = results.plan
    wrong = [f"Sweep.metrics: {name}" for name in plan["metrics"] if name not in metrics]
    wrong += [f"Sweep.lower_is_better: {name}" for name in plan["lower_is_better"] if name not in metrics]
    return wrong + [f"Sweep.heads: {name}" for name in plan["heads"] if name not in heads]


def curves(results: Results) -> list[tuple[str, Column, Sequence[float]]]:
    """Returns each figure that runs along something: along what, which, where."""
    return [
        (along, column, places)
        for along in dict.fromkeys(one.along for one in results.values if one.along)
        for column in results.columns(along)
        if (places := places_of(results, column, along))
    ]
