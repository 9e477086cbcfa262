"""How long a request looks up the lake's features of its candidates: `python -m launch.bench.feature_lookup --help`.

Fills the cache of a server (`serve.feature_cache`) and looks up 1,000 videos at a time, all columns or those that a model would
read, while a thread applies changes at a steady rate. Figures of the last line: the median over rounds of each round's p50 and
p99; `cpu`, what the thread itself computed, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from monolith_jax.lake.tables import GROUPS, features_schema
from monolith_jax.serve.feature_cache import FeatureCache, FeatureCacheConfig

COLUMNS = ("video_views_5m", "video_likes_5m", "video_views_1d", "video_quality", "video_tag_id")
"""What a model would read of a video."""
CANDIDATES = 1000
_BLOCK = 1 << 16
_PER_BATCH = 1024


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.feature_lookup",
        description="Measures lookups of the features of 1,000 videos while changes are applied.",
        epilog="example:\n  python -m launch.bench.feature_lookup --videos 1000000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--videos", type=int, default=1_000_000, help="in the cache (default: %(default)s)")
    parser.add_argument("--changes_per_s", type=int, default=20_000, help="applied meanwhile (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="of 500 lookups each (default: %(default)s)")
    return parser.parse_args(argv)


def changes(ids: np.ndarray, time_ms: int, names: Sequence[str], rng: np.random.Generator) -> pa.RecordBatch:
    """Returns changes of videos, of all groups of these names, with random values."""
    schema, number = features_schema("video"), ids.size
    columns = {field.name: pa.nulls(number, field.type) for field in schema} | {"video_id": pa.array(ids)}
    for group in (one for one in GROUPS["video"] if one.name in names):
        columns[group.time_column] = pa.array(np.full(number, time_ms))
        for name, kind in group.columns:
            values = pa.array(rng.integers(0, 1000, 2 * number))
            if pa.types.is_list(kind):
                columns[name] = pa.ListArray.from_arrays(pa.array(2 * np.arange(number + 1, dtype=np.int32)), values)
            else:
                columns[name] = values.slice(0, number).cast(kind)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def measured(videos: int, changes_per_s: int, rounds: int) -> dict[str, float]:
    """Returns the figures."""
    rng, names = np.random.default_rng(0), [group.name for group in GROUPS["video"]]
    cache = FeatureCache(FeatureCacheConfig(max_users=1, max_videos=videos))
    began = time.perf_counter()
    for first in range(0, videos, _BLOCK):
        cache.observe("video", changes(np.arange(first, min(first + _BLOCK, videos)), 1000, names, rng))
    found = {"fill_rows_per_s": videos / (time.perf_counter() - began)}
    made = [changes(rng.integers(0, videos, _PER_BATCH), 2000, [name], rng) for name in names * 4]
    over, applied = threading.Event(), [0]

    def apply() -> None:
        start = time.perf_counter()
        while not over.is_set():
            cache.observe("video", made[applied[0] // _PER_BATCH % len(made)])
            applied[0] += _PER_BATCH
            time.sleep(max(start + applied[0] / changes_per_s - time.perf_counter(), 0.0))

    thread = threading.Thread(target=apply)
    thread.start()
    for what, columns in (("all", None), ("few", COLUMNS)):
        wall, cpu = [], []
        before, began = applied[0], time.perf_counter()
        for _ in range(rounds):
            of_round = np.array([_lookup(cache, rng.integers(0, videos, CANDIDATES), columns) for _ in range(500)])
            wall.append(np.percentile(of_round[:, 0], (50, 99)))
            cpu.append(np.percentile(of_round[:, 1], (50, 99)))
        for at, share in enumerate(("p50", "p99")):
            found[f"lookup_{what}_{share}_ms"] = statistics.median(float(one[at]) for one in wall)
            found[f"lookup_{what}_cpu_{share}_ms"] = statistics.median(float(one[at]) for one in cpu)
        found[f"applied_{what}_per_s"] = (applied[0] - before) / (time.perf_counter() - began)
    over.set()
    thread.join()
    return found


def _lookup(cache: FeatureCache, ids: np.ndarray, columns: Sequence[str] | None) -> tuple[float, float]:
    """Returns how long a lookup took, in milliseconds, and what it computed."""
    began, computed = time.perf_counter(), time.thread_time()
    cache.videos(ids, 5000, columns)
    took = time.perf_counter() - began, time.thread_time() - computed
    time.sleep(0.001)
    return 1000 * took[0], 1000 * took[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0."""
    asked = _parsed(argv)
    sys.setswitchinterval(0.0005)  # As a server has it (`Pipeline.watch`).
    found = measured(asked.videos, asked.changes_per_s, asked.rounds)
    for name, value in found.items():
        print(f"{name:28} {value:12,.3f}")
    print(json.dumps({"lookup_p99_ms": found["lookup_few_p99_ms"], **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
