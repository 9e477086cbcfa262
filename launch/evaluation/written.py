"""Rows of an evaluation to a file, tables and figures.

In: rows of one part (ranking, retrieval, feed). Out: `<output>/evaluation.jsonl`, in which they take the place of the part's
earlier rows, tables to print, and figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

NAME = "evaluation.jsonl"


def write(output: Path, part: str, rows: Sequence[Row], told: Row) -> Path:
    """Writes the rows of a part, behind those of other parts; returns the file.

    Args:
        output: A folder; made if it is not there.
        part: Name of the part, which each row gets.
        rows: The rows.
        told: What the part was measured with, a row of kind "evaluated".

    Raises:
        ValueError: The folder cannot be written to.
    """
    path = output / NAME
    try:
        output.mkdir(parents=True, exist_ok=True)
        kept = [line for line in path.read_text().splitlines() if _part_of(line) != part] if path.is_file() else []
        lines = [json.dumps({"part": part, **row}) for row in ({"kind": "evaluated", **told}, *rows)]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in (*kept, *lines)))
        os.replace(fresh, path)
    except OSError as error:
        raise ValueError(f"{output} cannot be written to ({error.strerror}): name another folder as --output") from None
    return path


def _part_of(line: str) -> str:
    try:
        return json.loads(line)["part"]
    except (ValueError, KeyError, TypeError):
        return ""


def read(output: Path, part: str = "") -> list[Row]:
    """Returns the rows of a part, or of all parts, that `write` wrote."""
    lines = (output / NAME).read_text().splitlines()
    return [json.loads(line) for line in lines if not part or _part_of(line) == part]


def with_interval(row: Row, name: str, form: str = ".4f") -> str:
    """Returns a metric of a row as a cell: the value, and its interval where there is one."""
    value, low, high = (row.get(name + suffix) for suffix in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [dim]{low:{form}} to {high:{form}}[/dim]"


def table(title: str, *names: str, caption: str = "") -> Any:
    """Returns an empty table, the first column of names, the others of numbers."""
    from rich import box
    from rich.table import Table

    out = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left", box=box.SIMPLE_HEAD)
    for position, name in enumerate(names):
        out.add_column(name, justify="right" if position else "left")
    return out
