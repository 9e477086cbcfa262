"""Closes the loop over a synthetic world, in one process: `python -m launch.closed_loop --help`.

    request -> feed -> simulated user -> impressions and actions -> log -> joiner -> trainer -> deltas -> next feed

First a model is trained in batch on the world's own log of some hours (`warm`). Then users ask, and by the same requests three
policies live beside the system: random, popularity, and an oracle that knows what each video is worth. In: an experiment over a
synthetic world, with a way to serve. Out: a table by hour, `closed_loop.jsonl` and `closed_loop.png` in the folder, and
`online/`, a run folder as any other.

The same seed gives the same requests, and the same rows of random, popularity and oracle, bit for bit. The system's are a
function of the events as well, but for what a busy machine may move: where a batch is cut short because the log came late, and
the last bits of sums.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.cli import gin_parser, parse_gin
from launch.loop.report import POLICIES, draw, table
from launch.points.closed_loop import ClosedLoopPoint

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa
    from rich.console import Console

    from launch.loop.system import System
    from launch.loop.trainer import Trainer
    from monolith_jax.evaluate.replay import Ask, Ledger, Popularity, Requests, Reward, Seen
    from monolith_jax.experiment import Experiment
    from monolith_jax.stream.log_source import LogConfig
    from monolith_jax.stream.synthetic import SyntheticConfig

EXAMPLE = "python -m launch.closed_loop --gin_file=configs/closed_loop.gin --workdir=checkpoints/closed_loop"
_PARTS = ("log", "warm", "online", "deltas")
_FLAGS = ("hours", "requests_per_hour", "warm_hours", "sync_s", "timeout_s")


def checked(experiment: Experiment) -> tuple[SyntheticConfig, Reward]:
    """Returns the world of an experiment, and what an impression is worth by its value weights.

    Those of `RankConfig` for all users, without `interest_weight`, which is worth nothing by itself.

    Raises:
        ValueError: There is no loop to be made of it.
    """
    from monolith_jax.evaluate.replay import Reward
    from monolith_jax.stream.synthetic import SyntheticConfig

    source, serving = experiment.source, experiment.serving
    if not isinstance(source, SyntheticConfig):
        raise ValueError(
            f"Experiment.source is a {type(source).__name__}; only a synthetic world tells what a user would have done with "
            "another video: set Experiment.source=@SyntheticConfig()"
        )
    if serving is None or serving.rank is None or experiment.model is None:
        raise ValueError(
            "the loop needs a ranker and a way to serve: set Experiment.model, Experiment.serving=@ServingConfig() and "
            "ServingConfig.rank=@RankConfig(), whose weights say what an impression is worth; configs/closed_loop.gin shows how"
        )
    if experiment.counters is not None:
        raise ValueError("Experiment.counters is set, and feeds do not log counters yet: a loop cannot be trained with them")
    return source, Reward(serving.rank.heads, serving.rank.weights, serving.rank.play_s_weight)


class _Life:
    """A policy with all that it has shown."""

    def __init__(self, name: str, pick: Callable[[Ask], np.ndarray], seen: Seen) -> None:
        self.name, self.pick, self.seen = name, pick, seen


def _log_config(point: ClosedLoopPoint, url: str) -> LogConfig:
    """Returns how the log is read: what comes of it depends on the events, not on how fast they are read."""
    from monolith_jax.stream.joiner import JoinerConfig
    from monolith_jax.stream.log_source import LogConfig

    never, all_there_is = 1e9, 1 << 26
    return LogConfig(
        url=url, joiner=JoinerConfig(window_s=point.window_s), max_wait_s=0.2, idle_s=never, ahead_s=never,
        poll_messages=all_there_is, poll_bytes=all_there_is,
    )  # fmt: skip


def _warm(experiment: Experiment, world: SyntheticConfig, folder: Path) -> None:
    """Trains in batch on the world's own log, and publishes the model once."""
    from rich.console import Console

    from launch.run import train
    from monolith_jax.sync.schedule import PublisherConfig

    run = replace(experiment.train, steps=0, warm_start="", max_lag_s=float("inf"))
    publisher = PublisherConfig(str(folder / "deltas"), period_s=1e9, dense_period_s=1e9)
    whole = replace(experiment, source=world, test_source=None, train=run, publisher=publisher)
    if not train(whole, folder / "warm", Console(quiet=True)):
        raise KeyboardInterrupt  # A run takes SIGTERM for itself, and returns without totals.


def _online(experiment: Experiment, source: LogConfig, folder: Path) -> Experiment:
    """Returns the run over the log: histories come with the impressions, as they were when they were shown."""
    from monolith_jax.sync.schedule import PublisherConfig

    run = replace(experiment.train, steps=0, warm_start=str(folder / "warm"), max_lag_s=float("inf"), partitions=1)
    publisher = PublisherConfig(str(folder / "deltas"), period_s=0.02, dense_period_s=0.02, format="float32")
    return replace(experiment, source=source, test_source=None, history=None, train=run, publisher=publisher)


def close_loop(
    experiment: Experiment, point: ClosedLoopPoint, folder: Path, console: Console, seed: int = 0
) -> list[dict[str, Any]]:
    """Runs the loop from its start; what an earlier try left in the folder is replaced.

    Args:
        experiment: Over a synthetic world, with a ranker and `serving`.
        point: How long, and how fine.
        folder: Where the runs, the log and the rows go.
        console: Where progress goes.
        seed: Of the requests; the world has its own.

    Returns:
        Rows of kind "hour", one an hour and policy (`evaluate.replay.Ledger.rows`), and of kind "total", one a policy.

    Raises:
        ValueError: No loop can be made of the experiment, or the trainer brings nothing for too long.
    """
    from launch.loop.trainer import Trainer
    from launch.process import prepare
    from launch.run import alone
    from monolith_jax.evaluate.replay import examples_before, requests_of
    from monolith_jax.stream import world

    config, reward = checked(experiment)
    begin_ms = config.start_ms + round(point.warm_hours * world.HOUR_MS)
    if begin_ms + point.hours * world.HOUR_MS > 1000 * time.time():
        raise ValueError(
            f"the loop would end {point.warm_hours + point.hours:g} hours after SyntheticConfig.start_ms {config.start_ms}, in "
            "the future; a log sets events of the future aside: begin earlier"
        )
    requests = requests_of(config, begin_ms, point.hours, point.requests_per_hour, seed)
    if not requests.time_ms.size:
        raise ValueError(
            f"nobody asks in {point.hours} hours of {point.requests_per_hour:g} requests: raise hours or requests_per_hour"
        )
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(experiment.mesh)
    past = replace(config, num_examples=examples_before(config, begin_ms))
    source = _log_config(point, f"file://{folder / 'log'}")
    with ExitStack() as opened:
        opened.enter_context(alone(folder))
        _clear(folder)
        _make_topics(source)
        console.print(f"training on {past.num_examples:,} impressions of the world's own", highlight=False)
        _warm(experiment, past, folder)
        trainer = None
        if point.learns:
            trainer = Trainer(_online(experiment, source, folder), folder / "online", point.timeout_s)
            opened.callback(trainer.stop)
        loop = _Loop(experiment, config, begin_ms, reward, source, point, folder, trainer)
        opened.callback(loop.system.close)
        loop.remember(past)
        return loop.run(requests, console)


def _clear(folder: Path) -> None:
    """Takes away what an earlier try left."""
    rows = folder / "closed_loop.jsonl"
    there = [name for name in _PARTS if (folder / name).exists()]
    if there and not rows.exists():
        raise ValueError(f"{folder} has {', '.join(there)} of something else, which a loop would replace: take another folder")
    rows.write_text("")
    for name in there:
        shutil.rmtree(folder / name)


def _make_topics(source: LogConfig) -> None:
    from monolith_jax.stream.log import open_producer

    producer = open_producer(source.url)
    for topic in (source.impressions, source.actions):
        producer.create(topic, 1)
    producer.close()


class _Loop:
    """The lives of all policies."""

    def __init__(
        self, experiment: Experiment, config: SyntheticConfig, begin_ms: int, reward: Reward, source: LogConfig,
        point: ClosedLoopPoint, folder: Path, trainer: Trainer | None,
    ) -> None:  # fmt: skip
        """Opens the system; nobody has seen anything."""
        from launch.loop.system import System
        from monolith_jax.evaluate.replay import Popularity, Seen, pick_oracle, pick_random

        self._config, self._begin_ms, self._reward, self._point, self._folder = config, begin_ms, reward, point, folder
        serving = experiment.serving
        assert serving is not None
        # All vectors of the index are made anew whenever users have waited: the dense weights move them all.
        served = replace(experiment, serving=replace(serving, refresh_per_s=1 << 30))
        self.system: System = System(served, config, source, folder / "deltas", trainer)
        self._popularity: Popularity = Popularity(3600 * point.half_life_h)
        picks = (pick_random, self._popularity.pick, self.system.pick, pick_oracle)
        self._lives = [_Life(name, pick, Seen()) for name, pick in zip(POLICIES, picks, strict=True)]

    def remember(self, past: SyntheticConfig) -> None:
        """Tells all policies what happened before the loop."""
        from monolith_jax.evaluate.replay import live_videos
        from monolith_jax.stream import world
        from monolith_jax.stream.synthetic import SyntheticSource

        # Before what was shown of them: so it is known when they came.
        self.system.stock(live_videos(self._config, self._begin_ms), self._begin_ms)
        for chunk in SyntheticSource(past).read({}):
            self.system.remember(chunk.examples)
            user, video = (
                world.indexes_of(past.seed, space, chunk.examples.column(f"{space}_id").to_numpy())
                for space in ("user", "video")
            )
            self._popularity.learn(video, chunk.examples)
            for life in self._lives:
                life.seen.add(user, video)

    def run(self, requests: Requests, console: Console) -> list[dict[str, Any]]:
        """Runs all hours; returns the rows."""
        from monolith_jax.evaluate.replay import Ledger, live_videos
        from monolith_jax.stream import world

        begin_ms = self._begin_ms
        ledger, began_s, tick, hour = Ledger(self._config, begin_ms), time.monotonic(), -1, 0
        rows: list[dict[str, Any]] = []
        live = np.zeros(0, np.int64)
        with (self._folder / "closed_loop.jsonl").open("w", encoding="utf-8") as file:

            def end_hour(number: int) -> None:
                of_hour = [{"kind": "hour", **row} for row in ledger.rows(number)]
                rows.extend(of_hour)
                file.writelines(json.dumps(row) + "\n" for row in of_hour)
                file.flush()
                self._tell(of_hour, console, time.monotonic() - began_s)

            for number, (time_ms, user) in enumerate(zip(requests.time_ms.tolist(), requests.user.tolist(), strict=True)):
                at_tick = int((time_ms - begin_ms) / (1000 * self._point.sync_s))
                if at_tick > tick:
                    tick, start_ms = at_tick, begin_ms + round(1000 * at_tick * self._point.sync_s)
                    live = live_videos(self._config, start_ms)
                    self.system.learn(start_ms)
                    self.system.stock(live, start_ms)
                    if number == 0:
                        self.system.pipeline.build_index(start_ms)
                now = (time_ms - begin_ms) // world.HOUR_MS
                for before in range(hour, now):
                    end_hour(before)
                hour = now
                self._serve(number, time_ms, user, live, ledger)
            self.system.learn(begin_ms + self._point.hours * world.HOUR_MS)
            for before in range(hour, self._point.hours):
                end_hour(before)
            totals = [{"kind": "total", **row} for row in ledger.totals()]
            file.writelines(json.dumps(row) + "\n" for row in totals)
            file.write(json.dumps({"kind": "system", **self.system.metrics()}) + "\n")
        return rows + totals

    def _serve(self, number: int, time_ms: int, user: int, live: np.ndarray, ledger: Ledger) -> None:
        """Answers a request in all lives."""
        from monolith_jax.evaluate.replay import Ask
        from monolith_jax.stream.synthetic import examples_of

        worth = self._reward.expected(self._config, time_ms, user, live)
        for life in self._lives:
            ask = Ask(number, time_ms, user, self._point.number, live, worth, life.seen.unseen(user, live))
            video = life.pick(ask)
            users = np.full(video.size, user)
            examples: pa.RecordBatch = examples_of(self._config, np.full(video.size, time_ms), users, video)
            ledger.book(life.name, ask, video, self._reward.realised(examples))
            life.seen.add(users, video)
            if life.name == "popularity":
                self._popularity.learn(video, examples)
            if life.name == "system":
                self.system.follow(examples)

    def _tell(self, rows: Sequence[Mapping[str, Any]], console: Console, seconds: float) -> None:
        if rows:
            told = "  ".join(f"{row['policy']} {row['reward']:.3f}" for row in rows)
            learned = f"{self.system.learned:,} examples learned"
            console.print(f"hour {rows[0]['hour']:>3}  reward: {told}  {learned}, {seconds:.0f} s", highlight=False)


def _parsed(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    does = "Runs a closed loop over a synthetic world: feeds, simulated users, training on what they did, the next feeds."
    parser = gin_parser(does, EXAMPLE, "--workdir=FOLDER [--hours N] [--requests_per_hour M] [--warm_hours N] [--sync_s S]")
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER", help="its runs and log are replaced")
    plain = ClosedLoopPoint()
    said = (
        *("hours of event time", "requests an hour, averaged over a day", "hours of the world's own log to begin with"),
        *("seconds of event time after which users wait for the trainer", "seconds to wait for it while it brings nothing"),
    )
    for name, help in zip(_FLAGS, said, strict=True):
        kind = type(getattr(plain, name))
        parser.add_argument(f"--{name}", type=kind, default=getattr(plain, name), metavar="N", help=f"{help} (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests (%(default)s)")
    parser.add_argument("--frozen", action="store_true", help="learn nothing in the loop: serve what was learned before")
    flags = [option for action in parser._actions for option in action.option_strings]
    return parse_gin(parser, argv, flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    asked, overrides = _parsed(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console

    from launch.process import USER_ERRORS
    from monolith_jax.experiment import load

    console = Console(width=None if sys.stdout.isatty() else 160)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        point = ClosedLoopPoint(**{name: getattr(asked, name) for name in _FLAGS}, learns=not asked.frozen)
        began_s = time.monotonic()
        rows = close_loop(load(asked.gin_file, overrides), point, asked.workdir, console, asked.seed)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the rows so far are in closed_loop.jsonl. A loop starts from its beginning", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print(table(rows))
    figure = asked.workdir / "closed_loop.png"
    try:
        draw(rows, figure)
        console.print(f"figure: {figure}", soft_wrap=True, highlight=False)
    except ImportError:
        console.print("no figure: it needs matplotlib, pip install 'monolith_jax[report]'", highlight=False)
    found = {f"{row['policy']}_{name}": row[name] for row in rows if row["kind"] == "total" for name in ("reward", "regret")}
    found["advantage"] = next(row["advantage"] for row in rows if row["kind"] == "total" and row["policy"] == "system")
    print(
        json.dumps({name: round(value, 4) for name, value in found.items()} | {"seconds": round(time.monotonic() - began_s, 1)})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
