"""Holds what is wrong with the tables, the slot or the server to its name."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from launch.bench.postgres_server import PostgresServer
from tests.lake.profile_database import Database, Lake, new_database, read_until_quiet, running_server

psycopg2 = pytest.importorskip("psycopg2")

from monolith_jax.lake.postgres import START, PostgresConfig, ProfileReader  # noqa: E402


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with running_server(tmp_path_factory.mktemp("postgres")) as one:
        yield one


@pytest.fixture
def database(server: PostgresServer) -> Iterator[Database]:
    with new_database(server) as one:
        yield one


def test_a_truncated_table_is_told(database: Database) -> None:
    database.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30)")
    reader, lake = ProfileReader(database.config()), Lake()
    position = read_until_quiet(reader, lake, 0.05)
    database.run("TRUNCATE user_profiles; INSERT INTO user_profiles VALUES ('x', 2, 'de', 'de', 30)")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"user_profiles was truncated.*ignore_truncate"):
            reader.poll(5)
    reader.close()
    reader = ProfileReader(database.config(ignore_truncate=True), position)
    assert reader.poll(5).rows["user"].column("user_id").to_pylist() == [2]


def test_rows_without_a_key_are_set_aside(database: Database) -> None:
    database.run(
        "ALTER TABLE user_profiles DROP CONSTRAINT user_profiles_pkey, ALTER user_id DROP NOT NULL, REPLICA IDENTITY FULL"
    )
    database.run("INSERT INTO user_profiles VALUES ('x', NULL, 'de', 'de', 30), ('x', 1, 'de', 'de', 30)")
    reader, lake = ProfileReader(database.config()), Lake()
    read_until_quiet(reader, lake, 0.05)
    assert [*lake.now()["user"]] == [1] and reader.num_set_aside == 1
    database.run("INSERT INTO user_profiles VALUES ('y', NULL, 'fr', 'fr', 31)")
    database.run("UPDATE user_profiles SET user_id = 2 WHERE note = 'x' AND user_id IS NULL")
    read_until_quiet(reader, lake, 0.1)
    assert sorted(lake.now()["user"]) == [1, 2] and reader.num_set_aside == 2


def test_tables_may_have_other_names_and_further_columns(database: Database) -> None:
    database.run("CREATE SCHEMA app; CREATE TABLE app.people (id integer PRIMARY KEY, land text, language text, age bigint)")
    database.run("ALTER TABLE app.people REPLICA IDENTITY FULL")
    config = database.config(user_table="app.people", video_table="", user_columns=(("user_id", "id"), ("country", "land")))
    reader, lake = ProfileReader(config), Lake()
    read_until_quiet(reader, lake, 0.05)
    database.run("INSERT INTO app.people VALUES (1, 'de', 'de', 30)")
    database.run("ALTER TABLE app.people ADD COLUMN extra json DEFAULT '{}'")
    database.run("INSERT INTO app.people(extra, id, land) VALUES ('[]', 2, 'fr')")
    database.run("INSERT INTO video_profiles VALUES (1)")
    read_until_quiet(reader, lake, 0.1)
    assert lake.now() == {"user": {1: ("de", "de", 30), 2: ("fr", None, None)}, "video": {}}
    database.run("ALTER TABLE app.people DROP COLUMN language; INSERT INTO app.people VALUES (3, 'de', 30)")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"app\.people has no column language"):
            reader.poll(5)


@pytest.mark.parametrize(
    ("statement", "fields", "message"),
    [
        ("ALTER TABLE user_profiles DROP COLUMN age", {}, r"user_profiles has no column age; there: note, user_id"),
        ("ALTER TABLE user_profiles ALTER age TYPE text", {}, r"column age .* expected bigint, integer or smallint"),
        ("ALTER TABLE video_profiles ALTER tag_id TYPE text", {}, r"column tag_id .* expected bigint\[\]"),
        (
            "ALTER TABLE user_profiles DROP CONSTRAINT user_profiles_pkey, REPLICA IDENTITY DEFAULT",
            {},
            r"does not hold user_id: ALTER TABLE public.user_profiles REPLICA IDENTITY FULL",
        ),
        (
            "ALTER TABLE video_profiles REPLICA IDENTITY DEFAULT",
            {},
            r"public.video_profiles: .*\(of tag_id\).*: ALTER TABLE video_profiles REPLICA IDENTITY FULL",
        ),
        (
            "CREATE PUBLICATION mine FOR TABLE user_profiles, video_profiles WITH (publish = 'insert, truncate')",
            {"publication": "mine"},
            "'mine' does not tell update, delete: ALTER PUBLICATION mine SET",
        ),
        (
            "CREATE PUBLICATION mine FOR TABLE user_profiles, video_profiles WITH (publish = 'insert, update, delete')",
            {"publication": "mine"},
            "'mine' does not tell truncate",
        ),
        (
            "CREATE PUBLICATION mine FOR TABLE user_profiles WHERE (user_id < 100), video_profiles",
            {"publication": "mine"},
            r"public.user_profiles only rows WHERE \(user_id < 100\)",
        ),
        (
            "CREATE PUBLICATION mine FOR TABLE user_profiles (user_id, country), video_profiles",
            {"publication": "mine"},
            r"does not tell columns \['language', 'age'\] of table public.user_profiles",
        ),
        ("SELECT 1", {"user_table": "nobody"}, "user_table: PostgreSQL has no table 'nobody'"),
        ("SELECT 1", {"user_columns": (("userid", "id"),)}, "no column of the features is .'userid'"),
        (
            "CREATE PUBLICATION mine FOR TABLE user_profiles",
            {"publication": "mine"},
            "does not hold table public.video_profiles",
        ),
    ],
)
def test_what_is_wrong_is_named(database: Database, statement: str, fields: dict[str, Any], message: str) -> None:
    database.run(statement)
    reader = ProfileReader(database.config(**fields))
    with pytest.raises(ValueError, match=message):
        reader.poll(1)


def test_partitions_have_to_tell_long_values_too(database: Database) -> None:
    database.run(
        "CREATE TABLE people (user_id bigint PRIMARY KEY, country text, language text, age int) PARTITION BY RANGE (user_id)"
    )
    database.run("CREATE TABLE people_1 PARTITION OF people FOR VALUES FROM (0) TO (100)")
    database.run("ALTER TABLE people REPLICA IDENTITY FULL")
    config = database.config(user_table="people")
    with pytest.raises(ValueError, match="ALTER TABLE people_1 REPLICA IDENTITY FULL"):
        ProfileReader(config).poll(1)
    database.run("ALTER TABLE people_1 REPLICA IDENTITY FULL")
    reader, lake = ProfileReader(config), Lake()
    read_until_quiet(reader, lake, 0.05)
    database.run("INSERT INTO people VALUES (7, 'de', 'de', 30)")
    read_until_quiet(reader, lake, 0.1)
    assert lake.now()["user"] == {7: ("de", "de", 30)}


def test_a_position_that_the_slot_cannot_serve_is_refused(database: Database) -> None:
    with pytest.raises(ValueError, match=r"there is none any longer.*start_over"):
        ProfileReader(database.config(), 5).poll()
    reader = ProfileReader(database.config())
    read_until_quiet(reader, Lake(), 0.05)
    database.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30)")
    position = reader.poll(5).position
    reader.confirm(position)
    reader.close()
    time.sleep(0.2)
    with pytest.raises(ValueError, match="the server is another"):
        ProfileReader(database.config(), position + 10**12).poll()
    ProfileReader(database.config(), position).poll()
    with pytest.raises(ValueError, match="max_rows"):
        ProfileReader(database.config(max_rows=0))
    with pytest.raises(ValueError, match="neither"):
        ProfileReader(database.config(user_table="", video_table=""))


@pytest.mark.parametrize("gone", [False, True])
def test_an_older_lake_has_all_rows_read_again(database: Database, gone: bool, caplog: pytest.LogCaptureFixture) -> None:
    lake, reader = Lake(), ProfileReader(database.config(snapshot_ms=0))
    database.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30), ('x', 2, 'de', 'de', 30)")
    position = read_until_quiet(reader, lake, 0.05)
    database.run("UPDATE user_profiles SET age = 31 WHERE user_id = 1")
    reader.confirm(reader.poll(5).position)
    reader.close()
    time.sleep(0.2)
    if gone:
        database.drop_slot()
    reader = ProfileReader(database.config(snapshot_ms=0, start_over=gone), position)
    changes = reader.poll(5)
    assert changes.position == START and "all profiles are read again" in caplog.text
    lake.add(changes)
    database.run("UPDATE user_profiles SET age = 32 WHERE user_id = 2")
    assert read_until_quiet(reader, lake, 0.1) > position
    assert lake.now() == database.now()


def test_a_server_that_is_not_there_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    reader = ProfileReader(PostgresConfig("host=127.0.0.1 port=1 user=nobody dbname=nothing"))
    start = time.monotonic()
    for _ in range(10):
        changes = reader.poll(0.25)
        assert changes.position == START and not changes.num_rows
    assert 2.4 < time.monotonic() - start < 5
    assert reader.is_away and 2 <= reader.num_reconnects <= 4 and caplog.text.count("connecting anew") == 1
    with pytest.raises(OSError, match="PostgreSQL is not there"):
        reader.end_now(0.1, threading.Event())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("dbname=nowhere", 'does not let us in: .*"nowhere" does not exist'),
        ("user=nobody", 'does not let us in: .*"nobody" does not exist'),
        ("dbname", "no address as libpq takes it"),
        ("sslmode=require", "does not let us in: .*SSL"),
    ],
)
def test_an_address_that_is_wrong_is_not_waited_for(database: Database, wrong: str, message: str) -> None:
    reader = ProfileReader(PostgresConfig(f"{database.dsn} {wrong}"))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            reader.poll(1)
    with pytest.raises(ValueError, match=message):
        reader.end_now(5, threading.Event())


def test_a_wrong_password_is_not_waited_for(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = database.server.folder / "data"
    database.run("CREATE ROLE guest LOGIN REPLICATION PASSWORD 'right'")
    before = (folder / "pg_hba.conf").read_text()
    (folder / "pg_hba.conf").write_text(f"host all guest 127.0.0.1/32 scram-sha-256\n{before}")
    try:
        database.run("SELECT pg_reload_conf()")
        time.sleep(0.5)
        for password, message in (("", "no password supplied"), ("secret", "password authentication failed")):
            monkeypatch.setenv("PGPASSWORD", password)
            with pytest.raises(ValueError, match=message) as raised:
                ProfileReader(PostgresConfig(f"{database.dsn} user=guest")).poll(1)
            assert "secret" not in str(raised.value)
    finally:
        (folder / "pg_hba.conf").write_text(before)
        database.run("SELECT pg_reload_conf()")
        database.run("DROP ROLE guest")


@pytest.mark.parametrize(
    "dsn",
    [
        "host=a password=secret",
        "host=a PASSWORD = 'secret'",
        "password=secret host=a",
        "postgresql://me:secret@a/b",
        "postgres://a/b?user=me&password=secret",
        "host=a sslpassword=secret",
    ],
)
def test_an_address_holds_no_password(dsn: str) -> None:
    with pytest.raises(ValueError, match="PGPASSWORD") as raised:
        PostgresConfig(dsn)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("dsn", ["host=a passfile=b", "postgresql://me@a:5432/b", "postgresql://a:5432/b?user=me"])
def test_an_address_without_a_password_is_taken(dsn: str) -> None:
    assert PostgresConfig(dsn).dsn == dsn


def test_polls_end_while_another_transaction_is_open_at_the_start(database: Database) -> None:
    database.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30)")
    open_, lake = psycopg2.connect(database.dsn), Lake()
    with contextlib.closing(open_):
        open_.cursor().execute("INSERT INTO other VALUES (1)")
        for _ in range(2):  # the second time after the first was closed while it waited
            reader, start = ProfileReader(database.config()), time.monotonic()
            for _ in range(3):
                changes = reader.poll(0.2)
                assert changes.position == START and not changes.num_rows
            assert 0.5 < time.monotonic() - start < 2
            reader.close()
            assert time.monotonic() - start < 3
            assert not database.run("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", database.name)
        reader = ProfileReader(database.config())
        reader.poll(0.2)
        open_.rollback()
        read_until_quiet(reader, lake)
    assert lake.now() == database.now()


def test_without_psycopg2_the_extra_is_named() -> None:
    code = "import sys; sys.modules['psycopg2'] = None; import monolith_jax.lake.postgres"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode and "monolith_jax[lake]" in done.stderr
