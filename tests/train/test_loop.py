"""The loop: steps in order, few in flight, and snapshots only of what is known to be good."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from monolith_jax.planner import Planner
from monolith_jax.reader import Reader
from monolith_jax.stream.batcher import batches
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.train.log import RunLog
from monolith_jax.train.loop import IN_FLIGHT, predict, run
from monolith_jax.train.step import Metrics, make_predict_step, make_train_step
from tests.small_model import SmallSource, make_small
from tests.train.test_log import Sums

BATCH_SIZE = 16


class Plans:
    """A planner of numbers: step k has the plan k."""

    def __init__(
        self, number: int, freeze_at: tuple[int, ...] = (), fails: Exception | None = None, frozen: Any = True
    ) -> None:
        self.frozen_at_end: dict[str, Any] | None = None
        self._plans = [SimpleNamespace(inputs=k, frozen={"step": k} if k in freeze_at else None) for k in range(1, number + 1)]
        self._fails = fails
        self._frozen = {"step": number} if frozen else {}

    def steps(self, idle: Any, cut: Any) -> Any:
        yield from self._plans
        self.frozen_at_end = self._frozen
        if self._fails:
            raise self._fails


class Events:
    """What the loop does, in order."""

    def __init__(self, bad: int = 0) -> None:
        self.told: list[str] = []
        self.steps = 0
        self._bad = bad

    def train_step(self, state: int, inputs: int) -> tuple[int, Metrics]:
        self.told.append(f"run {inputs}")
        loss = np.float32(np.nan if self._bad and inputs >= self._bad else inputs)
        return inputs, jax.device_put(Metrics(loss, np.zeros((1, 1), np.float32)))  # pyright: ignore[reportArgumentType]

    def step(self, planned: Any, loss: float, scores: np.ndarray, retrieval: Any = None) -> None:
        if not np.isfinite(loss):
            raise FloatingPointError(f"step {planned.inputs}")
        assert loss == planned.inputs
        self.told.append(f"log {planned.inputs}")
        self.steps = planned.inputs

    def save(self, state: int, frozen: dict[str, Any]) -> None:
        # All steps up to the saved one are logged, none after it has run.
        assert state == frozen["step"] == self.steps
        self.told.append(f"save {state}")


def loop(plans: Plans, events: Events) -> Any:
    pieces: Any = (0, plans, events.train_step, events, events.save)
    return run(*pieces)


def test_metrics_come_in_order_and_two_steps_late() -> None:
    events = Events()
    assert loop(Plans(5), events) == 5
    assert events.told == [
        *("run 1", "run 2", "log 1", "run 3", "log 2", "run 4", "log 3", "run 5", "log 4", "log 5", "save 5"),
    ]
    in_flight = 0
    for told in events.told:
        in_flight += {"run": 1, "log": -1}.get(told.split()[0], 0)
        assert in_flight <= IN_FLIGHT


def test_a_snapshot_waits_for_the_losses_up_to_it() -> None:
    events = Events()
    loop(Plans(4, freeze_at=(2,)), events)
    assert events.told == ["run 1", "run 2", "log 1", "log 2", "save 2", "run 3", "run 4", "log 3", "log 4", "save 4"]


@pytest.mark.parametrize("bad", [1, 2, 3, 4, 5])
def test_the_first_bad_step_is_named_and_nothing_is_saved_after_it(bad: int) -> None:
    events = Events(bad)
    with pytest.raises(FloatingPointError, match=f"^step {bad}$"):
        loop(Plans(5, freeze_at=(3,)), events)
    assert [told for told in events.told if told.startswith("save")] == (["save 3"] if bad > 3 else [])


@pytest.mark.parametrize("error", [ValueError("broken part"), OSError("gone")])
def test_what_was_read_is_saved_before_an_error_of_the_input_goes_on(error: Exception) -> None:
    events = Events()
    with pytest.raises(type(error), match=str(error)):
        loop(Plans(3, fails=error), events)
    assert events.told[-3:] == ["log 2", "log 3", "save 3"]


def test_nothing_is_saved_where_the_planner_has_nothing_whole() -> None:
    events = Events()
    with pytest.raises(ValueError, match="half a plan"):
        loop(Plans(3, fails=ValueError("half a plan"), frozen=False), events)
    assert not any(told.startswith("save") for told in events.told)


def test_a_bad_loss_wins_over_an_error_of_the_input() -> None:
    events = Events(bad=3)
    with pytest.raises(FloatingPointError, match=r"^step 3$"):
        loop(Plans(3, fails=ValueError("broken part")), events)
    assert not any(told.startswith("save") for told in events.told)


def make_planner(small: Any, folder: Path, source: SmallSource, **options: Any) -> Planner:
    letters = DeadLetters(folder / "dead_letters.jsonl")
    return Planner(small.model, [Reader(batches(source, BATCH_SIZE), [], letters, BATCH_SIZE)], small.mapper, **options)


def trained(folder: Path, source: SmallSource, num_devices: int = 1, **options: Any) -> tuple[Any, Any, list[Any]]:
    small = make_small(num_devices)
    planner = make_planner(small, folder, source, **options)
    saved: list[Any] = []
    with RunLog(folder, Sums(), 1) as log:
        state = run(
            small.state,
            planner,
            make_train_step(small.model),
            log,
            lambda state, frozen: saved.append((log.steps, jax.device_get(state), frozen)),
        )
    planner.close()
    return small, state, saved


def test_snapshots_at_every_step_change_nothing(tmp_path: Path) -> None:
    """With two plans ahead, what is saved after step k equals what a run that ends there has."""
    (tmp_path / "all").mkdir()
    source = SmallSource(num_chunks=10)
    _, state, saved = trained(tmp_path / "all", source, freeze_every=1)
    assert [step for step, _, _ in saved] == [1, 2, 3, 4, 5, 6, 7, 7]
    for step in (4,):
        folder = tmp_path / str(step)
        folder.mkdir()
        _, until, [(_, _, frozen)] = trained(folder, source, max_steps=step)
        pairs = [(saved[step - 1][1:], (jax.device_get(until), frozen))]
        for one, other in zip(*(jax.tree.leaves(tree) for tree in pairs[0]), strict=True):
            np.testing.assert_array_equal(one, other)
    (tmp_path / "none").mkdir()
    _, other_state, _ = trained(tmp_path / "none", source)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_predict_scores_every_batch_in_order(tmp_path: Path) -> None:
    source = SmallSource(num_chunks=10)
    small, state, _ = trained(tmp_path, source)
    seen: list[tuple[int, np.ndarray]] = []
    before = jax.device_get(state)
    for _ in range(2):
        planner = make_planner(small, tmp_path, source, insert=False)
        predict(
            state,
            planner,
            make_predict_step(small.model),
            lambda seen_of, scores: seen.append((seen_of.event_time_ms[0], scores)),
        )
        planner.close()
    assert [time for time, _ in seen[:7]] == sorted(time for time, _ in seen[:7]) and len(seen) == 14
    for (_, one), (_, other) in zip(seen[:7], seen[7:], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
