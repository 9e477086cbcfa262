"""Planning: in stream order, never far ahead, and with a frozen state that is that of its plan."""

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.packing import unpack
from monolith_jax.planner import AHEAD, Planned, Planner
from monolith_jax.reader import Memory, Reader, observe
from monolith_jax.stream.batcher import Batch, batches
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.types import Chunk, Position
from tests.small_model import HEADS, SmallSource, make_examples, make_small

BATCH_SIZE = 16


class Counted:
    """A memory that numbers the examples it has seen."""

    num_refused = 0

    def __init__(self) -> None:
        self.seen = 0
        self.resets: list[int] = []

    def extend(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        self.seen += examples.num_rows
        at = examples.schema.names.index("age")
        return examples.set_column(at, "age", pa.array(np.full(examples.num_rows, float(self.seen))))

    def reset(self) -> None:
        self.resets.append(self.seen)
        self.seen = 0

    def get_state(self) -> dict[str, np.ndarray]:
        return {"seen": np.array([self.seen])}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        self.seen = int(state["seen"][0])


class Ticking:
    """Batches that count how many were asked for."""

    def __init__(self) -> None:
        self.taken = 0
        self.closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.taken += 1
        return Batch(make_examples(BATCH_SIZE, self.taken), (), 0)

    def get_state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def close(self) -> None:
        self.closed = True


def planner_of(source: Any, folder: Path, memory: Memory | None = None, **options: Any) -> Planner:
    """Returns a planner with empty maps over a source, or over batches."""
    one = make_small(1)
    stream = batches(source, BATCH_SIZE) if isinstance(source, SmallSource | Wordy) else source
    letters = DeadLetters(folder / "dead_letters.jsonl")
    memories = [] if memory is None else [memory]
    return Planner(one.model, [Reader(stream, memories, letters, BATCH_SIZE)], one.mapper, **options)


class Wordy:
    """A source that fails in the middle of an example's features, not while reading."""

    num_examples = None

    def read(self, position: Position) -> Iterator[Chunk]:
        for number in range(position.get("chunk", 0), 4):
            examples = make_examples(BATCH_SIZE, number)
            if number == 2:
                examples = examples.drop_columns(["age"])
            yield Chunk(examples, (), {"chunk": number + 1})


def assert_same(one: Any, other: Any) -> None:
    leaves, structure = jax.tree.flatten(one)
    other_leaves, other_structure = jax.tree.flatten(other)
    assert structure == other_structure
    for a, b in zip(leaves, other_leaves, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_plans(one: list[Planned], other: list[Planned]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.num_examples, a.epoch, a.stats, a.position) == (b.num_examples, b.epoch, b.stats, b.position)
        assert_same((a.inputs, tuple(a.observed)), (b.inputs, tuple(b.observed)))


def test_plans_come_in_stream_order(tmp_path: Path) -> None:
    planner = planner_of(SmallSource(num_chunks=7), tmp_path)
    plans = list(planner)
    planner.close()
    assert [one.num_examples for one in plans] == [16, 16, 16, 16, 6]
    expected = pa.Table.from_batches([make_examples(10, number) for number in range(7)]).column("event_time_ms").to_numpy()
    times = np.concatenate([one.observed.event_time_ms[: one.num_examples] for one in plans])
    np.testing.assert_array_equal(times, expected)
    assert [one.position for one in plans[:2]] == [[{"position": {}, "row": 0}], [{"position": {"chunk": 1}, "row": 6}]]
    assert planner.frozen_at_end is not None and planner.frozen_at_end["step"] == 5


def test_a_short_batch_is_padded_with_nothing(tmp_path: Path) -> None:
    planner = planner_of(SmallSource(num_chunks=1), tmp_path)
    (only,) = planner
    planner.close()
    assert only.num_examples == 10
    rest = slice(10, BATCH_SIZE)
    assert only.inputs.labels.shape == (BATCH_SIZE, len(HEADS))
    assert not np.asarray(only.inputs.masks)[rest].any() and not np.asarray(only.inputs.dense)[rest].any()
    assert (only.observed.event_time_ms[rest] == only.observed.event_time_ms[9]).all()
    for plan in only.inputs.plans:
        empty = plan.sent.shape[0] * plan.sent.shape[2] + 1
        assert (np.asarray(plan.positions)[rest] == empty).all()
        assert (np.asarray(plan.positions)[:10] != empty).any()


def test_at_most_two_plans_ahead(tmp_path: Path) -> None:
    stream = Ticking()
    planner = planner_of(stream, tmp_path)
    for number, _ in enumerate(planner, 1):
        deadline = time.monotonic() + 10
        while stream.taken < number + AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert stream.taken == number + AHEAD == number + 2
        if number == 5:
            break
    planner.close()
    assert stream.closed


def test_frozen_state_is_that_of_a_planner_stopped_there(tmp_path: Path) -> None:
    source = SmallSource(num_chunks=12, rejects=True)
    planner = planner_of(source, tmp_path / "a", Counted(), freeze_every=3)
    plans = list(planner)
    planner.close()
    assert [one.frozen is not None for one in plans] == [False, False, True, False, False, True, False, False]
    for step in (3, 6):
        stopped = planner_of(source, tmp_path / str(step), Counted(), max_steps=step)
        assert len(list(stopped)) == step
        stopped.close()
        assert_same(plans[step - 1].frozen, stopped.frozen_at_end)
        # And a planner that starts from it makes the plans that would have followed.
        resumed = planner_of(source, tmp_path / str(step), Counted())
        resumed.set_state(stopped.frozen_at_end or {})
        assert_same_plans(list(resumed), plans[step:])
        resumed.close()
        assert_same(resumed.frozen_at_end, planner.frozen_at_end)
        letters = [(tmp_path / name / "dead_letters.jsonl").read_bytes() for name in ("a", str(step))]
        assert letters[0] == letters[1] != b""


def test_frozen_state_is_a_copy(tmp_path: Path) -> None:
    planner = planner_of(SmallSource(num_chunks=12), tmp_path, Counted(), freeze_every=1)
    plans = list(planner)
    planner.close()
    counts = [sum(int(one["counts"].sum()) for one in (plan.frozen or {})["maps"]) for plan in plans]
    assert counts == sorted(counts) and counts[0] < counts[3]
    states = [unpack((plan.frozen or {})["parts"][0]) for plan in plans]
    assert [int(state["memories"][0]["seen"][0]) for state in states] == [16, 32, 48, 64, 80, 96, 112, 120]


def test_max_steps_counts_from_the_start_of_the_runs_life(tmp_path: Path) -> None:
    first = planner_of(SmallSource(num_chunks=12), tmp_path, max_steps=3)
    list(first)
    first.close()
    second = planner_of(SmallSource(num_chunks=12), tmp_path, max_steps=5)
    second.set_state(first.frozen_at_end or {})
    assert len(list(second)) == 2
    second.close()


def test_an_unreadable_part_surfaces_after_the_plans_before_it(tmp_path: Path) -> None:
    planner = planner_of(SmallSource(num_chunks=9, fails_at=5), tmp_path, Counted())
    plans = []
    with pytest.raises(ValueError, match="part 5 cannot be read"):
        plans.extend(planner)
    planner.close()
    whole = planner_of(SmallSource(num_chunks=9), tmp_path, Counted())
    all_plans = list(whole)
    whole.close()
    # 50 examples can be read: three whole batches.
    frozen = planner.frozen_at_end
    assert frozen is not None and frozen["step"] == 3
    resumed = planner_of(SmallSource(num_chunks=9), tmp_path, Counted())
    resumed.set_state(frozen)
    assert_same_plans(list(resumed), all_plans[3:])
    resumed.close()


def test_an_error_half_way_through_a_plan_keeps_nothing(tmp_path: Path) -> None:
    planner = planner_of(Wordy(), tmp_path, None)
    plans = []
    with pytest.raises(ValueError, match="feature 'age' needs the column 'age'"):
        plans.extend(planner)
    planner.close()
    assert len(plans) == 2
    assert not planner.frozen_at_end, "a state that has read a batch but not planned it must not be saved"


def test_an_error_while_freezing_does_not_hang(tmp_path: Path) -> None:
    class Broken(Counted):
        def get_state(self) -> dict[str, np.ndarray]:
            raise RuntimeError("no state")

    planner = planner_of(SmallSource(num_chunks=2), tmp_path, Broken())
    with pytest.raises(RuntimeError, match="no state"):
        list(planner)
    planner.close()


def test_stop_yields_what_is_planned_and_freezes(tmp_path: Path) -> None:
    stream = Ticking()
    planner = planner_of(stream, tmp_path)
    taken = 0
    for number, _ in enumerate(planner, 1):
        taken = number
        if number == 2:
            planner.stop()
    assert 2 <= taken <= 2 + AHEAD + 1
    assert planner.frozen_at_end is not None
    assert planner.frozen_at_end["step"] == taken == unpack(planner.frozen_at_end["parts"][0])["stream"]["taken"]
    planner.close()


def test_stop_before_the_start(tmp_path: Path) -> None:
    planner = planner_of(Ticking(), tmp_path)
    planner.stop()
    assert list(planner) == []
    assert planner.frozen_at_end is not None and planner.frozen_at_end["step"] == 0
    planner.close()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_never_waits_for_the_consumer(tmp_path: Path, taken: int) -> None:
    stream = Ticking()
    planner = planner_of(stream, tmp_path)
    iterator = iter(planner)
    for _ in range(taken):
        next(iterator)
    start = time.monotonic()
    planner.close()
    planner.close()
    assert time.monotonic() - start < 5
    assert stream.closed
    assert "planner" not in [thread.name for thread in threading.enumerate()]


def test_memories_start_anew_with_each_pass(tmp_path: Path) -> None:
    memory = Counted()
    planner = planner_of(SmallSource(num_chunks=2, epochs=3), tmp_path, memory)
    plans = list(planner)
    planner.close()
    assert [(one.epoch, one.num_examples) for one in plans] == [(0, 16), (0, 4), (1, 16), (1, 4), (2, 16), (2, 4)]
    assert memory.resets == [20, 20] and memory.seen == 20
    # The same examples with the same memories: only which rows are fresh differs.
    for one, other in ((0, 2), (1, 3)):
        np.testing.assert_array_equal(plans[one].inputs.dense, plans[other].inputs.dense)
    assert plans[2].stats["fresh"] == 0 < plans[0].stats["fresh"]


def test_planning_without_inserting_changes_no_map(tmp_path: Path) -> None:
    small = make_small(1)
    before = small.mapper.get_state()
    reader = Reader(batches(SmallSource(), BATCH_SIZE), [], DeadLetters(tmp_path / "x"), BATCH_SIZE)
    planner = Planner(small.model, [reader], small.mapper, insert=False)
    stats = [plan.stats for plan in planner]
    planner.close()
    assert all(one["fresh"] == 0 and one["unknown"] == one["unique"] > 0 for one in stats)
    for one, other in zip(before, small.mapper.get_state(), strict=True):
        assert_same({**one, "sizes": 0}, {**other, "sizes": 0})


def test_observe_masks_weights_and_groups() -> None:
    columns = {
        "event_time_ms": [1, 2, 3],
        "user_id": ["a", "b", "a"],
        "like": [True, None, False],
        "play_time_ms": [500, 9_000, 100],
        "duration_ms": [1000, None, 1000],
        "weight": pa.array([2.0, 1.0, None], pa.float32()),
        "optimal_like": pa.array([0.1, 0.2, 0.3], pa.float32()),
    }
    seen = observe(pa.RecordBatch.from_pydict(columns), ["like", "play_ratio"], "user_id")
    assert seen.labels.tolist() == [[1, 0.5], [0, 0], [0, np.float32(0.1)]]
    assert seen.masks.tolist() == [[2, 2], [0, 0], [1, 1]]
    assert seen.groups[0] == seen.groups[2] != seen.groups[1]
    assert seen.optimal is not None and np.isnan(seen.optimal[:, 1]).all()
    np.testing.assert_allclose(seen.optimal[:, 0], [0.1, 0.2, 0.3], rtol=1e-6)
    bare = observe(pa.RecordBatch.from_pydict({"event_time_ms": [1], "like": [True]}), ["like"], "user_id")
    assert bare.optimal is None and bare.groups.tolist() == [0]


class Timed:
    """Batches with given event times, each with its epoch."""

    def __init__(self, times_ms: list[tuple[np.ndarray, int]]) -> None:
        self.times_ms, self.at = times_ms, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.at == len(self.times_ms):
            raise StopIteration
        (times_ms, epoch), self.at = self.times_ms[self.at], self.at + 1
        examples = make_examples(BATCH_SIZE, self.at)
        where = examples.schema.names.index("event_time_ms")
        return Batch(examples.set_column(where, "event_time_ms", pa.array(times_ms, pa.int64())), (), epoch)

    def get_state(self) -> dict[str, Any]:
        return {"at": self.at}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]

    def close(self) -> None:
        pass


def test_time_follows_the_batches_and_not_an_outlier_nor_a_new_epoch_backwards(tmp_path: Path) -> None:
    steady = np.full(BATCH_SIZE, 1_000_000)
    outlier, late = steady.copy(), steady - 500_000
    outlier[3] = 10**12
    batches_of = [(steady, 0), (outlier, 0), (late, 0), (steady + 60_000, 0), (steady, 1), (steady + 9_000, 1)]
    planner = planner_of(Timed(batches_of), tmp_path, freeze_every=1)
    times = [planned.frozen["now_ms"] for planned in planner if planned.frozen is not None]
    assert times == [1_000_000, 1_000_000, 1_000_000, 1_060_000, 1_060_000, 1_069_000]
    one, other = planner_of(Timed(batches_of), tmp_path, freeze_every=1), planner_of(Timed(batches_of), tmp_path)
    halfway = list(one)[4].frozen
    assert halfway is not None
    other.set_state(halfway)
    list(other)
    for state in (other.get_state(), one.get_state()):
        assert (state["now_ms"], unpack(state["parts"][0])["shift_ms"]) == (1_069_000, 60_000)
