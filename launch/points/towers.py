"""Models against one another: trains the experiment, tests it, and counts its parameters; or so for each head alone.

In: an experiment with heads. Out: of each binary head AUC, GAUC and log-loss on the test source (of the online totals where
there is none), their means over the heads, the error of a regression, and the numbers of floats that were learned, outside the
tables and in them.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.points.measured import Base, Measured
from launch.points.train import trained

if TYPE_CHECKING:
    from monolith_jax.evaluate.report import Run
    from monolith_jax.experiment import Experiment

BINARY, REGRESSION = ("auc", "gauc", "log_loss"), ("rmse",)


@dataclass(frozen=True)
class TowersPoint:
    """Trains a model, tests it, and counts its parameters."""

    separately: bool = False
    """Whether each head is trained alone, over the same features and with tables of its own ("single task"); parameters are
    then those of all these models together."""


def run(point: TowersPoint, base: Base, folder: Path) -> list[Measured]:
    """Returns what was measured.

    Args:
        point: How.
        base: The experiment, with heads.
        folder: A run folder a head, or one, is made in it. Those of a killed try that had ended are not run again.

    Raises:
        ValueError: The experiment has no heads, or cannot be trained.
    """
    measured: list[Measured] = []
    sums = {"dense_parameters": 0.0, "table_parameters": 0.0, "rows": 0.0}
    for name, experiment in runs_of(point, base.load()).items():
        of_run = _trained(experiment, folder / name)
        measured += _quality(of_run)
        sums["dense_parameters"] += dense_parameters(experiment)
        sums["table_parameters"] += of_run.summary["rows"] * _dim(experiment)
        sums["rows"] += of_run.summary["rows"]
    for metric in BINARY:
        values = [one.value for one in measured if one.metric == metric]
        if values:
            measured.append(Measured(metric, sum(values) / len(values), "mean"))
    return measured + [Measured(metric, value) for metric, value in sums.items()]


def runs_of(point: TowersPoint, experiment: Experiment) -> dict[str, Experiment]:
    """Returns the experiments that a point trains, by the names of their folders.

    Raises:
        ValueError: There is nothing to measure.
    """
    import dataclasses

    if not experiment.heads:
        raise ValueError("TowersPoint measures heads, and Experiment.heads is empty: set Experiment.model and heads")
    if not point.separately:
        return {"together": experiment}
    return {f"alone_{head.label}": dataclasses.replace(experiment, heads=(head,)) for head in experiment.heads}


def dense_parameters(experiment: Experiment) -> int:
    """Returns the number of floats that an experiment learns outside its tables, counted from its model."""
    import jax

    from monolith_jax.mesh import make_mesh
    from monolith_jax.train.shapes import trace_model
    from monolith_jax.train.state import make_model

    mesh, parts = make_mesh(experiment.mesh), (experiment.model, experiment.tables, experiment.features, experiment.heads)
    _, weights = trace_model(
        lambda: make_model(
            *parts, experiment.dense_optimizer, 0, experiment.mesh.num_shards, mesh, two_tower=experiment.retrieval
        )
    )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights))


def _dim(experiment: Experiment) -> float:
    """Returns the dim of all tables; NaN where they have several, because a run tells of the ids of all tables together."""
    dims = {table.dim for table in experiment.tables}
    return dims.pop() if len(dims) == 1 else math.nan


def _trained(experiment: Experiment, workdir: Path) -> Run:
    """Returns what a run wrote; its snapshots are removed, and its programs, since the next head's are others."""
    import jax

    run = trained(experiment, workdir)
    jax.clear_caches()
    shutil.rmtree(workdir / "snapshots", ignore_errors=True)
    return run


def _quality(run: Run) -> list[Measured]:
    return [
        Measured(metric, math.nan if row[metric] is None else row[metric], row["head"])
        for row in run.tests or run.totals
        for metric in (BINARY if "auc" in row else REGRESSION)
    ]
