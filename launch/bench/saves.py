"""What saving costs the training that goes on meanwhile: `python -m launch.bench.saves --help`.

The step of `launch.bench.step` with SGD, its tables 1 GB on the devices, every row taken, in the loop that trains, with the
snapshots of a run. Turns of equal length follow one another in one run: one begins with a save, the next has none.

  throughput_lost   what a turn with a save takes longer than the next without, over the seconds from save to save (60)
  longest_stall_s   longest time from the end of one step to the end of the next around a save, over the median
  longest_quiet_s   the same in turns without a save: what other work on the machine does
  save_s            from the save to the commit
  extra_memory_gb   most resident memory of the run, over the most (`memory_gb`) of one that never saves, before it
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FROZEN_AHEAD = 4
"""Steps before a save at which its turn begins: the planner, at most three ahead, freezes its state then."""
WARM_STEPS = 40


@dataclass
class Clock:
    """When things happened, in seconds, and the memory that was resident."""

    ends: list[float] = field(default_factory=list)
    """Of each step, when its loss was known."""
    saves: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Of each save, by step, when it was asked for and when the loop went on."""
    commits: dict[int, float] = field(default_factory=dict)
    resident: list[tuple[float, int]] = field(default_factory=list)
    """Bytes by time."""
    at_rest: int = 0
    """Most bytes that were resident before there were snapshots."""


class Watch(threading.Thread):
    """Reads the resident memory, and sees snapshots being committed, every 20 ms."""

    def __init__(self, clock: Clock, folder: Path) -> None:
        """Watches a snapshots folder for the clock."""
        super().__init__(daemon=True)
        self._clock, self._folder, self._ended = clock, folder, threading.Event()

    def run(self) -> None:
        """Watches until it is ended."""
        while not self._ended.wait(0.02):
            now = time.perf_counter()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._clock.resident.append((now, pages * 4096))
            for step in self._clock.saves:
                if step not in self._clock.commits and (self._folder / str(step)).is_dir():
                    self._clock.commits[step] = now

    def end(self) -> None:
        """Ends it."""
        self._ended.set()
        self.join()


def _full_work(table_bytes: int, batch_size: int, count: int) -> tuple[Any, Any, Any]:
    """Returns the workload, maps of which every row is taken, and a state whose tables hold noise."""
    import jax
    import numpy as np

    from launch.bench import workload
    from monolith_jax.mesh import MeshConfig, make_mesh
    from monolith_jax.models.deepfm import DeepFMConfig
    from monolith_jax.tables.update import OptimizerConfig
    from monolith_jax.train.state import first_state

    of_table, sgd = table_bytes // (4 * 16 * workload.NUM_FEATURES), OptimizerConfig(name="sgd", learning_rate=0.02)
    batches = workload.make_batches(batch_size, num_ids=of_table)
    work = workload.make_workload(make_mesh(MeshConfig(num_devices=count)), DeepFMConfig(), batches, sgd, of_table)
    state = first_state(work.model, jax.tree.map(np.array, work.weights))

    def noise(array: Any) -> Any:
        made = jax.jit(lambda: jax.random.normal(jax.random.key(0), array.shape) * 0.05, out_shardings=array.sharding)
        return jax.block_until_ready(made())

    return work, workload.full_mapper(work, of_table), state._replace(groups=tuple(noise(array) for array in state.groups))


def _timed_log(workdir: Path, clock: Clock) -> Any:
    from rich.console import Console

    from monolith_jax.evaluate.prequential import Prequential, PrequentialConfig
    from monolith_jax.train.log import RunLog

    class TimedLog(RunLog):
        """Tells the clock of every step."""

        def step(self, *of_step: Any) -> None:
            super().step(*of_step)
            clock.ends.append(time.perf_counter())

    measures = Prequential(PrequentialConfig(), [("like", "binary")])
    return TimedLog(workdir, measures, 20, console=Console(quiet=True))


def measure(
    workdir: Path, table_bytes: int, batch_size: int, count: int, turn_s: float, rounds: int
) -> tuple[Clock, int, int, float]:
    """Returns what happened, the steps of a turn, the bytes of the last snapshot and those of the tables on the devices.

    Args:
        workdir: Where snapshots go.
        table_bytes: Of all tables.
        batch_size: B.
        count: Devices.
        turn_s: Seconds of a turn, as near as whole steps come.
        rounds: Turns with a save.
    """
    from monolith_jax.snapshot import SnapshotConfig, Snapshots, folder_bytes
    from monolith_jax.train.loop import run
    from monolith_jax.train.step import make_train_step

    work, mapper, state = _full_work(table_bytes, batch_size, count)
    held, train_step, warm = sum(array.nbytes for array in state.groups), make_train_step(work.model), Clock()
    log, watch = _timed_log(workdir, warm), Watch(warm, workdir)
    planner = work.planner(mapper, max_steps=WARM_STEPS)
    watch.start()
    state = run(state, planner, train_step, log, lambda state, frozen: None)
    planner.close()
    watch.end()
    turn = max(2 * FROZEN_AHEAD, round(turn_s / _median_s(warm.ends[WARM_STEPS // 2 :])))
    clock = Clock(at_rest=max(size for moment, size in warm.resident if moment < warm.ends[-8]))
    snapshots = Snapshots(SnapshotConfig(keep=1), workdir / "snapshots")
    log, watch = _timed_log(workdir, clock), Watch(clock, workdir / "snapshots")

    def save(state: Any, frozen: Mapping[str, Any]) -> None:
        if log.steps % (2 * turn) == 0:  # Not at the end.
            asked = time.perf_counter()
            snapshots.save(log.steps, state, frozen, log.get_state(), {})
            clock.saves[log.steps] = (asked, time.perf_counter())

    snapshots.prepare(state)
    planner = work.planner(mapper, max_steps=(2 * rounds + 1) * turn, freeze_every=2 * turn)
    watch.start()
    try:
        run(state, planner, train_step, log, save)
        snapshots.wait()
        time.sleep(0.1)  # The watch looks once more.
    finally:
        planner.close()
        snapshots.close()
        watch.end()
    return clock, turn, folder_bytes(workdir / "snapshots"), held


def _median_s(ends: Sequence[float]) -> float:
    return statistics.median(later - sooner for sooner, later in itertools.pairwise(ends))


def summary(clock: Clock, turn: int, period_s: float) -> dict[str, float]:
    """Returns the figures of time and memory.

    Args:
        clock: What happened.
        turn: Steps of a turn.
        period_s: Seconds from save to save that `throughput_lost` is told for.
    """
    costs, with_save, quiet = [], [], []
    for step in clock.saves:
        # Losses are known in order, so `ends[n - 1]` is the end of step n.
        first, last = step - FROZEN_AHEAD, step - FROZEN_AHEAD + turn
        before, start, end = (clock.ends[number - 1] for number in (first - turn, first, last))
        costs.append((end - start) - (start - before))
        steps = [later - sooner for sooner, later in itertools.pairwise(clock.ends)]
        with_save += steps[first - 1 : last - 1]
        quiet += steps[first - turn - 1 : first - 1]
    median = statistics.median(quiet)
    return {
        "throughput_lost": round(statistics.median(costs) / period_s, 4),
        "longest_stall_s": round(max(with_save) - median, 3),
        "longest_quiet_s": round(max(quiet) - median, 3),
        "save_s": round(statistics.median(clock.commits[step] - asked for step, (asked, _) in clock.saves.items()), 2),
        "save_call_s": round(statistics.median(returned - asked for asked, returned in clock.saves.values()), 3),
        "extra_memory_gb": round((max(size for _, size in clock.resident) - clock.at_rest) / 1e9, 3),
        "memory_gb": round(clock.at_rest / 1e9, 3),
        "step_ms": round(1e3 * median, 1),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.saves",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.saves --rounds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--table_gb", type=float, default=1.0, help="10^9 bytes of all tables together (default 1)")
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--devices", type=int, default=2, help="virtual devices (default 2)")
    parser.add_argument("--turn_s", type=float, default=15, help="seconds of a turn, longer than a save (default 15)")
    parser.add_argument("--rounds", type=int, default=5, help="turns with a save (default 5)")
    parser.add_argument("--period_s", type=float, default=60, help="seconds from save to save in a run (default 60)")
    parser.add_argument("--folder", type=Path, help="where the snapshots go for a while (default: a temporary folder)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = _parser().parse_args(argv)
    from launch.process import prepare
    from monolith_jax.mesh import MeshConfig

    prepare(MeshConfig(cpu_devices=arguments.devices))
    workdir = Path(tempfile.mkdtemp(prefix="bench_saves_", dir=arguments.folder))
    sizes = (int(arguments.table_gb * 1e9), arguments.batch_size, arguments.devices, arguments.turn_s, arguments.rounds)
    try:
        clock, turn, on_disk, held = measure(workdir, *sizes)
    finally:
        shutil.rmtree(workdir)
    figures = summary(clock, turn, arguments.period_s) | {"bytes_on_disk": on_disk, "tables_gb": round(held / 1e9, 3)}
    turn_s = turn * figures["step_ms"] / 1e3
    if figures["save_s"] > turn_s:
        print(f"a save took {figures['save_s']:.1f} s and reached into the turn without one, of {turn_s:.1f} s: --turn_s more")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
