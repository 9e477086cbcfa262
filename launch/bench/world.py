"""Compares the synthetic world with the KuaiRand sample, and tells how well the best possible model does in it.

In: optionally a folder of KuaiRand logs. Out: tables on standard output; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from monolith_jax.evaluate import metrics
from monolith_jax.stream.events import labels
from monolith_jax.stream.kuairand import KuaiRandConfig, KuaiRandSource
from monolith_jax.stream.synthetic import HEADS, RATES, SyntheticConfig, SyntheticSource
from monolith_jax.types import Source

SAMPLE_EXAMPLES, SAMPLE_DAYS, SAMPLE_UTC_OFFSET_MS = 35_553, 10.957, 8 * 3_600_000
LIKED_SHARE = 0.813
"""Share of likes in the sample, which holds only rows with a like or a hate."""
THINNING = 20
"""The compared world has this many times the sample's events; popularity is measured on each THINNING-th of them."""

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


def compared_config(seed: int) -> SyntheticConfig:
    """Returns a world with the sample's number of days, users and videos, for the comparison with it."""
    return SyntheticConfig(
        seed=seed,
        num_examples=SAMPLE_EXAMPLES * THINNING,
        events_per_s=SAMPLE_EXAMPLES * THINNING / (SAMPLE_DAYS * 86_400),
        live_users=664,
        users_per_day=0.0,
        live_videos=10_000,
        videos_per_day=1_100.0,
    )


def load(source: Source) -> pa.RecordBatch:
    """Returns all examples of a source as one batch."""
    return pa.Table.from_batches([chunk.examples for chunk in source.read({})]).combine_chunks().to_batches()[0]


def _numbers(examples: pa.RecordBatch, name: str) -> np.ndarray:
    column = examples[name]
    return column.fill_null(pa.scalar(0).cast(column.type)).to_numpy(zero_copy_only=False)


def play_figures(examples: pa.RecordBatch, weight: np.ndarray) -> dict[str, float]:
    """Returns quantiles and shares of the play time of rows with a known duration and a play time above 0, weighted."""
    play, duration = _numbers(examples, "play_time_ms"), _numbers(examples, "duration_ms")
    kept = (play > 0) & (duration > 0) & (weight > 0)
    play, duration, weight = play[kept], duration[kept], weight[kept]

    def quantiles(values: np.ndarray) -> np.ndarray:
        return np.quantile(values, QUANTILES, weights=weight, method="inverted_cdf")

    figures = {f"play ratio, {q:.0%} below": float(x) for q, x in zip(QUANTILES, quantiles(play / duration), strict=True)}
    figures |= {f"duration s, {q:.0%} below": float(x) / 1e3 for q, x in zip(QUANTILES, quantiles(duration), strict=True)}
    for name, happened in {
        "complete": play >= 0.95 * duration,
        "rewatch": play >= 1.5 * duration,
        "long view": play >= np.minimum(duration, 18_000),
        "skip": play < 3_000,
    }.items():
        figures[f"share of {name}"] = float(np.average(happened, weights=weight))
    return figures


def sample_weights(examples: pa.RecordBatch) -> np.ndarray:
    """Returns weights [B] which make the rows with a like or a dislike those of the sample: 0.813 of the weight is liked."""
    liked = _numbers(examples, "like").astype(bool)
    disliked = _numbers(examples, "dislike").astype(bool) & ~liked
    return LIKED_SHARE * liked / liked.sum() + (1 - LIKED_SHARE) * disliked / max(disliked.sum(), 1)


def popularity_figures(examples: pa.RecordBatch) -> dict[str, float]:
    """Returns the shares of impressions that go to the most frequent users and videos."""
    figures = {}
    for space in ("user", "video"):
        counts = np.sort(np.unique(_numbers(examples, f"{space}_id"), return_counts=True)[1])[::-1]
        figures[f"{space}s"] = float(len(counts))
        for top in (0.01, 0.1):
            figures[f"share of top {top:.0%} {space}s"] = float(counts[: int(len(counts) * top)].sum() / counts.sum())
    return figures


def hour_figures(examples: pa.RecordBatch, offset_ms: int) -> dict[str, float]:
    """Returns the impressions of each local hour as a share of the mean hour."""
    hour = (_numbers(examples, "event_time_ms") + offset_ms) // 3_600_000 % 24
    counts = np.bincount(hour, minlength=24)
    return {f"activity at {h:2d} h": float(c / counts.mean()) for h, c in enumerate(counts)}


def compare(data: Path | None, seed: int) -> dict[str, dict[str, float]]:
    """Returns figures of the world as it is, of the world weighted to the sample, and of the sample (if there is one).

    Args:
        data: A folder of KuaiRand logs, or None.
        seed: The world's seed.
    """
    examples = load(SyntheticSource(compared_config(seed)))
    thinned = examples.take(pa.array(np.arange(0, examples.num_rows, THINNING)))
    shared = popularity_figures(thinned) | hour_figures(examples, 0)
    columns = {
        "world": play_figures(examples, np.ones(examples.num_rows)) | shared,
        "as sampled": play_figures(examples, sample_weights(examples)) | shared,
    }
    if data is not None:
        sample = load(KuaiRandSource(KuaiRandConfig(folder=str(data), features=False)))
        figures = play_figures(sample, np.ones(sample.num_rows)) | popularity_figures(sample)
        columns["sample"] = figures | hour_figures(sample, SAMPLE_UTC_OFFSET_MS)
    return columns


def optimum(examples: pa.RecordBatch) -> dict[str, dict[str, float]]:
    """Returns for each head its mean label, and the metrics of the best possible predictions."""
    found = {}
    values, _ = labels(examples, HEADS)
    for task, head in enumerate(HEADS):
        label, best = values[:, task], _numbers(examples, f"optimal_{head}")
        found[head] = {"mean": float(label.mean()), "optimal mean": float(best.mean())}
        if head == "play_ratio":
            found[head]["RMSE"] = metrics.root_mean_squared_error(best, label)
            continue
        found[head]["AUC"] = metrics.auc(best, label)
        found[head]["log-loss"] = metrics.log_loss(best, label)
        found[head]["entropy"] = metrics.entropy(float(label.mean()))
    return found


def _print_table(title: str, rows: dict[str, dict[str, float]], columns: Sequence[str]) -> None:
    print(f"\n{title:26s}" + "".join(f"{name:>14s}" for name in columns))
    for row, cells in rows.items():
        print(f"{row:26s}" + "".join(f"{cells[name]:14.4f}" if name in cells else f"{'':14s}" for name in columns))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the comparison, prints it and returns what the last line says."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.world",
        description="Compares the synthetic world with the KuaiRand sample, and prints the optimum of every head.",
        epilog="example:\n  python -m launch.bench.world --data $MONOLITH_JAX_DATA/kuairand27k_slice",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="a folder with KuaiRand's log_standard*; default: no sample"
    )
    parser.add_argument("--examples", type=int, default=400_000, help="examples for the optimum and the speed (400000)")
    parser.add_argument("--seed", type=int, default=0, help="the world's seed (0)")
    arguments = parser.parse_args(argv)
    if arguments.examples < 1:
        parser.error(f"--examples must be at least 1, got {arguments.examples}")

    columns = compare(arguments.data, arguments.seed)
    print("world: every impression. as sampled: its rows with a like or a dislike, weighted to the sample's shares.")
    _print_table("", {row: {name: columns[name][row] for name in columns} for row in columns["world"]}, list(columns))

    source = SyntheticSource(SyntheticConfig(seed=arguments.seed, num_examples=arguments.examples))
    begin = time.perf_counter()
    batches = [chunk.examples for chunk in source.read({})]
    rate = arguments.examples / (time.perf_counter() - begin)
    best = optimum(pa.Table.from_batches(batches).combine_chunks().to_batches()[0])
    _print_table("optimum of the quick start", best, ["mean", "optimal mean", "AUC", "log-loss", "entropy", "RMSE"])
    print(f"\n{rate:,.0f} examples/s on one core; base rates aimed at: {RATES}")
    result = {"examples_per_s": rate, "seed": arguments.seed, "optimum": best, "figures": columns}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
