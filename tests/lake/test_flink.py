"""The Flink jobs on a real cluster, with Apache Kafka and PostgreSQL: they write what the readers of the lake expect."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")
pytest.importorskip("psycopg2")

from launch.bench import kafka_broker, postgres_server
from launch.bench.flink import DAY_MS, HOUR_MS, event_faults, kill, write_last
from launch.bench.flink_events import BEGIN_MS, OUT_OF_ORDER_MS, counts_in, counts_of, last_events, make_events
from launch.bench.flink_lake import FlinkLake, until
from launch.flink import local
from monolith_jax.lake.changelog import Changelog
from monolith_jax.lake.counters import WindowCounts, WindowCountsConfig
from monolith_jax.lake.tables import WINDOWS
from monolith_jax.lake.tidy import is_foreign
from monolith_jax.lake.warehouse import TABLES, WarehouseConfig, make_tables, open_table
from monolith_jax.stream.events import ACTION, IMPRESSION
from monolith_jax.stream.log import LogPartition, open_producer
from tests.lake import flink_rows

NO_EVENTS = (
    b"",
    b"no event",
    b"[]",
    b'{"user_id": 1}',
    b'{"event_time_ms": "x", "user_id": 1, "video_id": 1, "action": "like"}',
    b'{"event_time_ms": 1700000000000, "user_id": 1, "action": "like"}',
    # Of clocks that would close all windows.
    b'{"event_time_ms": 4000000000000, "user_id": 1, "video_id": 1, "action": "like"}',
    b'{"event_time_ms": 9000000000000000000, "user_id": 1, "video_id": 1, "action": "like"}',
)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkLake]:
    """Returns a lake that the jobs write, with some profiles from before they began."""
    fetched = local.DISTRIBUTION.is_dir() and local.JARS.is_dir()
    if not fetched and not os.environ.get(local.REQUIRED):
        pytest.skip(f"Flink was not fetched; {local.REQUIRED}=1 fetches it")
    if why := local.missing() or kafka_broker.missing() or postgres_server.missing():
        assert not os.environ.get(local.REQUIRED), why
        pytest.skip(why)
    one = FlinkLake(tmp_path_factory.mktemp("flink_lake"))
    try:
        one.write_postgres(
            "INSERT INTO user_profiles VALUES (%s, %s, 'en', %s)", [(1, "de", 20), (2, "fr", None), (3, "it", 30)]
        )
        one.write_postgres("INSERT INTO video_profiles VALUES (%s, 5, NULL, %s, 9000, 0.25)", [(1, [1, 2]), (2, []), (3, None)])
        one.submit()
        yield one
    finally:
        one.stop()


def by_key(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, Mapping[str, Any]]:
    """Returns rows by their key; fails if one is there twice."""
    found = {row[key]: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_tables_are_the_lakes(lake: FlinkLake, tmp_path: Any) -> None:
    """The SQL makes the tables that the commands of the lake would make."""
    ours = WarehouseConfig(path=str(tmp_path))
    make_tables(ours)
    for name in TABLES:
        if name != "examples":
            theirs, expected = open_table(lake.warehouse, name).table_schema, open_table(ours, name).table_schema
            assert [(one.name, str(one.type)) for one in theirs.fields] == [
                (one.name, str(one.type)) for one in expected.fields
            ]
            assert (theirs.primary_keys, theirs.partition_keys) == (expected.primary_keys, expected.partition_keys)
            # That one is for the epochs of the commands.
            assert theirs.options == {
                key: one for key, one in expected.options.items() if key != "snapshot.ignore-empty-commit"
            }


def test_profiles_follow_postgres(lake: FlinkLake) -> None:
    """Profiles that were there, are new, change or go away are in the features within 5 s, and in the log with their times."""
    begin_ms = int(time.time() * 1000)
    until(lambda: {1, 2, 3} <= {row["user_id"] for row in lake.read("user_features")})
    until(lambda: {1, 2, 3} <= {row["video_id"] for row in lake.read("video_features")})
    videos = by_key(lake.read("video_features"), "video_id")
    assert [videos[one]["tag_id"] for one in (1, 2, 3)] == [[1, 2], [], None]
    assert (videos[1]["author_id"], videos[1]["sound_id"], videos[1]["quality"]) == (5, None, 0.25)
    follower = Changelog(lake.warehouse, "user_features")
    waited = []
    for age in range(40, 45):
        time.sleep(random.random())
        lake.write_postgres(f"UPDATE user_profiles SET age = {age} WHERE user_id = 1")
        changed = time.monotonic()
        until(lambda wanted=age: [row for row in follower.poll().rows.to_pylist() if row["age"] == wanted])
        waited.append(time.monotonic() - changed)
    print("from PostgreSQL to a follower of the table, s:", [round(one, 2) for one in waited])
    assert sorted(waited)[len(waited) // 2] <= 5
    lake.write_postgres("DELETE FROM user_profiles WHERE user_id = 2")
    lake.write_postgres("INSERT INTO user_profiles VALUES (4, 'es', 'es', 1)")
    lake.write_postgres("UPDATE video_profiles SET tag_id = '{7}', quality = NULL WHERE video_id = 1")
    until(lambda: 4 in by_key(lake.read("user_features"), "user_id"))
    until(lambda: by_key(lake.read("video_features"), "video_id")[1]["tag_id"] == [7])
    users = by_key(lake.read("user_features"), "user_id")
    assert (users[1]["country"], users[1]["age"]) == ("de", 44)
    assert (users[2]["country"], users[2]["language"], users[2]["age"]) == (None, None, None)
    assert begin_ms - 60_000 < users[3]["profile_ms"] < begin_ms < users[2]["profile_ms"] < users[4]["profile_ms"]
    log = [row for row in lake.read("user_features_log") if row["user_id"] in (1, 2) and row["profile_ms"]]
    log.sort(key=lambda row: row["event_time_ms"])
    assert [row["age"] for row in log if row["user_id"] == 1] == [20, 40, 41, 42, 43, 44]
    assert [row["country"] for row in log if row["user_id"] == 2] == ["fr", None]
    assert all(row["event_time_ms"] == row["profile_ms"] and row["activity_ms"] is None for row in log)


def test_events_and_counts(lake: FlinkLake) -> None:
    """Events arrive once, whatever else is in the log; activity follows; counts are those of the definition, and of ours."""
    impressions, actions = make_events(600, seed=1)
    last_ms = impressions[-1]["event_time_ms"] + 2 * DAY_MS
    with closing(open_producer(lake.broker.url)) as producer:
        for topic in ("impressions", "actions"):
            for payload in NO_EVENTS:
                producer.append(LogPartition(topic, 0), payload)
        producer.flush()
    last = last_events(last_ms)
    lake.produce(impressions, actions)
    lake.produce(*last)
    expected = counts_of(impressions, actions, last_ms - OUT_OF_ORDER_MS)
    assert sum(1 for counts in expected.values() if all(counts)) > 20
    until(lambda: len(counts_in(lake.read("video_features_log"))) == len(expected))
    assert counts_in(lake.read("video_features_log")) == expected
    lake.settled()
    seen = sorted((one["event_time_ms"], one["user_id"]) for one in [*impressions, *last[0]])
    found = [row for row in lake.read("events") if row["topic"] == "impressions"]
    assert sorted((row["event_time_ms"], row["user_id"]) for row in found) == seen
    done = [row for row in lake.read("events") if row["topic"] == "actions"]
    assert len(done) == len(actions) + len(last[1]) == len({(row["log_partition"], row["log_offset"]) for row in done})
    wanted = by_key(impressions, "event_time_ms")
    for row in found:
        if row["video_id"] != last[0][0]["video_id"]:
            assert all(row[name] == value for name, value in wanted[row["event_time_ms"]].items())
            assert row["day"] == time.strftime("%Y-%m-%d", time.gmtime(row["event_time_ms"] / 1000))
    newest = {one["user_id"]: one for one in [*impressions, *last[0]]}
    users = by_key(lake.read("user_features"), "user_id")
    assert {user: users[user]["last_video_id"] for user in newest} == {user: one["video_id"] for user, one in newest.items()}
    # A follower of the snapshots, compacted meanwhile, merges what the table holds.
    followed = Changelog(lake.warehouse, "user_features", 0).poll().rows.to_pylist()
    assert flink_rows.merged(followed) == flink_rows.in_order(list(users.values()))
    videos = by_key(lake.read("video_features"), "video_id")
    for window in WINDOWS:
        ends = {(video, end) for name, video, end in expected if name == window.name}
        for video in {video for video, _ in ends}:
            end = max(end for one, end in ends if one == video)
            assert videos[video][f"counts_{window.name}_ms"] == end
    ours = WindowCounts(WindowCountsConfig())
    ours.add_impressions(pa.RecordBatch.from_pylist(impressions, IMPRESSION))
    ours.add_actions(pa.RecordBatch.from_pylist(actions, ACTION))
    rows = {name: batch.to_pylist() for name, batch in ours.advance(last_ms - OUT_OF_ORDER_MS).items()}
    columns = {f"counts_{window.name}_ms": None for window in WINDOWS}
    assert counts_in([columns | row for batch in rows.values() for row in batch]) == expected


def test_jobs_go_on_after_kills(lake: FlinkLake) -> None:
    """Nothing is lost or doubled when both processes are killed while events come; `launch.bench.flink` does so 20 times."""
    begin_ms = 1 + max((one["event_time_ms"] for one in [*lake.impressions, *lake.actions]), default=BEGIN_MS)
    impressions, actions = make_events(300, 2, begin_ms, HOUR_MS, 10**6)
    lake.produce(impressions[:150], actions[:150])
    time.sleep(random.random())
    kill(lake, ("taskmanager", "jobmanager"))
    lake.produce(impressions[150:], actions[150:])
    assert not event_faults(lake, write_last(lake))


def _check_ours(folders: Mapping[str, WarehouseConfig], steps: int) -> None:
    """Checks what our readers find after so many steps."""
    expected = flink_rows.expected_of(steps)
    for catalog, config in folders.items():
        for name, rows in expected.items():
            assert flink_rows.in_order(Changelog(config, name).whole().to_pylist()) == rows, (catalog, name)
        followed = Changelog(config, "user_features", 0).poll().rows.to_pylist()
        assert flink_rows.merged(followed) == expected["user_features"], catalog


def test_either_engine_reads_what_the_other_wrote(lake: FlinkLake, tmp_path: Path) -> None:
    """Also what both wrote, one after the other, and what Flink compacted; a follower merges the same from the snapshots."""
    folders = {catalog: WarehouseConfig(path=str(tmp_path / catalog)) for catalog in ("ours", "theirs")}
    head, names = flink_rows.head_sql(folders), list(folders)
    tables = local.rendered(["tables.sql"], lake.variables).replace("paimon.", "theirs.")

    def reads(label: str) -> str:
        return flink_rows.read_sql({one: tmp_path / f"{one}_{label}" for one in folders})

    def check_theirs(steps: int, label: str) -> None:
        for catalog in folders:
            found = flink_rows.rows_in(tmp_path / f"{catalog}_{label}")
            assert found == flink_rows.expected_of(steps), (catalog, label)

    make_tables(folders["ours"])
    for step in (0, 1):
        flink_rows.write(folders["ours"], step)
    write = "".join(flink_rows.insert_sql(["theirs"], step) for step in (0, 1))
    lake.cluster.sql(head + tables[tables.index("CREATE DATABASE") :] + write + reads("first"))
    _check_ours(folders, 2)
    check_theirs(2, "first")
    lake.cluster.sql(head + flink_rows.compact_sql(names, "user_features") + reads("compacted"))
    _check_ours(folders, 2)
    check_theirs(2, "compacted")
    for config in folders.values():
        flink_rows.write(config, 2)
    _check_ours(folders, 3)
    write = flink_rows.insert_sql(names, 3)
    lake.cluster.sql(head + reads("both") + write + flink_rows.compact_sql(names, "user_features", "events") + reads("last"))
    check_theirs(3, "both")
    _check_ours(folders, 4)
    check_theirs(4, "last")
    for config in folders.values():
        for name in ("events", "user_features"):
            assert Changelog(config, name).table.snapshot_manager().get_latest_snapshot().commit_kind == "COMPACT"
            assert is_foreign(config, name), "launch.lake leaves it alone"
