"""What a failure costs: AUC lost when a share of the rows goes back to an older snapshot (Monolith, section 3.2.2).

A parameter server that dies is restored from its last snapshot: its rows, vectors and optimizer state alike, are then as old as
that, and training goes on. Here some of the tables' logical shards are lost, the same of every table. Copies of the tables are
kept at several ages before the failure; at the failure a state for each age is made of the trained one and of that copy's
rows of the lost shards. All of them, and the one that lost nothing, go on learning from the same plans, and are judged on the
same examples, each before it learns them.

    learn ... copy (24 h before) ... copy (6 h) ... copy (1 h) ... failure: {none, 1h, 6h, 24h} learn the same, side by side

An id that came since a copy has its first value there: what it would get when it is seen again. Dense weights are not lost.
With `TableConfig.ttl_s` a row that changed hands since is taken for new too.

Out, of each binary head and their mean, over all hours after the failure: `auc` of the state that lost nothing, and for each
age `lost_<age>`, how far its AUC is below, and `log_loss_more_<age>`; `lost_<age>` along `hour` since the failure; `rows` and
`rows_lost` at the failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.points.judged import Judged, less, of_heads, with_mean
from launch.points.measured import Base, Measured

if TYPE_CHECKING:
    from launch.run import Parts
    from monolith_jax.planner import Planned, Planner
    from monolith_jax.tables.table import Group

WHOLE = "whole"
"""The state that lost nothing."""


@dataclass(frozen=True)
class FailuresPoint:
    """Trains, takes a share of the rows back to what they were some hours ago, and trains on."""

    share: float = 1 / 64
    """Share of the logical shards that are lost, to the nearest whole one; above 0 at least one."""
    ages_h: tuple[float, ...] = (1.0, 6.0, 24.0)
    """Ages of the snapshots, in hours of event time."""
    fails_h: float = 72.0
    """Hours of event time that are learned before."""
    after_h: float = 12.0
    """Hours of event time after it that are judged."""

    def __post_init__(self) -> None:
        """Raises ValueError where a setting is out of range."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"FailuresPoint.share must be 0 to 1, got {self.share}")
        if not self.ages_h or len(set(self.ages_h)) < len(self.ages_h) or min(self.ages_h) <= 0:
            raise ValueError(f"FailuresPoint.ages_h must be different hours above 0, got {self.ages_h}")
        if max(self.ages_h) > self.fails_h:
            raise ValueError(
                f"FailuresPoint.ages_h has {max(self.ages_h):g}, before the stream began: fails_h is {self.fails_h:g}"
            )
        if not 0 < self.after_h < math.inf:
            raise ValueError(f"FailuresPoint.after_h must be above 0, got {self.after_h}")


def lost_shards(share: float, num_shards: int, seed: int) -> np.ndarray:
    """Returns which logical shards are lost, bool [L]."""
    number = min(num_shards, max(round(share * num_shards), 1)) if share else 0
    lost = np.zeros(num_shards, np.bool_)
    lost[np.random.default_rng(seed).permutation(num_shards)[:number]] = True
    return lost


def run(point: FailuresPoint, base: Base, folder: Path) -> list[Measured]:
    """Returns what was measured.

    Args:
        point: How.
        base: The experiment; its stream must be long enough. The seed draws the lost shards too.
        folder: For dead letters.

    Raises:
        ValueError: A setting is out of range, the stream is too short, or the experiment is not one that this can follow.
        FloatingPointError: A loss was not finite.
    """
    from launch.points.training import check_experiment
    from launch.process import prepare
    from launch.readers import make_readers
    from launch.run import assemble
    from monolith_jax.planner import Planner

    experiment = base.load()
    check_experiment(experiment, "FailuresPoint")
    prepare(experiment.mesh)
    parts = assemble(experiment)
    lost = lost_shards(point.share, experiment.mesh.num_shards, base.seed)
    planner = Planner(parts.model, make_readers(experiment, experiment.source, range(1), parts.memories, folder), parts.mapper)
    judged = Judged(experiment.heads)
    try:
        hours, rows = _follow(point, parts, planner, lost, judged)
    finally:
        planner.close()
    return list(_measured(point, judged, hours, rows, lost))


def _follow(
    point: FailuresPoint, parts: Parts, planner: Planner, lost: np.ndarray, judged: Judged
) -> tuple[list[float], np.ndarray]:
    """Trains and fails; returns the hour of each step after the failure, and the rows of each shard at it."""
    from launch.points.training import Training
    from monolith_jax.train.step import make_fresh

    training, fresh = Training(parts), make_fresh(parts.model)
    older: dict[float, Any] = {}
    hours: list[float] = []
    began_ms, hour, rows = None, 0.0, np.zeros(lost.size, np.int64)
    for planned in planner:
        now_ms = int(planned.observed.event_time_ms[0])
        began_ms = now_ms if began_ms is None else began_ms
        hour = (now_ms - began_ms) / 3_600_000
        if hour >= point.fails_h + point.after_h:
            return hours, rows
        if hour < point.fails_h:
            rows += new_rows(planned, parts.model.groups, lost.size)
            for age in point.ages_h:
                if age not in older and hour >= point.fails_h - age:
                    older[age] = training.copy().groups
            training.step(planned)
            older = {age: fresh(groups, planned.inputs.plans) for age, groups in older.items()}
            continue
        if not hours:
            _check_copies(point, older, hour)
            for age, groups in older.items():
                training.add(_name(age), restored(training.copy(), groups, lost))
            older.clear()
        scores = training.step(planned)
        judged.add(planned.observed, {name or WHOLE: of_state for name, of_state in scores.items()})
        hours.append(hour - point.fails_h)
    raise ValueError(
        f"the stream ends after {hour:.1f} h of event time; FailuresPoint.fails_h {point.fails_h:g} and after_h "
        f"{point.after_h:g} need {point.fails_h + point.after_h:g}: give the source more examples, or lower them"
    )


def new_rows(planned: Planned, groups: Sequence[Group], num_shards: int) -> np.ndarray:
    """Returns how many rows a plan adds to each logical shard, over all tables, less those that it frees: int64 [L]."""
    added = np.zeros(num_shards, np.int64)
    for plan, freed, group in zip(planned.plans, planned.freed, groups, strict=True):
        devices = len(plan.fresh_rows)
        of_device = num_shards // devices
        for device, rows in enumerate(np.asarray(plan.fresh_rows) // group.maps.rows_per_shard):
            shards = rows[rows < of_device] + device * of_device  # Past the end: padding.
            added += np.bincount(shards, minlength=num_shards)
        added -= np.bincount(freed.shards, minlength=num_shards)
    return added


def _check_copies(point: FailuresPoint, older: Any, hour: float) -> None:
    if missing := [age for age in point.ages_h if age not in older]:
        raise ValueError(
            f"the stream has no examples between hour {point.fails_h - max(missing):g} and hour {hour:.2f} to take a snapshot "
            f"at, of FailuresPoint.ages_h {max(missing):g}"
        )


def restored(state: Any, groups: Sequence[Any], lost: np.ndarray) -> Any:
    """Returns a state with the rows of lost shards from older tables.

    Args:
        state: The newest one.
        groups: Older arrays [L, R, W] of its groups, with first values for ids that came since.
        lost: bool [L].
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def mixed(new: Any, old: Any, lost: Any) -> Any:
        return jnp.where(lost[:, None, None], old, new)

    return state._replace(groups=tuple(mixed(new, old, lost) for new, old in zip(state.groups, groups, strict=True)))


def _name(age: float) -> str:
    return f"{age:g}h"


def _measured(
    point: FailuresPoint, judged: Judged, hours: Sequence[float], rows: np.ndarray, lost: np.ndarray
) -> Iterator[Measured]:
    by_hour: dict[int, list[int]] = {}
    for step, hour in enumerate(hours):
        by_hour.setdefault(math.floor(hour), []).append(step)
    whole, of_loss = judged.auc(WHOLE), judged.log_loss(WHOLE)
    of_hours = {hour: judged.auc(WHOLE, steps) for hour, steps in by_hour.items()}
    yield from of_heads("auc", whole)
    for age in point.ages_h:
        name = _name(age)
        yield from of_heads(f"lost_{name}", less(whole, judged.auc(name)))
        yield from of_heads(f"log_loss_more_{name}", less(judged.log_loss(name), of_loss))
        for hour, steps in by_hour.items():
            by_head = with_mean(less(of_hours[hour], judged.auc(name, steps)))
            yield from (Measured(f"lost_{name}", value, head, "hour", hour) for head, value in by_head.items())
    yield Measured("rows", int(rows.sum()))
    yield Measured("rows_lost", int(rows[lost].sum()))
