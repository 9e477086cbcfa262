"""From PostgreSQL to the lake: features follow the tables, and a crash neither loses nor doubles a change."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from launch.bench.postgres_server import PostgresServer
from monolith_jax.lake import profiles as profiles_module
from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.profiles import Profiles
from tests.lake.lake_of import Lake, make_lake
from tests.lake.profile_database import Database, new_database, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with running_server(tmp_path_factory.mktemp("postgres")) as one:
        yield one


@pytest.fixture
def database(server: PostgresServer) -> Iterator[Database]:
    with new_database(server) as one:
        yield one


def bring_in(database: Database, lake: Lake) -> int:
    """Makes epochs until there is nothing more; returns how many changes came."""
    number = 0
    with closing(Profiles(database.config(), lake.warehouse)) as profiles:
        end = profiles.end_now(10, threading.Event())
        while profiles.position < end:
            number += profiles.step(1.0)
    return number


def users(lake: Lake) -> dict[int, tuple[Any, ...]]:
    rows = lake.rows("user_features")
    return {row["user_id"]: (row["country"], row["language"], row["age"]) for row in rows}


def test_features_follow_the_tables(tmp_path: Path, database: Database) -> None:
    lake = make_lake(tmp_path)
    database.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30), ('x', 2, 'at', 'de', 40)")
    database.run("INSERT INTO video_profiles VALUES (9, 5, 7, '{1,2}', 9000, 0.5)")
    assert bring_in(database, lake) == 3
    assert users(lake) == {1: ("de", "de", 30), 2: ("at", "de", 40)}
    (video,) = lake.rows("video_features")
    assert (video["author_id"], video["tag_id"], video["quality"], video["views_1h"]) == (5, [1, 2], 0.5, None)
    database.run("UPDATE user_profiles SET country = 'fr' WHERE user_id = 1")
    database.run("DELETE FROM user_profiles WHERE user_id = 2")
    assert bring_in(database, lake) == 2
    assert users(lake) == {1: ("fr", "de", 30), 2: (None, None, None)}
    log = sorted(lake.rows("user_features_log"), key=lambda row: (row["user_id"], row["event_time_ms"]))
    assert [(row["user_id"], row["country"]) for row in log] == [(1, "de"), (1, "fr"), (2, "at"), (2, None)]
    assert all(row["event_time_ms"] == row["profile_ms"] for row in log)
    assert bring_in(database, lake) == 0


def test_what_other_tables_write_is_passed_over_and_need_not_be_kept(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = make_lake(tmp_path)
    database.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30)")
    bring_in(database, lake)
    for idle_bytes, epochs in ((2**40, 0), (1, 1)):
        monkeypatch.setattr(profiles_module, "IDLE_BYTES", idle_bytes)
        with closing(Profiles(database.config(), lake.warehouse)) as profiles:
            epoch, position = profiles.epoch, profiles.position
            database.run("INSERT INTO other SELECT generate_series(1, 1000)")
            until = time.monotonic() + 10
            while profiles.position == position and time.monotonic() < until:
                assert profiles.step(0.1) == 0
            # What the driver has confirmed by itself, when the server asked at the start, is told in any case.
            told = epochs or int(profiles._reader.answered > position)
            assert profiles.position > position and profiles.epoch == epoch + told
    database.run("UPDATE user_profiles SET country = 'fr'")
    assert bring_in(database, lake) == 1 and users(lake) == {1: ("fr", "de", 30)}


def test_a_crash_at_any_commit_loses_and_doubles_nothing(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, rng, commit, count = make_lake(tmp_path), random.Random(0), TableWriter.commit, 0
    database.run("INSERT INTO user_profiles SELECT 'x', i, 'de', 'de', 0 FROM generate_series(1, 5) AS i")
    bring_in(database, lake)
    crash = 0

    def crashes(writer: TableWriter, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == crash:
            raise ZeroDivisionError
        commit(writer, *arguments)

    monkeypatch.setattr(TableWriter, "commit", crashes)
    for age in range(1, 13):
        for user in rng.sample(range(1, 6), 3):
            database.run(f"UPDATE user_profiles SET age = {age} WHERE user_id = {user}")
        count, crash = 0, age % 5
        if crash:
            with pytest.raises(ZeroDivisionError):
                bring_in(database, lake)
        else:
            bring_in(database, lake)
        if age % 3 == 0:  # A change between the crash and the next start.
            database.run("UPDATE user_profiles SET language = 'en' WHERE user_id = 1")
    count, crash = 0, -1
    bring_in(database, lake)
    there = {row[0]: tuple(row[1:]) for row in database.run("SELECT user_id, country, language, age FROM user_profiles")}
    assert users(lake) == there
    log = Counter((row["user_id"], row["profile_ms"], row["age"], row["language"]) for row in lake.rows("user_features_log"))
    assert max(log.values()) == 1 and len(log) == 5 + 36 + 4


def confirmed(database: Database) -> int:
    query = "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = %s"
    return int(database.run(query, database.name)[0][0])


@pytest.fixture
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database whose server soon asks whether one is still there."""
    with running_server(tmp_path_factory.mktemp("hasty"), {"wal_sender_timeout": "1s"}) as one, new_database(one) as database:
        yield database


@pytest.mark.parametrize("is_told", [True, False])
def test_what_the_driver_confirms_by_itself_does_no_harm(
    tmp_path: Path, hasty: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_told: bool
) -> None:
    lake = make_lake(tmp_path)
    hasty.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30)")
    bring_in(hasty, lake)
    if not is_told:  # One is killed right then.
        monkeypatch.setattr(Profiles, "_is_due", lambda *_: False)
    with closing(Profiles(hasty.config(), lake.warehouse)) as profiles:
        told = profiles.position
        until = time.monotonic() + 20
        while confirmed(hasty) <= told and time.monotonic() < until:
            hasty.run("INSERT INTO other SELECT generate_series(1, 100)")
            profiles.step(0.2)
        profiles.step(0.2)
    assert confirmed(hasty) > told
    monkeypatch.undo()
    hasty.run("UPDATE user_profiles SET country = 'fr'")
    number = bring_in(hasty, lake)
    assert users(lake) == {1: ("fr", "de", 30)}
    assert (number, "read again" in caplog.text) == ((1, False) if is_told else (2, True))


def test_the_rows_of_the_start_are_written_as_they_come_and_seen_at_once(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, written, write = make_lake(tmp_path), [], TableWriter.write

    def noted(writer: TableWriter, rows: pa.Table) -> None:
        written.append((writer.name, rows.num_rows))
        write(writer, rows)

    monkeypatch.setattr(TableWriter, "write", noted)
    monkeypatch.setattr(profiles_module, "FLUSH_ROWS", 512)
    # Twice the same keys: the later row counts, wherever it stands.
    database.run("ALTER TABLE user_profiles DROP CONSTRAINT user_profiles_pkey")
    database.run("INSERT INTO user_profiles SELECT 'x', i %% 700, 'de', 'de', i FROM generate_series(0, 1399) AS i")
    database.run("INSERT INTO video_profiles SELECT i, 5, 7, '{1}', 1, 1 FROM generate_series(1, 300) AS i")
    with closing(Profiles(database.config(max_rows=100), lake.warehouse)) as profiles:
        number = 0
        while profiles.epoch < 0:
            assert not lake.rows("user_features") and not lake.rows("video_features_log")
            number += profiles.step(0.001)
    assert number == 1700 and max(rows for _, rows in written) == 100
    assert len([name for name, _ in written if name == "user_features_log"]) == 14
    assert {key: age for key, (_, _, age) in users(lake).items()} == {key: key + 700 for key in range(700)}
    assert len(lake.rows("user_features_log")) == 1400 and len(lake.rows("video_features")) == 300


@pytest.mark.parametrize("crash", [1, 2, 3, 4])
def test_a_crash_while_all_rows_are_read_again_loses_nothing(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    lake, commit, count = make_lake(tmp_path), TableWriter.commit, 0
    database.run("INSERT INTO user_profiles SELECT 'x', i, 'de', 'de', 0 FROM generate_series(1, 5) AS i")
    database.run("INSERT INTO video_profiles VALUES (9, 5, 7, '{1,2}', 9000, 0.5)")
    bring_in(database, lake)
    database.drop_slot()
    database.run("UPDATE user_profiles SET age = 1; UPDATE video_profiles SET author_id = 6")
    with closing(Profiles(database.config(), lake.warehouse)) as profiles:
        for _ in range(2):
            with pytest.raises(ValueError, match="start_over"):
                profiles.step(5.0)

    def crashes(writer: TableWriter, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == crash:
            raise ZeroDivisionError
        commit(writer, *arguments)

    monkeypatch.setattr(TableWriter, "commit", crashes)
    with closing(Profiles(database.config(start_over=True), lake.warehouse)) as profiles:
        with pytest.raises(ZeroDivisionError):
            while True:
                profiles.step(1.0)
    database.run("UPDATE user_profiles SET age = 2 WHERE user_id = 3")
    with closing(Profiles(database.config(start_over=True, snapshot_ms=0), lake.warehouse)) as profiles:
        end = profiles.end_now(10, threading.Event())
        while profiles.position < end:
            profiles.step(1.0)
    assert {key: age for key, (_, _, age) in users(lake).items()} == {1: 1, 2: 1, 3: 2, 4: 1, 5: 1}
    (video,) = lake.rows("video_features")
    assert video["author_id"] == 6 and {row["author_id"] for row in lake.rows("video_features_log")} == {5, 6}
