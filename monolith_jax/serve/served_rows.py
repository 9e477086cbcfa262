"""One serving copy of the rows of a group: its own id maps, and rows as the files hold them.

In: the content of deltas. Out: float32 vectors of ids. Rows stay float16, or int8 with a scale each, in memory; they become
float32 when they are read. One caller changes a copy, while nobody reads it; any number read it at other times.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.serve.row_kernels import places_of_batch, read_float16, read_float32, read_int8, write_rows, write_scales
from monolith_jax.sync.delta import Format, Rows

_BLOCK = 1 << 14
"""Rows written at a time: what is known of them fits into the cache."""
_BITS = {"float32": np.uint32, "float16": np.uint16, "int8": np.int8}
"""Rows are moved as bits: numba knows no float16."""


class ServedRows:
    """The rows of a group of tables of dim D."""

    def __init__(self, layout: MapLayout, dim: int, format: Format) -> None:
        """Makes an empty copy; the memory of rows is taken when ids come."""
        self.layout, self.dim = layout, dim
        self.format: Format = format
        self.maps = IdMaps(layout)
        self._rows, self._scales = self._empty(format)

    def _empty(self, format: Format) -> tuple[np.ndarray, np.ndarray | None]:
        number = self.layout.num_shards * self.layout.rows_per_shard
        scales = np.zeros(number, np.float32) if format == "int8" else None
        return np.zeros((number, self.dim), _BITS[format]), scales

    @property
    def nbytes(self) -> int:
        """Bytes of rows and maps, all of which may come to be used."""
        scales = 0 if self._scales is None else self._scales.nbytes
        return self._rows.nbytes + scales + sum(array.nbytes for array in self.maps.arrays)

    @property
    def num_rows(self) -> np.ndarray:
        """Ids in each table, int64 [T]."""
        return self.maps.num_rows

    def ids(self, table: int) -> np.ndarray:
        """Returns all ids of a table, int64 [N], in no order."""
        return self.maps.entries(table)[0]

    def erase(self, table: int, ids: np.ndarray) -> None:
        """Forgets ids [N] of a table, also such as it does not know."""
        for first in range(0, ids.size, _BLOCK):
            self.maps.erase(ids[first : first + _BLOCK], table)

    def write(self, table: int, rows: Rows) -> int:
        """Writes rows of a table, new ids and known ones; returns how many ids found no room."""
        vectors = _as_format(rows, self.format)
        source = np.ascontiguousarray(vectors.vectors).view(_BITS[self.format])
        refused = 0
        seen_s = np.zeros(min(_BLOCK, rows.ids.size), np.uint32)
        offset, per_shard = int(self.layout.row_offsets[table]), self.layout.rows_per_shard
        for first in range(0, rows.ids.size, _BLOCK):
            where = slice(first, first + _BLOCK)
            ids = rows.ids[where]
            shards, of_ids, _, full, no_path = self.maps.lookup_or_insert(ids, table, seen_s[: ids.size])
            refused += full + no_path
            places = shards.astype(np.int64)
            places *= per_shard
            places += of_ids
            places += offset
            if full + no_path:
                places[of_ids < 0] = -1
            write_rows(self._rows, places, source[where])
            if self._scales is not None and vectors.scales is not None:
                write_scales(self._scales, places, vectors.scales[where])
        return refused

    def clear(self) -> None:
        """Forgets all ids."""
        lines = self.maps.arrays.lines
        lines[:] = 0
        lines[:, 8:12] = 0xFFFFFFFF
        for array in self.maps.arrays[1:]:
            array[:] = 0

    def copy_from(self, other: ServedRows) -> None:
        """Becomes equal to another copy of the same tables."""
        for mine, theirs in zip(self.maps.arrays, other.maps.arrays, strict=True):
            np.copyto(mine, theirs)
        if self.format != other.format:
            self.format = other.format
            self._rows, self._scales = self._empty(other.format)
        np.copyto(self._rows, other._rows)
        if self._scales is not None and other._scales is not None:
            np.copyto(self._scales, other._scales)

    def take_format(self, format: Format, empty: bool) -> None:
        """Makes room for rows of a format; where others are there, all become float32, which loses nothing.

        Args:
            format: Of the rows to come.
            empty: Whether the rows that are there do not matter.
        """
        if format == self.format or (self.format == "float32" and not empty):
            return
        if empty:
            self.format = format
            self._rows, self._scales = self._empty(format)
            return
        wide = np.empty(self._rows.shape, np.float32)
        self._read(np.arange(len(self._rows)), wide)
        self.format = "float32"
        self._rows, self._scales = wide.view(np.uint32), None

    def vectors(self, table: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns vectors of ids [N] of one table, float32 [N, D], zeros for those without a row; and which have one."""
        valid = np.ones((1, ids.size), np.bool_)
        tables = np.full(ids.size, table, np.int32)
        out, found = self.vectors_of_batch(ids[None], valid, tables)
        return out[0], found[0]

    def has(self, table: int, ids: np.ndarray) -> np.ndarray:
        """Returns which ids [N] of one table have a row, bool [N]."""
        return self._places(ids[None], np.ones((1, ids.size), np.bool_), np.full(ids.size, table, np.int32))[0] >= 0

    def vectors_of_batch(
        self, ids: np.ndarray, valid: np.ndarray, position_tables: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the vectors at the id positions of a batch.

        Args:
            ids: int64 [B, P].
            valid: bool [B, P], whether the position holds an id.
            position_tables: int32 [P], index of the table of each position's ids.

        Returns:
            float32 [B, P, D], zeros where there is no id or it has no row; bool [B, P], whether it has one.
        """
        places = self._places(ids, valid, position_tables)
        out = np.empty((*ids.shape, self.dim), np.float32)
        self._read(places.reshape(-1), out.reshape(-1, self.dim))
        return out, places >= 0

    def _places(self, ids: np.ndarray, valid: np.ndarray, position_tables: np.ndarray) -> np.ndarray:
        places = np.empty(ids.shape, np.int64)
        keys = np.ascontiguousarray(ids).view(np.uint64)
        sizes = (self.maps.tables, self.layout.row_offsets, self.layout.rows_per_shard)
        places_of_batch(keys, np.ascontiguousarray(valid), position_tables, *sizes, self.maps.arrays.lines, places)
        return places

    def _read(self, places: np.ndarray, out: np.ndarray) -> None:
        match self.format:
            case "float32":
                read_float32(self._rows.view(np.float32), places, out)
            case "float16":
                read_float16(self._rows, places, out)
            case "int8":
                assert self._scales is not None
                read_int8(self._rows, self._scales, places, out)


def _as_format(rows: Rows, format: Format) -> Rows:
    """Returns rows as a copy of this format keeps them: as they are, or as float32."""
    if rows.vectors.dtype == np.dtype(format):
        return rows
    assert format == "float32", "take_format makes room first"
    wide = rows.vectors.astype(np.float32)
    return Rows(rows.ids, wide if rows.scales is None else wide * rows.scales[:, None], None)
