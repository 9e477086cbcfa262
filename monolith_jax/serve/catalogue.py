"""What is known of the videos that may be shown: their columns, and their features as the models read them.

In: record batches of videos, a row each, with the columns that the models' features of a video name. Out: features of chosen
videos, laid out and hashed once when a video came, so that a request reads a thousand of them without looking at Arrow; and the
columns themselves, for the rules of the feed and for the log. Memory is bounded: the videos that came first leave first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.features import DenseFeatureConfig, FeatureLayout, Features, IdFeatureConfig, featurize
from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.ids.strings import string_ids
from monolith_jax.stream.events import valid_mask
from monolith_jax.types import GroupIds

_BLOCK = 1024
"""Videos written while requests wait."""


@dataclass(frozen=True)
class CatalogueConfig:
    """Which videos are known, and what of them."""

    max_videos: int = 1_000_000
    """Videos at most; when one more comes, those that came first leave."""
    columns: tuple[str, ...] = ("video_id", "author_id", "sound_id", "tag_id", "duration_ms")
    """Columns of a video: ids (int64 or string, one or a list) and numbers (one or a list). Any other column that a feature
    reads is the request's."""
    max_items: int = 4
    """Items kept of a list of ids, such as tags; or as many as a feature reads. Of floats: what it reads."""
    unsafe_column: str = ""
    """Boolean column: the video must not be shown. Empty: there is none."""


class Upserted(NamedTuple):
    """What became of videos that were given."""

    new: np.ndarray
    """int64 [N] ids that were not there before."""
    removed: np.ndarray
    """int64 [M] ids that made room for them."""
    refused: int
    """Rows without an id."""


class Taken(NamedTuple):
    """What is known of videos."""

    known: np.ndarray
    """bool [N], whether the video is there."""
    features: Features | None
    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    """By name: values [N], or [N, items] of a list, and how many of each row count, int32 [N]: 0 where it is null."""


class _Store(NamedTuple):
    """The features of all videos by one layout; arrays over the slots."""

    ids: tuple[np.ndarray, ...]
    valid: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray | None, ...]
    dense: np.ndarray

    @property
    def arrays(self) -> list[np.ndarray]:
        """All of them."""
        return [*self.ids, *self.valid, *(one for one in self.weights if one is not None), self.dense]


def _make_store(layout: FeatureLayout, slots: int) -> _Store:
    shapes = [(slots, layout.num_positions(group)) for group in range(len(layout.groups))]
    weighted = [any(slot.weighted for slot in of_group) for of_group in layout.groups]
    weights = tuple(np.zeros(shape, np.float32) if there else None for shape, there in zip(shapes, weighted, strict=True))
    ids = tuple(np.zeros(shape, np.int64) for shape in shapes)
    return _Store(
        ids, tuple(np.zeros(shape, np.bool_) for shape in shapes), weights, np.zeros((slots, layout.num_dense), np.float32)
    )


class Catalogue:
    """The videos. Any number of threads may call."""

    def __init__(self, config: CatalogueConfig, layouts: Sequence[FeatureLayout]) -> None:
        """Makes an empty catalogue; its memory is taken as videos come.

        Args:
            config: Which columns, how many videos.
            layouts: Of features that read columns of the catalogue alone.

        Raises:
            ValueError: There is no room for a video, or no column of ids.
        """
        if config.max_videos < 1 or config.max_items < 1 or "video_id" not in config.columns:
            raise ValueError(
                "CatalogueConfig: max_videos and max_items must be at least 1, and columns must name video_id; got "
                f"{config.max_videos}, {config.max_items} and {config.columns}"
            )
        self.config, self.layouts = config, tuple(layouts)
        self._maps = IdMaps(MapLayout(("catalogue",), (config.max_videos,), 2))
        self._slots = 2 * self._maps.layout.rows_per_shard
        self._stores = [_make_store(layout, self._slots) for layout in self.layouts]
        self._columns: dict[str, np.ndarray] = {}
        self._lengths: dict[str, np.ndarray] = {}
        """Of columns: items of the list, or 1 where there is a value and 0 where it is null."""
        self._wanted: dict[str, list[int]] = {}
        """Items of lists that features read."""
        for feature in (feature for layout in self.layouts for feature in layout.features):
            if isinstance(feature, IdFeatureConfig | DenseFeatureConfig):
                size = feature.max_length if isinstance(feature, IdFeatureConfig) else feature.size
                self._wanted.setdefault(feature.column, []).append(size)
        self._came = np.full(self._slots, -1, np.int64)
        """When each slot's video came, by count; -1: there is none."""
        self._line = np.zeros(self._slots, np.int64)
        """Slots in the order in which videos came: count c stands at c modulo the slots, while it is in the line."""
        self._first = 0
        """The count that is the first in the line; of some behind it the video may have left."""
        self._count, self._swept, self.refused = 0, 0, 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Returns how many videos are there."""
        return int(self._maps.num_rows[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, a full catalogue assumed."""
        stores = [array for store in self._stores for array in store.arrays]
        arrays = [*stores, *self._columns.values(), *self._lengths.values(), self._came, *self._maps.arrays]
        return sum(array.nbytes for array in arrays)

    def upsert(self, videos: pa.RecordBatch) -> Upserted:
        """Takes over videos, new ones and new values of known ones; of an id given twice the last row counts.

        Raises:
            ValueError: A column is missing or of a type that cannot be kept.
        """
        whole, videos = videos, self._plain(videos)
        ids, there = videos.column("video_id").fill_null(0).to_numpy(), valid_mask(videos.column("video_id"))
        rows = np.flatnonzero(there)
        _, last = np.unique(ids[rows][::-1], return_index=True)
        rows = np.sort(rows[rows.size - 1 - last])
        new, removed = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        size = min(_BLOCK, self.config.max_videos)
        for first in range(0, rows.size, size):
            which = pa.array(rows[first : first + size])
            # Features are of the columns as they came, as in training.
            block, as_it_came = videos.take(which), whole.take(which)
            features = [featurize(as_it_came, layout) for layout in self.layouts]
            with self._lock:
                of_block = self._write(block, features)
            new.append(of_block[0])
            removed.append(of_block[1])
        refused = ids.size - int(np.count_nonzero(there))
        self.refused += refused
        return Upserted(np.concatenate(new), np.concatenate(removed), refused)

    def _plain(self, videos: pa.RecordBatch) -> pa.RecordBatch:
        """Returns the catalogue's columns, strings as the ids that they are hashed to."""
        names = [*self.config.columns, *filter(None, [self.config.unsafe_column])]
        if missing := [name for name in names if name not in videos.schema.names]:
            raise ValueError(
                f"videos need the columns {', '.join(missing)}, which CatalogueConfig names; there are "
                f"{', '.join(videos.schema.names)}"
            )
        arrays = []
        for name in names:
            array = videos.column(name)
            if pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
                array = array.cast(pa.list_(array.type.value_type))
            arrays.append(_list(array, name) if pa.types.is_list(array.type) else _numbers(array, name))
        if not pa.types.is_int64(arrays[names.index("video_id")].type):
            raise ValueError(f"the column video_id holds {arrays[names.index('video_id')].type}; expected int64 or string")
        return pa.RecordBatch.from_arrays(arrays, names)

    def _write(self, block: pa.RecordBatch, features: Sequence[Features]) -> tuple[np.ndarray, np.ndarray]:
        ids = block.column("video_id").to_numpy()
        removed = self._make_room(int(np.count_nonzero(self._lookup(ids) < 0)), ids)
        shards, rows, fresh, full, no_path = self._maps.lookup_or_insert(ids, 0, np.zeros(ids.size, np.uint32))
        assert not full and not no_path, "there is room"
        slots = self._slots_of(shards, rows)
        for name in block.schema.names:
            self._write_column(name, block.column(name), slots)
        for store, of_store in zip(self._stores, features, strict=True):
            parts = zip(store.ids, store.valid, store.weights, of_store.groups, of_store.weights, strict=True)
            for mine, there, mine_weights, group, weights in parts:
                mine[slots], there[slots] = group
                if mine_weights is not None:
                    mine_weights[slots] = weights
            store.dense[slots] = of_store.dense
        self._stand_in_line(slots[fresh])
        return ids[fresh], removed

    def _write_column(self, name: str, array: pa.Array, slots: np.ndarray) -> None:
        if name not in self._columns:
            is_list = pa.types.is_list(array.type)
            kind = array.type.value_type if is_list else array.type
            width = max([self.config.max_items, *self._wanted.get(name, [])])
            self._columns[name] = np.zeros((self._slots, width) if is_list else self._slots, kind.to_pandas_dtype())
            self._lengths[name] = np.zeros(self._slots, np.int32)
        column, lengths = self._columns[name], self._lengths[name]
        there = valid_mask(array)
        if column.ndim == 1:
            column[slots], lengths[slots] = _flat(array), there
            return
        offsets = array.offsets.to_numpy()
        number = np.minimum(np.where(there, np.diff(offsets), 0), column.shape[1])
        kept = np.arange(column.shape[1]) < number[:, None]
        rows = np.zeros(kept.shape, column.dtype)
        rows[kept] = _flat(array.values)[(offsets[:-1, None] + np.arange(column.shape[1]))[kept]]
        column[slots], lengths[slots] = rows, number

    def _make_room(self, needed: int, kept: np.ndarray) -> np.ndarray:
        """Removes the videos that came first, but for those of `kept`, until there is room; returns their ids."""
        missing = len(self) + needed - self.config.max_videos
        if missing <= 0:
            return np.zeros(0, np.int64)
        spared, ids = self._lookup(kept), [np.zeros(0, np.int64)]
        while missing > 0:
            counts = np.arange(self._first, min(self._first + missing, self._count))
            slots = self._line[counts % self._slots]
            slots = slots[self._came[slots] == counts]  # Of the others the video has left already.
            self._first += counts.size
            again = np.isin(slots, spared)
            self._stand_in_line(slots[again])
            ids.append(self._columns["video_id"][slots[~again]])
            missing -= self._erase(ids[-1])
        return np.concatenate(ids)

    def _stand_in_line(self, slots: np.ndarray) -> None:
        """Puts videos at the end of the line."""
        if self._count + slots.size - self._first > self._slots:
            used = np.flatnonzero(self._came >= 0)
            used = used[np.argsort(self._came[used])]
            self._first, self._count = 0, used.size
            self._came[used] = np.arange(used.size)
            self._line[: used.size] = used
        counts = self._count + np.arange(slots.size)
        self._came[slots], self._line[counts % self._slots] = counts, slots
        self._count += slots.size

    def _erase(self, ids: np.ndarray) -> int:
        slots = self._slots_of(*self._maps.erase(ids, 0))
        self._came[slots[slots >= 0]] = -1
        return int(np.count_nonzero(slots >= 0))

    def remove(self, ids: np.ndarray) -> int:
        """Forgets videos; returns how many of the ids were there."""
        with self._lock:
            return self._erase(np.asarray(ids, np.int64))

    def _lookup(self, ids: np.ndarray) -> np.ndarray:
        return self._slots_of(*self._maps.lookup(ids, 0))

    def _slots_of(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.where(rows >= 0, shards.astype(np.int64) * self._maps.layout.rows_per_shard + rows, -1)

    def known(self, ids: np.ndarray) -> np.ndarray:
        """Returns which videos are there, bool [N]."""
        with self._lock:
            return self._lookup(np.asarray(ids, np.int64)) >= 0

    def take(self, ids: np.ndarray, layout: int | None = None, columns: Sequence[str] = ()) -> Taken:
        """Returns what is known of videos, all at one moment; of those that are not known, some other's or nothing.

        Args:
            ids: int64 [N].
            layout: By which features are wanted; None: no features.
            columns: Which columns are wanted.

        Raises:
            ValueError: There is no such column.
        """
        if missing := sorted(set(columns) - {*self.config.columns, self.config.unsafe_column}):
            raise ValueError(
                f"the catalogue has no column {', '.join(missing)}; CatalogueConfig.columns: {', '.join(self.config.columns)}"
            )
        with self._lock:
            slots = self._lookup(np.asarray(ids, np.int64))
            known = slots >= 0
            slots = np.maximum(slots, 0)
            features = None if layout is None else self._features(self._stores[layout], slots)
            nothing = np.zeros(slots.size, np.int64), np.zeros(slots.size, np.int32)
            values = {
                name: (self._columns[name][slots], np.where(known, self._lengths[name][slots], 0))
                if name in self._columns
                else nothing
                for name in columns
            }
        return Taken(known, features, values)

    def _features(self, store: _Store, slots: np.ndarray) -> Features:
        groups = tuple(GroupIds(ids[slots], valid[slots]) for ids, valid in zip(store.ids, store.valid, strict=True))
        return Features(groups, tuple(None if one is None else one[slots] for one in store.weights), store.dense[slots])

    def batch(self, ids: np.ndarray) -> pa.RecordBatch:
        """Returns the columns of videos [N] as they came, lists cut to what is kept; of unknown ones the id alone."""
        taken = self.take(ids, columns=self.config.columns)
        arrays = []
        for name in self.config.columns:
            values, lengths = taken.columns[name]
            if name == "video_id":
                arrays.append(pa.array(np.asarray(ids, np.int64)))
            elif values.ndim == 1:
                arrays.append(pa.array(values, mask=lengths == 0))
            else:
                offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                kept = values[np.arange(values.shape[1]) < lengths[:, None]]
                null = None if lengths.all() else pa.array(lengths == 0)
                arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(kept), mask=null))
        return pa.RecordBatch.from_arrays(arrays, list(self.config.columns))

    def values(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns a column of single values for videos [N], 0 where it is not known, and where it is, bool [N]."""
        values, lengths = self.take(ids, columns=(name,)).columns[name]
        return np.where(lengths > 0, values, 0), lengths > 0

    def ids(self) -> np.ndarray:
        """Returns the ids of all videos, int64 [N], in no order."""
        with self._lock:
            return self._maps.entries(0)[0]

    def sweep(self, number: int) -> np.ndarray:
        """Returns the ids of the next videos, going round all of them for ever, at most `number`, int64 [N]. For one caller."""
        ids, self._swept = self._from(self._swept, number)
        return ids

    def some(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the ids of videos that lie beside one another, from a random place on, at most `number`, int64 [N]."""
        return self._from(int(rng.integers(self._slots)), number)[0]

    def _from(self, start: int, number: int) -> tuple[np.ndarray, int]:
        """Returns the ids of the next videos from a slot on, of each slot at most once, and where they end."""
        found, left, at = [np.zeros(0, np.int64)], min(number, len(self)), start
        passed = 0
        while left > 0 and passed < self._slots:
            last = min(at + max(4 * left, _BLOCK), self._slots)
            with self._lock:
                slots = at + np.flatnonzero(self._came[at:last] >= 0)[:left]
                if slots.size == left:
                    last = int(slots[-1]) + 1
                if slots.size:
                    found.append(self._columns["video_id"][slots])
            passed, left, at = passed + last - at, left - slots.size, last % self._slots
        return np.concatenate(found), at


def _flat(array: pa.Array) -> np.ndarray:
    """Returns a flat array of numbers, 0 where it is null."""
    return (array.fill_null(0) if array.null_count else array).to_numpy(zero_copy_only=False)


def _list(array: pa.Array, name: str) -> pa.Array:
    """Returns lists of numbers; a null among ids is left out, as it is no id."""
    there, offsets = valid_mask(array), array.offsets.to_numpy()
    values = _numbers(array.values, name)
    if pa.types.is_int64(values.type) and values.null_count:
        offsets = np.concatenate([[0], np.cumsum(valid_mask(values))])[offsets].astype(np.int32)
        values = values.drop_null()
    mask = None if there.all() else pa.array(~there)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)


def _numbers(array: pa.Array, name: str) -> pa.Array:
    """Returns int64 ids, float32 numbers or booleans of a flat array.

    Raises:
        ValueError: It holds something else; the message has the column's name.
    """
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return pa.array(string_ids(array), mask=~valid_mask(array))
    if pa.types.is_integer(array.type):
        return array.cast(pa.int64(), safe=False)
    if pa.types.is_floating(array.type):
        return array.cast(pa.float32())
    if pa.types.is_boolean(array.type):
        return array
    raise ValueError(
        f"the column {name!r} of a video is {array.type}; expected integers, floats, strings, booleans or lists of them"
    )
