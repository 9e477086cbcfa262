"""The id maps of a group of tables: 64-bit ids to rows, without collisions, sized once.

In: distinct ids of tables. Out: the shard and the row of each, and which are new. Two ids never share a row; a table that is
full refuses new ids and counts them. All state is in arrays with the shards as leading axis (`get_state`), so results depend
neither on the mesh nor on threads, and a snapshot on another mesh is plain resharding.

Cuckoo hashing with buckets of four (Pagh and Rodler 2004; Dietzfelbinger and Weidling 2007) and breadth-first displacement
(Li et al. 2014, "Algorithmic Improvements for Fast Concurrent Cuckoo Hashing", section 4.3.2). Bytes: `kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from monolith_jax.ids import kernels

MAX_LOAD = 0.85
"""Ids over slots when a shard is at its cap; insertion slows down quickly above."""

MIN_BUCKETS = 8
"""Tiny tables get this many buckets a shard: with fewer, a few unlucky ids can have no place below the cap."""


def text_seed(text: str, seed: int = 0) -> int:
    """Returns 64 bits that depend on a text and a seed only: the same in every process and on every machine."""
    value = np.uint64(seed % 2**64)
    with np.errstate(over="ignore"):
        for byte in text.encode():
            value = _mix_scalar(value ^ np.uint64(byte + 1))
    return int(value)


def _mix_scalar(value: np.uint64) -> np.uint64:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class MapLayout:
    """The sizes of the id maps of a group, from its tables' caps. The device's array of the group has the same R."""

    names: tuple[str, ...]
    """Names of the tables: their hash seeds come from them, so ids of two tables are apart."""
    max_rows: tuple[int, ...]
    """Distinct ids that each table must be able to hold."""
    num_shards: int
    """L, a power of two."""

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: L is no power of two, a table is empty, or a shard has more rows than int32 can count.
        """
        if not 2 <= self.num_shards <= 4096 or self.num_shards & (self.num_shards - 1):
            raise ValueError(f"MeshConfig.num_shards must be a power of two from 2 to 4096, got {self.num_shards}")
        for name, rows in zip(self.names, self.max_rows, strict=True):
            if rows < 1:
                raise ValueError(f"TableConfig.max_rows of table {name!r} must be at least 1, got {rows}")
        if self.rows_per_shard >= 2**31 // 16:
            raise ValueError(
                f"a shard of tables {self.names} would have {self.rows_per_shard:,} rows; raise MeshConfig.num_shards"
            )

    @cached_property
    def caps(self) -> np.ndarray:
        """Rows of each table in one shard, int64 [T].

        The mean plus six standard deviations of a binomial: hashing spreads ids unevenly over the shards, and `max_rows`
        distinct ids must still fit (a shard overflows less than once in 10^8 times).
        """
        means = [rows / self.num_shards for rows in self.max_rows]
        caps = [math.ceil(mean + 6 * math.sqrt(mean) + 4) for mean in means]
        return np.array([min(cap, rows) for cap, rows in zip(caps, self.max_rows, strict=True)], np.int64)

    @property
    def rows_per_shard(self) -> int:
        """R: rows of all tables in one shard."""
        return _many_divisors(int(self.caps.sum()))

    @cached_property
    def row_offsets(self) -> np.ndarray:
        """Where each table's rows start in a shard, int64 [T]."""
        return np.concatenate([[0], np.cumsum(self.caps)[:-1]]).astype(np.int64)

    @cached_property
    def num_buckets(self) -> np.ndarray:
        """Buckets of each table in one shard, int64 [T]."""
        needed = np.ceil(self.caps / (MAX_LOAD * kernels.SLOTS)).astype(np.int64)
        return np.maximum(needed, MIN_BUCKETS)

    @cached_property
    def bucket_offsets(self) -> np.ndarray:
        """Where each table's lines start in a shard, int64 [T]."""
        return np.concatenate([[0], np.cumsum(self.num_buckets)[:-1]]).astype(np.int64)

    @cached_property
    def word_offsets(self) -> np.ndarray:
        """Where each table's bits of used rows start in a shard, int64 [T]."""
        words = (self.caps + 31) // 32
        return np.concatenate([[0], np.cumsum(words)[:-1]]).astype(np.int64)

    @cached_property
    def seeds(self) -> np.ndarray:
        """Hash seed of each table, uint64 [T]."""
        return np.array([text_seed(name) for name in self.names], np.uint64)

    @property
    def shard_shift(self) -> np.uint64:
        """How far a hash is shifted to leave its shard, uint64. (A shift by 64 is undefined, hence at least two shards.)"""
        return np.uint64(64 - (self.num_shards.bit_length() - 1))


def _aligned_lines(num_lines: int) -> np.ndarray:
    """Returns zeroed uint32 [num_lines, 16] whose lines are cache lines."""
    raw = np.empty(num_lines * 64 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    lines = raw[start : start + num_lines * 64].view(np.uint32).reshape(num_lines, kernels.LINE_WORDS)
    lines[:] = 0
    lines[:, 8:12] = 0xFFFFFFFF
    return lines


class IdMaps:
    """The id maps of all tables of a group.

    Not thread safe: one caller at a time.
    """

    def __init__(self, layout: MapLayout) -> None:
        """Allocates empty maps: 16 bytes a slot."""
        self.layout = layout
        num_shards, num_tables = layout.num_shards, len(layout.names)
        self._lines_per_shard = _many_divisors(int(layout.num_buckets.sum()))
        self._lines = _aligned_lines(num_shards * self._lines_per_shard)
        self._used = np.zeros((num_shards, int(((layout.caps + 31) // 32).sum())), np.uint32)
        self._counts = np.zeros((num_shards, num_tables), np.int32)
        self._cursors = np.zeros((num_shards, num_tables), np.int32)
        self._queue = np.zeros((kernels.QUEUE, 3), np.int64)

    @property
    def num_rows(self) -> np.ndarray:
        """Ids in each table, int64 [T]."""
        return self._counts.sum(0, dtype=np.int64)

    def lookup_or_insert(
        self, ids: np.ndarray, hashes: np.ndarray, tables: np.ndarray, seen_s: np.ndarray, insert: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
        """Finds or makes the rows of distinct ids.

        Args:
            ids: uint64 [N], distinct within their table.
            hashes: uint64 [N], from `kernels.dedup` or `hashes_of`.
            tables: int32 [N], indexes into the layout's names.
            seen_s: uint32 [N], event times in seconds.
            insert: False: nothing is changed, ids without a row get -1.

        Returns:
            shards int32 [N], rows int32 [N] in the shard's table (-1: refused), fresh bool [N], and how many ids were
            refused because of the cap, and because no path to a free slot was found.
        """
        layout = self.layout
        shards = np.empty(ids.size, np.int32)
        rows = np.empty(ids.size, np.int32)
        fresh = np.empty(ids.size, np.bool_)
        at_cap, no_path = kernels.lookup_or_insert(
            hashes, ids, tables, seen_s, layout.seeds, layout.bucket_offsets, layout.num_buckets, layout.word_offsets,
            layout.caps, layout.shard_shift, self._lines.view(np.uint64), self._lines.view(np.int32), self._lines_per_shard,
            self._used, self._counts, self._cursors, self._queue, insert, shards, rows, fresh,
        )  # fmt: skip
        return shards, rows, fresh, at_cap, no_path

    def hashes_of(self, ids: np.ndarray, table: int) -> np.ndarray:
        """Returns the hashes of uint64 ids [N] of one table."""
        hashes = np.empty(ids.size, np.uint64)
        kernels.hash_ids(ids, self.layout.seeds[table], hashes)
        return hashes

    def lookup(self, ids: np.ndarray, table: int) -> np.ndarray:
        """Returns shard and row of ids of one table, int32 [N, 2]; row -1 where an id has none. Changes nothing."""
        ids = np.ascontiguousarray(ids).view(np.uint64)
        layout = self.layout
        out = np.empty((ids.size, 2), np.int32)
        kernels.lookup(
            self.hashes_of(ids, table), ids, table, layout.bucket_offsets, layout.num_buckets, layout.shard_shift,
            self._lines.view(np.uint64), self._lines.view(np.int32), self._lines_per_shard, out,
        )  # fmt: skip
        return out

    def erase(self, ids: np.ndarray, table: int) -> np.ndarray:
        """Removes ids of one table; returns shard and freed row of each, int32 [N, 2], row -1 where an id had none."""
        ids = np.ascontiguousarray(ids).view(np.uint64)
        layout = self.layout
        out = np.empty((ids.size, 2), np.int32)
        kernels.erase(
            self.hashes_of(ids, table), ids, table, layout.bucket_offsets, layout.num_buckets, layout.word_offsets,
            layout.shard_shift, self._lines.view(np.uint64), self._lines.view(np.int32), self._lines_per_shard,
            self._used, self._counts, out,
        )  # fmt: skip
        return out

    def entries(self, table: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids (int64), shards, rows and last-seen seconds of all ids of a table, in the order of their slots."""
        start = int(self.layout.bucket_offsets[table])
        lines = self._lines.reshape(self.layout.num_shards, self._lines_per_shard, kernels.LINE_WORDS)
        lines = lines[:, start : start + int(self.layout.num_buckets[table])]
        rows = lines[:, :, 8:12].astype(np.uint32).view(np.int32)
        shard, bucket, slot = np.nonzero(rows >= 0)
        ids = np.ascontiguousarray(lines[:, :, :8]).view(np.int64)[shard, bucket, slot]
        return ids, shard.astype(np.int32), rows[shard, bucket, slot], lines[:, :, 12:16][shard, bucket, slot]

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of everything, uint32 and int32 arrays with the shards as leading axis."""
        shape = (self.layout.num_shards, self._lines_per_shard, kernels.LINE_WORDS)
        return {
            "lines": self._lines.reshape(shape).copy(),
            "used": self._used.copy(),
            "counts": self._counts.copy(),
            "cursors": self._cursors.copy(),
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The arrays are of another layout, or contradict themselves.
        """
        mine = {"lines": self._lines, "used": self._used, "counts": self._counts, "cursors": self._cursors}
        layout = self.layout
        shapes = {name: array.shape for name, array in mine.items()}
        shapes["lines"] = (layout.num_shards, self._lines_per_shard, kernels.LINE_WORDS)
        if missing := sorted(set(mine) - set(state)):
            raise ValueError(f"the state of the id maps of tables {layout.names} lacks {', '.join(missing)}")
        theirs = {name: np.ascontiguousarray(state[name]) for name in mine}
        for name, array in theirs.items():
            if array.shape != shapes[name] or array.dtype != mine[name].dtype:
                raise ValueError(
                    f"id maps of tables {layout.names}: {name} is {mine[name].dtype} {shapes[name]} here, "
                    f"{array.dtype} {array.shape} in the snapshot; max_rows or num_shards differ"
                )
        theirs["lines"] = theirs["lines"].reshape(self._lines.shape)
        words = (layout.caps + 31) // 32
        sound = kernels.is_sound(
            layout.seeds, layout.bucket_offsets, layout.num_buckets, layout.word_offsets, layout.caps, layout.shard_shift,
            theirs["lines"].view(np.uint64), theirs["lines"].view(np.int32), self._lines_per_shard,
            theirs["used"], theirs["counts"],
        )  # fmt: skip
        if not sound or (theirs["cursors"] < 0).any() or (theirs["cursors"] >= words).any():
            num_ids = int((theirs["lines"].view(np.int32)[:, 8:12] >= 0).sum())
            bits = int(np.bitwise_count(theirs["used"]).sum())
            raise ValueError(
                f"id maps of tables {layout.names} are damaged, or of tables of other names: the state has {num_ids:,} ids, "
                f"{bits:,} used rows and {int(theirs['counts'].sum()):,} counted, and they do not belong together"
            )
        for name, array in mine.items():
            array[:] = theirs[name]


def _many_divisors(size: int) -> int:
    # Snapshots are cut into chunks whose sizes divide the array's: a large prime would be cut into single rows.
    return size if size < 2**14 else -(-size // 1024) * 1024


def ladder(needed: int, smallest: int = 256) -> int:
    """Returns the padded size for `needed`: the next of 8, 9, ..., 15 times a power of two, so at most a ninth is padding."""
    size = max(needed, smallest)
    step = 1 << max(size.bit_length() - 4, 0)
    return -(-size // step) * step
