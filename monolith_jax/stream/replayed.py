"""Examples taken apart: what was shown, and what followed as events of their own, each when it is due.

In: examples of any source. Out: impressions and actions as `events` has them, such that joining them gives the examples again;
and `Waiting`, which holds events back until their time. An outcome that was not observed (null) and one that did not happen
(false) are both no event: after a join they are the same.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.ids.strings import string_ids
from monolith_jax.stream.events import ACTION, ACTIONS, IMPRESSION, OUTCOME, valid_mask

_TIMED = {"play": "play_time_ms", "dwell": "dwell_ms"}
_NAMES = pa.array([*ACTIONS, *_TIMED])
_ODD = np.uint64(0x9E3779B97F4A7C15)
_NEEDED = ("event_time_ms", "user_id", "video_id")


def _as_ids(column: pa.Array) -> pa.Array:
    """Returns strings as their hashes, in lists too, null where they are null; other columns as they are."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _as_ids(column.cast(kind.value_type))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array(string_ids(column), mask=~valid_mask(column))
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not pa.types.is_integer(kind.value_type):
        sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), _as_ids(column.flatten()), mask=pa.array(~valid_mask(column)))
    return column


def impressions_of(examples: pa.RecordBatch, first_request: int) -> pa.RecordBatch:
    """Returns what was shown: all columns but the outcomes, ids that are strings as their hashes.

    Args:
        examples: Rows of a source.
        first_request: Where requests are numbered from, if the source does not number them.

    Raises:
        ValueError: There are no users, videos or times, or a column is of another type than impressions have.
    """
    names = examples.schema.names
    for name in _NEEDED:
        if name not in names:
            raise ValueError(
                f"the source yields no column {name!r}, without which its examples cannot become events; there: "
                f"{', '.join(names)}"
            )
    columns: dict[str, pa.Array] = {}
    for field in IMPRESSION:
        if field.name in names:
            column = _as_ids(examples.column(field.name))
            try:
                columns[field.name] = column if column.type == field.type else column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ValueError(f"column {field.name!r} should hold {field.type}, got {column.type}: {error}") from None
    requests = pa.array(first_request + np.arange(len(examples), dtype=np.int64))
    given = columns.get("request_id")
    columns["request_id"] = requests if given is None else pc.coalesce(given, requests)
    skipped = {*OUTCOME.names, *IMPRESSION.names}
    columns |= {name: examples.column(name) for name in names if name not in skipped}
    return pa.RecordBatch.from_pydict(columns)


def actions_of(examples: pa.RecordBatch, impressions: pa.RecordBatch) -> tuple[pa.RecordBatch, np.ndarray]:
    """Returns what followed, an event for each thing that did.

    Args:
        examples: Rows of a source.
        impressions: What `impressions_of` made of them.

    Returns:
        The actions in the order of their impressions, with the impression's time; and the row of each one's impression, int64.
    """
    rows: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    values: list[np.ndarray] = []
    there = set(examples.schema.names)
    for code, name in enumerate([*ACTIONS, *_TIMED.values()]):
        if name not in there:
            continue
        column = examples.column(name)
        timed = code >= len(ACTIONS)
        numbers = pc.fill_null(column, 0 if timed else False).cast(pa.int64()).to_numpy(zero_copy_only=False)
        found = np.flatnonzero(valid_mask(column) if timed else numbers)
        rows.append(found)
        codes.append(np.full(len(found), code, np.int64))
        values.append(numbers[found] if timed else np.zeros(len(found), np.int64))
    row = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    order = np.argsort(row, kind="stable")
    row = row[order]
    code = np.concatenate(codes)[order] if rows else row
    value = np.concatenate(values)[order] if rows else row
    taken = {name: impressions.column(name).take(pa.array(row)) for name in (*_NEEDED, "request_id")}
    request = taken["request_id"].to_numpy().view(np.uint64)
    video = taken["video_id"].to_numpy().view(np.uint64)
    columns = {
        **taken,
        "action": _NAMES.take(pa.array(code)),
        "value": pa.array(value, mask=code < len(ACTIONS)),
        # The same each time that the same stream is sent: so an action that is sent twice counts once.
        "event_id": pa.array(_scrambled(_scrambled(request + video * _ODD) + code.view(np.uint64)).view(np.int64)),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in ACTION.names], names=ACTION.names), row


def _scrambled(values: np.ndarray) -> np.ndarray:
    """Returns hashes of uint64, different for different values."""
    mixed = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(32))


class Waiting:
    """Events that are not due yet: sorted runs of growing size, of which neighbours are merged, so that there are few."""

    def __init__(self) -> None:
        """Holds nothing."""
        self._runs: list[tuple[pa.RecordBatch, np.ndarray]] = []

    def __len__(self) -> int:
        """Returns how many wait."""
        return sum(len(due) for _, due in self._runs)

    def add(self, batch: pa.RecordBatch, due_ms: np.ndarray) -> None:
        """Takes events, and when each is due, float64 [B]."""
        if not len(batch):
            return
        self._runs.append(_sorted(batch, due_ms))
        while len(self._runs) > 1 and len(self._runs[-2][1]) < 2 * len(self._runs[-1][1]):
            one, other = self._runs[-2:]
            self._runs[-2:] = [_sorted(pa.concat_batches([one[0], other[0]]), np.concatenate([one[1], other[1]]))]

    def take(self, until_ms: float) -> pa.RecordBatch | None:
        """Returns the events that are due by a time, in that order, and forgets them; None if there are none."""
        parts: list[tuple[pa.RecordBatch, np.ndarray]] = []
        left: list[tuple[pa.RecordBatch, np.ndarray]] = []
        for batch, due in self._runs:
            end = int(np.searchsorted(due, until_ms, side="right"))
            if end:
                parts.append((batch.slice(0, end), due[:end]))
            if end < len(due):
                left.append((batch.slice(end), due[end:]))
        self._runs = left
        if len(parts) < 2:
            return parts[0][0] if parts else None
        return _sorted(pa.concat_batches([batch for batch, _ in parts]), np.concatenate([due for _, due in parts]))[0]


def _sorted(batch: pa.RecordBatch, due_ms: np.ndarray) -> tuple[pa.RecordBatch, np.ndarray]:
    if (due_ms[1:] >= due_ms[:-1]).all():
        return batch, due_ms
    order = np.argsort(due_ms, kind="stable")
    return batch.take(pa.array(order)), due_ms[order]
