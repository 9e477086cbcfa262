"""The lake at work: `python -m launch.bench.lake --help`.

    log -> ingest: events, features, counts -> readers that follow them

Events from the log to readers of the tables (a process each), a merged read of a million rows of user features, lookups of a
thousand videos while changes come in, and the agreement of history, changelog and cache. With PostgreSQL, how long a profile
takes from COMMIT to the cache. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from monolith_jax.lake.warehouse import WarehouseConfig
    from monolith_jax.stream.log_source import LogConfig

START_MS = 1_790_000_000_000
EVENTS_PER_S = 20_000
"""Of event time."""
MESSAGE_ROWS = 2048
EXAMPLE = "python -m launch.bench.lake --events=2000000"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.lake",
        description="Measures the lake: ingest, merged reads, lookups, agreement.",
        epilog=f"example: {EXAMPLE}",
        allow_abbrev=False,
    )
    parser.add_argument("--events", type=int, default=2_000_000, metavar="N", help="through the log (%(default)s)")
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="of user features (%(default)s)")
    parser.add_argument("--lookups", type=int, default=1_000_000, metavar="N", help="that must agree (%(default)s)")
    parser.add_argument("--changes", type=int, default=40, metavar="N", help="of profiles in PostgreSQL; 0: none (%(default)s)")
    parser.add_argument("--workdir", type=Path, metavar="FOLDER", help="else a temporary one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    asked = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lake") as temporary:
        folder = asked.workdir or Path(temporary)
        found: dict[str, Any] = {}
        for name, measure in (("warm", _warm), ("ingest", _ingest), ("merged", _merged), ("agree", _agreement)):
            found |= measure(asked, folder / name)
            print(f"{name}: done", file=sys.stderr, flush=True)
        if asked.changes:
            found |= _profiles(asked, folder / "profiles")
    _print(found)
    print(json.dumps(found))
    return 0


def write_log(url: str, number: int, partitions: int = 1, seed: int = 0) -> None:
    """Fills a log with impressions and actions in turn, in the order of time: 200,000 users, 50,000 videos."""
    import numpy as np
    import pyarrow as pa

    from monolith_jax.stream.events import ACTION, IMPRESSION
    from monolith_jax.stream.formats import Schemas, announce, encode
    from monolith_jax.stream.log import LogPartition, open_log, open_producer

    rng = np.random.default_rng(seed)
    numbers = {}
    with closing(open_producer(url)) as producer:
        for topic in ("impressions", "actions"):
            producer.create(topic, partitions)
        log = open_log(url)
        for topic, schema in (("impressions", IMPRESSION), ("actions", ACTION)):
            numbers[topic] = announce(producer, Schemas(log, topic), topic, schema)
        for first in range(0, number // 2, MESSAGE_ROWS):
            count = min(MESSAGE_ROWS, number // 2 - first)
            rows = np.arange(first, first + count)
            keys = {
                "event_time_ms": START_MS + rows * 2000 // EVENTS_PER_S,
                "request_id": rows,
                "user_id": rng.integers(0, 200_000, count),
                "video_id": (rng.random(count) ** 3 * 50_000).astype(np.int64),
            }
            offsets = np.arange(0, 4 * count + 1, 4, dtype=np.int32)
            tags = pa.ListArray.from_arrays(offsets, rng.integers(0, 1000, 4 * count))
            shown = {"author_id": keys["video_id"] % 5000, "duration_ms": rng.integers(5000, 60_000, count), "tag_id": tags}
            done = {"action": np.where(rng.random(count) < 0.9, "play", "like"), "value": rng.integers(0, 60_000, count)}
            for topic, schema, more in (("impressions", IMPRESSION, shown), ("actions", ACTION, done)):
                columns = keys | more
                arrays = [pa.array(columns[one.name]) if one.name in columns else pa.nulls(count, one.type) for one in schema]
                typed = [one.cast(field.type) for one, field in zip(arrays, schema, strict=True)]
                batch = pa.RecordBatch.from_arrays(typed, schema=schema)
                for payload in encode(batch, "arrow"):
                    producer.append(LogPartition(topic, first // MESSAGE_ROWS % partitions), payload, numbers[topic])


def _lake(folder: Path) -> tuple[LogConfig, WarehouseConfig]:
    from monolith_jax.lake.warehouse import WarehouseConfig, make_tables
    from monolith_jax.stream.log_source import LogConfig

    warehouse = WarehouseConfig(path=str(folder / "warehouse"))
    make_tables(warehouse)
    return LogConfig(url=f"file://{folder.absolute()}/log"), warehouse


def _follow(path: str, number: int, ready: Any, done: Any) -> None:
    """Reads `events` and `user_features` as they grow, in a process of its own; tells when all events are there."""
    from monolith_jax.lake.changelog import Changelog
    from monolith_jax.lake.warehouse import WarehouseConfig

    config = WarehouseConfig(path=path)
    events, features = Changelog(config, "events", 0), Changelog(config, "user_features", 0)
    ready.set()
    found = changed = 0
    while found < number:
        found += events.poll().rows.num_rows
        changed += features.poll().rows.num_rows
        time.sleep(0.05)
    # The last upserts are committed behind the last events.
    while rows := features.poll().rows.num_rows:
        changed += rows
    done.put((time.time(), found, changed))


def _run_ingest(log: LogConfig, warehouse: WarehouseConfig, folder: Path, commit_s: float) -> int:
    from monolith_jax.lake.counters import WindowCountsConfig
    from monolith_jax.lake.ingest import Ingest
    from monolith_jax.stream.dead_letter import DeadLetters

    letters, counts = DeadLetters(folder / "dead_letters.jsonl"), WindowCountsConfig(max_videos=100_000)
    with closing(Ingest(log, warehouse, letters, counts, 5.0)) as ingest:
        total = 0
        while ingest.unread():
            total += ingest.step(commit_s, 64 << 20)
    return total


def _warm(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compiles the kernels."""
    log, warehouse = _lake(folder)
    write_log(log.url, 20_000)
    _run_ingest(log, warehouse, folder, 0.2)
    return {}


def _ingest(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    log, warehouse = _lake(folder)
    write_log(log.url, asked.events)
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Queue()
    reader = spawn.Process(target=_follow, args=(warehouse.path, asked.events, ready, done), daemon=True)
    reader.start()
    ready.wait()
    began_s = time.time()
    total = _run_ingest(log, warehouse, folder, 1.0)
    ended_s = time.time()
    read_s, found, changed = done.get()
    reader.join()
    assert total == found == asked.events, (total, found, asked.events)
    return {
        "ingest_events_per_s": round(total / (max(read_s, ended_s) - began_s)),
        "ingest_upserts": changed,
        "ingest_written_events_per_s": round(total / (ended_s - began_s)),
    }


def _merged(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa

    from monolith_jax.lake.changelog import Changelog
    from monolith_jax.lake.commits import TableWriter
    from monolith_jax.lake.jobs import TidyConfig
    from monolith_jax.lake.tidy import compact

    _, warehouse = _lake(folder)
    rng = np.random.default_rng(0)

    def rows(ids: np.ndarray, time_ms: int) -> pa.Table:
        offsets = pa.array(np.arange(0, 4 * ids.size + 1, 4, dtype=np.int32))
        country = pa.DictionaryArray.from_arrays(rng.integers(0, 3, ids.size).astype(np.int32), ["at", "de", "fr"])
        country = country.cast(pa.string())
        times, some = pa.array(np.full(ids.size, time_ms)), rng.integers(0, 1 << 40, (3, ids.size))
        columns = {
            "user_id": pa.array(ids),
            "profile_ms": times,
            "country": country.cast(pa.string()),
            "age": pa.array(some[0]),
        }
        columns |= {"language": country, "activity_ms": times, "last_video_id": pa.array(some[1])}
        columns |= {"last_author_id": pa.array(some[2]), "last_duration_ms": pa.array(some[0])}
        columns["last_tag_id"] = pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 1000, 4 * ids.size)))
        return pa.Table.from_pydict(columns)

    written, read = [], []
    with closing(TableWriter(warehouse, "user_features", "bench")) as writer:
        for epoch in range(6):
            ids = np.arange(asked.rows) if epoch == 0 else rng.choice(asked.rows, asked.rows // 10, replace=False)
            table = rows(ids.astype(np.int64), epoch)
            began_s = time.perf_counter()
            writer.write(table)
            writer.commit(epoch, {})
            written.append(ids.size / (time.perf_counter() - began_s))
    for _ in range(5):
        began_s = time.perf_counter()
        assert Changelog(warehouse, "user_features").whole().num_rows == asked.rows
        read.append(asked.rows / (time.perf_counter() - began_s))
    began_s = time.perf_counter()
    before, after = compact(warehouse, "user_features", TidyConfig())
    compacted_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    assert Changelog(warehouse, "user_features").whole().num_rows == asked.rows
    return {
        "merged_read_rows_per_s": round(statistics.median(read)),
        "upserts_per_s": round(statistics.median(written)),
        "compacted_read_rows_per_s": round(asked.rows / (time.perf_counter() - began_s)),
        "compaction_s": round(compacted_s, 2),
        "compaction_files": [before, after],
    }


def _agreement(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Looks features up at the end of each epoch, in a cache and in a changelog's state, and in history afterwards."""
    import numpy as np
    import pyarrow as pa

    from monolith_jax.lake.changelog import Changelog
    from monolith_jax.lake.feature_history import FeatureHistory
    from monolith_jax.lake.versions import FeatureState
    from monolith_jax.serve.feature_cache import FeatureCache, FeatureCacheConfig

    log, warehouse = _lake(folder)
    write_log(log.url, 1_000_000)
    _run_ingest(log, warehouse, folder, 0.2)
    cache = FeatureCache(FeatureCacheConfig(max_users=400_000, max_videos=100_000))
    states = {one: FeatureState(one, 400_000, 4) for one in ("user", "video")}
    logs = {one: Changelog(warehouse, f"{one}_features_log", 0) for one in ("user", "video")}
    rng, epochs = np.random.default_rng(1), logs["user"].newest()
    each = -(-asked.lookups // (2 * epochs))
    asked_of, online, served = [], [], []
    for epoch in range(1, epochs + 1):
        newest = 0
        for subject in ("user", "video"):
            for batch in logs[subject].poll(epoch).rows.to_batches():
                cache.observe(subject, batch)
                states[subject].apply(batch)
                if subject == "user":
                    newest = max(newest, max(batch.column("event_time_ms").to_pylist(), default=0))
        times = np.full(each, newest)
        ids = {"user": rng.integers(0, 220_000, each), "video": (rng.random(each) ** 3 * 55_000).astype(np.int64)}
        asked_of.append(pa.record_batch({"user_id": ids["user"], "video_id": ids["video"], "event_time_ms": times}))
        online.append([states[one].as_of(ids[one], times) for one in ("user", "video")])
        served.append([cache.as_of(one, ids[one], newest) for one in ("user", "video")])
    columns = {one: states[one].columns for one in ("user", "video")}
    history = FeatureHistory(warehouse, (*columns["user"], *columns["video"]), 400_000)
    mismatches = checked = 0
    for examples, of_online, of_served in zip(asked_of, online, served, strict=True):
        joined = history.join(examples)
        for at, subject in enumerate(("user", "video")):
            wrong = np.zeros(each, np.bool_)
            for name in columns[subject]:
                mine = joined.column(name)
                for other in (of_online[at].column(name), of_served[at].column(name)):
                    wrong |= ~_equal(mine, other)
            mismatches += int(wrong.sum())
            checked += each
    return {"mismatches": mismatches, "agreement_lookups": checked} | _lookups(cache, warehouse)


def _equal(one: pa.Array, other: pa.Array) -> Any:
    """Returns where two columns hold the same, nulls too, bool [N]."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(one.type):
        return np.array([a == b for a, b in zip(one.to_pylist(), other.to_pylist(), strict=True)], np.bool_)
    same = pc.fill_null(pc.equal(one, other.cast(one.type)), False)  # pyright: ignore[reportAttributeAccessIssue]
    both = pc.and_(pc.is_null(one), pc.is_null(other))  # pyright: ignore[reportAttributeAccessIssue]
    return pc.or_(same, both).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]


def _lookups(cache: Any, warehouse: WarehouseConfig) -> dict[str, Any]:
    """Looks a thousand videos up, again and again, while changes are taken in."""
    import numpy as np

    from monolith_jax.lake.changelog import Changelog

    changes = Changelog(warehouse, "video_features", 0).poll().rows.to_batches(1000)
    stop, applied, took, rng = threading.Event(), [0], [], np.random.default_rng(2)

    def apply() -> None:
        while not stop.is_set():
            for batch in changes:
                cache.observe("video", batch)
                applied[0] += batch.num_rows
                if stop.wait(0.02):
                    return

    sys.setswitchinterval(0.0005)
    thread = threading.Thread(target=apply, daemon=True)
    thread.start()
    began_s = time.perf_counter()
    for _ in range(3000):
        ids = (rng.random(1000) ** 3 * 50_000).astype(np.int64)
        at_s = time.perf_counter()
        cache.videos(ids, START_MS + 60_000, ("video_views_5m", "video_likes_1h", "video_completes_1d", "video_duration_ms"))
        took.append(1000 * (time.perf_counter() - at_s))
        time.sleep(0.001)
    elapsed_s = time.perf_counter() - began_s
    stop.set()
    thread.join()
    return {
        "lookup_p50_ms": round(float(np.percentile(took, 50)), 3),
        "lookup_p99_ms": round(float(np.percentile(took, 99)), 3),
        "applied_rows_per_s": round(applied[0] / elapsed_s),
    }


def _profiles(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Changes profiles in a PostgreSQL of its own, and waits for each in a cache that follows the lake."""
    import numpy as np
    import psycopg2

    from launch.bench.lake_streams import TABLES
    from launch.bench.postgres_server import PostgresServer
    from monolith_jax.lake.feature_changes import FeatureChanges
    from monolith_jax.lake.postgres import PostgresConfig
    from monolith_jax.lake.profiles import Profiles
    from monolith_jax.serve.feature_cache import FeatureCache, FeatureCacheConfig

    _, warehouse = _lake(folder)
    server, cache, stop, took = PostgresServer(folder / "postgres"), FeatureCache(FeatureCacheConfig()), threading.Event(), []
    server.start()
    try:
        with closing(psycopg2.connect(server.dsn)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(TABLES)
            cursor.execute("INSERT INTO user_profiles SELECT i, 'de', 'de', 0 FROM generate_series(1, 1000) AS i")

            def follow() -> None:
                with closing(Profiles(PostgresConfig(dsn=server.dsn), warehouse)) as profiles:
                    while not stop.is_set():
                        profiles.step(0.2)

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            cache.follow(FeatureChanges(warehouse).follow(0.05))
            for age in range(1, asked.changes + 1):
                user = 1 + age % 1000
                cursor.execute("UPDATE user_profiles SET age = %s WHERE user_id = %s", (age, user))
                began_s = time.perf_counter()
                while cache.user(user, int(1000 * time.time()) + 1000, ("user_age",)).column(0)[0].as_py() != age:
                    time.sleep(0.002)
                    if time.perf_counter() - began_s > 60:
                        raise RuntimeError(f"a change of user {user} is not served after a minute: {cache.metrics()}")
                took.append(time.perf_counter() - began_s)
                time.sleep(0.1)
            stop.set()
            thread.join()
    finally:
        cache.close()
        server.stop()
    return {
        "profile_to_served_p50_s": round(float(np.percentile(took, 50)), 3),
        "profile_to_served_max_s": round(float(max(took)), 3),
    }


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="the lake")
    table.add_column("figure")
    table.add_column("", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int | float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
