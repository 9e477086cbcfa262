"""Appends to a log in Kafka.

In: payloads. Out: messages of a topic's partition, each once and in order also when a broker fails in between (idempotence,
acks of all replicas). The number of the schema travels in the header `schema`, 8 bytes, big endian.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from monolith_jax.stream.kafka_client import (
    PATIENCE_S,
    AdminClient,
    Broker,
    KafkaError,
    KafkaException,
    NewTopic,
    Producer,
    settings_of,
)
from monolith_jax.stream.log import LogPartition

_DEFAULTS = {
    "acks": "all",
    "enable.idempotence": "true",
    "linger.ms": "5",
    "queue.buffering.max.kbytes": str(256 << 10),
    "queue.buffering.max.messages": "1000000",
    "reconnect.backoff.max.ms": "2000",
}
_STEP_S = 0.1  # within the client no signal is seen


class KafkaProducer:
    """Appends to a log in Kafka; see `Producer`. For one thread."""

    def __init__(self, url: str, options: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> None:
        """Makes the client; connects when something is asked or appended.

        Args:
            url: `kafka://host:port,host:port`.
            options: Options of the producer, by the names that librdkafka gives them.

        Raises:
            ValueError: The address or an option is not understood.
        """
        self._broker = Broker(url)
        self._settings = settings_of(url, options, _DEFAULTS, {})
        every = {**self._settings, "on_delivery": self._delivered, "delivery.report.only.error": True}
        self._producer: Producer | None = self._broker.make(Producer, every)
        self._counts: dict[str, int] = {}
        self._lost: list[str] = []

    def create(self, topic: str, partitions: int, forever: bool = False) -> None:
        """Makes a topic unless it is there, with the number of replicas that the brokers take by themselves.

        With `forever` nothing of it goes by retention; one that is there stays as it is.

        Raises:
            ValueError: It is there with another number of partitions, or the brokers refuse.
            OSError: No broker answers.
        """
        if partitions < 1:
            raise ValueError(f"topic {topic!r} cannot have {partitions} partitions; it needs one at least")
        there = self._count(topic)
        if not there:
            admin: AdminClient = self._broker.make(AdminClient, self._settings)
            kept = {"retention.ms": "-1", "retention.bytes": "-1", "cleanup.policy": "delete"} if forever else {}

            def make(timeout_s: float) -> None:
                new = NewTopic(topic, partitions, -1, config=kept)
                (made,) = admin.create_topics([new], request_timeout=timeout_s).values()
                try:
                    made.result()
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                        raise

            self._broker.ask(f"topic {topic!r}", make, self._serve)
            until = time.monotonic() + PATIENCE_S
            while not (there := self._count(topic)) and time.monotonic() < until:
                time.sleep(0.05)  # made, but not every broker knows it yet
        if there != partitions:
            raise ValueError(
                f"topic {topic!r} at {self._broker.url} has {there} partitions, not {partitions}. Ask for {there}, "
                "or take another name"
            )

    def append(self, partition: LogPartition, payload: bytes, schema: int = 0, timestamp_ms: int | None = None) -> None:
        """Appends a message; waits while the client's queue is full. See `Producer.append`.

        Raises:
            ValueError: There is no such partition, the payload is larger than the client or the brokers take, or these refuse.
            OSError: No broker answers; only the first time that a topic is appended to.
        """
        if not 0 <= partition.number < self._counts.get(partition.topic, 0):
            there = self._count(partition.topic)
            if not 0 <= partition.number < there:
                raise ValueError(
                    f"{self._broker.url} has no {partition}: topic {partition.topic!r} has {there} partitions. `create` "
                    "makes a topic"
                )
        headers: dict[str, str | bytes | None] = {"schema": schema.to_bytes(8, "big")} if schema else {}
        time_ms = time.time_ns() // 1_000_000 if timestamp_ms is None else timestamp_ms
        while True:
            try:
                self._client.produce(partition.topic, payload, partition=partition.number, timestamp=time_ms, headers=headers)
            except BufferError:
                self._client.poll(_STEP_S)
                self._broker.check()
            except KafkaException as error:
                raise ValueError(
                    f"{partition}: a payload of {len(payload)} bytes is refused: {error.args[0].str()}. Split it, or raise the "
                    "option message.max.bytes and the topic's max.message.bytes"
                ) from None
            else:
                self._client.poll(0)
                return

    def flush(self) -> None:
        """Returns when the brokers have all that was appended.

        Raises:
            ValueError: The brokers refuse.
            OSError: They have not taken some of it in time (option delivery.timeout.ms); it is gone from the queue.
        """
        while self._client.flush(_STEP_S):
            self._broker.check()
        if self._lost:
            lost, self._lost = self._lost, []
            self._broker.check()
            raise OSError(
                f"{len(lost)} messages are not in the log at {self._broker.url}, the first: {lost[0]}; last error: "
                f"{self._broker.last}"
            )

    def close(self) -> None:
        """Flushes, and closes the connections. Raises what `flush` does."""
        if self._producer is None:
            return
        try:
            self.flush()
        finally:
            self._producer.purge()
            self._producer = None

    @property
    def _client(self) -> Producer:
        if self._producer is None:
            raise ValueError(f"the producer of {self._broker.url} is closed; open another")
        return self._producer

    def _serve(self) -> None:
        self._client.poll(0)

    def _count(self, topic: str) -> int:
        """Returns how many partitions a topic has, 0 if it is not there."""

        def count(timeout_s: float) -> int:
            # All topics: asked for one by name, a producer's client may make it.
            found = self._client.list_topics(timeout=timeout_s).topics.get(topic)
            return 0 if found is None or found.error is not None else len(found.partitions)

        self._counts[topic] = self._broker.ask(f"topic {topic!r}", count, self._serve)
        return self._counts[topic]

    def _delivered(self, fault: KafkaError | None, message: object) -> None:
        if fault is not None:
            self._lost.append(fault.str())
