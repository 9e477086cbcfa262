"""A run that is driven pass by pass, for what a plain training run does not do: scoring in between, copies of the state.

In: an experiment, a folder. Out: passes over sources, each through the planner and the compiled steps that every run has; ids,
rows, histories and counters go on from one pass to the next. Nothing is saved: a killed point starts again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.run import Parts
    from monolith_jax.experiment import Experiment, SourceConfig
    from monolith_jax.planner import Planned, Planner
    from monolith_jax.train.state import Inputs, TrainState


@dataclass(frozen=True)
class Driven:
    """What a run is driven by."""

    experiment: Experiment
    parts: Parts
    folder: Path
    """For what is set aside."""
    train_step: Callable[[TrainState, Inputs], tuple[TrainState, Any]]
    predict_step: Callable[[TrainState, Inputs], Any]


def drive(experiment: Experiment, folder: Path) -> Driven:
    """Returns a run that has learned nothing; its state is `parts.state`.

    Raises:
        ValueError: The configs do not fit together.
    """
    from launch.process import prepare
    from launch.run import assemble
    from monolith_jax.train.step import make_predict_step, make_train_step

    prepare(experiment.mesh)
    parts = assemble(experiment)
    return Driven(experiment, parts, folder, make_train_step(parts.model), make_predict_step(parts.model))


def learn(
    driven: Driven,
    state: TrainState,
    source: SourceConfig,
    before: Callable[[TrainState, Planned], Any] = lambda state, planned: None,
    most: int = 0,
) -> TrainState:
    """Learns from a source to its end, or for so many steps.

    Args:
        driven: The run.
        state: To start from; used up.
        source: What is read.
        before: Called with each step before it is learned from.
        most: Steps; 0: all.

    Returns:
        The state after the last step.

    Raises:
        FloatingPointError: A loss was not finite.
    """
    import numpy as np

    in_flight: deque[Any] = deque()

    def drain(keep: int) -> None:
        while len(in_flight) > keep:
            if not np.isfinite(np.asarray(in_flight.popleft())):
                raise FloatingPointError("a loss is not finite: the model diverged; lower its learning rates")

    planner = _planner(driven, source, "", most)
    try:
        for planned in planner:
            drain(1)
            before(state, planned)
            state = driven.parts.tiers.move(state, planned.moves)
            state, metrics = driven.train_step(state, planned.inputs)
            in_flight.append(metrics.loss)
        drain(0)
    finally:
        planner.close()
    return state


def score(driven: Driven, state: TrainState, source: SourceConfig) -> dict[str, dict[str, Any]]:
    """Scores a source with a state that stays as it is; returns the totals of each head, as a run's test has them."""
    from monolith_jax.evaluate.prequential import Prequential
    from monolith_jax.train.loop import predict

    measures = Prequential(driven.experiment.prequential, [(head.label, head.kind) for head in driven.experiment.heads])
    planner = _planner(driven, source, "_test", 0, insert=False)
    try:
        predict(
            state,
            planner,
            driven.predict_step,
            lambda seen, scores: measures.add(seen.event_time_ms, seen.groups, scores, seen.labels, seen.masks, seen.optimal),
        )
    finally:
        planner.close()
    return measures.totals()


def _planner(driven: Driven, source: SourceConfig, suffix: str, most: int, insert: bool = True) -> Planner:
    from launch.readers import make_readers
    from monolith_jax.planner import Planner

    parts = driven.parts
    readers = make_readers(driven.experiment, source, parts.partitions, parts.memories, driven.folder, suffix)
    return Planner(parts.model, readers, parts.mapper, insert=insert, max_steps=most)
