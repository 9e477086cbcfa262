"""How fast the index finds videos, beside other libraries: `python -m launch.bench.index --help`.

All contestants get the same vectors and queries. Each is tuned to the least effort (videos scanned, ef, expansion, nprobe) with
which recall@100 is at least the demanded one. Where a rival's least effort reaches more, this project's index is tuned to as
much to be measured beside it. It may learn from a sample of queries when it is built, none of which is asked. All are measured
in turns:

  static    nothing changes. one: threads that each ask one query at a time, as a server does; many: one call with all queries
  changing  the same while a thread applies changes at a steady rate: a third of them videos that enter, move and leave.
            meanwhile: recall of 100 queries asked five times while changes go on; recall: against the exact best of the content
            at the end; behind: changes that could not be applied in time

Figures of the last line: index_qps is of `one`, at the demanded recall; index_qps_over_X the median over rounds of the ratio to
the best of that library; recall_at_100 is that of the changing table, changing_recall_at_100
its meanwhile; updates_per_s is what one thread can apply with nothing
else going on. Without --vectors the vectors are made up: unit vectors around topics on a curved surface of few dimensions, and
noise.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from launch.bench.index_rivals import MAKERS, Contestant, ours
from launch.bench.index_world import Changes, K, World, recall, world_of

DEMANDS = {"recall_at_100": 0.95, "index_qps_over_usearch": 1.0, "index_qps_over_hnswlib": 1.0}
"""What figures should be at least."""


def tuned(contestant: Contestant, world: World, truth: np.ndarray, demanded: float) -> tuple[int, float]:
    """Sets and returns the least effort whose recall is at least the demanded one (the most, if none is), and the recall."""
    efforts, low, high = contestant.efforts, 0, len(contestant.efforts) - 1

    def recall_of(place: int) -> float:
        contestant.set_effort(efforts[place])
        return recall(contestant.many(world.queries, K), truth)

    while low < high:
        middle = (low + high) // 2
        if recall_of(middle) >= demanded:
            high = middle
        else:
            low = middle + 1
    return efforts[low], recall_of(low)


def rate_of_one(contestant: Contestant, queries: np.ndarray, threads: int, seconds: float) -> tuple[float, np.ndarray]:
    """Returns queries a second of threads that ask one query at a time, and how long each took, milliseconds."""
    took: list[list[float]] = [[] for _ in range(threads)]
    begun = time.perf_counter()

    def ask(thread: int) -> None:
        at, mine = thread * len(queries) // threads, took[thread]
        while (now := time.perf_counter()) < begun + seconds:
            query = queries[at % len(queries)][None]
            contestant.one(query, K)
            mine.append(time.perf_counter() - now)
            at += 1

    asking = [threading.Thread(target=ask, args=(thread,)) for thread in range(threads)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    every = np.concatenate([np.array(mine) for mine in took])
    return every.size / (time.perf_counter() - begun), 1e3 * every


def rate_of_many(contestant: Contestant, queries: np.ndarray) -> float:
    """Returns queries a second of one call with all queries."""
    begun = time.perf_counter()
    contestant.many(queries, K)
    return len(queries) / (time.perf_counter() - begun)


def changing(contestant: Contestant, world: World, args: argparse.Namespace) -> dict[str, float]:
    """Returns the figures of a contestant while it changes."""
    changes, told = Changes(world, args.changes, 1), []
    for _ in range(10):  # the first ones compile, or take memory
        changes.apply(contestant, 10)
    stop = threading.Event()
    thread = threading.Thread(target=lambda: told.append(changes.go_on(contestant, stop.is_set)))
    thread.start()
    rate, took_ms = rate_of_one(contestant, world.queries, args.threads, args.seconds * args.rounds)
    asked = []
    for _ in range(5):
        before = changes.done
        found = np.stack([contestant.one(query[None], K) for query in world.queries[:100]])
        asked.append((before, changes.begun, found))
        time.sleep(args.seconds / 5)
    stop.set()
    thread.join()
    after = World(changes.vectors, changes.there, world.queries, world.sample)
    figures = {"qps": rate, "p50_ms": float(np.median(took_ms)), "p99_ms": float(np.percentile(took_ms, 99))}
    done, due = told[0]
    found = np.stack([contestant.one(query[None], K) for query in world.queries])
    figures |= {"meanwhile": recall_meanwhile(world, args.changes, asked), "behind": max(due - done, 0) / due}
    return {**figures, "recall": recall(found, after.truth())}


def recall_meanwhile(world: World, rate: float, asked: list[tuple[int, int, np.ndarray]]) -> float:
    """Returns the share that was found of the videos that were among the best before some steps of changes and after them.

    Args:
        world: As it was before the first change.
        rate: Of the changes.
        asked: Steps before and after, and what was found [Q, 100] in between for the first Q queries, in order.
    """
    changes, shares = Changes(world, rate, 1), []
    for before, after, found in asked:
        truths = []
        for step in (before, after):
            while changes.done < step:
                changes.step(10)
                changes.done += 1
            truths.append(World(changes.vectors, changes.there, world.queries[: len(found)], world.sample).truth())
        both = [np.intersect1d(*pair) for pair in zip(*truths, strict=True)]
        shares += [np.isin(right, got).mean() for right, got in zip(both, found, strict=True) if right.size]
    return float(np.mean(shares))


def updates_per_s(contestant: Contestant, world: World) -> float:
    """Returns changes a second that one thread applies, moves to where the videos are already."""
    numbers = np.flatnonzero(world.there)[:5000]
    begun = time.perf_counter()
    contestant.put(numbers, world.vectors[numbers])
    return numbers.size / (time.perf_counter() - begun)


def _build(
    name: str, world: World, args: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Contestant, dict[str, float]]:
    numbers = int(world.there.sum())
    before, begun = _resident_mb(), time.perf_counter()
    sizes = int(1.1 * numbers) + 1000, args.threads
    vectors = world.vectors[:numbers]
    contestant = ours(vectors, world.sample, *sizes) if name == "index" else MAKERS[name](vectors, *sizes)
    figures = {"build_s": time.perf_counter() - begun, "resident_mb": _resident_mb() - before}
    say(f"{name}: built in {figures['build_s']:.1f} s, {figures['resident_mb']:.0f} MB, {contestant.settings}")
    return contestant, figures


def _resident_mb() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measure(world: World, args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Returns the figures of each contestant."""
    truth, built, found = world.truth(), {}, {}
    for name in ["index", *args.rivals]:
        built[name], found[name] = _build(name, world, args, say)
        effort, reached = tuned(built[name], world, truth, args.recall)
        found[name] |= {"effort": effort, "recall": reached}
        # A graph's least effort may reach more than is demanded: beside it this index must reach as much.
        found[name]["index_effort"] = tuned(built["index"], world, truth, max(reached, args.recall))[0]
        say(f"{name}: recall {reached:.4f} at effort {effort}; the index is to scan {found[name]['index_effort']}")
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in built}
    took_ms: dict[str, list[np.ndarray]] = {name: [] for name in built}
    for _ in range(args.rounds):
        for name, contestant in built.items():
            rates = []
            for one, effort in ((built["index"], "index_effort"), (contestant, "effort")):
                one.set_effort(int(found[name][effort]))
                rate, took = rate_of_one(one, world.queries, args.threads, args.seconds)
                rates += [rate, rate_of_many(one, world.queries)]
            rounds[name].append(tuple(rates))
            took_ms[name].append(took)
    for name, of_name in rounds.items():
        every = np.concatenate(took_ms[name])
        found[name] |= {
            "qps": statistics.median(rates[2] for rates in of_name),
            "qps_many": statistics.median(rates[3] for rates in of_name),
            "index_over": statistics.median(rates[0] / rates[2] for rates in of_name),
            "index_over_many": statistics.median(rates[1] / rates[3] for rates in of_name),
            "p50_ms": float(np.median(every)),
            "p99_ms": float(np.percentile(every, 99)),
        }
    built["index"].set_effort(int(max(one["index_effort"] for one in found.values())))
    for name, contestant in built.items():
        found[name] |= {f"changing_{key}": value for key, value in changing(contestant, world, args).items()}
        found[name]["updates_per_s"] = updates_per_s(contestant, world)
    return found


def last_line(found: dict[str, dict[str, float]], args: argparse.Namespace) -> dict[str, float]:
    """Returns the figures of the last line."""
    mine = found["index"]
    figures: dict[str, float] = {"videos": args.videos, "recall_at_100": mine["changing_recall"], "index_qps": mine["qps"]}
    for library in ("usearch", "hnswlib", "faiss"):
        of_library = [one for name, one in found.items() if name.startswith(library)]
        if of_library:  # beside the best of its kinds
            figures[f"index_qps_over_{library}"] = min(one["index_over"] for one in of_library)
            figures[f"index_qps_many_over_{library}"] = min(one["index_over_many"] for one in of_library)
            figures[f"changing_qps_over_{library}"] = min(mine["changing_qps"] / one["changing_qps"] for one in of_library)
    for name, one in found.items():
        figures[f"{name}_build_s"] = one["build_s"]
    told = {"static_recall_at_100": "recall", "index_p99_ms": "p99_ms", "changing_p99_ms": "changing_p99_ms"}
    told |= {"changing_recall_at_100": "changing_meanwhile"}
    figures |= {name: mine[key] for name, key in told.items()}
    figures |= {"updates_per_s": mine["updates_per_s"], "rss_mb": _resident_mb(), "index_mb": mine["resident_mb"]}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def print_tables(found: dict[str, dict[str, float]], figures: dict[str, float], args: argparse.Namespace) -> None:
    """Prints the figures of all contestants, and those that something is demanded of."""
    from rich.console import Console
    from rich.table import Table

    first = (
        "build_s",
        "resident_mb",
        "effort",
        "recall",
        "index_effort",
        "qps",
        "p50_ms",
        "p99_ms",
        "index_over",
        "qps_many",
        "index_over_many",
    )
    second = ("qps", "p50_ms", "p99_ms", "meanwhile", "recall", "behind")
    second = (*(f"changing_{key}" for key in second), "updates_per_s")
    for title, keys in (("static", first), (f"{args.changes:,.0f} changes a second", second)):
        table = Table("index", *(key.removeprefix("changing_") for key in keys), title=f"{args.videos:,} videos, {title}")
        for name, one in found.items():
            table.add_row(name, *(f"{one[key]:,.4g}" if one[key] < 1000 else f"{one[key]:,.0f}" for key in keys))
        Console(width=140).print(table)
    for name, least in DEMANDS.items():
        if name in figures:
            print(f"{name}: {figures[name]} (>= {least}): {'met' if figures[name] >= least else 'missed'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.index",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.index --videos 1000000 --rounds 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    rivals = [name for name in MAKERS if name != "index"]
    parser.add_argument("--videos", type=int, default=1_000_000, help="videos in the index (default: %(default)s)")
    parser.add_argument("--vectors", help="npz with videos float32 [N, D] and queries float32 [Q, D]; without: made up")
    parser.add_argument("--queries", type=int, default=500, help="queries (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="of made up vectors (default: %(default)s)")
    parser.add_argument("--latent", type=int, default=12, help="of made up vectors: true dimensions (default: %(default)s)")
    parser.add_argument(
        "--noise", type=float, default=0.4, help="of made up vectors: length of the noise (default: %(default)s)"
    )
    parser.add_argument("--recall", type=float, default=0.955, help="that all are tuned to (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="that search (default: %(default)s)")
    parser.add_argument("--changes", type=float, default=1000, help="a second (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="in turns (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2, help="of a turn (default: %(default)s)")
    parser.add_argument("--rivals", nargs="*", choices=rivals, default=rivals, help="(default: all)")
    args = parser.parse_args(argv)
    try:
        found = measure(world_of(args), args, lambda text: print(text, file=sys.stderr, flush=True))
    except ValueError as error:
        parser.error(str(error))
    figures = last_line(found, args)
    print_tables(found, figures, args)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
