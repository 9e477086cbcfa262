"""A sweep's results to files and tables: `results.parquet`, `points.parquet`, `results.md`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from launch.sweeps.results import Grid, Results, all_grids, facts, read_results


def write_tables(workdir: Path) -> list[Table]:
    """Writes what there is of a sweep's results; returns the tables for a terminal.

    Raises:
        ValueError: The folder holds no sweep.
    """
    results = read_results(workdir)
    pq.write_table(values_table(results), workdir / "results.parquet")
    pq.write_table(points_table(results), workdir / "points.parquet")
    grids = all_grids(results)
    (workdir / "results.md").write_text(markdown(results, grids), encoding="utf-8")
    return [_for_terminal(grid) for grid in grids]


def values_table(results: Results) -> pa.Table:
    """Returns every number: point int32, a string column for each axis, seed int64, head, metric, along, at, value."""
    values = results.values
    columns: dict[str, pa.Array] = {"point": pa.array([one.point for one in values], pa.int32())}
    for place, axis in enumerate(results.axes):
        columns[axis] = pa.array([one.labels[place] for one in values], pa.string())
    columns["seed"] = pa.array([one.seed for one in values], pa.int64())
    for name in ("head", "metric", "along"):
        columns[name] = pa.array([getattr(one, name) for one in values], pa.string())
    columns["at"] = pa.array([one.at if one.along else None for one in values], pa.float64())
    columns["value"] = pa.array([one.value for one in values], pa.float64())
    told = {name: results.plan[name] for name in ("name", "command", "versions", "machine", "seeds")}
    return pa.table(columns).replace_schema_metadata({"sweep": json.dumps(told)})


def points_table(results: Results) -> pa.Table:
    """Returns a row for each point: point, labels, seed, status, seconds, peak_rss_mb, reason."""
    points = results.points
    columns: dict[str, pa.Array] = {"point": pa.array([point["index"] for point in points], pa.int32())}
    for axis in results.axes:
        columns[axis] = pa.array([point["labels"][axis] for point in points], pa.string())
    columns["seed"] = pa.array([point["seed"] for point in points], pa.int64())
    columns["status"] = pa.array([point["status"] for point in points], pa.string())
    for name in ("seconds", "peak_rss_mb"):
        columns[name] = pa.array([point[name] for point in points], pa.float64())
    columns["reason"] = pa.array([point["reason"] for point in points], pa.string())
    return pa.table(columns)


def markdown(results: Results, grids: list[Grid]) -> str:
    """Returns a sweep as a page of Markdown."""
    lines = [f"# {_escaped(results.plan['name'])}", ""]
    lines += [f"- {name}: {_as_code(text) if name == 'command' else _escaped(text)}" for name, text in facts(results)]
    for grid in grids:
        lines += ["", f"## {_escaped(grid.title)}", ""]
        lines.append("| " + " | ".join(map(_escaped, grid.columns)) + " |")
        lines.append("|" + "|".join("---" if place < grid.num_labels else "---:" for place in range(len(grid.columns))) + "|")
        for row, cells in enumerate(grid.rows):
            shown = [
                f"**{_escaped(text)}**" if (row, place) in grid.strong else _escaped(text) for place, text in enumerate(cells)
            ]
            lines.append("| " + " | ".join(shown) + " |")
        lines += ["", grid.note] if grid.note else []
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Returns text that Markdown shows as it stands, in a table too."""
    text = re.sub(r"[\\|*`\[]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)  # Within a word `_` means nothing.
    return " ".join(re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;").split())


def _as_code(text: str) -> str:
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def _for_terminal(grid: Grid) -> Table:
    from rich.text import Text

    table = Table(title=Text(grid.title), title_justify="left", caption=grid.note or None, caption_justify="left")
    for place, name in enumerate(grid.columns):
        table.add_column(Text(name), justify="left" if place < grid.num_labels else "right")
    for row, cells in enumerate(grid.rows):
        styled = [Text(text, style="bold" if (row, place) in grid.strong else "") for place, text in enumerate(cells)]
        table.add_row(*styled)
    return table
