"""Puts a log into time order: `python -m launch.sort --help`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from monolith_jax.stream.remote import AnyPath, matching, path_of
from monolith_jax.stream.time_order import sort_by_time

EXAMPLE = """\
example: the four standard logs of KuaiRand-27K, 23 GB, whose two parts cover the same days:

  python -m launch.sort --input 'KuaiRand-27K/data/log_standard*.csv' --output KuaiRand-27K/data/sorted --time_column time_ms

then KuaiRandConfig.folder = 'KuaiRand-27K/data/sorted' and KuaiRandConfig.features_folder = 'KuaiRand-27K/data'.
Rows without a readable time are in set_aside.jsonl in the output folder, with their place and the reason.
"""


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.sort",
        description="Sorts log files by time into a folder of Parquet files, in constant memory.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="CSV (plain or .gz) or Parquet files, or glob patterns; also s3://, hdfs:// and webhdfs://",
    )
    parser.add_argument("--output", required=True, help="folder for the sorted files")
    parser.add_argument("--time_column", required=True, help="column to sort by; KuaiRand's is time_ms")
    parser.add_argument("--name", default="log_standard", help="start of the sorted files' names (default: %(default)s)")
    parser.add_argument("--rows_in_memory", type=int, default=1_000_000, help="rows sorted at once (default: %(default)s)")
    return parser.parse_args(arguments)


def _paths(patterns: list[str]) -> list[AnyPath]:
    paths: list[AnyPath] = []
    for pattern in patterns:
        found = matching(pattern)
        if not found:
            raise ValueError(f"no file matches {pattern!r} (in {Path.cwd()})")
        paths += map(path_of, found)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Sorts; returns the exit status."""
    args = _parsed(arguments)
    started = shown = time.monotonic()

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal shown
        if time.monotonic() - shown >= 2:
            shown = time.monotonic()
            share = f" of {total:,}" if total else ""
            print(f"{stage}: {done:,}{share} rows, {shown - started:.0f} s", file=sys.stderr, flush=True)

    try:
        done = sort_by_time(
            _paths(args.input),
            Path(args.output),
            time_column=args.time_column,
            name=args.name,
            rows_in_memory=args.rows_in_memory,
            progress=progress,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    print(f"{done.num_rows:,} rows in {len(done.files)} files, {seconds:.0f} s: {done.files[0]} to {done.files[-1].name}")
    for reason, count in done.set_aside.items():
        print(f"set aside: {count:,} {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
