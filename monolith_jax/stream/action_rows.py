"""Actions as rows of numbers, which is how the joiner keeps them.

In: record batches of `ACTION`. Out: int64 [N, 6], whose columns `join_kernels` lists.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream.events import valid_mask
from monolith_jax.stream.join_kernels import BITS, EVENT, HAS_EVENT, HAS_VALUE, REQUEST, TIME, VALUE, VIDEO
from monolith_jax.stream.open_rows import KINDS, Keys, keys_of

_KINDS = pa.array(KINDS)
NO_ACTIONS = np.empty((0, 6), np.int64)


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
                f"Joiner: actions need the column {name!r}, {kinds[0]}{'' if optional else ' without nulls'}; got {actions.schema}"
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
