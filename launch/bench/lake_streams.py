"""What fills the lake's features beside the events: `python -m launch.bench.lake_streams --help`.

Windowed counters of videos (one core), and profiles that are followed in a PostgreSQL that is started for it: rows at the
start, changes, and how long after a COMMIT a change is in hand. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

    from launch.bench.postgres_server import PostgresServer

EVENTS_PER_S = 10_000
"""Of event time."""
BATCH = 65_536
OUT_OF_ORDER_S = 10.0
TABLES = """
CREATE TABLE user_profiles (user_id bigint PRIMARY KEY, country text, language text, age integer);
CREATE TABLE video_profiles (
    video_id bigint PRIMARY KEY, author_id bigint, sound_id bigint, tag_id bigint[], duration_ms integer, quality float8
);
ALTER TABLE user_profiles REPLICA IDENTITY FULL;
ALTER TABLE video_profiles REPLICA IDENTITY FULL;
"""


def make_events(number: int, num_videos: int, seed: int = 0) -> list[tuple[pa.RecordBatch, pa.RecordBatch, int]]:
    """Returns impressions, actions and the newest time of each batch: half are impressions, most of the rest are plays."""
    import numpy as np
    import pyarrow as pa

    generator = np.random.default_rng(seed)
    times = 1_800_000_000_000 + np.arange(number) * 1000 // EVENTS_PER_S + generator.integers(0, 2000, number)
    videos = (generator.random(number) ** 3 * num_videos).astype(np.int64)
    durations = generator.integers(5_000, 60_000, number)
    kinds = generator.random(number)
    shown = np.flatnonzero(kinds < 0.5)
    names = np.where(kinds < 0.9, "play", np.where(kinds < 0.95, "like", "share"))
    batches = []
    for start in range(0, number, BATCH):
        rows = np.arange(start, min(start + BATCH, number))
        seen, done = rows[kinds[rows] < 0.5], rows[kinds[rows] >= 0.5]
        # What is done was shown up to five seconds before.
        of = shown[np.maximum(np.searchsorted(shown, done - generator.integers(1, 5 * EVENTS_PER_S, done.size)), 0)]
        columns = {"event_time_ms": times, "request_id": np.arange(number) // 10, "video_id": videos, "duration_ms": durations}
        impressions = pa.record_batch({name: column[seen] for name, column in columns.items()})
        # The last one may have been shown after it was done: then it is not matched.
        actions = {"request_id": of // 10, "video_id": videos[of], "event_time_ms": times[done]}
        actions |= {
            "action": pa.array(names[done]),
            "value": (durations[of] * generator.random(done.size) * 2).astype(np.int64),
        }
        batches.append((impressions, pa.record_batch(actions), int(times[rows].max())))
    return batches


def measure_counters(number: int, num_videos: int) -> dict[str, float]:
    """Returns how many events are counted a second, and how many rows that makes."""
    from monolith_jax.lake.counters import WindowCounts, WindowCountsConfig

    batches = make_events(number, num_videos)
    for last in (1, len(batches)):  # the first time for the compilers
        counts, rows = WindowCounts(WindowCountsConfig()), 0
        start = time.perf_counter()
        for impressions, actions, newest_ms in batches[:last]:
            counts.add_impressions(impressions)
            counts.add_actions(actions)
            out = counts.advance(newest_ms - int(1000 * OUT_OF_ORDER_S))
            rows += sum(batch.num_rows for batch in out.values())
        seconds = time.perf_counter() - start
    return {"counted_events_per_s": round(number / seconds), "counter_rows": rows}


def measure_profiles(server: PostgresServer, number: int) -> dict[str, float]:
    """Returns rows a second at the start, changes a second, and milliseconds from COMMIT to a row in hand."""
    import psycopg2

    from monolith_jax.lake.postgres import START, PostgresConfig, ProfileReader

    connection = psycopg2.connect(server.dsn)
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute(TABLES)
    cursor.execute("INSERT INTO user_profiles SELECT i, 'de', 'de', i %% 90 FROM generate_series(1, %s) i", (number,))
    reader, rows, start = ProfileReader(PostgresConfig(server.dsn)), 0, time.perf_counter()
    while (changes := reader.poll(1.0)).position == START:
        rows += changes.num_rows
    figures: dict[str, float] = {"profile_rows_per_s": round(rows / (time.perf_counter() - start))}
    reader.poll(0.1)
    late_ms = []
    for age in range(200):
        cursor.execute("UPDATE user_profiles SET age = %s WHERE user_id = %s", (age, 1 + age % number))
        committed = time.perf_counter()
        changes = reader.poll(10.0)
        late_ms.append(1000 * (time.perf_counter() - committed))
        if changes.num_rows != 1:
            raise ValueError(f"one change was made, and {changes.num_rows} came")
        reader.confirm(changes.position)
    late_ms.sort()
    figures |= {"profile_latency_p50_ms": round(late_ms[100], 2), "profile_latency_p99_ms": round(late_ms[197], 2)}
    cursor.execute("UPDATE user_profiles SET age = age + 1")
    tags = "INSERT INTO video_profiles SELECT i, 2, 3, '{4,5,6}', 1000, 0.5 FROM generate_series(1, %s) i"
    cursor.execute(tags, (number // 4,))
    wanted, rows, start = number + number // 4, 0, time.perf_counter()
    while rows < wanted:
        rows += reader.poll(10.0).num_rows
    figures["profile_changes_per_s"] = round(rows / (time.perf_counter() - start))
    reader.close()
    connection.close()
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.lake_streams",
        description=__doc__,
        epilog="example:\n  python -m launch.bench.lake_streams",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--events", type=int, default=4_000_000, help="events that are counted")
    parser.add_argument("--videos", type=int, default=100_000, help="videos that they are of")
    parser.add_argument("--profiles", type=int, default=400_000, help="rows of user_profiles")
    arguments = parser.parse_args(argv)
    from launch.bench.postgres_server import PostgresServer, missing

    figures = measure_counters(arguments.events, arguments.videos)
    if why := missing():
        print(why, file=sys.stderr)
    else:
        with tempfile.TemporaryDirectory() as folder:
            server = PostgresServer(Path(folder))
            server.start()
            try:
                figures |= measure_profiles(server, arguments.profiles)
            finally:
                server.stop()
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
