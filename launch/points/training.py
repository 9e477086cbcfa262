"""Training, step by step, for points of sweeps that do something between two steps.

In: the parts of a run, plans. Out: the state after each; a step is waited for, since what comes between looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.run import Parts
from monolith_jax.experiment import Experiment
from monolith_jax.planner import Planned
from monolith_jax.train.state import TrainState
from monolith_jax.train.step import make_train_step


def check_experiment(experiment: Experiment, kind: str) -> None:
    """Raises ValueError where a kind of point that trains step by step cannot follow an experiment."""
    if not any(head.kind == "binary" for head in experiment.heads):
        raise ValueError(f"{kind} compares AUC: give Experiment.heads a head of kind 'binary'")
    if experiment.retrieval is not None:
        raise ValueError(f"{kind} trains a ranker only: set Experiment.retrieval to None")
    if experiment.train.partitions != 1:
        raise ValueError(f"{kind} reads one stream: set TrainConfig.partitions to 1, it is {experiment.train.partitions}")
    if experiment.train.steps:
        raise ValueError(
            f"{kind} decides itself where training ends: set TrainConfig.steps to 0, it is {experiment.train.steps}, and "
            "shorten the source"
        )
    if tiered := [table.name for table in experiment.tables if table.memory != "device"]:
        raise ValueError(f"{kind} copies tables on the device: set TableConfig.memory of {', '.join(tiered)} to 'device'")


class Training:
    """One or more states of a model that learn from the same plans."""

    def __init__(self, parts: Parts) -> None:
        """Takes over the parts' state; nothing is trained yet."""
        self._train = make_train_step(parts.model)
        self._states: dict[str, TrainState] = {"": parts.state}
        self.steps = 0
        """Steps done."""

    @property
    def state(self) -> TrainState:
        """The state; the next step uses it up."""
        return self._states[""]

    def copy(self) -> TrainState:
        """Returns a copy of the state, which stays as it is."""
        return jax.tree.map(jnp.copy, self.state)

    def add(self, name: str, state: TrainState) -> None:
        """Has a further state learn from the next plans; it must share no array with another."""
        self._states[name] = state

    def step(self, planned: Planned) -> dict[str, np.ndarray]:
        """Has every state learn from a plan; returns the scores that each gave before, float32 [B, T].

        Raises:
            FloatingPointError: A loss is not finite.
        """
        found = {}
        for name, state in self._states.items():
            self._states[name], metrics = self._train(state, planned.inputs)
            if not math.isfinite(loss := float(jax.device_get(metrics.loss))):
                of_state = f" of {name}" if name else ""
                raise FloatingPointError(
                    f"the loss{of_state} at step {self.steps + 1} is {loss}: lower OptimizerConfig.learning_rate"
                )
            found[name] = metrics.scores
        self.steps += 1
        return self.fetch(found)

    @staticmethod
    def fetch(scores: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns arrays of the device on the host."""
        return {name: np.asarray(one) for name, one in jax.device_get(dict(scores)).items()}
