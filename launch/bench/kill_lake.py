"""Kills the jobs of the lake at random moments: `python -m launch.bench.kill_lake --help`.

In: a log that grows meanwhile. `launch.lake ingest examples` and `tidy`, processes each, are killed with SIGKILL again and
again and started anew; at the end the tables must hold what they hold where nobody was killed: no row is missing, none is
there twice. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monolith_jax.lake.warehouse import WarehouseConfig

EXAMPLE = "python -m launch.bench.kill_lake --kills=20"
JOBS = (("ingest",), ("examples",), ("tidy",))
# Small epochs, and tidying without pause that keeps next to nothing: most moments are in the middle of something.
_SETTINGS = {
    "LakeJobsConfig.commit_s": 0.2,
    "LakeJobsConfig.tidy_every_s": 0.2,
    "TidyConfig.retention_s": 20.0,
    "TidyConfig.keep": 5,
    "JoinerConfig.window_s": 5.0,
    "LogConfig.idle_s": 1.0,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.kill_lake",
        description="Kills the jobs of the lake at random moments, and compares the tables with those of an uninterrupted run.",
        epilog=f"example: {EXAMPLE}",
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of jobs in turn (%(default)s)")
    parser.add_argument("--examples", type=int, default=60_000, metavar="N", help="that come meanwhile (%(default)s)")
    parser.add_argument("--rate", type=float, default=1500.0, metavar="N", help="events a second (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (%(default)s)")
    parser.add_argument("--workdir", type=Path, metavar="FOLDER", help="else a temporary one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    asked = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="kill_lake") as temporary:
        folder = asked.workdir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = _killed(asked, folder)
    print(json.dumps(found))
    return 0 if found["equal"] else 1


def _killed(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rng, began_s = random.Random(asked.seed), time.monotonic()
    producer = _start(folder, "producer", _produce(asked, folder))
    _wait_for(folder / "log" / "actions")
    running = {job: _start(folder, job[0], _job(folder, "killed", *job)) for job in JOBS}
    counts: Counter[str] = Counter()
    while sum(counts.values()) < asked.kills:
        time.sleep(rng.uniform(0.5, 6.0))
        job = JOBS[sum(counts.values()) % len(JOBS)]
        if running[job].poll() not in (None, -signal.SIGKILL):
            raise RuntimeError(f"{job[0]} ended by itself: {(folder / f'{job[0]}.txt').read_text()[-2000:]}")
        running[job].kill()
        running[job].wait()
        counts[job[0]] += 1
        running[job] = _start(folder, job[0], _job(folder, "killed", *job))
        print(f"{time.monotonic() - began_s:6.1f} s: {job[0]} killed, {sum(counts.values())} of {asked.kills}", flush=True)
    if producer.wait():
        raise RuntimeError(f"the producer failed: {(folder / 'producer.txt').read_text()[-2000:]}")
    for one in running.values():
        one.terminate()
        one.wait()
    for name in ("killed", "whole"):
        for job in (("ingest",), ("examples",)):
            _run(folder, f"last_{job[0]}", _job(folder, name, *job, "--until_end"))
    _run(folder, "last_tidy", _job(folder, "killed", "tidy", "--until_end"))
    return {"kills": dict(counts), **_compared(folder)}


def _compared(folder: Path) -> dict[str, Any]:
    """Compares the tables of both warehouses, whatever the order of their rows."""
    from monolith_jax.lake.changelog import Changelog
    from monolith_jax.lake.warehouse import WarehouseConfig

    def rows(config: WarehouseConfig, name: str) -> Counter[str]:
        table = Changelog(config, name).whole()
        # When a window has ended, and of which day examples are, each run decides by the moments of its commits.
        drop = [one for one in ("day", "stream_row") if name == "examples" and one in table.column_names]
        return Counter(map(repr, table.drop_columns(drop).to_pylist()))

    found: dict[str, Any] = {"equal": True}
    for name in ("events", "examples", "user_features", "user_features_log", "video_features_log"):
        killed, whole = (rows(WarehouseConfig(path=str(folder / one)), name) for one in ("killed", "whole"))
        missing, further = sum((whole - killed).values()), sum((killed - whole).values())
        found[name] = {"rows": sum(killed.values()), "missing": missing, "further": further}
        found["equal"] &= not missing and not further
    return found


def _produce(asked: argparse.Namespace, folder: Path) -> list[str]:
    command = ["launch.produce", "--gin_file=configs/quickstart.gin", f"--log=file://{folder}/log", f"--rate={asked.rate}"]
    return [*command, f"--max_examples={asked.examples}", "--restamp", "--partitions=2", "--batch_rows=64"]


def _job(folder: Path, warehouse: str, *job: str) -> list[str]:
    macros = {"LOG": f"file://{folder}/log", "WAREHOUSE": folder / warehouse} | _SETTINGS
    gin = [f"--gin.{name}={value}" for name, value in macros.items()]
    return ["launch.lake", *job, "--gin_file=configs/train_lake.gin", f"--workdir={folder / warehouse}.work", *gin]


def _start(folder: Path, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.txt").open("ab") as output:
        return subprocess.Popen([sys.executable, "-m", *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _run(folder: Path, name: str, command: list[str]) -> None:
    if _start(folder, name, command).wait():
        raise RuntimeError(f"{name} failed: {(folder / f'{name}.txt').read_text()[-2000:]}")


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > until:
            raise RuntimeError(f"nothing came to {path} within a minute")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
