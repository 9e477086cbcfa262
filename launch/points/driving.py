"""A run that is driven pass by pass, for points that test between passes.

In: an experiment, a folder. Out: passes over sources, each through the planner and the compiled steps that every run has; ids,
rows, histories and counters go on from one pass to the next. Nothing is saved: a killed point starts again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.points.training import Training
    from launch.run import Parts
    from monolith_jax.experiment import Experiment, SourceConfig
    from monolith_jax.planner import Planner
    from monolith_jax.train.state import Inputs, TrainState


@dataclass(frozen=True)
class Driven:
    """What a run is driven by."""

    experiment: Experiment
    parts: Parts
    training: Training
    predict_step: Callable[[TrainState, Inputs], Any]
    folder: Path
    """For what is set aside."""


def drive(experiment: Experiment, folder: Path) -> Driven:
    """Returns a run that has learned nothing.

    Raises:
        ValueError: The configs do not fit together.
    """
    from launch.points.training import Training
    from launch.process import prepare
    from launch.run import assemble
    from monolith_jax.train.step import make_predict_step

    prepare(experiment.mesh)
    parts = assemble(experiment)
    return Driven(experiment, parts, Training(parts), make_predict_step(parts.model), folder)


def learn(driven: Driven, source: SourceConfig) -> None:
    """Learns from a source to its end.

    Raises:
        FloatingPointError: A loss was not finite.
    """
    planner = _planner(driven, source, "")
    try:
        for planned in planner:
            driven.training.step(planned)
    finally:
        planner.close()


def score(driven: Driven, source: SourceConfig) -> dict[str, dict[str, Any]]:
    """Scores a source with what was learned so far; returns the totals of each head, as a run's test has them."""
    from monolith_jax.evaluate.prequential import Prequential
    from monolith_jax.train.loop import predict

    measures = Prequential(driven.experiment.prequential, [(head.label, head.kind) for head in driven.experiment.heads])
    planner = _planner(driven, source, "_test", insert=False)
    try:
        predict(
            driven.training.state,
            planner,
            driven.predict_step,
            lambda seen, scores: measures.add(seen.event_time_ms, seen.groups, scores, seen.labels, seen.masks, seen.optimal),
        )
    finally:
        planner.close()
    return measures.totals()


def _planner(driven: Driven, source: SourceConfig, suffix: str, insert: bool = True) -> Planner:
    from launch.readers import make_readers
    from monolith_jax.planner import Planner

    parts = driven.parts
    readers = make_readers(driven.experiment, source, parts.partitions, parts.memories, driven.folder, suffix)
    return Planner(parts.model, readers, parts.mapper, insert=insert)
