"""What the ids of a group cost the host, and how large its plans become, without making either.

In: sizes and rules of tables, the positions of an example. Out: bytes of maps, filters and work, the distinct ids of a batch
under an assumption, and the padded sizes of a plan. The sizes are those of `MapLayout`, `admission.make_rules` and `mapper`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from monolith_jax.ids import admission, expiry
from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.ids.group import Rule
from monolith_jax.ids.lines import LINE_WORDS
from monolith_jax.ids.sizes import first_sizes, fresh_size, grown_size

ZIPF = 1.05
"""Exponent of the estimate, that of the benchmarks (`launch.bench`)."""

DistinctIds = Callable[[float, float], float]
"""Distinct ids among `draws` of a table of `rows`."""

_LINE_BYTES = 4 * LINE_WORDS
_OCCURRENCE_BYTES = 57 + 2 * 16
"""Scratch of `GroupMapper` for an id position: itself, and room for two freed rows."""


@dataclass(frozen=True)
class PlanSizes:
    """The padded sizes of a group's plan, as in `GroupPlan`, and what they are for."""

    touched: int
    """V, rows that a device touches."""
    sent: int
    """U, rows that an owner sends to a slice."""
    fresh: int
    """F, rows of a device that start afresh."""
    in_batch: float
    """Distinct ids of a batch."""
    in_slice: float
    """Distinct ids of one slice of the batch."""


def most_distinct(draws: float, rows: float) -> float:
    """Returns the most distinct ids that `draws` of a table of `rows` can have: an upper bound of what is moved."""
    return min(draws, rows)


def zipf_distinct(draws: float, rows: float) -> float:
    """Returns the expected number of distinct ids among `draws` from `rows` ids with P(rank) ~ rank^-1.05.

    Exact to a part in a thousand: the first 4,096 ranks one by one, those after in 4,096 classes of about equal probability.
    """
    power, last = 1 - ZIPF, rows + 1
    ranks = np.arange(1.0, min(rows, 4096) + 1)
    edges = np.concatenate([ranks, np.geomspace(ranks[-1] + 1, last, 4097)]) if rows > 4096 else np.append(ranks, last)
    mass = np.diff((edges**power - 1) / (last**power - 1))
    size = np.diff(edges)
    return float(np.sum(-size * np.expm1(draws * np.log1p(-np.minimum(mass / size, 1 - 1e-12)))))


def largest_part(number: float, parts: int, cells: int) -> int:
    """Returns how many of `number` ids the largest of `cells` parts gets, if each id hashes to one of `parts`.

    Bernstein's inequality (Boucheron, Lugosi, Massart 2013, section 2.8) for the sum of as many indicators, at 1 / `cells`.
    """
    if parts == 1:
        return math.ceil(number)
    mean, tail = number / parts, math.log(cells)
    above = tail / 3 + math.sqrt((tail / 3) ** 2 + 2 * mean * tail)
    return math.ceil(min(number, mean + above))


def plan_sizes(
    layout: MapLayout, position_tables: Sequence[int], batch_size: int, num_devices: int, distinct: DistinctIds
) -> PlanSizes:
    """Returns the sizes of the first plan of a run, in which every id is fresh and every list is full.

    Args:
        layout: Tables of the group.
        position_tables: Table index of each of the P positions of an example.
        batch_size: B.
        num_devices: S.
        distinct: The assumption.
    """
    positions = np.bincount(np.asarray(position_tables, np.int64), minlength=len(layout.names))
    pairs = list(zip(positions.tolist(), layout.max_rows, strict=True))
    in_batch = sum(distinct(batch_size * number, rows) for number, rows in pairs)
    in_slice = sum(distinct(batch_size // num_devices * number, rows) for number, rows in pairs)
    of_device = largest_part(in_batch, num_devices, num_devices)
    of_pair = largest_part(in_slice, num_devices, num_devices**2)
    first_touched, first_sent = first_sizes(num_devices)
    touched, sent = grown_size(first_touched, of_device), grown_size(first_sent, of_pair)
    return PlanSizes(touched, sent, fresh_size(of_device), in_batch, in_slice)


def map_bytes(layout: MapLayout) -> dict[str, int]:
    """Returns the bytes of the arrays of `IdMaps` by name."""
    by_table = 4 * layout.num_shards * len(layout.names)
    return {
        "lines": layout.num_shards * layout.lines_per_shard * _LINE_BYTES,
        "used": 4 * layout.num_shards * int(_words(layout).sum()),
        "counts": by_table,
        "cursors": by_table,
    }


def array_bytes(layout: MapLayout, rules: Sequence[Rule]) -> dict[str, int]:
    """Returns the bytes of the arrays of a group's `GroupMapper` by name: its state, and `pinned`, which is not saved."""
    admitted = admission.make_rules([rule.admission for rule in rules], layout.max_rows, layout.num_shards)
    of_maps, by_table = map_bytes(layout), 4 * layout.num_shards * len(layout.names)
    return of_maps | {
        "filters": layout.num_shards * admitted.lines_per_shard * _LINE_BYTES,
        "filter_heads": by_table,
        "filter_taken": by_table,
        "sweeps": by_table,
        "wanted": by_table,
        "pinned": of_maps["used"] if any(rule.ttl_s for rule in rules) else 4,
    }


def bytes_of_tables(layout: MapLayout, rules: Sequence[Rule]) -> np.ndarray:
    """Returns each table's part of the sum of `array_bytes`, float64 [T]."""
    admitted = admission.make_rules([rule.admission for rule in rules], layout.max_rows, layout.num_shards)
    lines = layout.num_buckets + admission.GENERATIONS * admitted.num_lines
    own = lines * _LINE_BYTES + 8 * _words(layout)
    return own / own.sum() * sum(array_bytes(layout, rules).values())


def tier_bytes(num_shards: int, rows_per_shard: int, slots_per_shard: int) -> int:
    """Returns the bytes of the arrays of a `Tier` by its sizes L, R and C, and of the loop's copy of the rows in the slots."""
    return num_shards * (4 * rows_per_shard + 9 * slots_per_shard + 4)


def work_bytes(layout: MapLayout, rules: Sequence[Rule], occurrences: int) -> int:
    """Returns the bytes that a group's `GroupMapper` works with for a batch of so many id positions."""
    freed = max(256, int(layout.caps.sum()) // expiry.CAP_PARTS) if any(rule.ttl_s for rule in rules) else 0
    return _OCCURRENCE_BYTES * occurrences + 16 * layout.num_shards * (1 + freed)


def _words(layout: MapLayout) -> np.ndarray:
    return (layout.caps + 31) // 32
