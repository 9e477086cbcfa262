"""What is measured once of the id maps: how full they get, bytes, the longest insertion, the filter's errors, the first plan.

In: the size of the maps. Out: figures by name.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from launch.bench.id_kernels import NUM_SHARDS, POSITIONS, layout_of, slots_of, zipf_ranks
from monolith_jax.ids.admission import GENERATIONS, AdmissionConfig, make_rules
from monolith_jax.ids.cuckoo import MAX_LOAD, IdMaps, MapLayout
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.ids.mapper import Mapper
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.types import GroupIds

FILLS = 3
TIMES = 3
"""Occurrences after which the filter admits an id."""
MOST_OCCURRENCES = 1000
FILTER_BYTES = 2.56
"""Of the filter for each distinct id of the stream."""


def _distinct(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns distinct ids, uint64 [size], in no order."""
    ids = np.unique(rng.integers(0, 2**64, size + size // 1000 + 16, dtype=np.uint64))
    return rng.permutation(ids)[:size]


def capacity(slots: int, seed: int = 1) -> dict[str, float]:
    """Returns the load at which the first id is refused for lack of a path, and bytes per id at the load of the cap.

    Maps that may be filled to the last slot are filled with random ids; the load is that of all shards together at the first
    refusal in any. Bytes are those of all arrays of maps as they are used, over ids at load 0.85.
    """
    layout = layout_of(slots)
    maps = IdMaps(MapLayout(("id",), (slots,), NUM_SHARDS, max_load=1.0))
    room = slots_of(maps.layout)
    ids = _distinct(np.random.default_rng(seed), room)
    step, held = max(room // 64, 1), 0
    for first in range(0, ids.size, step):
        part = ids[first : first + step]
        _, _, fresh, _, no_path = maps.lookup_or_insert(part, 0, np.zeros(part.size, np.uint32))
        if no_path:
            held += int(np.argmin(fresh))  # Ids are inserted in their order.
            break
        held += int(fresh.sum())
    nbytes = sum(array.nbytes for array in IdMaps(layout).arrays)
    return {"max_load_reached": held / room, "bytes_per_entry": nbytes / (MAX_LOAD * slots_of(layout))}


def longest(slots: int, seed: int = 2) -> dict[str, float]:
    """Returns the time of the longest call with new ids, from empty maps to the cap, over the median call.

    Calls are `IdMaps.lookup_or_insert` with 2^18 new ids each (fewer where the maps are small) up to `max_rows` ids. They are
    inserted three times into empty maps whose pages have been touched, and a call's time is the fastest of its three, so that
    what others do on the machine does not count as ours. (`single_fill`: as it was, the median over the three fills.)
    """
    layout, rng = layout_of(slots), np.random.default_rng(seed)
    step = min(2**18, slots // 64)
    ids = _distinct(rng, layout.max_rows[0] // step * step)
    seconds = np.full((FILLS, ids.size // step), np.inf)
    for number in range(FILLS):
        maps = IdMaps(layout)
        for call in range(ids.size // step):
            part, seen_s = ids[call * step : (call + 1) * step], np.zeros(step, np.uint32)
            started = time.perf_counter()
            maps.lookup_or_insert(part, 0, seen_s)
            seconds[number, call] = time.perf_counter() - started
    fastest = seconds.min(0)
    once = np.median(seconds.max(1) / np.median(seconds, 1))
    return {
        "longest_over_median": float(fastest.max() / np.median(fastest)),
        "longest_over_median_single_fill": float(once),
        "longest_s": float(seconds.max()),
        "longest_ids": step,
    }


def filter_errors(num_ids: int, seed: int = 3) -> dict[str, float]:
    """Returns how often the filter of rule `seen`, 3 times, is wrong about an id.

    The stream has N distinct ids: an id occurs k times or more with probability 1 / k, at most 1000 times (half of the ids
    once, a sixth twice, a third three times and more, 7.5 times on average), in random order, in batches of 80,000 examples
    with 25 ids. False: ids with less than three occurrences that got a row, of all such ids; missed: ids with three or more
    that got none, of all such ids. Twice: with a filter that has 2.56 bytes for each of the N ids, whatever window that is,
    and (`window`) with `AdmissionConfig.window` = N.
    """
    rng = np.random.default_rng(seed)
    ids = _distinct(rng, num_ids)
    counts = np.minimum(1 / (1 - rng.random(num_ids)), MOST_OCCURRENCES).astype(np.int64)
    stream = np.repeat(ids, counts)
    rng.shuffle(stream)
    figures: dict[str, float] = {"filter_ids": num_ids, "filter_occurrences": stream.size}
    bytes_of_window = _filter_nbytes(num_ids)
    for name, window in (("filter", int(num_ids * FILTER_BYTES / (bytes_of_window / num_ids))), ("filter_window", num_ids)):
        admitted = _admitted(ids, stream, window)
        figures[f"{name}_bytes_per_id"] = _filter_nbytes(window) / num_ids
        figures[f"{name}_false_admit"] = float(admitted[counts < TIMES].mean())
        figures[f"{name}_missed"] = float((~admitted[counts >= TIMES]).mean())
    return figures


def _filter_nbytes(window: int) -> int:
    """Returns the bytes of the filter of one table, without what is padded."""
    rules = make_rules([AdmissionConfig("seen", TIMES, window)], [window], NUM_SHARDS)
    return 64 * NUM_SHARDS * GENERATIONS * int(rules.num_lines[0])


def _admitted(ids: np.ndarray, stream: np.ndarray, window: int) -> np.ndarray:
    """Returns for each of distinct ids whether it got a row by the end of the stream, bool."""
    rule = Rule(AdmissionConfig("seen", TIMES, window))
    mapper = GroupMapper(MapLayout(("id",), (ids.size,), NUM_SHARDS), (0,) * POSITIONS, 1, [rule])
    size = 80_000 * POSITIONS
    for number, first in enumerate(range(0, stream.size, size)):
        part = stream[first : first + size]
        padded = np.resize(part, -(-part.size // POSITIONS) * POSITIONS).reshape(-1, POSITIONS)
        valid = (np.arange(padded.size) < part.size).reshape(padded.shape)
        mapper.plan(GroupIds(padded.view(np.int64), valid), np.zeros(len(padded), np.uint32), 0, number)
    return mapper.maps.lookup(ids, 0)[1] >= 0


def first_plan() -> float:
    """Returns the seconds of the first plan of this process, the making of its maps included."""
    ids = np.arange(1000, dtype=np.int64).reshape(-1, 4)
    started = time.perf_counter()
    mapper = GroupMapper(MapLayout(("id",), (10_000,), NUM_SHARDS), (0,) * 4, 1, [Rule(AdmissionConfig("seen", 3), 86_400)])
    mapper.plan(GroupIds(ids, np.ones(ids.shape, np.bool_)), np.full(250, 1000, np.uint32), 1000, 0)
    return time.perf_counter() - started


def starts() -> dict[str, float]:
    """Returns the seconds of the first plan of a new process, imports not counted: numba's cache is empty, or holds it all."""
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold_start_s", "warm_start_s"):
            done = subprocess.run(
                [sys.executable, "-c", "from launch.bench.id_once import first_plan; print(first_plan())"],
                cwd=Path(__file__).parents[2],
                env={**os.environ, "NUMBA_CACHE_DIR": cache},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            figures[name] = float(done.stdout)
    return figures


def _ids_of(numbers: np.ndarray) -> np.ndarray:
    """Returns the ids, int64, of int64 numbers: one to one, and spread over all 64 bits."""
    return (numbers.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


_TTL_S, _FIRST_S, _STEP_S = 1_000_000, 2_000_000, 100


def _full_mapper(num_entries: int, threads: int, rng: np.random.Generator) -> GroupMapper:
    """Returns a mapper with rule seen and a time to live whose ids were last seen at random times of the latter."""
    rule = Rule(AdmissionConfig("seen", TIMES, num_entries), _TTL_S)
    layout = MapLayout(("id",), (num_entries,), NUM_SHARDS)
    mapper = GroupMapper(layout, (0,) * POSITIONS, 1, [rule], ShardThreads(threads, ()))
    part = 2_000_000
    for first in range(0, num_entries, part):
        numbers = np.arange(first, min(first + part, num_entries), dtype=np.int64)
        seen_s = rng.integers(_FIRST_S - _TTL_S, _FIRST_S, numbers.size).astype(np.uint32)
        mapper.maps.lookup_or_insert(_ids_of(numbers), 0, seen_s)
    return mapper


def sustained(
    num_entries: int, batch_size: int, threads: int, seconds: float, say: Callable[[str], None], least_steps: int = 100
) -> dict[str, float]:
    """Plans batch after batch with maps that hold `num_entries` ids; returns rate, times of a step and peak memory.

    A batch has `batch_size` examples of 25 ids: 97 % zipf(1.05) over the ids of the start, 1.5 % new ids three times each,
    which are admitted at once (rule seen, 3 times), 1.5 % ids seen only once. The ids of the start were last seen at random
    times in the 10^6 s before, which is also the time to live, and a batch comes each 100 s, so that about as many rows run out
    as are given. Runs for about `seconds`, filling not counted, and at least `least_steps` steps, of which the first, which
    makes room for its batch, is told apart.
    """
    rng = np.random.default_rng(4)
    group = _full_mapper(num_entries, threads, rng)
    say(f"{int(group.maps.num_rows.sum()):,} ids are in")
    mapper, took, stats = Mapper([group]), [], []
    size, next_number = batch_size * POSITIONS, num_entries
    new = max(size // 200, 1)
    started = time.perf_counter()
    while len(took) < least_steps or time.perf_counter() - started < seconds:
        numbers = zipf_ranks(rng, num_entries, size)
        places = rng.choice(size, 6 * new, replace=False)
        numbers[places[: 3 * new]] = next_number + np.arange(3 * new) % new
        numbers[places[3 * new :]] = next_number + new + np.arange(3 * new)
        next_number += 4 * new
        ids = GroupIds(_ids_of(numbers).reshape(-1, POSITIONS), np.ones((batch_size, POSITIONS), np.bool_))
        now_ms = (_FIRST_S + _STEP_S * len(took)) * 1000
        event_time_ms = np.full(batch_size, now_ms, np.int64)
        begin = time.perf_counter()
        plan = mapper.plan([ids], event_time_ms, now_ms, len(took))
        took.append(time.perf_counter() - begin)
        stats.append(plan.stats)
    p50, p99 = np.quantile(took[1:], (0.5, 0.99))
    return {
        "sustained_ids_per_s": size * (len(took) - 1) / sum(took[1:]),
        "step_p50_ms": 1e3 * float(p50),
        "step_p99_ms": 1e3 * float(p99),
        "step_longest_ms": 1e3 * max(took[1:]),
        "step_first_ms": 1e3 * took[0],
        "steps": len(took),
        "entries": stats[-1]["rows"],
        "new_per_step": statistics.mean(of_step["fresh"] for of_step in stats),
        "freed_per_step": statistics.mean(of_step["expired"] + of_step["freed_at_cap"] for of_step in stats),
        "refused_at_cap": sum(of_step["refused_at_cap"] for of_step in stats),
        "refused_no_path": sum(of_step["refused_no_path"] for of_step in stats),
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def all_once(slots: int) -> dict[str, float]:
    """Returns all figures of this module but those of `sustained`."""
    return capacity(slots) | longest(slots) | filter_errors(max(slots // 8, 2**12)) | starts()
