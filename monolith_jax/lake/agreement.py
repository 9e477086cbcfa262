"""Whether the server saw what training sees: logged features against those as of the same time.

In: impressions as they were logged, with the columns that the server looked up and the times of their groups, and the same
columns as of their times. Out: counts, by group of columns of an impression: how many were checked, and of these

* `mismatched`: both saw the version of the same time, and a value is not the same bit for bit. It must not happen;
* `behind`: there was a newer version, which the server had not seen yet: what the way from the lake to it takes;
* `unknown`: the version that the server saw is not there: it has not come yet, was pushed out, or its id has no row.

All others are equal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.lake.as_of import features_of
from monolith_jax.lake.rows import items_of
from monolith_jax.lake.tables import GROUPS, ColumnGroup, Subject, key_of
from monolith_jax.lake.versions import FeatureState
from monolith_jax.stream.events import valid_mask
from monolith_jax.stream.history import ids_of

COUNTED = ("checked", "mismatched", "behind", "unknown")
_NEVER = np.iinfo(np.int64).min


class Mismatch(NamedTuple):
    """A value that is not the same."""

    subject: Subject
    id: int
    time_ms: int
    """Of the impression."""
    since_ms: int | None
    """Of the version that both saw; None: both saw none."""
    column: str
    logged: Any
    found: Any


class Agreement:
    """Counts for one subject."""

    def __init__(self, subject: Subject, kept: int = 10) -> None:
        """Counts from nothing; the first mismatches are kept for people, so many."""
        self.subject: Subject = subject
        self.counts = dict.fromkeys(COUNTED, 0)
        self.mismatches: list[Mismatch] = []
        self._kept = kept

    def check(self, impressions: pa.RecordBatch, state: FeatureState) -> None:
        """Compares impressions with a state as of their times; those columns that they have.

        Raises:
            ValueError: The impressions have no ids or times, or a column is of another type than the features'.
        """
        self.compare(impressions, features_of(impressions, state))

    def compare(self, impressions: pa.RecordBatch, found: pa.RecordBatch) -> None:
        """Compares impressions with columns that were found for them, a row each.

        Raises:
            ValueError: The impressions have no ids or times, or a column is of another type than the features'.
        """
        for group in GROUPS[self.subject]:
            names = [f"{self.subject}_{name}" for name, _ in group.columns]
            logged = [name for name in names if name in impressions.schema.names]
            # A log leaves columns out of which all is null.
            if logged or f"{self.subject}_{group.time_column}" in impressions.schema.names:
                self._compare(group, logged or names, impressions, found)

    def _compare(self, group: ColumnGroup, names: list[str], impressions: pa.RecordBatch, found: pa.RecordBatch) -> None:
        time_name = f"{self.subject}_{group.time_column}"
        saw, has = (_times(_column(batch, time_name, pa.int64())) for batch in (impressions, found))
        both = {name: (_column(impressions, name, found.column(name).type), found.column(name)) for name in names}
        same = {name: _same(*arrays) for name, arrays in both.items()}
        all_same = np.logical_and.reduce(list(same.values()))
        # Numbers that would be 0 where there is nothing are null: the version that was seen was pushed out.
        is_null = ~np.logical_or.reduce([valid_mask(array) for _, array in both.values()])
        too_old = (has == _NEVER) & is_null & (group.fresh_ms > 0)
        behind = has > saw
        unknown = (has < saw) | ((has == saw) & too_old & ~all_same)
        mismatched = (has == saw) & ~unknown & ~all_same
        for name, mask in zip(COUNTED, (np.ones_like(behind), mismatched, behind, unknown), strict=True):
            self.counts[name] += int(np.count_nonzero(mask))
        rows = np.flatnonzero(mismatched)[: self._kept - len(self.mismatches)]
        if rows.size:
            self._keep(rows.tolist(), impressions, saw, both, same)

    def _keep(
        self,
        rows: list[int],
        impressions: pa.RecordBatch,
        saw: np.ndarray,
        both: dict[str, tuple[pa.Array, pa.Array]],
        same: dict[str, np.ndarray],
    ) -> None:
        ids, _ = ids_of(impressions, key_of(self.subject), "the key of the features")
        times_ms, _ = ids_of(impressions, "event_time_ms", "the time of an impression")
        for row in rows:
            name = next(name for name, of in same.items() if not of[row])
            since_ms = None if saw[row] == _NEVER else int(saw[row])
            logged, found = (array[row].as_py() for array in both[name])
            self.mismatches.append(Mismatch(self.subject, int(ids[row]), int(times_ms[row]), since_ms, name, logged, found))

    def metrics(self) -> dict[str, int]:
        """Returns the counts, `<subject>_<count>`."""
        return {f"{self.subject}_{name}": count for name, count in self.counts.items()}


def _column(batch: pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
    """Returns a column, null where it is not there.

    Raises:
        ValueError: It is of another type.
    """
    if name not in batch.schema.names:
        return pa.nulls(batch.num_rows, kind)
    try:
        return batch.column(name).cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"the logged column {name!r} is {batch.column(name).type}, expected {kind}: {error}") from None


def _times(array: pa.Array) -> np.ndarray:
    return array.fill_null(_NEVER).to_numpy()


def _same(one: pa.Array, other: pa.Array) -> np.ndarray:
    """Returns where two arrays of a type are the same, bit for bit, bool [N]."""
    there, there_too = valid_mask(one), valid_mask(other)
    if pa.types.is_list(one.type):
        (lengths, items), (other_lengths, other_items) = items_of(one, there), items_of(other, there_too)
        same = (lengths == other_lengths) & (items == other_items).all(1)
    elif pa.types.is_float64(one.type):
        same = one.fill_null(0.0).to_numpy().view(np.int64) == other.fill_null(0.0).to_numpy().view(np.int64)
    else:
        equal = pc.equal(one, other)  # pyright: ignore[reportAttributeAccessIssue]
        same = equal.fill_null(False).to_numpy(zero_copy_only=False)
    return (there == there_too) & (same | ~there)
