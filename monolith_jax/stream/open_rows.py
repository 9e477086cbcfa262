"""The impressions that wait for actions: as they came, or read in, in order of time, with what came of them.

In: record batches of impressions and rows of actions. Out: `Piece`s, whose rows can be found by key, and tables of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.stream.events import ACTIONS, OUTCOME
from monolith_jax.stream.join_kernels import BITS, NONE, VALUE, apply, build_index, find, hash_keys, refill_seen

OUTCOMES = pa.schema([field for field in OUTCOME if field.name != "weight"])
KINDS = ("play", "dwell", *ACTIONS)
"""Actions by their number."""


class Keys(NamedTuple):
    """Keys of rows."""

    requests: np.ndarray
    """int64 [N]"""
    videos: np.ndarray
    """int64 [N]"""
    hashes: np.ndarray
    """uint64 [N]"""

    def at(self, places: np.ndarray | slice) -> Keys:
        """Returns some of the keys."""
        return Keys(self.requests[places], self.videos[places], self.hashes[places])


def keys_of(requests: np.ndarray, videos: np.ndarray) -> Keys:
    """Returns keys with their hashes; int64 [N] each."""
    hashes = np.empty(requests.size, np.uint64)
    hash_keys(requests, videos, hashes)
    return Keys(requests, videos, hashes)


class Index:
    """Finds rows by their keys; of several rows of one key the first."""

    def __init__(self, keys: Keys) -> None:
        """Makes the table."""
        size = keys.hashes.size
        self._keys = keys
        self._table = np.empty(1 << max(2 * size - 1, 1).bit_length(), np.int32)
        self.first = np.empty(size, np.int32)
        """int32 [N], each row's first one of the same key."""
        build_index(*keys, self._table, self.first)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays, keys included."""
        return self._table.nbytes + self.first.nbytes + sum(array.nbytes for array in self._keys)

    def find(self, keys: Keys) -> np.ndarray:
        """Returns the row of each key, -1: none; int32 [N]."""
        rows = np.empty(keys.hashes.size, np.int32)
        find(*keys, self._keys.requests, self._keys.videos, self._table, rows)
        return rows


class Piece:
    """Impressions of one class of times, in order of (time, arrival), whose actions are applied as they come."""

    def __init__(self, keys: Keys, times: np.ndarray, rows: pa.RecordBatch | Callable[[], pa.RecordBatch]) -> None:
        """Takes impressions in order of time, int64 [R]; `rows` may be what reads them."""
        self._rows, self.times, self.keys = rows, times, keys
        self.index = Index(keys)
        self.play, self.dwell = np.full(times.size, NONE), np.full(times.size, NONE)
        self.came = np.zeros(times.size, np.uint16)
        self._seen_rows, self._seen_ids, self._num_seen = np.full(16, -1, np.int32), np.zeros(16, np.int64), 0
        self.closed, self.gone = 0, 0
        """Rows that were emitted, and rows that are forgotten, from the first on."""
        held = 0 if callable(rows) else rows.nbytes
        self.num_bytes = held + self.index.num_bytes + 18 * times.size + 12 * self._seen_ids.size
        """Bytes held."""

    @classmethod
    def of(cls, rows: pa.RecordBatch) -> Piece:
        """Returns the piece of impressions in order of arrival."""
        times = column_i64(rows, "event_time_ms")
        if times.size > 1 and (times[1:] < times[:-1]).any():
            rows = rows.take(pa.array(np.argsort(times, kind="stable")))
            times = column_i64(rows, "event_time_ms")
        return cls(keys_of(column_i64(rows, "request_id"), column_i64(rows, "video_id")), times, rows)

    @classmethod
    def merged(cls, pieces: Sequence[Piece], schema: pa.Schema) -> Piece:
        """Returns one piece with what pieces of one class still hold, the one that came first given first."""
        times = np.concatenate([piece.times[piece.gone :] for piece in pieces])
        order = np.argsort(times, kind="stable")
        rows = stacked([piece.rows.slice(piece.gone) for piece in pieces], schema).take(pa.array(order))
        keys = Keys(
            *(np.concatenate(arrays)[order] for arrays in zip(*(p.keys.at(slice(p.gone, None)) for p in pieces), strict=True))
        )
        one = cls(keys, times[order], rows)
        one.play = np.concatenate([piece.play[piece.gone :] for piece in pieces])[order]
        one.dwell = np.concatenate([piece.dwell[piece.gone :] for piece in pieces])[order]
        one.came = np.concatenate([piece.came[piece.gone :] for piece in pieces])[order]
        one.closed = sum(piece.closed - piece.gone for piece in pieces)
        place, start = np.empty(order.size, np.int32), 0
        place[order] = np.arange(order.size)
        for piece in pieces:
            rows_seen, ids = piece.seen()
            kept = rows_seen >= piece.gone
            one.see(place[rows_seen[kept] - piece.gone + start], ids[kept])
            start += piece.times.size - piece.gone
        return one

    @property
    def rows(self) -> pa.RecordBatch:
        """The impressions."""
        return self._rows() if callable(self._rows) else self._rows

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows, int32 [S], and the ids of events that came for them, int64 [S]."""
        there = self._seen_rows >= 0
        return self._seen_rows[there], self._seen_ids[there]

    def see(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Takes over what `seen` returned."""
        self._make_room(rows.size)
        refill_seen(rows.astype(np.int32), ids, self._seen_rows, self._seen_ids)
        self._num_seen += rows.size

    def _make_room(self, number: int) -> None:
        need = 2 * (self._num_seen + number)
        if need > self._seen_rows.size:
            size = 1 << need.bit_length()
            seen_rows, seen_ids = np.full(size, -1, np.int32), np.empty(size, np.int64)
            refill_seen(self._seen_rows, self._seen_ids, seen_rows, seen_ids)
            self.num_bytes += 12 * (size - self._seen_ids.size)
            self._seen_rows, self._seen_ids = seen_rows, seen_ids

    def find(self, keys: Keys) -> np.ndarray:
        """Returns the row of each key that is not forgotten, -1: none; int32 [N]."""
        rows = self.index.find(keys)
        rows[rows < self.gone] = -1
        return rows

    def apply(self, actions: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Applies actions, int64 [N, 6], to int32 `rows` [N], -1: no row.

        Returns:
            uint8 [N], 0: a repeated event or no row, 1: a kind that had come, 2: the first of its kind; and the repeated ones.
        """
        self._make_room(rows.size)
        fresh = np.empty(rows.size, np.uint8)
        added, repeated = apply(
            actions, rows, self.play, self.dwell, self.came, self._seen_rows, self._seen_ids, fresh
        )  # fmt: skip
        self._num_seen += added
        return fresh, repeated

    def examples(self, first: int, last: int) -> pa.RecordBatch:
        """Returns rows with all that came of them."""
        # Copied, as Arrow would take the arrays as they are, and late actions still change them.
        play, dwell = self.play[first:last].copy(), self.dwell[first:last].copy()
        return outcomes(self.rows.slice(first, last - first), play, dwell, self.came[first:last])


class Hit(NamedTuple):
    """Actions that found their rows in a piece."""

    piece: Piece
    places: np.ndarray
    """int64 [N], which of the actions."""
    rows: np.ndarray
    """int32 [N]"""
    news: np.ndarray
    """uint8 [N], as `Piece.apply` returns it."""


def grouped(classes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each class, ascending, and the places where it stands, int64, ascending."""
    if not classes.size:
        return
    if classes[0] == classes[-1] and (classes == classes[0]).all():
        yield int(classes[0]), np.arange(classes.size)
        return
    order = np.argsort(classes, kind="stable")
    bounds = np.flatnonzero(np.diff(classes[order])) + 1
    for part in np.split(order, bounds):
        yield int(classes[part[0]]), part


def column_i64(rows: pa.RecordBatch, name: str) -> np.ndarray:
    """Returns a column of int64 without nulls, [N]."""
    return rows.column(name).to_numpy()


def conform(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Returns rows in a schema that may have further columns, which are null."""
    if rows.schema.equals(schema, check_metadata=True):
        return rows
    there = set(rows.schema.names)
    columns = [
        rows.column(one.name) if one.name in there else pa.nulls(rows.num_rows, one.type) for one in schema
    ]  # fmt: skip
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def stacked(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """Returns the rows of batches in one, in a schema that may have further columns."""
    conformed = [conform(batch, schema) for batch in batches]
    return conformed[0] if len(conformed) == 1 else pa.concat_batches(conformed)


def outcomes(rows: pa.RecordBatch, play: np.ndarray, dwell: np.ndarray, came: np.ndarray) -> pa.RecordBatch:
    """Returns rows with what came of them; `play` and `dwell` int64 [N], NONE: none; `came` uint16 [N], a bit a kind."""
    columns = [pa.array(play, mask=play == NONE), pa.array(dwell, mask=dwell == NONE)]
    columns += [pa.array((came >> (k + 2)) & 1 > 0) for k in range(len(ACTIONS))]
    return _with(rows, columns)


def single_outcomes(rows: pa.RecordBatch, kinds: np.ndarray, values: np.ndarray) -> pa.RecordBatch:
    """Returns rows with one outcome each and all others null; `kinds` int64 [N]: -1: everything false and times null."""
    negative = kinds < 0
    columns = [pa.array(values, mask=kinds != kind) for kind in (0, 1)]
    columns += [pa.array(~negative, mask=(kinds != k + 2) & ~negative) for k in range(len(ACTIONS))]
    return _with(rows, columns)


def with_earlier(rows: pa.RecordBatch, actions: np.ndarray, owners: np.ndarray) -> pa.RecordBatch:
    """Returns each row as a negative, and right after it one example for each of its actions; `owners` int [M]: whose."""
    everyone = np.concatenate([np.arange(rows.num_rows), owners])
    order = np.argsort(everyone, kind="stable")
    kinds = np.concatenate([np.full(rows.num_rows, -1), actions[:, BITS] & 255])[order]
    values = np.concatenate([np.zeros(rows.num_rows, np.int64), actions[:, VALUE]])[order]
    return single_outcomes(rows.take(pa.array(everyone[order])), kinds, values)


def _with(rows: pa.RecordBatch, columns: list[pa.Array]) -> pa.RecordBatch:
    schema = pa.schema([*rows.schema, *OUTCOMES])
    return pa.RecordBatch.from_arrays([*rows.columns, *columns], schema=schema)
