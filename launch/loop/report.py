"""What a closed loop reached, as a table and a figure. In: its rows (`launch.closed_loop`). Out: a rich table, a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

POLICIES = ("random", "popularity", "system", "oracle")
"""In the order of a request: each answers it after those before."""


def table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Returns the hours as a table: what each policy reached, and of the system what there was left to reach."""
    from rich.table import Table

    more = ("regret", "advantage", "coverage", "new")
    out = Table("hour", "requests", *POLICIES, *more, title="reward of an impression, expected; the system's: regret ...")
    keys = dict.fromkeys((row["kind"], row.get("hour")) for row in rows)
    for key in keys:
        of = {row["policy"]: row for row in rows if (row["kind"], row.get("hour")) == key}
        system = of["system"]
        cells = [f"{of[name]['reward']:.4f}" for name in POLICIES]
        cells += [f"{system['regret']:.4f}", *(f"{100 * system[name]:.1f} %" for name in more[1:])]
        out.add_row("all" if key[0] == "total" else str(key[1]), f"{system['feeds']:,}", *cells, end_section=key[0] == "total")
    return out


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws rewards and regrets by hour.

    Raises:
        ImportError: The extra `report` is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for name in POLICIES:
        of = [row for row in rows if row["kind"] == "hour" and row["policy"] == name]
        hours = [row["hour"] for row in of]
        panels[0].plot(hours, [row["reward"] for row in of], label=name, linewidth=2.5 if name == "system" else 1.2)
        panels[1].plot(hours, [row["regret"] for row in of], label=name, linewidth=2.5 if name == "system" else 1.2)
    for panel, title in zip(panels, ("expected reward of an impression", "regret of an impression"), strict=True):
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    panels[0].legend(ncols=4, frameon=False)
    panels[1].set_xlabel("hour of the loop")
    figure.savefig(path, dpi=120)
