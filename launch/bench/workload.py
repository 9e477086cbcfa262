"""The step that is measured: examples, the model over them, and what takes turns. Needs neither grain nor gin nor orbax.

In: a batch size, tables, the towers. Out: lanes, each of which dispatches one step after another.

Workload: 26 features of one id, 10M ids zipf(1.05) each, dim 16, 13 dense values.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from jax.sharding import Mesh

from monolith_jax.features import DenseFeatureConfig, IdFeatureConfig
from monolith_jax.ids.group import GroupMapper
from monolith_jax.ids.mapper import Mapper
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.mesh import BATCH, REPLICATED, sharding
from monolith_jax.models.layers import ModelInputs
from monolith_jax.models.losses import HeadConfig, multi_task_loss
from monolith_jax.planner import Planner
from monolith_jax.reader import Reader
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.tables.table import TableConfig, make_tier
from monolith_jax.tables.update import OptimizerConfig, apply_updates, learning_rate
from monolith_jax.train.state import Inputs, Model, ModelConfig, first_state, make_model
from monolith_jax.train.step import make_fresh, make_read, make_train_step, make_write
from monolith_jax.train.tiers import Tiers

NUM_IDS = 10_000_000
NUM_FEATURES, NUM_DENSE = 26, 13
ZIPF = 1.05
POOL = 24
"""Batches that are made ahead and read over and over."""
NUM_SHARDS = 64


def zipf_ranks(rng: np.random.Generator, size: int, num_ids: int = NUM_IDS) -> np.ndarray:
    """Returns ranks 0.. with P(rank) ~ rank^-1.05, int64 [size], by the inverse of the continuous distribution function."""
    power = 1 - ZIPF
    ranks = np.floor(((num_ids**power - 1) * rng.random(size) + 1) ** (1 / power)).astype(np.int64)
    return np.minimum(ranks - 1, num_ids - 1)


def ids_of_ranks(ranks: np.ndarray, feature: int) -> np.ndarray:
    """Returns raw 64-bit ids of ranks, int64: scrambled, and apart by feature."""
    return ((ranks.astype(np.uint64) + np.uint64(feature << 32)) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


class PoolBatch(NamedTuple):
    """What the planner reads of a batch."""

    examples: pa.RecordBatch
    rejected: tuple[Any, ...] = ()
    epoch: int = 0
    is_idle: bool = False
    told: Mapping[str, float] = {}


@dataclass
class Pool:
    """Batches made ahead, over and over, without end: what the planner reads from. Reading costs what reading Arrow costs."""

    batches: tuple[PoolBatch, ...]
    number: int = 0

    def __iter__(self) -> Iterator[PoolBatch]:
        """Returns itself."""
        return self

    def __next__(self) -> PoolBatch:
        """Returns the next batch."""
        self.number += 1
        return self.batches[self.number % len(self.batches)]

    def get_state(self) -> dict[str, Any]:
        """Returns the position."""
        return {"number": self.number}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position."""
        self.number = state["number"]

    def close(self) -> None:
        """Has nothing to close."""


def make_batches(
    batch_size: int, seed: int = 0, pool: int = POOL, num_ids: int = NUM_IDS, labels: Sequence[str] = ("like",)
) -> tuple[PoolBatch, ...]:
    """Returns batches: raw 64-bit ids, dense values, labels."""
    rng = np.random.default_rng(seed)
    batches = []
    for number in range(pool):
        columns: dict[str, Any] = {"event_time_ms": np.arange(batch_size, dtype=np.int64) + number * batch_size}
        for feature in range(NUM_FEATURES):
            columns[f"id{feature}"] = ids_of_ranks(zipf_ranks(rng, batch_size, num_ids), feature)
        for value in range(NUM_DENSE):
            columns[f"dense{value}"] = rng.random(batch_size, dtype=np.float32)
        for label in labels:
            columns[label] = rng.random(batch_size) < 0.3
        examples = pa.RecordBatch.from_pydict({name: pa.array(column) for name, column in columns.items()})
        batches.append(PoolBatch(examples))
    return tuple(batches)


@dataclass(frozen=True)
class Workload:
    """A model over the batches, on a mesh."""

    model: Model
    weights: Any
    batches: tuple[PoolBatch, ...]
    threads: ShardThreads | None = None

    @property
    def batch_size(self) -> int:
        """B"""
        return self.batches[0].examples.num_rows

    def mapper(self) -> Mapper:
        """Returns empty maps."""
        model = self.model
        return Mapper(
            [
                GroupMapper(
                    group.maps,
                    model.layout.position_tables(index, group.maps.names),
                    model.mesh.size,
                    threads=self.threads,
                    tier=make_tier(group),
                )
                for index, group in enumerate(model.groups)
            ]
        )

    def planner(self, mapper: Mapper | None = None, max_steps: int = 0, freeze_every: int = 0) -> Planner:
        """Returns the host's half, from reading Arrow to inputs on the device."""
        letters = DeadLetters(Path(tempfile.gettempdir()) / "bench_step_dead_letters.jsonl")
        pool = Pool(self.batches)
        reader = Reader(pool, (), letters, self.batch_size)
        parts = (self.model, [reader], mapper or self.mapper())
        return Planner(*parts, freeze_every=freeze_every, max_steps=max_steps)

    def inputs(self, number: int = 0) -> list[Inputs]:
        """Returns the inputs of `number` batches (0: of the pool) on the device; their ids all have rows already."""
        mapper, number = self.mapper(), number or len(self.batches)
        for _ in self.planner(mapper, max_steps=number):
            pass
        planned = self.planner(mapper, max_steps=number)
        return [one.inputs for one in planned]


def make_workload(
    mesh: Mesh,
    config: ModelConfig,
    batches: tuple[PoolBatch, ...],
    optimizer: OptimizerConfig,
    max_rows: int,
    dim: int = 16,
    labels: Sequence[str] = ("like",),
    threads: ShardThreads | None = None,
    device_rows: int = 0,
) -> Workload:
    """Returns the workload: 26 tables of `max_rows` rows, `device_rows` of them on the device (0: all), and the towers."""
    table = TableConfig("", max_rows, dim, optimizer, memory="tiered" if device_rows else "device", device_rows=device_rows)
    tables = [dataclasses.replace(table, name=f"id{f}") for f in range(NUM_FEATURES)]
    features: list[Any] = [IdFeatureConfig(name=f"id{f}", column=f"id{f}", table=f"id{f}") for f in range(NUM_FEATURES)]
    features += [DenseFeatureConfig(name=f"dense{v}", column=f"dense{v}") for v in range(NUM_DENSE)]
    heads = [HeadConfig(label=label) for label in labels]
    model, weights = make_model(config, tables, features, heads, optimizer, 0, NUM_SHARDS, mesh)
    return Workload(model, weights, batches, threads)


def full_mapper(work: Workload, of_table: int) -> Mapper:
    """Returns maps in which the first `of_table` ids of each table have rows, spread over all of them."""
    mapper, rng = work.mapper(), np.random.default_rng(0)
    for table in range(NUM_FEATURES):
        # Rows are given out in the order in which ids come.
        ids = ids_of_ranks(rng.permutation(of_table), table)
        mapper.groups[0].maps.lookup_or_insert(ids, table, np.zeros(ids.size, np.uint32))
    return mapper


@dataclass
class Lane:
    """One thing that is timed, in turns with the others."""

    name: str
    step: Callable[[], Any]
    """Dispatches one step; returns what to wait for."""
    close: Callable[[], None] = lambda: None
    step_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def turn(self, steps: int, settle: int = 4) -> None:
        """Runs steps with at most two in flight, as the loop does; the first ones (work done ahead) are not counted."""
        in_flight: list[Any] = []
        started = cpu = 0.0
        for number in range(settle + steps):
            if number == settle:
                started, cpu = time.perf_counter(), time.process_time()
            if len(in_flight) == 2:
                jax.block_until_ready(in_flight.pop(0))
            in_flight.append(self.step())
        jax.block_until_ready(in_flight)
        self.step_ms.append((time.perf_counter() - started) * 1e3 / steps)
        self.cpu_ms.append((time.process_time() - cpu) * 1e3 / steps)

    def warm(self, steps: int) -> None:
        """Compiles, meets every id once, and forgets how long that took."""
        self.turn(steps)
        self.step_ms.clear()
        self.cpu_ms.clear()


def dense_lane(work: Workload, name: str) -> Lane:
    """The towers alone: constant vectors in, gradients to the vectors out, dense weights updated."""
    model, batch_size, rng = work.model, work.batch_size, np.random.default_rng(0)
    batch, replicated = sharding(model.mesh, BATCH), sharding(model.mesh, REPLICATED)
    shape = (batch_size, NUM_FEATURES, model.groups[0].dim)
    vectors = jax.device_put(rng.normal(size=shape).astype(np.float32) * 0.05, batch)
    dense = jax.device_put(rng.random((batch_size, NUM_DENSE), dtype=np.float32), batch)
    labels = jax.device_put((rng.random((batch_size, len(model.heads))) < 0.3).astype(np.float32), batch)
    masks = jax.device_put(np.ones(labels.shape, np.float32), batch)

    def loss_of(weights: Any, vectors: Any, dense: Any, labels: Any, masks: Any) -> Any:
        assert model.towers.graph is not None
        logits = nnx.merge(model.towers.graph, nnx.State(weights))(ModelInputs((vectors,), dense))
        return multi_task_loss(logits, labels, masks, model.heads)

    def step(weights: Any, optimizer: Any, number: Any, *data: Any) -> Any:
        loss, (of_weights, of_vectors) = jax.value_and_grad(loss_of, argnums=(0, 1))(weights, *data)
        updates, optimizer = model.transformation.update(of_weights, optimizer, weights)
        weights = apply_updates(model.optimizer, weights, updates, learning_rate(model.optimizer, number))
        return weights, optimizer, number + 1, loss, of_vectors

    compiled = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=(replicated, replicated, replicated, replicated, batch))
    # A copy: the weights are donated, and the full lane needs its own.
    copied = jax.device_put(jax.tree.map(np.array, work.weights), replicated)
    optimizer = jax.jit(model.transformation.init, out_shardings=replicated)(copied)
    state = [copied, optimizer, jax.device_put(jnp.int32(0), replicated)]

    def run() -> Any:
        *state[:], loss, of_vectors = compiled(*state, vectors, dense, labels, masks)
        return loss, of_vectors

    return Lane(name, run)


def full_lane(
    work: Workload, name: str, mapper: Mapper | None = None, seen: Callable[[dict[str, float]], None] | None = None
) -> Lane:
    """The whole step, with the host's half running in its thread; `seen` gets each plan's counts."""
    planner, tiers = work.planner(mapper), Tiers(work.model)
    train_step, steps = make_train_step(work.model), iter(planner)
    state = [first_state(work.model, jax.tree.map(np.array, work.weights))]

    def run() -> Any:
        planned = next(steps)
        if seen is not None:
            seen(planned.stats)
        state[0], metrics = train_step(tiers.move(state[0], planned.moves), planned.inputs)
        return metrics

    return Lane(name, run, planner.close)


def host_lane(work: Workload, name: str) -> Lane:
    """The host's half alone, from reading to the copy to the device."""
    planner = work.planner()
    steps = iter(planner)
    return Lane(name, lambda: next(steps).inputs, planner.close)


def sparse_lane(work: Workload, name: str, inputs: Sequence[Inputs]) -> Lane:
    """The tables' half alone: first values, gather, send, return, update and write, of plans made ahead; no towers."""
    model = work.model
    fresh, read, write = make_fresh(model), make_read(model), make_write(model)
    state: list[Any] = list(first_state(model, jax.tree.map(np.array, work.weights)).groups)
    batch = sharding(model.mesh, BATCH)
    gradients, number, at = [], jax.device_put(jnp.int32(0), sharding(model.mesh, REPLICATED)), [0]
    for index, group in enumerate(model.groups):
        shape = (work.batch_size, model.layout.num_positions(index), group.dim)
        drawn = np.random.default_rng(index).normal(size=shape).astype(np.float32) * 1e-3
        gradients.append(jax.device_put(drawn, batch))

    def run() -> Any:
        at[0] += 1
        plans = inputs[at[0] % len(inputs)].plans
        groups = fresh(tuple(state), plans)
        rows, vectors, _ = read(groups, plans)
        state[:] = write(groups, rows, tuple(gradients), number, plans)
        # Not the arrays: the next step donates them.
        return vectors

    return Lane(name, run)


def device_lane(work: Workload, name: str, inputs: Sequence[Inputs]) -> Lane:
    """The device's half, tables and towers, on inputs that are there already."""
    train_step, at = make_train_step(work.model), [0]
    state = [first_state(work.model, jax.tree.map(np.array, work.weights))]

    def run() -> Any:
        at[0] += 1
        state[0], metrics = train_step(state[0], inputs[at[0] % len(inputs)])
        return metrics

    return Lane(name, run)
