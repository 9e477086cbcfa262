"""Feeds the events of a source into a log: `python -m launch.produce --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from launch import cli

if TYPE_CHECKING:
    from monolith_jax.stream.feed import Feed, Outlet, Pace
    from monolith_jax.types import Source

EXAMPLE = "python -m launch.produce --gin_file=configs/quickstart.gin --log=file:///tmp/log --speed=3600 --max_examples=100000"
FLAGS = (
    *("--gin_file", "--log", "--option", "--impressions", "--actions", "--partitions", "--format", "--speed", "--rate"),
    *("--restamp", "--batch_rows", "--linger_s", "--max_examples", "--delay_s", "--shuffle_s", "--help"),
)
_LINE_EVERY_S = 10.0
_USAGE = "--log=URL [--speed=X | --rate=N] [--format=arrow] [...]"
_WHAT = (
    "Takes the examples of Experiment.source apart into impressions and actions, and appends them to a log, users to "
    "partitions by their ids. Ends with the source's first pass; ctrl-C and SIGTERM end it earlier, nothing sent is lost."
)


def _parser() -> argparse.ArgumentParser:
    parser = cli.gin_parser(_WHAT, EXAMPLE, _USAGE)
    parser.add_argument("--log", required=True, metavar="URL", help="file:///folder or kafka://host:port,host:port")
    of_log = "an option of the log's client; may be repeated"
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=of_log)
    parser.add_argument("--impressions", default="impressions", metavar="TOPIC", help="(%(default)s)")
    parser.add_argument("--actions", default="actions", metavar="TOPIC", help="(%(default)s)")
    parser.add_argument("--partitions", type=int, default=4, metavar="N", help="of each topic, if it is new (%(default)s)")
    parser.add_argument("--format", default="arrow", help="arrow, json, protobuf or debezium (%(default)s)")
    pace = parser.add_argument_group("pace")
    speed = "seconds of the events' time in a second: 1 as they happened, 60 a minute a second, 0 as fast as it goes (0)"
    pace.add_argument("--speed", type=float, default=0.0, metavar="X", help=speed)
    pace.add_argument("--rate", type=float, default=0.0, metavar="N", help="events in a second instead, whatever their time")
    pace.add_argument("--restamp", action="store_true", help="events happen when they are sent: for trials in real time")
    delay = "mean delay of an action behind its impression, exponential; in the events' time, with --rate in true time (0)"
    pace.add_argument("--delay_s", type=float, default=0.0, metavar="S", help=delay)
    pace.add_argument("--shuffle_s", type=float, default=0.0, metavar="S", help="disorder: each is sent up to S s late (0)")
    pace.add_argument(
        "--batch_rows", type=int, default=1024, metavar="N", help="events of a message, at most 4096 (%(default)s)"
    )
    pace.add_argument(
        "--linger_s", type=float, default=0.1, metavar="S", help="longest wait of an event for a batch (%(default)s)"
    )
    pace.add_argument("--max_examples", type=int, metavar="N", help="examples of the source, else all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    asked, overrides = cli.parse_gin(_parser(), argv, FLAGS)
    # Imported late: --help answers at once.
    from launch.readers import log_of, open_source
    from monolith_jax.experiment import load

    try:
        _check(asked)
        pace = _pace(asked)
        source = load(asked.gin_file, overrides).source
        if log := log_of(source):
            raise ValueError(f"Experiment.source is the log {log.url}; name a config whose source makes examples, or files")
        produce(asked, open_source(source), pace)
    except (ValueError, OSError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _check(asked: argparse.Namespace) -> None:
    from monolith_jax.stream.formats import MAX_ROWS, check_format

    check_format(asked.format)
    if asked.partitions < 1:
        raise ValueError(f"--partitions is {asked.partitions}; a topic has one at least")
    if not 1 <= asked.batch_rows <= MAX_ROWS:
        raise ValueError(f"--batch_rows is {asked.batch_rows}; a message has from 1 to {MAX_ROWS} events")
    if asked.max_examples is not None and asked.max_examples < 1:
        raise ValueError(f"--max_examples is {asked.max_examples}; expected 1 or more, or no such flag for all")
    if asked.impressions == asked.actions:
        raise ValueError(f"--impressions and --actions are both {asked.impressions!r}; they are topics of different events")
    for option in asked.option:
        if not option.partition("=")[1] or option.startswith("="):
            raise ValueError(f"--option {option}: expected NAME=VALUE, such as linger.ms=5")


def _pace(asked: argparse.Namespace) -> Pace:
    from monolith_jax.stream.feed import Pace

    named = {name: getattr(asked, name) for name in ("speed", "rate", "restamp", "delay_s", "shuffle_s", "linger_s")}
    try:
        return Pace(**named)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def produce(asked: argparse.Namespace, source: Source, pace: Pace) -> None:
    """Feeds a source into a log until it ends, or a signal comes.

    Args:
        asked: The command line.
        source: The examples.
        pace: When events are sent.

    Raises:
        ValueError: A topic has other partitions, or the examples cannot become events.
        OSError: The log does not take them.
    """
    from monolith_jax.stream.feed import Feed, Outlet
    from monolith_jax.stream.formats import Schemas
    from monolith_jax.stream.log import open_log, open_producer

    options = [tuple(option.split("=", 1)) for option in asked.option]
    producer = open_producer(asked.log, options)
    try:
        producer.create(asked.impressions, asked.partitions)
        log = open_log(asked.log, options)
        impressions, actions = (
            Outlet(producer, Schemas(log, topic), topic, asked.partitions, asked.format, asked.batch_rows)
            for topic in (asked.impressions, asked.actions)
        )
        feed = Feed(producer, impressions, actions, pace)
        total = source.num_examples
        most = min(one for one in (asked.max_examples, total, sys.maxsize) if one is not None)
        began = time.monotonic()
        with _stopped() as stopped, _progress(feed, most if total or asked.max_examples else None) as told:
            whole = feed.run(source.read({}), most, stopped.wait, told)
        log.close()
    finally:
        producer.close()
    _tell(feed, impressions, actions, time.monotonic() - began, "the source ended" if whole else "stopped")


def _tell(feed: Feed, impressions: Outlet, actions: Outlet, seconds: float, why: str) -> None:
    left = f", {feed.waiting:,} events were not due yet" if feed.waiting else ""
    size = (impressions.bytes + actions.bytes) / 1e6
    print(
        f"{why}: {feed.examples:,} examples, {impressions.events:,} impressions and {actions.events:,} actions in "
        f"{impressions.messages + actions.messages:,} messages, {size:,.1f} MB, {seconds:.1f} s, "
        f"{feed.events / max(seconds, 1e-9):,.0f} events/s{left}"
    )
    for reason, count in feed.set_aside.most_common():
        print(f"set aside by the source: {count:,} {reason}")


@contextmanager
def _stopped() -> Iterator[threading.Event]:
    """Yields what SIGINT and SIGTERM set."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(feed: Feed, total: int | None) -> Iterator:
    """Yields what shows how far the feed is: a line that is rewritten in a terminal, else one every ten seconds."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
    began = shown = time.monotonic()

    def told() -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (0.25 if live else _LINE_EVERY_S):
            return
        shown = now
        seconds = now - began
        left = ""
        if total and feed.examples:
            rest = int((total - feed.examples) * seconds / feed.examples)
            left = f"  {rest // 60}:{rest % 60:02d} left"
        rate = feed.events / seconds
        line = f"{feed.examples:,} examples  {feed.events:,} events  {rate:,.0f}/s  {feed.waiting:,} waiting{left}"
        if live:
            live.update(Text(line))
        else:
            console.print(line, highlight=False)

    if live:
        live.start()
    try:
        yield told
    finally:
        if live:
            live.stop()


if __name__ == "__main__":
    sys.exit(main())
