"""When state is published: by the clock or the events, when all can, and when a stream has nothing more for now."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.rounds import may_go_on
from monolith_jax.stream.batcher import Batch
from monolith_jax.sync import schedule as schedule_module
from monolith_jax.sync.schedule import PublisherConfig, Schedule
from monolith_jax.types import CUT_BASE, CUT_DENSE, CUT_ROWS, Cut
from tests.ids.threads_exchange import together
from tests.small_model import make_examples
from tests.test_planner import BATCH_SIZE, Ticking, planner_of


def test_rows_dense_weights_and_bases_at_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(schedule_module.time, "monotonic", lambda: now)
    schedule = Schedule(PublisherConfig(period_s=1.0, dense_period_s=3.0, base_every=3))
    assert schedule.wanted(0) == CUT_ROWS | CUT_DENSE
    schedule.agreed(CUT_ROWS | CUT_DENSE, 0)
    now = 105.0
    assert schedule.wanted(0) == 0, "the one before is on its way"
    schedule.ended(CUT_ROWS)
    assert schedule.wanted(0) == CUT_ROWS | CUT_DENSE
    schedule.agreed(CUT_ROWS | CUT_DENSE, 0)
    schedule.ended(CUT_ROWS)
    now = 105.9
    assert schedule.wanted(0) == 0
    now = 106.0
    assert schedule.wanted(0) == CUT_ROWS
    schedule.want_base()
    assert schedule.wanted(0) == CUT_ROWS | CUT_BASE
    schedule.agreed(CUT_ROWS | CUT_BASE, 0)
    schedule.ended(CUT_ROWS)
    for _ in range(3):
        now += 1
        assert not schedule.wanted(0) & CUT_BASE
        schedule.agreed(CUT_ROWS, 0)
        schedule.ended(CUT_ROWS)
    now = 110.0
    assert not schedule.wanted(0) & CUT_BASE, "a base is on its way"
    schedule.ended(CUT_BASE)
    assert schedule.wanted(0) & CUT_BASE


def test_periods_of_event_time() -> None:
    schedule = Schedule(PublisherConfig(period_s=60.0, dense_period_s=120.0, time="event"))
    schedule.agreed(schedule.wanted(1_000_000), 1_000_000)
    schedule.ended(CUT_ROWS)
    assert schedule.wanted(1_059_999) == 0
    assert schedule.wanted(1_060_000) == CUT_ROWS
    assert schedule.wanted(1_120_000) == CUT_ROWS | CUT_DENSE


def test_all_publish_or_none_and_the_first_says_what() -> None:
    def agreed(*wanted: int) -> list[int]:
        flags = (True, False, False, False)
        return [go.cut for go in together(2, lambda exchange: may_go_on(exchange, *flags, wanted[exchange.process_id]))]

    assert agreed(CUT_ROWS, CUT_ROWS | CUT_DENSE) == [CUT_ROWS, CUT_ROWS]
    assert agreed(CUT_ROWS | CUT_BASE, CUT_ROWS) == [CUT_ROWS | CUT_BASE] * 2
    assert agreed(CUT_ROWS, 0) == agreed(0, CUT_ROWS) == [0, 0]


class Pausing(Ticking):
    """A live stream: three batches, then nothing for a while, again and again, until it is stopped."""

    def __next__(self) -> Batch:
        self.taken += 1
        if self.taken % 6 > 2:
            time.sleep(0.005)
            return Batch(make_examples(0), (), 0, is_idle=True)
        return Batch(make_examples(BATCH_SIZE, self.taken), (), 0)


class Wants:
    """Asks for a publication when told to."""

    def __init__(self) -> None:
        self.wants = threading.Event()
        self.agreed_at: list[int] = []

    def wanted(self, now_ms: int) -> int:
        return CUT_ROWS if self.wants.is_set() else 0

    def agreed(self, kind: int, now_ms: int) -> None:
        self.wants.clear()
        self.agreed_at.append(now_ms)


def test_what_was_learned_last_is_published_while_the_stream_is_idle(tmp_path: Path) -> None:
    wants = Wants()
    planner = planner_of(Pausing(), tmp_path, cuts=wants)
    done, cuts, with_steps = 0, [], []

    def cut(made: Cut) -> None:
        assert made.step == done
        cuts.append(made)

    try:
        for planned in planner.steps(lambda: wants.wants.set(), cut):
            done += 1
            if planned.cut is not None:
                assert planned.cut.step == done
                with_steps.append(planned.cut)
            if done == 12:
                planner.stop()
    finally:
        planner.close()
    assert len(cuts) >= 2 and len(cuts) + len(with_steps) == len(wants.agreed_at)
    # The last one brings the dense weights, for which nothing asked before, whether or not its rows were published.
    *rows, last = sorted([*cuts, *with_steps])
    assert last.kind & CUT_DENSE and last.step == done, "the last cut is of the last step"
    assert len({made.step for made in rows}) == len(rows) and {made.kind for made in rows} == {CUT_ROWS}, "nothing is twice"


def test_the_last_step_is_published(tmp_path: Path) -> None:
    planner = planner_of(Ticking(), tmp_path, cuts=Wants(), max_steps=5)
    cuts: list[Any] = []
    assert len(list(planner.steps(lambda: None, cuts.append))) == 5
    assert [(made.step, made.kind) for made in cuts] == [(5, CUT_ROWS | CUT_DENSE)]
    planner.close()


class EachStep(Wants):
    """Publishes the rows of every step, and now and then dense weights too."""

    def __init__(self, dense_at: int | None) -> None:
        super().__init__()
        self.dense_at = dense_at

    def wanted(self, now_ms: int) -> int:
        return CUT_ROWS | CUT_DENSE if len(self.agreed_at) + 1 == self.dense_at else CUT_ROWS


@pytest.mark.parametrize(("dense_at", "last"), [(None, [(5, CUT_ROWS | CUT_DENSE)]), (4, [(5, CUT_ROWS | CUT_DENSE)]), (5, [])])
def test_dense_weights_of_the_last_step_are_published_though_its_rows_were(
    tmp_path: Path, dense_at: int | None, last: list[tuple[int, int]]
) -> None:
    planner = planner_of(Ticking(), tmp_path, cuts=EachStep(dense_at), max_steps=5)
    cuts: list[Cut] = []
    with_steps = [planned.cut for planned in planner.steps(lambda: None, cuts.append)]
    planner.close()
    assert [made.step for made in with_steps if made] == [1, 2, 3, 4, 5]
    assert [(made.step, made.kind) for made in cuts] == last


def test_dense_weights_follow_their_rows_while_the_stream_is_idle(tmp_path: Path) -> None:
    class Due(EachStep):
        def wanted(self, now_ms: int) -> int:
            return CUT_ROWS | CUT_DENSE if self.wants.is_set() else CUT_ROWS

    due = Due(None)
    planner = planner_of(Pausing(), tmp_path, cuts=due)
    done, cuts = 0, []
    try:
        for planned in planner.steps(lambda: due.wants.set(), cuts.append):
            done += 1
            assert planned.cut is not None
            if done == 12:
                planner.stop()
    finally:
        planner.close()
    dense = [made for made in cuts if made.kind & CUT_DENSE]
    assert len(dense) >= 2 and len({made.step for made in dense}) == len(dense)


def test_each_step_may_publish_by_event_time(tmp_path: Path) -> None:
    class Timed(Ticking):
        """A second of event time a batch."""

        def __next__(self) -> Batch:
            batch = super().__next__()
            times = pa.array(np.full(len(batch.examples), 1_000_000 + 1000 * self.taken))
            place = batch.examples.schema.get_field_index("event_time_ms")
            return replace(batch, examples=batch.examples.set_column(place, "event_time_ms", times))

    class Instant(Schedule):
        """What is published is there at once."""

        def agreed(self, kind: int, now_ms: int) -> None:
            super().agreed(kind, now_ms)
            self.ended(CUT_ROWS)

    schedule = Instant(PublisherConfig(period_s=1.0, dense_period_s=1.0, time="event"))
    planner = planner_of(Timed(), tmp_path, cuts=schedule, max_steps=6)
    assert [planned.cut is not None for planned in planner.steps(lambda: None)] == [True] * 6, "not every second one only"
    planner.close()
