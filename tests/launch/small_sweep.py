"""A sweep of real points that take a second each: ways to find videos in made-up data. And the folder of one, made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent.parent
SWEEP = """
Sweep.name = 'small'
Sweep.gin_files = ('configs/tiktok.gin',)
Sweep.point = @RetrievalPoint()
RetrievalPoint.data = '{data}'
Sweep.axes = (@method/AxisConfig(), @rate/AxisConfig())
method/AxisConfig.name = 'method'
method/AxisConfig.labels = ('popularity', 'EASE')
method/AxisConfig.bind = ('RetrievalPoint.method',)
method/AxisConfig.values = (('popularity',), ('ease',))
rate/AxisConfig.name = 'rate'
rate/AxisConfig.labels = ('low', 'middle', 'high')
rate/AxisConfig.bind = ('rows/OptimizerConfig.learning_rate', 'TableConfig.init_scale')
rate/AxisConfig.values = ((0.1, 0.1), (0.2, 0.1), (0.3, 0.2))
Sweep.seeds = (0, 1, 2)
Sweep.metrics = ('recall_at_20',)
Sweep.baseline = 'method=popularity'
"""


def write_data(folder: Path) -> Path:
    """Writes the files that `RetrievalPoint` reads."""
    rng = np.random.default_rng(0)
    users, videos = (rng.random((60, 90)) < 0.2).nonzero()
    split = np.where(rng.random(users.size) < 0.8, "trn", "val")
    folder.mkdir()
    pq.write_table(pa.table({"user": users, "item": videos, "split": split}), folder / "interactions.parquet")
    for name in ("image_feat", "audio_feat"):
        np.savez(folder / f"{name}.npz", feat=rng.normal(size=(90, 4)))
    return folder


def write_sweep(tmp_path: Path, **changed: str) -> Path:
    """Writes the gin file, with other values of some bindings."""
    lines = SWEEP.format(data=write_data(tmp_path / "data")).strip().splitlines()
    for name, value in changed.items():
        lines = [line for line in lines if not line.startswith(f"Sweep.{name} ")] + [f"Sweep.{name} = {value}"]
    path = tmp_path / "small.gin"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def attempts(workdir: Path, what: str) -> list[int]:
    """Returns the points of the lines of attempts.jsonl of one kind, in their order."""
    lines = (workdir / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["point"] for row in map(json.loads, lines) if row["what"] == what]


def write_results(workdir: Path, axes: dict[str, list[str]], seeds: list[int], **changed: Any) -> list[dict[str, Any]]:
    """Writes a sweep's folder without results; returns its points."""
    combinations: list[dict[str, str]] = [{}]
    for axis, labels in axes.items():
        combinations = [one | {axis: label} for one in combinations for label in labels]
    points = [
        {
            "index": 0,
            "key": "",
            "labels": labels,
            "seed": seed,
            "gin_files": ["a.gin"],
            "bindings": ["A.b = 1"],
            "overrides": [],
        }
        for seed in seeds
        for labels in combinations
    ]
    for index, point in enumerate(points):
        point |= {"index": index, "key": f"{index:04d}"}
    plan = {
        "name": "by <hand> & co", "command": "python -m launch.sweep --x='<1>'",
        "gin_files": {"a.gin": "# What & why\n\nA.b = '<'"},
        "axes": [{"name": axis, "labels": labels} for axis, labels in axes.items()], "seeds": seeds, "baseline": "",
        "metrics": [], "heads": [], "lower_is_better": [], "versions": {"jax": "1"}, "started": 1.7e9, "points": points,
        "machine": {"cpu": "a <cpu>", "cores": 2, "memory_gb": 24.0, "system": "Linux"},
    }  # fmt: skip
    workdir.mkdir(exist_ok=True)
    (workdir / "sweep.json").write_text(json.dumps(plan | changed), encoding="utf-8")
    return points


def write_result(workdir: Path, point: dict[str, Any], *rows: tuple[Any, ...]) -> None:
    """Writes the result of a point: rows of metric, value, head, along, at."""
    folder = workdir / "points" / point["key"]
    folder.mkdir(parents=True, exist_ok=True)
    names = ("metric", "value", "head", "along", "at")
    filled = [dict(zip(names, (*row, *(("", "", None)[len(row) - 2 :])), strict=True)) for row in rows]
    result = {"rows": filled, "seconds": 2.0, "peak_rss_mb": 10.0, "ended": 0.0}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
