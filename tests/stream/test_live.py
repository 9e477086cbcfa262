"""A live stream from a log: every example once, whatever is interrupted, and whatever comes in between."""

import json
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.stream.batcher import batches
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.events import ACTION
from monolith_jax.stream.formats import announce, encode
from monolith_jax.stream.joiner import JoinerConfig
from monolith_jax.stream.log import LogPartition
from monolith_jax.stream.log_source import LogConfig, LogSource
from monolith_jax.types import Chunk
from tests.stream.event_log import START_MS, Feed, found_in, make_world

JOINER = JoinerConfig(window_s=3.0)


def config(folder: Path, **fields: Any) -> LogConfig:
    fields = {"joiner": JOINER, "ends": True, "max_wait_s": 0.05, "idle_s": 0.3, "poll_bytes": 8000, **fields}
    return LogConfig(url=f"file://{folder}/log", **fields)


def source(folder: Path, index: int = 0, number: int = 1, run: str = "run", max_lag_s: float = 1e9, **fields: Any) -> LogSource:
    return LogSource(config(folder, **fields), folder / run / str(index), 32, index, number, max_lag_s)


def feed(folder: Path, **fields: Any) -> Feed:
    return Feed(f"file://{folder}/log", **fields)


def chunks_of(one: LogSource, position: Any = None) -> list[Chunk]:
    return list(one.read(json.loads(json.dumps(position or {}))))


def plain(chunks: list[Chunk]) -> list[Any]:
    """Returns all that must be the same when it is read again."""
    return [(one.examples.to_pydict(), one.rejected, one.position, one.ends_batch) for one in chunks]


@pytest.mark.parametrize("format", ["arrow", "json"])
@pytest.mark.parametrize("number", [1, 2])
def test_every_impression_is_an_example_with_all_that_followed(tmp_path: Path, number: int, format: str) -> None:
    world = make_world(1500)
    with closing(feed(tmp_path, format=format)) as events:
        events.send_world(world)
    parts = [chunks_of(source(tmp_path, index, number, format=format)) for index in range(number)]
    assert found_in([chunk.examples for chunks in parts for chunk in chunks]) == world.examples
    for chunks in parts:
        times = [row for chunk in chunks for row in chunk.examples.to_pydict().get("event_time_ms", [])]
        assert times == sorted(times) and len(times) > 300
        assert not any(chunk.rejected for chunk in chunks)
        counts = chunks[-1].position["counts"]
        assert counts["examples"] == len(times) and not counts["late_impressions"] and not counts["late_or_orphan_actions"]


def test_reading_goes_on_exactly_from_every_position(tmp_path: Path) -> None:
    with closing(feed(tmp_path)) as events:
        events.send_world(make_world(400))
    whole = chunks_of(source(tmp_path))
    assert len(whole) > 10
    for index, chunk in enumerate(whole):
        rest = chunks_of(source(tmp_path), chunk.position)
        assert plain(rest) == plain(whole[index + 1 :])
    assert plain(chunks_of(source(tmp_path))) == plain(whole), "from the start too, by the cuts that are written"


def test_batches_go_on_exactly(tmp_path: Path) -> None:
    with closing(feed(tmp_path)) as events:
        events.send_world(make_world(300))
    whole, states = [], [{}]
    with closing(batches(source(tmp_path), 32)) as iterator:
        for batch in iterator:
            whole.append(batch.examples)
            states.append(iterator.get_state())
    assert len(whole) == 10 and sum(map(len, whole)) == 300
    for index in (1, 4, 9):
        with closing(batches(source(tmp_path), 32)) as iterator:
            iterator.set_state(json.loads(json.dumps(states[index])))
            rest = [batch.examples for batch in iterator]
        assert [batch.to_pydict() for batch in rest] == [batch.to_pydict() for batch in whole[index:]]


def send_slowly(events: Feed, rows: Any, stop: threading.Event) -> None:
    for impressions, actions in rows:
        events.send("impressions", impressions)
        events.send("actions", actions)
        events.producer.flush()
        if stop.wait(0.01):
            return


def test_a_run_that_is_cut_off_again_and_again_loses_and_repeats_nothing(tmp_path: Path) -> None:
    world = make_world(1200)
    from tests.stream.event_log import pieces, zip_longest

    events, stop = feed(tmp_path, batch=20), threading.Event()
    rows = list(zip_longest(pieces(world.impressions, 20), pieces(world.actions, 40)))
    thread = threading.Thread(target=send_slowly, args=(events, rows, stop))
    thread.start()
    live = source(tmp_path, ends=False)
    taken: list[Chunk] = []
    kept, position = 0, {}
    for turn in range(12):
        for chunk in live.read(position):
            taken.append(chunk)
            if len(taken) >= kept + 15 + turn:
                break
        # The last few are not in the snapshot.
        kept = max(kept, len(taken) - 7)
        again = taken[kept:]
        del taken[kept:]
        position = json.loads(json.dumps(taken[-1].position))
        replayed = []
        for chunk in live.read(position):
            replayed.append(chunk)
            if len(replayed) == len(again):
                break
        assert plain(replayed) == plain(again)
    thread.join()
    events.close()
    for chunk in live.read(position):
        taken.append(chunk)
        if chunk.position["watermark_ms"] >= START_MS + 1200 * 10 and chunk.told["lag_messages"] == 0:
            break
    found = found_in([chunk.examples for chunk in taken])
    open_ones = taken[-1].told["open_impressions"]
    assert len(found) + open_ones == 1200 and all(world.examples[key] == row for key, row in found.items())
    assert len(found) > 700


def test_short_batches_end_when_they_have_waited(tmp_path: Path) -> None:
    world = make_world(200, step_ms=100)
    with closing(feed(tmp_path)) as events:
        events.send_world(world)
        taken = []
        for chunk in source(tmp_path, ends=False).read({}):
            taken.append(chunk)
            if len(taken) > 5 and [one.ends_batch for one in taken[-2:]] == [True, True]:
                break
    assert sum(len(chunk.examples) for chunk in taken) > 100
    assert taken[-1].examples.num_rows == 0, "a turn in which nothing came"


def test_what_is_no_event_is_set_aside_with_its_offset(tmp_path: Path) -> None:
    world = make_world(100)
    with closing(feed(tmp_path)) as events:
        events.send_world(world)
        for payload in (b"", b"garbage", b"\\0" * 100):
            events.producer.append(LogPartition("actions", 1), payload, 7)
        late = START_MS + 50_000_000_000_000
        events.send("impressions", [world.impressions[0] | {"event_time_ms": late}])
        events.send("impressions", [world.impressions[0] | {"event_time_ms": int(1000 * time.time()) + 7_200_000}])
    chunks = chunks_of(source(tmp_path))
    rejected = [row for chunk in chunks for row in chunk.rejected]
    assert sorted({row.reason for row in rejected}) == [
        "empty message", "time is ahead of the log", "time out of range", "unknown schema number",
    ]  # fmt: skip
    assert len(rejected) == 5 and all("@" in row.where for row in rejected)
    assert found_in([chunk.examples for chunk in chunks]) == world.examples


@pytest.mark.parametrize("number", [3_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_mutated_messages_stop_nothing_and_are_all_in_the_dead_letters(tmp_path: Path, number: int) -> None:
    world, rng = make_world(200), np.random.default_rng(0)
    good = encode(pa.RecordBatch.from_pylist(world.actions[:50], ACTION), "arrow")[0]
    texts = pa.schema([*(field for field in ACTION if field.name != "user_id"), pa.field("user_id", pa.string())])
    wrong = encode(pa.RecordBatch.from_pylist([{**row, "user_id": "x"} for row in world.actions[:9]], texts), "arrow")[0]
    with closing(feed(tmp_path)) as events:
        events.send_world(world)
        right, other = (announce(events.producer, events.schemas["actions"], "actions", one) for one in (ACTION, texts))
        for index, kind in enumerate(rng.integers(0, 6, number).tolist()):
            payload, schema = good, right
            if kind == 0:
                payload = good[: rng.integers(0, len(good))]
            elif kind == 1:
                at = int(rng.integers(0, len(good)))
                payload = good[:at] + bytes([good[at] ^ (1 << int(rng.integers(0, 8)))]) + good[at + 1 :]
            elif kind == 2:
                payload = rng.bytes(int(rng.integers(1, 200)))
            elif kind == 3:
                payload, schema = wrong, other
            elif kind == 4:
                schema = int(rng.integers(1, 2**63))
            else:
                payload = b"\1" * (17 << 20) if index < 60 else b""
            events.producer.append(LogPartition("actions", index % 4), payload, schema)
    letters, examples = DeadLetters(tmp_path / "dead_letters.jsonl"), []
    with closing(batches(source(tmp_path, poll_bytes=1 << 20), 32)) as found:
        for batch in found:
            letters.add(batch.rejected)
            examples.append(batch.examples)
    assert found_in([one for one in examples if one.num_rows]) == world.examples
    rows = [json.loads(line) for line in (tmp_path / "dead_letters.jsonl").read_text().splitlines()]
    assert len({row["where"] for row in rows}) == len(rows) == number and all("actions/" in row["where"] for row in rows)
    assert {"unknown schema number", "empty message", "larger than 16777216 bytes"} < set(letters.counts)


def test_a_run_that_is_too_far_behind_skips_ahead_and_says_so(tmp_path: Path) -> None:
    old_ms = int(1000 * (time.time() - 600))
    with closing(feed(tmp_path, partitions=1)) as events:
        producer: Any = events.producer
        append, times = producer.append, iter(range(old_ms, old_ms + 10**9, 1000))
        producer.append = lambda where, payload, schema=0: append(where, payload, schema, next(times))
        events.send_world(make_world(1000))
        producer.append = append
        events.send_world(make_world(1000, seed=1))
    chunks = chunks_of(source(tmp_path, max_lag_s=60.0))
    skipped = chunks[-1].position["skipped"]
    assert skipped > 30 and chunks[-1].told["skipped_messages"] == skipped
    assert 1000 <= sum(len(chunk.examples) for chunk in chunks) < 1200
    assert plain(chunks_of(source(tmp_path, max_lag_s=60.0), chunks[3].position)) == plain(chunks[4:])


def test_partitions_that_are_added_are_read_from_their_start(tmp_path: Path) -> None:
    first, second = make_world(200), make_world(200, seed=1)
    with closing(feed(tmp_path, partitions=2)) as events:
        events.send_world(first)
    one = source(tmp_path, number=2)
    before = chunks_of(one)
    position = before[-1].position
    assert not [key for key in position["next"] if not key.endswith("/0")]
    for topic in ("impressions", "actions"):
        for number in (2, 3):
            (tmp_path / "log" / topic / str(number)).mkdir()
    with closing(feed(tmp_path, partitions=4)) as events:
        rows = [dict(row, request_id=row["request_id"] + 10**6) for row in second.impressions]
        events.send("impressions", rows)
    after: Any = source(tmp_path, number=2, ends=False).read(json.loads(json.dumps(position)))
    with closing(after):
        for chunk in after:
            if chunk.position["next"].get("impressions/2"):
                break
        assert sorted(chunk.position["next"]) == ["actions/0", "actions/2", "impressions/0", "impressions/2"]


def test_a_log_that_has_grown_is_read_on(tmp_path: Path) -> None:
    first, second = make_world(100), make_world(100, seed=1)
    with closing(feed(tmp_path)) as events:
        events.send_world(first)
        before = chunks_of(source(tmp_path))
        assert chunks_of(source(tmp_path), before[-1].position) == []
        # A day later, of other requests.
        for rows in (second.impressions, second.actions):
            for row in rows:
                row.update(event_time_ms=row["event_time_ms"] + 86_400_000, request_id=row["request_id"] + 1000)
        events.send_world(second)
    after = chunks_of(source(tmp_path), before[-1].position)
    assert len(found_in([chunk.examples for chunk in (*before, *after)])) == 200
    assert plain(chunks_of(source(tmp_path), before[3].position)) == plain([*before[4:], *after])


@pytest.mark.parametrize(
    ("partitions", "number", "told"),
    [
        ((4, 2), 1, "equally many partitions and one key, got 4 of 'impressions2', 2 of 'actions2'"),
        ((4, 4), 3, "does not divide the 4"),
    ],
)
def test_topics_that_cannot_be_divided_are_refused(tmp_path: Path, partitions: Any, number: int, told: str) -> None:
    with closing(feed(tmp_path)) as events:
        for topic, many in zip(("impressions", "actions"), partitions, strict=True):
            events.producer.create(topic + "2", many)
    topics: dict[str, Any] = {"impressions": "impressions2", "actions": "actions2"}
    with pytest.raises(ValueError, match=told):
        chunks_of(source(tmp_path, number=number, **topics))


def test_columns_may_be_added_while_the_stream_runs(tmp_path: Path) -> None:
    world = make_world(400)
    from monolith_jax.stream.events import IMPRESSION
    from tests.stream.event_log import pieces

    with closing(feed(tmp_path)) as events:
        for index, rows in enumerate(pieces(world.impressions, 50)):
            schema = IMPRESSION.append(pa.field("surface", pa.string())) if index >= 4 else IMPRESSION
            events.send("impressions", [dict(row, surface="feed") for row in rows], schema)
        events.send("actions", world.actions)
    chunks = chunks_of(source(tmp_path))
    assert found_in([chunk.examples for chunk in chunks]) == world.examples
    surfaces = [row.get("surface") for chunk in chunks for row in chunk.examples.to_pylist()]
    assert surfaces.count("feed") == 200
    for index in (3, len(chunks) // 2):
        assert plain(chunks_of(source(tmp_path), chunks[index].position)) == plain(chunks[index + 1 :])
