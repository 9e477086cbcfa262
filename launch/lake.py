"""Writes and keeps the lake: `python -m launch.lake --help`.

In: an experiment whose source is a `LakeConfig` with a log. Out: the tables of its warehouse, written by jobs, each of which
may run alone or with others in one process, is killed at any moment and goes on where its tables end:

* `ingest`: from the log, `events`, what users did last and how often videos were watched;
* `examples`: from the log, `examples`, joined as training joins them;
* `profiles`: from PostgreSQL, the profiles of users and videos;
* `tidy`: brings small files together, and removes what is old;
* `agreement`: checks that impressions were served with the features that history has for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import cli

if TYPE_CHECKING:
    from monolith_jax.lake.history import LakeConfig
    from monolith_jax.lake.jobs import LakeJobsConfig

EXAMPLE = "python -m launch.lake ingest examples --gin_file=configs/train_lake.gin --workdir=checkpoints/lake --until_end"
JOBS = ("ingest", "examples", "profiles", "tidy", "agreement")
COMMANDS = (*JOBS, "show", "tag")
FLAGS = ("--gin_file", "--workdir", "--until_end", "--postgres", "--name", "--help")
_WHAT = (
    "Writes the lake of an experiment (LakeConfig) from its log: ingest, examples, profiles, tidy and agreement are jobs, of "
    "which one or several run in this process until ctrl-C or SIGTERM; all go on where the tables end. On a local disk they "
    "may run as processes of their own; in an object store, one process writes a table. show tells what the tables hold, and "
    "tag keeps them as they are now under a name (LakeConfig.as_of)."
)
_USAGE = "--workdir=FOLDER [--until_end] [...] JOB [JOB ...]"
_EPOCH_BYTES, _EPOCH_ROWS = 64 << 20, 1 << 20
_LINE_EVERY_S = 10.0
_AWAY_S = 30.0
"""`profiles --until_end` gives up when there was no database for so long at the start."""


def _parser() -> argparse.ArgumentParser:
    parser = cli.gin_parser(_WHAT, EXAMPLE, _USAGE)
    parser.add_argument("jobs", nargs="+", choices=COMMANDS, metavar="JOB", help=", ".join(COMMANDS))
    parser.add_argument(
        "--workdir", type=Path, metavar="FOLDER", help="for what was set aside and what the joiner spills; jobs need one"
    )
    parser.add_argument("--until_end", action="store_true", help="ends where log and tables end now; tidy tidies once")
    parser.add_argument("--postgres", metavar="DSN", help="profiles: over PostgresConfig.dsn, 'host=127.0.0.1 dbname=app'")
    parser.add_argument("--name", metavar="NAME", help="tag: what it is called")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    asked, overrides = cli.parse_gin(_parser(), argv, FLAGS)
    # Imported late: --help answers at once.
    from monolith_jax.experiment import load
    from monolith_jax.lake.history import LakeConfig

    try:
        experiment = load(asked.gin_file, overrides)
        source = experiment.source
        if not isinstance(source, LakeConfig):
            raise ValueError(
                f"Experiment.source is a {type(source).__name__}; expected a LakeConfig, as configs/train_lake.gin has"
            )
        asked.partitions = experiment.train.partitions
        if asked.postgres:
            source = dataclasses.replace(source, jobs=_with_postgres(source.jobs, asked.postgres))
        _check(asked, source)
        _run(asked, source)
    except (ValueError, OSError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _check(asked: argparse.Namespace, lake: LakeConfig) -> None:
    jobs = set(asked.jobs)
    if len(jobs) < len(asked.jobs) or (jobs & {"show", "tag"} and len(jobs) > 1):
        raise ValueError(f"{' '.join(asked.jobs)}: name each job once, and show or tag alone")
    if jobs & {"ingest", "examples"} and lake.log is None:
        raise ValueError(
            "ingest and examples read a log, and LakeConfig.log is not set: give --gin.LakeConfig.log=@LogConfig()"
        )
    if jobs & {"ingest", "examples"} and asked.workdir is None:
        raise ValueError("--workdir is missing: a folder for what is set aside, and for what the joiner spills")
    if "profiles" in jobs and lake.jobs.postgres is None:
        raise ValueError(
            "nobody says where the tables user_profiles and video_profiles are: give --postgres='host=... dbname=...', or "
            "--gin.LakeJobsConfig.postgres=@PostgresConfig()"
        )
    if "tag" in jobs and (not asked.name or asked.name.isdigit()):
        raise ValueError("--name is missing, or a number, which means a snapshot: say what the tag is called")


def _with_postgres(jobs: LakeJobsConfig, dsn: str) -> LakeJobsConfig:
    from monolith_jax.lake.jobs import PostgresConfig

    postgres = dataclasses.replace(jobs.postgres, dsn=dsn) if jobs.postgres else PostgresConfig(dsn=dsn)
    return dataclasses.replace(jobs, postgres=postgres)


def _run(asked: argparse.Namespace, lake: LakeConfig) -> None:
    from monolith_jax.lake.warehouse import make_tables

    make_tables(lake.warehouse)
    if asked.jobs == ["show"]:
        return show(lake)
    if asked.jobs == ["tag"]:
        return tag(lake, asked.name)
    stop, failed = threading.Event(), []
    of_jobs = {"ingest": _ingest, "examples": _examples, "profiles": _profiles, "tidy": _tidy, "agreement": _agreement}
    with _stopped_by_signals(stop):
        threads = [_started(of_jobs[name], asked, lake, stop, failed) for name in asked.jobs]
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    if failed:
        raise failed[0]


def _started(
    job: Callable[..., None], asked: argparse.Namespace, lake: LakeConfig, stop: threading.Event, failed: list[Exception]
) -> threading.Thread:
    def run() -> None:
        try:
            job(asked, lake, stop)
        except Exception as error:  # One that fails ends the others: the process is started again as a whole.
            failed.append(error)
            stop.set()

    thread = threading.Thread(target=run, name=job.__name__, daemon=True)
    thread.start()
    return thread


def _ingest(asked: argparse.Namespace, lake: LakeConfig, stop: threading.Event) -> None:
    from monolith_jax.lake.ingest import Ingest
    from monolith_jax.stream.dead_letter import DeadLetters

    assert lake.log is not None
    letters, jobs = DeadLetters(asked.workdir / "dead_letters.ingest.jsonl"), lake.jobs
    told: set[str] = set()
    ingest, line = Ingest(lake.log, lake.warehouse, letters, jobs.counts, jobs.out_of_order_s), _Line("ingest", "events")
    try:
        while not stop.is_set():
            number = ingest.step(lake.jobs.commit_s, _EPOCH_BYTES)
            line.told(number, ingest.epoch, {"messages behind": ingest.unread(), **ingest.counts.metrics(), **letters.counts})
            _tell_not_kept(ingest.not_kept, told)
            if asked.until_end and not number and not ingest.unread():
                break
    finally:
        ingest.close()
        line.end()


def _examples(asked: argparse.Namespace, lake: LakeConfig, stop: threading.Event) -> None:
    from monolith_jax.lake.examples import Examples
    from monolith_jax.stream.dead_letter import DeadLetters

    assert lake.log is not None
    log = dataclasses.replace(lake.log, ends=lake.log.ends or asked.until_end)
    letters = DeadLetters(asked.workdir / "dead_letters.examples.jsonl")
    examples = Examples(log, lake.warehouse, asked.workdir / "stream", letters, asked.partitions)
    line, told = _Line("examples", "examples"), set()
    try:
        while not stop.is_set() and not examples.ended:
            line.told(examples.step(lake.jobs.commit_s, _EPOCH_ROWS), examples.epoch, letters.counts)
            _tell_not_kept(examples.not_kept, told)
    finally:
        examples.close()
        line.end()


def _tell_not_kept(columns: set[str], told: set[str]) -> None:
    for name in sorted(columns - told):
        print(f"the column {name!r} of impressions is not kept: its name or type is none that the table can take", flush=True)
        told.add(name)


def _profiles(asked: argparse.Namespace, lake: LakeConfig, stop: threading.Event) -> None:
    from monolith_jax.lake.profiles import Profiles

    assert lake.jobs.postgres is not None
    profiles, line = Profiles(lake.jobs.postgres, lake.warehouse), _Line("profiles", "changes")
    try:
        end = profiles.end_now(_AWAY_S, stop) if asked.until_end else None
        while not stop.is_set() and (end is None or profiles.position < end):
            number = profiles.step(min(lake.jobs.commit_s, 0.2))
            line.told(number, profiles.epoch, profiles.set_aside)
    finally:
        profiles.close()
        line.end()


def _tidy(asked: argparse.Namespace, lake: LakeConfig, stop: threading.Event) -> None:
    from monolith_jax.lake.tidy import is_foreign, tidy_table
    from monolith_jax.lake.warehouse import TABLES

    while True:
        for name in TABLES:
            if stop.is_set():
                return
            if is_foreign(lake.warehouse, name):
                print(f"tidy {name}: left alone, another engine writes it", flush=True)
                continue
            done = tidy_table(lake.warehouse, name, lake.jobs.tidy)
            print(
                f"tidy {name}: {done.files_before} files to {done.files_after}, {done.snapshots_expired} snapshots expired, "
                f"{done.files_removed} files removed",
                flush=True,
            )
        if asked.until_end or stop.wait(lake.jobs.tidy_every_s):
            return


def _agreement(asked: argparse.Namespace, lake: LakeConfig, stop: threading.Event) -> None:
    from monolith_jax.lake.agreeing import Agreeing

    topic = lake.log.impressions if lake.log else "impressions"
    agreeing, line, told = Agreeing(lake.warehouse, topic, lake.jobs.agreement_rows), _Line("agreement", "impressions"), 0
    while not stop.wait(lake.jobs.commit_s):
        line.told(agreeing.step(), 0, agreeing.metrics())
        for found in [one for agreement in agreeing.agreements.values() for one in agreement.mismatches][told:]:
            print(f"agreement: {found}", file=sys.stderr, flush=True)
            told += 1
        if asked.until_end:
            break
    line.end()


def show(lake: LakeConfig) -> None:
    """Prints what each table holds."""
    from rich.console import Console
    from rich.table import Table

    from monolith_jax.lake.history import tag_names
    from monolith_jax.lake.warehouse import TABLES, open_table

    table = Table(title=f"the lake in {lake.warehouse.path}")
    for name in ("table", "rows", "files", "MB", "snapshots", "newest", "tags"):
        table.add_column(name, justify="left" if name in ("table", "newest", "tags") else "right")
    for name in TABLES:
        opened = open_table(lake.warehouse, name)
        files = [file for split in opened.new_read_builder().new_scan().plan().splits() for file in split.files]
        snapshots = opened.snapshot_manager().list_snapshots()
        newest = max(snapshots, key=lambda one: one.id, default=None)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(newest.time_millis / 1000)) if newest else "-"
        tags = tag_names(opened)
        rows, size = sum(one.row_count for one in files), sum(one.file_size for one in files) / 1e6
        cells = (f"{rows:,}", f"{len(files):,}", f"{size:,.1f}", f"{len(snapshots):,}", at, ", ".join(tags))
        table.add_row(name, *cells)
    Console().print(table)


def tag(lake: LakeConfig, name: str) -> None:
    """Keeps each table as it is now under a name, which `LakeConfig.as_of` reads and tidy leaves; one that has it stays so."""
    from monolith_jax.lake.history import tag_names
    from monolith_jax.lake.warehouse import TABLES, open_table, writing

    for table in TABLES:
        opened = open_table(lake.warehouse, table)
        if name in tag_names(opened):
            print(f"{table}: {name} is there already")
        elif opened.snapshot_manager().get_latest_snapshot():
            with writing(lake.warehouse, table):
                opened.create_tag(name)
            print(f"{table}: {name}")


class _Line:
    """A line now and then of how a job goes on."""

    def __init__(self, job: str, things: str) -> None:
        """Counts from now."""
        self._job, self._things, self._began_s = job, things, time.monotonic()
        self._total, self._epoch, self._told_s, self._more = 0, -1, self._began_s, ""

    def told(self, number: int, epoch: int, more: Any) -> None:
        """Counts an epoch."""
        self._total, self._epoch = self._total + number, epoch
        self._more = ", ".join(f"{count:,} {name}" for name, count in more.items() if count)
        if time.monotonic() - self._told_s >= _LINE_EVERY_S:
            self._print("")
            self._told_s = time.monotonic()

    def end(self) -> None:
        """Prints the last line."""
        self._print("ended: ")

    def _print(self, how: str) -> None:
        rate = self._total / max(time.monotonic() - self._began_s, 1e-9)
        more = f"; {self._more}" if self._more else ""
        text = f"{self._job} {how}{self._total:,} {self._things}, {rate:,.0f} a second, epoch {self._epoch}{more}"
        print(text, flush=True)


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
