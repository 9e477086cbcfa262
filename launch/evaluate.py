"""How good a model is: `python -m launch.evaluate --help`.

In: a run folder, or one that `launch.export` wrote. Out: without further flags, what the run measured while it learned, as
tables and a figure; with them, what its newest snapshot does with the held-out examples, as tables, figures, and rows of
`<workdir>/report/evaluation.jsonl`.
"""

from __future__ import annotations

import argparse
import os
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
    columns = "also by these columns of the examples, or new_user, new_video, activity; by commas"
    parser.add_argument("--segments", default="", metavar="COLUMNS", help=columns)
    parser.add_argument("--retrieval", action="store_true", help="the two-tower among all videos: recall, NDCG, ...")
    parser.add_argument("--feed", action="store_true", help="the whole way: recall, ranking and rules, by held-out sessions")
    loop = "a closed loop of so many hours with simulated users, trained anew by the run's config (launch.closed_loop)"
    parser.add_argument("--loop", type=int, metavar="HOURS", help=loop)
    parser.add_argument(
        "--k", default="10,20,50", metavar="K,K", help="lengths of lists, for --retrieval (default: %(default)s)"
    )
    number = "resamples of users that intervals come from; 0: none (default: %(default)s)"
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help=number)
    requests = "requests at most, the first ones, for --feed (default: %(default)s)"
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help=requests)
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
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
    try:
        if parts:
            _judge(asked, overrides, parts, console)
        elif asked.loop is None:
            _show(asked, console)
    except (ValueError, ImportError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if asked.loop is None else _close_loop(asked, overrides)


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

    for table in report.tables(asked.workdir):
        console.print(table)
    for path in [] if asked.no_figures else report.plot(asked.workdir):
        console.print(f"figure: {path}", soft_wrap=True, highlight=False)


def _judge(asked: argparse.Namespace, overrides: Sequence[str], parts: Sequence[str], console: Console) -> None:
    """Measures the parts that were asked for, one after the other, each written as soon as it is there."""
    from launch.evaluation import subject, written
    from launch.evaluation.held_out import test_files

    output = asked.output or asked.workdir / "report"
    with subject.open_subject(asked.workdir, overrides) as one:
        test_files(one.experiment)
        for part in parts:
            began_s = time.perf_counter()
            rows, tables, plot = _part(part, one, asked, console)
            told = {"seed": asked.seed, "bootstrap": asked.bootstrap, "overrides": list(overrides)}
            told |= {"step": one.step(), "seconds": round(time.perf_counter() - began_s, 1)}
            path = written.write(output, part, rows, told)
            for table in tables:
                console.print(table)
            for figure in [] if asked.no_figures else plot(rows, output):
                console.print(f"figure: {figure}", soft_wrap=True, highlight=False)
            console.print(f"{len(rows)} rows of {part} in {path}", soft_wrap=True, highlight=False)


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
