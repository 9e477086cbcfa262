"""One process of a test: joins as `launch.train` does, then does what it is told instead of training.

Arguments: a duty, then those of `launch.train`. It prints one JSON line when it has joined.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import launch.run
import launch.train


def summed() -> float:
    """Returns the sum of 0, 1, ... over all devices of all processes, by one psum."""
    size = len(jax.devices())
    mesh = jax.make_mesh((size,), ("all",), axis_types=(AxisType.Auto,))
    whole = np.arange(size, dtype=np.float32)
    spread = jax.make_array_from_callback((size,), NamedSharding(mesh, PartitionSpec("all")), lambda index: whole[index])
    total = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec())
    return float(jax.jit(total)(spread)[0])


def instead_of_training(duty: str) -> Any:
    """Returns what stands for `launch.run.train`."""

    def train(experiment: Any, workdir: Path) -> None:
        seen = {
            "process": jax.process_index(),
            "processes": jax.process_count(),
            "devices": len(jax.devices()),
            "local_devices": len(jax.local_devices()),
            "sum": summed(),
            "pid": os.getpid(),
        }
        os.write(1, f"{json.dumps(seen)}\n".encode())  # In one piece: two processes may share the pipe.
        name, _, who = duty.partition(":")
        if who and int(who) == jax.process_index():
            if name == "fail":
                raise ValueError("this one fails")
            if name == "stay":
                time.sleep(1000)
        if name == "stay":
            summed()
        if name == "fail":
            time.sleep(1000)
        if name == "term":
            stopped: list[int] = []
            signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
            while not stopped:
                time.sleep(0.02)
            print("stopped in good order", flush=True)

    return train


if __name__ == "__main__":
    launch.run.train = instead_of_training(sys.argv[1])
    sys.exit(launch.train.main(sys.argv[2:]))
