"""How fast a served model takes over deltas, and what requests feel of it: `python -m launch.bench.serve_apply --help`.

A base of one table of float16 vectors of dim 16, and deltas behind it, are written to a temporary folder. In each round a
served model (DeepFM, 10 ids an example) loads the base; requests of equal size come at a steady pace, first while nothing is
applied, then while one thread applies all deltas, once as fast as it can and once at the demanded rate. Figures:

  apply_rows_per_s        rows of deltas a second of wall time, requests going on: files read and checked, both copies written
  apply_rows_per_cpu_s    the same by the time that the one applying thread was on a core
  apply_alone_rows_per_s  by wall time, without requests
  predict_p99_ms_idle     of the requests' durations
  predict_p99_ms_applying the same while deltas come at 1M rows/s
  predict_p99_ms_flat_out the same while deltas are applied as fast as one thread can
  p99_ratio               applying over idle

Rates are medians over the rounds; requests of all rounds are put together. On a machine whose cores others use, the p99 is
theirs as well: compare idle with applying.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

DIM, NUM_SHARDS, FIELDS = 16, 64, 10
DEMANDS: dict[str, tuple[str, float]] = {"apply_rows_per_s": (">=", 1e6), "p99_ratio": ("<=", 1.5)}
"""What figures should be at least or at most."""
RATE = 1e6
"""Rows a second that are demanded."""


class Sizes(NamedTuple):
    """How large everything is."""

    ids: int
    deltas: int
    rows: int
    """Of a delta."""
    examples: int
    """Of a request."""
    period_s: float
    """Between requests."""


def write_log(root: Path, sizes: Sizes) -> list[str]:
    """Writes a base and deltas whose vectors are full of the delta's number; returns the names of the deltas' folders."""
    from flax import nnx

    from monolith_jax.features import feature_layout
    from monolith_jax.models.towers import make_towers, named_weights
    from monolith_jax.sync.delta import Content, DeltaFolder, Manifest, Rows, Version

    features, _, config, heads = model_parts(sizes)
    _, weights = make_towers(config, feature_layout(features, [["item"]]), [DIM], heads, 0)
    dense = {name: np.asarray(weight) for name, weight in named_weights(nnx.to_pure_dict(weights)).items()}
    folder, rng, base = DeltaFolder(root), np.random.default_rng(0), Version(1, 0)
    for number in range(sizes.deltas + 1):
        version = Version(1, number)
        ids = rng.permutation(sizes.ids)[: sizes.rows] if number else np.arange(sizes.ids)
        rows = {"item": Rows(ids.astype(np.int64) * 7919, np.full((ids.size, DIM), number, np.float32))}
        content = Content(rows=rows) if number else Content(rows=rows, dense=dense)
        folder.write_part(version, 0, content, "float16")
        previous = Version(1, number - 1) if number else None
        now_ms = int(time.time() * 1000)
        told: dict[str, Any] = {
            "step": number,
            "event_time_ms": number,
            "created_ms": now_ms,
            "position": [],
            "format": "float16",
        }
        folder.commit(Manifest(kind="delta" if number else "base", version=version, previous=previous, base=base, **told))
    return [Version(1, number).folder for number in range(1, sizes.deltas + 1)]


def model_parts(sizes: Sizes) -> tuple[Any, Any, Any, Any]:
    """Returns features, tables, model and heads."""
    from monolith_jax.features import IdFeatureConfig
    from monolith_jax.models.deepfm import DeepFMConfig
    from monolith_jax.models.losses import HeadConfig
    from monolith_jax.tables.table import TableConfig

    features = tuple(IdFeatureConfig(f"id{field}", f"id{field}", "item") for field in range(FIELDS))
    return features, (TableConfig("item", sizes.ids, DIM),), DeepFMConfig(), (HeadConfig("like"), HeadConfig("complete"))


def open_model(root: Path, sizes: Sizes) -> Any:
    """Returns a served model that has the base."""
    from monolith_jax.serve.served_model import ServedModel

    features, tables, config, heads = model_parts(sizes)
    return ServedModel(root, features, tables, config, heads, num_shards=NUM_SHARDS, batch_sizes=(sizes.examples,))


def requests(model: Any, sizes: Sizes, going_on: Callable[[], bool]) -> list[float]:
    """Sends requests at a steady pace; returns how long each took, milliseconds."""
    rng = np.random.default_rng(1)
    pool = [
        pa.RecordBatch.from_arrays(
            [pa.array(rng.integers(0, sizes.ids, sizes.examples) * 7919) for _ in range(FIELDS)],
            names=[f"id{field}" for field in range(FIELDS)],
        )
        for _ in range(16)
    ]
    took_ms, at = [], time.perf_counter()
    while not took_ms or going_on():
        begun = time.perf_counter()
        model.predict(pool[len(took_ms) % len(pool)])
        took_ms.append((time.perf_counter() - begun) * 1000)
        at = max(at + sizes.period_s, time.perf_counter() - sizes.period_s)
        time.sleep(max(at - time.perf_counter(), 0))
    return took_ms


class Applied(NamedTuple):
    """What a thread that applied all deltas took."""

    wall_s: float
    cpu_s: float


class Log:
    """The folder that the model reads, into which deltas come when they are wanted."""

    def __init__(self, work: Path, sizes: Sizes) -> None:
        """Writes all deltas beside the folder, the base into it."""
        self.root, self.beside, self.sizes = work / "deltas", work / "beside", sizes
        self.deltas = write_log(self.root, sizes)
        self.beside.mkdir()
        self.take_back()

    def take_back(self) -> None:
        """Leaves only the base."""
        for name in self.deltas:
            if (self.root / name).exists():
                os.rename(self.root / name, self.beside / name)

    def apply(self, model: Any, rows_per_s: float) -> Applied:
        """Applies all deltas, which come at this rate; what it takes counts from the first one to the last."""
        begun, cpu = time.perf_counter(), time.thread_time()
        for number, name in enumerate(self.deltas):
            wait_s = begun + number * self.sizes.rows / rows_per_s - time.perf_counter()
            if wait_s > 0:
                time.sleep(wait_s)
            os.rename(self.beside / name, self.root / name)
            if rows_per_s < float("inf") or number + 1 == len(self.deltas):
                model.poll()
        assert model.version == (1, len(self.deltas)) and not model.faults, model.metrics()
        return Applied(time.perf_counter() - begun, time.thread_time() - cpu)

    def apply_beside(self, model: Any, rows_per_s: float) -> tuple[Applied, list[float]]:
        """Applies all deltas in a thread, with requests in this one; returns what both took."""
        done: list[Applied] = []
        thread = threading.Thread(target=lambda: done.append(self.apply(model, rows_per_s)))
        thread.start()
        took_ms = requests(model, self.sizes, thread.is_alive)
        thread.join()
        return done[0], took_ms


def one_round(log: Log, seconds: float, took_ms: dict[str, list[float]]) -> dict[str, float]:
    """Returns the rates of a round; adds how long requests took to `took_ms`."""
    rows = len(log.deltas) * log.sizes.rows
    alone = log.apply(open_model(log.root, log.sizes), float("inf"))
    beside = alone
    log.take_back()
    for name, rate in (("flat_out", float("inf")), ("applying", RATE)):
        model, ends = open_model(log.root, log.sizes), time.perf_counter() + seconds
        took_ms["idle"] += requests(model, log.sizes, lambda ends=ends: time.perf_counter() < ends)
        applied, more_ms = log.apply_beside(model, rate)
        took_ms[name] += more_ms
        log.take_back()
        if rate > RATE:
            beside = applied
    return {
        "apply_rows_per_s": rows / beside.wall_s,
        "apply_rows_per_cpu_s": rows / beside.cpu_s,
        "apply_alone_rows_per_s": rows / alone.wall_s,
    }


def measure(sizes: Sizes, rounds: int, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """Returns the figures.

    Args:
        sizes: How large everything is.
        rounds: Of all rates the median over these counts; requests of all are put together.
        seconds: Of requests alone, twice a round.
        say: Told the rates of each round.
    """
    took_ms: dict[str, list[float]] = {"idle": [], "applying": [], "flat_out": []}
    with tempfile.TemporaryDirectory() as work:
        log = Log(Path(work), sizes)
        found = []
        for number in range(rounds):
            found.append(one_round(log, seconds, took_ms))
            say(f"round {number + 1} of {rounds}: " + json.dumps({name: _rounded(value) for name, value in found[-1].items()}))
    figures = {name: statistics.median(one[name] for one in found) for name in found[0]}
    for name, of_lane in took_ms.items():
        figures[f"requests_{name}"] = len(of_lane)
        figures[f"predict_p50_ms_{name}"] = statistics.median(of_lane)
        figures[f"predict_p99_ms_{name}"] = float(np.percentile(of_lane, 99))
    figures["p99_ratio"] = figures["predict_p99_ms_applying"] / figures["predict_p99_ms_idle"]
    return {name: _rounded(value) for name, value in figures.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _is_met(name: str, value: float) -> bool:
    relation, bound = DEMANDS[name]
    return value >= bound if relation == ">=" else value <= bound


def print_table(figures: dict[str, float]) -> None:
    """Prints the figures beside what is demanded."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "measured", "demand", "", title="a served model that follows deltas")
    for name, value in figures.items():
        demand = f"{DEMANDS[name][0]} {DEMANDS[name][1]:,}" if name in DEMANDS else ""
        met = ("met" if _is_met(name, value) else "[bold]missed[/bold]") if name in DEMANDS else ""
        table.add_row(name, f"{value:,}", demand, met)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.serve_apply",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.serve_apply --rounds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ids", type=int, default=1_000_000, help="ids of the table (default: %(default)s)")
    parser.add_argument("--deltas", type=int, default=150, help="deltas of a round (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of a delta (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=256, help="examples of a request (default: %(default)s)")
    parser.add_argument("--period_ms", type=float, default=20.0, help="between requests (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of requests alone, twice a round (default: %(default)s)")
    arguments = parser.parse_args(argv)
    smallest = min(arguments.deltas, arguments.rows, arguments.examples, arguments.rounds)
    if smallest < 1 or arguments.rows > arguments.ids or arguments.period_ms <= 0 or arguments.seconds <= 0:
        parser.error("expected numbers above 0, and --rows at most --ids")
    sizes = Sizes(arguments.ids, arguments.deltas, arguments.rows, arguments.examples, arguments.period_ms / 1000)
    figures = measure(sizes, arguments.rounds, arguments.seconds, lambda line: print(line, flush=True))
    print_table(figures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
