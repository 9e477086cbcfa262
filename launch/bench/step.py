"""The step with the whole host pipeline running, against its dense half alone: `python -m launch.bench.step --help`.

Workload: batch 4096, 26 features of one id, 10M ids zipf(1.05) each, dim 16, MLP 400-400-400, Adagrad, 13 dense values. *Dense
half*: the same towers and loss on constant vectors, gradient with respect to the vectors included. *Full*: examples are read
(Arrow), featurized, mapped to rows and copied to the device by the planner's thread while the device computes. *Host*: the
planner alone. The three take turns within one process; figures are medians of the turns' step times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NUM_IDS = 10_000_000
NUM_FEATURES, NUM_DENSE = 26, 13
ZIPF = 1.05
POOL = 24
"""Batches that are made ahead and read over and over."""


def _zipf(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns ranks 0.. with P(rank) ~ rank^-1.05, by the inverse of the continuous distribution function."""
    power = 1 - ZIPF
    return np.floor(((NUM_IDS**power - 1) * rng.random(size) + 1) ** (1 / power)).astype(np.int64)


@dataclass(frozen=True)
class PoolSource:
    """Examples made ahead; reading costs what reading Arrow costs."""

    chunks: tuple[Any, ...]

    @property
    def num_examples(self) -> int | None:
        """Endless."""
        return None

    def read(self, position: Any) -> Iterator[Any]:
        """Yields the pool over and over."""
        from monolith_jax.types import Chunk

        number = position.get("chunk", 0)
        while True:
            number += 1
            yield Chunk(self.chunks[number % len(self.chunks)], (), {"chunk": number})


def make_pool(batch_size: int, seed: int = 0) -> PoolSource:
    """Returns a pool of batches: raw 64-bit ids (ranks, scrambled and apart by feature), dense values, a label."""
    import pyarrow as pa

    rng = np.random.default_rng(seed)
    chunks = []
    for number in range(POOL):
        columns: dict[str, Any] = {"event_time_ms": np.arange(batch_size, dtype=np.int64) + number * batch_size}
        for feature in range(NUM_FEATURES):
            ranks = _zipf(rng, batch_size).astype(np.uint64)
            columns[f"id{feature}"] = ((ranks + np.uint64(feature << 32)) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
        for value in range(NUM_DENSE):
            columns[f"dense{value}"] = rng.random(batch_size, dtype=np.float32)
        columns["like"] = rng.random(batch_size) < 0.3
        chunks.append(pa.RecordBatch.from_pydict({name: pa.array(column) for name, column in columns.items()}))
    return PoolSource(tuple(chunks))


@dataclass
class Lane:
    """One thing that is timed, in turns with the others."""

    name: str
    step: Callable[[], Any]
    """Dispatches one step; returns what to wait for."""
    step_ms: list[float]
    cpu_ms: list[float]
    close: Callable[[], None]

    def turn(self, steps: int, settle: int = 4) -> None:
        """Runs steps with at most two in flight, as the loop does; the first ones (work done ahead) are not counted."""
        import jax

        in_flight: list[Any] = []
        for number in range(settle + steps):
            if number == settle:
                started, cpu = time.perf_counter(), time.process_time()
            if len(in_flight) == 2:
                jax.block_until_ready(in_flight.pop(0))
            in_flight.append(self.step())
        jax.block_until_ready(in_flight)
        self.step_ms.append((time.perf_counter() - started) * 1e3 / steps)
        self.cpu_ms.append((time.process_time() - cpu) * 1e3 / steps)


def _dense_lane(model: Any, weights: Any, batch_size: int, name: str) -> Lane:
    """The towers alone: constant vectors in, gradients to the vectors out, dense weights updated."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from monolith_jax.mesh import BATCH, REPLICATED, sharding
    from monolith_jax.models.layers import ModelInputs
    from monolith_jax.models.losses import multi_task_loss
    from monolith_jax.tables.update import apply_updates, learning_rate

    rng = np.random.default_rng(0)
    batch, replicated = sharding(model.mesh, BATCH), sharding(model.mesh, REPLICATED)
    vectors = jax.device_put(rng.normal(size=(batch_size, NUM_FEATURES, 16)).astype(np.float32) * 0.05, batch)
    dense = jax.device_put(rng.random((batch_size, NUM_DENSE), dtype=np.float32), batch)
    labels = jax.device_put((rng.random((batch_size, 1)) < 0.3).astype(np.float32), batch)
    masks = jax.device_put(np.ones((batch_size, 1), np.float32), batch)

    def loss_of(weights: Any, vectors: Any) -> Any:
        logits = nnx.merge(model.graph, nnx.State(weights))(ModelInputs((vectors,), dense))
        return multi_task_loss(logits, labels, masks, model.heads)

    def step(weights: Any, optimizer: Any, number: Any) -> Any:
        loss, (of_weights, of_vectors) = jax.value_and_grad(loss_of, argnums=(0, 1))(weights, vectors)
        updates, optimizer = model.transformation.update(of_weights, optimizer, weights)
        weights = apply_updates(model.optimizer, weights, updates, learning_rate(model.optimizer, number))
        return weights, optimizer, number + 1, loss, of_vectors

    compiled = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=(replicated, replicated, replicated, replicated, batch))
    # A copy: the weights are donated, and the full lane needs its own.
    copied = jax.device_put(jax.tree.map(np.array, weights), replicated)
    state = [
        copied,
        jax.jit(model.transformation.init, out_shardings=replicated)(copied),
        jax.device_put(jnp.int32(0), replicated),
    ]

    def run() -> Any:
        *state[:], loss, of_vectors = compiled(*state)
        return loss, of_vectors

    return Lane(name, run, [], [], lambda: None)


def _full_lane(model: Any, weights: Any, planner: Any, name: str) -> Lane:
    import jax

    from monolith_jax.train.state import first_state
    from monolith_jax.train.step import make_train_step

    train_step, steps = make_train_step(model), iter(planner)
    state = [first_state(model, jax.tree.map(np.array, weights))]

    def run() -> Any:
        state[0], metrics = train_step(state[0], next(steps).inputs)
        return metrics

    return Lane(name, run, [], [], planner.close)


def _host_lane(planner: Any, name: str) -> Lane:
    steps = iter(planner)
    return Lane(name, lambda: next(steps).inputs, [], [], planner.close)


def _lanes(batch_size: int, max_rows: int, optimizer: str, device_counts: Sequence[int]) -> list[Lane]:
    from monolith_jax.features import DenseFeatureConfig, IdFeatureConfig
    from monolith_jax.ids.mapper import GroupMapper, Mapper
    from monolith_jax.mesh import MeshConfig, make_mesh
    from monolith_jax.models.deepfm import DeepFMConfig
    from monolith_jax.models.losses import HeadConfig
    from monolith_jax.planner import Planner
    from monolith_jax.stream.batcher import batches
    from monolith_jax.stream.dead_letter import DeadLetters
    from monolith_jax.tables.table import TableConfig
    from monolith_jax.tables.update import OptimizerConfig
    from monolith_jax.train.state import make_model

    config = OptimizerConfig(name=optimizer, learning_rate=0.02)
    tables = [TableConfig(name=f"id{f}", max_rows=max_rows, optimizer=config) for f in range(NUM_FEATURES)]
    features: list[Any] = [IdFeatureConfig(name=f"id{f}", column=f"id{f}", table=f"id{f}") for f in range(NUM_FEATURES)]
    features += [DenseFeatureConfig(name=f"dense{v}", column=f"dense{v}") for v in range(NUM_DENSE)]
    pool = make_pool(batch_size)
    letters = DeadLetters(Path(tempfile.gettempdir()) / "bench_step_dead_letters.jsonl")
    lanes: list[Lane] = []
    for count in device_counts:
        mesh = make_mesh(MeshConfig(num_devices=count))
        model, weights = make_model(DeepFMConfig(), tables, features, [HeadConfig(label="like")], config, 0, 64, mesh)
        group = model.groups[0]

        def planner(model: Any = model, group: Any = group, count: int = count) -> Planner:
            mapper = Mapper([GroupMapper(group.maps, model.layout.position_tables(0, group.maps.names), count)])
            return Planner(
                model,
                batches(pool, batch_size),
                (),
                mapper,
                letters,
                batch_size,
            )

        lanes.append(_dense_lane(model, weights, batch_size, f"dense half, {count} device(s)"))
        lanes.append(_full_lane(model, weights, planner(), f"full step, {count} device(s)"))
    lanes.append(_host_lane(planner(), "host pipeline alone"))
    return lanes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.step",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.step --rounds 7",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--max_rows", type=int, default=400_000, help="rows of each of the 26 tables (default 400,000)")
    parser.add_argument("--optimizer", default="adagrad")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each lane (default 7)")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a turn (default 10)")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="device counts that are tried (default 1 2)")
    arguments = parser.parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from launch.process import prepare
    from monolith_jax.mesh import MeshConfig

    prepare(MeshConfig(cpu_devices=max(arguments.devices)))
    console = Console()
    lanes = _lanes(arguments.batch_size, arguments.max_rows, arguments.optimizer, arguments.devices)
    for lane in lanes:
        lane.turn(2 * POOL)  # Compile, and meet every id once.
        lane.step_ms.clear()
        lane.cpu_ms.clear()
    for number in range(arguments.rounds):
        for lane in lanes if number % 2 == 0 else lanes[::-1]:
            lane.turn(arguments.steps)
        console.print(f"round {number + 1} of {arguments.rounds}", highlight=False)
    table = Table(
        "lane", "ms a step", "fastest turn", "CPU ms a step", title=f"batch {arguments.batch_size}, {arguments.optimizer}"
    )
    median = statistics.median
    for lane in lanes:
        lane.close()
        table.add_row(lane.name, f"{median(lane.step_ms):.1f}", f"{min(lane.step_ms):.1f}", f"{median(lane.cpu_ms):.1f}")
    console.print(table)
    print(json.dumps(summary(lanes, arguments.batch_size)))
    return 0


def summary(lanes: Sequence[Lane], batch_size: int) -> dict[str, float]:
    """Returns the figures: each kind of lane at its own best device count, ratios of medians."""
    median = statistics.median
    dense = min((lane for lane in lanes if lane.name.startswith("dense")), key=lambda lane: median(lane.step_ms))
    full = min((lane for lane in lanes if lane.name.startswith("full")), key=lambda lane: median(lane.step_ms))
    host = lanes[-1]
    by_round = [a / b for a, b in zip(full.step_ms, dense.step_ms, strict=True)]
    return {
        "steps_per_s": round(1e3 / median(full.step_ms), 2),
        "dense_steps_per_s": round(1e3 / median(dense.step_ms), 2),
        "over_dense": round(median(by_round), 3),
        "over_dense_of_fastest": round(min(full.step_ms) / min(dense.step_ms), 3),
        "host_ms": round(median(host.step_ms), 2),
        "host_over_step": round(median(host.step_ms) / median(full.step_ms), 3),
        "sparse_cpu_ms": round(median(full.cpu_ms) - median(dense.cpu_ms), 1),
        "examples_per_s": round(batch_size * 1e3 / median(full.step_ms)),
    }


if __name__ == "__main__":
    sys.exit(main())
