"""Rows of an evaluation to a file, tables and figures.

In: rows of one part (ranking, retrieval, feed). Out: `<output>/evaluation.jsonl`, in which they take the place of the part's
earlier rows, tables to print, and figures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from launch.sweeps.folder import Busy, locked

Row = Mapping[str, Any]

NAME = "evaluation.jsonl"
WAIT_S = 30.0
"""For another evaluation that writes to the folder."""


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
    lines = [json.dumps({"part": part, **row}) for row in ({"kind": "evaluated", **told}, *rows)]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _alone(output):
            kept = [line for line in path.read_text().splitlines() if _part_of(line) != part] if path.is_file() else []
            fresh = path.with_suffix(".new")
            fresh.write_text("".join(f"{line}\n" for line in (*kept, *lines)))
            os.replace(fresh, path)
    except OSError as error:
        raise ValueError(f"{output} cannot be written to ({error.strerror}): name another folder as --output") from None
    return path


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Holds a folder's lock; another evaluation that writes there is waited for, as it takes no longer than a file."""
    until_s = time.monotonic() + WAIT_S
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(output / "evaluation.lock"))
                break
            except Busy:
                if time.monotonic() > until_s:
                    raise ValueError(
                        f"another process has held {output / 'evaluation.lock'} for {WAIT_S:g} s: end it, or name "
                        "another folder as --output"
                    ) from None
                time.sleep(0.05)
        yield


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
