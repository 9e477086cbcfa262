"""Trains 50 steps in float64 on one device and on meshes of eight: `python -m tests.float64_run NAME`, a process of its own.

Prints one JSON object: for each mesh the largest difference of a leaf of the state over the largest value of that leaf.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np

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
MESHES = ((8, 1), (8, 2), (8, 4))
"""Devices, and how many of them share a tower."""


def learn(optimizer: OptimizerConfig, num_devices: int, model_parallel: int) -> list[Any]:
    """Returns the leaves of the state after 50 steps."""
    tables = [dataclasses.replace(table, optimizer=optimizer) for table in TABLES]
    config = MMoEConfig(4, (16, 8), (4,))
    small = make_small(num_devices, config, tables, dense_optimizer=optimizer, model_parallel=model_parallel)
    train_step, state = make_train_step(small.model), small.state
    for number in range(50):
        state, metrics = train_step(state, small.inputs_of(make_examples(32, seed=number % 7, num_ids=100))[0])
        jax.block_until_ready(metrics.loss)
    assert metrics.scores.dtype == metrics.loss.dtype == np.float64
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
    assert {str(leaf.dtype) for leaf in leaves} <= {"float64", "int32"}
    return leaves


def main(name: str) -> None:
    """Prints the differences of one optimizer."""
    jax.config.update("jax_enable_x64", True)
    one = learn(OPTIMIZERS[name], 1, 1)
    found = {}
    for mesh in MESHES:
        pairs = zip(one, learn(OPTIMIZERS[name], *mesh), strict=True)
        found["x".join(map(str, mesh))] = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300)) for a, b in pairs)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
