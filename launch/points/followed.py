"""A training that is published and served as it goes, in step: for a point that scores examples before they are learned.

    training --cut--> Publisher --folder of deltas--> ServedModel <--examples, as requests-- Witness (last of the memories)

In: states and plans, in order. Out: the scores that the served model gives to the examples of a plan, once it has all that was
published up to there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pyarrow as pa

from launch.run import Parts
from monolith_jax.experiment import Experiment, to_gin
from monolith_jax.planner import Planned
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.sync.publisher import Publisher
from monolith_jax.sync.quantise import Format
from monolith_jax.sync.schedule import PublisherConfig
from monolith_jax.train.state import TrainState
from monolith_jax.types import CUT_BASE, CUT_DENSE, CUT_ROWS

_BASE_EVERY = 100
"""Deltas after which a base is written, so that older ones are removed."""


class Witness:
    """Keeps the examples as the memories before it left them: what a request for them would hold."""

    num_refused = 0

    def __init__(self) -> None:
        """Has seen none."""
        self.seen: SimpleQueue[pa.RecordBatch] = SimpleQueue()
        """Of plans that the loop has not come to."""

    def extend(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        """Returns the examples as they are. The planner's thread calls it."""
        self.seen.put(examples)
        return examples

    def reset(self) -> None:
        """Forgets nothing."""

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns nothing."""
        return {}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes nothing over."""


class EventSeconds:
    """Asks for a publication after a plan, and from then on after each that begins `period_s` of event time later.

    Unlike `sync.schedule` it does not wait for what is on its way, so that the clock has no say.
    """

    def __init__(self, period_s: float, after: int) -> None:
        """Asks for none before plan number `after`, counted from 1."""
        self._period_ms, self._after = 1000 * period_s, after
        self._plans = self._cuts = 0
        self._asked_ms = self._last_ms = 0

    def wanted(self, now_ms: int) -> int:
        """Returns what is to be published with the next plan. The planner asks once for each."""
        self._plans, self._asked_ms = self._plans + 1, now_ms
        if self._plans < self._after or (self._cuts and now_ms - self._last_ms < self._period_ms):
            return 0
        return CUT_ROWS | CUT_DENSE | (CUT_BASE if self._cuts % _BASE_EVERY == 0 else 0)

    def agreed(self, kind: int, now_ms: int) -> None:
        """Notes a publication. Its plan has moved the time on since: what counts is when it was asked for."""
        self._cuts, self._last_ms = self._cuts + 1, self._asked_ms


class Followed:
    """The publisher of a training and the model that is served from it."""

    def __init__(self, experiment: Experiment, parts: Parts, folder: Path, format: Format, period_s: float, after: int) -> None:
        """Opens the folder. Before the planner starts.

        Args:
            experiment: What is trained.
            parts: Its parts.
            folder: Of the deltas, empty.
            format: Of the published vectors.
            period_s: Seconds of event time between two publications.
            after: The first one is of the state after so many steps.

        Raises:
            ValueError: The format is none, or a table is in two tiers.
        """
        self._experiment, self._root = experiment, folder
        config = PublisherConfig(folder=str(folder), format=format, keep_bases=1)
        self._publisher = Publisher(config, folder.parent, parts.model.groups, parts.model.mesh, None, to_gin(experiment))
        self._publisher.start([group.maps for group in parts.mapper.groups], 0, parts.state)
        self._served: ServedModel | None = None
        self._published = 0
        self.witness, self.cuts = Witness(), EventSeconds(period_s, after)
        self.versions = 0
        """Publications that were cut."""

    def follow(self, state: TrainState, planned: Planned) -> None:
        """Is told of every step, right after it."""
        self._publisher.after_step(state, planned)
        if planned.cut is not None:
            self._publisher.finish()
            self._published, self.versions = planned.cut.step, self.versions + 1

    def pass_over(self) -> None:
        """Leaves out the examples of the next plan."""
        self.witness.seen.get()

    def score(self, planned: Planned, steps: int) -> np.ndarray:
        """Returns the served model's scores for the examples of the next plan, float32 [B, T]; zeros in rows of padding.

        Args:
            planned: That plan, not learned yet.
            steps: Done so far.

        Raises:
            RuntimeError: What was published cannot be served.
        """
        examples = self.witness.seen.get()
        if self._served is None:
            self._served = self._load()
        self._served.poll()
        if self._served.step != self._published:
            raise RuntimeError(
                f"at step {steps} the served model has step {self._served.step}, step {self._published} was published: "
                f"{self._served.last_fault or 'no fault was noted'}"
            )
        scores = np.zeros(planned.observed.labels.shape, np.float32)
        scores[: examples.num_rows] = self._served.predict(examples)
        return scores

    def _load(self) -> ServedModel:
        one = self._experiment
        return ServedModel(
            self._root, one.features, one.tables, one.model, one.heads, num_shards=one.mesh.num_shards,
            batch_sizes=(one.train.batch_size,),
        )  # fmt: skip

    def close(self) -> None:
        """Ends the threads."""
        with ExitStack() as closing:
            closing.callback(self._publisher.close)
            if self._served is not None:
                closing.callback(self._served.close)
