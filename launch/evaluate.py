"""Prints and draws the metrics of a run: `python -m launch.evaluate --workdir=checkpoints/quickstart`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from monolith_jax.evaluate import report


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of a run and writes its figure.

    Args:
        argv: Arguments of the command line; None: those of the process.

    Returns:
        The exit status: 0, or 1 when there is nothing to show or no matplotlib to draw with.
    """
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate",
        description="Prints the metrics of a run, finished or not, and draws them into <workdir>/report/.",
        epilog="example: python -m launch.evaluate --workdir=checkpoints/quickstart",
    )
    parser.add_argument("--workdir", required=True, help="the run's folder, with its metrics.jsonl")
    workdir = parser.parse_args(argv).workdir
    console = Console() if sys.stdout.isatty() else Console(width=120)  # a log file takes more than a terminal's 80
    try:
        for table in report.tables(workdir):
            console.print(table)
        for path in report.plot(workdir):
            console.print(f"figure: {path}", soft_wrap=True, highlight=False)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
