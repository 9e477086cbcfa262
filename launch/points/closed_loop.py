"""A point that closes the loop: feeds of a trained system to simulated users, whose events it is trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.points.measured import Base, Measured

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


@dataclass(frozen=True)
class ClosedLoopPoint:
    """How long the loop is run, and how fine."""

    hours: int = 24
    """Hours of event time that the loop runs."""
    requests_per_hour: float = 120.0
    """Requests an hour, averaged over a day: the world's hours of the day make them more or fewer."""
    number: int = 10
    """Videos of a feed."""
    warm_hours: float = 24.0
    """Hours of the world's own log, before the loop, that a model is trained on in batch: the loop starts from it."""
    sync_s: float = 900.0
    """Seconds of event time after which the users wait until all that can be learned so far is learned and served."""
    window_s: float = 600.0
    """`JoinerConfig.window_s` of the log: an impression is learned from so long after it, and what came until then counts."""
    learns: bool = True
    """Whether the system learns from its feeds; if not, it serves what was learned before the loop, to the end."""
    half_life_h: float = 24.0
    """Of popularity's counts."""
    timeout_s: float = 120.0
    """Seconds (true ones) for which the trainer may bring nothing while it is waited for."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        for name in ("hours", "requests_per_hour", "number", "warm_hours", "sync_s", "window_s", "half_life_h", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"ClosedLoopPoint.{name} must be a number above 0, got {getattr(self, name)}")


CURVES = ("reward", "realised", "regret", "advantage", "coverage", "new")


def measured(rows: Sequence[dict[str, Any]]) -> list[Measured]:
    """Returns rows of a loop as curves along the hours, the policy as the head, and each policy's whole without a curve."""
    found = []
    for row in rows:
        for metric in CURVES:
            along, at = ("hour", float(row["hour"])) if row["kind"] == "hour" else ("", math.nan)
            found.append(Measured(metric, row[metric], row["policy"], along, at))
    return found


def run(point: ClosedLoopPoint, base: Base, folder: Path) -> list[Measured]:
    """Runs the loop in a folder, from the start.

    Raises:
        ValueError: The experiment is none that a loop can be made of, or the trainer brings nothing for too long.
    """
    from rich.console import Console

    from launch.closed_loop import close_loop

    return measured(close_loop(base.load(), point, folder, Console(quiet=True), base.seed))
