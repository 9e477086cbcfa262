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

from monolith_jax.ids import kernels, restore
from monolith_jax.ids.copies import Copies
from monolith_jax.ids.lines import LINE_WORDS, SLOTS, Distinct, Maps, Tables
from monolith_jax.ids.threads import ShardThreads

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
    max_load: float = MAX_LOAD
    """Ids over slots when a shard is at its cap."""

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: L is no power of two, a table is empty, a shard has more rows than int32 can count, or the load is no
                share.
        """
        if not 0 < self.max_load <= 1:
            raise ValueError(f"MapLayout.max_load must be above 0 and at most 1, got {self.max_load}")
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
        return many_divisors(int(self.caps.sum()))

    @cached_property
    def row_offsets(self) -> np.ndarray:
        """Where each table's rows start in a shard, int64 [T]."""
        return np.concatenate([[0], np.cumsum(self.caps)[:-1]]).astype(np.int64)

    @cached_property
    def num_buckets(self) -> np.ndarray:
        """Buckets of each table in one shard, int64 [T]."""
        needed = np.ceil(self.caps / (self.max_load * SLOTS)).astype(np.int64)
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

    @cached_property
    def lines_per_shard(self) -> int:
        """Lines of all tables in one shard."""
        return many_divisors(int(self.num_buckets.sum()))

    @cached_property
    def tables(self) -> Tables:
        """The sizes as the kernels take them. (A shift by 64 is undefined, hence at least two shards.)"""
        shift = np.uint64(64 - (self.num_shards.bit_length() - 1))
        sizes = (self.seeds, self.bucket_offsets, self.num_buckets, self.word_offsets, self.caps)
        return Tables(*sizes, self.lines_per_shard, shift, np.uint64(self.num_shards - 1))

    def tables_of_part(self, num_parts: int) -> Tables:
        """The sizes as the kernels of one of so many processes take them, each of which has L / num_parts neighbours."""
        return self.tables._replace(shard_mask=np.uint64(self.num_shards // num_parts - 1))


def aligned_lines(num_lines: int) -> np.ndarray:
    """Returns uint32 [num_lines, 16], not yet touched, whose lines are cache lines (and its huge pages whole ones)."""
    align = 2**21 if num_lines * 64 > 2**22 else 64
    raw = np.empty(num_lines * 64 + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + num_lines * 64].view(np.uint32).reshape(num_lines, LINE_WORDS)


class IdMaps:
    """The id maps of all tables of a group.

    Not thread safe: one caller at a time.
    """

    def __init__(self, layout: MapLayout, threads: ShardThreads | None = None, num_parts: int = 1) -> None:
        """Allocates empty maps: 16 bytes a slot. Each shard's pages are first touched by the thread that will use them.

        Args:
            layout: Tables and their sizes.
            threads: Share the shards; none: all is done in the caller's thread.
            num_parts: Processes that share the shards; these maps are one part of them, L / num_parts neighbours, and ids of
                other parts must not be inserted. Shards are counted from the first one here.
        """
        self.layout, self.tables, self.num_shards = layout, layout.tables_of_part(num_parts), layout.num_shards // num_parts
        num_shards, num_tables = self.num_shards, len(layout.names)
        num_words = int(((layout.caps + 31) // 32).sum())
        lines = aligned_lines(num_shards * layout.lines_per_shard)
        used = np.empty((num_shards, num_words), np.uint32)

        def touch(first: int, last: int) -> None:
            mine = lines[first * layout.lines_per_shard : last * layout.lines_per_shard]
            mine[:] = 0
            mine[:, 8:12] = 0xFFFFFFFF
            used[first:last] = 0

        (threads or ShardThreads(1, ())).run(touch, num_shards)
        counts, cursors = (np.zeros((num_shards, num_tables), np.int32) for _ in range(2))
        self.arrays = Maps(lines, used, counts, cursors)
        # Used by every call: fresh memory costs more than the work.
        self._hashes = np.empty(0, np.uint64)
        self._tables, self._absent = np.empty(0, np.int32), np.empty(0, np.int32)
        self._copies = Copies()

    @property
    def num_rows(self) -> np.ndarray:
        """Ids in each table, int64 [T]."""
        return self.arrays.counts.sum(0, dtype=np.int64)

    def lookup_or_insert(
        self, ids: np.ndarray, table: int, seen_s: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
        """Finds or makes the rows of distinct ids of one table.

        Args:
            ids: int64 or uint64 [N], distinct.
            table: Index into the layout's names.
            seen_s: uint32 [N], event times in seconds; the stored one becomes the larger of both.

        Returns:
            shards int32 [N], rows int32 [N] in the shard's table (-1: refused), fresh bool [N], and how many ids were
            refused because of the cap, and because no path to a free slot was found.
        """
        number = ids.size
        if self._hashes.size < number:
            self._hashes = np.empty(number, np.uint64)
            self._tables, self._absent = np.empty(number, np.int32), np.empty(number, np.int32)
        hashes, tables = self._hashes[:number], self._tables[:number]
        kernels.hash_ids(np.ascontiguousarray(ids).view(np.uint64), self.layout.seeds[table], hashes)
        tables[:] = table
        rows, fresh = np.empty(number, np.int32), np.empty(number, np.bool_)
        counts = tables  # of the batch; only admission looks at them
        ids_of_range = hashes, tables, counts, np.ascontiguousarray(seen_s), rows, fresh, self._absent
        distinct = Distinct(np.zeros(1, np.int64), np.array([number]), *ids_of_range, np.zeros(1, np.int64))
        refused = np.zeros((*self.arrays.counts.shape, 2), np.int64)
        kernels.find(self.tables, self.arrays.lines, distinct, 0, 1, True)
        kernels.insert(self.tables, self.arrays, distinct, 0, 1, refused)
        shards = hashes.view(np.uint32)[1::2] >> np.uint32(self.layout.tables.shard_shift - 32)  # of the high halves
        shards &= np.uint32(self.num_shards - 1)
        return shards.view(np.int32), rows, fresh, int(refused[:, :, 0].sum()), int(refused[:, :, 1].sum())

    def hashes_of(self, ids: np.ndarray, table: int) -> np.ndarray:
        """Returns the hashes of int64 or uint64 ids [N] of one table."""
        hashes = np.empty(ids.size, np.uint64)
        kernels.hash_ids(np.ascontiguousarray(ids).view(np.uint64), self.layout.seeds[table], hashes)
        return hashes

    def lookup(self, ids: np.ndarray, table: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns shards and rows of ids of one table, int32 [N] each; row -1 where an id has none. Changes nothing."""
        shards, rows = np.empty(ids.size, np.int32), np.empty(ids.size, np.int32)
        keys = np.ascontiguousarray(ids).view(np.uint64)
        kernels.lookup(keys, table, self.tables, self.arrays.lines, shards, rows)
        return shards, rows

    def erase(self, ids: np.ndarray, table: int) -> tuple[np.ndarray, np.ndarray]:
        """Removes ids of one table; returns shards and freed rows, int32 [N] each, row -1 where an id had none."""
        shards, rows = np.empty(ids.size, np.int32), np.empty(ids.size, np.int32)
        kernels.erase(np.ascontiguousarray(ids).view(np.uint64), table, self.tables, self.arrays, shards, rows)
        return shards, rows

    def ids_of(self, hashes: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Returns the ids, uint64 [N], of hashes uint64 [N] in tables int32 [N]."""
        ids = np.empty(hashes.size, np.uint64)
        kernels.unhash(hashes, self.layout.seeds, tables, ids)
        return ids

    def entries(self, table: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids (int64), shards, rows and last-seen seconds of all ids of a table, in the order of their slots."""
        start = int(self.layout.bucket_offsets[table])
        lines = self._lines_by_shard()[:, start : start + int(self.layout.num_buckets[table])]
        rows = lines[:, :, 8:12].astype(np.uint32).view(np.int32)
        shard, bucket, slot = np.nonzero(rows >= 0)
        hashes = np.ascontiguousarray(lines[:, :, :8]).view(np.uint64)[shard, bucket, slot]
        ids = self.ids_of(hashes, np.full(hashes.size, table, np.int32)).view(np.int64)
        return ids, shard.astype(np.int32), rows[shard, bucket, slot], lines[:, :, 12:16][shard, bucket, slot]

    def _lines_by_shard(self) -> np.ndarray:
        return self.arrays.lines.reshape(self.num_shards, self.layout.lines_per_shard, LINE_WORDS)

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of everything, uint32 and int32 arrays with the shards as leading axis, and checksums."""
        copies = {name: self._copies.copy(name, array) for name, array in self._state().items()}
        return {**copies, "checksums": self._checksums(copies["lines"])}

    def _checksums(self, lines: np.ndarray) -> np.ndarray:
        """Returns checksums of lines and seeds, uint32 [L, 2]: hashes alone do not show whether a bit fell over."""
        sums = np.empty(self.num_shards, np.uint64)
        restore.checksum(lines.reshape(sums.size, -1).view(np.uint64), self.layout.seeds, sums)
        return sums.view(np.uint32).reshape(-1, 2)

    def _state(self) -> dict[str, np.ndarray]:
        return {**self.arrays._asdict(), "lines": self._lines_by_shard()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The arrays are of another layout, or contradict themselves.
        """
        mine, layout = self._state(), self.layout
        if missing := sorted({*mine, "checksums"} - set(state)):
            raise ValueError(f"the state of the id maps of tables {layout.names} lacks {', '.join(missing)}")
        theirs = {name: np.ascontiguousarray(state[name]) for name in mine}
        for name, array in theirs.items():
            if array.shape != mine[name].shape or array.dtype != mine[name].dtype:
                raise ValueError(
                    f"id maps of tables {layout.names}: {name} is {mine[name].dtype} {mine[name].shape} here, "
                    f"{array.dtype} {array.shape} in the snapshot; max_rows or num_shards differ"
                )
        lines = aligned_lines(self.arrays.lines.shape[0])
        lines[:] = theirs["lines"].reshape(lines.shape)
        maps = Maps(lines, theirs["used"], theirs["counts"], theirs["cursors"])
        words = (layout.caps + 31) // 32
        same = np.array_equal(self._checksums(theirs["lines"]), state["checksums"])
        in_reach = (maps.cursors >= 0).all() and (maps.cursors < words).all()
        if not same or not in_reach or not restore.is_sound(self.tables, maps):
            num_ids = int((lines.view(np.int32)[:, 8:12] >= 0).sum())
            bits = int(np.bitwise_count(maps.used).sum())
            raise ValueError(
                f"id maps of tables {layout.names} are damaged, or of tables of other names: the state has {num_ids:,} ids, "
                f"{bits:,} used rows and {int(maps.counts.sum()):,} counted, its checksums are "
                f"{'right' if same else 'wrong'}, and they do not belong together"
            )
        for array, theirs_of_it in zip(self.arrays, maps, strict=True):
            array[:] = theirs_of_it

    def grow_from(self, smaller: IdMaps) -> None:
        """Takes over the ids of maps of the same tables, none of them larger, into these empty ones.

        Every id keeps its shard and its row in the shard's table.
        """
        assert not self.num_rows.any() and (self.layout.caps >= smaller.layout.caps).all()
        for table in range(len(self.layout.names)):
            ids, _, rows, seen_s = smaller.entries(table)
            keys = self.hashes_of(ids, table)
            found = restore.place(self.tables, self.arrays, table, keys, rows, np.ascontiguousarray(seen_s))
            assert found, "a larger map has no place for an id"
        self.arrays.cursors[:] = smaller.arrays.cursors


def many_divisors(size: int) -> int:
    """Returns a size at least as large that an array of a snapshot can have."""
    # Snapshots are cut into chunks whose sizes divide the array's: a large prime would be cut into single rows.
    return size if size < 2**14 else -(-size // 1024) * 1024


def ladder(needed: int, smallest: int = 64) -> int:
    """Returns the padded size for `needed`: the next of 16, 17, ..., 31 times a power of two, so at most 1/17 is padding."""
    size = max(needed, smallest)
    step = 1 << max(size.bit_length() - 5, 0)
    return -(-size // step) * step
