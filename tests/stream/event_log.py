"""A small log of impressions and actions whose examples are known."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.stream.events import ACTION, IMPRESSION
from monolith_jax.stream.formats import Schemas, announce, encode
from monolith_jax.stream.log import LogPartition, open_log, open_producer

START_MS = 1_700_000_000_000
NAMES = ("click", "like", "play", "dwell")
Row = dict[str, Any]


class World(NamedTuple):
    """Events in the order in which they are appended, and what they make."""

    impressions: list[Row]
    actions: list[Row]
    examples: dict[tuple[int, int], Row]
    """By request and video: event time and what followed."""


def make_world(number: int, seed: int = 0, step_ms: int = 10, delay_ms: int = 2000, disorder_ms: int = 500) -> World:
    """Returns a world in which every action comes within `delay_ms` of its impression, and time is out of order a little."""
    rng = np.random.default_rng(seed)
    impressions, actions, examples = [], [], {}
    for index in range(number):
        time_ms = START_MS + index * step_ms
        user, video = int(rng.integers(0, 50)), int(rng.integers(0, 1000))
        key = {"request_id": index // 4, "user_id": user, "video_id": 4 * video + index % 4}
        impressions.append(key | {"event_time_ms": time_ms, "duration_ms": 9000, "tag_id": [1, 2][: index % 3]})
        outcome: Row = {"event_time_ms": time_ms, "click": False, "like": False, "play_time_ms": None, "dwell_ms": None}
        for name in NAMES:
            if rng.random() < 0.4:
                at_ms = time_ms + int(rng.integers(-200, delay_ms))
                value = int(rng.integers(0, 9999)) if name in ("play", "dwell") else None
                event = {"event_time_ms": at_ms, "action": name, "value": value, "event_id": len(actions)}
                actions.append(key | event)
                outcome[{"play": "play_time_ms", "dwell": "dwell_ms"}.get(name, name)] = True if value is None else value
        examples[key["request_id"], key["video_id"]] = outcome
    noise = rng.integers(0, disorder_ms + 1, len(impressions) + len(actions))
    order = [row["event_time_ms"] for row in (*impressions, *actions)] + noise
    impressions = [impressions[i] for i in np.argsort(order[: len(impressions)], kind="stable")]
    actions = [actions[i] for i in np.argsort(order[len(impressions) :], kind="stable")]
    return World(impressions, actions, examples)


def pieces(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Yields neighbours."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


class Feed:
    """Appends worlds to a log, by user."""

    def __init__(self, url: str, partitions: int = 4, format: str = "arrow", batch: int = 50) -> None:
        self.producer = open_producer(url)
        self.partitions, self.format, self.batch = partitions, format, batch
        for topic in ("impressions", "actions"):
            self.producer.create(topic, partitions)
        self.log = open_log(url)
        self.schemas = {topic: Schemas(self.log, topic) for topic in ("impressions", "actions")}

    def send(self, topic: str, rows: Sequence[Row], schema: pa.Schema | None = None) -> None:
        """Appends rows, each to the partition of its user."""
        schema = schema or (IMPRESSION if topic == "impressions" else ACTION)
        number = announce(self.producer, self.schemas[topic], topic, schema) if self.format == "arrow" else 0
        for partition in range(self.partitions):
            mine = [row for row in rows if row["user_id"] % self.partitions == partition]
            if mine:
                batch = pa.RecordBatch.from_pylist(mine, schema)
                for payload in encode(batch, self.format):
                    self.producer.append(LogPartition(topic, partition), payload, number)

    def send_world(self, world: World) -> None:
        """Appends all of a world, both topics in turns."""
        for impressions, actions in zip_longest(pieces(world.impressions, self.batch), pieces(world.actions, 2 * self.batch)):
            self.send("impressions", impressions)
            self.send("actions", actions)
        self.producer.flush()

    def close(self) -> None:
        """Flushes and lets go."""
        self.producer.close()
        self.log.close()


def zip_longest(one: Iterator[Sequence[Row]], other: Iterator[Sequence[Row]]) -> Iterator[tuple[Sequence[Row], Sequence[Row]]]:
    """Yields pairs until both have ended."""
    while True:
        a, b = next(one, None), next(other, None)
        if a is None and b is None:
            return
        yield a or (), b or ()


def found_in(batches: Sequence[pa.RecordBatch]) -> dict[tuple[int, int], Row]:
    """Returns what batches of examples hold, as `World.examples`; fails where one stands there twice."""
    found: dict[tuple[int, int], Row] = {}
    for batch in batches:
        for row in batch.to_pylist():
            key = row["request_id"], row["video_id"]
            assert key not in found, f"{key} came twice"
            found[key] = {name: row[name] for name in ("event_time_ms", "click", "like", "play_time_ms", "dwell_ms")}
    return found
