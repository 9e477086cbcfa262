"""Whether the streaming AUC is exact enough in memory that stays: `python -m launch.bench.auc --help`.

Several kinds of scores, 100 million each by default, go batch by batch through `StreamingAuc`, in a process of their own whose
peak memory is read at 1, 10 and 100 % (but not before a million). Another process sorts all of them at once for the exact AUC:
8 bytes a score. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from monolith_jax.evaluate.metrics import StreamingAuc

EXAMPLE = "python -m launch.bench.auc --scores=10_000_000"
KINDS = ("uniform", "logistic", "concentrated", "tied")
"""Evenly spread; logits of a rare event; within a thousandth of one half; of two decimals."""
BATCH = 1 << 16
MOST_ERROR = 1e-4
MOST_GROWTH_MB = 32.0
"""Of the peak, from the first reading to the last: holding 100 million would be 400 MB and more."""
FIRST = 1_000_000
"""Scores after which the accumulator has all the memory that it should ever take."""


class Streamed(NamedTuple):
    """What a stream gave."""

    auc: float
    bound: float
    peaks_mb: tuple[float, ...]
    """Above the peak before the first score, at 1, 10 and 100 %."""
    scores_per_s: float
    """Of the accumulator alone."""


def batches(kind: str, scores: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields float32 scores and bool labels, the same at each call."""
    for first in range(0, scores, BATCH):
        rng = np.random.default_rng([KINDS.index(kind), seed, first])
        number = min(BATCH, scores - first)
        match kind:
            case "uniform":
                chance = rng.random(number)
                given = chance
            case "logistic":
                chance = 1 / (1 + np.exp(3 - 1.5 * rng.normal(size=number)))
                given = chance
            case "concentrated":
                hidden = rng.normal(size=number)
                chance, given = 1 / (1 + np.exp(-hidden)), 0.5 + 1e-3 * np.tanh(hidden)
            case _:
                chance = rng.beta(1, 8, number)
                given = np.round(chance, 2)
        yield given.astype(np.float32), rng.random(number) < chance


def peak_mb() -> float:
    """Returns the largest resident memory of this process so far."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def streamed(kind: str, scores: int, seed: int) -> Streamed:
    """Returns what the accumulator makes of a stream."""
    for _ in batches(kind, BATCH, seed):
        before_mb = peak_mb()  # With what it takes to make a batch.
    marks = [min(max(scores // part, FIRST), scores) for part in (100, 10, 1)]
    stream, seconds, done, peaks = StreamingAuc(), 0.0, 0, list[float]()
    for given, labels in batches(kind, scores, seed):
        began_s = time.perf_counter()
        stream.add(given, labels)
        seconds += time.perf_counter() - began_s
        done += given.size
        while len(peaks) < len(marks) and done >= marks[len(peaks)]:
            peaks.append(peak_mb() - before_mb)
    began_s = time.perf_counter()
    auc, bound = stream.value(), stream.error_bound()
    seconds += time.perf_counter() - began_s
    return Streamed(auc, bound, tuple(peaks), scores / seconds)


def exact(kind: str, scores: int, seed: int) -> float:
    """Returns the AUC of all scores, sorted at once; wins are counted in whole numbers, twice each."""
    packed, done = np.empty(scores, np.uint64), 0
    for given, labels in batches(kind, scores, seed):
        # Scores are at least 0: their bits have their order.
        packed[done : done + given.size] = (given.view(np.uint32).astype(np.uint64) << np.uint64(1)) | labels
        done += given.size
    packed.sort()
    won_twice, negatives, positives, first = 0, 0, 0, 0
    while first < scores:
        last = min(first + (1 << 22), scores)
        if last < scores:  # A block ends where a score does.
            last = int(np.searchsorted(packed, ((packed[last] >> np.uint64(1)) << np.uint64(1)), side="left"))
            if last <= first:
                last = int(np.searchsorted(packed, packed[first] | np.uint64(1), side="right"))
        block = packed[first:last]
        keys, labels = block >> np.uint64(1), (block & np.uint64(1)).astype(np.int64)
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        of_cell = np.add.reduceat(labels, starts)
        others = np.diff(np.append(starts, block.size)) - of_cell
        below = negatives + np.cumsum(others) - others
        won_twice += int(np.dot(of_cell, 2 * below + others))
        negatives, positives, first = negatives + int(others.sum()), positives + int(of_cell.sum()), last
    return won_twice / 2 / positives / negatives


def figures_of(of_kinds: dict[str, tuple[Streamed, float]]) -> dict[str, Any]:
    """Returns what the last line tells, given what was streamed and the exact AUC of each kind."""
    errors = {kind: abs(one.auc - right) for kind, (one, right) in of_kinds.items()}
    grown = {kind: one.peaks_mb[-1] - one.peaks_mb[0] for kind, (one, _) in of_kinds.items()}
    within = all(errors[kind] <= one.bound + 1e-12 for kind, (one, _) in of_kinds.items())
    return {
        "auc_error_max": max(errors.values()),
        "error_bound_max": max(one.bound for one, _ in of_kinds.values()),
        "rss_growth_mb": round(max(grown.values()), 1),
        "rss_mb": round(max(one.peaks_mb[-1] for one, _ in of_kinds.values()), 1),
        "scores_per_s": round(min(one.scores_per_s for one, _ in of_kinds.values())),
        "met": within and max(errors.values()) <= MOST_ERROR and max(grown.values()) <= MOST_GROWTH_MB,
    }


def measured(kinds: Sequence[str], scores: int, seed: int) -> dict[str, tuple[Streamed, float]]:
    """Returns what was streamed, and the exact AUC, of each kind."""
    found = {}
    for kind in kinds:
        of_kind = []
        for task in (streamed, exact):  # Each in a process of its own, whose peak is its own.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                of_kind.append(pool.submit(task, kind, scores, seed).result())
        found[kind] = (of_kind[0], of_kind[1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 where every demand is met, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.auc",
        description=__doc__,
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scores", type=int, default=100_000_000, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scores (default: %(default)s)")
    asked = parser.parse_args(argv)
    if asked.scores < 1000:
        parser.error(f"--scores is {asked.scores}; expected at least 1000")
    from rich.console import Console
    from rich.table import Table

    found = measured(KINDS, asked.scores, asked.seed)
    table = Table(
        "scores", "exact AUC", "streamed", "error", "bound", "MB at 1 %", "10 %", "100 %", "scores/s", title=f"{asked.scores:,}"
    )
    for kind, (one, right) in found.items():
        errors = [f"{value:.2e}" for value in (abs(one.auc - right), one.bound)]
        peaks = [f"{peak:.1f}" for peak in one.peaks_mb]
        table.add_row(kind, f"{right:.8f}", f"{one.auc:.8f}", *errors, *peaks, f"{one.scores_per_s:,.0f}")
    Console(width=120).print(table)
    figures = figures_of(found)
    print(json.dumps(figures))
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
