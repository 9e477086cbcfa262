"""The features of the lake as they change, for who holds them in memory.

In: a warehouse. Out: what both features tables hold, of the logs what is so new that older rows still count beside it, and then
every change, as the logs get it: a table tells of several changes that come at once only the newest, which is not the one that
counts at a moment between them. Rows are partial, as each stream wrote them, and may come twice: whoever takes them in merges
them by the times of their groups.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.lake.changelog import Changelog, Expired
from monolith_jax.lake.tables import GROUPS, ColumnGroup, Subject
from monolith_jax.lake.warehouse import WarehouseConfig, open_table

_ROWS = 1 << 16
_BEHIND_MS = 60_000
"""A table is at most so far behind its log, to which writers commit first."""
_MOST_BEHIND = 64
"""Snapshots of the log that are read again for that, at most."""

Changes = list[tuple[Subject, pa.RecordBatch]]


class FeatureChanges:
    """Follows the logs of features. For one thread."""

    def __init__(self, config: WarehouseConfig) -> None:
        """Opens the logs as they are now.

        Raises:
            ValueError: There are no such tables.
        """
        self._config = config
        self._followed: dict[Subject, Changelog] = {one: _log_of(config, one) for one in GROUPS}

    def whole(self) -> Iterator[Changes]:
        """Yields what the tables hold, and what of the logs may count beside it."""
        for subject in self._followed:
            for batch in self._held(subject):
                yield [(subject, batch)]

    def poll(self, subject: Subject) -> Changes:
        """Returns what has changed of a subject since the last call, or since its log was opened.

        Where that has expired before it was read, it is all that `whole` has of it.
        """
        try:
            rows = self._followed[subject].poll().rows
        except Expired:
            changelog = _log_of(self._config, subject)
            held: Changes = [(subject, batch) for batch in self._held(subject)]
            self._followed[subject] = changelog
            return held
        return [(subject, batch) for batch in rows.to_batches(_ROWS)]

    def _held(self, subject: Subject) -> Iterator[pa.RecordBatch]:
        """Yields the rows of the table, each the newest of its groups, and those of the log that count until these do."""
        table = Changelog(self._config, f"{subject}_features").whole()
        newest = {group.time_column: pc.max(table.column(group.time_column)).as_py() for group in GROUPS[subject]}
        yield from table.to_batches(_ROWS)
        del table
        for group in GROUPS[subject]:
            newest_ms = newest[group.time_column]
            if newest_ms is not None:
                yield from self._recent(subject, group, min(newest_ms, int(1000 * time.time())))

    def _recent(self, subject: Subject, group: ColumnGroup, newest_ms: int) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a group's log that may count when the newest ones do not yet, a minute more than those."""
        builder = open_table(self._config, f"{subject}_features_log").new_read_builder()
        predicates = builder.new_predicate_builder()
        since = predicates.greater_or_equal("event_time_ms", newest_ms - group.known_ms - group.fresh_ms - _BEHIND_MS)
        builder = builder.with_filter(predicates.and_predicates([since, predicates.is_not_null(group.time_column)]))
        # One after the other: of equal times the later-written row counts.
        for split in builder.new_scan().plan().splits():
            yield from builder.new_read().to_arrow_batch_reader([split])

    def follow(self, period_s: float = 0.1) -> Following:
        """Returns changes without end, looking for them every `period_s`, which costs some milliseconds."""
        return Following(self, period_s)


def _log_of(config: WarehouseConfig, subject: Subject) -> Changelog:
    """Returns a log from where on its table may not have it: from now on, and a little before."""
    name = f"{subject}_features_log"
    log = Changelog(config, name)
    manager, begin = log.table.snapshot_manager(), log.snapshot
    newest = manager.get_snapshot_by_id(begin) if begin else None
    while newest is not None and begin and log.snapshot - begin < _MOST_BEHIND:
        snapshot = manager.get_snapshot_by_id(begin)
        if snapshot is None or snapshot.time_millis < newest.time_millis - _BEHIND_MS:
            break
        begin -= 1
    return Changelog(config, name, begin)


class Following(Iterator[Changes]):
    """Changes without end. After an error it can be asked again, as a generator could not, and nothing is lost."""

    def __init__(self, changes: FeatureChanges, period_s: float) -> None:
        """Takes over changes."""
        self._changes, self._period_s = changes, period_s
        self._turns = itertools.cycle(GROUPS)

    def __next__(self) -> Changes:
        """Returns what has changed of the subject whose turn it is.

        Raises:
            OSError: The store cannot be read now.
        """
        subject = next(self._turns)
        time.sleep(self._period_s / len(GROUPS))
        return self._changes.poll(subject)
