"""One of two processes with four devices each that train tables on the device and in two tiers; it fails where they differ.

`python -m tests.train.tiers_run PROCESS PORT`
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from monolith_jax.ids.exchange import Exchange
from monolith_jax.tables.table import TableConfig
from monolith_jax.train.step import make_train_step
from monolith_jax.train.tiers import Tiers
from tests.small_model import ADAGRAD, SGD, make_examples, make_small

TABLES = (TableConfig("user", 2400, 4, SGD), TableConfig("tag", 3200, 4, ADAGRAD), TableConfig("video", 2400, 4, SGD))
STEPS = 40


def learn(tables: Sequence[TableConfig], exchange: Exchange) -> tuple[list[float], list[np.ndarray], dict[str, float]]:
    """Returns losses, this process's part of all rows, and the sums of the plans' counts."""
    small = make_small(8, tables=tables, exchange=exchange)
    tiers, step, state = Tiers(small.model, exchange), make_train_step(small.model), small.state
    losses, sums = [], dict[str, float]()
    with jax.transfer_guard("disallow"):
        for number in range(STEPS):
            examples = make_examples(32, number, 3000 if number % 2 else 300)[16 * exchange.process_id :][:16]
            with jax.transfer_guard("allow"):
                inputs, _, plan = small.inputs_of(examples)
            state = tiers.move(state, plan.moves)
            state, metrics = step(state, inputs)
            losses.append(float(jax.device_get(metrics.loss)))
            for name, value in plan.stats.items():
                sums[name] = sums.get(name, 0.0) + value
        # Also by way of a snapshot.
        for _ in range(2):
            whole = tiers.whole(state)
            state = tiers.split(whole)
        groups = tiers.whole(state).groups
        assert jax.tree.map(lambda like: (like.shape, like.dtype), tiers.like(state).groups) == tuple(
            (array.shape, array.dtype) for array in groups
        )
    return losses, [_local(array) for array in groups], sums


def _local(array: Any) -> np.ndarray:
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def main(process_id: int, port: int) -> None:
    """Trains both ways and compares."""
    jax.config.update("jax_num_cpu_devices", 5)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process_id)
    exchange = Exchange()
    losses, rows, _ = learn(TABLES, exchange)
    tiered = [dataclasses.replace(t, memory="tiered", device_rows=t.max_rows // 10) for t in TABLES]
    other_losses, other_rows, sums = learn(tiered, exchange)
    assert sums["loaded"] > 0 < sums["evicted"], sums
    assert losses == other_losses
    for mine, theirs in zip(rows, other_rows, strict=True):
        assert mine.shape == theirs.shape and mine.shape[0] == 4 and mine.any()
        assert mine.tobytes() == theirs.tobytes()
    few = [dataclasses.replace(t, device_rows=16) for t in tiered]
    try:
        learn(few, exchange)
    except ValueError as error:
        print(error)
        assert "does not fit on the device" in str(error)
    else:
        raise AssertionError("a batch fitted into two slots a shard")
    print("equal", sums)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
