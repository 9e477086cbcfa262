"""The loop: planned steps to a trained state.

In: a state, a planner and a compiled step. Out: the state after the last step. At most two steps are in flight: the metrics
of step t - 2 are waited for before step t is dispatched. A snapshot is saved only when all losses up to its step are numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from monolith_jax.planner import Observed, Planned, Planner
from monolith_jax.train.log import RunLog
from monolith_jax.train.state import Inputs, TrainState
from monolith_jax.train.step import Metrics
from monolith_jax.train.tiers import Tiers
from monolith_jax.types import Cut

IN_FLIGHT = 2


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains."""

    batch_size: int = 512
    """B, examples a step over all devices."""
    partitions: int = 1
    """N, parts that the stream is divided into, each with histories and counters of its own; a batch has batch_size / N
    examples of each. Processes share them evenly: N is a multiple of their number, and stays when that changes."""
    steps: int = 0
    """Steps after which the run ends, those before a restart counted in; 0: at the end of the stream."""
    seed: int = 0
    """Seed of the first weights and of the first values of rows."""
    warm_start: str = ""
    """Run folder (or snapshots folder) whose tables and matching weights a new run starts from."""
    max_lag_s: float = float("inf")
    """Of a live stream (`LogConfig`): how old the next event may be. Up to then a run that is behind catches up at full speed;
    past it, it skips ahead, and says what it left out."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Whether TensorBoard files are written too (extra `tensorboard`)."""


class Publishes(Protocol):
    """What brings the trained state to the serving side (`sync.publisher`). The loop's thread calls it."""

    def after_step(self, state: Any, planned: Planned) -> None: ...  # noqa: D102
    def cut(self, state: Any, cut: Cut) -> None: ...  # noqa: D102
    def finish(self) -> None: ...  # noqa: D102


class Unpublished:
    """Publishes nothing."""

    def after_step(self, state: Any, planned: Planned) -> None:  # noqa: D102
        pass

    def cut(self, state: Any, cut: Cut) -> None:  # noqa: D102
        pass

    def finish(self) -> None:  # noqa: D102
        pass


UNPUBLISHED = Unpublished()


def run(
    state: TrainState,
    planner: Planner,
    train_step: Callable[[TrainState, Inputs], tuple[TrainState, Metrics]],
    log: RunLog,
    save: Callable[[TrainState, dict[str, Any]], None],
    tiers: Tiers | None = None,
    publisher: Publishes = UNPUBLISHED,
) -> TrainState:
    """Trains until the planner ends.

    Args:
        state: State to start from; used up.
        planner: Yields steps.
        train_step: From `make_train_step`.
        log: Gets the metrics of every step, in order.
        save: Saves a state together with the host state that was frozen after the same step.
        tiers: The rows that are not on the device, where tables are in two tiers; they are not part of the state.
        publisher: Follows every step.

    Returns:
        The state after the last step.

    Raises:
        FloatingPointError: A loss was not finite. Nothing was saved since.
        ValueError, OSError: The input cannot be read on. The state up to there was saved.
    """
    in_flight: deque[tuple[Planned, Metrics]] = deque()
    unreadable: Exception | None = None
    with jax.transfer_guard("disallow"):
        try:
            # While a live stream brings nothing, what was learned is recorded at once, and published.
            for planned in planner.steps(
                lambda: _drain(in_flight, 0, log),
                lambda cut: publisher.cut(state, cut),  # noqa: B023, the newest state is meant
            ):
                _drain(in_flight, IN_FLIGHT - 1, log)
                if tiers is not None:
                    state = tiers.move(state, planned.moves)
                state, metrics = train_step(state, planned.inputs)
                in_flight.append((planned, metrics))
                publisher.after_step(state, planned)
                if planned.frozen is not None:
                    _drain(in_flight, 0, log)
                    save(state, planned.frozen)
        except (ValueError, OSError) as error:
            if not planner.frozen_at_end:
                raise
            # The input cannot be read on; the steps before are good and worth keeping.
            unreadable = error
        _drain(in_flight, 0, log)
        if planner.frozen_at_end:
            save(state, planner.frozen_at_end)
        publisher.finish()
    if unreadable is not None:
        raise unreadable
    return state


def _drain(in_flight: deque[tuple[Planned, Metrics]], keep: int, log: RunLog) -> None:
    while len(in_flight) > keep:
        planned, metrics = in_flight.popleft()
        loss, scores, retrieval = jax.device_get(metrics)
        log.step(planned, float(loss), scores, retrieval)


def predict(
    state: TrainState,
    planner: Planner,
    predict_step: Callable[[TrainState, Inputs], jax.Array],
    observe: Callable[[Observed, np.ndarray], Any],
    tiers: Tiers | None = None,
) -> TrainState:
    """Scores all that the planner yields with what the state holds.

    Returns:
        The same state. Where tables are in two tiers other rows of them are on the device, and what was passed in is used up.
    """
    in_flight: deque[tuple[Planned, jax.Array]] = deque()

    def drain(keep: int) -> None:
        while len(in_flight) > keep:
            planned, scores = in_flight.popleft()
            observe(planned.observed, jax.device_get(scores))

    for planned in planner:
        drain(IN_FLIGHT - 1)
        if tiers is not None:
            state = tiers.move(state, planned.moves)
        in_flight.append((planned, predict_step(state, planned.inputs)))
    drain(0)
    return state
