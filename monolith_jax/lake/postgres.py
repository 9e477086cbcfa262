"""Follows the profiles of users and videos in PostgreSQL, without Flink: what they are now, then each change of them.

In: a database with a table of profiles each (`PostgresConfig`), `wal_level=logical`, and the position up to which changes are
in the lake. Out: `ProfileChanges`: rows for the group `profile` of `user_features` and `video_features`, and the position after
them. The server keeps all changes (a replication slot) until they are confirmed, which is done after the lake has committed
them: one who is killed reads some changes again, which alters nothing, since they have the time of their commit.

First come the rows that are there, with the time `snapshot_ms`: those of the very moment from which on the slot tells changes.
No module but this one imports psycopg2.
"""

from __future__ import annotations

import contextlib
import logging
import select
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from monolith_jax.lake.jobs import PostgresConfig
from monolith_jax.lake.pgoutput import UNCHANGED, Decoder, ProfileRows, ProfileTable, Row, identity_missing, profile_of
from monolith_jax.lake.tables import Subject, key_of

try:
    import psycopg2
    from psycopg2 import sql
    from psycopg2.extras import LogicalReplicationConnection
except ImportError as error:
    raise ImportError("changes of PostgreSQL need the extra `lake`: pip install 'monolith_jax[lake]'") from error

LOGGER = logging.getLogger("monolith_jax.postgres")
LOGGER.addHandler(logging.NullHandler())
START = 0
"""Position before anything: the rows that are there come first."""
_PAUSE_S = 0.1
# Not there, starting, ending, out of connections; a slot that the server thinks is still read by one who was killed.
_PASSING = ("08", "57P", "53")
_IN_USE = "55006"


@dataclass(frozen=True)
class ProfileChanges:
    """Whole transactions, in the order of their commits."""

    position: int
    """Up to here (LSN) everything is in these changes and those before, and nothing of what is behind. `START`: not all rows of
    the start have come."""
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
        self._position = position
        self._snapshot: Iterator[ProfileChanges] | None = None
        self._stream: Any = None
        self._query: Any = None
        self._decoder: Decoder | None = None
        self._set_aside = 0
        self.num_reconnects = 0
        """Times that a connection was lost, or not to be had."""
        self.num_looked_up = 0
        """Rows whose unchanged long values had to be looked up, since the table's replica identity is not FULL."""

    @property
    def num_set_aside(self) -> int:
        """Rows so far that had no key."""
        return self._set_aside + (self._decoder.num_set_aside if self._decoder else 0)

    def poll(self, timeout_s: float = 0.0) -> ProfileChanges:
        """Returns what has changed: what is there at once, else what comes first in so many seconds.

        While the server is away there are no changes. The position may advance without any row.

        Raises:
            ValueError: The server's tables, slot or publication are not as they have to be.
        """
        until = time.monotonic() + timeout_s
        while True:
            try:
                return self._poll(until)
            except (psycopg2.Error, OSError) as error:
                self._lost(error)
            except ValueError:
                # It comes again at the next call, rather than that the message is passed over.
                self.close()
                raise
            if (left := until - time.monotonic()) <= 0:
                return ProfileChanges(self._position)
            time.sleep(min(_PAUSE_S, left))

    def confirm(self, position: int) -> None:
        """Says that all up to a position is in the lake for good: the server need not keep it any longer."""
        if position == START or self._decoder is None:
            return
        try:
            self._stream.send_feedback(write_lsn=position, flush_lsn=position, apply_lsn=position, force=True)
        except psycopg2.Error as error:
            self._lost(error)

    def close(self) -> None:
        """Ends the connections. The slot stays."""
        if self._decoder:
            self._set_aside += self._decoder.num_set_aside
        self._snapshot = self._decoder = None
        for one in (self._stream and self._stream.connection, self._query):
            if one is not None:
                with contextlib.suppress(psycopg2.Error):
                    one.close()
        self._stream = self._query = None

    def _poll(self, until: float) -> ProfileChanges:
        if self._query is None:
            self._connect()
        if self._snapshot is not None:
            changes = next(self._snapshot, None)
            if changes is not None:
                return changes
            self._snapshot = None
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
        LOGGER.warning("PostgreSQL: %s; connecting anew", str(error).strip())

    def _connect(self) -> None:
        config = self._config
        # Whatever the database's encoding is: this is UTF-8.
        self._query = psycopg2.connect(config.dsn, client_encoding="UTF8")
        self._query.autocommit = True
        self._tables = [self._table(subject) for subject in _subjects(config)]
        self._publish()
        replication = psycopg2.connect(config.dsn, client_encoding="UTF8", connection_factory=LogicalReplicationConnection)
        self._stream = replication.cursor()
        slot = self._slot()
        if self._position != START or (slot is not None and slot[0] != "pgoutput"):
            if problem := _problem_of(slot, self._position):
                raise ValueError(f"replication slot {config.slot!r}: {problem}; start over at START to read all profiles again")
        else:
            self._snapshot = self._snapshot_rows(slot)

    def _table(self, subject: Subject) -> ProfileTable:
        """Finds the table and its columns.

        Raises:
            ValueError: It is not there, or not as it has to be.
        """
        name, renamed = (
            (self._config.user_table, self._config.user_columns)
            if subject == "user"
            else (self._config.video_table, self._config.video_columns)
        )
        names = [key_of(subject), *(column for column, _ in profile_of(subject).columns)]
        if unknown := sorted({column for column, _ in renamed} - {*names}):
            raise ValueError(f"PostgresConfig.{subject}_columns: no column of the features is {unknown}; there: {names}")
        with self._query.cursor() as cursor:
            cursor.execute(
                "SELECT c.oid, n.nspname, c.relname, c.relreplident FROM pg_class c "
                "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)",
                (name,),
            )
            if (found := cursor.fetchone()) is None:
                raise ValueError(f"PostgresConfig.{subject}_table: PostgreSQL has no table {name!r}")
            oid, schema, plain, identity = found
            cursor.execute(
                "SELECT a.attname, a.atttypid::bigint, EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid "
                "AND a.attnum = ANY (i.indkey) AND CASE %s WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident END) "
                "FROM pg_attribute a WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
                (identity, oid),
            )
            columns = cursor.fetchall()
        table = ProfileTable(subject, schema, plain, tuple({**{one: one for one in names}, **dict(renamed)}.values()))
        table.places({column: kind for column, kind, _ in columns})
        if identity != "f" and table.columns[0] not in {column for column, _, is_identity in columns if is_identity}:
            raise ValueError(identity_missing(table))
        return table

    def _publish(self) -> None:
        """Makes the publication unless it is there.

        Raises:
            ValueError: It is there, and lacks a table.
        """
        name = self._config.publication
        with self._query.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_publication WHERE pubname = %s", (name,))
            if not cursor.fetchone():
                tables = sql.SQL(", ").join(sql.Identifier(table.schema, table.name) for table in self._tables)
                statement = sql.SQL("CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true)")
                cursor.execute(statement.format(sql.Identifier(name), tables))
            cursor.execute("SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = %s", (name,))
            there = {*cursor.fetchall()}
        for table in self._tables:
            if (table.schema, table.name) not in there:
                raise ValueError(f"publication {name!r} does not hold table {table.schema}.{table.name}: ALTER PUBLICATION it")

    def _slot(self) -> tuple[Any, ...] | None:
        """Returns plugin, confirmed position, whether changes were lost, and the server's position; None: there is no slot."""
        with self._query.cursor() as cursor:
            cursor.execute(
                "SELECT plugin, confirmed_flush_lsn - '0/0'::pg_lsn, wal_status = 'lost', pg_current_wal_lsn() - '0/0'::pg_lsn "
                "FROM pg_replication_slots WHERE slot_name = %s",
                (self._config.slot,),
            )
            return cursor.fetchone()

    def _snapshot_rows(self, slot: tuple[Any, ...] | None) -> Iterator[ProfileChanges]:
        """Yields what is in the tables, and last an empty one with the position of the slot."""
        with self._query.cursor() as cursor:
            cursor.execute(
                "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000), txid_snapshot_xmax(txid_current_snapshot())"
            )
            now_ms, running = map(int, cursor.fetchone())
            if slot is not None and slot[2]:
                cursor.execute("SELECT pg_drop_replication_slot(%s)", (self._config.slot,))
                slot = None
            if slot is None:
                self._stream.create_replication_slot(self._config.slot, output_plugin="pgoutput")
                _, point, exported, _ = self._stream.fetchone()
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                cursor.execute("SET TRANSACTION SNAPSHOT %s", (exported,))
                position = _number_of(point)
            else:
                # One was killed before it had all. What has changed since is told by the slot again, deletions too. As when a
                # slot is made, those are waited for that run: they may have the time of their commit, and not be seen yet.
                while cursor.execute("SELECT txid_snapshot_xmin(txid_current_snapshot())") or cursor.fetchone()[0] < running:
                    time.sleep(0.01)
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                position = int(slot[1])
            for table in self._tables:
                yield from self._rows_of(table, now_ms if self._config.snapshot_ms < 0 else self._config.snapshot_ms)
            cursor.execute("COMMIT")
        self._position = position
        yield ProfileChanges(position)

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

    def _read(self, until: float) -> ProfileChanges:
        decoder, stream = self._decoder, self._stream
        assert decoder is not None
        while True:
            message = stream.read_message()
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


def _problem_of(slot: tuple[Any, ...] | None, position: int) -> str:
    """Returns why changes after a position cannot be read, '' if they can."""
    if slot is None:
        return "there is none any longer, and what has changed since is not known"
    plugin, confirmed, lost, written = slot
    if plugin != "pgoutput":
        return f"it is of plugin {plugin}, not pgoutput"
    if lost:
        return "the server has dropped what it was to keep (max_slot_wal_keep_size)"
    if confirmed > position:
        return f"changes up to {confirmed} were confirmed, the lake has those up to {position}: it is an older one"
    if position > written:
        return f"the server is at {written}, the lake at {position}: the server is another, or an older one"
    return ""
