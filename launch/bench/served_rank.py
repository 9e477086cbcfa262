"""Whether the ranking path gives the trainer's AUC, on KuaiRand: `python -m launch.bench.served_rank --help`.

Trains `configs/kuairand.gin` on the first 80 % by time, exports its last snapshot, and has `Ranker` score the last 20 % as a
feed would be ranked: each example is a request with its user's side, and its video one of 64 candidates, the others being those
of its neighbours. Every head's AUC has to be the one of the trainer's own test. Then the first half of these scores calibrates
the heads, and the second half shows what that is worth; the lines for a gin file are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.bench.served_auc import trained

if TYPE_CHECKING:
    from monolith_jax.evaluate.calibration import Calibration
    from monolith_jax.features import Features
    from monolith_jax.models.losses import HeadConfig

EXAMPLE = "python -m launch.bench.served_rank --data $MONOLITH_JAX_DATA/kuairand27k_slice --workdir /tmp/served_rank"
CANDIDATE_COLUMNS = (
    *("video_id", "author_id", "sound_id", "tag_id", "upload_type", "duration_ms"),
    *("video_id_lift", "video_id_count", "author_id_lift", "author_id_count"),
)
_CANDIDATES = 64
SAME = 1e-6
"""AUC of the ranking path and of the trainer's own test."""


def rows_of(features: Features, where: Any) -> Features:
    """Returns the features of some examples."""
    groups = tuple(group._replace(ids=group.ids[where], valid=group.valid[where]) for group in features.groups)
    weights = tuple(None if of_group is None else of_group[where] for of_group in features.weights)
    return features._replace(groups=groups, weights=weights, dense=features.dense[where])


def ranked(run: Path, exported: Path) -> dict[str, Any]:
    """Exports the newest snapshot and ranks the held-out examples; returns AUC by head, scores, and how long it took."""
    from launch.evaluation.held_out import held_out, restored
    from launch.export import export
    from monolith_jax.evaluate.prequential import Prequential
    from monolith_jax.experiment import load
    from monolith_jax.features import featurize
    from monolith_jax.serve.rank import Ranker
    from monolith_jax.serve.served_model import ServedModel

    experiment = load([run / "config.gin"])
    export(run, exported, "float32")
    model = ServedModel(
        exported, experiment.features, experiment.tables, experiment.model, experiment.heads,
        num_shards=experiment.mesh.num_shards, batch_sizes=(1,), two_tower=experiment.retrieval,
    )  # fmt: skip
    ranker = Ranker(model, CANDIDATE_COLUMNS, sizes=(_CANDIDATES,))
    measure = Prequential(experiment.prequential, [(head.label, head.kind) for head in experiment.heads])
    observed, taken_s = [], 0.0
    for examples, seen in held_out(experiment, restored(experiment, run)):
        once, each = featurize(examples, ranker.once_layout), featurize(examples, ranker.each_layout)
        scores = np.empty((examples.num_rows, len(experiment.heads)), np.float32)
        begun = time.perf_counter()
        for row in range(examples.num_rows):
            candidates = (row + np.arange(_CANDIDATES)) % examples.num_rows
            scores[row] = ranker.scores(rows_of(once, slice(row, row + 1)), rows_of(each, candidates))[0]
        taken_s += time.perf_counter() - begun
        measure.add(seen.event_time_ms, seen.groups, scores, seen.labels, seen.masks, seen.optimal)
        observed.append((scores, seen.labels, seen.masks))
    auc = {head: row["auc"] for head, row in measure.totals().items() if row.get("auc") is not None}
    scores, labels, masks = (np.concatenate(parts) for parts in zip(*observed, strict=True))
    told = {"requests": scores.shape[0], "ms_a_request": 1000 * taken_s / scores.shape[0]}
    return {"auc": auc, "told": told, "heads": experiment.heads, "seen": (scores, labels, masks)}


def calibrated(
    heads: Sequence[HeadConfig], scores: np.ndarray, labels: np.ndarray, masks: np.ndarray
) -> tuple[dict[str, Calibration], dict[str, tuple[float, float]]]:
    """Calibrates on the first half, and measures on the second.

    Args:
        heads: T of them.
        scores, labels, masks: float32 [N, T], by time.

    Returns:
        The correction of each head; and sum of predictions over sum of labels before and after it.
    """
    from monolith_jax.evaluate.calibration import fit
    from monolith_jax.serve.values import CalibrationConfig, RankConfig, Values

    half = scores.shape[0] // 2
    found = fit(scores[:half], labels[:half], masks[:half], [head.kind for head in heads])
    labels_of = [head.label for head in heads]
    corrections = tuple(
        CalibrationConfig(head=label, slope=s, intercept=i) for label, (s, i) in zip(labels_of, found, strict=True)
    )
    values = Values(RankConfig(heads=(), weights=(), calibration=corrections), heads)
    there = masks[half:]
    happened = np.where(there > 0, labels[half:], 0)
    before, after = (
        (there * one).sum(0) / (there * happened).sum(0) for one in (scores[half:], values.calibrated(scores[half:]))
    )
    return dict(zip(labels_of, found, strict=True)), dict(zip(labels_of, zip(before, after, strict=True), strict=True))


def figures_of(own: dict[str, float], auc: dict[str, float], told: dict[str, float]) -> dict[str, Any]:
    """Returns what the last line tells.

    Args:
        own: AUC of each head in the trainer's own test.
        auc: The same of the ranking path.
        told: What else there is to tell.
    """
    apart = max(abs(auc[head] - wanted) for head, wanted in own.items())
    rounded = {name: round(value, 3) for name, value in told.items()}
    return {"auc": {head: round(value, 6) for head, value in auc.items()}, **rounded, "apart": apart, "met": apart <= SAME}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 where the AUC is the trainer's, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.served_rank",
        description=__doc__,
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a KuaiRand folder, or a slice of one")
    parser.add_argument("--workdir", type=Path, required=True, help="for the run and its export, which are replaced")
    parser.add_argument("--seed", type=int, default=0, help="of the run (default: %(default)s)")
    asked = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console
    from rich.table import Table

    from monolith_jax.evaluate.calibration import gin_lines

    for name in ("run", "exported"):
        shutil.rmtree(asked.workdir / name, ignore_errors=True)
    own = trained(asked.data, asked.seed, asked.workdir / "run")
    found = ranked(asked.workdir / "run", asked.workdir / "exported")
    corrections, ratios = calibrated(found["heads"], *found["seen"])
    table = Table(
        "head", "trainer", "ranked", "predicted / seen", "calibrated", title="AUC, last 20 % by time; second half of it"
    )
    for head, (before, after) in ratios.items():
        auc = [f"{one[head]:.6f}" if head in one else "" for one in (own, found["auc"])]
        table.add_row(head, *auc, f"{before:.3f}", f"{after:.3f}")
    Console(width=120).print(table)
    print(gin_lines(corrections))
    figures = figures_of(own, found["auc"], found["told"])
    print(json.dumps(figures))
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
