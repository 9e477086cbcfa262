"""Tables in two tiers against the same tables on the device: `python -m launch.bench.tiered --help`.

Workload: batch 1024, 26 features of one id, zipf(1.05), dim 16, MLP 400-400-400, Adagrad; batches read over and over, so that
after the first round every id has a row and none is fresh. The device holds a part of the rows, the host all of them.

The lanes take turns within one process; figures are medians of the turns. `hit_rate` is that of all counted steps: of the
distinct rows that a step touches, how many were on the device. On a CPU the device's memory is the host's: the figure is what
moving the rows costs, not what a larger table gains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.tiered",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.tiered --times 10 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--max_rows", type=int, default=40_000, help="rows of each of the 26 tables (default 40,000)")
    parser.add_argument("--times", type=int, nargs="+", default=[10], help="how much larger tables are than the device (10)")
    parser.add_argument("--pool", type=int, default=100, help="batches that are read over and over (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each lane (default 5)")
    parser.add_argument("--steps", type=int, default=20, help="counted steps of a turn (default 20)")
    return parser


def _lanes(arguments: argparse.Namespace, stats: dict[str, list[dict[str, float]]]) -> list[Any]:
    from launch.bench import workload
    from monolith_jax.mesh import MeshConfig, make_mesh
    from monolith_jax.models.deepfm import DeepFMConfig
    from monolith_jax.tables.update import OptimizerConfig

    batches = workload.make_batches(arguments.batch_size, pool=arguments.pool, num_ids=arguments.max_rows)
    optimizer, mesh, lanes = OptimizerConfig(learning_rate=0.02), make_mesh(MeshConfig(num_devices=1)), []
    for times in (1, *arguments.times):
        name = "all on the device" if times == 1 else f"a {times}th on the device"
        device_rows = 0 if times == 1 else -(-arguments.max_rows // times)
        work = workload.make_workload(mesh, DeepFMConfig(), batches, optimizer, arguments.max_rows, device_rows=device_rows)
        lanes.append(workload.full_lane(work, name, seen=stats.setdefault(name, []).append))
    return lanes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = _parser().parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from launch.process import prepare
    from monolith_jax.mesh import MeshConfig

    prepare(MeshConfig())
    console, stats = Console(), {}
    lanes = _lanes(arguments, stats)
    for lane in lanes:
        lane.warm(arguments.pool)
        stats[lane.name].clear()
    for number in range(arguments.rounds):
        for lane in lanes if number % 2 == 0 else lanes[::-1]:
            lane.turn(arguments.steps)
        console.print(f"round {number + 1} of {arguments.rounds}", highlight=False)
    for lane in lanes:
        lane.close()
    table = Table("lane", "ms a step", "CPU ms a step", "rows a step", "hit rate", "loaded a step")
    figures: dict[str, Any] = {}
    whole = statistics.median(lanes[0].step_ms)
    for lane, times in zip(lanes, (1, *arguments.times), strict=True):
        median, seen = statistics.median(lane.step_ms), stats[lane.name]
        unique, loaded = (sum(one.get(name, 0.0) for one in seen) / len(seen) for name in ("unique", "loaded"))
        numbers = (f"{median:.1f}", f"{statistics.median(lane.cpu_ms):.1f}", f"{unique:,.0f}")
        table.add_row(lane.name, *numbers, f"{1 - loaded / unique:.3f}", f"{loaded:,.0f}")
        if times > 1:
            over = round(whole / median, 3)
            figures[str(times)] = {"hit_rate": round(1 - loaded / unique, 4), "steps_per_s_over_device": over}
    console.print(table)
    first = figures[str(arguments.times[0])]
    print(json.dumps({**first, "steps_per_s_device": round(1e3 / whole, 2), "by_times": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
