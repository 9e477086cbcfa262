"""Kills online training, and the broker, at random moments: nothing may be lost or learned twice. `--help` says how to call it.

A producer fills a log. A run reads it to its end, and is killed with SIGKILL again and again on the way, at moments drawn from
its training time; so is, in some runs, the broker, which comes back a second later. At the end every impression must have been
learned exactly once: examples are as many as impressions, and the cuts of the run read every message of the log once, without a
gap. Then another run replays the same cuts from their start, uninterrupted; its last snapshot must be equal to the bit: tables,
id maps, dense weights, optimizer, histories, position, metric sums.
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
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.bench import kill
from launch.bench.kafka_broker import Broker, missing
from launch.bench.stream import fill

EXAMPLE = "example: python -m launch.bench.kill_stream --log kafka --broker_kills 1 --workdir /tmp/kill_stream"
OVERRIDES = {
    **{name: value for name, value in kill.OVERRIDES.items() if not name.startswith("Prequential")},
    "LogConfig.ends": True,
    "LogConfig.poll_bytes": 200_000,
    "JoinerConfig.window_s": 20.0,
    "user_author/TableConfig.max_rows": 60_000,
}
"""The online config with small tables and a short window: some hundred cuts, of which the joiner holds a tenth at a time."""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.kill_stream",
        description="Kills online training and its broker at random moments; compares with a run that replays the cuts.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder for logs and runs; its subfolders are replaced")
    parser.add_argument("--log", choices=("file", "kafka"), default="file", help="where the events are (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=50, help="kills of the trainer (default: %(default)s)")
    parser.add_argument("--kills_a_run", type=int, default=10, help="of one run, at the most (default: %(default)s)")
    parser.add_argument("--broker_kills", type=int, default=0, help="kills of the broker (default: %(default)s)")
    parser.add_argument("--events", type=int, default=150_000, help="events in the log (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    asked = parser.parse_args(argv)
    if asked.broker_kills and asked.log != "kafka":
        parser.error("--broker_kills needs --log kafka")
    return asked


@contextmanager
def opened(kind: str, folder: Path) -> Any:
    """Yields the address of a new log, and its broker (None: a folder has none).

    Raises:
        RuntimeError: No broker can be started here.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "file":
        yield f"file://{folder}", None
        return
    if why := missing():
        raise RuntimeError(why)
    broker = Broker(folder)
    broker.start()
    try:
        yield broker.url, broker
    finally:
        broker.stop()


def run_to(
    folder: Path, url: str, cache: Path, after_s: float | None, broker: Broker | None, broker_after_s: float
) -> float | None:
    """Starts or goes on with a run; kills it that long after it began to train; returns how long it trained, None: killed.

    Args:
        folder: The run folder.
        url: The log.
        cache: Compiled programs.
        after_s: Seconds; None: not killed.
        broker: Killed too, and started again a second later; None: not.
        broker_after_s: Seconds after which.
    """
    (folder / "config.gin").unlink(missing_ok=True)
    process = kill.start_run(folder, "configs/online.gin", {"LOG": url, **OVERRIDES}, cache)
    kill.wait_for_training(process, folder)
    began = time.monotonic()
    if broker is not None:
        time.sleep(broker_after_s)
        broker.kill()
        time.sleep(1.0)
        broker.start()
    try:
        if after_s is None:
            kill.finish(process)
            return time.monotonic() - began
        process.wait(max(after_s - (time.monotonic() - began), 0.0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    kill.finish(process)
    return time.monotonic() - began


def read_once(folder: Path, url: str) -> list[str]:
    """Returns what the cuts of a run read twice, or leave out, of its log; nothing if each message once."""
    from monolith_jax.stream.cuts import CutLog
    from monolith_jax.stream.log import LogPartition, open_log

    at: dict[LogPartition, int] = {}
    found = []
    cuts = CutLog(folder / "stream" / "0")
    for number, cut in enumerate(cuts.read(0, cuts.bounds[1])):
        at |= {start.partition: start.begin for start in cut.starts if start.partition not in at}
        for partition, begin, end in cut.reads:
            if begin != at[partition]:
                found.append(f"cut {number} reads {partition} from {begin}, not from {at[partition]}")
            at[partition] = end
    cuts.close()
    log = open_log(url)
    found += [f"{one} was read to {end} of {log.bounds(one)[1]}" for one, end in at.items() if end != log.bounds(one)[1]]
    log.close()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 if nothing was lost, repeated or learned in another way."""
    asked = _parsed(argv)
    workdir, began = asked.workdir.absolute(), time.monotonic()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rng, cache = random.Random(asked.seed), workdir / "xla"
    results: list[dict[str, Any]] = []
    with opened(asked.log, workdir / "log") as (url, broker):
        fill(url, asked.events)
        for name in ("first", "whole"):  # The first one compiles.
            shutil.rmtree(workdir / name, ignore_errors=True)
            seconds = run_to(workdir / name, url, cache, None, None, 0.0) or 0.0
        examples = json.loads((workdir / "whole" / "metrics.jsonl").read_text().splitlines()[-1])["examples"]
        print(f"uninterrupted: {examples:,} examples, {seconds:.1f} s of training")
        while (done := sum(one["kills"] for one in results)) < asked.kills:
            folder, replay = workdir / "killed", workdir / "replay"
            for one in (folder, replay):
                shutil.rmtree(one, ignore_errors=True)
            kills, broker_kills = 0, 0
            while kills < min(asked.kills_a_run, asked.kills - done):
                killed = sum(one["broker_kills"] for one in results) + broker_kills
                with_broker = broker if killed < asked.broker_kills else None
                if run_to(folder, url, cache, rng.random() * seconds / 3, with_broker, rng.random() * seconds / 3) is not None:
                    break
                kills, broker_kills = kills + 1, broker_kills + (with_broker is not None)
            run_to(folder, url, cache, None, None, 0.0)
            shutil.copytree(folder / "stream", replay / "stream")
            run_to(replay, url, cache, None, None, 0.0)
            learned = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["examples"]
            wrong = [*read_once(folder, url), *kill.compare(folder, replay)]
            if learned != examples:
                wrong.append(f"{learned} examples were learned from {examples} impressions")
            results.append({"kills": kills, "broker_kills": broker_kills, "wrong": wrong})
            text = "equal to the replay, each message once" if not wrong else "; ".join(wrong[:5])
            broke = f" and {broker_kills} of the broker" if broker_kills else ""
            print(f"run {len(results)}: {kills} kills{broke}: {text}  ({time.monotonic() - began:.0f} s)", flush=True)
    good = sum(not one["wrong"] for one in results)
    summary = {"log": asked.log, "runs": len(results), "equal": good, "kills": sum(one["kills"] for one in results)}
    summary |= {"broker_kills": sum(one["broker_kills"] for one in results), "examples": examples}
    print(json.dumps(summary | {"seconds": round(time.monotonic() - began, 1)}))
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
