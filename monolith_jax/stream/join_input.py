"""What the joiner is fed, checked, and in the form in which it is kept.

In: record batches of `IMPRESSION` with logged features, and of `ACTION`. Out: impressions in a schema that only grows; actions
as int64 [N, 6], whose columns `join_kernels` lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream.events import valid_mask
from monolith_jax.stream.join_kernels import BITS, EVENT, HAS_EVENT, HAS_VALUE, REQUEST, TIME, VALUE, VIDEO
from monolith_jax.stream.open_rows import KINDS, Keys, conform, keys_of

REQUIRED = ("request_id", "user_id", "video_id", "event_time_ms")
_KINDS = pa.array(KINDS)
NO_ACTIONS = np.empty((0, 6), np.int64)


def impression_rows(rows: pa.RecordBatch, schema: pa.Schema | None, reserved: Sequence[str]) -> pa.RecordBatch:
    """Returns impressions in the schema so far, which grows by their further columns; what they lack is null.

    Dictionaries are decoded.

    Raises:
        ValueError: A column is missing, of another type than before, null where it must not be, or has one of the `reserved`
            names.
    """
    for at, one in enumerate(rows.schema):
        if pa.types.is_dictionary(one.type):  # whose batches could not be told apart from their dictionaries
            rows = rows.set_column(at, one.name, rows.column(at).dictionary_decode())
    taken = {*reserved} & {*rows.schema.names}
    if taken:
        raise ValueError(f"Joiner: impressions have the columns {sorted(taken)}, which the joiner makes; rename them")
    for name in REQUIRED:
        if name not in rows.schema.names or rows.schema.field(name).type != pa.int64() or rows.column(name).null_count:
            raise ValueError(f"Joiner: impressions need the column {name!r}, int64 without nulls; got {rows.schema}")
    known = {one.name: one.type for one in schema} if schema else {}
    for one in rows.schema:
        if known.get(one.name, one.type) != one.type:
            raise ValueError(f"Joiner: column {one.name!r} was {known[one.name]} before and is now {one.type}; keep its type")
    fields = [*(schema or ()), *(one for one in rows.schema if one.name not in known)]
    # Any other column may be lacking in another cut.
    grown = pa.schema([one if one.name in REQUIRED else one.with_nullable(True) for one in fields])
    return conform(rows, schema if schema is not None and grown.equals(schema) else grown)


def action_rows(actions: pa.RecordBatch) -> np.ndarray:
    """Returns actions as rows, int64 [N, 6]; those of an unknown kind are left out.

    Raises:
        ValueError: A column is missing, of another type, or null where it must not be.
    """
    for name in ("request_id", "video_id", "event_time_ms", "value", "event_id", "action"):
        optional, there = name in ("value", "event_id"), name in actions.schema.names
        kinds = (pa.string(), pa.dictionary(pa.int32(), pa.string())) if name == "action" else (pa.int64(),)
        if not there or actions.schema.field(name).type not in kinds or (actions.column(name).null_count and not optional):
            raise ValueError(
                f"Joiner: actions need the column {name!r}, {kinds[0]}{', no nulls' * (not optional)}; got {actions.schema}"
            )
    column = actions.column("action")
    if pa.types.is_dictionary(column.type):
        names = pc.index_in(column.dictionary, _KINDS).fill_null(-1).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        kinds = names[column.indices.to_numpy()]
    else:
        kinds = pc.index_in(column, _KINDS).fill_null(-1).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    rows = np.empty((actions.num_rows, 6), np.int64)
    for at, name in ((REQUEST, "request_id"), (VIDEO, "video_id"), (TIME, "event_time_ms")):
        rows[:, at] = actions.column(name).to_numpy()
    rows[:, BITS] = kinds
    for at, name, bit in ((VALUE, "value", HAS_VALUE), (EVENT, "event_id", HAS_EVENT)):
        values = actions.column(name)
        rows[:, at] = (values.fill_null(0) if values.null_count else values).to_numpy()
        rows[:, BITS] |= np.where(valid_mask(values), bit, 0)
    return rows[kinds >= 0] if (kinds < 0).any() else rows


def keys_of_actions(actions: np.ndarray) -> Keys:
    """Returns the keys of rows of actions."""
    return keys_of(np.ascontiguousarray(actions[:, REQUEST]), np.ascontiguousarray(actions[:, VIDEO]))
