"""Feeds a log with the events of a source, at the pace that they had or another one.

In: examples, and a `Producer`. Out: messages in two topics, impressions and actions, both divided by users. Events are sent in
the order in which they are due: an impression at its time, an action some time after, both with some disorder on top. With a
rate, or with times of now, a clock of its own takes the place of the source's.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from monolith_jax.stream.formats import Schemas, announce, check_format, encode
from monolith_jax.stream.log import LogPartition, Producer
from monolith_jax.stream.partitions import partitions_of
from monolith_jax.stream.replayed import Waiting, actions_of, impressions_of
from monolith_jax.types import Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When events are sent, and what time they say that it is."""

    speed: float = 0.0
    """Seconds of the source's time in a second; 0: as fast as it goes."""
    rate: float = 0.0
    """Events in a second, impressions and actions together, whatever the source's time; 0: by `speed`."""
    restamp: bool = False
    """Whether an event's time becomes the time at which it is due to be sent, before `shuffle_s`."""
    delay_s: float = 0.0
    """Mean time from an impression to each of its actions, exponential; in the source's time, or true time with a rate."""
    shuffle_s: float = 0.0
    """An event is sent up to so much later than its time."""
    linger_s: float = 0.1
    """A message that is not full is sent after so long."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of its range."""
        for name in ("speed", "rate", "delay_s", "shuffle_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number that is not negative")
        if not 0.001 <= self.linger_s <= 60:
            raise ValueError(f"linger_s is {self.linger_s}; expected seconds from 0.001 to 60")
        if self.speed and self.rate:
            raise ValueError(
                f"speed is {self.speed} and rate {self.rate}: give one of them; a rate needs no time of the source"
            )


def _ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yields chunks, the next of which is made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, chunks, None)
            yield chunk


class Outlet:
    """Writes events of one topic: gathers them by partition until a message is full."""

    def __init__(self, producer: Producer, schemas: Schemas, topic: str, partitions: int, format: str, batch_rows: int) -> None:
        """Makes the topic unless it is there.

        Args:
            producer: Of the log.
            schemas: Of the topic.
            topic: Where to write.
            partitions: How many the topic has.
            format: One of `formats.FORMATS`.
            batch_rows: Events of a full message; in a format of single events, so many are sent together.

        Raises:
            ValueError: The topic is there with other partitions, or there is no such format.
        """
        check_format(format)
        self._producer, self._schemas, self._topic, self._format = producer, schemas, topic, format
        self._partitions, self._batch_rows = partitions, batch_rows
        self._open: list[list[pa.RecordBatch]] = [[] for _ in range(partitions)]
        self._schema: pa.Schema | None = None
        self._number = 0
        self.events = self.messages = self.bytes = 0
        """What was sent."""
        producer.create(topic, partitions)

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes events; sends those that fill a message.

        Raises:
            ValueError: The format has no place for a column.
            OSError: The log does not take them.
        """
        if self._schema is None or not batch.schema.equals(self._schema):
            self.send_rest()
            self._schema = batch.schema
            self._number = announce(self._producer, self._schemas, self._topic, batch.schema) if self._format == "arrow" else 0
        partitions = partitions_of(batch.column("user_id").to_numpy(), self._partitions)
        batch = batch.take(pa.array(np.argsort(partitions, kind="stable")))
        ends = np.cumsum(np.bincount(partitions, minlength=self._partitions))
        for number, end in enumerate(ends.tolist()):
            first = int(ends[number - 1]) if number else 0
            if end > first:
                self._open[number].append(batch.slice(first, end - first))
                if sum(map(len, self._open[number])) >= self._batch_rows:
                    self._send_full(number)

    def _send_full(self, number: int) -> None:
        batch = pa.concat_batches(self._open[number])
        full = len(batch) // self._batch_rows * self._batch_rows
        for first in range(0, full, self._batch_rows):
            self._send(number, batch.slice(first, self._batch_rows))
        self._open[number] = [batch.slice(full)] if full < len(batch) else []

    def _send(self, number: int, batch: pa.RecordBatch) -> None:
        partition = LogPartition(self._topic, number)
        for payload in encode(batch, self._format):
            self._producer.append(partition, payload, self._number)
            self.messages += 1
            self.bytes += len(payload)
        self.events += len(batch)

    def send_rest(self) -> None:
        """Sends what waits for more."""
        for number, batches in enumerate(self._open):
            if batches:
                self._send(number, pa.concat_batches(batches))
                self._open[number] = []


class Feed:
    """Sends the events of chunks, each when it is due."""

    def __init__(self, producer: Producer, impressions: Outlet, actions: Outlet, pace: Pace, seed: int = 0) -> None:
        """Sends nothing yet.

        Args:
            producer: What both outlets append to.
            impressions: Where impressions go.
            actions: Where actions go.
            pace: When they go.
            seed: Of delays and disorder.
        """
        self._producer, self._outlets, self._pace = producer, (impressions, actions), pace
        self._waiting = (Waiting(), Waiting())
        self._rng = np.random.default_rng(seed)
        self._speed = 1.0 if pace.rate else pace.speed
        self._flushed = 0.0
        self._began: tuple[float, float, float] | None = None
        """The monotonic time, the Unix time in ms and the clock of the events when the first was sent."""
        self._clock_ms = 0.0
        self._first_request = time.time_ns() // 1_000_000 << 20 if pace.restamp else 0
        self.examples = 0
        """Examples taken apart."""
        self.set_aside: Counter[str] = Counter()
        """Rows that the source set aside, by reason."""

    @property
    def events(self) -> int:
        """Events sent."""
        return sum(outlet.events for outlet in self._outlets)

    @property
    def waiting(self) -> int:
        """Events that are not due yet."""
        return sum(map(len, self._waiting))

    def run(self, chunks: Iterator[Chunk], max_examples: int, wait: Callable[[float], bool], told: Callable[[], None]) -> bool:
        """Sends the first pass of a source.

        Args:
            chunks: Of the source.
            max_examples: Ends after so many.
            wait: Waits so many seconds; returns whether to stop.
            told: Called now and then.

        Returns:
            Whether all of it was sent; else `wait` said stop, and what was not due yet is not sent.

        Raises:
            ValueError: The source's examples cannot become events, or the format cannot hold them.
            OSError: The log does not take them.
        """
        whole = True
        for chunk in _ahead(chunks):
            if chunk.epoch or self.examples >= max_examples:
                break
            self.set_aside.update(one.reason for one in chunk.rejected)
            whole = self._send_until(self._take(chunk.examples.slice(0, max_examples - self.examples)), wait, told)
            if not whole:
                break
        whole = whole and self._send_until(float("inf"), wait, told)
        for outlet in self._outlets:
            outlet.send_rest()
        self._producer.flush()
        return whole

    def _take(self, examples: pa.RecordBatch) -> float:
        """Takes examples apart; returns the time up to which all events are known."""
        impressions = impressions_of(examples, self._first_request + self.examples)
        actions, rows = actions_of(examples, impressions)
        self.examples += len(examples)
        times = impressions.column("event_time_ms").to_numpy()
        if not len(times):
            return self._clock_ms
        clock = times.astype(np.float64)
        if self._pace.rate:
            span = 1000.0 * (len(impressions) + len(actions)) / self._pace.rate
            clock = self._clock_ms + np.arange(1, len(times) + 1) * (span / len(times))
        if self._began is None:
            self._began = time.monotonic(), time.time_ns() / 1e6, float(clock[0])
        delay = self._rng.exponential(1000.0 * self._pace.delay_s, len(rows)) if self._pace.delay_s else np.zeros(len(rows))
        self._hold(0, impressions, clock, times)
        self._hold(1, actions, clock[rows] + delay, times[rows] + delay.astype(np.int64))
        self._clock_ms = float(clock.max())
        return self._clock_ms

    def _hold(self, which: int, batch: pa.RecordBatch, clock: np.ndarray, times: np.ndarray) -> None:
        if self._pace.restamp:
            assert self._began is not None
            now = time.time_ns() / 1e6
            stamps = self._began[1] + (clock - self._began[2]) / self._speed if self._speed else np.full(len(clock), now)
            times = stamps.astype(np.int64)
        batch = batch.set_column(batch.schema.get_field_index("event_time_ms"), "event_time_ms", pa.array(times))
        late = self._rng.uniform(0, 1000.0 * self._pace.shuffle_s, len(clock)) if self._pace.shuffle_s else 0.0
        self._waiting[which].add(batch, clock + late)

    def _send_until(self, horizon_ms: float, wait: Callable[[float], bool], told: Callable[[], None]) -> bool:
        """Sends what is due up to a time, when it is due; returns whether all was sent."""
        while True:
            now_ms = horizon_ms
            if self._speed and self._began:
                now_ms = self._began[2] + 1000.0 * self._speed * (time.monotonic() - self._began[0])
            for waiting, outlet in zip(self._waiting, self._outlets, strict=True):
                due = waiting.take(min(now_ms, horizon_ms))
                if due is not None:
                    outlet.add(due)
            if time.monotonic() - self._flushed >= self._pace.linger_s:
                for outlet in self._outlets:
                    outlet.send_rest()
                self._producer.flush()
                self._flushed = time.monotonic()
            told()
            if now_ms >= horizon_ms or (horizon_ms == float("inf") and not self.waiting):
                return not wait(0)
            if wait(min(self._pace.linger_s, (horizon_ms - now_ms) / 1000.0 / self._speed)):
                return False
