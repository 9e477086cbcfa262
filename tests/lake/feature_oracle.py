"""What features are as of a time, with dictionaries and loops; and random changes to ask that of."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from monolith_jax.lake.rows import MAX_ITEMS
from monolith_jax.lake.tables import GROUPS, ColumnGroup, Subject, features_log_schema, key_of

NUMBERS = (pa.int64(), pa.float64())


class Change(NamedTuple):
    id: int
    group: int
    time_ms: int
    values: tuple[Any, ...]


class Oracle:
    """Remembers everything."""

    def __init__(self, subject: Subject, versions: int = 1_000_000) -> None:
        self.subject: Subject = subject
        self.versions = versions
        self.told: dict[tuple[int, int], dict[int, tuple[Any, ...]]] = {}

    def apply(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self.told.setdefault((change.id, change.group), {})[change.time_ms] = change.values

    def group_as_of(self, id: int, group: int, time_ms: int) -> tuple[int | None, tuple[Any, ...]]:
        of_group = GROUPS[self.subject][group]
        absent = tuple(0 if of_group.fresh_ms and kind in NUMBERS else None for _, kind in of_group.columns)
        versions = sorted(self.told.get((id, group), {}).items(), reverse=True)
        for rank, (since_ms, values) in enumerate(versions):
            if since_ms + of_group.known_ms < time_ms:
                if rank >= self.versions:
                    return None, (None,) * len(values)
                is_fresh = not of_group.fresh_ms or time_ms <= since_ms + of_group.known_ms + of_group.fresh_ms
                return (since_ms, tuple(map(kept, values))) if is_fresh else (None, absent)
        return None, absent

    def as_of(self, ids: Sequence[int], times_ms: Sequence[int]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {}
        for at, group in enumerate(GROUPS[self.subject]):
            found = [self.group_as_of(id, at, time_ms) for id, time_ms in zip(ids, times_ms, strict=True)]
            columns[f"{self.subject}_{group.time_column}"] = [since_ms for since_ms, _ in found]
            for place, (name, _) in enumerate(group.columns):
                columns[f"{self.subject}_{name}"] = [values[place] for _, values in found]
        columns[f"{self.subject}_known"] = [
            any(
                since_ms + GROUPS[self.subject][group].known_ms < time_ms
                for (of, group), versions in self.told.items()
                if of == id
                for since_ms in versions
            )
            for id, time_ms in zip(ids, times_ms, strict=True)
        ]
        return columns


def kept(value: Any) -> Any:
    return [item for item in value if item is not None][:MAX_ITEMS] if isinstance(value, list) else value


def log_of(subject: Subject, changes: Sequence[Change]) -> pa.RecordBatch:
    """Returns rows of the features log."""
    rows = []
    for change in changes:
        group = GROUPS[subject][change.group]
        names = [name for name, _ in group.columns]
        row = {"event_time_ms": change.time_ms, "day": "1970-01-01", key_of(subject): change.id}
        rows.append(row | {group.time_column: change.time_ms} | dict(zip(names, change.values, strict=True)))
    return pa.RecordBatch.from_pylist(rows, schema=features_log_schema(subject))


def values_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    integers = st.integers(-(2**63), 2**63 - 1)
    if pa.types.is_list(kind):
        return st.none() | st.lists(st.none() | integers, max_size=MAX_ITEMS + 2)
    if pa.types.is_string(kind):
        return st.none() | st.text(max_size=3)
    return st.none() | (integers if pa.types.is_int64(kind) else st.floats(allow_nan=False))


def changes_of(subject: Subject, times: st.SearchStrategy[int]) -> st.SearchStrategy[Change]:
    def of_group(at: int) -> st.SearchStrategy[Change]:
        group: ColumnGroup = GROUPS[subject][at]
        values = st.tuples(*(values_of(kind) for _, kind in group.columns))
        return st.builds(Change, st.integers(0, 4), st.just(at), times, values)

    return st.one_of([of_group(at) for at in range(len(GROUPS[subject]))])


def int64(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)
