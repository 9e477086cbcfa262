"""Tables of profiles in a PostgreSQL that tests may kill, and a lake that rows of profiles are merged into."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.bench.postgres_server import REQUIRED, PostgresServer, missing

psycopg2 = pytest.importorskip("psycopg2")

from monolith_jax.lake.postgres import START, PostgresConfig, ProfileChanges, ProfileReader  # noqa: E402

TABLES = """
CREATE TABLE user_profiles (note text, user_id bigint PRIMARY KEY, country text, language varchar(8), age smallint);
CREATE TABLE video_profiles (
    video_id bigint PRIMARY KEY, author_id bigint, sound_id integer, tag_id bigint[], duration_ms integer, quality numeric
);
CREATE TABLE other (id bigint);
ALTER TABLE user_profiles REPLICA IDENTITY FULL;
ALTER TABLE video_profiles REPLICA IDENTITY FULL;
"""
COLUMNS = {
    "user": "user_id, country, language, age",
    "video": "video_id, author_id, sound_id, tag_id, duration_ms, quality::float8",
}


def administrate(server: PostgresServer, statement: str) -> list[tuple[Any, ...]]:
    """Runs a statement on a connection of its own."""
    connection = psycopg2.connect(server.dsn)
    connection.autocommit = True
    try:
        cursor = connection.cursor()
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


@contextlib.contextmanager
def running_server(folder: Path, settings: dict[str, str] | None = None) -> Iterator[PostgresServer]:
    """Gives a server to tests that may kill it, and leave it running; skips where there is none, unless one is required."""
    if why := missing():
        assert not os.environ.get(REQUIRED), why
        pytest.skip(why)
    server = PostgresServer(folder, settings)
    server.start()
    yield server
    server.stop()


@contextlib.contextmanager
def new_database(server: PostgresServer) -> Iterator["Database"]:
    """Gives a database with empty tables of profiles; afterwards its replication slot is gone."""
    one = Database(server, f"a{uuid.uuid4().hex[:12]}")
    yield one
    one.connection.close()
    ours = f"FROM pg_replication_slots WHERE slot_name = '{one.name}'"
    administrate(server, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{one.name}'")
    until = time.monotonic() + 10
    while administrate(server, f"SELECT 1 {ours} AND active") and time.monotonic() < until:
        time.sleep(0.02)
    administrate(server, f"SELECT pg_drop_replication_slot(slot_name) {ours}")


class Database:
    """A database of its own, with empty tables of profiles."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.server, self.name = server, name
        self.dsn = server.dsn.replace("dbname=postgres", f"dbname={name}")
        administrate(server, f"CREATE DATABASE {name}")
        self.connect()
        self.run(TABLES)

    def connect(self) -> None:
        self.connection = psycopg2.connect(self.dsn)
        self.connection.autocommit = True

    def run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def drop_slot(self) -> None:
        """Drops the replication slot, once the server has noticed that nobody reads it any longer."""
        query, until = "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND active", time.monotonic() + 10
        while self.run(query, self.name) and time.monotonic() < until:
            time.sleep(0.02)
        self.run("SELECT pg_drop_replication_slot(%s)", self.name)

    def config(self, **fields: Any) -> PostgresConfig:
        return PostgresConfig(**{"dsn": self.dsn, "slot": self.name, **fields})

    def now(self) -> dict[str, dict[int, tuple[Any, ...]]]:
        """Returns what the tables hold."""
        tables = {subject: self.run(f"SELECT {columns} FROM {subject}_profiles") for subject, columns in COLUMNS.items()}
        return {subject: {row[0]: row[1:] for row in rows} for subject, rows in tables.items()}


class Lake:
    """Rows of profiles, merged as the lake does: the later time counts, of equal ones what was written later."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, tuple[int, tuple[Any, ...]]]] = {"user": {}, "video": {}}

    def add(self, changes: ProfileChanges) -> None:
        for subject, batch in changes.rows.items():
            self.add_rows(subject, [tuple(row.values()) for row in batch.to_pylist()])

    def add_rows(self, subject: str, rows: list[tuple[Any, ...]]) -> None:
        for key, time_ms, *values in rows:
            if time_ms >= self.rows[subject].get(key, (0,))[0]:
                self.rows[subject][key] = time_ms, tuple(values)

    def now(self) -> dict[str, dict[int, tuple[Any, ...]]]:
        return {
            subject: {key: values for key, (_, values) in rows.items() if any(value is not None for value in values)}
            for subject, rows in self.rows.items()
        }


def read_until_quiet(reader: ProfileReader, lake: Lake, quiet_s: float = 0.3) -> int:
    """Reads until nothing comes; returns the position."""
    quiet = 0
    while quiet < 2:
        changes = reader.poll(quiet_s)
        lake.add(changes)
        quiet = 0 if changes.num_rows or changes.position == START or reader.is_away else quiet + 1
    return changes.position
