"""Holds what is wrong with the tables, the slot or the server to its name."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.bench.postgres_server import PostgresServer
from tests.lake.profile_database import Database, Lake, new_database, read_until_quiet, running_server

pytest.importorskip("psycopg2")

from monolith_jax.lake.postgres import START, PostgresConfig, ProfileReader


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
        ("ALTER TABLE user_profiles DROP CONSTRAINT user_profiles_pkey", {}, r"REPLICA IDENTITY FULL"),
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


def test_a_position_that_the_slot_cannot_serve_is_refused(database: Database) -> None:
    with pytest.raises(ValueError, match="there is none any longer"):
        ProfileReader(database.config(), 5).poll()
    reader = ProfileReader(database.config())
    position = read_until_quiet(reader, Lake(), 0.05)
    database.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30)")
    later = reader.poll(5).position
    reader.confirm(later)
    reader.close()
    time.sleep(0.2)
    with pytest.raises(ValueError, match="it is an older one"):
        ProfileReader(database.config(), position).poll()
    with pytest.raises(ValueError, match="the server is another"):
        ProfileReader(database.config(), later + 10**12).poll()
    ProfileReader(database.config(), later).poll()
    with pytest.raises(ValueError, match="max_rows"):
        ProfileReader(database.config(max_rows=0))
    with pytest.raises(ValueError, match="neither"):
        ProfileReader(database.config(user_table="", video_table=""))


def test_a_server_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    reader = ProfileReader(PostgresConfig("host=127.0.0.1 port=1 user=nobody dbname=nothing"))
    start = time.monotonic()
    changes = reader.poll(0.3)
    assert changes.position == START and not changes.num_rows and 0.25 < time.monotonic() - start < 5
    assert reader.num_reconnects


def test_without_psycopg2_the_extra_is_named() -> None:
    code = "import sys; sys.modules['psycopg2'] = None; import monolith_jax.lake.postgres"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode and "monolith_jax[lake]" in done.stderr
