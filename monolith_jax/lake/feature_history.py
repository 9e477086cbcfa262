"""What users and videos were like at the moment of each example of history.

In: examples in the order of the stream, and the logs of changes of features. Out: the examples with the columns of features
that are asked for, as of their times. The logs are read along with the examples, up to the last one's time; of what is before
the first one only the features are held that it leads to. A position names the snapshots of the logs that the run began with,
and how far they were read, and what was known there is read again.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from monolith_jax.lake.agreement import Agreement, Mismatch
from monolith_jax.lake.as_of import as_of_join, take_in
from monolith_jax.lake.changelog import Moment, table_at
from monolith_jax.lake.tables import DAY, GROUPS, Subject, features_log_schema
from monolith_jax.lake.versions import FeatureState
from monolith_jax.lake.warehouse import WarehouseConfig, open_table

VERSIONS = 4
"""Versions that are held of each row, for examples that come late."""
_MOST_ROWS = 1 << 20
"""Changes that are held at a time."""
_PIECE_ROWS = 1 << 16
"""Changes that are taken in at a time."""
_FAR_MS = 3_600_000
"""What is so far before the examples is not held to be walked through with them."""


class _Walk:
    """The walk through one subject's log."""

    def __init__(self, config: WarehouseConfig, subject: Subject, max_rows: int, position: Mapping[str, Any], tag: str) -> None:
        self.subject: Subject = subject
        self.table = open_table(config, f"{subject}_features_log")
        self.moment = Moment(*position["moment"]) if position else _moment_of(self.table, tag)
        self.state, self.agreement = FeatureState(subject, max_rows, VERSIONS), Agreement(subject)
        self.rest: list[pa.RecordBatch] = []
        """Changes that were read and are not before the last example."""
        self.until_ms: int | None = None
        """Changes of times before this one were read: the time of the last example."""
        if position and position["until_ms"] is not None:
            self._skip(int(position["until_ms"]))

    @property
    def position(self) -> dict[str, Any]:
        return {"moment": list(self.moment), "until_ms": self.until_ms}

    def _read(self, end_ms: int) -> Iterator[pa.RecordBatch]:
        """Yields the changes from where the walk is up to a time, day by day, in the order in which they were written."""
        if self.until_ms is not None and end_ms <= self.until_ms:
            return
        table = table_at(self.table, self.moment)
        if not self.moment.snapshot:
            return
        predicates = table.new_read_builder().new_predicate_builder()
        where = predicates.less_than("event_time_ms", end_ms)
        if self.until_ms is not None:
            where = predicates.and_predicates([predicates.greater_or_equal("event_time_ms", self.until_ms), where])
        builder = table.new_read_builder().with_filter(where)
        try:
            splits = builder.new_scan().plan().splits()
            splits = sorted(splits, key=lambda one: one.partition.to_dict()[DAY])
            readers = (builder.new_read().to_arrow_batch_reader([split]) for split in splits)
            yield from _pieces(itertools.chain.from_iterable(readers))
        except Exception:
            table_at(self.table, self.moment)  # Says so if it has expired meanwhile.
            raise

    def _skip(self, until_ms: int) -> None:
        """Goes on to a time without an example before it: what changed until then is taken in as it is read."""
        rest = []
        for batch in itertools.chain(self.rest, self._read(until_ms)):
            if (later := take_in(batch, self.state, until_ms)).num_rows:
                rest.append(later)
            self._check()
        self.rest = rest
        self.until_ms = until_ms if self.until_ms is None else max(self.until_ms, until_ms)

    def _few(self, end_ms: int) -> list[pa.RecordBatch] | None:
        """Returns the changes up to a time; None: they are too many to be held."""
        found, number = [], 0
        for batch in self._read(end_ms):
            found.append(batch)
            number += batch.num_rows
            if number > _MOST_ROWS:
                return None
        return found

    def _check(self) -> None:
        counts = self.state.metrics()
        if counts["evicted"] or counts["refused"]:
            raise ValueError(
                f"there are changes of more than {self.state.max_rows} {self.subject}s, of which features are held: which of "
                "them an example gets would depend on where a run was interrupted; raise LakeConfig.joined_rows"
            )

    def join(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        times = examples.column("event_time_ms").fill_null(0).to_numpy(zero_copy_only=False)
        order = np.argsort(times, kind="stable")
        joined = pa.Table.from_batches(self._joined(examples.take(pa.array(order)), times[order])).combine_chunks()
        found = joined.take(pa.array(np.argsort(order))).combine_chunks().to_batches()[0]
        # What a server logged of these features is compared before it is replaced.
        self.agreement.compare(examples, found)
        return found

    def _joined(self, examples: pa.RecordBatch, times: np.ndarray) -> list[pa.RecordBatch]:
        """Returns examples, which are in the order of time, with features: in pieces, as few as changes can be held for."""
        if self.until_ms is None or times[0] - self.until_ms > _FAR_MS:
            self._skip(int(times[0]))
        found = self._few(int(times[-1]))
        if found is None and times.size > 1:
            half = times.size // 2
            return self._joined(examples.slice(0, half), times[:half]) + self._joined(examples.slice(half), times[half:])
        if found is None:
            self._skip(int(times[0]))
        changes = pa.Table.from_batches([*self.rest, *(found or [])], features_log_schema(self.subject)).combine_chunks()
        batches = changes.to_batches()
        joined = as_of_join(examples, batches[0] if batches else _no_changes(self.subject), self.state)
        self._check()
        self.rest = [joined.rest]
        self.until_ms = int(times[-1]) if self.until_ms is None else max(self.until_ms, int(times[-1]))
        return [joined.examples]


def _pieces(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yields small batches together."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(one.num_rows for one in waiting) >= _PIECE_ROWS:
            yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()
            waiting = []
    if waiting:
        yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()


def _moment_of(table: Any, tag: str) -> Moment:
    """Returns the moment of a tag, where a table has it; else now."""
    if tag and (found := table.tag_manager().get(tag)) is not None:
        return Moment(found.id, tag)
    newest = table.snapshot_manager().get_latest_snapshot()
    return Moment(newest.id if newest else 0)


def _no_changes(subject: Subject) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], features_log_schema(subject))


class FeatureHistory:
    """The walk through the logs of both subjects, as far as their columns are asked for."""

    def __init__(
        self,
        config: WarehouseConfig,
        columns: Sequence[str],
        max_rows: int,
        position: Mapping[str, Any] | None = None,
        tag: str = "",
    ) -> None:
        """Opens the logs.

        Args:
            config: The warehouse.
            columns: Which are wanted: `user_country`, `video_views_1h`, `video_profile_ms`, ...
            max_rows: Users, and videos, of which features are held: as many as there are changes of, or more.
            position: Where an earlier walk was.
            tag: Logs that have this tag are read as of it, so that they can be read again for as long as it is there; others,
                and all where there is no tag, as they are now. A position knows better.

        Raises:
            ValueError: There is no such column or table, there are changes of more than `max_rows`, or what an earlier walk
                read has expired.
        """
        known: dict[str, Subject] = {name: subject for subject in GROUPS for name in FeatureState(subject, 1).columns}
        if unknown := sorted({*columns} - {*known}):
            raise ValueError(f"LakeConfig.joined: there is no feature {', '.join(unknown)}; there are {', '.join(known)}")
        self._columns = tuple(columns)
        subjects: list[Subject] = list(dict.fromkeys(known[name] for name in columns))
        self._walks = [_Walk(config, one, max_rows, (position or {}).get(one, {}), tag) for one in subjects]

    @property
    def position(self) -> dict[str, Any]:
        """Where the walk is, JSON-able."""
        return {walk.subject: walk.position for walk in self._walks}

    def join(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        """Returns examples with the columns that are wanted, as of their times; those of these names are replaced.

        Raises:
            ValueError: There are changes of more than `max_rows`, or the logs as they were have expired.
        """
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
