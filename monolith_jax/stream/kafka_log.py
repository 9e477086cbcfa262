"""Reads a log in Kafka.

In: `kafka://host:port,host:port`. Out: `KafkaLog`. Partitions are assigned, not subscribed to: no group decides who reads what,
and no offset is committed, since the reader keeps its own. While brokers are away `poll` and `read_to` wait, as when nothing is
appended; `bounds`, `offset_at`, `num_partitions` and the first `seek` of a topic raise an OSError after
`kafka_client.PATIENCE_S`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence, Set
from typing import Any

from monolith_jax.stream.kafka_client import (
    PATIENCE_S,
    REFUSALS,
    UNKNOWN,
    Broker,
    Consumer,
    KafkaError,
    KafkaException,
    TopicPartition,
    settings_of,
)
from monolith_jax.stream.log import LogPartition, Message, take_turns

_DEFAULTS = {
    "group.id": "monolith_jax",  # the client asks for one; no broker is told
    "fetch.wait.max.ms": "100",  # a seek waits for the fetch that is under way
    "fetch.queue.backoff.ms": "10",  # else it rests for a second once it holds enough
    "reconnect.backoff.max.ms": "2000",
    "allow.auto.create.topics": "false",
}
_FIXED = {"enable.auto.commit": "false", "auto.offset.reset": "error", "enable.partition.eof": "true"}
_STEP_S = 0.1  # within the client no signal is seen
_BATCH = 32
_FETCH_BYTES, _FETCH_MESSAGES = 8 << 20, 5000  # taken from the client at a time, and held while one partition waits for others
# A partition of which more is held, as one that is paused, is stopped in the client: to go on with it then costs a fetch.
_HELD_BYTES, _HELD_MESSAGES = 32 << 20, 20_000


class _Held:
    """What was fetched of one partition and not handed out."""

    def __init__(self, offset: int) -> None:
        self.messages: deque[Message] = deque()
        self.size = 0
        self.next = offset
        """Where the partition is read."""
        self.fetched = offset
        """Offset behind what was fetched."""
        self.stopped = False
        self.refused = ""

    def take(self, most: int, room: int, any_size: bool, into: list[Message], end: int = 1 << 62) -> int:
        """Moves messages before offset `end` into a list; returns their bytes."""
        taken = 0
        messages = self.messages
        while most > 0 and messages and messages[0].offset < end:
            size = len(messages[0].payload)
            if size > room - taken and not any_size:
                break
            into.append(messages.popleft())
            taken += size
            most -= 1
            any_size = False
        self.size -= taken
        # Offsets without a message (markers of transactions) are passed with the message before them.
        self.next = messages[0].offset if messages else self.fetched
        return taken


class KafkaLog:
    """Reads a log in Kafka; see `Log`. For one thread."""

    def __init__(self, url: str, options: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> None:
        """Makes the client; connects when something is asked.

        Args:
            url: `kafka://host:port,host:port`.
            options: Options of the consumer, by the names that librdkafka gives them.

        Raises:
            ValueError: The address or an option is not understood.
        """
        self._broker = Broker(url)
        self._consumer: Consumer = self._broker.make(Consumer, settings_of(url, options, _DEFAULTS, _FIXED))
        self._counts: dict[str, int] = {}
        self._held: dict[LogPartition, _Held] = {}
        self._paused: frozenset[LogPartition] = frozenset()
        self._turn = 0

    def num_partitions(self, topic: str) -> int:
        """Returns how many partitions a topic has; asks afresh.

        Raises:
            ValueError: There is no such topic, or the brokers refuse.
            OSError: No broker answers.
        """

        def count(timeout_s: float) -> int:
            found = self._consumer.list_topics(topic, timeout_s).topics[topic]
            if found.error is not None:
                raise KafkaException(found.error)
            return len(found.partitions)

        self._counts[topic] = self._broker.ask(f"topic {topic!r}", count, self._serve)
        return self._counts[topic]

    def bounds(self, partition: LogPartition, within_s: float = PATIENCE_S) -> tuple[int, int]:
        """Returns the first offset that is still there, and the one behind the last message.

        Raises:
            ValueError: There is no such partition, or the brokers refuse.
            OSError: No broker answers.
        """

        def watermarks(timeout_s: float) -> tuple[int, int]:
            found = self._consumer.get_watermark_offsets(TopicPartition(*partition), timeout=timeout_s)
            if found is None:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
            return found

        return self._broker.ask(str(partition), watermarks, self._serve, within_s)

    def offset_at(self, partition: LogPartition, timestamp_ms: int) -> int:
        """Returns the first offset appended at or after a time; the end if there is none. Raises what `bounds` does."""

        def find(timeout_s: float) -> int:
            wanted = TopicPartition(*partition, max(0, timestamp_ms))
            (found,) = self._consumer.offsets_for_times([wanted], timeout=timeout_s)
            if found.error is not None:
                raise KafkaException(found.error)
            return found.offset

        offset = self._broker.ask(str(partition), find, self._serve)
        return offset if offset >= 0 else self.bounds(partition)[1]

    def seek(self, partition: LogPartition, offset: int) -> None:
        """Reads this partition from an offset on. Whether that is there, the next read says.

        Raises:
            ValueError: There is no such partition, or the offset is negative.
            OSError: No broker answers; only the first time that a topic is sought.
        """
        if offset < 0:
            raise ValueError(f"{partition} cannot be read from offset {offset}; offsets start at 0")
        if not 0 <= partition.number < self._counts.get(partition.topic, 0):
            number = self.num_partitions(partition.topic)
            if not 0 <= partition.number < number:
                raise ValueError(
                    f"topic {partition.topic!r} has partitions 0 to {number - 1}, none with the number {partition.number}"
                )
        # After an offset that was not there the client takes no seek, so the partition is assigned anew.
        if partition in self._held:
            if self._held[partition].stopped:
                self._consumer.resume([TopicPartition(*partition)])
            self._consumer.incremental_unassign([TopicPartition(*partition)])
        self._consumer.incremental_assign([TopicPartition(*partition, offset)])
        self._held[partition] = _Held(offset)

    def at(self, partition: LogPartition) -> int:
        """Returns where a partition is read; behind the markers of transactions, once the client has told of them."""
        return self._held[partition].next

    def poll(self, max_messages: int, max_bytes: int, timeout_s: float) -> dict[LogPartition, list[Message]]:
        """Returns the next messages of the partitions that are not paused; see `Log.poll`."""
        until = time.monotonic() + timeout_s
        wait_s = 0.0
        names = [name for name in self._held if name not in self._paused]
        while True:
            if self._lacks(names, max_messages):
                self._fetch(wait_s)
            self._broker.check()
            for name in names:
                self._check(name)
            if names:
                self._turn = (self._turn + 1) % len(names)
                found = take_turns(names[self._turn :] + names[: self._turn], max_messages, max_bytes, self._read_one)
                if found:
                    self._resume()
                    return found
            left_s = until - time.monotonic()
            if left_s <= 0:
                return {}
            wait_s = min(left_s, _STEP_S)

    def read_to(self, partition: LogPartition, end: int) -> list[Message]:
        """Returns the messages up to offset `end`, exclusive; waits until they are there. See `Log.read_to`."""
        held = self._held[partition]
        found: list[Message] = []
        wait_s = 0.0
        while True:
            held.take(1 << 62, 1 << 62, True, found, end)
            if held.next >= end:
                return found
            self._broker.check()
            self._check(partition)
            self._resume()
            self._fetch(wait_s)
            wait_s = 0.0 if held.messages else _STEP_S

    def pause(self, partitions: Set[LogPartition]) -> None:
        """Makes `poll` leave these out, and no others."""
        self._paused = frozenset(partitions)

    def unread(self) -> dict[LogPartition, int]:
        """Returns how many messages each sought partition has ahead of where it is read, as far as the last fetch told."""
        found = {}
        for name, held in self._held.items():
            known = self._consumer.get_watermark_offsets(TopicPartition(*name), cached=True)
            found[name] = max(known[1] if known else 0, held.fetched) - held.next
        return found

    def close(self) -> None:
        """Closes the connections."""
        self._held = {}
        self._consumer.close()

    def _read_one(self, name: LogPartition, most: int, room: int, any_size: bool, into: list[Message]) -> int:
        return self._held[name].take(most, room, any_size, into)

    def _serve(self) -> None:
        self._fetch(0.0)

    def _lacks(self, names: Sequence[LogPartition], most: int) -> bool:
        """Says whether there is need of more: less than is asked for, or a partition that would miss its turn."""
        held = [self._held[name] for name in names]
        count = sum(len(one.messages) for one in held)
        if count >= _FETCH_MESSAGES or sum(one.size for one in held) >= _FETCH_BYTES:
            return False
        return count < most or any(not one.messages for one in held)

    def _fetch(self, wait_s: float) -> None:
        """Takes in what the client has; waits for the first message of it."""
        first = self._consumer.poll(wait_s)
        count, size = 0, 0
        batch = [] if first is None else [first]
        while batch:
            count += len(batch)
            size += sum(self._take_in(raw) for raw in batch)
            full = count >= _FETCH_MESSAGES or size >= _FETCH_BYTES
            batch = [] if full else self._consumer.consume(_BATCH, 0.0)

    def _take_in(self, raw: Any) -> int:
        """Puts a message to those that are held, and returns its bytes."""
        name = LogPartition(raw.topic() or "", raw.partition() or 0)
        held = self._held.get(name)
        fault = raw.error()
        offset = raw.offset()
        if fault is not None:
            self._hear(name, held, offset, fault)
            return 0
        self._broker.answered = True
        if held is None or offset < held.fetched:
            return 0
        message = _message(raw, offset)
        held.messages.append(message)
        held.size += len(message.payload)
        held.fetched = offset + 1
        if not held.stopped and (held.size > _HELD_BYTES or len(held.messages) > _HELD_MESSAGES):
            held.stopped = True
            self._consumer.pause([TopicPartition(*name)])
        return len(message.payload)

    def _hear(self, name: LogPartition, held: _Held | None, offset: int | None, fault: KafkaError) -> None:
        """Takes in an error that came in the place of a message."""
        code = fault.code()
        if held is None or code not in _LOST | UNKNOWN | REFUSALS | {KafkaError._PARTITION_EOF}:
            self._broker.hear(fault)
        elif code == KafkaError._PARTITION_EOF:
            held.fetched = max(held.fetched, offset or 0)
            if not held.messages:
                held.next = held.fetched
        elif code in _LOST:
            held.refused = _lost(name, held.fetched, self.bounds(name), fault.str())
        elif code in UNKNOWN and self._counts.get(name.topic, 0) and self.num_partitions(name.topic) > name.number:
            self._consumer.incremental_unassign([TopicPartition(*name)])  # a broker that had just started did not know it yet
            self._consumer.incremental_assign([TopicPartition(*name, held.fetched)])
        else:
            held.refused = f"{name} at {self._broker.url} cannot be read: {fault.str()}"

    def _check(self, name: LogPartition) -> None:
        held = self._held[name]
        if held.refused and not held.messages:
            raise ValueError(held.refused)

    def _resume(self) -> None:
        """Lets the client go on with partitions of which little is held."""
        for name, held in self._held.items():
            if held.stopped and held.size <= _HELD_BYTES // 2 and len(held.messages) <= _HELD_MESSAGES // 2:
                held.stopped = False
                self._consumer.resume([TopicPartition(*name)])


_LOST = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._LOG_TRUNCATION})


def _lost(name: LogPartition, wanted: int, bounds: tuple[int, int], told: str) -> str:
    first, end = bounds
    if wanted < first:
        why = (
            f"retention has taken what is before offset {first}. Start from {first}, and keep more (retention.ms, "
            "retention.bytes of the topic) or read more often"
        )
    else:
        why = "it is another log than the one where that offset was, or has lost its end. Start from an offset within it"
    return f"{name} was to be read from offset {wanted}, but {why} ({first} to {end}, exclusive; {told})"


def _message(raw: Any, offset: int) -> Message:
    payload = raw.value()
    schema, fault = 0, "" if payload is not None else "no payload: the message has the value null"
    for name, value in raw.headers() or ():
        if name == "schema":
            try:
                schema = int.from_bytes(value, "big") if len(value) == 8 else _of_digits(value)
            except (TypeError, ValueError):
                fault = f"the header `schema` is {value!r}; expected 8 bytes, or 16 hexadecimal digits"
    return Message(offset, payload or b"", raw.timestamp()[1], schema, fault)


def _of_digits(value: bytes) -> int:
    if len(value) != 16:
        raise ValueError(value)
    return int(value, 16)
