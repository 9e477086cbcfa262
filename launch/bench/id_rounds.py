"""The speeds of the id maps: kernels that take turns within one process, on fresh ids every time.

In: the size of the maps. Out: ids per second and ratios. A rate is the median over the rounds; a ratio is the median over the
rounds of the ratio within a round. Where two threads are compared with one, each runs three batches in a row and the last one
counts: threads that slept since their last turn are often woken on the same core, and a training run never lets them sleep.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launch.bench.id_kernels import (
    NUM_SHARDS,
    POSITIONS,
    Dedup,
    Streams,
    compute,
    fill,
    layout_of,
    limit,
    limit_blocks,
    slots_of,
)
from monolith_jax.ids import kernels
from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.ids.lines import make_distinct
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.types import GroupIds

LEAST_ROUNDS = 9
SCALING = {
    "threads2_scaling": ("plan_threads2", "plan_threads1"),
    "lookup_threads2_scaling": ("lookup_threads2", "hit_uniform"),
    "limit_threads2_scaling": ("limit_threads2", "limit"),
    "compute_threads2_scaling": ("compute_threads2", "compute"),
}
"""Two threads over one."""


@dataclass
class Lane:
    """One thing that is timed, in turns with the others."""

    draw: Callable[[], np.ndarray]
    """Returns fresh ids; not timed."""
    run: Callable[[np.ndarray], Any]
    after: Callable[[np.ndarray, Any], None] = lambda ids, result: None
    """Puts things right again, not timed, or checks them."""
    repeats: int = 0
    """Further batches right after the first, for what depends on threads being awake."""
    ids_per_s: list[float] = field(default_factory=list)
    awake_ids_per_s: list[float] = field(default_factory=list)
    """Of the last batch of each turn."""

    def turn(self) -> None:
        """Runs once, and the repeats after it."""
        batches = [self.draw() for _ in range(1 + self.repeats)]
        rates = []
        for ids in batches:
            started = time.perf_counter()
            result = self.run(ids)
            rates.append(ids.size / (time.perf_counter() - started))
            self.after(ids, result)
        self.ids_per_s.append(rates[0])
        self.awake_ids_per_s.append(rates[-1])


def pandas_factorize() -> Callable[[np.ndarray], Any] | None:
    """Returns pandas' deduplication, None where it is not installed."""
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return pandas.factorize


class Rounds:
    """The lanes over maps that are filled once."""

    def __init__(self, slots: int, load: float, threads: int, seed: int = 0) -> None:
        """Fills maps of `slots` slots to `load`; plans are timed with 1, 2 and `threads` threads.

        Raises:
            ValueError: The maps cannot be filled that far.
        """
        layout, rng = layout_of(slots), np.random.default_rng(seed)
        self.threads = threads
        self._mappers = {
            number: GroupMapper(
                layout, (0,) * POSITIONS, 1, [Rule(AdmissionConfig("seen", 3), 86_400)], ShardThreads(number, ())
            )
            for number in sorted({1, 2, threads})
        }
        self._maps = self._mappers[1].maps
        for mapper in self._mappers.values():
            mapper.maps = self._maps  # The same ids at the same addresses for all.
        self.num_slots = slots_of(layout)
        size = min(2_000_000, slots // 8) // POSITIONS * POSITIONS
        stored = rng.permutation(np.unique(rng.integers(0, 2**64, int(load * self.num_slots), dtype=np.uint64)))
        fill(self._maps, stored)
        self.load = stored.size / self.num_slots
        self._streams, self._plans = Streams(rng, stored, size), 0
        self._dedup = Dedup(layout.tables, size)
        self._valid = np.ones((size // POSITIONS, POSITIONS), np.bool_)
        self._pool = ThreadPoolExecutor(2)
        self.lanes = self._lookup_lanes() | self._other_lanes()
        for pair in SCALING.values():
            for name in pair:
                self.lanes[name].repeats = 2

    def _lookup_lanes(self) -> dict[str, Lane]:
        maps, streams, arguments = self._maps, self._streams, (0, self._maps.layout.tables, self._maps.arrays.lines)
        lanes: dict[str, Lane] = {}
        for name, draw in (("uniform", streams.uniform), ("zipf", streams.zipf), ("miss", streams.missing)):
            suffix = "" if name == "uniform" else f"_{name}"
            lanes[f"limit{suffix}"] = Lane(draw, lambda ids: limit(ids, *arguments))
            lanes[f"limit_blocks{suffix}"] = Lane(draw, lambda ids: limit_blocks(ids, *arguments))
            lane = Lane(draw, lambda ids: maps.lookup(ids, 0), _check_missing if name == "miss" else _check_found)
            lanes["miss" if name == "miss" else f"hit_{name}"] = lane
        lanes["lookup_threads2"] = Lane(streams.uniform, lambda ids: self._halves(lambda part: maps.lookup(part, 0), ids))
        lanes["limit_threads2"] = Lane(streams.uniform, lambda ids: self._halves(lambda part: limit(part, *arguments), ids))
        # Eight hashes an id: about as long as a plan, so that the system has the same time to spread the threads.
        lanes["compute"] = Lane(streams.uniform, lambda ids: compute(8 * ids.size))
        lanes["compute_threads2"] = Lane(streams.uniform, lambda ids: self._halves(lambda part: compute(8 * part.size), ids))
        return lanes

    def _other_lanes(self) -> dict[str, Lane]:
        streams, dedup = self._streams, self._dedup
        lanes = {
            "touch_zipf": Lane(streams.zipf, self._touch),
            "insert3_zipf": Lane(streams.zipf_and_new, self._insert, self._erase_new),
            "insert3_distinct_zipf": Lane(streams.distinct_and_new, self._insert, self._erase_new),
            "numpy_unique": Lane(streams.zipf, lambda ids: np.unique(ids, return_inverse=True)),
            "unique": Lane(streams.zipf, dedup.run_in_order),
            "unique_by_shard": Lane(streams.zipf, dedup.run),
        }
        for number in self._mappers:
            lanes[f"plan_threads{number}"] = Lane(streams.zipf, lambda ids, number=number: self._plan(ids, number))
        factorize = pandas_factorize()
        if factorize:
            lanes["pandas_factorize"] = Lane(streams.zipf, factorize)
        return lanes

    def _halves(self, task: Callable[[np.ndarray], Any], ids: np.ndarray) -> list[Any]:
        return list(self._pool.map(task, (ids[: ids.size // 2], ids[ids.size // 2 :])))

    def _touch(self, ids: np.ndarray) -> np.ndarray:
        """The rows of a raw batch with their last-seen written, hashing included."""
        distinct = make_distinct(ids.size, 1)
        kernels.hash_ids(ids, self._maps.layout.seeds[0], distinct.hashes)
        distinct.tables[:], distinct.seen_s[:], distinct.numbers[:] = 0, 1000, ids.size
        kernels.find(self._maps.layout.tables, self._maps.arrays.lines, distinct, 0, 1, True)
        return distinct.rows

    def _insert(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
        return self._maps.lookup_or_insert(ids, 0, np.full(ids.size, 1000, np.uint32))

    def _erase_new(self, ids: np.ndarray, result: Any) -> None:
        if any(result[3:]):
            raise ValueError(f"{sum(result[3:])} new ids were refused: the load leaves no room for a batch of new ids")
        self._maps.erase(ids[result[2]], 0)

    def _plan(self, ids: np.ndarray, threads: int) -> Any:
        self._plans += 1
        batch_ids = ids.view(np.int64).reshape(-1, POSITIONS)
        seen_s = np.full(batch_ids.shape[0], 1000 + self._plans, np.uint32)
        return self._mappers[threads].plan(GroupIds(batch_ids, self._valid), seen_s, 1000 + self._plans, self._plans)

    def run(self, seconds: float, say: Callable[[str], None]) -> dict[str, float | None]:
        """Runs rounds for about so many seconds, at least 9; returns the figures by name."""
        for lane in self.lanes.values():  # Compiles, and grows what grows.
            lane.turn()
            lane.ids_per_s.clear()
            lane.awake_ids_per_s.clear()
        names, started, number = list(self.lanes), time.perf_counter(), 0
        while number < LEAST_ROUNDS or time.perf_counter() - started < seconds:
            turned = names[number % len(names) :] + names[: number % len(names)]
            for name in turned if number % 2 == 0 else turned[::-1]:
                self.lanes[name].turn()
            number += 1
        self._pool.shutdown()
        say(f"{number} rounds of {len(names)} kernels, {self._streams.size:,} ids each, {NUM_SHARDS} shards")
        return {"rounds": number, **self._figures()}

    def _figures(self) -> dict[str, float | None]:
        def over(name: str, other: str) -> float:
            pairs = zip(self.lanes[name].ids_per_s, self.lanes[other].ids_per_s, strict=True)
            return statistics.median(a / b for a, b in pairs)

        figures: dict[str, float | None] = {}
        for name, lane in self.lanes.items():
            figures[f"{name}_ids_per_s"] = statistics.median(lane.ids_per_s)
        plan = f"plan_threads{self.threads}"
        figures["plan_ids_per_s"] = figures[f"{plan}_ids_per_s"]
        for name, suffix in (("hit_uniform", ""), ("hit_zipf", "_zipf"), ("miss", "_miss")):
            figures[f"{name}_over_limit"] = over(name, f"limit{suffix}")
            figures[f"{name}_over_limit_blocks"] = over(name, f"limit_blocks{suffix}")
        figures["insert3_zipf_over_hit_zipf"] = over("insert3_zipf", "hit_zipf")
        figures["insert3_distinct_zipf_over_hit_zipf"] = over("insert3_distinct_zipf", "hit_zipf")
        figures["unique_over_numpy"] = over("unique", "numpy_unique")
        figures["unique_by_shard_over_numpy"] = over("unique_by_shard", "numpy_unique")
        has_pandas = "pandas_factorize" in self.lanes
        figures["unique_over_pandas"] = over("unique", "pandas_factorize") if has_pandas else None
        figures["plan_over_hit_zipf"] = over(plan, "hit_zipf")
        for name, (two, one) in SCALING.items():
            pairs = zip(self.lanes[two].awake_ids_per_s, self.lanes[one].awake_ids_per_s, strict=True)
            figures[name] = statistics.median(a / b for a, b in pairs)
        return figures


def _check_found(ids: np.ndarray, result: tuple[np.ndarray, np.ndarray]) -> None:
    if (result[1] < 0).any():
        raise ValueError(f"{int((result[1] < 0).sum())} of {ids.size} stored ids were not found")


def _check_missing(ids: np.ndarray, result: tuple[np.ndarray, np.ndarray]) -> None:
    if (result[1] >= 0).any():
        raise ValueError(f"{int((result[1] >= 0).sum())} of {ids.size} ids were found that are not stored")
