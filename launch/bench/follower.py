"""A server process that follows a run's deltas until it is ended, then dumps all that it holds; and what to compare it with.

In: the folder of a run that publishes. Out: ids and vectors of every table, from a server's dump or from the trainer's last
snapshot. `start`, `wait_ready` and `stop` are for the process that measures; `main` is the server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 300.0
"""The longest that anybody waits for a process to be ready."""


class TableRows(NamedTuple):
    """The live rows of a table."""

    ids: np.ndarray
    """int64 [N], ascending."""
    vectors: np.ndarray
    """float32 [N, D]."""


class Follower(NamedTuple):
    """A server process and where it dumps."""

    process: subprocess.Popen[str]
    dump: Path

    @property
    def is_ready(self) -> bool:
        """Whether it serves."""
        return self.dump.with_suffix(".ready").exists()


def keep_config(run: Path, trainer: subprocess.Popen[str]) -> None:
    """Waits for the first version of a run, then keeps its configuration for servers: a run that goes on writes it anew.

    Raises:
        RuntimeError: The trainer ended before.
    """
    while not list((run / "deltas").glob("*/manifest.json")):
        if trainer.poll() is not None:
            raise RuntimeError(f"the trainer ended with status {trainer.returncode} before it published")
        time.sleep(0.02)
    shutil.copyfile(run / "config.gin", run / "served.gin")


def start(run: Path, name: str, cache: Path | None = None, period_s: float = 0.1) -> Follower:
    """Starts a server of a run folder in which `keep_config` has been.

    Args:
        run: The run folder.
        name: Of its dump there.
        cache: Compiled programs.
        period_s: Between two looks at the deltas.
    """
    dump = run / f"{name}.npz"
    for path in (dump, dump.with_suffix(".ready")):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "launch.bench.follower", f"--run={run}", f"--dump={dump}", f"--period_s={period_s}"]
    cached = (
        {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    )
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | cached, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Follower(process, dump)


def wait_ready(follower: Follower) -> None:
    """Waits until a server serves.

    Raises:
        RuntimeError: It ended, or is not ready in time.
    """
    until = time.monotonic() + WAIT_S
    while not follower.is_ready:
        if follower.process.poll() is not None or time.monotonic() > until:
            follower.process.kill()
            text, _ = follower.process.communicate()
            raise RuntimeError(f"a server did not become ready:\n{text}")
        time.sleep(0.02)


def stop(follower: Follower) -> tuple[dict[str, Any], dict[str, TableRows]]:
    """Ends a server that is ready; returns what it tells, and the rows that it held.

    Raises:
        RuntimeError: It failed.
    """
    wait_ready(follower)
    follower.process.terminate()
    text, _ = follower.process.communicate()
    if follower.process.returncode:
        raise RuntimeError(f"a server failed with status {follower.process.returncode}:\n{text}")
    with np.load(follower.dump) as held:
        names = sorted({key.rpartition("/")[0] for key in held})
        rows = {name: TableRows(held[f"{name}/ids"], held[f"{name}/vectors"]) for name in names}
    return json.loads(text.splitlines()[-1]), rows


def rows_of_snapshot(run: Path, format: str = "float32") -> tuple[int, dict[str, TableRows]]:
    """Returns the step of a run's last snapshot and its live rows, with vectors as they are after a way in this format.

    Raises:
        RuntimeError: There is no snapshot.
    """
    from monolith_jax.experiment import load
    from monolith_jax.snapshot import SnapshotConfig, Snapshots
    from monolith_jax.sync.export import host_vectors, saved_tables
    from monolith_jax.sync.quantise import Rows, dequantised, quantised
    from monolith_jax.tables.table import make_groups

    experiment = load([run / "served.gin"])
    snapshots = Snapshots(SnapshotConfig(), run / "snapshots", read_only=True)
    try:
        step = snapshots.latest()
        if step is None:
            raise RuntimeError(f"{run} holds no snapshot")
        restored = snapshots.restore_plain(step)
    finally:
        snapshots.close()
    groups = make_groups(experiment.tables, experiment.mesh.num_shards)
    found = {}
    for one in saved_tables(groups, restored.host["maps"], restored.state["groups"]):
        layout = one.group.rows
        vectors = host_vectors(layout, one.rows[one.places, : layout.vector_width])
        if format != "float32":
            vectors = dequantised(Rows(one.ids, *quantised(vectors, format)))
        found[one.name] = TableRows(one.ids, vectors)
    return step, found


def differences(served: Mapping[str, TableRows], live: Mapping[str, TableRows]) -> list[str]:
    """Returns a line for each table in which a server differs from the trainer, bits of vectors included."""
    found = []
    for name in sorted(served.keys() | live.keys()):
        if name not in served or name not in live:
            found.append(f"{name}: only {'the trainer' if name in live else 'the server'} has such a table")
            continue
        mine, theirs = served[name], live[name]
        if not np.array_equal(mine.ids, theirs.ids):
            more, less = np.setdiff1d(mine.ids, theirs.ids).size, np.setdiff1d(theirs.ids, mine.ids).size
            found.append(f"{name}: {more:,} ids that the trainer does not have, {less:,} ids missing, of {theirs.ids.size:,}")
        elif mine.vectors.shape != theirs.vectors.shape:
            found.append(f"{name}: vectors are {mine.vectors.shape}, the trainer's {theirs.vectors.shape}")
        elif mine.vectors.tobytes() != theirs.vectors.tobytes():
            other = (mine.vectors.view(np.uint32) != theirs.vectors.view(np.uint32)).any(axis=1).sum()
            found.append(f"{name}: {other:,} of {theirs.ids.size:,} vectors differ")
    return found


def serve(run: Path, dump: Path, period_s: float) -> dict[str, Any]:
    """Follows the deltas of a run until SIGTERM, then catches up and dumps; returns what there is to tell."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    from monolith_jax.experiment import load
    from monolith_jax.serve.served_model import ServedModel

    experiment = load([run / "served.gin"])
    model = ServedModel(
        run / "deltas", experiment.features, experiment.tables, experiment.model, experiment.heads,
        num_shards=experiment.mesh.num_shards, batch_sizes=(64,),
    )  # fmt: skip
    model.watch(period_s)
    dump.with_suffix(".ready").touch()
    while not ended.wait(0.2):
        pass
    model.poll()
    told = model.metrics()
    held: dict[str, np.ndarray] = {}
    for name in told["rows_of_tables"]:
        ids = np.sort(model.ids(name))
        vectors, found = model.vectors(name, ids)
        assert found.all(), f"ids of {name} that have no row"
        held |= {f"{name}/ids": ids, f"{name}/vectors": vectors}
    model.close()
    np.savez(dump, **held)  # pyright: ignore[reportArgumentType]
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """Is the server process; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.follower",
        description="Serves a run that publishes until SIGTERM, then dumps all ids and vectors.",
        epilog="example: python -m launch.bench.follower --run /tmp/run --dump /tmp/run/served.npz",
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder, with served.gin, a copy of its config.gin")
    parser.add_argument("--dump", type=Path, required=True, help="npz file to write at the end; .ready tells that it serves")
    parser.add_argument("--period_s", type=float, default=0.1, help="between two looks (default: %(default)s)")
    asked = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(json.dumps(serve(asked.run, asked.dump, asked.period_s)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
