"""How fast events become examples, and how soon they are learned from: `python -m launch.bench.stream --help`.

In order: the joiner alone, in memory; the joiner with more open than its budget holds, which goes to disk; a log in a folder,
and a Kafka broker on this machine, each read from start to end as joined batches; and a producer of so many events a second, a
broker and a trainer at once, where an event's age is taken when the step that learned from it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = "example: python -m launch.bench.stream --workdir /tmp/stream --parts joiner,file,kafka,live"
PARTS = ("joiner", "spilled", "file", "kafka", "live")
WINDOW_S = 5.0
"""Join window of the live part."""
WARM_S = 20.0
"""What the live part leaves out at its start: compiling, and a backlog from then."""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.stream",
        description="Measures the way of events through log, joiner and batcher, and how late a gradient is.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder for logs and runs; its subfolders are replaced")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order (default: %(default)s)")
    parser.add_argument("--events", type=int, default=4_000_000, help="events in each log (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is read (default: %(default)s)")
    parser.add_argument("--open", type=int, default=10_000_000, help="open impressions of `spilled` (default: %(default)s)")
    parser.add_argument("--memory_mb", type=float, default=64.0, help="budget of `spilled` (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=10_000, help="events a second of `live` (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=80, help="length of `live` (default: %(default)s)")
    asked = parser.parse_args(argv)
    asked.parts = [part for part in asked.parts.split(",") if part]
    if unknown := [part for part in asked.parts if part not in PARTS]:
        parser.error(f"--parts has {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return asked


def drawn(number: int, size: int, open_cuts: int) -> tuple[Any, Any, int]:
    """Returns cut `number` of a made-up stream: impressions, twice as many actions of them, and the watermark.

    Args:
        number: Of the cut, from 0.
        size: Impressions in it.
        open_cuts: Cuts in a window of 600 s.
    """
    import numpy as np
    import pyarrow as pa

    from monolith_jax.stream.events import ACTION, ACTIONS

    rng, width = np.random.default_rng(number), 600_000 // open_cuts
    start = 1_700_000_000_000 + number * width
    ids = np.arange(number * size, (number + 1) * size)
    lists = pa.ListArray.from_arrays(np.arange(size + 1, dtype=np.int32) * 2, rng.integers(0, 1000, 2 * size))
    columns = {
        "event_time_ms": np.sort(rng.integers(start, start + width, size)),
        "request_id": ids // 8,
        **{f"{name}_id": rng.integers(0, 1 << 40, size) for name in ("user", "video", "author", "sound")},
        "tag_id": lists,
        "duration_ms": ids % 60_000,
        **{name: rng.random(size, np.float32) for name in ("ctr", "score", "age", "freshness")},
    }
    columns["video_id"] = ids * 7919
    # Most actions come soon: a tenth of a window later on average.
    ago = rng.exponential(0.1 * open_cuts * size, 2 * size).astype(np.int64)
    of = np.maximum(ids[-1] - ago, 0)
    names = pa.DictionaryArray.from_arrays(rng.integers(0, 10, 2 * size).astype(np.int32), ["play", "dwell", *ACTIONS])
    rows = (rng.integers(start, start + width, 2 * size), of // 8, of % 1000, of * 7919, names.dictionary_decode())
    rows = (*rows, rng.integers(0, 60_000, 2 * size), np.arange(number * 2 * size, (number + 1) * 2 * size))
    return (
        pa.RecordBatch.from_pydict(columns),
        pa.RecordBatch.from_arrays([pa.array(one) for one in rows], schema=ACTION),
        start,
    )


def join_drawn(folder: Path, num_open: int, memory_mb: float, windows: float) -> dict[str, float]:
    """Sends a made-up stream through a joiner; returns rates, in the window that fills it and after, and what it held."""
    from monolith_jax.stream.joiner import Joiner, JoinerConfig

    size = min(4096, num_open // 32)
    open_cuts = num_open // size
    rates: list[float] = []
    most_bytes = most_open = 0
    before_mb = anonymous_mb()
    most_mb = 0.0
    with closing(Joiner(JoinerConfig(window_s=600.0, memory_mb=memory_mb), folder)) as joiner:
        for number in range(int(open_cuts * windows)):
            impressions, actions, watermark = drawn(number, size, open_cuts)
            started = time.perf_counter()
            joiner.join(number, impressions, actions, watermark)
            if number >= open_cuts:
                rates.append(3 * size / (time.perf_counter() - started))
            most_bytes, most_open = max(most_bytes, joiner.memory_bytes), max(most_open, joiner.num_open)
            if number % 16 == 0:
                most_mb = max(most_mb, anonymous_mb() - before_mb)
        spilled = joiner.counts["spilled_bytes"]
    mean = 1 / statistics.fmean(1 / rate for rate in rates)
    return {"rate": mean, "open": most_open, "mb": most_bytes / 2**20, "anonymous_mb": most_mb, "spilled_mb": spilled / 2**20}


def anonymous_mb() -> float:
    """Returns this process's memory that is no file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def produce(url: str, *flags: str) -> subprocess.Popen[str]:
    """Starts a producer of the synthetic world, 500 impressions a second of event time."""
    command = [sys.executable, "-m", "launch.produce", "--gin_file=configs/quickstart.gin", f"--log={url}", "--partitions=2"]
    command += ["--gin.SyntheticConfig.events_per_s=500", "--gin.SyntheticConfig.num_examples=1000000000", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fill(url: str, events: int) -> None:
    """Fills a log with about so many events, in messages of 1,024.

    Raises:
        RuntimeError: The producer failed.
    """
    # The world has 3.5 events to an impression.
    process = produce(url, f"--max_examples={int(events / 3.5)}", "--batch_rows=1024")
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the producer failed:\n{out}\n{err}")


def read_batches(url: str, folder: Path) -> float:
    """Reads a log from start to end as joined batches of 512; returns events a second."""
    from monolith_jax.stream.batcher import batches
    from monolith_jax.stream.joiner import JoinerConfig
    from monolith_jax.stream.log_source import LogConfig, LogSource

    shutil.rmtree(folder, ignore_errors=True)
    source = LogSource(LogConfig(url=url, ends=True, joiner=JoinerConfig(window_s=60.0)), folder, 512)
    started, examples = time.perf_counter(), 0
    with closing(batches(source, 512)) as found:
        for batch in found:
            examples += batch.examples.num_rows
        counts = found.get_state()["position"]["counts"]
    seconds = time.perf_counter() - started
    assert examples == counts["impressions"] == counts["examples"], counts
    return (counts["impressions"] + counts["actions"]) / seconds


@contextmanager
def kafka(folder: Path) -> Any:
    """Yields the address of a broker of its own, or None where none can be started."""
    from launch.bench.kafka_broker import Broker, missing

    if why := missing():
        print(f"{'':10}  {why}")
        yield None
        return
    shutil.rmtree(folder, ignore_errors=True)
    broker = Broker(folder)
    broker.start()
    try:
        yield broker.url
    finally:
        broker.stop()


def live(url: str, workdir: Path, rate: int, seconds: int) -> dict[str, float]:
    """Trains on what a producer sends meanwhile; returns how old events were beyond the window when they were learned from."""
    run = workdir / "live"
    shutil.rmtree(run, ignore_errors=True)
    producer = produce(
        url, f"--rate={rate}", "--restamp", "--delay_s=1", "--linger_s=0.1", "--impressions=shown", "--actions=done"
    )
    time.sleep(3)
    overrides = {
        "LOG": url, "LogConfig.impressions": "shown", "LogConfig.actions": "done", "LogConfig.begin": "latest",
        "JoinerConfig.window_s": WINDOW_S, "TrainConfig.log_every": 1, "SnapshotConfig.period_steps": 500,
    }  # fmt: skip
    flags = [f"--gin.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "launch.train", "--gin_file=configs/online.gin", f"--workdir={run}", *flags]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        time.sleep(seconds + WARM_S)
    finally:
        trainer.terminate()
        text, _ = trainer.communicate()
        producer.terminate()
        producer.communicate()
    if trainer.returncode:
        raise RuntimeError(f"the trainer failed:\n{text}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    examples = steps[-1]["examples"]
    steps = [row for row in steps if row["examples"] >= examples * WARM_S / (seconds + WARM_S)]
    p99s = sorted(row["event_age_p99_s"] - WINDOW_S for row in steps)
    return {
        "p50_s": statistics.median(row["event_age_p50_s"] - WINDOW_S for row in steps),
        "p99_s": p99s[int(0.99 * (len(p99s) - 1))],
        "examples_per_s": sum(row["examples_per_s"] for row in steps) / len(steps),
        "late": steps[-1]["late_or_orphan_actions"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0."""
    asked = _parsed(argv)
    workdir = asked.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found: dict[str, Any] = {"events": asked.events, "rounds": asked.rounds}

    def show(name: str, text: str) -> None:
        print(f"{name:10}  {text}", flush=True)

    def median(name: str, measure: Callable[[], float], what: str) -> float:
        rates = [measure() for _ in range(asked.rounds)]
        show(name, f"{statistics.median(rates):>11,.0f} events/s ({min(rates):,.0f} to {max(rates):,.0f})  {what}")
        return statistics.median(rates)

    if "joiner" in asked.parts:
        join_drawn(workdir / "spill", 50_000, 1024.0, 1.5)  # Compiles.
        rate = median("joiner", lambda: join_drawn(workdir / "spill", 500_000, 1024.0, 3.0)["rate"], "in memory, 500,000 open")
        found["joiner_events_per_s"] = rate
    if "spilled" in asked.parts:
        held = join_drawn(workdir / "spill", asked.open, asked.memory_mb, 1.3)
        found |= {f"spilled_{name}": round(value, 1) for name, value in held.items()}
        text = f"{held['open']:,.0f} open in {held['mb']:.1f} MB by its account, {held['anonymous_mb']:.0f} MB of the process"
        show("spilled", f"{held['rate']:>11,.0f} events/s  {text}; {held['spilled_mb']:,.0f} MB written")
    if "file" in asked.parts:
        folder = workdir / "log"
        shutil.rmtree(folder, ignore_errors=True)
        fill(f"file://{folder}", asked.events)
        what = "file log to joined batches"
        found["file_events_per_s"] = median("file", lambda: read_batches(f"file://{folder}", workdir / "read"), what)
        shutil.rmtree(folder)
    if "kafka" in asked.parts or "live" in asked.parts:
        with kafka(workdir / "broker") as url:
            if url and "kafka" in asked.parts:
                fill(url, asked.events)
                what = "Kafka to joined batches, broker beside it"
                found["kafka_events_per_s"] = median("kafka", lambda: read_batches(url, workdir / "read"), what)
            if "live" in asked.parts:
                where = url or f"file://{workdir / 'live_log'}"
                ages = live(where, workdir, asked.rate, asked.seconds)
                found |= {f"event_to_gradient_{name}": round(value, 4) for name, value in ages.items()}
                text = f"p50 {ages['p50_s']:.3f} s, p99 {ages['p99_s']:.3f} s beyond the window of {WINDOW_S:.0f} s"
                show("live", f"{asked.rate:,} events/s from {where.partition(':')[0]}: {text}; late {ages['late']:.0f}")
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
