"""A sweep's gin file to the points that it runs. Imports nothing heavy until it loads.

In: gin files and overrides. Out: a `Sweep`, and its `Point`s: the product of its axes with its seeds, each with the files and
bindings of its experiment and the config of what it does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launch.cli import gin_value
from launch.points.kinds import POINTS, PointConfig
from launch.points.measured import Base
from launch.points.train import TrainPoint

Value = bool | int | float | str
_OF_POINTS = ("status", "seconds", "peak_rss_mb", "reason")


@dataclass(frozen=True, kw_only=True)
class AxisConfig:
    """One thing that changes from point to point."""

    name: str
    """What the tables call it."""
    labels: tuple[str, ...]
    """What they call its values."""
    bind: tuple[str, ...] = ()
    """The bindings that it sets: `TrainConfig.batch_size`, `CollisionsPoint.rows`; several change together."""
    values: tuple[tuple[Value, ...], ...] = ()
    """For each label a value for each of `bind`. Text that begins with one of `@%([{` is gin's own."""
    gin_files: tuple[str, ...] = ()
    """For each label a gin file more, read after those of the sweep; none: no files."""

    def __post_init__(self) -> None:
        """Raises ValueError where the lengths do not fit or labels repeat."""
        if not self.labels:
            raise ValueError(f"axis {self.name!r} has no labels; give one for each value")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"axis {self.name!r}: labels must differ, got {', '.join(self.labels)}")
        if not self.bind and not self.gin_files:
            raise ValueError(f"axis {self.name!r} sets nothing: give bind and values, or gin_files")
        if len(self.values) != (len(self.labels) if self.bind else 0):
            raise ValueError(
                f"axis {self.name!r} has {len(self.labels)} labels and {len(self.values)} values; one for each label"
            )
        if wrong := [values for values in self.values if len(values) != len(self.bind)]:
            raise ValueError(f"axis {self.name!r}: values {wrong[0]!r} are not one for each of bind ({', '.join(self.bind)})")
        if len(self.gin_files) not in (0, len(self.labels)):
            raise ValueError(
                f"axis {self.name!r} has {len(self.labels)} labels and {len(self.gin_files)} gin_files; one for each"
            )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Points to run, and how to show what they measured."""

    name: str
    """Of the report."""
    gin_files: tuple[str, ...]
    """Of the experiment."""
    bindings: tuple[str, ...] = ()
    """Over them: `TrainConfig.steps = 100`."""
    point: PointConfig = field(default_factory=TrainPoint)
    """What a point does."""
    axes: tuple[AxisConfig, ...] = ()
    """Each value of one with each of the others."""
    seeds: tuple[int, ...] = (0,)
    """Each point is run with each of them."""
    seed_bindings: tuple[str, ...] = ("TrainConfig.seed",)
    """What is set to the seed."""
    metrics: tuple[str, ...] = ()
    """Which the tables and the report show, in this order; none: a choice of them."""
    heads: tuple[str, ...] = ()
    """Of which heads; none: of the mean over heads, where there is one, and of what has no head."""
    lower_is_better: tuple[str, ...] = ()
    """Metrics of which less is better."""
    baseline: str = ""
    """`axis=label`: what the other labels are compared with, seed by seed; empty: no comparison."""
    workers: int = 0
    """Processes at a time; 0: as many as have their cores and their memory."""
    cores: int = 1
    """Of a process."""
    memory_gb: float = 8.0
    """A process that holds more is ended, and its point has failed."""
    timeout_s: float = 7200.0
    """A point that takes longer is ended, and has failed."""

    def __post_init__(self) -> None:
        """Raises ValueError for what makes no sense."""
        names = [axis.name for axis in self.axes]
        if len(set(names)) < len(names):
            raise ValueError(f"Sweep.axes must have different names, got {', '.join(names)}")
        if taken := sorted(set(names) & {"point", "seed", "head", "metric", "along", "at", "value", *_OF_POINTS}):
            raise ValueError(f"Sweep.axes: {', '.join(taken)} is a column of the results already; take another name")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"Sweep.seeds must be one or more that differ, got {self.seeds}")
        for name in ("cores", "memory_gb", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Sweep.{name} must be above 0, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"Sweep.workers must be 0 or above, got {self.workers}")
        axis, _, label = self.baseline.partition("=")
        known = {f"{axis.name}={label}" for axis in self.axes for label in axis.labels}
        if self.baseline and f"{axis.strip()}={label.strip()}" not in known:
            raise ValueError(f"Sweep.baseline is {self.baseline!r}; expected one of {', '.join(sorted(known)) or 'no axis'}")


class Point(NamedTuple):
    """One run of a sweep."""

    index: int
    key: str
    """Its folder's name."""
    labels: dict[str, str]
    """By axis."""
    base: Base
    """Its experiment."""
    overrides: tuple[str, ...]
    """Of the sweep's `point`."""

    @property
    def title(self) -> str:
        """For people."""
        return ", ".join([*(f"{axis} {label}" for axis, label in self.labels.items()), f"seed {self.base.seed}"])


def divided(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides of the sweep, and those of every point's experiment."""
    ours = {"Sweep", "AxisConfig", *(config.__name__ for config in POINTS)}
    of_sweep = [override for override in overrides if _config_of(override) in ours]
    return of_sweep, [override for override in overrides if override not in of_sweep]


def _config_of(binding: str) -> str:
    return binding.partition("=")[0].strip().rpartition("/")[2].partition(".")[0]


def load_sweep(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep.

    Args:
        files: gin files.
        overrides: Of the sweep's own bindings.

    Raises:
        ValueError: As `monolith_jax.experiment.load`.
    """
    from monolith_jax.experiment import load_as

    return load_as(Sweep, (AxisConfig, *POINTS), files, overrides)


def make_points(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Point]:
    """Returns the points: all labels under the first seed, then under the next.

    Args:
        sweep: The sweep.
        overrides: Bindings of the experiment, over those of the sweep and of the files, its axes' files too.

    Raises:
        ValueError: A binding is one that an axis or the seeds set: it would change nothing.
    """
    fixed = {name: f"axis {axis.name}" for axis in sweep.axes for name in axis.bind}
    fixed |= dict.fromkeys(sweep.seed_bindings, "Sweep.seed_bindings")
    for binding in (*sweep.bindings, *overrides):
        if (name := binding.partition("=")[0].strip()) in fixed:
            raise ValueError(f"{name} is set by {fixed[name]}, so that {binding!r} would change nothing: leave one of them out")
    own, points = {config.__name__ for config in POINTS}, []
    chosen = list(itertools.product(*(range(len(axis.labels)) for axis in sweep.axes)))
    for seed, places in itertools.product(sweep.seeds, chosen):
        labels = {axis.name: axis.labels[place] for axis, place in zip(sweep.axes, places, strict=True)}
        files, bound = list(sweep.gin_files), []
        for axis, place in zip(sweep.axes, places, strict=True):
            files += axis.gin_files[place : place + 1]
            values = axis.values[place] if axis.bind else ()
            bound += [f"{name} = {_text(value)}" for name, value in zip(axis.bind, values, strict=True)]
        bound += [f"{name} = {seed}" for name in sweep.seed_bindings]
        of_experiment = [binding for binding in bound if _config_of(binding) not in own]
        base = Base(tuple(files), (*sweep.bindings, *overrides, *of_experiment), seed)
        index = len(points)
        of_point = tuple(binding for binding in bound if _config_of(binding) in own)
        points.append(Point(index, _key(index, labels, seed), labels, base, of_point))
    return points


def _text(value: Value) -> str:
    return gin_value(value) if isinstance(value, str) else repr(value)


def _key(index: int, labels: Mapping[str, str], seed: int) -> str:
    words = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", label).strip("_") for label in labels.values())
    return f"{index:04d}-{words[:80]}-seed{seed}" if words else f"{index:04d}-seed{seed}"


def check_points(sweep_files: Sequence[str | Path], sweep_overrides: Sequence[str], points: Sequence[Point]) -> list[str]:
    """Loads the experiment and the config of every point; returns the operative configuration of each experiment as text.

    Raises:
        ValueError: One cannot be loaded; it is named.
    """
    from monolith_jax.experiment import to_gin

    texts = []
    for point in points:
        try:
            load_sweep(sweep_files, [*sweep_overrides, *point.overrides])
            texts.append(to_gin(point.base.load()) if point.base.gin_files else "")
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"point {point.title}: {error}") from error
    return texts
