"""Holds what every kind of log does alike."""

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from monolith_jax.stream.log import Log, LogPartition, Message, Producer, open_log, open_producer

PAYLOADS = [b"", b"a", bytes(range(256)) * 40, *(f"message {i}".encode() * (i % 7) for i in range(60))]
SCHEMAS = [0, 1, (1 << 64) - 1]


@pytest.fixture(params=["file", "kafka"])
def log_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("kafka_url") if request.param == "kafka" else f"file://{tmp_path}/the%20log"


@pytest.fixture
def topic() -> str:
    return f"topic-{uuid.uuid4().hex}"


@pytest.fixture
def producer(log_url: str) -> Iterator[Producer]:
    with closing(open_producer(log_url)) as one:
        yield one


@pytest.fixture
def opened(log_url: str, producer: Producer, topic: str) -> Iterator[Log]:
    """Returns a log whose topic has two partitions with `PAYLOADS` in each."""
    producer.create(topic, 2)
    fill(producer, topic)
    with closing(open_log(log_url)) as one:
        yield one


def fill(producer: Producer, topic: str, start: int = 0, payloads: list[bytes] = PAYLOADS) -> None:
    for i, payload in enumerate(payloads, start):
        for number in (0, 1):
            producer.append(LogPartition(topic, number), payload, SCHEMAS[i % 3], 1_700_000_000_000 + 1000 * i)
    producer.flush()


def expected(payloads: list[bytes] = PAYLOADS) -> list[Message]:
    return [Message(i, payload, 1_700_000_000_000 + 1000 * i, SCHEMAS[i % 3]) for i, payload in enumerate(payloads)]


def take(log: Log, count: int, most: int = 1000, room: int = 1 << 20) -> dict[LogPartition, list[Message]]:
    """Returns the next messages, so many or what comes within some seconds."""
    got: dict[LogPartition, list[Message]] = {}
    until = time.monotonic() + 20
    while sum(map(len, got.values())) < count and time.monotonic() < until:
        for name, messages in log.poll(most, room, 0.5).items():
            got.setdefault(name, []).extend(messages)
    return got


def test_what_is_appended_comes_out(opened: Log, topic: str) -> None:
    assert opened.num_partitions(topic) == 2
    for number in (0, 1):
        opened.seek(LogPartition(topic, number), 0)
    got = take(opened, 2 * len(PAYLOADS))
    assert got == {LogPartition(topic, number): expected() for number in (0, 1)}
    assert opened.poll(10, 10, 0.0) == {}


def test_a_reader_sees_what_is_appended_later(opened: Log, producer: Producer, topic: str) -> None:
    partition = LogPartition(topic, 1)
    opened.seek(partition, len(PAYLOADS))
    start = time.monotonic()
    assert opened.poll(10, 10, 0.2) == {} and time.monotonic() - start >= 0.2
    for i in range(3):
        before_ms = time.time_ns() // 1_000_000
        producer.append(partition, b"late", 5)
        producer.flush()
        ((message,),) = take(opened, 1).values()
        assert (message.offset, message.payload, message.schema) == (len(PAYLOADS) + i, b"late", 5)
        assert before_ms <= message.timestamp_ms <= time.time_ns() // 1_000_000


def test_a_partition_that_was_not_sought_is_not_read(opened: Log, topic: str) -> None:
    opened.seek(LogPartition(topic, 1), 60)
    assert [message.offset for message in take(opened, 3)[LogPartition(topic, 1)]] == [60, 61, 62]
    assert opened.poll(10, 1000, 0.1) == {}


def test_poll_keeps_its_limits_and_takes_turns(opened: Log, topic: str) -> None:
    partitions = [LogPartition(topic, number) for number in (0, 1)]
    for partition in partitions:
        opened.seek(partition, 3)
    opened.pause(set(partitions))
    assert opened.poll(1, 1, 0.5) == {}  # a broker may send one partition before it sends the other
    opened.pause(set())
    counts = dict.fromkeys(partitions, 0)
    for i in range(60):
        got = take(opened, 1, 1 + i % 3, 50)
        messages = [message for one in got.values() for message in one]
        assert len(messages) <= 1 + i % 3
        assert len(messages) == 1 or sum(len(message.payload) for message in messages) <= 50
        for partition, some in got.items():
            counts[partition] += len(some)
        assert abs(counts[partitions[0]] - counts[partitions[1]]) <= 8, "one partition is read and the other waits"


def test_a_message_larger_than_the_limit_comes_alone(opened: Log, topic: str) -> None:
    opened.seek(LogPartition(topic, 0), 1)
    got = [take(opened, 1, 10, 100)[LogPartition(topic, 0)] for _ in range(2)]
    assert [[len(message.payload) for message in one] for one in got] == [[1], [len(PAYLOADS[2])]]


def test_poll_leaves_out_what_is_paused(opened: Log, topic: str) -> None:
    first, second = LogPartition(topic, 0), LogPartition(topic, 1)
    opened.seek(first, 0)
    opened.seek(second, 0)
    got = take(opened, 4, 4)
    opened.pause({first})
    rest = take(opened, len(PAYLOADS) - len(got.get(second, [])))
    assert set(rest) == {second} and opened.poll(10, 100, 0.1) == {}
    opened.pause({second})
    more = take(opened, len(PAYLOADS) - len(got.get(first, [])))
    assert set(more) == {first} and got.get(first, []) + more[first] == expected()


def test_read_to_gives_exactly_up_to_an_offset(opened: Log, producer: Producer, topic: str) -> None:
    first, second = LogPartition(topic, 0), LogPartition(topic, 1)
    opened.seek(first, 2)
    opened.seek(second, 0)
    opened.pause({first, second})
    assert opened.read_to(first, 10) == expected()[2:10]
    assert opened.read_to(first, 10) == [] == opened.read_to(first, 5)
    opened.pause(set())
    assert opened.read_to(second, 40) == expected()[:40]
    got = take(opened, len(PAYLOADS) - 10 + len(PAYLOADS) - 40)
    assert got == {first: expected()[10:], second: expected()[40:]}


def test_a_sought_partition_is_read_again(opened: Log, topic: str) -> None:
    partition = LogPartition(topic, 0)
    for start in (0, 30, len(PAYLOADS) - 5, 7):
        opened.seek(partition, start)
        assert take(opened, 5, 5)[partition] == expected()[start : start + 5]


def test_bounds_and_what_is_unread(opened: Log, producer: Producer, topic: str) -> None:
    partition = LogPartition(topic, 0)
    assert opened.bounds(partition) == (0, len(PAYLOADS))
    opened.seek(partition, 13)
    assert len(opened.poll(10, 1 << 20, 10.0)[partition]) == 10
    assert opened.unread() == {partition: len(PAYLOADS) - 23}
    fill(producer, topic, len(PAYLOADS), [b"one"])
    assert opened.bounds(partition) == (0, len(PAYLOADS) + 1)


def test_an_empty_topic_has_nothing(log_url: str, producer: Producer, topic: str) -> None:
    producer.create(topic, 1)
    partition = LogPartition(topic, 0)
    with closing(open_log(log_url)) as log:
        assert log.bounds(partition) == (0, 0) and log.offset_at(partition, 5) == 0
        log.seek(partition, 0)
        assert log.poll(1, 1, 0.05) == {} and log.unread() == {partition: 0}
        producer.append(partition, b"first")
        producer.flush()
        assert [message.payload for message in log.read_to(partition, 1)] == [b"first"]


def test_an_offset_is_found_by_its_time(opened: Log, topic: str) -> None:
    partition = LogPartition(topic, 1)
    for late_ms, offset in ((-(10**9), 0), (0, 0), (1, 1), (12_000, 12), (12_001, 13), (62_000, 62), (62_001, 63)):
        assert opened.offset_at(partition, 1_700_000_000_000 + late_ms) == offset


def test_a_topic_keeps_its_number_of_partitions(opened: Log, producer: Producer, topic: str) -> None:
    producer.create(topic, 2)
    with pytest.raises(ValueError, match="2 partitions"):
        producer.create(topic, 3)
    assert opened.bounds(LogPartition(topic, 0)) == (0, len(PAYLOADS))


def test_what_is_not_there_is_refused(opened: Log, producer: Producer, topic: str) -> None:
    for wrong in (
        lambda: opened.num_partitions("nothing"),
        lambda: producer.create(topic, 0),
        lambda: producer.create("a/b", 1),
    ):
        with pytest.raises(ValueError):
            wrong()
    for partition in (LogPartition("nothing", 0), LogPartition(topic, 2)):
        with pytest.raises(ValueError, match=partition.topic):
            opened.seek(partition, 0)
            opened.poll(1, 1, 5.0)
        with pytest.raises(ValueError, match=partition.topic):
            opened.bounds(partition)
        with pytest.raises(ValueError, match=partition.topic):
            producer.append(partition, b"")


def test_an_offset_behind_the_end_is_refused(opened: Log, topic: str) -> None:
    opened.seek(LogPartition(topic, 0), len(PAYLOADS) + 1)
    with pytest.raises(ValueError, match=f"offset {len(PAYLOADS) + 1}"):
        opened.poll(1, 1, 10.0)


def test_options_and_addresses_are_checked(log_url: str) -> None:
    for opener in (open_log, open_producer):
        with pytest.raises(ValueError, match=r"no\.such\.option"):
            opener(log_url, [("no.such.option", "1")])
        with pytest.raises(ValueError, match="file:///folder"):
            opener("s3://bucket")
        with pytest.raises(ValueError):
            opener(log_url.partition("://")[0] + "://")


def test_two_producers_one_after_the_other(log_url: str, topic: str) -> None:
    partition = LogPartition(topic, 0)
    with ExitStack() as stack:
        for i in range(3):
            with closing(open_producer(log_url)) as producer:
                producer.create(topic, 1)
                producer.append(partition, str(i).encode())
        log = stack.enter_context(closing(open_log(log_url)))
        log.seek(partition, 0)
        assert [message.payload for message in log.read_to(partition, 3)] == [b"0", b"1", b"2"]
