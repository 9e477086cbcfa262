"""The tables of the lake: their columns, and how they are made and opened.

In: where the warehouse is. Out: Paimon tables. `events` and `examples` are append tables, divided by day. `user_features` and
`video_features` have one row an id, of which several streams fill the columns: each stream owns a `ColumnGroup`, whose time
says which row of two counts. `user_features_log` and `video_features_log` hold every change with its event time: what an
impression saw then is looked up there, since Paimon's time travel goes by commits, and ends where snapshots expire.

One engine writes a table: either the commands of `launch.lake`, or Flink (`launch/flink`). Both make tables of these columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from monolith_jax.stream.events import ACTION, IMPRESSION

if TYPE_CHECKING:
    pass  # pyright: ignore[reportMissingImports]

Subject = Literal["user", "video"]
"""Whose features: a table and a log of changes each."""

DATABASE = "lake"
DAY = "day"
"""Column that append tables are divided by: the day of the event in UTC, `2026-11-28`."""


@dataclass(frozen=True)
class ColumnGroup:
    """Columns of a features table that one stream fills, all at once."""

    name: str
    columns: tuple[tuple[str, pa.DataType], ...]
    fresh_ms: int = 0
    """So long a row counts; later, its numbers are 0, since a window in which nothing happens tells nothing. 0: for good."""
    known_ms: int = 0
    """So long after its time a row begins to count: what the way to the server takes. Nobody is told of it before, not even who
    reads history, where it is there at once: else a model would be trained with what no server had known."""

    @property
    def time_column(self) -> str:
        """Column with the event time from which on the values hold, Unix ms; of two rows the later one counts."""
        return f"{self.name}_ms"


@dataclass(frozen=True)
class Window:
    """A sliding window over which events of a video are counted."""

    name: str
    size_ms: int
    slide_ms: int
    """It ends at each multiple of this."""


WINDOWS = (
    Window("5m", 300_000, 60_000),
    Window("1h", 3_600_000, 300_000),
    Window("1d", 86_400_000, 3_600_000),
)
COUNTED = ("views", "completes", "likes")
"""What is counted: impressions, plays of at least `stream.events.COMPLETE_RATIO` of the video, likes."""

GROUPS: dict[Subject, tuple[ColumnGroup, ...]] = {
    "user": (
        ColumnGroup("profile", (("country", pa.string()), ("language", pa.string()), ("age", pa.int64()))),
        ColumnGroup(
            "activity",
            (
                ("last_video_id", pa.int64()),
                ("last_author_id", pa.int64()),
                ("last_duration_ms", pa.int64()),
                ("last_tag_id", pa.list_(pa.int64())),
            ),
            known_ms=2_000,
        ),
    ),
    "video": (
        ColumnGroup(
            "profile",
            (
                ("author_id", pa.int64()),
                ("sound_id", pa.int64()),
                ("tag_id", pa.list_(pa.int64())),
                ("duration_ms", pa.int64()),
                ("quality", pa.float64()),
            ),
        ),
        *(
            ColumnGroup(
                f"counts_{one.name}",
                tuple((f"{name}_{one.name}", pa.int64()) for name in COUNTED),
                fresh_ms=one.slide_ms,
                known_ms=15_000,
            )
            for one in WINDOWS
        ),
    ),
}
"""Whatever is known of users and of videos. A profile that was deleted is one whose columns are null."""


def key_of(subject: Subject) -> str:
    """Returns the column of ids."""
    return f"{subject}_id"


def features_schema(subject: Subject) -> pa.Schema:
    """Returns the columns of `user_features` or `video_features`: the id, then each group's time and values."""
    fields = [pa.field(key_of(subject), pa.int64(), nullable=False)]
    for group in GROUPS[subject]:
        fields += [pa.field(group.time_column, pa.int64()), *(pa.field(*column) for column in group.columns)]
    return pa.schema(fields)


def features_log_schema(subject: Subject) -> pa.Schema:
    """Returns the columns of a log of changes: those of the features, of which one group is set, behind time and day."""
    fields = [pa.field("event_time_ms", pa.int64(), nullable=False), pa.field(DAY, pa.string(), nullable=False)]
    return pa.schema([*fields, *features_schema(subject)])


def events_schema() -> pa.Schema:
    """Returns the columns of `events`: those of impressions and actions, and where in the log each stood."""
    where = [
        pa.field(DAY, pa.string(), nullable=False),
        pa.field("topic", pa.string(), nullable=False),
        pa.field("log_partition", pa.int32(), nullable=False),
        pa.field("log_offset", pa.int64(), nullable=False),
    ]
    names = {*IMPRESSION.names}
    events = [*IMPRESSION, *(field for field in ACTION if field.name not in names)]
    required = ("event_time_ms", "user_id", "video_id")
    return pa.schema([*where, *(field.with_nullable(field.name not in required) for field in events)])
