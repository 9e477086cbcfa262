"""Kills a run at random moments and checks that it goes on as if nothing had happened: `python -m launch.bench.kill --help`.

The quickstart, shortened, runs twice without interruption (the second time from the compile cache, to see how long it takes).
Then, as often as asked: it is started, killed with SIGKILL at a moment drawn uniformly from its training time (reading,
training, saving, closing), started again and left to end. Its last snapshot must equal the uninterrupted one bit for bit:
tables, id maps, dense weights, optimizer, histories, position, metric sums. So must metrics.jsonl but for the clock's fields.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = "example: python -m launch.bench.kill --times 20 --workdir /tmp/kill"
CLOCK_FIELDS = (
    *("seconds", "examples_per_s"),
    *("lag_s", "lag_messages", "watermark_age_s", "event_age_p50_s", "event_age_p99_s", "spilled_bytes", "stream"),
    *("published_version", "publish_rows", "publish_s", "publish_lag_s", "publish_retries"),
)
"""Fields of metrics.jsonl that tell how fast the machine was, and how late a live stream."""
TIER_FIELDS = ("hit_rate", "loaded", "evicted")
"""Fields that tell which rows were on the device: after a restart it starts with none."""
OVERRIDES = {
    "TrainConfig.batch_size": 256,
    "TrainConfig.log_every": 1,
    "SnapshotConfig.period_steps": 10,
    "PrequentialConfig.period_s": 1800.0,
    "HistoryConfig.max_users": 4000,
    "user/TableConfig.max_rows": 4000,
    "video/TableConfig.max_rows": 4000,
    "author/TableConfig.max_rows": 4000,
    "sound/TableConfig.max_rows": 4000,
}
"""The quickstart with tables as small as its first minutes need: what is tested is the order of things, not their size."""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.kill",
        description="Kills a training run at random moments, lets it go on, and compares it with one that was left alone.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", type=int, default=20, help="runs that are killed (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs; its subfolders are replaced")
    parser.add_argument("--steps", type=int, default=120, help="steps of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    return parser.parse_args(argv)


def start(folder: Path, steps: int, cache: Path) -> subprocess.Popen[str]:
    """Starts or goes on with a run in a folder; what it prints comes through its pipe."""
    return start_run(folder, "configs/quickstart.gin", OVERRIDES | {"TrainConfig.steps": steps}, cache)


def start_run(folder: Path, gin_file: str, overrides: Mapping[str, Any], cache: Path) -> subprocess.Popen[str]:
    """Starts or goes on with a run of any config."""
    arguments = [f"--gin.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "launch.train", f"--gin_file={gin_file}", *arguments, f"--workdir={folder}"]
    # Every program is kept: with the default threshold small ones would be compiled again in each process.
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | cached, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a run to end well; returns what it printed.

    Raises:
        RuntimeError: It failed.
    """
    text, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} failed with status {process.returncode}:\n{text}")  # pyright: ignore
    return text


def wait_for_training(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits until a new run has written its config, which it does right before it trains."""
    while process.poll() is None and not (folder / "config.gin").exists():
        time.sleep(0.01)


def kill_once(folder: Path, steps: int, cache: Path, after_s: float) -> bool:
    """Starts a run, kills it that long after it began to train; returns whether it was still running."""
    shutil.rmtree(folder, ignore_errors=True)
    process = start(folder, steps, cache)
    wait_for_training(process, folder)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    finish(process)
    return False


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl without the fields above; a last line that is not whole is left out."""
    path = folder / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    rows = [json.loads(line) for line in whole.splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCK_FIELDS + TIER_FIELDS} for row in rows]


def compare(folder: Path, other: Path) -> list[str]:
    """Returns how two run folders differ in their last snapshot, metrics and dead letters; nothing if not at all."""
    found = compare_trees(_last_snapshot(folder), _last_snapshot(other))
    rows, other_rows = rows_of(folder), rows_of(other)
    if rows != other_rows:
        at = next((i for i, pair in enumerate(zip(rows, other_rows, strict=False)) if pair[0] != pair[1]), "the end")
        found.append(f"metrics.jsonl: {len(rows)} and {len(other_rows)} rows, the first difference at {at}")
    letters = [{path.name: path.read_bytes() for path in one.glob("dead_letters*.jsonl")} for one in (folder, other)]
    names = sorted(letters[0].keys() | letters[1].keys())
    found += [f"{name} differs" for name in names if letters[0].get(name, b"") != letters[1].get(name, b"")]
    return found


def _last_snapshot(folder: Path) -> dict[str, Any]:
    from monolith_jax.snapshot import SnapshotConfig, Snapshots

    snapshots = Snapshots(SnapshotConfig(), folder / "snapshots", read_only=True)
    step = snapshots.latest()
    if step is None:
        raise RuntimeError(f"{folder} holds no snapshot")
    restored = snapshots.restore_plain(step)
    snapshots.close()
    # The length of metrics.jsonl depends on the digits of the clock's fields; its rows are compared. Epochs count starts.
    extras = {name: value for name, value in restored.extras.items() if name not in ("bytes", "publisher")}
    return {"step": restored.step, "state": restored.state, "host": restored.host, "extras": extras}


def compare_trees(one: Any, other: Any) -> list[str]:
    """Returns a line for each leaf in which two trees differ, types and bits included."""
    import jax
    import numpy as np

    leaves, other_leaves = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (one, other))
    found = [f"{jax.tree_util.keystr(path)} is in one of them only" for path in leaves.keys() ^ other_leaves.keys()]
    for path in leaves.keys() & other_leaves.keys():
        a, b = np.asarray(leaves[path]), np.asarray(other_leaves[path])
        if (a.dtype, a.shape) != (b.dtype, b.shape) or a.tobytes() != b.tobytes():
            found.append(f"{jax.tree_util.keystr(path)} differs")
    return sorted(found)


def _control(workdir: Path, steps: int, cache: Path) -> tuple[float, list[str]]:
    """Runs twice without interruption; returns how long the second one trained, and how the two differ."""
    seconds = 0.0
    for name in ("whole", "again"):
        shutil.rmtree(workdir / name, ignore_errors=True)
        process = start(workdir / name, steps, cache)
        wait_for_training(process, workdir / name)
        started = time.monotonic()
        finish(process)
        seconds = time.monotonic() - started
    return seconds, compare(workdir / "whole", workdir / "again")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 if every killed run equals the uninterrupted one."""
    arguments = _parsed(argv)
    workdir, steps, began = arguments.workdir.absolute(), arguments.steps, time.monotonic()
    cache, folder = workdir / "xla", workdir / "killed"
    seconds, differences = _control(workdir, steps, cache)
    print(f"uninterrupted: {steps} steps, {seconds:.1f} s of training; a second run {'differs' if differences else 'is equal'}")
    print(f"{'run':>4}  {'killed at':>9}  {'at step':>7}  {'went on from':>12}  {'equal':>5}  {'elapsed':>8}")
    rng = random.Random(arguments.seed)
    results: list[dict[str, Any]] = []
    while len(results) < arguments.times:
        after_s = rng.random() * seconds
        if not kill_once(folder, steps, cache, after_s):
            continue  # It was faster this time, and had ended.
        reached = max((row["step"] for row in rows_of(folder) if row["kind"] == "step"), default=0)
        text = finish(start(folder, steps, cache))
        went_on = int(text.partition("going on from the snapshot of step ")[2].split("\n")[0].replace(",", "") or 0)
        found = compare(workdir / "whole", folder)
        results.append({"at": reached, "from": went_on, "differences": found})
        row = f"{len(results):>4}  {after_s:>7.2f} s  {reached:>7}  {went_on:>12}  {'no' if found else 'yes':>5}"
        print(f"{row}  {time.monotonic() - began:>6.0f} s", flush=True)
        for difference in found[:5]:
            print(f"      {difference}")
    equal = sum(not one["differences"] for one in results)
    summary = {"kills": len(results), "equal": equal, "uninterrupted_runs_equal": not differences, "steps": steps}
    summary |= {"snapshot_every": OVERRIDES["SnapshotConfig.period_steps"], "killed_at_step": [one["at"] for one in results]}
    summary |= {"went_on_from": [one["from"] for one in results]}
    print(json.dumps(summary | {"seconds": round(time.monotonic() - began, 1)}))
    return 0 if equal == len(results) and not differences else 1


if __name__ == "__main__":
    sys.exit(main())
