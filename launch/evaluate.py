"""How good a model is: `python -m launch.evaluate --help`.

In: a run folder, or one that `launch.export` wrote. Out: without further flags, what the run measured while it learned, as
tables and a figure; with them, what its newest snapshot does with the held-out examples, as tables, figures, and rows of
`<workdir>/report/evaluation.jsonl`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import parse_gin

if TYPE_CHECKING:
    from rich.console import Console

    from launch.evaluation.subject import Subject
    from launch.evaluation.written import Row

EXAMPLE = "python -m launch.evaluate --workdir=checkpoints/kuairand --ranking --segments=new_user,new_video,duration_ms"
_PARTS = ("ranking", "retrieval", "feed")
_EPILOG = f"""\
the run's config may be changed; names of its parts are those in WORKDIR/config.gin:
  --gin.test_source_1/KuaiRandConfig.folder=FOLDER
  --gin.Experiment.test_source='@test/ColumnsConfig()' --gin.test/ColumnsConfig.paths="('later.parquet',)"

example:
  {EXAMPLE}"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate",
        description="Prints and draws how good a run is: what it measured while it learned, or, with --ranking, --retrieval or "
        "--feed, what its newest snapshot does with Experiment.test_source, which it has not learned from.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER", help="a run, or what launch.export wrote")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for rows and figures (default: WORKDIR/report)")
    parser.add_argument("--ranking", action="store_true", help="AUC, log-loss, calibration, ... of each head")
    columns = "also by these columns of the examples, or new_user, new_video, activity, hour; by commas"
    parser.add_argument("--segments", metavar="COLUMNS", help=columns)
    parser.add_argument("--retrieval", action="store_true", help="the two-tower among all videos: recall, NDCG, ...")
    parser.add_argument("--feed", action="store_true", help="the whole way: recall, ranking and rules, by held-out sessions")
    loop = "a closed loop of so many hours with simulated users, trained anew by the run's config (launch.closed_loop)"
    parser.add_argument("--loop", type=int, metavar="HOURS", help=loop)
    parser.add_argument("--k", metavar="K,K", help="lengths of lists, for --retrieval (default: 10,20,50)")
    number = "resamples of users that intervals come from; 0: none (default: %(default)s)"
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help=number)
    requests = "requests at most, the first ones, for --feed (default: 2000)"
    parser.add_argument("--requests", type=int, metavar="N", help=requests)
    parser.add_argument("--seed", type=int, default=0, help="of the resamples; with --loop, of its requests (default: 0)")
    parser.add_argument("--no-figures", action="store_true", help="draw nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 where there is nothing to show or judge, or no matplotlib to draw with."""
    parser = _parser()
    flags = [option for action in parser._actions for option in action.option_strings]
    asked, overrides = parse_gin(parser, argv, flags)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # An accelerator may be busy training.
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)  # a log file takes more than a terminal's 80
    parts = [part for part in _PARTS if getattr(asked, part)]
    status, before = 0, signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _check_flags(asked)
        if parts:
            status = _judge(asked, overrides, parts, console)
        elif asked.loop is None:
            _show(asked, console)
    except KeyboardInterrupt:  # The temporary folder is gone by now.
        print("stopped; the parts that were finished are written", file=sys.stderr)
        return 130
    except (ValueError, ImportError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return status if asked.loop is None else _close_loop(asked, overrides) or status


def _close_loop(asked: argparse.Namespace, overrides: Sequence[str]) -> int:
    from launch import closed_loop

    config = asked.workdir / "config.gin"
    if not config.is_file():
        print(f"error: {asked.workdir} has no config.gin; give a run, or what launch.export wrote", file=sys.stderr)
        return 1
    folder = (asked.output or asked.workdir / "report") / "loop"
    changed = ["--gin." + "=".join(part.strip() for part in override.split("=", 1)) for override in overrides]
    flags = [f"--gin_file={config}", f"--workdir={folder}", f"--hours={asked.loop}", f"--seed={asked.seed}"]
    return closed_loop.main([*flags, *changed])


def _show(asked: argparse.Namespace, console: Console) -> None:
    """Prints and draws what a run measured itself."""
    from monolith_jax.evaluate import report

    if (asked.workdir / "orbax").is_dir() and not (asked.workdir / "metrics.jsonl").is_file():
        raise ValueError(
            f"{asked.workdir} was exported, and an export does not hold what the run measured while it learned: ask for "
            "--ranking, --retrieval or --feed, which judge it by held-out examples, or give the run folder"
        )
    for table in report.tables(asked.workdir):
        console.print(table)
    for path in [] if asked.no_figures else report.plot(asked.workdir):
        console.print(f"figure: {path}", soft_wrap=True, highlight=False)


def _check_flags(asked: argparse.Namespace) -> None:
    """Refuses flags that would do nothing; gives the others their defaults."""
    for name, part, default in (("segments", "ranking", ""), ("k", "retrieval", "10,20,50"), ("requests", "feed", 2000)):
        if getattr(asked, name) is None:
            setattr(asked, name, default)
        elif not getattr(asked, part):
            raise ValueError(f"--{name} is for --{part}, which is not asked for: give both or none")


def _judge(asked: argparse.Namespace, overrides: Sequence[str], parts: Sequence[str], console: Console) -> int:
    """Measures the parts that were asked for, each written as soon as it is there; then draws them. Returns the status."""
    from launch.evaluation import subject, written
    from launch.evaluation.held_out import test_files

    output, status, plots = asked.output or asked.workdir / "report", 0, []
    with subject.open_subject(asked.workdir, overrides) as one:
        test_files(one.experiment)
        _check_parts(parts, one, asked)
        for part in parts:
            began_s = time.perf_counter()
            one.aside.clear()
            try:
                rows, tables, plot = _part(part, one, asked, console)
            except (ValueError, FloatingPointError) as error:  # The other parts may be fine.
                print(f"error: {part}: {error}" if len(parts) > 1 else f"error: {error}", file=sys.stderr)
                status = 1
                continue
            told = {"seed": asked.seed, "bootstrap": asked.bootstrap, "overrides": list(overrides), "step": one.step()}
            told |= {"seconds": round(time.perf_counter() - began_s, 1), "set_aside": dict(one.aside)}
            path = written.write(output, part, rows, told)
            for table in tables:
                console.print(table)
            if one.aside:
                reasons = ", ".join(f"{number:,} {reason}" for reason, number in one.aside.most_common())
                console.print(f"held-out rows that were set aside: {reasons}", soft_wrap=True, highlight=False)
            console.print(f"{len(rows)} rows of {part} in {path}", soft_wrap=True, highlight=False)
            plots.append((plot, rows))
    for plot, rows in [] if asked.no_figures else plots:
        for figure in plot(rows, output):
            console.print(f"figure: {figure}", soft_wrap=True, highlight=False)
    return status


def _check_parts(parts: Sequence[str], one: Subject, asked: argparse.Namespace) -> None:
    """Refuses a part that cannot be judged before any is measured."""
    from launch.evaluation import feed, ranking, retrieval

    if "ranking" in parts:
        ranking.check(one.experiment)
    if "retrieval" in parts:
        retrieval.lengths(asked.k)
        retrieval.check(one.experiment)
    if "feed" in parts:
        feed.check(one.experiment, asked.requests)


def _part(part: str, one: Subject, asked: argparse.Namespace, console: Console) -> tuple[list[Row], list[Any], Any]:
    """Returns a part's rows, its tables, and what draws it."""
    with console.status(part):
        match part:
            case "ranking":
                from launch.evaluation import ranking

                names = [name for name in asked.segments.split(",") if name]
                rows = ranking.measure(one, names, asked.bootstrap, asked.seed)
                return rows, ranking.tables(rows), ranking.plot
            case "retrieval":
                from launch.evaluation import retrieval

                at = retrieval.lengths(asked.k)
                rows = retrieval.measure(one, at, asked.bootstrap, asked.seed)
                return rows, retrieval.tables(rows), retrieval.plot
            case _:
                from launch.evaluation import feed

                rows = feed.measure(one, asked.requests, asked.bootstrap, asked.seed)
                return rows, feed.tables(rows), feed.plot


if __name__ == "__main__":
    sys.exit(main())
