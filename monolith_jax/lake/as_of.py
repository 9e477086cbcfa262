"""Examples with the features that were known just before each of them: the join that no later moment leaks into.

In: examples, and a state of features or the log of their changes. Out: the examples with the columns of the features,
`user_<column>` and `video_<column>`. Where examples are checked later, the state is ahead of them and holds some
versions (`features_of`); in history, changes and examples are walked through together, so that one version is enough
(`as_of_join`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.lake.rows import Encoded
from monolith_jax.lake.tables import key_of
from monolith_jax.lake.versions import FeatureState
from monolith_jax.stream.history import ids_of


class Joined(NamedTuple):
    """What a walk leads to."""

    examples: pa.RecordBatch
    rest: pa.RecordBatch
    """Changes that are not before the last example, in the order of time: they come first the next time."""


def features_of(examples: pa.RecordBatch, state: FeatureState) -> pa.RecordBatch:
    """Returns the columns of a state as of the times of examples, a row each.

    Raises:
        ValueError: The examples have no ids or times.
    """
    return state.rows.decode(state.gather(*_asked(examples, state)))


def as_of_join(examples: pa.RecordBatch, changes: pa.RecordBatch, state: FeatureState) -> Joined:
    """Returns examples with the columns of features as of their times, and takes the changes before the last one in.

    Exact with a single version, if every call gets all changes up to its last example that no call before took in, and no
    example is earlier than those of the calls before. (Of a change that comes later than that, what it should have replaced
    has been seen; an example that is earlier is answered from the versions that are held, and counted if those are too new.)

    Args:
        examples: In any order among themselves.
        changes: Rows of the features log, in any order; each sets one group.
        state: Of the walk so far.

    Raises:
        ValueError: The examples have no ids or times, or the changes are no rows of a features log.
    """
    ids, times_ms, valid = _asked(examples, state)
    changes, encoded = _in_order(changes, state)
    seen, taken = state.walk(ids, times_ms, encoded, valid)
    rest = changes.slice(int(encoded.entry_rows[taken])) if taken < encoded.entry_rows.size else changes.slice(0, 0)
    return Joined(with_columns(examples, state.rows.decode(seen)), rest)


def take_in(changes: pa.RecordBatch, state: FeatureState, until_ms: int) -> pa.RecordBatch:
    """Takes changes in that count before a time, when no example is between them; returns the others.

    Args:
        changes: Rows of the features log, in any order, but of equal times in the order in which they were written.
        state: Of the walk so far.
        until_ms: An example of this time would see what is taken in.

    Raises:
        ValueError: The changes are no rows of a features log.
    """
    encoded = state.rows.encode(changes)
    entries = encoded.entry_rows, encoded.entry_groups
    early = encoded.times_ms[entries] < until_ms
    state.write(encoded._replace(entry_rows=entries[0][early], entry_groups=entries[1][early]))
    return changes.take(pa.array(entries[0][~early]))


def _asked(examples: pa.RecordBatch, state: FeatureState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids, times, and which rows have both."""
    ids, has_id = ids_of(examples, key_of(state.subject), "the key of the features")
    times_ms, has_time = ids_of(examples, "event_time_ms", "the time of an example")
    return ids, times_ms, has_id & has_time


def _in_order(changes: pa.RecordBatch, state: FeatureState) -> tuple[pa.RecordBatch, Encoded]:
    """Returns changes by time, of equal times in the order in which they were written."""
    encoded = state.rows.encode(changes)
    if (np.diff(encoded.entry_rows) == 0).any():
        raise ValueError(
            f"a change of {state.subject} features sets several groups; the join reads their log, which has a row a group"
        )
    times_ms = encoded.times_ms[encoded.entry_rows, encoded.entry_groups]
    if (np.diff(times_ms) >= 0).all():
        return changes, encoded
    rows = encoded.entry_rows[np.argsort(times_ms, kind="stable")]
    changes = changes.take(pa.array(rows))
    return changes, state.rows.encode(changes)


def with_columns(examples: pa.RecordBatch, columns: pa.RecordBatch) -> pa.RecordBatch:
    """Returns examples with columns behind theirs; those of the same names are left out."""
    kept = [name for name in examples.schema.names if name not in columns.schema.names]
    fields = [*(examples.schema.field(name) for name in kept), *columns.schema]
    return pa.RecordBatch.from_arrays([*(examples.column(name) for name in kept), *columns.columns], schema=pa.schema(fields))
