"""What the id maps are timed against, and with: the least work that a lookup needs, streams of ids, deduplication alone.

In: maps that hold a known set of ids. Out: kernels, fresh batches. Two limits, both of which read one word of the line where
each id is looked for first and return their sum: the *plain* one goes id by id, hashes, asks for the line 48 ids ahead and
reads; the *blockwise* one does each of the three for a block of 96, so that hashing is vectorized.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monolith_jax.ids import batch
from monolith_jax.ids.cuckoo import MAX_LOAD, SLOTS, IdMaps, MapLayout
from monolith_jax.ids.lines import Tables, first_bucket, jit, load, make_distinct, mix, prefetch

NUM_SHARDS = 64
POSITIONS = 25
"""Ids of an example in the batches that are planned."""
ZIPF = 1.05

_AHEAD = 48
_RING = 64
_BLOCK = 96


@jit
def limit(ids, table, tables, lines):
    """Returns the sum of one word of the first line of each of uint64 `ids` [N]: id by id, asked for 48 ids ahead."""
    seed, buckets, offset = tables.seeds[table], tables.num_buckets[table], tables.bucket_offsets[table]
    shift, per_shard = tables.shard_shift, tables.lines_per_shard
    address, number = np.int64(lines.ctypes.data), ids.size
    at = np.full(_RING, address, np.int64)
    total = np.int64(0)
    for i in range(number):
        h = mix(ids[i] ^ seed)
        line = address + 64 * (np.int64(h >> shift) * per_shard + offset + first_bucket(h, buckets))
        total += load(at[(i - _AHEAD) & (_RING - 1)] + 32)
        at[i & (_RING - 1)] = line
        prefetch(line)
    for i in range(number, number + _AHEAD):
        total += load(at[(i - _AHEAD) & (_RING - 1)] + 32)
    return total


@jit
def limit_blocks(ids, table, tables, lines):
    """Does what `limit` does, block by block."""
    seed, buckets, offset = tables.seeds[table], tables.num_buckets[table], tables.bucket_offsets[table]
    shift, per_shard = tables.shard_shift, tables.lines_per_shard
    address, number = np.int64(lines.ctypes.data), ids.size
    at = np.empty((2, _BLOCK), np.int64)
    total = np.int64(0)
    for block in range((number + _BLOCK - 1) // _BLOCK + 1):
        first, side = block * _BLOCK, block & 1
        size = max(min(_BLOCK, number - first), 0)
        for j in range(size):
            h = mix(ids[first + j] ^ seed)
            at[side, j] = address + 64 * (np.int64(h >> shift) * per_shard + offset + first_bucket(h, buckets))
        for j in range(size):
            prefetch(at[side, j])
        if block > 0:
            for j in range(min(_BLOCK, number - first + _BLOCK)):
                total += load(at[1 - side, j] + 32)
    return total


@jit
def compute(number):
    """Returns the last of `number` hashes, each of the one before: work without memory, to see how many cores there are."""
    h = np.uint64(1)
    for _ in range(number):
        h = mix(h)
    return h


@jit
def _in_batch_order(ends, distinct, positions, inverse, out):
    """Writes for each position of the batch the index of its distinct id, int32 [N]."""
    for shard in range(ends.size):
        start = distinct.starts[shard]
        for k in range(start, ends[shard]):
            out[positions[k]] = start + inverse[k]


def layout_of(slots: int) -> MapLayout:
    """Returns the layout of one table with 64 shards that has about so many slots.

    Raises:
        ValueError: Fewer than 2^12 slots.
    """
    if slots < 2**12:
        raise ValueError(f"slots must be at least {2**12}, got {slots}")
    # The rows whose cap, mean + 6 sqrt(mean) + 4 in a shard, just fits below the greatest load.
    cap = int(MAX_LOAD * SLOTS * (slots // (SLOTS * NUM_SHARDS))) - 1
    mean = (np.sqrt(5 + cap) - 3) ** 2
    return MapLayout(("id",), (max(int(mean), 1) * NUM_SHARDS,), NUM_SHARDS)


def slots_of(layout: MapLayout) -> int:
    """Returns how many ids the maps have room for."""
    return SLOTS * NUM_SHARDS * int(layout.num_buckets.sum())


def zipf_ranks(rng: np.random.Generator, num_ids: int, size: int) -> np.ndarray:
    """Returns ranks 0.. with P(rank) ~ rank^-1.05, int64 [size], by the inverse of the continuous distribution function."""
    power = 1 - ZIPF
    ranks = ((rng.random(size) * ((num_ids + 1) ** power - 1) + 1) ** (1 / power)).astype(np.int64) - 1
    return np.clip(ranks, 0, num_ids - 1)


@dataclass(frozen=True)
class Streams:
    """Draws batches of `size` ids, uint64, from those that are stored and others."""

    rng: np.random.Generator
    stored: np.ndarray
    """uint64 [N]; the first is the most frequent of a zipf stream."""
    size: int

    def others(self, size: int) -> np.ndarray:
        """Ids that are not stored, nor twice the same (but with a chance of 10^-6)."""
        return self.rng.integers(0, 2**64, size, dtype=np.uint64)

    def missing(self) -> np.ndarray:
        """Only ids that are not stored."""
        return self.others(self.size)

    def uniform(self) -> np.ndarray:
        """Each stored id as likely."""
        return self.stored[self.rng.integers(0, self.stored.size, self.size)]

    def zipf(self) -> np.ndarray:
        """Stored ids, zipf(1.05)."""
        return self.stored[zipf_ranks(self.rng, self.stored.size, self.size)]

    def zipf_and_new(self, new: float = 0.03) -> np.ndarray:
        """Stored ids, zipf(1.05); a part `new` of the positions has ids that are not stored, each once."""
        ids = self.zipf()
        places = self.rng.random(ids.size) < new
        ids[places] = self.others(int(places.sum()))
        return ids

    def distinct_and_new(self, new: float = 0.03) -> np.ndarray:
        """The distinct ids of a `zipf_and_new` batch in the order of their first appearance."""
        ids = self.zipf_and_new(new)
        first = np.unique(ids, return_index=True)[1]
        return ids[np.sort(first)]


class Dedup:
    """The first stage of a plan alone, in arrays that are used again, as a plan does."""

    def __init__(self, tables: Tables, size: int) -> None:
        """For batches of `size` ids, a multiple of 25, of the first table."""
        self._tables, self._shape = tables, (size // POSITIONS, POSITIONS)
        self._valid, self._seen_s = np.ones(self._shape, np.bool_), np.zeros(self._shape[0], np.uint32)
        self._position_tables = np.zeros(POSITIONS, np.int32)
        self.distinct = make_distinct(size, NUM_SHARDS)
        self._hashes = np.empty(size, np.uint64)
        self._positions, self._inverse, self.inverse = (np.empty(size, np.int32) for _ in range(3))

    def run(self, ids: np.ndarray) -> None:
        """Fills `distinct`, by shard, and the inverse by shard."""
        ids = ids.reshape(self._shape)
        sizes = (self._position_tables, self._tables.seeds, self._tables.shard_shift, 0, self._shape[0])
        counts = np.zeros(NUM_SHARDS, np.int64)
        batch.count_occurrences(ids, self._valid, *sizes, counts)
        self._ends = counts.cumsum()
        self.distinct.starts[:] = self._ends - counts
        places = self.distinct.starts.copy()
        batch.group_by_shard(ids, self._valid, *sizes, places, self._hashes, self._positions)
        scratch = np.empty(1 << max(int(2 * counts.max() - 1).bit_length(), 4), np.int32)
        batch.dedup(
            self._ends, self._hashes, self._positions, self._position_tables, self._seen_s, 0, NUM_SHARDS, scratch,
            self.distinct, self._inverse,
        )  # fmt: skip

    def run_in_order(self, ids: np.ndarray) -> np.ndarray:
        """Like `run`; returns for each id of the batch the index of its distinct id, int32 [size], as np.unique does."""
        self.run(ids)
        _in_batch_order(self._ends, self.distinct, self._positions, self._inverse, self.inverse)
        return self.inverse


def fill(maps: IdMaps, ids: np.ndarray, seen_s: int = 1000, step: int = 2**20) -> None:
    """Puts distinct ids into the first table, a part at a time.

    Raises:
        ValueError: Some were refused.
    """
    for first in range(0, ids.size, step):
        part = ids[first : first + step]
        refused = maps.lookup_or_insert(part, 0, np.full(part.size, seen_s, np.uint32))[3:]
        if any(refused):
            raise ValueError(
                f"{sum(refused)} of {ids.size:,} ids do not fit into maps for {maps.layout.max_rows[0]:,} ids; expected more "
                "slots or less load (small shards fill unevenly)"
            )
