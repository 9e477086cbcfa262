"""The step of `launch.bench.step` on 1, 2, 4, 8 virtual CPU devices: `python -m launch.bench.scaling --help`.

The same global batch on each number of devices, each in a process of its own (their number is fixed when jax starts). The
processes take turns: one computes, the others wait. Per number of devices:

  step_ms   median of the turns' step times, the whole host pipeline running
  padded    bytes that all_to_all carries a step, both ways, padding and what stays on its device included
  ragged    the same with ragged_all_to_all, which no CPU has: counted from the same plans
  floor     sum over devices of the distinct ids in their slice of the batch x dim x bytes of a float, both ways
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

COUNTS = (1, 2, 4, 8)
PLANS_COUNTED = 24


def _turns(count: int, batch_size: int, max_rows: int, steps: int) -> None:
    """Runs in a process of its own: a turn for each line on standard input, one JSON line back each time."""
    from launch.bench import workload
    from launch.process import prepare
    from monolith_jax.mesh import MeshConfig, make_mesh
    from monolith_jax.models.deepfm import DeepFMConfig
    from monolith_jax.tables.update import OptimizerConfig
    from monolith_jax.tables.wire import exchanged_bytes

    prepare(MeshConfig(cpu_devices=count))
    mesh = make_mesh(MeshConfig(num_devices=count))
    batches = workload.make_batches(batch_size)
    optimizer = OptimizerConfig(name="adagrad", learning_rate=0.02)
    work = workload.make_workload(mesh, DeepFMConfig(), batches, optimizer, max_rows)
    lane = workload.full_lane(work, "full step")
    lane.warm(2 * workload.POOL)
    dim = work.model.groups[0].dim
    plans = [one.plans[0] for one in work.inputs(PLANS_COUNTED)]
    counted = [exchanged_bytes(plan, dim) for plan in plans]
    padded, ragged, floor = (statistics.mean(numbers) for numbers in zip(*counted, strict=True))
    print(json.dumps({"padded_bytes": padded, "ragged_bytes": ragged, "floor_bytes": floor}), flush=True)
    for _ in sys.stdin:
        lane.turn(steps)
        print(json.dumps({"step_ms": lane.step_ms[-1], "cpu_ms": lane.cpu_ms[-1]}), flush=True)
    lane.close()


def _start(count: int, batch_size: int, max_rows: int, steps: int) -> subprocess.Popen[str]:
    # With fewer threads in XLA's CPU client, steps on several devices can wait for each other forever.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16", "XLA_FLAGS": ""}
    sizes = [f"--turns={count}", f"--batch_size={batch_size}", f"--max_rows={max_rows}", f"--steps={steps}"]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.bench.scaling", *sizes],
        env=environment, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _answer(process: subprocess.Popen[str], count: int) -> dict[str, float]:
    """Returns the next line of a process.

    Raises:
        RuntimeError: It ended instead.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process with {count} devices ended with status {process.wait()}; its error is above")
    return json.loads(line)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # Closes its pipes too.


def measure(
    counts: Sequence[int], batch_size: int, max_rows: int, rounds: int, steps: int
) -> dict[int, dict[str, list[float] | float]]:
    """Returns for each number of devices the times of its turns and its exchange."""
    found: dict[int, dict[str, Any]] = {}
    with ExitStack() as running:
        processes = {}
        for count in counts:
            # One after the other: each compiles, and meets every id, alone.
            processes[count] = _start(count, batch_size, max_rows, steps)
            running.callback(_end, processes[count])
            found[count] = {**_answer(processes[count], count), "step_ms": [], "cpu_ms": []}
        for number in range(rounds):
            for count in counts if number % 2 == 0 else list(counts)[::-1]:
                pipe = processes[count].stdin
                assert pipe is not None
                pipe.write("turn\n")
                pipe.flush()
                for name, value in _answer(processes[count], count).items():
                    found[count][name].append(value)
    return found


def summary(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns the figures: medians, and the median of the rounds' ratios."""
    figures: dict[str, Any] = {
        "step_ms": {str(count): round(statistics.median(one["step_ms"]), 2) for count, one in found.items()},
        "cpu_ms": {str(count): round(statistics.median(one["cpu_ms"]), 2) for count, one in found.items()},
        "exchange_over_floor": {str(count): round(one["padded_bytes"] / one["floor_bytes"], 3) for count, one in found.items()},
        "ragged_over_floor": {str(count): round(one["ragged_bytes"] / one["floor_bytes"], 3) for count, one in found.items()},
        "exchange_bytes": {str(count): round(one["padded_bytes"]) for count, one in found.items()},
        "floor_bytes": {str(count): round(one["floor_bytes"]) for count, one in found.items()},
        "devices8_over_devices2": None,
    }
    if {2, 8} <= set(found):
        by_round = [a / b for a, b in zip(found[8]["step_ms"], found[2]["step_ms"], strict=True)]
        figures["devices8_over_devices2"] = round(statistics.median(by_round), 3)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.scaling",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.scaling --rounds 9",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, nargs="+", default=list(COUNTS), help="device counts (default 1 2 4 8)")
    parser.add_argument("--batch_size", type=int, default=4096, help="global batch (default 4096)")
    parser.add_argument("--max_rows", type=int, default=400_000, help="rows of each of the 26 tables (default 400,000)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each number of devices (default 9)")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a turn (default 10)")
    parser.add_argument("--turns", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.turns:
        _turns(arguments.turns, arguments.batch_size, arguments.max_rows, arguments.steps)
        return 0
    if min(arguments.devices) < 1 or min(arguments.rounds, arguments.steps) < 1:
        parser.error(f"expected numbers from 1 on; got --devices {arguments.devices}, {arguments.rounds}, {arguments.steps}")
    from rich.console import Console
    from rich.table import Table

    found = measure(arguments.devices, arguments.batch_size, arguments.max_rows, arguments.rounds, arguments.steps)
    figures = summary(found)
    names = ("devices", "ms a step", "CPU ms a step", "exchange MB", "over floor", "ragged over floor")
    table = Table(*names, title=f"batch {arguments.batch_size}")
    for count in (str(count) for count in found):
        megabytes = f"{figures['exchange_bytes'][count] / 1e6:.2f}"
        over = [f"{figures[name][count]:.3f}" for name in ("exchange_over_floor", "ragged_over_floor")]
        table.add_row(count, f"{figures['step_ms'][count]:.1f}", f"{figures['cpu_ms'][count]:.1f}", megabytes, *over)
    Console().print(table)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
