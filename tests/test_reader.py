"""Partitions side by side in one batch: who stands where, ends, errors, and a state that goes on exactly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monolith_jax.packing import pack, unpack
from monolith_jax.planner import Planner
from monolith_jax.reader import Reader
from monolith_jax.stream.batcher import batches
from monolith_jax.stream.counters import Counters, CountersConfig
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.history import History, HistoryConfig
from monolith_jax.types import Chunk
from tests.small_model import SmallSource, make_examples, make_small
from tests.test_planner import assert_same, assert_same_plans

BATCH_SIZE = 16


@dataclass(frozen=True)
class From:
    """A `SmallSource` that begins at another chunk, so that no partition has another's examples."""

    first: int
    source: SmallSource

    def read(self, position: Any) -> Any:
        for chunk in self.source.read(position):
            number = self.first + chunk.position["chunk"] - 1
            examples = make_examples(chunk.examples.num_rows, number % 1000)
            yield type(chunk)(examples, chunk.rejected, chunk.position, chunk.epoch)


@dataclass(frozen=True)
class Live:
    """A `SmallSource` whose batches end behind each chunk; where one stands for None, nothing came in time."""

    turns: tuple[int | None, ...]

    def read(self, position: Any) -> Any:
        for turn in range(position.get("turn", 0), len(self.turns)):
            number, place = self.turns[turn], {"turn": turn + 1}
            examples = make_examples(0 if number is None else 6, number or 0)
            yield Chunk(examples, (), place, ends_batch=True, told={"lag_s": turn, "unread": 1})


def memories() -> list[Any]:
    return [
        History(HistoryConfig(5, 50, actions=("like",), item_column="last")),
        Counters(CountersConfig(keys=("user_id",), labels=("like",), max_rows=50)),
    ]


def planner_of(folder: Path, *sources: Any, **options: Any) -> Planner:
    small, size = make_small(1), BATCH_SIZE // len(sources)
    readers = [
        Reader(batches(source, size), memories(), DeadLetters(folder / f"dead_letters.{index}.jsonl"), size)
        for index, source in enumerate(sources)
    ]
    return Planner(small.model, readers, small.mapper, **options)


def ages_of(first: int, chunks: int, rows: int = 10) -> list[float]:
    """Returns the only dense value of all examples, by which they are told apart."""
    return [float(np.float32(age)) for n in range(first, first + chunks) for age in make_examples(rows, n)["age"].to_pylist()]


def test_each_partition_has_its_rows_and_one_that_ends_is_padded(tmp_path: Path) -> None:
    chunks = (3, 1, 4, 2)
    planner = planner_of(tmp_path, *(From(100 * index, SmallSource(many)) for index, many in enumerate(chunks)))
    plans = list(planner)
    planner.close()
    assert len(plans) == 10  # 40 examples of the longest, 4 a batch
    seen: list[list[float]] = [[], [], [], []]
    for plan in plans:
        real: np.ndarray = np.any(np.asarray(plan.inputs.masks), axis=1)
        assert plan.num_examples == np.count_nonzero(real)
        empty = [one.sent.shape[0] * one.sent.shape[2] + 1 for one in plan.inputs.plans]
        for one, nothing in zip(plan.inputs.plans, empty, strict=True):
            assert (np.asarray(one.positions)[~real] == nothing).all()
        for index in range(4):
            rows = slice(4 * index, 4 * index + 4)
            seen[index] += np.asarray(plan.inputs.dense)[rows, 0][real[rows]].tolist()
            assert (np.diff(real[rows].astype(int)) <= 0).all(), "padding is at the end of its part"
    assert seen == [ages_of(100 * index, many) for index, many in enumerate(chunks)]
    assert [len(plan.position) for plan in plans] == [4] * 10


def test_one_goes_on_in_the_middle_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    sources = [From(0, SmallSource(12, epochs=2, rejects=True)), From(300, SmallSource(5, epochs=2, rejects=True))]
    whole = planner_of(tmp_path / "whole", *sources)
    plans = list(whole)
    whole.close()
    for step in (4, 9, 20):
        folder = tmp_path / str(step)
        stopped = planner_of(folder, *sources, max_steps=step)
        list(stopped)
        stopped.close()
        frozen = stopped.frozen_at_end or {}
        resumed = planner_of(folder, *sources)
        resumed.set_state(frozen)
        assert_same_plans(list(resumed), plans[step:])
        resumed.close()
        assert_same(resumed.frozen_at_end, whole.frozen_at_end)
        for index in range(2):
            name = f"dead_letters.{index}.jsonl"
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() != b""


def test_others_go_on_without_a_partition_to_which_nothing_came(tmp_path: Path) -> None:
    sources = [Live((0, None, 1, None, None, 2)), Live((10, 11, None, None, 12))]
    whole = planner_of(tmp_path / "whole", *sources)
    plans = list(whole)
    whole.close()
    assert [plan.num_examples for plan in plans] == [12, 6, 6, 6, 6], "no plan where nothing came to any"
    assert [plan.told["lag_s"] for plan in plans] == [0, 1, 2, 4, 5]
    assert [plan.told["unread"] for plan in plans] == [2, 2, 2, 2, 2], "what was counted before the end too"
    for step in range(1, 5):
        stopped = planner_of(tmp_path, *sources, max_steps=step)
        list(stopped)
        stopped.close()
        resumed = planner_of(tmp_path, *sources)
        resumed.set_state(stopped.frozen_at_end or {})
        assert_same_plans(list(resumed), plans[step:])
        resumed.close()


def test_a_planner_to_which_nothing_comes_can_be_stopped(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, Live((0, *(None,) * 10**6)))
    for _ in planner:
        planner.stop()
    planner.close()
    assert planner.stopped


def test_an_error_of_one_loses_nothing_of_the_others(tmp_path: Path) -> None:
    good = From(0, SmallSource(9, rejects=True))
    broken = planner_of(tmp_path, good, From(300, SmallSource(9, rejects=True, fails_at=5)))
    plans = []
    with pytest.raises(ValueError, match="part 5 cannot be read"):
        plans.extend(broken)
    broken.close()
    sources = (good, From(300, SmallSource(9, rejects=True)))
    whole, resumed = planner_of(tmp_path / "whole", *sources), planner_of(tmp_path, *sources)
    expected = list(whole)
    resumed.set_state(broken.frozen_at_end or {})
    assert_same_plans([*plans, *resumed][len(plans) :], expected[len(plans) :])
    whole.close()
    resumed.close()
    for index in range(2):
        name = f"dead_letters.{index}.jsonl"
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() != b""


def test_time_is_that_of_the_partition_that_is_furthest_behind(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, From(0, SmallSource(4)), From(50, SmallSource(4)), freeze_every=1)
    plans = list(planner)
    planner.close()
    # Chunk n is at n + 1 thousand seconds.
    times = [(plan.frozen or {})["now_ms"] for plan in plans]
    assert times[0] < 2_000_000 and times[-1] < 5_000_000 and times == sorted(times)
    # The metrics go by it too.
    assert [set(plan.observed.event_time_ms.tolist()) for plan in plans] == [{time} for time in times]


def test_time_goes_on_when_a_short_partition_begins_again(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, From(0, SmallSource(9)), From(0, SmallSource(3, epochs=3)), freeze_every=1)
    times = [(plan.frozen or {})["now_ms"] for plan in planner]
    planner.close()
    assert times == sorted(times) and times[-1] <= 10_000_000, "no pass sends the time ahead of the longest partition"


def test_states_of_any_form_are_packed_and_unpacked() -> None:
    state = {
        "memories": [{"a": np.arange(7, dtype=np.int64), "b/c": np.zeros((0, 4), np.uint32)}, {}],
        "stream": {"position": {"file": "ä.csv", "byte": 2**40}, "row": 3, "none": None},
        "large": np.random.default_rng(0).random((400, 1000)),
    }
    rows = pack(state)
    assert rows.dtype == np.uint8 and rows.shape == (4, 2**20)
    assert_same(unpack(rows), state)
    assert_same(unpack(np.concatenate([rows, rows])), state)
