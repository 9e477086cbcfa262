"""What users and videos were like at the moment of each example of history.

In: examples in the order of the stream, and the logs of changes of features. Out: the examples with the columns of features
that are asked for, as of their times. The logs are read along with the examples, up to the last one's time; a position names
the snapshots of the logs that the run began with, and how far they were read, and what was known there is read again.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.lake.agreement import Agreement, Mismatch
from monolith_jax.lake.as_of import as_of_join
from monolith_jax.lake.changelog import Moment, read_at
from monolith_jax.lake.tables import GROUPS, Subject, features_log_schema, key_of
from monolith_jax.lake.versions import FeatureState
from monolith_jax.lake.warehouse import WarehouseConfig, open_table

VERSIONS = 4
"""Versions that are held of each row, for examples that come late."""
_REBUILD_ROWS = 1 << 20


class _Walk:
    """The walk through one subject's log."""

    def __init__(self, config: WarehouseConfig, subject: Subject, max_rows: int, position: Mapping[str, Any]) -> None:
        self.subject: Subject = subject
        self.table = open_table(config, f"{subject}_features_log")
        newest = self.table.snapshot_manager().get_latest_snapshot()
        self.moment = Moment(position["snapshot"] if position else newest.id if newest else 0)
        self.state, self.agreement = FeatureState(subject, max_rows, VERSIONS), Agreement(subject)
        self.rest = features_log_schema(subject).empty_table().to_batches(1)
        self.until_ms: int | None = None
        if position and position["until_ms"] is not None:
            self.until_ms = int(position["until_ms"])
            # As far as the walk had come: up to an example of that time, whoever's.
            nobody = pa.record_batch({key_of(subject): [0], "event_time_ms": [position["seen_ms"]]})
            known = self.read(None, self.until_ms).sort_by("event_time_ms")
            for batch in known.to_batches(_REBUILD_ROWS):
                self.rest.append(as_of_join(nobody, batch, self.state).rest)
        self.seen_ms = position["seen_ms"] if position else None

    @property
    def position(self) -> dict[str, Any]:
        return {"snapshot": self.moment.snapshot, "until_ms": self.until_ms, "seen_ms": self.seen_ms}

    def read(self, begin_ms: int | None, end_ms: int) -> pa.Table:
        """Returns the changes of a stretch of time."""
        predicates = self.table.new_read_builder().new_predicate_builder()
        where = predicates.less_than("event_time_ms", end_ms)
        if begin_ms is not None:
            where = predicates.and_predicates([predicates.greater_or_equal("event_time_ms", begin_ms), where])
        return read_at(self.table, self.moment, (), where)

    def join(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        last_ms: int = pc.max(examples.column("event_time_ms")).as_py()  # pyright: ignore[reportAttributeAccessIssue]
        found = list(self.rest)
        if self.until_ms is None or last_ms > self.until_ms:
            found += self.read(self.until_ms, last_ms).to_batches()
            self.until_ms = last_ms
        changes = pa.Table.from_batches(found, features_log_schema(self.subject)).combine_chunks().to_batches()
        joined = as_of_join(examples, changes[0] if changes else _no_changes(self.subject), self.state)
        self.rest = [joined.rest]
        # What a server logged of these features is compared before it is replaced.
        self.agreement.compare(examples, joined.examples)
        self.seen_ms = last_ms if self.seen_ms is None else max(self.seen_ms, last_ms)
        return joined.examples


def _no_changes(subject: Subject) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], features_log_schema(subject))


class FeatureHistory:
    """The walk through the logs of both subjects, as far as their columns are asked for."""

    def __init__(
        self, config: WarehouseConfig, columns: Sequence[str], max_rows: int, position: Mapping[str, Any] | None = None
    ) -> None:
        """Opens the logs.

        Args:
            config: The warehouse.
            columns: Which are wanted: `user_country`, `video_views_1h`, `video_profile_ms`, ...
            max_rows: Users, and videos, of which features are held at a time: those that changed last.
            position: Where an earlier walk was.

        Raises:
            ValueError: There is no such column or table.
        """
        known: dict[str, Subject] = {name: subject for subject in GROUPS for name in FeatureState(subject, 1).columns}
        if unknown := sorted({*columns} - {*known}):
            raise ValueError(f"LakeConfig.joined: there is no feature {', '.join(unknown)}; there are {', '.join(known)}")
        self._columns = tuple(columns)
        subjects: list[Subject] = list(dict.fromkeys(known[name] for name in columns))
        self._walks = [_Walk(config, one, max_rows, (position or {}).get(one, {})) for one in subjects]

    @property
    def position(self) -> dict[str, Any]:
        """Where the walk is, JSON-able."""
        return {walk.subject: walk.position for walk in self._walks}

    def join(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        """Returns examples with the columns that are wanted, as of their times; those of these names are replaced."""
        if not examples.num_rows:
            return examples
        names = [name for name in examples.schema.names if name not in self._columns]
        for walk in self._walks:
            examples = walk.join(examples)
        return examples.select([*names, *self._columns])

    @property
    def told(self) -> dict[str, float]:
        """How what was logged agrees with what was joined, since this walk was opened; nothing if none was logged."""
        found = {name: count for walk in self._walks for name, count in walk.agreement.metrics().items()}
        return {f"agreement_{name}": float(count) for name, count in found.items()} if any(found.values()) else {}

    @property
    def mismatches(self) -> list[Mismatch]:
        """The first features that a server had otherwise."""
        return [one for walk in self._walks for one in walk.agreement.mismatches]

    def metrics(self) -> dict[str, int]:
        """Returns what the walks have counted."""
        return {f"{walk.subject}/{name}": count for walk in self._walks for name, count in walk.state.metrics().items()}
