"""Holds the changes of PostgreSQL to what its tables hold, whatever is killed."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launch.bench.postgres_server import PostgresServer
from tests.lake.profile_database import Database, Lake, new_database, read_until_quiet, running_server

pytest.importorskip("psycopg2")

from monolith_jax.lake.postgres import START, ProfileReader


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with running_server(tmp_path_factory.mktemp("postgres")) as one:
        yield one


@pytest.fixture
def database(server: PostgresServer) -> Iterator[Database]:
    with new_database(server) as one:
        yield one


def keep_short(database: Database) -> None:
    """Has the tables hold no long values, so that changes need not come with the row before."""
    for table, columns in (("user_profiles", ("country", "language")), ("video_profiles", ("tag_id",))):
        database.run(f"ALTER TABLE {table} REPLICA IDENTITY DEFAULT")
        for column in columns:
            database.run(f"ALTER TABLE {table} ALTER {column} SET STORAGE PLAIN")


def change(database: Database, generator: random.Random) -> None:
    """Does something to the tables, of which no row is of nulls only."""
    what, key = generator.random(), generator.randrange(20)
    tags = [generator.getrandbits(62) for _ in range(generator.choice([0, 1, 3, 900]))]
    if what < 0.35:
        database.run(
            "INSERT INTO user_profiles VALUES ('x', %s, %s, %s, %s) ON CONFLICT (user_id) DO UPDATE SET age = EXCLUDED.age",
            *(key, generator.choice(["de", "zh", "\N{SNOWMAN}", None]), "en", generator.randrange(90)),
        )
    elif what < 0.7:
        database.run(
            "INSERT INTO video_profiles VALUES (%s, %s, 7, %s::bigint[], 5, 0.25) ON CONFLICT (video_id) DO UPDATE SET "
            "author_id = EXCLUDED.author_id",
            *(key, generator.randrange(5), tags),
        )
    elif what < 0.85:
        table = generator.choice(["user", "video"])
        database.run(f"DELETE FROM {table}_profiles WHERE {table}_id = %s", key)
    elif what < 0.95:
        database.run(f"UPDATE video_profiles SET video_id = video_id + 100, quality = NULL WHERE video_id = {key}")
        database.run(f"DELETE FROM video_profiles WHERE video_id = {key + 100}")
    else:
        database.run(
            "BEGIN; UPDATE user_profiles SET age = age + 1; UPDATE video_profiles SET duration_ms = duration_ms + 1; COMMIT"
        )


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_the_lake_comes_to_hold_what_the_tables_hold(database: Database, identity: str) -> None:
    if identity == "DEFAULT":
        keep_short(database)
    generator, lake, committed = random.Random(identity), Lake(), START
    for _ in range(50):
        change(database, generator)
    for round_ in range(8):
        reader = ProfileReader(database.config(max_rows=generator.choice([1, 5, 1000])), committed)
        for _ in range(generator.choice([0, 1, 3, 30])):
            change(database, generator)
            changes = reader.poll(0.01)
            lake.add(changes)
            # It may be lost after the lake has taken it in, before it is confirmed, or before it is committed.
            if generator.random() < 0.5:
                committed = max(committed, changes.position)
                if generator.random() < 0.5:
                    reader.confirm(committed)
        if round_ == 7:
            read_until_quiet(reader, lake)
        reader.close()
    assert lake.now() == database.now() and lake.now()["video"]
    assert not reader.num_set_aside and not reader.num_looked_up


def test_rows_at_the_start_have_the_time_that_is_set_and_changes_that_of_their_commit(database: Database) -> None:
    database.run("INSERT INTO user_profiles VALUES ('x', 1, 'de', 'de', 30), ('x', 2, NULL, NULL, NULL)")
    for _ in range(2):  # the second time there is a slot
        before_ms = time.time_ns() // 1_000_000
        reader = ProfileReader(database.config())
        changes = reader.poll(5)
        assert {0 <= time_ms - before_ms < 1000 for time_ms in changes.rows["user"].column("profile_ms").to_pylist()} == {True}
        reader.close()
    reader = ProfileReader(database.config(snapshot_ms=77))
    changes = reader.poll(5)
    assert changes.position == START
    assert [[*row.values()] for row in changes.rows["user"].to_pylist()] == [[1, 77, "de", "de", 30], [2, 77, None, None, None]]
    changes = reader.poll(5)
    assert changes.position > START and not changes.num_rows
    before_ms = time.time_ns() // 1_000_000
    database.run("UPDATE user_profiles SET country = 'fr' WHERE user_id = 1")
    start = time.monotonic()
    changes = reader.poll(5)
    assert time.monotonic() - start < 1
    (row,) = changes.rows["user"].to_pylist()
    assert 0 <= row["profile_ms"] - before_ms < 1000 and row["country"] == "fr"
    database.run("DELETE FROM user_profiles WHERE user_id = 1")
    (row,) = reader.poll(5).rows["user"].to_pylist()
    assert [*row.values()][2:] == [None, None, None] and row["user_id"] == 1 and row["profile_ms"] >= before_ms


def test_transactions_come_whole_and_not_with_what_is_behind(database: Database) -> None:
    reader = ProfileReader(database.config(max_rows=1))
    position = read_until_quiet(reader, Lake(), 0.05)
    insert = "INSERT INTO user_profiles SELECT 'x', i, 'de', 'de', 0 FROM generate_series(%s, %s) i"
    database.run(insert, 1, 20_000)
    database.run("BEGIN; UPDATE user_profiles SET age = 1 WHERE user_id <= 3; INSERT INTO video_profiles VALUES (1); COMMIT")
    database.run(insert, 20_001, 20_001)
    found = []
    while len(found) < 3:
        changes = reader.poll(0.001)  # too short for the large one
        assert changes.position >= position and (changes.num_rows or not changes.rows)
        if changes.num_rows:
            found.append((changes.num_rows, [*changes.rows], changes.position))
        position = changes.position
    assert [rows for rows, *_ in found] == [20_000, 4, 1]
    assert [subjects for _, subjects, _ in found] == [["user"], ["user", "video"], ["user"]]
    # Whoever starts behind one gets the next one, and nothing twice.
    reader.close()
    for (_, _, behind), (number, *_) in pairwise(found):
        again = ProfileReader(database.config(max_rows=1), behind)
        assert again.poll(5).num_rows == number
        again.close()


def test_a_long_value_that_was_not_touched_is_that_of_then(database: Database) -> None:
    reader = ProfileReader(database.config())
    lake = Lake()
    read_until_quiet(reader, lake, 0.05)
    generator = random.Random(0)
    tags = [generator.getrandbits(62) for _ in range(5000)]
    database.run("INSERT INTO video_profiles VALUES (1, 2, 3, %s::bigint[], 5, 0.5)", tags)
    database.run("UPDATE video_profiles SET author_id = 9")
    database.run("UPDATE video_profiles SET tag_id = '{1}'")
    rows = []
    while len(rows) < 3:
        rows += reader.poll(5).rows["video"].to_pylist()
    assert [row["tag_id"] for row in rows] == [tags, tags, [1]] and not reader.num_looked_up
    # What was changed under another identity has the values of now, and is counted.
    database.run("UPDATE video_profiles SET tag_id = %s::bigint[]", tags)
    database.run("ALTER TABLE video_profiles REPLICA IDENTITY DEFAULT")
    database.run("UPDATE video_profiles SET author_id = 10")
    read_until_quiet(reader, lake, 0.2)
    assert lake.rows["video"][1][1] == (10, 3, tags, 5, 0.5) and reader.num_looked_up == 1


def test_arrays_with_nulls_and_dimensions(database: Database) -> None:
    reader = ProfileReader(database.config())
    read_until_quiet(reader, Lake(), 0.05)
    database.run(
        "INSERT INTO video_profiles(video_id, tag_id) VALUES (1, '{1,NULL,3}'), (2, '{{1,2},{3,4}}'), (3, '[5:6]={-1,2}')"
    )
    rows = reader.poll(5).rows["video"].to_pylist()
    assert [row["tag_id"] for row in rows] == [[1, None, 3], [1, 2, 3, 4], [-1, 2]]


def test_other_tables_advance_the_position(database: Database) -> None:
    reader = ProfileReader(database.config())
    first = read_until_quiet(reader, Lake(), 0.05)
    database.run("INSERT INTO other SELECT generate_series(1, 100000)")
    until = time.monotonic() + 10
    while (position := reader.poll(0.1).position) - first < 1_000_000 and time.monotonic() < until:
        pass
    reader.confirm(position)
    query = "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = %s"
    while database.run(query, database.name)[0][0] < position and time.monotonic() < until:
        time.sleep(0.02)
    assert position - first >= 1_000_000 and database.run(query, database.name)[0][0] == position


def test_the_server_may_be_killed(database: Database) -> None:
    reader, lake = ProfileReader(database.config()), Lake()
    generator = random.Random(0)
    read_until_quiet(reader, lake, 0.05)
    for _ in range(3):
        for _ in range(20):
            change(database, generator)
        lake.add(reader.poll(0.01))
        database.server.kill()
        changes = reader.poll(0.2)
        lake.add(changes)
        assert reader.poll(0.1).num_rows == 0
        database.server.start()
        database.connect()
    change(database, generator)
    read_until_quiet(reader, lake)
    assert lake.now() == database.now() and reader.num_reconnects >= 2


READER = """
import json, os, sys
from monolith_jax.lake.postgres import PostgresConfig, ProfileReader
dsn, slot, path = sys.argv[1:]
position = 0
if os.path.exists(path):
    for line in open(path):
        if line.endswith("\\n"):
            position = json.loads(line)["position"]
reader = ProfileReader(PostgresConfig(dsn, slot=slot, max_rows=7), position)
with open(path, "a") as file:
    file.write("\\n" if os.path.getsize(path) and not open(path).read().endswith("\\n") else "")
    while True:
        changes = reader.poll(0.5)
        if changes.num_rows or changes.position != position:
            position = changes.position
            rows = {subject: [list(row.values()) for row in batch.to_pylist()] for subject, batch in changes.rows.items()}
            file.write(json.dumps({"position": position, "rows": rows}) + "\\n")
            file.flush()
            reader.confirm(position)
"""


def test_the_reader_may_be_killed(database: Database, tmp_path: Path) -> None:
    generator, path = random.Random(1), tmp_path / "lake"
    for _ in range(100):
        change(database, generator)
    command = [sys.executable, "-c", READER, database.dsn, database.name, str(path)]
    for _ in range(5):
        process = subprocess.Popen(command)
        until = time.monotonic() + 1.0 + generator.random()
        while time.monotonic() < until:
            change(database, generator)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = subprocess.Popen(command)
    want, lake = database.now(), Lake()
    until = time.monotonic() + 20
    while lake.now() != want and time.monotonic() < until:
        time.sleep(0.2)
        lake = Lake()
        for line in path.read_text().splitlines()[:-1] if path.exists() else []:
            for subject, rows in _rows_of(line).items():
                lake.add_rows(subject, rows)
        database.run("INSERT INTO other VALUES (1)")
    process.kill()
    process.wait()
    assert lake.now() == want and want["user"] and want["video"]


def _rows_of(line: str) -> dict[str, list[Any]]:
    """Returns the rows of a line; one that was cut short by a kill has none."""
    try:
        return json.loads(line)["rows"]
    except ValueError:
        return {}
