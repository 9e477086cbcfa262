"""One process of several that exchange words: `python -m tests.ids.exchange_run PROCESS PROCESSES PORT`. Prints what it got."""

import json
import sys
import threading

import jax
import numpy as np

from monolith_jax.ids.exchange import Exchange
from monolith_jax.mesh import BATCH_ALL, MeshConfig, make_mesh, sharding, split_cpu


def main(process_id: int, num_processes: int, port: int) -> None:
    """Gathers and swaps while another thread computes over the devices of a run's mesh, and checks both."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process_id)
    split_cpu(MeshConfig(cpu_devices=2))
    exchange, mesh = Exchange(), make_mesh(MeshConfig())
    assert not set(mesh.devices.flat) & set(exchange.mesh.devices.flat)
    where = sharding(mesh, BATCH_ALL)
    add, sums = jax.jit(lambda x: x.sum(), out_shardings=sharding(mesh, jax.sharding.PartitionSpec())), []

    def compute() -> None:
        for number in range(50):
            part = np.full(2, number + process_id, np.float32)
            sums.append(float(add(jax.make_array_from_process_local_data(where, part))))

    thread = threading.Thread(target=compute)
    thread.start()
    wrong = 0
    for number in range(50):
        size = (1, 7, 5000)[number % 3]
        mine = np.arange(size, dtype=np.uint32) + np.uint32(1_000_000 * process_id + number)
        gathered = exchange.gather(mine)
        swapped = exchange.swap(np.stack([mine + np.uint32(7 * to) for to in range(num_processes)]))
        for other in range(num_processes):
            theirs = np.arange(size, dtype=np.uint32) + np.uint32(1_000_000 * other + number)
            wrong += not np.array_equal(gathered[other], theirs)
            wrong += not np.array_equal(swapped[other], theirs + np.uint32(7 * process_id))
    thread.join()
    expected = [sum(2.0 * (number + process) for process in range(num_processes)) for number in range(50)]
    held = exchange.mine(exchange.spread(np.full((3, 2), process_id, np.uint32)))
    print(json.dumps({"wrong": wrong, "sums": sums == expected, "held": held.tolist(), "devices": mesh.size}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
