"""Live streams under what goes wrong around them: skips, garbage, markers, clocks that are ahead, schemas that change."""

import itertools
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from monolith_jax.stream import live
from monolith_jax.stream.events import IMPRESSION
from monolith_jax.stream.joiner import JoinerConfig
from monolith_jax.stream.log import LogPartition
from tests.stream.event_log import START_MS, found_in, make_world, pieces, zip_longest
from tests.stream.test_live import chunks_of, feed, plain, source

ACTIONS, IMPRESSIONS = LogPartition("actions", 0), LogPartition("impressions", 0)


def test_what_comes_after_a_skip_is_read(tmp_path: Path) -> None:
    with closing(feed(tmp_path, partitions=1)) as events:
        start = last = int(1000 * time.time())
        for at_ms in range(start - 20_000, start):
            for partition in (IMPRESSIONS, ACTIONS):
                events.producer.append(partition, b"garbage", 7, at_ms)
        events.producer.flush()
        read = 0
        for chunk in itertools.islice(source(tmp_path, max_lag_s=8.0, ends=False).read({}), 6):
            read += len(chunk.rejected)
            now = int(1000 * time.time())
            for at_ms in range(last, now):  # A message a millisecond and topic, as before.
                for partition in (IMPRESSIONS, ACTIONS):
                    events.producer.append(partition, b"garbage", 7, at_ms)
            last = now
            events.producer.flush()
    assert read > 4096, "it skips and skips, and never reads"


def test_what_a_skip_drops_is_counted(tmp_path: Path) -> None:
    old_ms = int(1000 * (time.time() - 600))
    with closing(feed(tmp_path, partitions=1)) as events:
        producer: Any = events.producer
        append, times = producer.append, iter(range(old_ms, old_ms + 10**9, 1000))
        producer.append = lambda where, payload, schema=0: append(where, payload, schema, next(times))
        events.send("impressions", make_world(10).impressions)
        events.send_world(make_world(1000))
        producer.append = append
        events.send_world(make_world(1000, seed=1))
    before = None
    for chunk in source(tmp_path, max_lag_s=60.0).read({}):
        if chunk.position["skipped"]:
            break
        before = chunk
    assert before and before.told["open_impressions"]
    assert chunk.told.get("dropped_impressions") == before.told["open_impressions"]


def test_a_partition_that_brings_only_garbage_holds_nobody_up(tmp_path: Path) -> None:
    stop = threading.Event()
    with closing(feed(tmp_path, partitions=2)) as events:
        world = make_world(600)
        rows = [[row | {"user_id": 2 * row["user_id"]} for row in of] for of in (world.impressions, world.actions)]

        def send() -> None:
            for impressions, actions in zip_longest(pieces(rows[0], 10), pieces(rows[1], 20)):
                events.send("impressions", impressions)
                events.send("actions", actions)
                for topic in ("impressions", "actions"):
                    events.producer.append(LogPartition(topic, 1), b"garbage")
                events.producer.flush()
                if stop.wait(0.02):
                    return
            while not stop.wait(0.02):
                for topic in ("impressions", "actions"):
                    events.producer.append(LogPartition(topic, 1), b"garbage")
                events.producer.flush()

        thread = threading.Thread(target=send)
        thread.start()
        try:
            until, found = time.monotonic() + 4, 0
            for chunk in source(tmp_path, ends=False).read({}):
                found += chunk.examples.num_rows
                if found or time.monotonic() > until:
                    break
        finally:
            stop.set()
            thread.join()
    assert found, "no example came within 4 s, though idle_s is 0.3"


def test_the_joiner_is_rebuilt_by_the_schemas_of_then(tmp_path: Path) -> None:
    world = make_world(400)
    with closing(feed(tmp_path, partitions=1)) as events:
        for index, rows in enumerate(pieces(world.impressions, 50)):
            # A column that is empty at first, and has another type when it is filled.
            kind, value = (pa.int64(), 1) if index >= 4 else (pa.string(), None)
            events.send("impressions", [dict(row, more=value) for row in rows], IMPRESSION.append(pa.field("more", kind)))
        events.send("actions", world.actions)
    whole = chunks_of(source(tmp_path))
    assert found_in([chunk.examples for chunk in whole]) == world.examples
    for index, chunk in enumerate(whole):
        assert plain(chunks_of(source(tmp_path), chunk.position)) == plain(whole[index + 1 :])


class Gaps:
    """A log whose last offset holds no message, as behind a transaction in Kafka."""

    def __init__(self, log: Any) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def bounds(self, partition: LogPartition, within_s: float = 0.0) -> tuple[int, int]:
        first, end = self._log.bounds(partition)
        return first, end + (not partition.topic.endswith("-schemas"))

    def at(self, partition: LogPartition) -> int:
        # The marker is passed once it is known of.
        at, end = self._log.at(partition), self._log.bounds(partition)[1]
        return at + (at == end)

    def read_to(self, partition: LogPartition, end: int) -> Any:
        return self._log.read_to(partition, min(end, self._log.bounds(partition)[1]))


def test_a_log_that_ends_with_a_marker_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(feed(tmp_path)) as events:
        events.send_world(make_world(100))
    open_log: Any = live.open_log
    monkeypatch.setattr(live, "open_log", lambda *arguments: Gaps(open_log(*arguments)))
    until, ended = time.monotonic() + 4, True
    for _ in source(tmp_path).read({}):
        if time.monotonic() > until:
            ended = False
            break
    assert ended


def test_a_partition_that_ends_with_a_marker_goes_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(600)
    with closing(feed(tmp_path, partitions=2)) as events:
        for rows in (world.impressions, world.actions):
            for index, row in enumerate(rows):
                # One partition ends early.
                row["user_id"] = index % 2 if index < 100 else 0
        events.send_world(world)
    open_log: Any = live.open_log
    monkeypatch.setattr(live, "open_log", lambda *arguments: Gaps(open_log(*arguments)))
    until, found = time.monotonic() + 3, 0
    for chunk in source(tmp_path, ends=False).read({}):
        found += chunk.examples.num_rows
        if found > 100 or time.monotonic() > until:
            break
    assert found > 100, f"the watermark stands still: {found} examples"


def test_one_event_that_is_ahead_makes_no_others_late(tmp_path: Path) -> None:
    world, now_ms = make_world(1000), int(1000 * time.time())
    ahead_ms = now_ms + 50 * 60_000
    for row in (*world.impressions, *world.actions):
        row["event_time_ms"] += now_ms - 1000 - START_MS  # As they happen.
    with closing(feed(tmp_path, partitions=1)) as events:
        for index, (impressions, actions) in enumerate(zip_longest(pieces(world.impressions, 50), pieces(world.actions, 100))):
            events.send("impressions", impressions)
            events.send("actions", actions)
            if index == 3:
                events.send("impressions", [world.impressions[0] | {"request_id": 10**6, "event_time_ms": ahead_ms}])
                events.send("actions", [world.actions[0] | {"request_id": 10**6, "event_time_ms": ahead_ms}])
    live = source(tmp_path, joiner=JoinerConfig(window_s=60.0), ahead_s=1e6)
    assert chunks_of(live)[-1].position["counts"]["late_impressions"] == 0
