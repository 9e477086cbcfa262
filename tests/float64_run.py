"""Trains 50 steps in float64 on one device, on meshes of eight, and in two processes with four devices each.

`python -m tests.float64_run NAME` is a process of its own and starts the two. It prints one JSON object: for each mesh the
largest difference of a leaf of the state over the largest value of that leaf. `python -m tests.float64_run NAME FOLDER PROCESS
PORT` is one of the two: the leaves go into FOLDER, of tables its own part.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.bench.kafka_broker import free_port
from monolith_jax.ids.exchange import Exchange
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.train.step import make_train_step
from tests.small_model import TABLES, make_examples, make_small

OPTIMIZERS = {
    "sgd": OptimizerConfig("sgd", 0.05),
    "momentum": OptimizerConfig("sgd", 0.05, (("momentum", 0.9),)),
    "adagrad": OptimizerConfig("adagrad", 0.05),
    "adam": OptimizerConfig("adam", 0.01),
    "rowwise_adagrad": OptimizerConfig("rowwise_adagrad", 0.05),
    "ftrl": OptimizerConfig("ftrl", 0.05, (("l1", 1e-4), ("l2", 1e-4))),
    "rmsprop": OptimizerConfig("rmsprop", 0.01),
}
NUM_GROUPS = 1
"""All tables have one optimizer here."""
MESHES = ((8, 1), (8, 2), (8, 4))
"""Devices, and how many of them share a tower."""


def learn(
    optimizer: OptimizerConfig, num_devices: int, model_parallel: int, exchange: Exchange | None = None
) -> tuple[list[Any], list[float]]:
    """Returns the leaves of the state after 50 steps, of tables this process's part, and the losses."""
    tables = [dataclasses.replace(table, optimizer=optimizer) for table in TABLES]
    config = MMoEConfig(4, (16, 8), (4,))
    small = make_small(num_devices, config, tables, dense_optimizer=optimizer, model_parallel=model_parallel, exchange=exchange)
    train_step, state, losses = make_train_step(small.model), small.state, []
    first, last = (16 * exchange.process_id, 16 * exchange.process_id + 16) if exchange else (0, 32)
    for number in range(50):
        examples = make_examples(32, seed=number % 7, num_ids=100)[first:last]
        state, metrics = train_step(state, small.inputs_of(examples)[0])
        losses.append(float(metrics.loss))
    assert metrics.scores.dtype == metrics.loss.dtype == np.float64
    leaves = [_local(leaf) for leaf in jax.tree.leaves(state)]
    assert {str(leaf.dtype) for leaf in leaves} <= {"float64", "int32"}
    return leaves, losses


def _local(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def one_of_two(name: str, folder: str, process_id: int, port: int) -> None:
    """Trains as one of two processes, and leaves what it learned in a folder."""
    jax.config.update("jax_num_cpu_devices", 5)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process_id)
    leaves, losses = learn(OPTIMIZERS[name], 8, 1, Exchange())
    np.savez(Path(folder) / f"{process_id}.npz", *leaves, losses=losses)


def in_two_processes(name: str) -> tuple[list[Any], list[float]]:
    """Returns what two processes learned, the tables put together."""
    variables = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "error", "-m", "tests.float64_run", name, folder]
        port = free_port()
        both = [subprocess.Popen([*command, str(process), str(port)], env=variables) for process in range(2)]
        if any([process.wait(200) for process in both]):
            raise RuntimeError("one of two processes failed; its error is above")
        parts = [np.load(Path(folder) / f"{process}.npz") for process in range(2)]
    leaves = [[part[f"arr_{index}"] for part in parts] for index in range(len(parts[0].files) - 1)]
    # Tables come last in the state, a group each.
    whole = [pair[0] for pair in leaves[:-NUM_GROUPS]]
    return whole + [np.concatenate(pair) for pair in leaves[-NUM_GROUPS:]], parts[0]["losses"].tolist()


def main(name: str) -> None:
    """Prints the differences of one optimizer."""
    (one, _), found = learn(OPTIMIZERS[name], 1, 1), {}
    others = {"x".join(map(str, mesh)): learn(OPTIMIZERS[name], *mesh)[0] for mesh in MESHES}
    for mesh, other in {**others, "2 processes": in_two_processes(name)[0]}.items():
        pairs = zip(one, other, strict=True)
        found[mesh] = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300)) for a, b in pairs)
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        one_of_two(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
