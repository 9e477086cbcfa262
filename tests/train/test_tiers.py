"""Tables in two tiers learn what tables on the device learn, bit for bit, whatever is where."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest

from launch.bench.kafka_broker import free_port
from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.ids.mapper import Mapper
from monolith_jax.planner import Planner
from monolith_jax.reader import Reader
from monolith_jax.stream.batcher import Batch
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.tables.table import TableConfig, make_groups, make_tier
from monolith_jax.train.loop import predict, run
from monolith_jax.train.state import TrainState
from monolith_jax.train.step import make_predict_step, make_train_step
from monolith_jax.train.tiers import Tiers
from tests.small_model import ADAGRAD, SGD, Small, make_examples, make_small

BATCH = 16
POOL = 400
"""Batches that there are; a long run takes them again."""


class Stream:
    """Batches of examples whose ids drift: popular ones come again, most do not for a long time."""

    def __init__(self, number: int, num_ids: int, start: int = 0) -> None:
        self.at, self.number, self.num_ids = start, number, num_ids

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Batch:
        if self.at == self.number:
            raise StopIteration
        self.at += 1
        return Batch(examples_of(self.at, self.num_ids), (), 0)

    def get_state(self) -> dict[str, Any]:
        return {"at": self.at}

    def set_state(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def close(self) -> None:
        pass


_POOL: dict[tuple[int, int], pa.RecordBatch] = {}


def examples_of(at: int, num_ids: int) -> pa.RecordBatch:
    """Returns a batch of the pool with the time of its turn, 100 s after the one before it."""
    key = (at % POOL, num_ids if at % 2 else num_ids // 8)
    if key not in _POOL:
        _POOL[key] = make_examples(BATCH, *key)
    examples = _POOL[key]
    where = examples.schema.names.index("event_time_ms")
    return examples.set_column(where, "event_time_ms", pa.array(np.full(BATCH, 100_000 * at), pa.int64()))


class Kept:
    """A log that keeps the losses and stats of all steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.stats: list[dict[str, float]] = []

    def step(self, planned: Any, loss: float, scores: np.ndarray, retrieval: Any = None) -> None:
        self.losses.append(loss)
        self.stats.append(planned.stats)


@dataclasses.dataclass
class Trained:
    """What a run left behind."""

    small: Small
    state: TrainState
    """With all rows."""
    log: Kept
    saved: list[tuple[TrainState, Any]]
    """Of each snapshot the state, copied, and the host's."""


def with_rules(small: Small) -> Small:
    mappers = [
        GroupMapper(
            group.maps,
            small.model.layout.position_tables(index, group.maps.names),
            small.model.mesh.size,
            [Rule(table.admission, table.ttl_s) for table in group.tables],
            tier=make_tier(group),
        )
        for index, group in enumerate(small.model.groups)
    ]
    return dataclasses.replace(small, mapper=Mapper(mappers))


def planner_of(small: Small, stream: Stream, folder: Path, **options: Any) -> Planner:
    reader = Reader(stream, [], DeadLetters(folder / "x"), BATCH)
    return Planner(small.model, [reader], small.mapper, **options)


@functools.cache
def step_of(tables: tuple[TableConfig, ...], num_devices: int) -> Any:
    """Returns the step of such a model, compiled once."""
    return make_train_step(make_small(num_devices, tables=tables).model)


def train(
    folder: Path,
    tables: tuple[TableConfig, ...],
    steps: int,
    num_devices: int = 1,
    num_ids: int = 3000,
    freeze_every: int = 0,
    start: tuple[TrainState, Any] | None = None,
    pinned: bool | None = None,
) -> Trained:
    """Trains tables over the stream, from the start or from what another run had saved."""
    small = with_rules(make_small(num_devices, tables=tables))
    tiers, log, saved = Tiers(small.model, pinned=pinned), Kept(), []
    planner = planner_of(small, Stream(steps, num_ids), folder, freeze_every=freeze_every)
    state = small.state
    if start is not None:
        planner.set_state(start[1])
        placed = jax.tree.map(lambda saved, like: jax.device_put(saved, like.sharding), start[0][:3], tuple(state[:3]))
        groups = tuple(
            array if group.tiered else jax.device_put(array, like.sharding)
            for array, like, group in zip(start[0].groups, state.groups, small.model.groups, strict=True)
        )
        state = tiers.split(TrainState(placed[0], placed[1], placed[2], groups))

    def save(state: TrainState, frozen: Any) -> None:
        saved.append((jax.tree.map(np.array, jax.device_get(tiers.whole(state))), frozen))

    state = run(state, planner, step_of(tables, num_devices), log, save, tiers)  # pyright: ignore[reportArgumentType]
    planner.close()
    return Trained(small, jax.tree.map(np.array, jax.device_get(tiers.whole(state))), log, saved)


def tiered(tables: Sequence[TableConfig], times: float = 10) -> tuple[TableConfig, ...]:
    """Returns tables that are so many times larger than their part of the device."""
    return tuple(dataclasses.replace(t, memory="tiered", device_rows=int(t.max_rows / times)) for t in tables)


def assert_same_bits(one: Any, other: Any) -> None:
    leaves, other_leaves = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves) == len(other_leaves)
    for a, b in zip(leaves, other_leaves, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


LARGE = (
    TableConfig("user", 2400, 4, SGD, ttl_s=3_000),
    TableConfig("tag", 3200, 4, ADAGRAD, admission=AdmissionConfig("seen", 3)),
    TableConfig("video", 800, 4, SGD, ttl_s=20_000),
)
"""Users come and go, videos reach their cap."""
TIER_FIELDS = {"hit_rate", "loaded", "evicted"}


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("steps", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_ten_times_what_the_device_holds(tmp_path: Path, steps: int, num_devices: int) -> None:
    one = train(tmp_path, LARGE, steps, num_devices)
    other = train(tmp_path, tiered(LARGE), steps, num_devices)
    for group in other.small.model.groups:
        assert group.tiered and sum(table.max_rows for table in group.tables) >= 10 * group.slots_per_shard * 8
        assert group.device_shape[1] * 10 < group.shape[1]
    assert one.log.losses == other.log.losses and len(one.log.losses) == steps
    # All rows with their optimizer state, those without an id too, and the dense weights.
    assert_same_bits(one.state, other.state)
    assert_same_bits(one.small.mapper.get_state(), other.small.mapper.get_state())
    sums = {name: sum(stats[name] for stats in other.log.stats) for name in other.log.stats[0]}
    assert min(sums[name] for name in ("expired", "freed_at_cap", "not_admitted", "loaded", "evicted")) > 0, sums
    assert all(0 <= stats["hit_rate"] <= 1 for stats in other.log.stats)
    assert 0.1 < sums["hit_rate"] / steps < 0.9
    assert [{**a, **dict.fromkeys(TIER_FIELDS)} for a in one.log.stats] == [
        {**b, **dict.fromkeys(TIER_FIELDS)} for b in other.log.stats
    ]
    assert not TIER_FIELDS & one.log.stats[0].keys()


def test_which_rows_are_where_does_not_depend_on_the_mesh(tmp_path: Path) -> None:
    runs = [train(tmp_path, tiered(LARGE), 40, num_devices) for num_devices in (1, 4)]
    for name in TIER_FIELDS:
        assert [stats[name] for stats in runs[0].log.stats] == [stats[name] for stats in runs[1].log.stats]


@pytest.mark.parametrize("num_devices", [1, 8])
def test_rounding_goes_by_the_row_not_by_its_slot(tmp_path: Path, num_devices: int) -> None:
    half = tuple(dataclasses.replace(table, dtype="bfloat16") for table in LARGE)
    one, other = (train(tmp_path, tables, 60, num_devices) for tables in (half, tiered(half)))
    assert sum(stats["evicted"] for stats in other.log.stats) > 0
    assert one.log.losses == other.log.losses
    assert_same_bits(one.state, other.state)


def test_tables_on_the_device_keep_their_rows_there(tmp_path: Path) -> None:
    mixed = (LARGE[0], LARGE[1], tiered(LARGE)[2])
    one, other = (train(tmp_path, tables, 60) for tables in (LARGE, mixed))
    assert [group.maps.names for group in one.small.model.groups] == [group.maps.names for group in other.small.model.groups]
    assert one.log.losses == other.log.losses
    assert_same_bits(one.state, other.state)
    tier = other.small.mapper.groups[0].tier
    assert tier is not None
    # Users in the slots: all that have one now, and those that had one.
    offset = other.small.model.groups[0].maps.row_offsets[1]
    slots = np.arange(8 * tier.slots_per_shard, dtype=np.int32)[None]
    rows = tier.rows_of(slots)
    assert ((rows >= 0) & (rows < offset)).sum() >= other.small.mapper.groups[0].maps.num_rows[0] > 200


def test_page_locked_staging_changes_nothing(tmp_path: Path) -> None:
    assert "pinned_host" in {memory.kind for memory in jax.devices()[0].addressable_memories()}
    one, other = (train(tmp_path, tiered(LARGE), 40, 2, pinned=pinned) for pinned in (True, False))
    assert one.log.losses == other.log.losses
    assert_same_bits(one.state, other.state)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_snapshots_go_from_any_memory_to_any(tmp_path: Path, num_devices: int) -> None:
    memories = {"device": LARGE, "tiered": tiered(LARGE)}
    one, other = (train(tmp_path, tables, 60, num_devices, freeze_every=20) for tables in memories.values())
    # Two in between and one at the end, with their maps; a save leaves the rows where they are.
    assert [len(whole.saved) for whole in (one, other)] == [4, 4]
    assert_same_bits(other.saved, one.saved)
    assert other.log.stats == train(tmp_path, memories["tiered"], 60, num_devices).log.stats
    for source, goal in (("tiered", "tiered"), ("tiered", "device"), ("device", "tiered")):
        saved = {"device": one, "tiered": other}[source].saved[1]
        again = train(tmp_path, memories[goal], 60, num_devices, start=saved)
        assert again.log.losses == one.log.losses[40:], (source, goal)
        assert_same_bits(again.state, one.state)


def test_held_out_examples_find_their_rows_and_change_none(tmp_path: Path) -> None:
    scores = []
    for tables in (LARGE, tiered(LARGE)):
        small = with_rules(make_small(1, tables=tables))
        tiers = Tiers(small.model)
        planner = planner_of(small, Stream(40, 3000), tmp_path)
        step = step_of(tables, 1)
        state = run(small.state, planner, step, Kept(), lambda *_: None, tiers)  # pyright: ignore[reportArgumentType]
        before = jax.tree.map(np.array, jax.device_get(tiers.whole(state)))
        planner = planner_of(small, Stream(30, 3000), tmp_path, insert=False)
        found: list[Any] = []
        predict_step = make_predict_step(small.model)
        state = predict(state, planner, predict_step, lambda _, part, found=found: found.append(part), tiers)
        assert_same_bits(before, tiers.whole(state))
        # And training goes on from there.
        planner = planner_of(small, Stream(80, 3000, start=40), tmp_path)
        state = run(state, planner, step, Kept(), lambda *_: None, tiers)  # pyright: ignore[reportArgumentType]
        scores.append((np.stack(found), tiers.whole(state)))
    assert scores[0][0].shape == (30, BATCH, 2)
    assert_same_bits(*scores)


def test_a_batch_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a batch does not fit on the device: it needs \d+ distinct rows of tables user, video"
    ):
        train(tmp_path, tiered(LARGE, 100), 3)


def test_configs_that_say_nothing_are_refused() -> None:
    for table, told in (
        (
            TableConfig("a", 9, 4, memory="tiered"),
            "device_rows of table 'a' must be at least 1 where memory is 'tiered', got 0",
        ),
        (TableConfig("a", 9, 4, device_rows=5), "device_rows of table 'a' is 5, but with memory 'device' all rows"),
        (TableConfig("a", 9, 4, memory="disk"), "memory of table 'a' must be device or tiered"),  # pyright: ignore
    ):
        with pytest.raises(ValueError, match=told):
            make_groups([table], 8)


def test_two_processes_move_the_rows_of_their_own_devices() -> None:
    variables = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", "-m", "tests.train.tiers_run"]
    port = free_port()
    both = [subprocess.Popen([*command, str(process), str(port)], env=variables) for process in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
