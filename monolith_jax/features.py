"""Examples, or requests, to named id lists and dense values. Training and serving import the same code.

In: an Arrow record batch with the columns that the features name. Out: for each group of tables the ids of every example
[B, P] with what is valid and, where a feature has weights, the weights; and the dense values [B, n]. Ids stay 64-bit; nothing
is re-hashed into a smaller space. Every feature is declared once, as one of the `*FeatureConfig`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.ids.strings import string_ids
from monolith_jax.stream.events import valid_mask
from monolith_jax.types import GroupIds

Combiner = Literal["sum", "mean", "sqrtn", "first", "none"]

_ARROW_ERRORS = (pa.ArrowInvalid, pa.ArrowNotImplementedError)
"""What a cast raises: of values, and of types."""

MISSING_BUCKET = -1
"""The id of a bucketised or time feature whose value is null: missing is a value of its own."""


@dataclass(frozen=True)
class IdFeatureConfig:
    """The ids in a column: int64 or string, one an example or a list of them. Null: no id."""

    name: str
    """Name of the feature, unique."""
    column: str
    """Column of the example."""
    table: str
    """Table that the ids belong to. Several features may share one."""
    max_length: int = 1
    """Ids kept of a list: the first ones."""
    combiner: Combiner = "sum"
    """How the vectors of a list become one: sum, mean, sqrtn (sum over the root of the count), first; none keeps the list."""
    weight_column: str = ""
    """Column of weights beside the ids (a list of the same lengths), null is 0; empty: all 1."""


@dataclass(frozen=True)
class CrossFeatureConfig:
    """One id for each combination of the values of several columns (int64, string or bool)."""

    name: str
    """Name of the feature, unique."""
    columns: tuple[str, ...]
    """Columns that are crossed, each one value an example. A null is a value of its own."""
    table: str
    """Table that the ids belong to."""


@dataclass(frozen=True)
class BucketFeatureConfig:
    """The bucket that a number falls into, as an id."""

    name: str
    """Name of the feature, unique."""
    column: str
    """Numeric column."""
    boundaries: tuple[float, ...]
    """Ascending; n of them make n + 1 buckets, a boundary belonging to the bucket above it."""
    table: str
    """Table that the ids belong to."""


@dataclass(frozen=True)
class TimeFeatureConfig:
    """The hour of the day or the day of the week of the event, as an id (Monday is 0)."""

    name: str
    """Name of the feature, unique."""
    unit: Literal["hour", "weekday"]
    """Which of them."""
    table: str
    """Table that the ids belong to."""
    utc_offset_h: float = 0.0
    """Local time minus UTC, in hours."""


@dataclass(frozen=True)
class DenseFeatureConfig:
    """A number or a vector, scaled: (f(value) - mean) / std with f the identity or sign(x) log(1 + |x|). Null gives 0."""

    name: str
    """Name of the feature, unique."""
    column: str
    """Numeric or boolean column, or lists of `size` numbers. A list that is null gives zeros."""
    size: int = 1
    """Numbers an example."""
    scale: Literal["linear", "log"] = "linear"
    """f above."""
    mean: float = 0.0
    """Subtracted after f."""
    std: float = 1.0
    """Divided by after f."""


FeatureConfig = IdFeatureConfig | CrossFeatureConfig | BucketFeatureConfig | TimeFeatureConfig | DenseFeatureConfig


@dataclass(frozen=True)
class Slot:
    """Where the ids of a feature stand among the positions of its group."""

    feature: str
    table: str
    start: int
    length: int
    combiner: Combiner
    weighted: bool


@dataclass(frozen=True)
class FeatureLayout:
    """Positions of all id features by group, and the order of the dense ones. Made by `feature_layout`."""

    features: tuple[FeatureConfig, ...]
    groups: tuple[tuple[Slot, ...], ...]
    """Slots of each group, features of one id first, so that their vectors are neighbours."""
    num_dense: int
    """n, dense values of an example."""

    def num_positions(self, group: int) -> int:
        """P: id positions of an example in a group."""
        return sum(slot.length for slot in self.groups[group])

    def position_tables(self, group: int, names: Sequence[str]) -> list[int]:
        """Returns the index in `names`, the tables of the group, of the table at each position."""
        return [names.index(slot.table) for slot in self.groups[group] for _ in range(slot.length)]


class Features(NamedTuple):
    """The features of a batch."""

    groups: tuple[GroupIds, ...]
    weights: tuple[np.ndarray | None, ...]
    """float32 [B, P] of each group, None where no feature of the group has weights."""
    dense: np.ndarray
    """float32 [B, n]"""


def feature_layout(features: Sequence[FeatureConfig], groups: Sequence[Sequence[str]]) -> FeatureLayout:
    """Lays out features.

    Args:
        features: Their declarations.
        groups: Names of the tables of each group.

    Raises:
        ValueError: A name is used twice, a table is unknown or used by no feature, or a field is out of its range.
    """
    names = [feature.name for feature in features]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"features need unique names; used more than once: {', '.join(twice)}")
    known = [table for group in groups for table in group]
    slots: list[list[Slot]] = [[] for _ in groups]
    used = set()
    for feature in features:
        _check_fields(feature)
        if isinstance(feature, DenseFeatureConfig):
            continue
        if feature.table not in known:
            raise ValueError(f"feature {feature.name!r} names the table {feature.table!r}; tables there: {', '.join(known)}")
        used.add(feature.table)
        group = next(index for index, tables in enumerate(groups) if feature.table in tables)
        is_list = isinstance(feature, IdFeatureConfig)
        slots[group].append(
            Slot(
                feature=feature.name,
                table=feature.table,
                start=0,
                length=feature.max_length if is_list else 1,
                combiner=feature.combiner if is_list else "sum",
                weighted=is_list and feature.weight_column != "",
            )
        )
    if unused := sorted(set(known) - used):
        raise ValueError(f"tables without a feature: {', '.join(unused)}; remove them or add a feature")
    placed = tuple(_placed(of_group) for of_group in slots)
    num_dense = sum(feature.size for feature in features if isinstance(feature, DenseFeatureConfig))
    return FeatureLayout(tuple(features), placed, num_dense)


def _check_fields(feature: FeatureConfig) -> None:
    match feature:
        case IdFeatureConfig() if feature.max_length < 1:
            raise ValueError(f"feature {feature.name!r}: max_length must be at least 1, got {feature.max_length}")
        case BucketFeatureConfig() if list(feature.boundaries) != sorted(set(feature.boundaries)):
            raise ValueError(f"feature {feature.name!r}: boundaries must ascend, got {feature.boundaries}")
        case DenseFeatureConfig() if feature.size < 1 or not feature.std > 0:
            raise ValueError(
                f"feature {feature.name!r}: size must be at least 1 and std above 0, got {feature.size} and {feature.std}"
            )


def _placed(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    ordered = sorted(slots, key=lambda slot: slot.length > 1 or slot.combiner == "none" or slot.weighted)
    placed, start = [], 0
    for slot in ordered:
        placed.append(Slot(slot.feature, slot.table, start, slot.length, slot.combiner, slot.weighted))
        start += slot.length
    return tuple(placed)


def restricted(layout: FeatureLayout, names: Sequence[str]) -> FeatureLayout:
    """Returns the layout of some of the features, the positions of each group counted anew; a group may be left without any.

    Raises:
        ValueError: There is no such feature.
    """
    if unknown := sorted(set(names) - {feature.name for feature in layout.features}):
        there = ", ".join(feature.name for feature in layout.features)
        raise ValueError(f"there is no feature {', '.join(unknown)}; features: {there}")
    features = tuple(feature for feature in layout.features if feature.name in names)
    groups = tuple(_placed([slot for slot in slots if slot.feature in names]) for slots in layout.groups)
    return FeatureLayout(features, groups, sum(one.size for one in features if isinstance(one, DenseFeatureConfig)))


def featurize(examples: pa.RecordBatch, layout: FeatureLayout) -> Features:
    """Returns the features of examples.

    Raises:
        ValueError: A column is missing or of a type that its feature cannot read.
    """
    by_name = {feature.name: feature for feature in layout.features}
    groups, all_weights = [], []
    for index, slots in enumerate(layout.groups):
        shape = (examples.num_rows, layout.num_positions(index))
        ids, valid = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        weights = np.ones(shape, np.float32) if any(slot.weighted for slot in slots) else None
        for slot in slots:
            feature = by_name[slot.feature]
            where = slice(slot.start, slot.start + slot.length)
            if isinstance(feature, IdFeatureConfig) and pa.types.is_list(_column(examples, feature.column, feature.name).type):
                _fill_list(examples, feature, ids[:, where], valid[:, where], None if weights is None else weights[:, where])
            else:
                ids[:, slot.start], valid[:, slot.start] = _single(examples, feature)
                if weights is not None and slot.weighted and isinstance(feature, IdFeatureConfig):
                    beside = _column(examples, feature.weight_column, feature.name)
                    weights[:, slot.start] = _numbers(beside, feature.weight_column, feature.name)[0]
        groups.append(GroupIds(ids, valid))
        all_weights.append(weights)
    of_dense = [_dense(examples, feature) for feature in layout.features if isinstance(feature, DenseFeatureConfig)]
    dense = np.concatenate(of_dense, axis=1, dtype=np.float32) if of_dense else np.zeros((examples.num_rows, 0), np.float32)
    return Features(tuple(groups), tuple(all_weights), dense)


def _column(examples: pa.RecordBatch, column: str, feature: str) -> pa.Array:
    if examples.schema.get_field_index(column) < 0:
        raise ValueError(f"feature {feature!r} needs the column {column!r}; columns there: {', '.join(examples.schema.names)}")
    array = examples.column(column)
    if pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return array.cast(pa.list_(array.type.value_type))
    return array


def _numbers(array: pa.Array, column: str, feature: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a flat array as float64, 0 where it is null or NaN, and a mask of where it is neither."""
    try:
        # Not `safe`: an int64 above 2^53 loses its last digits, which is no reason to stop.
        values = pc.cast(array, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except _ARROW_ERRORS as error:
        raise ValueError(f"feature {feature!r} needs numbers in column {column!r}, which is {array.type}: {error}") from None
    valid = valid_mask(array) & ~np.isnan(values)
    return np.where(valid, values, 0.0), valid


def _values_as_ids(array: pa.Array, column: str, feature: str) -> np.ndarray:
    """Returns the ids of a flat array, int64; what they are where it is null does not matter."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return string_ids(array)
    try:
        if pa.types.is_int64(array.type) and not array.null_count:
            return array.to_numpy()
        if pa.types.is_uint64(array.type):
            return pc.fill_null(array, 0).to_numpy(zero_copy_only=False).view(np.int64)
        return pc.fill_null(pc.cast(array, pa.int64()), 0).to_numpy(zero_copy_only=False)
    except _ARROW_ERRORS as error:
        raise ValueError(
            f"feature {feature!r} needs int64 or string ids in {column!r}, which is {array.type}: {error}"
        ) from None


def column_ids(examples: pa.RecordBatch, column: str, feature: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a flat column, int64 [B], and whether there is one; errors name the feature that needs them."""
    array = _column(examples, column, feature)
    return _values_as_ids(array, column, feature), valid_mask(array)


def _single(examples: pa.RecordBatch, feature: FeatureConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the one id of each example, int64 [B], and whether there is one."""
    all_valid = np.ones(examples.num_rows, np.bool_)
    match feature:
        case IdFeatureConfig():
            return column_ids(examples, feature.column, feature.name)
        case CrossFeatureConfig():
            return crossed([column_ids(examples, column, feature.name) for column in feature.columns]), all_valid
        case BucketFeatureConfig():
            values, valid = _numbers(_column(examples, feature.column, feature.name), feature.column, feature.name)
            bucket = np.searchsorted(np.asarray(feature.boundaries), values, side="right")
            return np.where(valid, bucket, MISSING_BUCKET), all_valid
        case TimeFeatureConfig():
            times = _column(examples, "event_time_ms", feature.name)
            times_ms, valid = _numbers(times, "event_time_ms", feature.name)
            hours = np.floor(times_ms / 3_600_000 + feature.utc_offset_h).astype(np.int64)
            unit = hours % 24 if feature.unit == "hour" else (hours // 24 + 3) % 7  # 1970-01-01 was a Thursday.
            return np.where(valid, unit, MISSING_BUCKET), all_valid
        case DenseFeatureConfig():
            raise AssertionError("dense features have no ids")


def crossed(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns an id for each combination, int64 [B], given what `column_ids` returned, [B] or [1] of each column."""
    out = np.zeros(1, np.uint64)
    for ids, valid in columns:
        null = ~valid
        # The order of columns matters, and a null differs from every value: both are mixed in.
        mixed = _mixed(ids.view(np.uint64) + null.astype(np.uint64))
        out = _mixed(_mixed(out + np.uint64(0x9E3779B97F4A7C15)) ^ mixed) ^ null
    return out.view(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _fill_list(
    examples: pa.RecordBatch, feature: IdFeatureConfig, ids: np.ndarray, valid: np.ndarray, weights: np.ndarray | None
) -> None:
    """Writes the first ids of each list into `ids`, `valid` and `weights` [B, max_length]; null items are left out."""
    lists = _column(examples, feature.column, feature.name)
    offsets = lists.offsets.to_numpy()
    # A null list may cover values in the buffer: its length is 0 whatever its offsets say.
    lengths = np.where(valid_mask(lists), np.diff(offsets), 0)
    index = offsets[:-1, None] + np.arange(ids.shape[1])
    there = np.arange(ids.shape[1]) < lengths[:, None]
    flat = _values_as_ids(lists.values, feature.column, feature.name)
    not_null = valid_mask(lists.values)
    where = index[there]
    ids[there] = flat[where]
    valid[there] = not_null[where]
    if weights is None or not feature.weight_column:
        return
    beside = _column(examples, feature.weight_column, feature.name)
    is_list = pa.types.is_list(beside.type)
    beside_offsets = beside.offsets.to_numpy() if is_list else offsets
    if not is_list or not np.array_equal(np.where(valid_mask(beside), np.diff(beside_offsets), 0), lengths):
        raise ValueError(
            f"feature {feature.name!r}: the lists of weights in {feature.weight_column!r} must be as long as those of ids in "
            f"{feature.column!r}"
        )
    values, _ = _numbers(beside.values, feature.weight_column, feature.name)
    weights[there] = values[(beside_offsets[:-1, None] + np.arange(ids.shape[1]))[there]]


def _dense(examples: pa.RecordBatch, feature: DenseFeatureConfig) -> np.ndarray:
    """Returns the scaled values, float64 [B, size]."""
    array = _column(examples, feature.column, feature.name)
    if feature.size == 1 and not pa.types.is_list(array.type):
        values, valid = _numbers(array, feature.column, feature.name)
        return _scaled(feature, values, valid)[:, None]
    there = valid_mask(array)
    is_list = pa.types.is_list(array.type)
    starts = array.offsets.to_numpy() if is_list else np.arange(examples.num_rows + 1)
    lengths = np.diff(starts)[there]
    if (lengths != feature.size).any():
        raise ValueError(
            f"feature {feature.name!r}: DenseFeatureConfig.size is {feature.size}, but column {feature.column!r} has an "
            f"example with {lengths[lengths != feature.size][0]}"
        )
    flat, flat_valid = _numbers(array.values if is_list else array, feature.column, feature.name)
    index = starts[:-1][there][:, None] + np.arange(feature.size)
    values, valid = np.zeros((examples.num_rows, feature.size)), np.zeros((examples.num_rows, feature.size), np.bool_)
    values[there], valid[there] = flat[index], flat_valid[index]
    return _scaled(feature, values, valid)


def _scaled(feature: DenseFeatureConfig, values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    if feature.scale == "log":
        values = np.sign(values) * np.log1p(np.abs(values))
    return np.where(valid, (values - feature.mean) / feature.std, 0.0)
