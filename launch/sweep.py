"""Runs a sweep: every point of its axes, with every seed: `python -m launch.sweep --help`.

In: a gin file with a `Sweep`. Out: a folder with the results as Parquet, a Markdown table and a report (`launch.sweeps.folder`
says what else). The same command goes on where it was stopped or killed: points that are finished stay, the others are run.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import cli
from launch.sweeps.folder import (
    Busy,
    command_line,
    is_finished,
    locked,
    machine,
    note_lost_ends,
    read_json,
    reason_of,
    versions,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from launch.sweeps.config import Point, Sweep

EXAMPLE = "python -m launch.sweep --gin_file=configs/sweeps/learning_rate.gin --workdir=checkpoints/learning_rate"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 where a point failed or a setting is wrong, or 130 where it was interrupted."""
    does = "Runs every point of a sweep that is not finished, and writes tables and a report of all that are."
    parser = cli.gin_parser(does, EXAMPLE, "--workdir=FOLDER [--only_plan] [--executor=...]")
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER", help="of the sweep; made when missing")
    parser.add_argument("--only_plan", action="store_true", help="print the points, run none")
    executors = "where points run: processes here, or submitit's jobs (default: %(default)s)"
    parser.add_argument("--executor", choices=("local", "slurm", "submitit_local"), default="local", help=executors)
    options = "of submitit's jobs: partition=gpu,timeout_min=60"
    parser.add_argument("--executor_options", default="", metavar="LIST", help=options)
    flags = [option for action in parser._actions for option in action.option_strings]
    asked, overrides = cli.parse_gin(parser, argv, flags)
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    command = command_line(list(sys.argv[1:] if argv is None else argv))
    try:
        return run(asked, overrides, command, console)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except Busy:
        print(
            f"another process drives the sweep in {asked.workdir}; wait for it or stop it, or take another --workdir",
            file=sys.stderr,
        )
        return 1


def run(asked: argparse.Namespace, overrides: Sequence[str], command: str, console: Console) -> int:
    """Plans, runs what is not finished, writes tables and report; returns the exit status.

    Raises:
        ValueError: A binding is wrong, or the folder holds another sweep.
        Busy: Another process drives the sweep.
    """
    from launch.sweeps.config import check_points, divided, load_sweep, make_points

    of_sweep, of_experiment = divided(overrides)
    sweep = load_sweep(asked.gin_file, of_sweep)
    points = make_points(sweep, of_experiment)
    texts = check_points(asked.gin_file, of_sweep, points)
    if asked.only_plan:
        for point in points:
            console.print(f"{point.index:4d}  {point.title}", highlight=False, markup=False)
        return 0
    asked.workdir.mkdir(parents=True, exist_ok=True)
    with locked(asked.workdir / ".lock"):
        _keep_plan(asked, sweep, points, texts, command)
        note_lost_ends(asked.workdir, [point.key for point in points])
        todo = [point for point in points if not is_finished(asked.workdir, point.key)]
        if len(todo) < len(points):
            console.print(
                f"{len(points) - len(todo)} of {len(points)} points are finished and stay", highlight=False, markup=False
            )
        interrupted = _run(asked, sweep, points, todo, console)
        return _close(asked.workdir, points, interrupted, console)


def _keep_plan(asked: argparse.Namespace, sweep: Sweep, points: Sequence[Point], texts: Sequence[str], command: str) -> None:
    """Writes what will be run, or compares with what the folder has.

    Raises:
        ValueError: The folder holds another sweep.
    """
    from launch.sweeps.config import load_sweep
    from monolith_jax.config_tree import to_text

    text = f"# The sweep as it ran, defaults included.\n\n{to_text(sweep)}"
    path = asked.workdir / "sweep.gin"
    for point, of_point in zip(points, texts, strict=True):
        folder = asked.workdir / "points" / point.key
        _compare(folder / "config.gin", of_point, asked.workdir, f"point {point.key} with another configuration")
    if path.is_file():
        before = load_sweep([path])
        kept = {name: getattr(before, name) for name in _MAY_CHANGE}
        if dataclasses.replace(sweep, **kept) != before:
            _compare(path, text, asked.workdir, "another sweep")
    for point, of_point in zip(points, texts, strict=True):
        folder = asked.workdir / "points" / point.key
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.gin", of_point)
        write_json(folder / "point.json", _told(point))
    write_text(path, text)
    plan = {
        "name": sweep.name,
        "command": command,
        "gin_files": {str(file): Path(file).read_text(encoding="utf-8") for file in asked.gin_file},
        "axes": [{"name": axis.name, "labels": list(axis.labels)} for axis in sweep.axes],
        "seeds": list(sweep.seeds),
        "baseline": sweep.baseline,
        "metrics": list(sweep.metrics),
        "heads": list(sweep.heads),
        "lower_is_better": list(sweep.lower_is_better),
        "versions": versions(),
        "machine": machine(),
        "started": time.time(),
        "points": [_told(point) for point in points],
    }
    if (asked.workdir / "sweep.json").is_file():
        plan["started"] = read_json(asked.workdir / "sweep.json")["started"]
    write_json(asked.workdir / "sweep.json", plan)


_MAY_CHANGE = ("workers", "memory_gb", "timeout_s", "metrics", "heads", "lower_is_better", "baseline", "name")
"""Settings that change no result: a sweep goes on with others."""


def _compare(path: Path, text: str, workdir: Path, what: str) -> None:
    if not path.is_file() or (before := path.read_text(encoding="utf-8")) == text:
        return
    lines = difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
    shown = [line for line in lines if line[:1] in "+-"][2:10]
    raise ValueError(
        f"{workdir} holds {what}:\n  " + "\n  ".join(shown) + "\nTake another --workdir, or give the old settings to go on"
    )


def _told(point: Point) -> dict[str, Any]:
    base = point.base
    return {
        "index": point.index,
        "key": point.key,
        "labels": point.labels,
        "seed": base.seed,
        "gin_files": list(base.gin_files),
        "bindings": list(base.bindings),
        "overrides": list(point.overrides),
    }


def _run(asked: argparse.Namespace, sweep: Sweep, points: Sequence[Point], todo: Sequence[Point], console: Console) -> bool:
    """Runs points; returns whether it was interrupted."""
    from launch.sweeps.cluster import JobArray, parse_options
    from launch.sweeps.pool import Pool
    from launch.sweeps.view import View

    if not todo:
        return False
    options = parse_options(asked.executor_options)
    if asked.executor == "local":
        if options:
            raise ValueError(
                "--executor_options are of submitit's jobs: give --executor=slurm, or set Sweep.workers, cores, ..."
            )
        workers: Any = Pool(sweep, asked.workdir, todo)
    else:
        workers = JobArray(sweep, asked.workdir, todo, asked.executor, options)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    view = View(sweep, asked.workdir, points, todo, console)
    try:
        with view if console.is_terminal else nullcontext():
            for told in workers:
                view.tell(told)
    except KeyboardInterrupt:
        return True
    finally:
        workers.close()
        signal.signal(signal.SIGTERM, before)
    return False


def _close(workdir: Path, points: Sequence[Point], interrupted: bool, console: Console) -> int:
    """Writes tables and report of what there is; returns the exit status."""
    from launch.sweeps.results import read_results, unknown_names
    from launch.sweeps.tables import write_tables

    failed = [point for point in points if reason_of(workdir, point.key)]
    if any(is_finished(workdir, point.key) for point in points):
        for table in write_tables(workdir):
            console.print(table, highlight=False)
        written = [workdir / "results.parquet", workdir / "results.md"]
        try:
            from launch.sweeps.report import write_report

            written.append(write_report(workdir))
        except ImportError as error:
            console.print(f"no report: {error}", highlight=False, markup=False)
        console.print("written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True, markup=False)
    for name in unknown_names(read_results(workdir)):
        console.print(f"{name} is nothing that a finished point measured", highlight=False, markup=False)
    for point in failed:
        console.print(f"failed: {point.title}: {reason_of(workdir, point.key)}", highlight=False, soft_wrap=True, markup=False)
    left = sum(not is_finished(workdir, point.key) for point in points)
    if left:
        console.print(
            f"{left} of {len(points)} points are not finished; the same command goes on with them",
            highlight=False,
            markup=False,
        )
    return 130 if interrupted else int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
