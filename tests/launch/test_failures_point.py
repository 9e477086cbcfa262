"""Rows that go back to an older snapshot: which, to what, and what is measured after."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from launch.points import failures
from launch.points.failures import FailuresPoint, lost_shards, new_rows, restored, run
from launch.points.measured import Base, Measured
from launch.points.training import Training
from launch.readers import make_readers
from launch.run import assemble
from monolith_jax.planner import Planner
from tests.launch.test_shards_point import TINY

HOUR_OF = 64 / 3600
"""A step of 64 examples, one a second, about."""


def base(*more: str) -> Base:
    return Base(("configs/quickstart.gin",), (*TINY, *more), 3)


def point(share: float, *ages: float) -> FailuresPoint:
    return FailuresPoint(share, ages, 10 * HOUR_OF, 5 * HOUR_OF)


def values(found: list[Measured], metric: str) -> dict[str, float]:
    return {one.head: one.value for one in found if one.metric == metric and not one.along}


def test_nothing_lost_costs_nothing_and_all_rows_most(tmp_path: Path) -> None:
    ages = (2 * HOUR_OF, 9 * HOUR_OF)
    none, some, every = (run(point(share, *ages), base(), tmp_path) for share in (0.0, 0.25, 1.0))
    for age in ages:
        name = f"{age:g}h"
        assert {value for value in values(none, f"lost_{name}").values() if not math.isnan(value)} == {0.0}
        assert values(none, f"log_loss_more_{name}")["mean"] == 0
        assert values(some, f"log_loss_more_{name}")["mean"] != 0
        assert values(every, f"log_loss_more_{name}")["mean"] > values(some, f"log_loss_more_{name}")["mean"]
    assert values(every, "log_loss_more_0.16h")["mean"] > values(every, "log_loss_more_0.0355556h")["mean"] > 0
    assert values(none, "auc") == pytest.approx(values(every, "auc"), abs=0, nan_ok=True)
    assert values(none, "rows_lost")[""] == 0 and values(every, "rows_lost") == values(every, "rows")
    assert 0.05 < values(some, "rows_lost")[""] / values(some, "rows")[""] < 0.5
    curve = [one for one in every if one.along == "hour" and one.head == "complete" and one.metric == "lost_0.16h"]
    assert [one.at for one in curve] == [0.0]
    assert curve[0].value == pytest.approx(values(every, "lost_0.16h")["complete"])


def test_what_comes_back_is_the_older_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains the same steps by hand: rows that the snapshot had are as they were then, the others have their first value."""
    seen: list[Any] = []

    def spied(state: Any, groups: Any, lost: np.ndarray) -> Any:
        made = restored(state, groups, lost)
        seen.append(jax.device_get((state.groups, made.groups)))
        return made

    monkeypatch.setattr(failures, "restored", spied)
    found = run(point(0.5, 4 * HOUR_OF), base(), tmp_path)
    ((newest, mixed),) = seen
    experiment = base().load()
    parts = assemble(experiment)
    readers = make_readers(experiment, experiment.source, range(1), parts.memories, tmp_path)
    planner, training = Planner(parts.model, readers, parts.mapper), Training(parts)
    began, older, alive, rows = None, None, [], np.zeros(8, np.int64)
    for planned in planner:
        now = int(planned.observed.event_time_ms[0])
        began = began or now
        hour = (now - began) / 3_600_000
        if hour >= 10 * HOUR_OF:
            break
        if hour >= 6 * HOUR_OF and older is None:
            older = jax.device_get(training.state.groups)
            alive = [np.any(array != 0, axis=2) for array in older]
        rows += new_rows(planned, parts.model.groups, 8)
        training.step(planned)
    planner.close()
    lost = lost_shards(0.5, 8, 3)
    assert older is not None and lost.sum() == 4
    for old, new, after, mine, there in zip(older, newest, mixed, training.state.groups, alive, strict=True):
        assert np.array_equal(new, np.asarray(mine))
        assert np.array_equal(after[~lost], new[~lost])
        assert there[lost].any() and np.array_equal(after[lost][there[lost]], old[lost][there[lost]])
        came = np.any(new != 0, axis=2) & ~there
        dim = experiment.tables[0].dim
        fresh = after[lost][came[lost]]
        assert len(fresh) and np.all(np.abs(fresh[:, :dim]) <= 0.02) and not fresh[:, dim:].any()
    assert not np.array_equal(mixed[0], newest[0])
    assert (values(found, "rows")[""], values(found, "rows_lost")[""]) == (rows.sum(), rows[lost].sum())
    assert rows.sum() == sum(np.any(np.asarray(array) != 0, axis=2).sum() for array in training.state.groups)


def test_shards_are_drawn_by_seed() -> None:
    assert lost_shards(1 / 64, 64, 0).sum() == 1 and lost_shards(0.1, 64, 0).sum() == 6
    assert lost_shards(0.0001, 64, 0).sum() == 1 and lost_shards(1.0, 64, 0).all() and not lost_shards(0.0, 64, 0).any()
    assert np.array_equal(lost_shards(0.1, 64, 5), lost_shards(0.1, 64, 5))
    assert (lost_shards(0.5, 64, 1) >= lost_shards(0.1, 64, 1)).all()


@pytest.mark.parametrize(
    ("fields", "more", "words"),
    [
        ({"share": 1.5}, (), "FailuresPoint.share"),
        ({"ages_h": (1.0, 1.0)}, (), "FailuresPoint.ages_h"),
        ({"ages_h": (0.0,)}, (), "FailuresPoint.ages_h"),
        ({"ages_h": (100.0,)}, (), "before the stream began"),
        ({"after_h": 0.0}, (), "FailuresPoint.after_h"),
        ({}, ("TrainConfig.steps = 5",), "FailuresPoint decides itself"),
        (
            {"ages_h": (0.1,), "fails_h": 0.2, "after_h": 9.0},
            ("SyntheticConfig.num_examples = 300",),
            "stream ends after 0.1 h",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(fields: dict[str, Any], more: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run(FailuresPoint(**fields), base(*more), tmp_path)
