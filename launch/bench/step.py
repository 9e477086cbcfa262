"""The step with the whole host pipeline running, against its dense half alone: `python -m launch.bench.step --help`.

Workload: batch 4096, 26 features of one id, 10M ids zipf(1.05) each, dim 16, MLP 400-400-400, Adagrad, 13 dense values.

  dense half  the same towers and loss on constant vectors, gradient with respect to the vectors included
  full step   examples are read (Arrow), featurized, mapped to rows and copied to the device by the planner's thread while the
              device computes
  sparse      the programs of the tables alone, on plans made ahead: first values, gather, send, return, update and write
  host        the planner alone

They take turns within one process; figures are medians of the turns' step times. Then the full step once more, dim 4 and SGD,
with tables of 100M rows in all and of 1M: the same batches, whose ids are spread over all rows of either. `rows_100m_over_1m`
is the median of the rounds' ratios; null where it was left out, or there is too little memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LARGE_ROWS, SMALL_ROWS = 100_000_000, 1_000_000
BYTES_A_ROW = 16 + 19 + 40
"""Of a large table with dim 4 while its maps are being filled: the row, the map's entry, the ids in two orders and the rows
that the maps return."""
ROW_ROUNDS = 9


def free_bytes(path: Path = Path("/proc/meminfo")) -> int:
    """Returns the memory that can be taken without swapping; where the system does not tell, more than anybody needs."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 2**62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _lanes(batch_size: int, max_rows: int, optimizer: str, device_counts: Sequence[int]) -> list[Any]:
    from launch.bench import workload
    from monolith_jax.mesh import MeshConfig, make_mesh
    from monolith_jax.models.deepfm import DeepFMConfig
    from monolith_jax.tables.update import OptimizerConfig

    config = OptimizerConfig(name=optimizer, learning_rate=0.02)
    batches = workload.make_batches(batch_size)
    lanes: list[Any] = []
    for count in device_counts:
        mesh = make_mesh(MeshConfig(num_devices=count))
        work = workload.make_workload(mesh, DeepFMConfig(), batches, config, max_rows)
        lanes.append(workload.dense_lane(work, f"dense half, {count} device(s)"))
        lanes.append(workload.full_lane(work, f"full step, {count} device(s)"))
        lanes.append(workload.sparse_lane(work, f"sparse, {count} device(s)", work.inputs()))
    lanes.append(workload.host_lane(work, "host pipeline alone"))
    return lanes


def _run(lanes: Sequence[Any], rounds: int, steps: int, say: Callable[[str], None]) -> None:
    from launch.bench.workload import POOL

    for lane in lanes:
        lane.warm(2 * POOL)
    for number in range(rounds):
        for lane in lanes if number % 2 == 0 else lanes[::-1]:
            lane.turn(steps)
        say(f"round {number + 1} of {rounds}")
    for lane in lanes:
        lane.close()


def _rows_lane(rows: int, batches: Any, sparse_only: bool, count: int) -> Any:
    """Returns a lane over tables of `rows` rows in all, every one of them taken, the batches' ids spread over them."""
    from launch.bench import workload
    from monolith_jax.mesh import MeshConfig, make_mesh
    from monolith_jax.models.deepfm import DeepFMConfig
    from monolith_jax.tables.update import OptimizerConfig

    mesh, of_table = make_mesh(MeshConfig(num_devices=count)), rows // workload.NUM_FEATURES
    sgd = OptimizerConfig(name="sgd", learning_rate=0.02)
    work = workload.make_workload(mesh, DeepFMConfig(), batches, sgd, of_table, dim=4)
    mapper = workload.full_mapper(work, of_table)
    if not sparse_only:
        return workload.full_lane(work, f"full step, {rows:,} rows", mapper)
    planned = [one.inputs for one in work.planner(mapper, max_steps=len(batches))]
    return workload.sparse_lane(work, f"sparse, {rows:,} rows", planned)


def rows_figures(
    batch_size: int, large: int, small: int, count: int, steps: int, say: Callable[[str], None]
) -> dict[str, float | None]:
    """Returns step times with many rows over those with few, or None where they cannot be measured.

    Args:
        batch_size: B.
        large: Rows of the large tables in all; 0: leave it out.
        small: Rows of the small ones.
        count: Devices.
        steps: Counted steps of a turn.
        say: Takes what is to be told.
    """
    from launch.bench.workload import NUM_FEATURES, make_batches

    none: dict[str, float | None] = {"rows_100m_over_1m": None, "rows_100m_over_1m_sparse": None}
    if not large:
        return none
    needed = (large + small) * BYTES_A_ROW + 2**30
    if (there := free_bytes()) < needed:
        say(f"{large:,} rows need {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are free: left out")
        return none
    batches = make_batches(batch_size, num_ids=small // NUM_FEATURES)
    medians: dict[str, float | None] = {}
    for name, sparse_only in (("rows_100m_over_1m", False), ("rows_100m_over_1m_sparse", True)):
        lanes = [_rows_lane(rows, batches, sparse_only, count) for rows in (large, small)]
        _run(lanes, ROW_ROUNDS, steps, lambda line: None)
        medians[name] = round(statistics.median(a / b for a, b in zip(lanes[0].step_ms, lanes[1].step_ms, strict=True)), 3)
        for lane in lanes:
            say(f"{lane.name}: {statistics.median(lane.step_ms):.1f} ms a step")
        del lanes
    return medians


def summary(lanes: Sequence[Any], batch_size: int) -> dict[str, float | None]:
    """Returns the figures: each kind of lane at its own best device count, ratios of medians."""
    median = statistics.median

    def best(kind: str) -> Any:
        return min((lane for lane in lanes if lane.name.startswith(kind)), key=lambda lane: median(lane.step_ms))

    dense, full, host = best("dense"), best("full"), lanes[-1]
    sparse = next(lane for lane in lanes if lane.name == full.name.replace("full step", "sparse"))
    by_round = [a / b for a, b in zip(full.step_ms, dense.step_ms, strict=True)]
    return {
        "steps_per_s": round(1e3 / median(full.step_ms), 2),
        "dense_steps_per_s": round(1e3 / median(dense.step_ms), 2),
        "over_dense": round(median(by_round), 3),
        "over_dense_of_fastest": round(min(full.step_ms) / min(dense.step_ms), 3),
        "host_ms": round(median(host.step_ms), 2),
        "host_over_step": round(median(host.step_ms) / median(full.step_ms), 3),
        "sparse_ms": round(median(sparse.step_ms), 2),
        "sparse_cpu_ms": round(median(sparse.cpu_ms), 1),
        "full_minus_dense_cpu_ms": round(median(full.cpu_ms) - median(dense.cpu_ms), 1),
        "examples_per_s": round(batch_size * 1e3 / median(full.step_ms)),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.step",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.step --rounds 7",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--max_rows", type=int, default=400_000, help="rows of each of the 26 tables (default 400,000)")
    parser.add_argument("--optimizer", default="adagrad")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each lane (default 7)")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a turn (default 10)")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="device counts that are tried (default 1 2)")
    parser.add_argument(
        "--large_rows", type=int, default=LARGE_ROWS, help="rows of the large tables; 0: leave that part out (default 100M)"
    )
    parser.add_argument("--small_rows", type=int, default=SMALL_ROWS, help="rows of the small tables (default 1M)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = _parser().parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from launch.process import prepare
    from monolith_jax.mesh import MeshConfig

    prepare(MeshConfig(cpu_devices=max(arguments.devices)))
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False)

    lanes = _lanes(arguments.batch_size, arguments.max_rows, arguments.optimizer, arguments.devices)
    _run(lanes, arguments.rounds, arguments.steps, say)
    table = Table(
        "lane", "ms a step", "fastest turn", "CPU ms a step", title=f"batch {arguments.batch_size}, {arguments.optimizer}"
    )
    median = statistics.median
    for lane in lanes:
        table.add_row(lane.name, f"{median(lane.step_ms):.1f}", f"{min(lane.step_ms):.1f}", f"{median(lane.cpu_ms):.1f}")
    console.print(table)
    figures = summary(lanes, arguments.batch_size)
    lanes.clear()
    sizes = (arguments.large_rows, arguments.small_rows, max(arguments.devices))
    figures |= rows_figures(arguments.batch_size, *sizes, arguments.steps, say)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
