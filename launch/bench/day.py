"""A day of events at full speed, and what memory does: `python -m launch.bench.day --help`.

A producer fills a log in a folder with a day of a synthetic world in which users and videos come and go all day. A trainer of
`configs/online.gin` in a process of its own reads it through the joiner to its end, with snapshots, and with tables that forget
ids after `--ttl_s`. Meanwhile its memory that is no file's is looked at. It must not grow, the rows are bounded by expiry and
not by the tables' sizes, and each impression becomes an example.

With `--serve` the trainer publishes, and a server process follows it all day. At the end its ids must be the trainer's live
ids, and its vectors the trainer's, rounded to the format that is published.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.bench import follower
from monolith_jax.sync.quantise import FORMATS

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = "example: python -m launch.bench.day --workdir /tmp/day"
START_MS = 1_767_268_800_000
"""Noon of 2026-01-01: the hours that warm up are busy ones, and the day ends at the hour at which it began."""
WORLD = {"start_ms": START_MS, "live_users": 2000, "users_per_day": 24_000, "live_videos": 2000, "videos_per_day": 48_000}
"""Users stay for two hours, videos for one."""
HOUR_MS = 3_600_000
LOOK_S = 0.25


class Look(NamedTuple):
    """What was seen of the trainer at a moment."""

    event_ms: int
    """Event time that its last written step had reached."""
    mb: float
    """Its memory that is no file's."""


class Hour(NamedTuple):
    """An hour of event time."""

    examples: int
    seconds: float
    rows: int
    """The most that there were."""
    fresh: int
    """Ids that got a row; an id that was forgotten and came again counts again."""
    expired: int
    open_impressions: int
    """The most that waited for their window to close."""
    mb: float
    """Median of the memory; NaN where nobody looked."""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.day",
        description="Replays a day of events through joiner and trainer; tells whether memory stays flat and rows bounded.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder for log and run; its subfolders are replaced")
    parser.add_argument("--hours", type=float, default=24.0, help="of event time, about if no multiple of 24 (%(default)s)")
    parser.add_argument("--rate", type=float, default=20.0, help="impressions in a second of event time (%(default)s)")
    parser.add_argument("--warm_h", type=float, default=4.0, help="first hours that memory is not judged by (%(default)s)")
    parser.add_argument("--ttl_s", type=int, default=3600, help="TableConfig.ttl_s of all tables; 0: no expiry (%(default)s)")
    parser.add_argument("--gin", action="append", default=[], metavar="NAME=VALUE", help="a further binding; may be repeated")
    parser.add_argument("--serve", action="store_true", help="publish, follow all day with a server, and compare its rows")
    parser.add_argument("--format", choices=FORMATS, default="float16", help="of what --serve publishes (%(default)s)")
    asked = parser.parse_args(argv)
    if asked.hours * asked.rate <= 0:
        parser.error("--hours and --rate must be above 0")
    return asked


def fill(url: str, examples: int, rate: float) -> str:
    """Fills a log with a world's impressions and their actions, a minute later on average; returns what the producer said.

    Raises:
        RuntimeError: The producer failed, or sent another number of impressions.
    """
    world = {**WORLD, "events_per_s": rate, "num_examples": examples}
    command = [sys.executable, "-m", "launch.produce", "--gin_file=configs/quickstart.gin", f"--log={url}", "--partitions=2"]
    command += ["--delay_s=60", *(f"--gin.SyntheticConfig.{name}={value}" for name, value in world.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.search(r"([\d,]+) impressions", done.stdout)
    if done.returncode or not found or int(found[1].replace(",", "")) != examples:
        raise RuntimeError(f"the producer was to send {examples:,} impressions:\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


def start_trainer(url: str, run: Path, ttl_s: int, bindings: Sequence[str]) -> subprocess.Popen[str]:
    """Starts a trainer that reads a log to its end; what it prints goes to `<run>/said.txt`."""
    overrides = {
        "LOG": url, "LogConfig.ends": True, "TableConfig.ttl_s": ttl_s, "TrainConfig.log_every": 1,
        "HistoryConfig.max_users": WORLD["live_users"] + 2 * WORLD["users_per_day"],
    }  # fmt: skip
    flags = [f"--gin.{name}={value}" for name, value in overrides.items()] + [f"--gin.{one}" for one in bindings]
    command = [sys.executable, "-m", "launch.train", "--gin_file=configs/online.gin", f"--workdir={run}", *flags]
    run.mkdir(parents=True)
    with (run / "said.txt").open("w") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, text=True)


def watch(process: subprocess.Popen[str], metrics: Path) -> list[Look]:
    """Looks at a trainer until it ends."""
    looks: list[Look] = []
    event_ms, at = 0, 0
    while process.poll() is None:
        time.sleep(LOOK_S)
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(at)
                lines = file.read().rpartition(b"\n")[0]
            at += len(lines) + 1 if lines else 0
            steps = [line for line in lines.splitlines() if line.startswith(b'{"kind": "step"')]
            event_ms = json.loads(steps[-1])["event_time_ms"] if steps else event_ms
        if event_ms and (mb := anonymous_mb(process.pid)):
            looks.append(Look(event_ms, mb))
    return looks


def anonymous_mb(pid: int) -> float:
    """Returns a process's memory that is no file's; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def hours_of(steps: Sequence[Mapping[str, Any]], looks: Sequence[Look], start_ms: int = START_MS) -> dict[int, Hour]:
    """Returns what happened in each hour of event time, by its number from the start.

    Args:
        steps: Rows of kind `step`, one for each step, in order.
        looks: At the trainer.
        start_ms: When hour 0 begins.
    """
    of_hour: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    before = 0
    for row in steps:
        number = (row["event_time_ms"] - start_ms) // HOUR_MS
        of_hour.setdefault(number, []).append((row["examples"] - before, row))
        before = row["examples"]
    found = {}
    for number, pairs in of_hour.items():
        rows = [row for _, row in pairs]
        mb = [look.mb for look in looks if (look.event_ms - start_ms) // HOUR_MS == number]
        found[number] = Hour(
            sum(count for count, _ in pairs),
            sum(count / max(row["examples_per_s"], 1e-9) for count, row in pairs),
            int(max(row["rows"] for row in rows)),
            int(sum(row["fresh"] for row in rows)),
            int(sum(row["expired"] for row in rows)),
            int(max(row["open_impressions"] for row in rows)),
            statistics.median(mb) if mb else math.nan,
        )
    return found


def slope_of(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns the least-squares slope and its standard error; NaN from fewer than three points."""
    if len(x) < 3:
        return math.nan, math.nan
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((one - mean_x) ** 2 for one in x)
    slope = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True)) / spread
    left = sum((other - mean_y - slope * (one - mean_x)) ** 2 for one, other in zip(x, y, strict=True))
    return slope, math.sqrt(left / (len(x) - 2) / spread)


def figures_of(hours: Mapping[int, Hour], warm_h: float) -> dict[str, float]:
    """Returns slope and levels of memory after the warm-up, from the medians of hours, and what rows did."""
    warm = {number: hour for number, hour in hours.items() if number >= warm_h and not math.isnan(hour.mb)}
    slope, error = slope_of(list(warm), [hour.mb for hour in warm.values()])
    levels = [hour.mb for hour in warm.values()] or [math.nan]
    every = list(hours.values())
    return {
        "slope_mb_per_hour": slope,
        "slope_error": error,
        "rss_start_mb": levels[0],
        "rss_end_mb": levels[-1],
        "rows_max": max(hour.rows for hour in every),
        "ids_seen": sum(hour.fresh for hour in every),
        "expired": sum(hour.expired for hour in every),
        "open_impressions_max": max(hour.open_impressions for hour in every),
    }


def show_hours(hours: Mapping[int, Hour]) -> None:
    """Prints a row for each hour of event time."""
    print(f"{'hour':>4}{'examples':>10}{'a second':>10}{'rows':>9}{'given out':>11}{'expired':>9}{'open':>8}{'memory, MB':>12}")
    for number, hour in hours.items():
        rate = hour.examples / max(hour.seconds, 1e-9)
        row = f"{number:4}{hour.examples:10,}{rate:10,.0f}{hour.rows:9,}{hour.fresh:11,}{hour.expired:9,}"
        print(f"{row}{hour.open_impressions:8,}{hour.mb:12.1f}")


def _check_whole(summary: Mapping[str, Any], examples: int) -> list[str]:
    """Returns how examples were lost; nothing if none was."""
    found = [f"{examples:,} impressions became {summary['examples']:,} examples"] if summary["examples"] != examples else []
    stream = summary["stream"]
    lost = {name: stream[name] for name in ("dropped_impressions", "skipped_messages") if stream.get(name)}
    found += [f"{count:,.0f} {name.replace('_', ' ')}" for name, count in lost.items()]
    return found + [f"{count:,} set aside: {reason}" for reason, count in summary["rejected"].items()]


def replay(asked: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """Runs all of it and prints what it saw; returns the figures, and how examples were lost.

    Raises:
        RuntimeError: The producer or the trainer failed.
    """
    workdir = asked.workdir.absolute()
    log, run, examples = workdir / "log", workdir / "run", round(asked.hours * 3600 * asked.rate)
    for folder in (log, run):
        shutil.rmtree(folder, ignore_errors=True)
    print(fill(f"file://{log}", examples, asked.rate), flush=True)
    published = ["Experiment.publisher=@PublisherConfig()", f"PublisherConfig.format={asked.format}"] if asked.serve else []
    trainer, server = start_trainer(f"file://{log}", run, asked.ttl_s, [*published, *asked.gin]), None
    try:
        if asked.serve:
            follower.keep_config(run, trainer)
            server = follower.start(run, "served")
        looks = watch(trainer, run / "metrics.jsonl")
        if trainer.returncode:
            raise RuntimeError(f"the trainer failed with status {trainer.returncode}:\n{(run / 'said.txt').read_text()}")
        served, unequal = compare_served(run, server, asked.format) if server else ({}, [])
    finally:
        for process in (trainer, *([server.process] if server else [])):
            if process.poll() is None:
                process.kill()
            process.wait()
    shutil.rmtree(log)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, summary = [row for row in rows if row["kind"] == "step"], rows[-1]
    hours = hours_of(steps, looks)
    show_hours(hours)
    lost = _check_whole(summary, examples)
    figures = {"hours": round((steps[-1]["event_time_ms"] - START_MS) / HOUR_MS, 2), "examples": summary["examples"]}
    figures |= figures_of(hours, asked.warm_h)
    figures |= {"rows_end": summary["rows"], "freed_at_cap": sum(row["freed_at_cap"] for row in steps)}
    figures |= {"refused": sum(row["refused_at_cap"] + row["refused_no_path"] for row in steps)}
    figures |= {
        "late_actions": summary["stream"].get("late_or_orphan_actions", 0.0),
        "rss_max_mb": max(one.mb for one in looks),
    }
    figures |= {"examples_per_s": summary["examples"] / summary["seconds"], "train_s": summary["seconds"]}
    return figures | served, lost + unequal


def compare_served(run: Path, server: follower.Follower, format: str) -> tuple[dict[str, float], list[str]]:
    """Ends a server that followed a trainer that has ended; returns its figures, and how it differs from the trainer."""
    told, held = follower.stop(server)
    step, live = follower.rows_of_snapshot(run, format)
    found = [f"served: {line}" for line in follower.differences(held, live)]
    if told["step"] != step:
        found.append(f"served: step {told['step']:,}, the trainer ended at {step:,}")
    figures = {"served_equal": not found, "served_rows": sum(rows.ids.size for rows in held.values())}
    figures |= {"deletions": told["applied_deleted"], "served_versions": told["applied_versions"], "faults": told["faults"]}
    return figures, found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 if no example was lost, and what was served is what was learned."""
    asked = _parsed(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    figures, lost = replay(asked)
    print("\n".join(lost) or f"no example lost: {figures['examples']:,} impressions, as many examples, none set aside")
    print(
        f"memory: {figures['rss_start_mb']:,.1f} MB after {asked.warm_h:g} h, {figures['rss_end_mb']:,.1f} MB at the end, "
        f"slope {figures['slope_mb_per_hour']:+.2f} MB an hour of event time (standard error {figures['slope_error']:.2f})"
    )
    print(
        f"rows: {figures['rows_max']:,} at most, {figures['rows_end']:,} at the end; {figures['ids_seen']:,} were given out, "
        f"{figures['expired']:,} expired, {figures['freed_at_cap']:,.0f} freed at the cap, {figures['refused']:,.0f} refused"
    )
    if asked.serve:
        print(
            f"served: {figures['served_rows']:,} rows {'equal' if figures['served_equal'] else 'DIFFER from'} the trainer's in "
            f"{asked.format} after {figures['served_versions']:,} versions with {figures['deletions']:,} deletions, "
            f"{figures['faults']:,} faults"
        )
    rounded = {name: round(value, 3) if math.isfinite(value) else None for name, value in figures.items()}
    if asked.serve:
        rounded["served_equal"] = bool(figures["served_equal"])
    print(json.dumps(rounded | {"ttl_s": asked.ttl_s, "rate": asked.rate, "warm_h": asked.warm_h, "whole": not lost}))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
