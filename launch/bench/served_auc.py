"""What the format of served vectors costs in AUC, on KuaiRand: `python -m launch.bench.served_auc --help`.

Trains `configs/kuairand.gin` on the first 80 % by time, exports its last snapshot in each format, and has `ServedModel` score
the last 20 % as a ranking service would: histories and counters go on from where training left them, an example sees what came
before it, never itself. float32 has to give the AUC that the trainer's own test gave.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLE = "python -m launch.bench.served_auc --data $MONOLITH_JAX_DATA/kuairand27k_slice --workdir /tmp/served_auc"
FORMATS = ("float32", "float16", "int8")
MOST_LOST = {"float16": 1e-4, "int8": 1e-3}
"""Of AUC, for the head that loses most."""
SAME = 1e-6
"""float32 and the trainer's own test."""


def trained(folder: str, seed: int, run: Path) -> dict[str, float]:
    """Trains; returns the AUC of each head in the trainer's own test."""
    from rich.console import Console

    from launch.run import train
    from monolith_jax.evaluate.report import read
    from monolith_jax.experiment import load

    train(load(["configs/kuairand.gin"], [f"DATA = {folder!r}", f"TrainConfig.seed = {seed}"]), run, Console(quiet=True))
    return {row["head"]: row["auc"] for row in read(run).tests if row.get("auc") is not None}


def served(run: Path, exports: Path) -> dict[str, dict[str, float]]:
    """Exports the newest snapshot in each format; returns the AUC of each head by format, over the held-out examples."""
    from launch.evaluation.held_out import held_out, restored
    from launch.export import export
    from monolith_jax.evaluate.prequential import Prequential
    from monolith_jax.experiment import load
    from monolith_jax.serve.served_model import ServedModel

    experiment = load([run / "config.gin"])
    heads, size = experiment.heads, experiment.train.batch_size
    models, measures = {}, {}
    for format in FORMATS:
        export(run, exports / format, format)
        models[format] = ServedModel(
            exports / format, experiment.features, experiment.tables, experiment.model, heads,
            num_shards=experiment.mesh.num_shards, batch_sizes=(size,), two_tower=experiment.retrieval,
        )  # fmt: skip
        measures[format] = Prequential(experiment.prequential, [(head.label, head.kind) for head in heads])
    for examples, seen in held_out(experiment, restored(experiment, run)):
        for format, model in models.items():
            scores = model.predict(examples)
            measures[format].add(seen.event_time_ms, seen.groups, scores, seen.labels, seen.masks, seen.optimal)
    found = {format: of_format.totals() for format, of_format in measures.items()}
    return {
        format: {head: row["auc"] for head, row in rows.items() if row.get("auc") is not None} for format, rows in found.items()
    }


def figures_of(own: dict[str, float], auc: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Returns what the last line tells.

    Args:
        own: AUC of each head in the trainer's own test.
        auc: AUC of each head by format.
    """
    lost = {format: max(auc["float32"][head] - auc[format][head] for head in own) for format in MOST_LOST}
    apart = max(abs(auc["float32"][head] - wanted) for head, wanted in own.items())
    met = apart <= SAME and all(lost[format] <= most for format, most in MOST_LOST.items())
    figures: dict[str, Any] = {f"auc_{format}": {head: round(v, 6) for head, v in auc[format].items()} for format in FORMATS}
    figures |= {"loss_fp16": round(lost["float16"], 7), "loss_int8": round(lost["int8"], 7)}
    return figures | {"float32_from_trainer": round(apart, 9), "met": met}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 where every demand is met, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.served_auc",
        description=__doc__,
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a KuaiRand folder, or a slice of one")
    parser.add_argument("--workdir", type=Path, required=True, help="for the run and its exports, which are replaced")
    parser.add_argument("--seed", type=int, default=0, help="of the run (default: %(default)s)")
    asked = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console
    from rich.table import Table

    for name in ("run", "exports"):
        shutil.rmtree(asked.workdir / name, ignore_errors=True)
    own = trained(asked.data, asked.seed, asked.workdir / "run")
    auc = served(asked.workdir / "run", asked.workdir / "exports")
    table = Table("head", "trainer", *FORMATS, *(f"lost, {format}" for format in MOST_LOST), title="AUC, last 20 % by time")
    for head, wanted in own.items():
        lost = [auc["float32"][head] - auc[format][head] for format in MOST_LOST]
        table.add_row(head, *(f"{value:.6f}" for value in (wanted, *(auc[format][head] for format in FORMATS), *lost)))
    Console(width=120).print(table)
    figures = figures_of(own, auc)
    print(json.dumps(figures))
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
