"""Training from the lake: examples as they were at some moment, and then the log from where they end.

In: the table `examples` as of a snapshot, a tag or a time; if asked, the log that it came from. Out: a `Source`: first the
examples of the table in the order of the stream, then those of the log from the exact position behind the last one. Only the
columns and the files that are needed are read. A position names the snapshot that the run began with, so a run that goes on
reads what it would have read.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from monolith_jax.lake.changelog import Moment, read_at, table_at
from monolith_jax.lake.commits import kept_commits, told_of
from monolith_jax.lake.cut_files import hand_over
from monolith_jax.lake.examples import WRITER
from monolith_jax.lake.feature_history import FeatureHistory
from monolith_jax.lake.jobs import LakeJobsConfig
from monolith_jax.lake.warehouse import EXAMPLES_FIRST, WarehouseConfig, open_table
from monolith_jax.stream.log_source import LogConfig, LogSource
from monolith_jax.types import Chunk, Position

CHUNK_ROWS = 4096
READ_ROWS = 1 << 17
"""Examples that are read from the table at a time."""


@dataclass(frozen=True, kw_only=True)
class LakeConfig:
    """Examples of a lake, and the log behind them."""

    warehouse: WarehouseConfig
    """Where the tables are."""
    as_of: str = ""
    """How far history goes: the number of a snapshot of `examples`, a tag of it, or a time in UTC such as
    `2026-11-28T06:00:00`, by when it was written; "": all that is there when the run begins."""
    columns: tuple[str, ...] = ()
    """Columns of examples that are read; (): all. Others are not even read from the disk."""
    begin: str = ""
    """Examples of events before this time in UTC are left out; "": none are."""
    joined: tuple[str, ...] = ()
    """Columns of features that examples are joined with, as they were at the moment of the impression: `user_country`,
    `video_views_1h`, ... In history only: in a log, impressions are logged with the features that they were shown by."""
    joined_rows: int = 1_000_000
    """Users, and videos, whose features are held for that: all that change, or it is refused. About half a kilobyte each."""
    log: LogConfig | None = None
    """The log that the examples are of; None: it is not to be read."""
    follow: bool = True
    """Whether the stream goes on with the log when history is read, at the very event where that ends. A run that was of
    history alone may go on with it later."""

    jobs: LakeJobsConfig = field(default_factory=LakeJobsConfig)
    """How `launch.lake` writes the tables; training does not look at it."""

    def __post_init__(self) -> None:
        """Raises ValueError if the fields do not go together."""
        if self.begin:
            _time_ms(self.begin, "begin")
        if self.joined and self.live:
            raise ValueError(
                "LakeConfig.joined is for history alone: online, an impression comes with the features that it was shown by, "
                "which the server logs (ServingConfig.features). Set LakeConfig.follow to False, or leave joined out"
            )

    @property
    def live(self) -> LogConfig | None:
        """The log that the stream goes on with; None: it ends with history."""
        return self.log if self.follow else None


def _time_ms(text: str, field: str) -> int:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"LakeConfig.{field} is {text!r}; write a time in UTC such as 2026-11-28T06:00:00") from None
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)


def tag_names(table: Any) -> list[str]:
    """Returns the tags of a table."""
    return [one if isinstance(one, str) else one.tag_name for one in table.list_tags() or []]


def moment_of(table: Any, as_of: str) -> Moment:
    """Returns the moment that `LakeConfig.as_of` names.

    Raises:
        ValueError: There is no such snapshot or tag, or none as old.
    """
    manager = table.snapshot_manager()
    if not as_of:
        newest = manager.get_latest_snapshot()
        return Moment(newest.id if newest else 0)
    if as_of.isdigit():
        if manager.get_snapshot_by_id(int(as_of)) is None:
            raise ValueError(f"{table.identifier} has no snapshot {as_of}: it has expired or was never there")
        return Moment(int(as_of))
    if (tag := table.tag_manager().get(as_of)) is not None:
        return Moment(tag.id, as_of)
    try:
        time_ms = _time_ms(as_of, "as_of")
    except ValueError as error:
        names = ", ".join(tag_names(table)) or "none"
        raise ValueError(f"{error}, the number of a snapshot, or a tag; tags of {table.identifier}: {names}") from None
    found = manager.earlier_or_equal_time_mills(time_ms)
    if found is None:
        raise ValueError(f"{table.identifier} has no snapshot that is as old as {as_of}; the oldest ones have expired")
    return Moment(found.id)


def told_at(table: Any, moment: Moment) -> dict[str, Any]:
    """Returns what the writer of examples had said at a moment, {} before its first epoch.

    Raises:
        ValueError: The snapshot that holds it has expired.
    """
    manager = table.snapshot_manager()
    found = table.tag_manager().get(moment.tag) if moment.tag else None
    for number in range(moment.snapshot, 0, -1):
        found = found or manager.get_snapshot_by_id(number)
        if found is None:
            kept = (kept_commits(table) or {}).get(WRITER)
            if kept is not None and kept.snapshot <= number:
                return dict(kept.told)
            raise ValueError(
                f"{table.identifier} does not tell any more where its stream was at snapshot {moment.snapshot}: snapshot "
                f"{number} has expired; take a newer one"
            )
        # A snapshot of tidying tells what was told before it.
        if told := told_of(found):
            return told
        found = None
    return {}


@dataclass
class _Walk:
    """Where the reading of one partition of the stream is."""

    rows: int
    """Examples before this one were read."""
    time_ms: int
    """Event time of the last one."""
    read: list[pa.RecordBatch] = field(default_factory=list)
    """What was read from the table and not given out."""
    features: FeatureHistory | None = None
    before: dict[str, Any] = field(default_factory=dict)
    """Where the features were before what was read: who goes on from here reads and joins it again."""

    def fill(self, table: pa.Table) -> None:
        """Takes over what was read from the table."""
        if self.features is not None:
            self.before = self.features.position
            joined = self.features.join(_batch(table))
            table = pa.Table.from_batches([joined])
        self.read = table.combine_chunks().to_batches(CHUNK_ROWS)

    def next(self, end: int) -> pa.RecordBatch:
        """Returns the next examples, and goes on behind them; `end`: how many the partition has."""
        if not self.read:  # All that there was has been left out.
            self.rows = min(_end_of_read(self.rows), end)
            return pa.RecordBatch.from_pylist([])
        examples = self.read.pop(0)
        last = examples.column("stream_row")[-1].as_py()
        self.rows = last + 1 if self.read else min(_end_of_read(last), end)
        self.time_ms = examples.column("event_time_ms")[-1].as_py()
        return examples.drop_columns([one.name for one in EXAMPLES_FIRST])


@dataclass(frozen=True)
class LakeSource:
    """A `Source` over one partition of a run."""

    config: LakeConfig
    folder: Path
    """Where the cut log of the stream behind history is."""
    batch_rows: int
    """As `LogSource` has it."""
    index: int = 0
    """Which partition of the run."""
    number: int = 1
    """How many there are."""
    max_lag_s: float = float("inf")
    """As `LogSource` has it."""

    @property
    def num_examples(self) -> int | None:
        """Examples of history, where nothing is left out and no log follows."""
        if self.config.live or self.config.begin:
            return None
        table = open_table(self.config.warehouse, "examples")
        parts = told_at(table, moment_of(table, self.config.as_of)).get("parts", {})
        return sum(part["rows"] for part in parts.values())

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from `position` on.

        Raises:
            ValueError: There is no such table, snapshot, column or log.
        """
        at = dict(position)
        if "log" not in at:
            table = open_table(self.config.warehouse, "examples")
            moment = Moment(*at["moment"]) if "moment" in at else moment_of(table, self.config.as_of)
            parts = self._parts(told_at(table, moment))
            # Before anything is learned: whoever cannot go on is to know now.
            behind = self._hand_over(table, parts) if self.config.live else {}
            yield from self._history(table, moment, parts, at)
            if self.config.live is None:
                return
            at = {"log": behind}
        assert self.config.live is not None
        log = LogSource(self.config.live, self.folder, self.batch_rows, self.index, self.number, self.max_lag_s)
        for chunk in log.read(at["log"]):
            yield _placed(chunk, {"log": dict(chunk.position)})

    def _hand_over(self, table: Any, parts: Mapping[int, Mapping[str, Any]]) -> Position:
        """Returns where the log goes on behind history."""
        if len(parts) > 1:
            raise ValueError(
                f"the lake's examples are of {len(parts) * self.number} partitions of the stream, and this run has "
                f"{self.number}: to go on from the log, TrainConfig.partitions must be as many as launch.lake examples had"
            )
        for part, told in parts.items():
            return hand_over(table, part, told, self.folder, again=True)
        return {}

    def _parts(self, told: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
        """Returns the partitions of the stream that are this partition of the run's, and what the writer said of each."""
        parts = {int(name): one for name, one in told.get("parts", {}).items()}
        if len(parts) % self.number:
            raise ValueError(
                f"the lake's examples are of {len(parts)} partitions of the stream, which {self.number} of the run cannot "
                "share evenly; set TrainConfig.partitions to a divisor"
            )
        return {part: parts[part] for part in sorted(parts) if part % self.number == self.index}

    def _history(
        self, table: Any, moment: Moment, parts: Mapping[int, Mapping[str, Any]], at: Mapping[str, Any]
    ) -> Iterator[Chunk]:
        """Yields the examples of a moment; of several partitions always from the one that is behind in event time."""
        walks = {
            part: _Walk(rows=at.get("rows", {}).get(str(part), 0), time_ms=at.get("times", {}).get(str(part), 0))
            for part in parts
        }
        joined, features = self.config.joined, at.get("features", {})
        for part, walk in walks.items():
            if joined:
                place = features.get(str(part))
                tag = moment.tag
                walk.features = FeatureHistory(self.config.warehouse, joined, self.config.joined_rows, place, tag)
                walk.before = walk.features.position
        while waiting := [part for part in parts if walks[part].rows < parts[part]["rows"]]:
            part = min(waiting, key=lambda one: (walks[one].time_ms, one))
            walk = walks[part]
            if not walk.read:
                walk.fill(self._read(table, moment, part, walk.rows))
            examples = walk.next(parts[part]["rows"])
            place = {
                "moment": list(moment),
                "rows": {str(one): of.rows for one, of in walks.items()},
                "times": {str(one): of.time_ms for one, of in walks.items()},
            }
            if joined:
                place["features"] = {str(one): of.before for one, of in walks.items()}
            yield Chunk(examples, (), place, told=_told(walks.values()))

    def _read(self, table: Any, moment: Moment, part: int, begin: int) -> pa.Table:
        """Returns the next examples of a partition, in order."""
        predicates = table.new_read_builder().new_predicate_builder()
        where = [predicates.equal("part", part), predicates.between("stream_row", begin, _end_of_read(begin) - 1)]
        if self.config.begin:
            where.append(predicates.greater_or_equal("event_time_ms", _time_ms(self.config.begin, "begin")))
        there, names = table_at(table, moment).field_names, []
        if self.config.columns:
            names = list(dict.fromkeys([*(one.name for one in EXAMPLES_FIRST), "event_time_ms", *self.config.columns]))
            if unknown := sorted({*names} - {*there}):
                raise ValueError(
                    f"LakeConfig.columns: `examples` has no column {', '.join(unknown)}; there: {', '.join(there)}"
                )
        found = read_at(table, moment, names, predicates.and_predicates(where))
        order = np.argsort(found.column("stream_row").to_numpy(), kind="stable")
        return found.take(pa.array(order)) if (np.diff(order) != 1).any() else found


def _told(walks: Iterable[_Walk]) -> dict[str, float]:
    """Returns how what was logged agrees with what was joined, of all walks."""
    of_walks = [walk.features.told for walk in walks if walk.features is not None]
    return {name: sum(one.get(name, 0.0) for one in of_walks) for one in of_walks for name in one}


def _end_of_read(begin: int) -> int:
    """Returns where a read ends: on a grid, so that it does not depend on where it began."""
    return (begin // READ_ROWS + 1) * READ_ROWS


def _batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)


def _placed(chunk: Chunk, position: Position) -> Chunk:
    return Chunk(chunk.examples, chunk.rejected, position, chunk.epoch, chunk.ends_batch, chunk.told)
