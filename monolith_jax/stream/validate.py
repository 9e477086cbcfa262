"""Row checks: what a column must hold, and what order rows must come in.

In: raw columns as a file held them (strings from CSV, native types from Parquet). Out: typed columns, and faults: which
rows are bad and why. Pure functions over numpy and Arrow; nothing here reads a file, and no row is dropped here:
`split` parts the good rows from the bad ones, each with its place and reason.

What is caught, in the order in which one row gets only one reason:
- a value that is not of the column's type, an id beyond int64, a missing id or time (`convert`, `required`);
- a negative duration or play time (`not_negative`); a time before 2000 or from 2100 on (`in_time_range`);
- a row further behind the newest time so far than allowed, and duplicates (`in_order`).
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.types import Rejected

FIRST_MS = 946_684_800_000
"""Unix time of 2000-01-01: earlier event times are out of range."""
LAST_MS = 4_102_444_800_000
"""Unix time of 2100-01-01: event times from there on are out of range."""
RAW_CHARS = 500
"""`Rejected.raw` is cut to this many characters."""
MAX_KEYS = 1024
"""At most this many keys of the newest event time are remembered for the duplicate check across chunks (the last ones)."""
MIN_WRONG_ROWS = 10
"""A chunk with at least this many values, all of them of a wrong type, means a wrong column rather than bad rows."""

_NULL_WORDS = pa.array(["", "null", "NULL", "None", "nan", "NaN", "NA", "\\N"])
_TYPE_WORDS = {"int64": "whole numbers", "double": "numbers", "bool": "0 or 1"}

Fault = tuple[np.ndarray, str]
"""bool [rows], true where the row is bad, and the reason."""


@dataclass(frozen=True, slots=True)
class Trail:
    """What the checks of the next rows must know of the rows before them. Its fields are JSON-able."""

    newest_ms: int | None = None
    """Newest event time among the good rows so far; None before the first."""
    keys: tuple[tuple[int | str, int | str], ...] = ()
    """(user, video) of the good rows at `newest_ms`, the last `MAX_KEYS` of them."""


def _flags_of(mask: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False), bool)


def _text(column: pa.Array) -> pa.Array:
    """Returns a column as trimmed strings, with the usual words for "nothing" as null."""
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.is_in(text, value_set=_NULL_WORDS), pa.scalar(None, pa.string()), text)


def _integers(column: pa.Array, name: str) -> tuple[pa.Array, list[Fault]]:
    try:
        return column.cast(pa.int64()), []
    except pa.ArrowInvalid:
        pass
    text = pc.replace_substring_regex(_text(column), r"^(-?[0-9]+)\.0*$", r"\1")
    given = _flags_of(pc.is_valid(text))
    whole = _flags_of(pc.match_substring_regex(text, r"^-?[0-9]+$"))
    long = whole & np.asarray(pc.greater(pc.fill_null(pc.utf8_length(text), 0), 18).to_numpy(zero_copy_only=False))
    too_big = np.zeros(len(column), bool)
    for row in np.flatnonzero(long):  # the few values near the ends of int64, one by one
        too_big[row] = not -(2**63) <= int(text[int(row)].as_py()) < 2**63
    fine = pc.if_else(pa.array(whole & ~too_big), text, pa.scalar(None, pa.string()))
    faults = [(given & ~whole, f"{name} is not a whole number"), (too_big, f"{name} is out of range")]
    return fine.cast(pa.int64()), faults


def _floats(column: pa.Array, name: str) -> tuple[pa.Array, list[Fault]]:
    try:
        values = column.cast(pa.float64(), safe=False)
        bad = np.zeros(len(column), bool)
    except pa.ArrowInvalid:
        text = _text(column)
        number = pc.match_substring_regex(text, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
        bad = _flags_of(pc.invert(number))
        plain = pc.if_else(pc.fill_null(number, False), pc.utf8_ltrim(text, "+"), pa.scalar(None, pa.string()))
        values = plain.cast(pa.float64())
    infinite = _flags_of(pc.is_inf(values))
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    return values, [(bad | infinite, f"{name} is not a number")]


def _flags(column: pa.Array, name: str) -> tuple[pa.Array, list[Fault]]:
    if pa.types.is_boolean(column.type):
        return column, []
    if pa.types.is_string(column.type):
        try:
            return column.cast(pa.bool_()), []
        except pa.ArrowInvalid:
            lower = pc.utf8_lower(_text(column))
            column = pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", lower))
    values, faults = _floats(column, name)
    bad = faults[0][0] | _flags_of(pc.invert(pc.is_in(values, value_set=pa.array([0.0, 1.0])))) & _flags_of(pc.is_valid(values))
    return pc.equal(values, 1.0), [(bad, f"{name} is not 0 or 1")]


def convert(column: pa.Array, name: str, kind: pa.DataType, file: str) -> tuple[pa.Array, list[Fault]]:
    """Returns a raw column in its type, null where nothing was given or the value is bad, and the faults.

    Args:
        column: Strings or native values.
        name: The column, for messages.
        kind: int64, float64, bool or string; any other type must be the column's own.
        file: The file, for messages.

    Raises:
        ValueError: The column is of a wrong type altogether: every value of the chunk is bad.
    """
    if pa.types.is_large_string(column.type) or pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    checks: dict[str, Callable[[pa.Array, str], tuple[pa.Array, list[Fault]]]]
    checks = {"int64": _integers, "double": _floats, "bool": _flags}
    try:
        if str(kind) not in checks:
            return (column if column.type == kind else column.cast(kind)), []
        values, faults = checks[str(kind)](column, name)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{file}: column {name!r} should hold {_TYPE_WORDS.get(str(kind), kind)}, got {column.type}"
        ) from error
    given = len(column) - column.null_count
    if given >= MIN_WRONG_ROWS and faults and int(faults[0][0].sum()) == given:
        example = pc.drop_null(column)[0].as_py()
        raise ValueError(
            f"{file}: column {name!r} should hold {_TYPE_WORDS[str(kind)]}, got {column.type} such as {example!r} in all of "
            f"{given} rows; is it the right column, or are the delimiter or the column map wrong?"
        )
    return values, faults


def required(column: pa.Array, name: str) -> Fault:
    """Returns the fault of rows that lack a value they must have."""
    return _flags_of(pc.is_null(column)), f"{name} is missing"


def not_negative(column: pa.Array, reason: str) -> Fault:
    """Returns the fault of rows whose number is below zero; null is fine."""
    return _flags_of(pc.less(column, 0)), reason


def in_time_range(times_ms: pa.Array) -> Fault:
    """Returns the fault of rows whose event time is no plausible Unix time in milliseconds."""
    outside = pc.or_(pc.less(times_ms, FIRST_MS), pc.greater_equal(times_ms, LAST_MS))
    return _flags_of(outside), "time out of range"


def _codes(carried: Sequence[int | str], column: pa.Array) -> np.ndarray:
    """Returns int64 codes, equal where ids are equal, of the carried ids followed by the column's."""
    if pa.types.is_integer(column.type):
        values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
        return np.concatenate([np.array(carried, np.int64), values])
    both = pa.concat_arrays([pa.array(carried, pa.string()), column.cast(pa.string())])
    return pc.fill_null(both.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _duplicates(times: np.ndarray, users: np.ndarray, videos: np.ndarray) -> np.ndarray:
    """Returns which rows repeat an earlier row's (time, user, video). int64 [N] each; bool [N]."""
    order = np.lexsort((videos, users, times))
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in (times, users, videos):
        same &= key[order[1:]] == key[order[:-1]]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = same
    return repeated


def in_order(
    times_ms: np.ndarray, users: pa.Array | None, videos: pa.Array | None, good: np.ndarray, trail: Trail, max_backwards_ms: int
) -> tuple[list[Fault], Trail]:
    """Checks the order of rows.

    A row goes backwards if it is more than `max_backwards_ms` behind the newest good row before it. A row is a duplicate
    if an earlier row has its user, video and event time. All duplicates within a chunk are found. Across chunks those
    are found whose event time is the newest of all before (in a stream in time order: all of them, unless more than
    `MAX_KEYS` rows share one time); an older repeat, in another chunk than the first, is not.

    Args:
        times_ms: int64 [N] event times (anything where `good` is false).
        users: N user ids, int64 or string; None: no duplicate check.
        videos: N video ids, likewise.
        good: bool [N], the rows without other faults; only these count.
        trail: What the rows before left.
        max_backwards_ms: How far a row may be behind the newest.

    Returns:
        The faults, and the trail for the rows that follow.
    """
    floor = np.iinfo(np.int64).min
    newest = floor if trail.newest_ms is None else trail.newest_ms
    masked = np.where(good, times_ms, floor)
    before = np.maximum.accumulate(np.concatenate([[newest], masked]))[:-1]
    backwards = good & (before > floor) & (times_ms < before - np.where(before > floor, max_backwards_ms, 0))
    fine = good & ~backwards
    faults: list[Fault] = [(backwards, "time went backwards")]
    latest = int(max(newest, masked[fine].max(initial=floor)))
    if latest == floor:
        return faults, trail
    keys: tuple[tuple[int | str, int | str], ...] = ()
    if users is not None and videos is not None:
        carried = len(trail.keys)
        rows = np.flatnonzero(fine)
        user_codes = _codes([key[0] for key in trail.keys], users.take(pa.array(rows)))
        video_codes = _codes([key[1] for key in trail.keys], videos.take(pa.array(rows)))
        times = np.concatenate([np.full(carried, newest, np.int64), times_ms[rows]])
        repeated = _duplicates(times, user_codes, video_codes)[carried:]
        duplicate = np.zeros(len(good), bool)
        duplicate[rows[repeated]] = True
        faults.append((duplicate, "duplicate"))
        at_latest = pa.array(np.flatnonzero(fine & ~duplicate & (times_ms == latest))[-MAX_KEYS:])
        fresh = tuple(zip(users.take(at_latest).to_pylist(), videos.take(at_latest).to_pylist(), strict=True))
        keys = ((trail.keys if latest == newest else ()) + fresh)[-MAX_KEYS:]
    return faults, Trail(newest_ms=latest, keys=keys)


def good_rows(faults: Sequence[Fault], num_rows: int) -> np.ndarray:
    """Returns bool [num_rows]: the rows that no fault names."""
    good = np.ones(num_rows, bool)
    for mask, _ in faults:
        good &= ~mask
    return good


def split(
    batch: pa.RecordBatch, faults: Sequence[Fault], where: Callable[[int], str], raw: Callable[[int], str]
) -> tuple[pa.RecordBatch, tuple[Rejected, ...]]:
    """Parts good rows from bad ones.

    Args:
        batch: Typed rows.
        faults: Of these rows; a row with several gets the first reason.
        where: A row of `batch` to its place in the file.
        raw: A row of `batch` to its text as it was read.

    Returns:
        The good rows, and the others in row order.
    """
    good = good_rows(faults, batch.num_rows)
    if good.all():
        return batch, ()
    reasons: dict[int, str] = {}
    for mask, reason in faults:
        for row in np.flatnonzero(mask):
            reasons.setdefault(int(row), reason)
    rejected = tuple(Rejected(where(row), reasons[row], raw(row)[:RAW_CHARS]) for row in sorted(reasons))
    return batch.filter(pa.array(good)), rejected
