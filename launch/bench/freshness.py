"""How long it takes from an event to a request that feels it: `python -m launch.bench.freshness --help`.

Three processes: a producer that writes events of the synthetic world into a log at a steady rate, and ten times a second shows
a video that nobody has seen; a trainer that learns online and publishes; a server that follows the deltas and is asked for
these videos all the time. A video's id is the tenth of a second in which its impression was written, so a request that knows
the video tells how old the event is, up to 0.1 s too much. The join window is zero: an example is learned when time has passed
its impression by a millisecond.

Then, in the same minutes and by turns, the quickstart with and without publishing: what publishing costs a step. Bytes are
those of the paper's example, 100,000 ids of dim 1024 a minute (Monolith, arXiv 2209.07663, section 3.2.2).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench.serve_apply import Sizes, measure

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = "example: python -m launch.bench.freshness --workdir /tmp/freshness --seconds 60"
MARK_MS = 100
"""A video that nobody has seen is shown so often."""
WARM_S = 25.0
"""What is left out at the start, while programs are compiled."""


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.freshness",
        description="Measures the time from an event's write to the first request that feels it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder for log and run; its subfolders are replaced")
    parser.add_argument("--seconds", type=int, default=60, help="of measuring (default: %(default)s)")
    parser.add_argument("--rate", type=int, default=1000, help="impressions a second (default: %(default)s)")
    parser.add_argument("--period_s", type=float, default=0.25, help="between publications (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs for the step's time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of each of these runs (default: %(default)s)")
    parser.add_argument("--role", choices=("produce", "serve"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def produce(log: str, rate: int) -> None:
    """Writes events until it is ended: the world's, with times of now, and impressions of new videos."""
    import numpy as np
    import pyarrow as pa

    from monolith_jax.stream.feed import Outlet
    from monolith_jax.stream.formats import Schemas
    from monolith_jax.stream.log import open_log, open_producer
    from monolith_jax.stream.replayed import actions_of, impressions_of
    from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource

    producer = open_producer(log)
    for topic in ("impressions", "actions"):
        producer.create(topic, 1)
    outlets = [Outlet(producer, Schemas(open_log(log), topic), topic, 1, "arrow", 1024) for topic in ("impressions", "actions")]
    size = max(rate // 20, 2)
    chunks = SyntheticSource(SyntheticConfig(num_examples=1 << 40, chunk_rows=size)).read({})
    for number, chunk in enumerate(chunks):
        now_ms = int(1000 * time.time())
        examples = chunk.examples
        times = now_ms - 50 + np.arange(size) * 50 // size
        examples = examples.set_column(0, examples.schema.field("event_time_ms"), pa.array(times))
        if number % (MARK_MS // 50) == 0:
            videos = examples.column("video_id").to_numpy().copy()
            # Its time stays that of now: an older one would be late in a window of a millisecond, and half of them dropped.
            videos[-1] = now_ms // MARK_MS * MARK_MS
            at = examples.schema.get_field_index("video_id")
            examples = examples.set_column(at, examples.schema.field(at), pa.array(videos))
        impressions = impressions_of(examples, number * size)
        actions, _ = actions_of(examples, impressions)
        for outlet, batch in zip(outlets, (impressions, actions), strict=True):
            outlet.add(batch)
            outlet.send_rest()
        producer.flush()
        time.sleep(max(0.05 - (time.time() - now_ms / 1000), 0.0))


def serve(workdir: Path, seconds: float) -> None:
    """Follows the deltas of a run and asks for new videos; prints a line of JSON when it ends."""
    import numpy as np

    from monolith_jax.experiment import load
    from monolith_jax.serve.served_model import ServedModel

    experiment = load([workdir / "config.gin"])
    while True:
        try:
            model = ServedModel(
                workdir / "deltas", experiment.features, experiment.tables, experiment.model, experiment.heads,
                num_shards=experiment.mesh.num_shards, batch_sizes=(64,),
            )  # fmt: skip
            break
        except ValueError:
            time.sleep(0.2)  # There is no base yet.
    model.watch(0.02)
    ages: list[float] = []
    next_ms = int(1000 * time.time()) // MARK_MS * MARK_MS
    until = time.time() + seconds
    while time.time() < until:
        asked = np.arange(next_ms, int(1000 * time.time()), MARK_MS)
        if asked.size:
            _, found = model.vectors("video", asked)
            now_ms = 1000 * time.time()
            for video in asked[found].tolist():
                ages.append((now_ms - video) / 1000)
            # A producer that was late leaves some out.
            next_ms = int(asked[found][-1]) + MARK_MS if found.any() else next_ms
        time.sleep(0.005)
    told = model.metrics()
    model.close()
    print(
        json.dumps({"ages": ages, "versions": told["applied_versions"], "rows": told["applied_rows"], "faults": told["faults"]})
    )


def start(role: str, asked: argparse.Namespace, seconds: float = 0) -> subprocess.Popen[str]:
    """Starts this file in another role."""
    command = [sys.executable, "-m", "launch.bench.freshness", f"--workdir={asked.workdir.absolute()}", f"--role={role}"]
    command += [f"--rate={asked.rate}", f"--seconds={int(seconds)}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def freshness(asked: argparse.Namespace) -> dict[str, Any]:
    """Runs the three processes; returns what the server saw, and the trainer's step rows."""
    workdir = asked.workdir.absolute()
    for name in ("log", "run"):
        shutil.rmtree(workdir / name, ignore_errors=True)
    producer = start("produce", asked)
    time.sleep(3)
    overrides = {
        "LOG": f"file://{workdir / 'log'}", "JoinerConfig.window_s": 0.001, "LogConfig.max_wait_s": 0.05,
        "Experiment.publisher": "@PublisherConfig()", "PublisherConfig.period_s": asked.period_s, "TrainConfig.log_every": 10,
        "video/TableConfig.max_rows": 60_000, "SnapshotConfig.period_steps": 1000,
    }  # fmt: skip
    flags = [f"--gin.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "launch.train", "--gin_file=configs/online.gin", f"--workdir={workdir / 'run'}", *flags]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        time.sleep(WARM_S)
        server = start("serve", asked, asked.seconds)
        seen, _ = server.communicate()
    finally:
        for process in (trainer, producer):
            process.terminate()
        text, _ = trainer.communicate()
        producer.communicate()
    if trainer.returncode or server.returncode:
        raise RuntimeError(f"the trainer or the server failed:\n{text}")
    return json.loads(seen)


def step_time_lost(asked: argparse.Namespace) -> float:
    """Returns by how much publishing makes the quickstart slower, the median of runs by turns."""
    ratios = []
    for _ in range(asked.rounds + 1):  # The first pair compiles.
        rates = []
        for publisher in ("None", "@PublisherConfig()"):
            folder = asked.workdir.absolute() / "quickstart"
            shutil.rmtree(folder, ignore_errors=True)
            flags = [f"--gin.Experiment.publisher={publisher}", f"--gin.TrainConfig.steps={asked.steps}"]
            flags += ["--gin.TrainConfig.log_every=10", "--gin.SnapshotConfig.period_steps=0"]
            flags += [f"--gin.PublisherConfig.period_s={asked.period_s}"] if publisher != "None" else []
            command = [sys.executable, "-m", "launch.train", "--gin_file=configs/quickstart.gin", f"--workdir={folder}", *flags]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            # Later rows: the first steps compile.
            seen = [row["examples_per_s"] for row in rows if row["kind"] == "step" and row["step"] > asked.steps // 3]
            rates.append(statistics.median(seen))
        ratios.append(1 - rates[1] / rates[0])
    return statistics.median(ratios[1:])


def paper_example(format: str) -> float:
    """Returns the bytes, in MB, of a delta of 100,000 ids of dim 1024."""
    import numpy as np

    from monolith_jax.sync.delta import Content, DeltaFolder, Rows, Version

    rng = np.random.default_rng(0)
    rows = Rows(rng.permutation(1 << 20)[:100_000].astype(np.int64), rng.standard_normal((100_000, 1024), np.float32), None)
    with tempfile.TemporaryDirectory() as folder:
        DeltaFolder(folder).write_part(Version(1, 0), 0, Content(rows={"video": rows}, deleted={}, dense=None), format)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, or one of its processes; returns 0."""
    asked = _parsed(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if asked.role == "produce":
        produce(f"file://{asked.workdir / 'log'}", asked.rate)
        return 0
    if asked.role == "serve":
        serve(asked.workdir / "run", asked.seconds)
        return 0
    seen = freshness(asked)
    ages = sorted(seen["ages"])
    found: dict[str, Any] = {f"freshness_p{share}_s": ages[int(share / 100 * (len(ages) - 1))] for share in (50, 99)}
    found |= {"events": len(ages), "versions": seen["versions"], "rows": seen["rows"], "faults": seen["faults"]}
    half, most = found["freshness_p50_s"], found["freshness_p99_s"]
    print(f"freshness      p50 {half:.3f} s, p99 {most:.3f} s, {len(ages)} new videos")
    rows = seen["rows"] / max(seen["versions"], 1)
    print(f"               {seen['versions']} versions of {rows:,.0f} rows, {seen['faults']} faults")
    found["mb_per_min_fp16"], found["mb_per_min_int8"] = paper_example("float16"), paper_example("int8")
    print(f"100,000 x 1024 {found['mb_per_min_fp16']:.1f} MB float16, {found['mb_per_min_int8']:.1f} MB int8")
    sizes = Sizes(200_000, 20, 50_000, 256, 0.02)
    found["apply_rows_per_s"] = measure(sizes, 1, 2.0, lambda text: None)["apply_rows_per_s"]
    print(f"applied        {found['apply_rows_per_s']:,.0f} rows/s of dim 16, requests going on")
    if asked.rounds:
        found["step_time_lost"] = step_time_lost(asked)
        print(f"step time lost {100 * found['step_time_lost']:.1f} %")
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
