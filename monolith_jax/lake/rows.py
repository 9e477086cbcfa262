"""The features of a user or of a video as words of 64 bits, so that kernels move them without knowing what they mean.

In: record batches with the columns of `tables.features_schema`, any of their groups set. Out: int64 words of each row, and from
words the columns again, bit for bit. A group is one word that tells which of its columns are null, then its columns: a number
is one word (of a float its bits), a text is its place in a dictionary that grows, a list is its length and `MAX_ITEMS` words.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.lake.tables import GROUPS, Subject, key_of
from monolith_jax.stream.events import valid_mask

MAX_ITEMS = 8
"""Items kept of a list, the first ones. A null among ids is no id, and is left out."""
MAX_TEXTS = 65_536
"""Distinct texts; later ones read as null, and are counted."""

Kind = Literal["int64", "float64", "bool", "string", "list"]
_KINDS: tuple[tuple[pa.DataType, Kind], ...] = (
    (pa.int64(), "int64"),
    (pa.float64(), "float64"),
    (pa.bool_(), "bool"),
    (pa.string(), "string"),
    (pa.list_(pa.int64()), "list"),
)
_NUMBERS = ("int64", "float64")


@dataclass(frozen=True)
class Place:
    """Where a column stands in a row."""

    name: str
    group: int
    bit: int
    """Of the group's first word: whether the column is null."""
    start: int
    """Its first word."""
    kind: Kind
    type: pa.DataType


class Encoded(NamedTuple):
    """Changes as words. An entry is a group of a row that is set; entries are in the order of rows."""

    ids: np.ndarray
    """int64 [N]"""
    entry_rows: np.ndarray
    """int64 [E], of rows that have an id."""
    entry_groups: np.ndarray
    """int64 [E]"""
    times_ms: np.ndarray
    """int64 [N, G], from when on each group counts: its time, and `ColumnGroup.known_ms`."""
    words: np.ndarray
    """int64 [N, W]"""
    without_id: int
    """Rows that have none."""

    def part(self, first: int, last: int) -> Encoded:
        """Returns the rows from one to before another; those without an id count as the first part's."""
        start, end = np.searchsorted(self.entry_rows, [first, last])
        entries = self.entry_rows[start:end] - first, self.entry_groups[start:end]
        return Encoded(
            self.ids[first:last], *entries, self.times_ms[first:last], self.words[first:last], 0 if first else self.without_id
        )


class Seen(NamedTuple):
    """What was seen of ids at times."""

    known: np.ndarray
    """bool [N], whether anything had been told of the id by then."""
    there: np.ndarray
    """bool [N, G], whether the group has a row that counts."""
    times_ms: np.ndarray
    """int64 [N, G], from when on it counts, where there is one."""
    words: np.ndarray
    """int64 [W, N]: columns are read one after the other. Of groups that were not asked for there may be anything."""


class FeatureRows:
    """The words of one subject's rows, and the texts that they point at. One caller encodes, any number decode."""

    def __init__(self, subject: Subject) -> None:
        """Lays out the words.

        Raises:
            ValueError: A column is of a type that has no words.
        """
        self.subject: Subject = subject
        self.groups = GROUPS[subject]
        places: list[Place] = []
        starts, end = [], 0
        for at, group in enumerate(self.groups):
            starts.append(end)
            end += 1
            for bit, (name, kind) in enumerate(group.columns):
                found: list[Kind] = [one for of_type, one in _KINDS if of_type == kind]
                if not found or bit > 62:
                    raise ValueError(f"column {name!r} of {subject} features is {kind}; it has no words")
                places.append(Place(name, at, bit, end, found[0], kind))
                end += 1 + MAX_ITEMS if found[0] == "list" else 1
        self.places = tuple(places)
        self.offsets = np.array([*starts, end], np.int64)
        """Where each group's words begin, and where the last ends, int64 [G + 1]."""
        self.fresh_ms = np.array([group.fresh_ms for group in self.groups], np.int64)
        """int64 [G]; 0: for good."""
        self.absent = np.zeros(len(self.groups), np.int64)
        """First word of each group where no row of it counts: all null, but for numbers of what goes stale, which are 0."""
        for place in places:
            if not (self.groups[place.group].fresh_ms and place.kind in _NUMBERS):
                self.absent[place.group] |= 1 << place.bit
        self.nulls = np.array([(1 << len(group.columns)) - 1 for group in self.groups], np.int64)
        """First word of each group where all is null."""
        self._by_name: dict[str, Place | int] = {f"{subject}_{place.name}": place for place in places}
        self._by_name |= {f"{subject}_{group.time_column}": at for at, group in enumerate(self.groups)}
        self.texts_refused = 0
        self._codes: dict[str, int] = {}
        self._texts = pa.array([], pa.string())
        self._lock = threading.Lock()

    @property
    def num_words(self) -> int:
        """W."""
        return int(self.offsets[-1])

    @property
    def columns(self) -> tuple[str, ...]:
        """What `decode` can return: `<subject>_<column>`, the groups' times among them, and whether it is known."""
        names = []
        for at, group in enumerate(self.groups):
            names += [group.time_column, *(place.name for place in self.places if place.group == at)]
        return tuple(f"{self.subject}_{name}" for name in [*names, "known"])

    def groups_of(self, columns: Sequence[str] | None) -> np.ndarray:
        """Returns which groups some of `columns` need, bool [G]; None: all. Whether an id is known takes all of them."""
        found = [self._by_name.get(name) for name in self.columns if columns is None or name in columns]
        wanted = {one.group if isinstance(one, Place) else one for one in found}
        return np.array([at in wanted or None in wanted for at in range(len(self.groups))])

    def encode(self, batch: pa.RecordBatch) -> Encoded:
        """Returns rows as words.

        Args:
            batch: The key, and of some groups the time and all columns; a group counts where its time is not null. What else
                there is, is ignored.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        names, number = batch.schema.names, batch.num_rows
        key = _cast(batch, key_of(self.subject), pa.int64())
        has_id = valid_mask(key)
        times = np.zeros((number, len(self.groups)), np.int64)
        is_set = np.zeros((number, len(self.groups)), np.bool_)
        words = np.zeros((number, self.num_words), np.int64)
        present = [at for at, group in enumerate(self.groups) if group.time_column in names]
        for at in present:
            array = _cast(batch, self.groups[at].time_column, pa.int64())
            is_set[:, at], times[:, at] = valid_mask(array) & has_id, _flat(array) + self.groups[at].known_ms
        for place in self.places:
            if place.group in present:
                array = _cast(batch, place.name, place.type)
                there = self._write(place, array, words)
                words[:, self.offsets[place.group]] |= (~there).astype(np.int64) << place.bit
        entry_rows, entry_groups = np.nonzero(is_set)
        return Encoded(_flat(key), entry_rows, entry_groups, times, words, number - int(np.count_nonzero(has_id)))

    def _write(self, place: Place, array: pa.Array, words: np.ndarray) -> np.ndarray:
        """Writes a column's words; returns where it is not null."""
        there = valid_mask(array)
        match place.kind:
            case "float64":
                words[:, place.start] = _flat(array).view(np.int64)
            case "string":
                codes = self._codes_of(array)
                words[:, place.start], there = np.maximum(codes, 0), codes >= 0
            case "list":
                lengths, items = items_of(array, there)
                words[:, place.start] = lengths
                words[:, place.start + 1 : place.start + 1 + MAX_ITEMS] = items
            case _:
                words[:, place.start] = _flat(array)
        return there

    def _codes_of(self, array: pa.Array) -> np.ndarray:
        """Returns the place of each text in the dictionary, -1 where it is null or has none."""
        encoded = array.dictionary_encode()
        distinct = encoded.dictionary.to_pylist()
        with self._lock:
            for text in distinct:
                if text not in self._codes and len(self._codes) < MAX_TEXTS:
                    self._codes[text] = len(self._codes)
            if len(self._codes) > len(self._texts):
                self._texts = pa.array(list(self._codes), pa.string())
            known = np.array([*(self._codes.get(text, -1) for text in distinct), -1], np.int64)
        codes = known[encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)]
        self.texts_refused += int(np.count_nonzero((codes < 0) & valid_mask(array)))
        return codes

    def decode(self, seen: Seen, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Returns columns from words.

        Args:
            seen: The words.
            columns: Some of `FeatureRows.columns`; None: all.

        Raises:
            ValueError: There is no such column.
        """
        names = list(self.columns if columns is None else columns)
        if unknown := sorted(set(names) - set(self.columns)):
            raise ValueError(f"there is no column {', '.join(unknown)} of a {self.subject}; columns: {', '.join(self.columns)}")
        arrays = []
        for name in names:
            found = self._by_name.get(name)
            if isinstance(found, Place):
                arrays.append(self._read(found, seen.words))
            elif found is None:
                arrays.append(pa.array(seen.known))
            else:
                times_ms = seen.times_ms[:, found] - self.groups[found].known_ms
                arrays.append(pa.array(times_ms, mask=~seen.there[:, found]))
        return pa.RecordBatch.from_arrays(arrays, names)

    def _read(self, place: Place, words: np.ndarray) -> pa.Array:
        null: np.ndarray | None = (words[self.offsets[place.group]] >> place.bit & 1).astype(np.bool_)
        if not null.any():
            null = None
        values = words[place.start]
        match place.kind:
            case "float64":
                return pa.array(values.view(np.float64), mask=null)
            case "bool":
                return pa.array(values != 0, mask=null)
            case "string":
                return self._texts.take(pa.array(values, mask=null))
            case "list":
                offsets = np.concatenate([[0], np.cumsum(values)]).astype(np.int32)
                most = int(values.max(initial=0))
                items = np.ascontiguousarray(words[place.start + 1 : place.start + 1 + most].T)
                kept = items[np.arange(most) < values[:, None]]
                return pa.ListArray.from_arrays(
                    pa.array(offsets), pa.array(kept, pa.int64()), mask=None if null is None else pa.array(null)
                )
            case _:
                return pa.array(values, mask=null)

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns the texts, as their bytes in UTF-8 and where each ends."""
        data = [text.encode() for text in self._codes]
        return {
            "texts": np.frombuffer(b"".join(data), np.uint8).copy(),
            "ends": np.cumsum([len(text) for text in data], dtype=np.int64),
            "texts_refused": np.array([self.texts_refused], np.int64),
        }

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned."""
        data, ends = state["texts"].tobytes(), state["ends"].tolist()
        texts = [data[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
        with self._lock:
            self._codes = {text: code for code, text in enumerate(texts)}
            self._texts = pa.array(texts, pa.string())
            self.texts_refused = int(state["texts_refused"][0])


def column_types() -> dict[str, pa.DataType]:
    """Returns the columns of all subjects that `FeatureRows.decode` returns, with their types."""
    types: dict[str, pa.DataType] = {}
    for subject, groups in GROUPS.items():
        for group in groups:
            types[f"{subject}_{group.time_column}"] = pa.int64()
            types |= {f"{subject}_{name}": kind for name, kind in group.columns}
        types[f"{subject}_known"] = pa.bool_()
    return types


def _cast(batch: pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
    if name not in batch.schema.names:
        raise ValueError(f"a row of features needs the column {name!r}; columns there: {', '.join(batch.schema.names)}")
    array = batch.column(name)
    if array.type == kind:
        return array
    try:
        return array.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"the column {name!r} of features is {array.type}, expected {kind}: {error}") from None


def _flat(array: pa.Array) -> np.ndarray:
    """Returns numbers, 0 where they are null."""
    filled = array.fill_null(0 if not pa.types.is_boolean(array.type) else False) if array.null_count else array
    return filled.to_numpy(zero_copy_only=False)


def items_of(array: pa.Array, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many items of each list are kept, int64 [N], and which, int64 [N, MAX_ITEMS]."""
    offsets, values = array.offsets.to_numpy(), array.values
    if values.null_count:
        offsets = np.concatenate([[0], np.cumsum(valid_mask(values))])[offsets]
        values = values.drop_null()
    # A null list may cover values in the buffer.
    lengths = np.minimum(np.where(there, np.diff(offsets), 0), MAX_ITEMS)
    kept = np.arange(MAX_ITEMS) < lengths[:, None]
    items = np.zeros(kept.shape, np.int64)
    items[kept] = values.to_numpy()[(offsets[:-1, None] + np.arange(MAX_ITEMS))[kept]]
    return lengths, items
