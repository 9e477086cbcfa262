"""Follows the profiles of users and videos in PostgreSQL, without Flink: what they are now, then each change of them.

In: a database with a table of profiles each (`PostgresConfig`), `wal_level=logical`, and the position up to which changes are
in the lake. Out: `ProfileChanges`: rows for the group `profile` of `user_features` and `video_features`, and the position after
them. The server keeps all changes (a replication slot) until they are confirmed, which is done after the lake has committed
them: one who is killed reads some changes again, which alters nothing, since they have the time of their commit.

First come the rows that are there, with the time `snapshot_ms`: those of the very moment from which on the slot tells changes.
They come again, with the time of then, when the slot is ahead of the lake. That is so when the lake is an older one, restored;
or when the server was told of changes of other tables and the lake was killed before it noted that. What was changed in between
is made up for so, but for its history, and for rows that were deleted: those stay.
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from monolith_jax.lake.jobs import PostgresConfig
from monolith_jax.lake.pgoutput import UNCHANGED, Decoder, ProfileRows, ProfileTable, Row
from monolith_jax.lake.postgres_checks import Slot, connect, end_of, gap_behind, psycopg2, publish, slot_of, sql, table_of
from monolith_jax.lake.tables import Subject

LOGGER = logging.getLogger("monolith_jax.postgres")
LOGGER.addHandler(logging.NullHandler())
START = 0
"""Position before anything: the rows that are there come first."""
RETRY_S = 1.0
"""Time between two tries to connect."""
_WAIT_S = 0.05
# Not there, starting, ending, out of connections; a slot that the server thinks is still read by one who was killed.
_PASSING = ("08", "57P", "53")
_IN_USE = "55006"


@dataclass(frozen=True)
class ProfileChanges:
    """Whole transactions, in the order of their commits."""

    position: int
    """Up to here (LSN) everything is in these changes and those before, and nothing of what is behind. `START`: not all rows of
    the start have come, or not all that are read again."""
    rows: dict[Subject, pa.RecordBatch] = field(default_factory=dict)
    """Of each subject that has any, columns as in `profile_schema`."""

    @property
    def num_rows(self) -> int:
        """Rows of all subjects."""
        return sum(batch.num_rows for batch in self.rows.values())


class ProfileReader:
    """Reads the changes. It connects anew by itself. Not thread safe: one caller at a time."""

    def __init__(self, config: PostgresConfig, position: int = START) -> None:
        """Starts behind a position; connects at the first `poll`.

        Args:
            config: Where profiles are.
            position: What the lake has committed: everything up to there is in it.

        Raises:
            ValueError: The config names no table, or max_rows is below 1.
        """
        if config.max_rows < 1:
            raise ValueError(f"PostgresConfig.max_rows must be at least 1, got {config.max_rows}")
        if not config.user_table and not config.video_table:
            raise ValueError("PostgresConfig names neither a user_table nor a video_table")
        self._config = config
        self._position, self._snapshot_ms = position, config.snapshot_ms
        self._snapshot: Generator[ProfileChanges] | None = None
        self._stream: Any = None
        self._query: Any = None
        self._decoder: Decoder | None = None
        self._set_aside = 0
        self._was_there = False
        self._retry_at = 0.0
        self._told_at: Any = None
        self.is_away = False
        """Whether there is no connection, and was none at the last try."""
        self.answered = START
        """Up to here psycopg2 may have confirmed by itself: what other tables wrote, when the server asked."""
        self.num_reconnects = 0
        """Times that a connection was lost, or not to be had."""
        self.num_looked_up = 0
        """Changes whose unchanged long values had to be looked up, so that they have those of now: made when the table's
        replica identity was not FULL, which is refused at the start."""

    @property
    def num_set_aside(self) -> int:
        """Rows so far that had no key."""
        return self._set_aside + (self._decoder.num_set_aside if self._decoder else 0)

    def poll(self, timeout_s: float = 0.0) -> ProfileChanges:
        """Returns what has changed: what is there at once, else what comes first in so many seconds.

        While the server is away, or a transaction has to end before all rows can be read, there are no changes. The position
        may advance without any row, and go back to `START`: then all rows come again.

        Raises:
            ValueError: The server's tables, slot or publication are not as they have to be, or it does not let us in.
        """
        until = time.monotonic() + timeout_s
        while True:
            if (wait := self._retry_at - time.monotonic()) <= 0:
                try:
                    changes = self._poll(until)
                    self.is_away = False
                    return changes
                except (psycopg2.Error, OSError) as error:
                    self._lost(error)
                except ValueError:
                    # It comes again at the next call, rather than that the message is passed over.
                    self.close()
                    raise
                wait = self._retry_at - time.monotonic()
            if (left := until - time.monotonic()) <= 0:
                return ProfileChanges(self._position)
            time.sleep(max(min(wait, left), 0.0))

    def end_now(self, timeout_s: float, stop: threading.Event) -> int:
        """Returns the position after all that the server has written by now; after `stop` was set, maybe `START`.

        Raises:
            OSError: In so many seconds it was not there.
            ValueError: It does not let us in.
        """
        until = time.monotonic() + timeout_s
        while not stop.is_set():
            try:
                with contextlib.closing(connect(self._config, strict=True)) as connection:
                    return end_of(connection)
            except psycopg2.Error as error:
                if time.monotonic() + RETRY_S > until:
                    raise OSError(f"PostgreSQL is not there: {str(error).strip()}") from error
            stop.wait(RETRY_S)
        return START

    def confirm(self, position: int) -> None:
        """Says that all up to a position is in the lake for good: the server need not keep it any longer."""
        if position == START or self._decoder is None:
            return
        try:
            self._stream.send_feedback(write_lsn=position, flush_lsn=position, apply_lsn=position, force=True)
            self._told_at = self._stream.feedback_timestamp
        except psycopg2.Error as error:
            self._lost(error)

    def close(self) -> None:
        """Ends the connections. The slot stays."""
        if self._decoder:
            self._set_aside += self._decoder.num_set_aside
        if self._snapshot is not None:
            self._snapshot.close()
        self._snapshot = self._decoder = None
        for one in (self._stream and self._stream.connection, self._query):
            if one is not None:
                with contextlib.suppress(psycopg2.Error):
                    one.close()
        self._stream = self._query = None

    def _poll(self, until: float) -> ProfileChanges:
        if self._query is None:
            self._connect()
        while self._snapshot is not None:
            changes = next(self._snapshot, None)
            if changes is None:
                self._snapshot = None
            elif changes.num_rows or changes.position != START or time.monotonic() >= until:
                return changes
        if self._decoder is None:
            self._start_stream()
        return self._read(until)

    def _lost(self, error: Exception) -> None:
        """Forgets a connection that was lost; what it had brought comes again.

        Raises:
            ValueError: It will not get better by itself.
        """
        self.close()
        code = getattr(error, "pgcode", None)
        if code is not None and code != _IN_USE and not code.startswith(_PASSING):
            raise ValueError(f"PostgreSQL refuses: {str(error).strip()}") from error
        self.num_reconnects += 1
        self._retry_at = time.monotonic() + RETRY_S
        if not self.is_away:
            LOGGER.warning("PostgreSQL: %s; connecting anew", str(error).strip())
        self.is_away = True

    def _connect(self) -> None:
        config, strict = self._config, not self._was_there
        self._query = connect(config, strict)
        self._query.autocommit = True
        self._tables = [table_of(self._query, config, subject) for subject in _subjects(config)]
        publish(self._query, config, self._tables)
        self._stream = connect(config, strict, replicating=True).cursor()
        self._was_there = True
        slot = slot_of(self._query, config.slot)
        if slot is not None and slot.plugin != "pgoutput":
            raise ValueError(f"replication slot {config.slot!r} is of plugin {slot.plugin}, not pgoutput: give another one")
        if self._position != START:
            if problem := gap_behind(slot, self._position):
                said = f"replication slot {config.slot!r}: {problem}"
                if not config.start_over:
                    raise ValueError(f"{said}; PostgresConfig.start_over reads all profiles again")
                self._reread(said)
            elif slot is not None and slot.confirmed > self._position:
                self._reread(
                    f"replication slot {config.slot!r}: changes up to {slot.confirmed} were confirmed, the lake has those "
                    f"up to {self._position}: it is an older one, or was killed while only other tables changed"
                )
        if self._position == START:
            self._snapshot = self._snapshot_rows(slot)

    def _reread(self, why: str) -> None:
        """Has all rows come again, with the time of then: later than whatever the lake has."""
        LOGGER.warning("%s; all profiles are read again; those that were deleted in between stay", why)
        self._position, self._snapshot_ms = START, -1

    def _snapshot_rows(self, slot: Slot | None) -> Generator[ProfileChanges]:
        """Yields what is in the tables, and last an empty one with the position of the slot; empty ones while it waits."""
        with self._query.cursor() as cursor:
            cursor.execute(
                "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000), txid_snapshot_xmax(txid_current_snapshot())"
            )
            now_ms, running = map(int, cursor.fetchone())
            if slot is not None and slot.lost:
                cursor.execute("SELECT pg_drop_replication_slot(%s)", (self._config.slot,))
                slot = None
            if slot is None:
                yield from self._make_slot()
                _, point, exported, _ = self._stream.fetchone()
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                cursor.execute("SET TRANSACTION SNAPSHOT %s", (exported,))
                position = _number_of(point)
            else:
                # One was killed before it had all. What has changed since is told by the slot again, deletions too. As when a
                # slot is made, those are waited for that run: they may have the time of their commit, and not be seen yet.
                while cursor.execute("SELECT txid_snapshot_xmin(txid_current_snapshot())") or cursor.fetchone()[0] < running:
                    time.sleep(_WAIT_S)
                    yield ProfileChanges(START)
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                position = slot.confirmed
            for table in self._tables:
                yield from self._rows_of(table, now_ms if self._snapshot_ms < 0 else self._snapshot_ms)
            cursor.execute("COMMIT")
        self._position = position
        yield ProfileChanges(position)

    def _make_slot(self) -> Iterator[ProfileChanges]:
        """Makes the slot, for which the server waits until those transactions have ended that are open now."""
        stream, failed = self._stream, []

        def make() -> None:
            try:
                stream.create_replication_slot(self._config.slot, output_plugin="pgoutput")
            except psycopg2.Error as error:
                failed.append(error)

        thread = threading.Thread(target=make, name="make slot", daemon=True)
        thread.start()
        try:
            while thread.join(_WAIT_S) or thread.is_alive():
                yield ProfileChanges(START)
        finally:
            # Closed meanwhile: a connection does not close while it waits. A slot that is not made whole is gone.
            while thread.is_alive():
                with contextlib.suppress(psycopg2.Error):
                    stream.connection.cancel()
                thread.join(_WAIT_S)
        if failed:
            raise failed[0]

    def _rows_of(self, table: ProfileTable, time_ms: int) -> Iterator[ProfileChanges]:
        names = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in table.columns)
        query = sql.SQL("SELECT {} FROM {}").format(names, sql.Identifier(table.schema, table.name))
        with self._query.cursor() as cursor:
            cursor.execute(sql.SQL("DECLARE profiles NO SCROLL CURSOR FOR {}").format(query))
            while True:
                cursor.execute("FETCH %s FROM profiles", (self._config.max_rows,))
                if not (found := cursor.fetchall()):
                    break
                rows = ProfileRows(table.subject)
                for row in found:
                    if row[0] is None:
                        self._set_aside += 1
                    else:
                        rows.add(row, time_ms)
                if rows.end():
                    yield ProfileChanges(START, {table.subject: rows.take()})
            cursor.execute("CLOSE profiles")

    def _start_stream(self) -> None:
        options = {"proto_version": "1", "publication_names": self._config.publication}
        self._stream.start_replication(self._config.slot, start_lsn=self._position, options=options)
        self._decoder = Decoder(self._tables, self._look_up, self._config.ignore_truncate)
        self._decoder.position = self._position
        self._told_at = self._stream.feedback_timestamp

    def _read(self, until: float) -> ProfileChanges:
        decoder, stream = self._decoder, self._stream
        assert decoder is not None
        while True:
            message = stream.read_message()
            if stream.feedback_timestamp != self._told_at:
                self._told_at, self.answered = stream.feedback_timestamp, stream.wal_end
            if message is not None:
                decoder.feed(message.payload)
                if decoder.is_open:
                    continue
                if decoder.num_rows >= self._config.max_rows:
                    break
                if decoder.num_rows or time.monotonic() < until:
                    continue
            elif not decoder.is_open:
                # All before this is told: what the server wrote since is of other tables. It need not be kept, either.
                decoder.position = max(decoder.position, stream.wal_end)
                if decoder.num_rows:
                    break
                self._position = max(self._position, decoder.position)
            if (left := until - time.monotonic()) <= 0:
                break
            select.select([stream], [], [], left)
        self._position = max(self._position, decoder.position)
        return ProfileChanges(self._position, decoder.take())

    def _look_up(self, table: ProfileTable, row: Row) -> Row:
        self.num_looked_up += 1
        names = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in table.columns)
        query = sql.SQL("SELECT {} FROM {} WHERE {} = %s")
        query = query.format(names, sql.Identifier(table.schema, table.name), sql.Identifier(table.columns[0]))
        with self._query.cursor() as cursor:
            cursor.execute(query, (int(row[0]),))
            now = cursor.fetchone() or [None] * len(row)
        return [there if value is UNCHANGED else value for value, there in zip(row, now, strict=True)]


def _subjects(config: PostgresConfig) -> Sequence[Subject]:
    named: tuple[tuple[Subject, str], ...] = (("user", config.user_table), ("video", config.video_table))
    return [subject for subject, table in named if table]


def _number_of(position: str) -> int:
    """Returns a position that is written as PostgreSQL does, `16/B374D848`."""
    high, low = position.split("/")
    return (int(high, 16) << 32) + int(low, 16)
