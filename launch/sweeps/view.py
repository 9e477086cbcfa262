"""What a sweep looks like while it runs: a live table on a terminal, a line for each event in a log."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.sweeps.config import Point, Sweep
from launch.sweeps.folder import is_finished, read_json
from launch.sweeps.pool import Told

_LATEST = 8
_SHOWN = 4


class View:
    """Takes what becomes of points, and shows it."""

    def __init__(self, sweep: Sweep, workdir: Path, points: Sequence[Point], todo: Sequence[Point], console: Console) -> None:
        """Nothing is shown yet; on a terminal use it as a context."""
        self._sweep, self._workdir, self._console = sweep, workdir, console
        self._total, self._todo = len(points), len(todo)
        self._done, self._failed = 0, 0
        self._running: dict[int, tuple[Point, float]] = {}
        self._latest: list[tuple[Point, str, str]] = []
        self._took: list[float] = []
        self._began = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> View:
        """Shows the table."""
        self._live = Live(console=self._console, refresh_per_second=4)
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leaves the last table standing."""
        assert self._live is not None
        self._live.update(self._table())
        self._live.__exit__(kind, error, trace)

    def tell(self, told: Told | None) -> None:
        """Takes what became of a point; None: time went by."""
        if told is not None:
            self._count(told)
        if self._live is not None:
            self._live.update(self._table())
        elif told is not None:
            self._console.print(self._line(told), highlight=False, soft_wrap=True, markup=False)

    def _count(self, told: Told) -> None:
        index = told.point.index
        if told.what == "started":
            self._running[index] = (told.point, time.monotonic())
            return
        _, began = self._running.pop(index, (told.point, time.monotonic()))
        if told.what == "finished":
            self._done += 1
            self._took.append(time.monotonic() - began)
        else:
            self._failed += 1
        self._latest = [*self._latest, (told.point, told.what, told.reason or self._figures(told.point))][-_LATEST:]

    def _figures(self, point: Point) -> str:
        """Returns a few of what a point measured, those that the sweep shows first."""
        if not is_finished(self._workdir, point.key):
            return ""
        rows = [row for row in read_json(self._workdir / "points" / point.key / "result.json")["rows"] if not row["along"]]
        wanted = self._sweep.metrics or ("test_auc", "auc")
        heads = (*self._sweep.heads, "mean", "")
        chosen = [row for metric in wanted for row in rows if row["metric"] == metric and row["head"] in heads] or rows
        return ", ".join(
            f"{row['metric']} {row['head']} ".replace("  ", " ") + ("-" if row["value"] is None else f"{row['value']:.4g}")
            for row in chosen[:_SHOWN]
        )

    def _left(self) -> str:
        """Returns how long the rest will take, as far as what ended tells."""
        if not self._took:
            return "time left not known yet"
        rest = self._todo - self._done - self._failed
        at_once = max(len(self._running), 1)
        now = time.monotonic()
        running = sum(min(now - began, statistics.fmean(self._took)) for _, began in self._running.values())
        left = max(rest * statistics.fmean(self._took) - running, 0) / at_once
        return f"{self._done / (now - self._began) * 3600:.0f} points/h, {_clock(left)} left"

    def _state(self) -> str:
        finished = self._total - self._todo + self._done
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{finished} of {self._total} points finished{failed}, {len(self._running)} running, {self._left()}"

    def _line(self, told: Told) -> str:
        if told.what == "started":
            return f"started: {told.point.title}"
        return f"{told.what}: {told.point.title}: {self._latest[-1][2]}; {self._state()}"

    def _table(self) -> Group:
        table = Table("point", "for", "", title=Text(f"sweep {self._sweep.name}"), title_justify="left", expand=True)
        now = time.monotonic()
        for point, what, told in self._latest:
            table.add_row(Text(point.title), "", Text(f"{what}: {told}", style="red" if what == "failed" else ""))
        for point, began in self._running.values():
            table.add_row(Text(point.title), _clock(now - began), "running")
        finished = self._total - self._todo + self._done
        return Group(table, ProgressBar(total=self._total, completed=finished), Text(self._state()))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
