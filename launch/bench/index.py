"""How fast the index finds videos, beside other libraries: `python -m launch.bench.index --help`.

All contestants get the same vectors and queries. Each is tuned to the least effort (videos scanned, ef, expansion, nprobe) with
which recall@100 is at least the demanded one (this project's index: at least that of every other), and measured in turns:

  static    nothing changes. one: threads that each ask one query at a time, as a server does; many: one call with all queries
  changing  the same while a thread applies changes at a steady rate: a third of them videos that enter, move and leave. The
            recall is that against the exact best of the content at the end; behind: changes that could not be applied in time

Figures of the last line: index_qps is of `one`, at the demanded recall; index_qps_over_X the median over rounds of the ratio to
the best of that library; recall_at_100 is that of the changing table; updates_per_s is what one thread can apply with nothing
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.bench.index_rivals import MAKERS, Contestant

K = 100
DEMANDS = {"recall_at_100": 0.95, "index_qps_over_usearch": 1.0, "index_qps_over_hnswlib": 1.0}
"""What figures should be at least."""


def made_up(number: int, dim: int, latent: int, noise: float, seed: int) -> np.ndarray:
    """Returns unit vectors float32 [N, D]: 2,000 topics of uneven size in `latent` dimensions, bent into D, and noise."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    first = world.normal(size=(latent, 4 * dim)).astype(np.float32) / latent**0.5
    second = world.normal(size=(4 * dim, dim)).astype(np.float32) / (4 * dim) ** 0.5
    topics = world.normal(size=(2000, latent)).astype(np.float32)
    share = 1 / np.arange(1, 2001) ** 0.7
    out = np.empty((number, dim), np.float32)
    for start in range(0, number, 1 << 17):
        size = min(1 << 17, number - start)
        of_topic = topics[rng.choice(2000, size, p=share / share.sum())]
        bent = np.tanh(1.5 * (of_topic + 0.6 * rng.normal(size=(size, latent)).astype(np.float32)) @ first) @ second
        bent /= np.linalg.norm(bent, axis=1, keepdims=True)
        bent += noise / dim**0.5 * rng.normal(size=bent.shape).astype(np.float32)
        out[start : start + size] = bent / np.linalg.norm(bent, axis=1, keepdims=True)
    return out


def near(vectors: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Returns new unit vectors float32 [number, D] close to random ones of `vectors`: of the same kind, and no ties."""
    some = vectors[rng.integers(len(vectors), size=number)]
    some = some + np.float32(0.1 / vectors.shape[1] ** 0.5) * rng.normal(size=some.shape).astype(np.float32)
    return some / np.linalg.norm(some, axis=1, keepdims=True)


@dataclass
class World:
    """What is in the indexes: vectors by number, those that enter later included."""

    vectors: np.ndarray
    """float32 [M, D]"""
    there: np.ndarray
    """bool [M]"""
    queries: np.ndarray
    """float32 [Q, D]"""

    def truth(self) -> np.ndarray:
        """Returns the numbers of the best, int64 [Q, 100]."""
        from monolith_jax.serve.exact import exact_top_k

        numbers = np.flatnonzero(self.there)
        content = self.vectors[numbers]
        found = [exact_top_k(content, self.queries[first : first + 64], K)[0] for first in range(0, len(self.queries), 64)]
        return numbers[np.concatenate(found)]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Returns the share of the truth [Q, 100] that was found [Q, 100]."""
    return float(np.mean([np.isin(right, got).mean() for right, got in zip(truth, found, strict=True)]))


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


class Changes:
    """Changes that every contestant gets alike: a third each of videos that enter, move and leave."""

    def __init__(self, world: World, rate: float, seed: int) -> None:
        """Starts from what is there; the same seed, the same changes."""
        self.rng, self.rate, self.there = np.random.default_rng(seed), rate, world.there.copy()
        self.vectors, self.next = world.vectors.copy(), int(np.flatnonzero(world.there)[-1]) + 1

    def apply(self, contestant: Contestant, number: int) -> None:
        """Applies 3 * number changes."""
        enter = np.arange(self.next, self.next + number)
        self.next += number
        # Drawn until enough of them are there: to list all that are would take longer than the changes.
        drawn = self.rng.integers(self.next - number, size=16 * number)
        some = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        some = some[self.there[some]][: 2 * number]
        move, leave = some[:number], some[number:]
        self.vectors[move] = near(self.vectors, number, self.rng)
        contestant.remove(leave)
        both = np.concatenate([move, enter])
        contestant.put(both, self.vectors[both])
        self.there[leave], self.there[enter] = False, True

    def go_on(self, contestant: Contestant, ends: Callable[[], bool]) -> tuple[int, int]:
        """Applies changes at the rate until it ends; returns how many, and how many should have been."""
        done, begun, period_s = 0, time.perf_counter(), 30 / self.rate
        while not ends():
            self.apply(contestant, 10)
            done += 30
            time.sleep(max(begun + done / 30 * period_s - time.perf_counter(), 0))
        return done, int((time.perf_counter() - begun) * self.rate)


def changing(contestant: Contestant, world: World, args: argparse.Namespace) -> dict[str, float]:
    """Returns the figures of a contestant while it changes."""
    changes, told = Changes(world, args.changes, 1), []
    for _ in range(10):  # the first ones compile, or take memory
        changes.apply(contestant, 10)
    stop = threading.Event()
    thread = threading.Thread(target=lambda: told.append(changes.go_on(contestant, stop.is_set)))
    thread.start()
    rate, took_ms = rate_of_one(contestant, world.queries, args.threads, args.seconds * args.rounds)
    stop.set()
    thread.join()
    after = World(changes.vectors, changes.there, world.queries)
    figures = {"qps": rate, "p50_ms": float(np.median(took_ms)), "p99_ms": float(np.percentile(took_ms, 99))}
    done, due = told[0]
    found = np.stack([contestant.one(query[None], K) for query in world.queries])
    return {**figures, "recall": recall(found, after.truth()), "behind": max(due - done, 0) / due}


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
    contestant = MAKERS[name](world.vectors[:numbers], int(1.1 * numbers) + 1000, args.threads)
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
    truth, built, found, demanded = world.truth(), {}, {}, args.recall
    for name in [*args.rivals, "index"]:
        built[name], found[name] = _build(name, world, args, say)
        # A graph's least effort may reach more than is demanded: then this index must reach as much.
        effort, reached = tuned(built[name], world, truth, demanded if name == "index" else args.recall)
        found[name] |= {"effort": effort, "recall": reached}
        demanded = max(demanded, reached)
        say(f"{name}: recall {reached:.4f} at effort {effort}")
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in built}
    took_ms: dict[str, list[np.ndarray]] = {name: [] for name in built}
    for _ in range(args.rounds):
        for name, contestant in built.items():
            rate, took = rate_of_one(contestant, world.queries, args.threads, args.seconds)
            rounds[name].append((rate, rate_of_many(contestant, world.queries)))
            took_ms[name].append(took)
    for name, of_name in rounds.items():
        ratios = [
            [mine / other for mine, other in zip(*pair, strict=True)] for pair in zip(rounds["index"], of_name, strict=True)
        ]
        every = np.concatenate(took_ms[name])
        found[name] |= {
            "qps": statistics.median(one for one, _ in of_name),
            "qps_many": statistics.median(many for _, many in of_name),
            "index_over": statistics.median(one for one, _ in ratios),
            "index_over_many": statistics.median(many for _, many in ratios),
            "p50_ms": float(np.median(every)),
            "p99_ms": float(np.percentile(every, 99)),
        }
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
        "qps",
        "p50_ms",
        "p99_ms",
        "index_over",
        "qps_many",
        "index_over_many",
    )
    second = ("changing_qps", "changing_p50_ms", "changing_p99_ms", "changing_recall", "changing_behind", "updates_per_s")
    for title, keys in (("static", first), (f"{args.changes:,.0f} changes a second", second)):
        table = Table("index", *(key.removeprefix("changing_") for key in keys), title=f"{args.videos:,} videos, {title}")
        for name, one in found.items():
            table.add_row(name, *(f"{one[key]:,.4g}" if one[key] < 1000 else f"{one[key]:,.0f}" for key in keys))
        Console(width=140).print(table)
    for name, least in DEMANDS.items():
        if name in figures:
            print(f"{name}: {figures[name]} (>= {least}): {'met' if figures[name] >= least else 'missed'}")


def _world(args: argparse.Namespace) -> World:
    later = max(int(args.changes * (args.seconds * args.rounds + 5)), 1000)  # enough videos that enter
    if args.vectors:
        with np.load(args.vectors) as file:
            videos, queries = file["videos"].astype(np.float32), file["queries"].astype(np.float32)[: args.queries]
        if args.videos > len(videos):
            raise ValueError(f"{args.vectors} has {len(videos):,} videos, --videos asks for {args.videos:,}")
        videos = videos[np.random.default_rng(0).permutation(len(videos))]
        rest = videos[args.videos :][:later]
        videos = videos[: args.videos]
        videos = np.concatenate([videos, rest, near(videos, later - len(rest), np.random.default_rng(1))])
    else:
        videos = made_up(args.videos + later, args.dim, args.latent, args.noise, 1)
        queries = made_up(args.queries, args.dim, args.latent, args.noise, 2)
    return World(videos, np.arange(len(videos)) < args.videos, queries)


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
        found = measure(_world(args), args, lambda text: print(text, file=sys.stderr, flush=True))
    except ValueError as error:
        parser.error(str(error))
    figures = last_line(found, args)
    print_tables(found, figures, args)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
