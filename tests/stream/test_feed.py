import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.feed import Feed, Outlet, Pace
from monolith_jax.stream.formats import FORMATS, Schemas
from monolith_jax.stream.log import LogPartition
from monolith_jax.stream.partitions import partitions_of
from monolith_jax.stream.replayed import actions_of, impressions_of
from monolith_jax.stream.run_schema import conform
from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource
from monolith_jax.types import Chunk, Rejected
from tests.stream.memory_log import MemoryLog

TOPICS = ("impressions", "actions")


def chunks_of(num_examples: int = 1000, **fields: Any) -> Iterator[Chunk]:
    return SyntheticSource(SyntheticConfig(num_examples=num_examples, chunk_rows=256, **fields)).read({})


class Fed:
    """A log that was fed."""

    def __init__(
        self, pace: Pace, chunks: Iterator[Chunk], format: str = "arrow", most: int = 10**9, stop_after: int = 10**9
    ) -> None:
        self.log, self.format = MemoryLog(), format
        impressions, actions = (Outlet(self.log, Schemas(self.log, topic), topic, 3, format, 100) for topic in TOPICS)
        self.feed = Feed(self.log, impressions, actions, pace)
        self.outlets = (impressions, actions)
        self.waits = 0

        def wait(seconds: float) -> bool:
            time.sleep(seconds)
            self.waits += 1
            return self.waits > stop_after

        self.whole = self.feed.run(chunks, most, wait, lambda: None)

    def events(self, topic: str, partition: int | None = None) -> pa.RecordBatch:
        """Returns the events of a topic, by partition, in the order in which they were sent."""
        decoder = Decoder("impression" if topic == TOPICS[0] else "action", topic, self.format, Schemas(self.log, topic))
        found = []
        for number in range(3) if partition is None else [partition]:
            batch, rejected = decoder.decode(LogPartition(topic, number), self.log.topics[topic][number])
            assert not rejected
            found.append(batch)
        return pa.concat_batches([conform(batch, decoder.schema) for batch in found])


def expected() -> tuple[pa.RecordBatch, pa.RecordBatch]:
    impressions, actions, first = [], [], 0
    for chunk in chunks_of():
        impressions.append(impressions_of(chunk.examples, first))
        actions.append(actions_of(chunk.examples, impressions[-1])[0])
        first += len(chunk.examples)
    return pa.concat_batches(impressions), pa.concat_batches(actions)


def by_key(batch: pa.RecordBatch, names: list[str], without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    keys = ["request_id", *(["event_id"] if "event_id" in names else [])]
    kept = [name for name in names if name not in without]
    return batch.sort_by([(key, "ascending") for key in keys]).select(kept).to_pylist()


@pytest.mark.parametrize("format", FORMATS)
def test_all_events_are_in_the_log_with_whole_users(format: str) -> None:
    fed = Fed(Pace(), chunks_of(), format)
    assert fed.whole and fed.feed.examples == 1000 and not fed.feed.waiting
    for topic, wanted in zip(TOPICS, expected(), strict=True):
        for number in range(3):
            users = fed.events(topic, number).column("user_id").to_numpy()
            assert len(users) and (partitions_of(users, 3) == number).all()
        names = [name for name in wanted.schema.names if not name.startswith("optimal_")]  # float32 in another writing
        assert by_key(fed.events(topic), names) == by_key(wanted, names)
    impressions, actions = fed.outlets
    assert fed.feed.events == impressions.events + actions.events == sum(map(len, expected()))
    if format == "arrow":
        assert impressions.messages < 30, "messages are not filled"


def test_without_delay_events_are_in_order() -> None:
    fed = Fed(Pace(), chunks_of())
    for topic in TOPICS:
        times = fed.events(topic, 1).column("event_time_ms").to_numpy()
        assert (np.diff(times) >= 0).all()


def test_actions_come_late_and_out_of_order() -> None:
    fed = Fed(Pace(delay_s=60, shuffle_s=10), chunks_of())
    wanted = expected()
    for topic, given in zip(TOPICS, wanted, strict=True):
        without = ("event_time_ms",) if topic == "actions" else ()
        assert by_key(fed.events(topic), given.schema.names[:8], without) == by_key(given, given.schema.names[:8], without)
        times = fed.events(topic, 1).column("event_time_ms").to_numpy()
        back = np.maximum.accumulate(times) - times
        assert 0 < back.max() <= 10_000
    times = {one["request_id"]: one["event_time_ms"] for one in wanted[0].to_pylist()}
    late = [one["event_time_ms"] - times[one["request_id"]] for one in fed.events("actions").to_pylist()]
    assert min(late) >= 0 and 55_000 < np.mean(late) < 65_000
    again = Fed(Pace(delay_s=60, shuffle_s=10), chunks_of())
    assert again.events("actions").equals(fed.events("actions"))


def test_a_rate_is_kept_and_times_are_of_now() -> None:
    began = time.time()
    fed = Fed(Pace(rate=5000, restamp=True, linger_s=0.02), chunks_of())
    seconds = time.time() - began
    assert 0.8 < fed.feed.events / seconds / 5000 < 1.1
    times = fed.events("impressions").column("event_time_ms").to_numpy()
    assert abs(times.min() / 1000 - began) < 0.3 and abs(times.max() / 1000 - began - seconds) < 0.3
    assert len(np.unique(times)) > 300
    requests = fed.events("impressions").column("request_id").to_numpy()
    assert abs((requests.min() >> 20) / 1000 - began) < 0.3, "two trials would use the same requests"


def test_speed_follows_the_time_of_the_source() -> None:
    times = expected()[0].column("event_time_ms").to_numpy()
    source_s = (times[-1] - times[0]) / 1000
    began = time.monotonic()
    fed = Fed(Pace(speed=source_s, linger_s=0.01), chunks_of())
    assert fed.whole and 0.9 < time.monotonic() - began < 1.5 and fed.waits > 20


def test_it_stops_when_told() -> None:
    fed = Fed(Pace(speed=1), chunks_of(), stop_after=3)
    assert not fed.whole and fed.feed.waiting and fed.feed.events == len(fed.events("impressions")) + len(fed.events("actions"))


def test_so_many_examples_of_the_first_pass() -> None:
    assert Fed(Pace(), chunks_of(), most=300).feed.examples == 300
    bad = (Rejected("a.csv:2", "user_id is missing", ""),)
    chunks = (Chunk(chunk.examples, bad, {}, number // 2) for number, chunk in enumerate(chunks_of()))
    fed = Fed(Pace(), chunks)
    assert fed.feed.examples == 512 and fed.feed.set_aside == {"user_id is missing": 2}


def test_a_format_without_place_for_a_column_is_refused() -> None:
    chunk = next(iter(chunks_of(10)))
    examples = chunk.examples.append_column("pairs", pa.array([[1.0]] * 10))
    with pytest.raises(ValueError, match="no place for column 'pairs'"):
        Fed(Pace(), iter([Chunk(examples, (), {})]), "protobuf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speed": -1}, "speed is -1"),
        ({"rate": float("inf")}, "rate is inf"),
        ({"delay_s": float("nan")}, "delay_s is nan"),
        ({"linger_s": 0}, "linger_s is 0"),
        ({"speed": 1, "rate": 1}, "give one of them"),
    ],
)
def test_a_wrong_pace_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pace(**fields)
