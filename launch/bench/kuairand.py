"""KuaiRand, last 20 % by time: `configs/kuairand.gin` over several seeds against gradient boosting, on the same rows.

The rival sees user mean, video mean, duration and hour, fitted on the first 80 %. Two kinds of means: *fitted*, smoothed means
over the first 80 %, as a batch job would have them; and *live*, means of all that came before each row, the test rows' past
included, as our counters have them. Needs the extra `dev` (scikit-learn).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADS = ("like", "click", "complete", "rewatch", "long_view", "skip", "comment", "follow", "share", "profile", "dislike")
SHARE = 0.8
PRIOR = 5.0


def _rows(folder: str, part: tuple[float, float]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Returns columns, labels [B, T] and masks [B, T] of a part, as the model's source reads it."""
    import pyarrow as pa

    from monolith_jax.stream.events import labels
    from monolith_jax.stream.kuairand import KuaiRandConfig, KuaiRandSource

    source = KuaiRandSource(KuaiRandConfig(folder=folder, part=part, features=False))
    examples = pa.concat_batches([chunk.examples for chunk in source.read({})])
    names = ("user_id", "video_id", "duration_ms", "event_time_ms")
    columns = {name: examples.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in names}
    return columns, *labels(examples, HEADS)


def _fitted_means(keys: np.ndarray, label: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Returns each row's mean label over the counted rows of its key, smoothed towards the overall mean."""
    _, inverse = np.unique(keys, return_inverse=True)
    sums = np.bincount(inverse[counted], label[counted], inverse.max() + 1)
    counts = np.bincount(inverse[counted], minlength=inverse.max() + 1)
    return ((sums + PRIOR * label[counted].mean()) / (counts + PRIOR))[inverse]


def _live_means(keys: np.ndarray, label: np.ndarray, defined: np.ndarray, overall: float) -> np.ndarray:
    """Returns each row's mean label over the rows of its key before it, smoothed likewise."""
    order = np.argsort(keys, kind="stable")
    sorted_keys, values, there = keys[order], np.where(defined, label, 0.0)[order], defined[order].astype(float)
    starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
    group = np.repeat(starts, np.diff(np.r_[starts, keys.size]))
    sums, counts = np.cumsum(values) - values, np.cumsum(there) - there
    out = np.empty(keys.size)
    out[order] = (sums - sums[group] + PRIOR * overall) / (counts - counts[group] + PRIOR)
    return out


def boosting(folder: str) -> dict[str, dict[str, float]]:
    """Returns the rival's test AUC of each head: `fitted` and `live`."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score

    first, second = _rows(folder, (0.0, SHARE)), _rows(folder, (SHARE, 1.0))
    columns = {name: np.concatenate([first[0][name], second[0][name]]) for name in first[0]}
    labels, masks = np.concatenate([first[1], second[1]]), np.concatenate([first[2], second[2]]) > 0
    train = np.arange(len(labels)) < len(first[1])
    hour = (columns["event_time_ms"] / 3_600_000 + 8) // 1 % 24
    figures: dict[str, dict[str, float]] = {}
    for task, head in enumerate(HEADS):
        label, defined = labels[:, task].astype(float), masks[:, task]
        fit, judge = train & defined, ~train & defined
        overall = float(label[fit].mean())
        means = {
            "fitted": [_fitted_means(columns[key], label, fit) for key in ("user_id", "video_id")],
            "live": [_live_means(columns[key], label, defined, overall) for key in ("user_id", "video_id")],
        }
        figures[head] = {}
        for kind, of_ids in means.items():
            inputs = np.stack([*of_ids, columns["duration_ms"], hour], axis=1)
            model = HistGradientBoostingClassifier(random_state=0).fit(inputs[fit], label[fit])
            figures[head][kind] = float(roc_auc_score(label[judge], model.predict_proba(inputs[judge])[:, 1]))
    return figures


def ours(folder: str, seed: int, overrides: Sequence[str]) -> dict[str, float]:
    """Returns the test AUC of each head of one run."""
    from rich.console import Console

    from launch.run import train
    from monolith_jax.evaluate.report import read
    from monolith_jax.experiment import load

    bindings = [f"DATA = {folder!r}", f"TrainConfig.seed = {seed}", *overrides]
    with tempfile.TemporaryDirectory() as workdir:
        train(load(["configs/kuairand.gin"], bindings), Path(workdir), Console(quiet=True))
        return {row["head"]: row["auc"] for row in read(workdir).tests if row.get("auc") is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.kuairand",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.kuairand --data $MONOLITH_JAX_DATA/kuairand27k_slice --seeds 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a KuaiRand folder, or a slice of one")
    parser.add_argument("--seeds", type=int, default=3, help="runs of ours (default 3)")
    arguments = parser.parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print("gradient boosting ...")
    rival = boosting(arguments.data)
    runs: list[dict[str, float]] = []
    for seed in range(arguments.seeds):
        console.print(f"seed {seed} ({seed + 1} of {arguments.seeds}) ...", highlight=False)
        runs.append(ours(arguments.data, seed, ()))
    table = Table(
        "head", "boosting, fitted means", "boosting, live means", "ours, mean", "spread (sd)", title="AUC, last 20 % by time"
    )
    figures: dict[str, Any] = {}
    for head in HEADS:
        values = [run[head] for run in runs]
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        figures[head] = {"ours": round(mean, 4), "sd": round(spread, 4)} | {k: round(v, 4) for k, v in rival[head].items()}
        table.add_row(head, f"{rival[head]['fitted']:.4f}", f"{rival[head]['live']:.4f}", f"{mean:.4f}", f"{spread:.4f}")
    console.print(table)
    at_least = {kind: sum(row["ours"] >= row[kind] for row in figures.values()) for kind in ("fitted", "live")}
    print(
        json.dumps(
            {"heads": len(HEADS), "at_least_fitted": at_least["fitted"], "at_least_live": at_least["live"], "auc": figures}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
