"""Holds what only a log in Kafka does. What every log does: `test_log`."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

pytest.importorskip("confluent_kafka")
from confluent_kafka.admin import ConfigResource  # pyright: ignore[reportPrivateImportUsage]
from confluent_kafka.cimpl import NewPartitions

from launch.bench.kafka_broker import Broker, free_port
from monolith_jax.stream import kafka_client
from monolith_jax.stream.formats import Schemas, announce, schemas_topic
from monolith_jax.stream.kafka_client import AdminClient, Consumer, Producer
from monolith_jax.stream.kafka_log import KafkaLog
from monolith_jax.stream.kafka_producer import KafkaProducer
from monolith_jax.stream.log import LogPartition, Message

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def topic(kafka_url: str) -> Iterator[str]:
    """Returns a topic with one partition."""
    name = f"topic-{uuid.uuid4().hex}"
    with closing(KafkaProducer(kafka_url)) as producer:
        producer.create(name, 1)
    yield name


def admin(url: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": url.removeprefix("kafka://"), "log_level": "0"})


def produce(url: str, topic: str, headers: list[list[tuple[str, str | bytes | None]]], **settings: str) -> None:
    """Appends a message a list of headers, in one transaction if that is asked for."""
    producer = Producer({"bootstrap.servers": url.removeprefix("kafka://"), "log_level": "0", **settings})
    if settings:
        producer.init_transactions(20)
        producer.begin_transaction()
    for one in headers:
        producer.produce(topic, b"x", partition=0, headers=one)
    if settings:
        producer.commit_transaction(20)
    assert producer.flush(20) == 0


def offsets(messages: list[Message]) -> list[int]:
    return [message.offset for message in messages]


def test_schemas_stay_whatever_retention_takes(kafka_url: str) -> None:
    name = f"topic-{uuid.uuid4().hex}"
    with closing(KafkaProducer(kafka_url)) as producer, closing(KafkaLog(kafka_url)) as log:
        announce(producer, Schemas(log, name), name, pa.schema([("user_id", pa.int64())]))
    asked = ConfigResource(ConfigResource.Type.TOPIC, schemas_topic(name))
    client = admin(kafka_url)
    found = client.describe_configs([asked])[asked].result(20)
    assert [found[key].value for key in ("retention.ms", "retention.bytes", "cleanup.policy")] == ["-1", "-1", "delete"]


def test_a_schema_stands_in_a_header(kafka_url: str, topic: str) -> None:
    partition = LogPartition(topic, 0)
    with closing(KafkaProducer(kafka_url)) as producer:
        producer.append(partition, b"x", 0x0102030405060708)
    consumer = Consumer({"bootstrap.servers": kafka_url.removeprefix("kafka://"), "group.id": "test", "log_level": "0"})
    consumer.assign([kafka_client.TopicPartition(topic, 0, 0)])
    raw = consumer.poll(20)
    consumer.close()
    assert raw is not None and raw.headers() == [("schema", bytes(range(1, 9)))]
    right: list[list[tuple[str, str | bytes | None]]] = [
        [("schema", "00000000000000ff")],
        [("other", b"1"), ("schema", bytes(7) + b"\t")],
    ]
    wrong: list[list[tuple[str, str | bytes | None]]] = [[("schema", b"5")], [("schema", None)], [("schema", b"g" * 16)]]
    produce(kafka_url, topic, [*right, *wrong, []])
    with closing(KafkaLog(kafka_url)) as log:
        log.seek(partition, 1)
        messages = log.read_to(partition, 7)
    assert [message.schema for message in messages] == [255, 9, 0, 0, 0, 0]
    assert ["schema" in message.fault for message in messages] == [False, False, True, True, True, False]


def test_an_offset_that_retention_took_is_refused(kafka_url: str, topic: str) -> None:
    partition = LogPartition(topic, 0)
    with closing(KafkaProducer(kafka_url)) as producer:
        for _ in range(10):
            producer.append(partition, b"x")
    client = admin(kafka_url)
    (done,) = client.delete_records([kafka_client.TopicPartition(topic, 0, 6)]).values()
    done.result(20)
    with closing(KafkaLog(kafka_url)) as log:
        assert log.bounds(partition) == (6, 10)
        log.seek(partition, 3)
        with pytest.raises(ValueError, match="offset 3, but retention has taken what is before offset 6"):
            log.read_to(partition, 7)
        with pytest.raises(ValueError, match="retention"):
            log.poll(1, 1, 20.0)
        log.seek(partition, 6)
        assert offsets(log.read_to(partition, 10)) == [6, 7, 8, 9]


def test_a_lost_offset_is_told_while_other_partitions_go_on(kafka_url: str) -> None:
    topic = f"topic-{uuid.uuid4().hex}"
    with closing(KafkaProducer(kafka_url)) as producer, closing(KafkaLog(kafka_url)) as log:
        producer.create(topic, 2)
        for _ in range(5000):
            producer.append(LogPartition(topic, 1), b"x")
        producer.flush()
        log.seek(LogPartition(topic, 0), 7)
        log.seek(LogPartition(topic, 1), 0)
        with pytest.raises(ValueError, match="offset 7"):
            for _ in range(4000):
                assert log.poll(1, 1000, 1.0)


def test_partitions_that_are_added_are_seen(kafka_url: str, topic: str) -> None:
    with closing(KafkaLog(kafka_url)) as log:
        assert log.num_partitions(topic) == 1
        with pytest.raises(ValueError, match="0 to 0"):
            log.seek(LogPartition(topic, 2), 0)
        client = admin(kafka_url)
        (done,) = client.create_partitions([NewPartitions(topic, 3)]).values()
        done.result(20)
        with closing(KafkaLog(kafka_url)) as second:
            until = time.monotonic() + 20
            while second.num_partitions(topic) != 3 and time.monotonic() < until:
                time.sleep(0.05)
            assert second.num_partitions(topic) == 3
        log.seek(LogPartition(topic, 2), 0)
        with closing(KafkaProducer(kafka_url)) as producer:
            producer.append(LogPartition(topic, 2), b"new")
        assert [message.payload for message in log.read_to(LogPartition(topic, 2), 1)] == [b"new"]


def test_offsets_of_transactions_are_passed(kafka_url: str, topic: str) -> None:
    partition = LogPartition(topic, 0)
    for i in range(2):
        produce(kafka_url, topic, [[], []], **{"transactional.id": f"{topic}-{i}"})
    with closing(KafkaLog(kafka_url)) as log:
        assert log.bounds(partition) == (0, 6)  # two messages and a marker, twice
        log.seek(partition, 0)
        assert offsets(log.read_to(partition, 3)) == [0, 1]
        assert offsets(log.read_to(partition, 6)) == [3, 4]
        assert log.unread() == {partition: 0}


def test_what_is_held_stays_small(kafka_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = f"topic-{uuid.uuid4().hex}"
    first, second = LogPartition(topic, 0), LogPartition(topic, 1)
    count = 200
    with closing(KafkaProducer(kafka_url)) as producer:
        producer.create(topic, 2)
        for i in range(count):
            producer.append(first, b"%d" % i * 2000)
            producer.append(second, b"%d" % i)
    monkeypatch.setattr("monolith_jax.stream.kafka_log._HELD_BYTES", 150_000)
    monkeypatch.setattr("monolith_jax.stream.kafka_log._FETCH_BYTES", 20_000)
    with closing(KafkaLog(kafka_url, {"queued.max.messages.kbytes": "100", "fetch.message.max.bytes": "20000"})) as log:
        for partition in (first, second):
            log.seek(partition, 0)
        assert offsets(log.read_to(second, count)) == list(range(count))
        assert sum(held.size for held in log._held.values()) < 250_000
        log.seek(first, 10)
        assert offsets(log.read_to(first, 20)) == list(range(10, 20))
        log.seek(first, 0)
        log.pause({second})
        got = [message for _ in range(count) for message in log.poll(1, 1, 20.0)[first]]
        assert [(message.offset, message.payload) for message in got] == [(i, b"%d" % i * 2000) for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_old_comes_after_a_seek(kafka_url: str, topic: str, seed: int) -> None:
    partition = LogPartition(topic, 0)
    with closing(KafkaProducer(kafka_url)) as producer:
        for i in range(3000):
            producer.append(partition, b"%d" % i * 20)
    with closing(KafkaLog(kafka_url)) as log:
        for i in range(10):
            start = (i * 7919 + seed * 1013) % 2990
            log.seek(partition, start)
            assert offsets(log.poll(10, 1 << 20, 20.0)[partition])[0] == start


def test_a_killed_broker_loses_and_repeats_nothing(mortal_broker: Broker) -> None:
    partition = LogPartition("events", 0)
    count = 3000
    with closing(KafkaProducer(mortal_broker.url)) as producer, closing(KafkaLog(mortal_broker.url)) as log:
        producer.create("events", 1)
        log.seek(partition, 0)

        def append() -> None:
            for i in range(count):
                producer.append(partition, b"%d" % i)
                time.sleep(0.001)
            producer.flush()

        thread = threading.Thread(target=append)
        thread.start()
        got: list[Message] = []
        until = time.monotonic() + 60
        restarted = False
        while len(got) < count and time.monotonic() < until:
            got += log.poll(100, 1 << 20, 0.1).get(partition, [])
            if len(got) > count // 3 and not restarted:
                mortal_broker.kill()
                assert log.poll(10_000, 1 << 20, 0.3) is not None
                mortal_broker.start()
                restarted = True
        thread.join()
        got += log.poll(100, 1 << 20, 0.5).get(partition, [])
        assert restarted and [message.payload for message in got] == [b"%d" % i for i in range(count)]
        assert offsets(got) == list(range(count))


def test_a_broker_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_client, "PATIENCE_S", 1.0)
    url = f"kafka://127.0.0.1:{free_port()}"
    with closing(KafkaLog(url)) as log:
        for ask in (
            lambda: log.bounds(LogPartition("t", 0)),
            lambda: log.num_partitions("t"),
            lambda: log.offset_at(LogPartition("t", 0), 5),
        ):
            with pytest.raises(OSError, match=r"has not answered.*(refused|down|timed out)"):
                ask()
    with closing(KafkaProducer(url)) as producer, pytest.raises(OSError, match="has not answered"):
        producer.create("t", 1)


def test_a_broker_that_comes_back_may_not_know_its_topics_at_once() -> None:
    client = kafka_client.Broker("kafka://127.0.0.1:9")
    unknown = [kafka_client.KafkaError(kafka_client.KafkaError.UNKNOWN_TOPIC_OR_PART)] * 2

    def question(timeout_s: float) -> int:
        if unknown:
            raise kafka_client.KafkaException(unknown.pop())
        return 7

    with pytest.raises(ValueError, match="has no topic"):
        client.ask("topic", question, lambda: None)
    client.hear(kafka_client.KafkaError(kafka_client.KafkaError._TRANSPORT))
    assert client.ask("topic", question, lambda: None) == 7


def test_what_no_broker_took_is_told(mortal_broker: Broker) -> None:
    partition = LogPartition("others", 0)
    producer = KafkaProducer(mortal_broker.url, {"delivery.timeout.ms": "1500", "linger.ms": "0"})
    producer.create("others", 1)
    producer.append(partition, b"one")
    producer.flush()
    mortal_broker.kill()
    producer.append(partition, b"two")
    with pytest.raises(OSError, match="1 messages are not in the log"):
        producer.close()
    with pytest.raises(ValueError, match="closed"):
        producer.append(partition, b"three")
    mortal_broker.start()
    with closing(KafkaLog(mortal_broker.url)) as log:
        log.seek(partition, 0)
        assert [message.payload for message in log.read_to(partition, 1)] == [b"one"]


@pytest.mark.parametrize(
    "options",
    [
        {"security.protocol": "ssl"},
        {"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "a", "sasl.password": "b"},
    ],
)
def test_a_login_that_does_not_match_is_refused(kafka_url: str, options: dict[str, str]) -> None:
    with closing(KafkaLog(kafka_url, options)) as log, pytest.raises(ValueError, match="refuses"):
        log.num_partitions("t")
    with closing(KafkaProducer(kafka_url, options)) as producer, pytest.raises(ValueError, match="refuses"):
        producer.create("t", 1)


def test_a_payload_that_is_too_large_is_refused(kafka_url: str, topic: str) -> None:
    with closing(KafkaProducer(kafka_url)) as producer, pytest.raises(ValueError, match="2000000 bytes"):
        producer.append(LogPartition(topic, 0), bytes(2_000_000))


def test_settings_that_reading_relies_on_are_fixed(kafka_url: str) -> None:
    with pytest.raises(ValueError, match=r"auto\.offset\.reset"):
        KafkaLog(kafka_url, [("auto.offset.reset", "earliest")])


def test_the_client_prints_nothing() -> None:
    code = f"""
from monolith_jax.stream import kafka_client
from monolith_jax.stream.kafka_log import KafkaLog
from monolith_jax.stream.log import LogPartition
kafka_client.PATIENCE_S = 0.5
log = KafkaLog("kafka://127.0.0.1:{free_port()}")
try:
    log.bounds(LogPartition("t", 0))
except OSError:
    log.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == done.stderr == ""


def test_without_the_extra_it_is_named() -> None:
    code = """
import sys
sys.modules["confluent_kafka"] = None
from monolith_jax.stream.log import open_log
open_log("kafka://127.0.0.1:1")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode and "pip install 'monolith_jax[kafka]'" in done.stderr
