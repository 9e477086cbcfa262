"""What an event looks like, and what its labels mean.

In: nothing. Out: the Arrow schemas of impressions, actions and examples, and `labels`, which turns examples into the
float32 matrix that the heads learn from, with a mask where a label is undefined.

An example is an impression (what was shown to whom and when, with the features logged at that moment) joined with what
followed. Every source yields `EXAMPLE`'s required fields, any of its optional ones, and any further columns of logged
features. Ids are int64 or string; strings are hashed to 64 bits once, in `features.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ACTIONS = ("click", "like", "comment", "share", "follow", "profile", "dislike", "fast_forward")
"""Things a user does to a video, a boolean column each. Null means not observed: such a label is masked."""

IMPRESSION = pa.schema(
    [
        pa.field("event_time_ms", pa.int64(), nullable=False),
        pa.field("request_id", pa.int64()),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("author_id", pa.int64()),
        pa.field("sound_id", pa.int64()),
        pa.field("tag_id", pa.list_(pa.int64())),
        pa.field("duration_ms", pa.int64()),
    ]
)
"""A video shown to a user. `event_time_ms`: Unix time. `duration_ms` null: unknown. Logged features are further columns. In a
log that is joined (`joiner`) `request_id` is required: request and video are what actions are joined by."""

ACTION = pa.schema(
    [
        pa.field("event_time_ms", pa.int64(), nullable=False),
        pa.field("request_id", pa.int64()),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("value", pa.int64()),
        pa.field("event_id", pa.int64()),
    ]
)
"""One of `ACTIONS`, or `play` (value = play time in ms) or `dwell` (value = ms on the screen before the swipe).
A player may tell the play time several times: the largest counts. `event_id`: what a repeated event is known by; null: nothing.
"""

OUTCOME = pa.schema(
    [
        pa.field("play_time_ms", pa.int64()),
        pa.field("dwell_ms", pa.int64()),
        *[pa.field(name, pa.bool_()) for name in ACTIONS],
        pa.field("weight", pa.float32()),
    ]
)
"""What followed an impression. `play_time_ms` may exceed the duration (loops). `weight` null: 1."""

EXAMPLE = pa.schema([*IMPRESSION, *OUTCOME])

LONG_VIEW_MS = 18_000
SKIP_MS = 3_000
COMPLETE_RATIO = 0.95
REWATCH_RATIO = 1.5
PLAY_RATIO_CAP = 5.0

DERIVED_LABELS = {
    "complete": "play_time_ms >= 0.95 duration_ms; undefined where the duration is unknown",
    "rewatch": "play_time_ms >= 1.5 duration_ms; undefined where the duration is unknown",
    "long_view": "play_time_ms >= min(duration_ms, 18 s) (KuaiRand's definition); undefined where the duration is unknown",
    "skip": "play_time_ms < 3 s; undefined where the play time is unknown",
    "play_ratio": "play_time_ms / duration_ms, at most 5; undefined where the duration is unknown",
}
"""Labels computed from times. Every other label is the column of that name: above 0 or true is 1, null or NaN undefined."""


def valid_mask(array: pa.Array) -> np.ndarray:
    """Returns where an array is not null, bool [B]."""
    if not array.null_count:
        return np.ones(len(array), np.bool_)
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False))


def _column_f64(examples: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a column as float64 and a mask of what is defined."""
    if name not in examples.schema.names:
        known = ", ".join(sorted([*DERIVED_LABELS, *examples.schema.names]))
        raise ValueError(f"label needs the column {name!r}, which the source does not yield; labels and columns there: {known}")
    column = examples.column(name)
    try:
        # Not `safe`: an int64 above 2^53 loses its last digits, which is no reason to stop.
        values = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"label needs numbers or booleans in column {name!r}, which is {column.type}: {error}") from None
    defined = valid_mask(column) & ~np.isnan(values)
    return np.where(defined, values, 0.0), defined


def _derived(examples: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    play, play_known = _column_f64(examples, "play_time_ms")
    if name == "skip":
        return play < SKIP_MS, play_known
    duration, duration_known = _column_f64(examples, "duration_ms")
    defined = play_known & duration_known & (duration > 0)
    safe = np.where(defined, duration, 1.0)
    match name:
        case "complete":
            return play >= COMPLETE_RATIO * safe, defined
        case "rewatch":
            return play >= REWATCH_RATIO * safe, defined
        case "long_view":
            return play >= np.minimum(safe, LONG_VIEW_MS), defined
        case _:
            return np.minimum(play / safe, PLAY_RATIO_CAP), defined


def labels(examples: pa.RecordBatch, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels of examples.

    Args:
        examples: Rows with the columns that the labels need.
        names: Keys of `DERIVED_LABELS`, or names of columns.

    Returns:
        float32 [B, T] labels, and float32 [B, T] masks: 1 where the label is defined, 0 where not (the label is 0 there).

    Raises:
        ValueError: A column that a label needs is not there, or holds no numbers.
    """
    values = np.zeros((examples.num_rows, len(names)), np.float32)
    masks = np.zeros((examples.num_rows, len(names)), np.float32)
    for task, name in enumerate(names):
        if name in DERIVED_LABELS:
            value, defined = _derived(examples, name)
        else:
            value, defined = _column_f64(examples, name)
            value = value > 0
        masks[:, task] = defined
        values[:, task] = np.where(defined, value, 0)
    return values, masks
