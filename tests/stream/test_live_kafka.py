"""A live stream from Kafka whose partitions end with the marker of a transaction."""

import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("confluent_kafka")
from monolith_jax.stream.kafka_producer import KafkaProducer
from monolith_jax.stream.log_source import LogConfig, LogSource
from tests.stream.test_kafka_log import produce


def test_a_transaction_at_the_end_is_the_end(kafka_url: str, tmp_path: Path) -> None:
    name = uuid.uuid4().hex
    topics = [f"{kind}-{name}" for kind in ("impressions", "actions")]
    with closing(KafkaProducer(kafka_url)) as producer:
        for topic in topics:
            producer.create(topic, 1)
    for topic in topics:
        produce(kafka_url, topic, [[], []], **{"transactional.id": topic})
    config = LogConfig(url=kafka_url, impressions=topics[0], actions=topics[1], format="json", ends=True, max_wait_s=0.05)
    until, ended = time.monotonic() + 10, True
    for _ in LogSource(config, tmp_path, 32).read({}):
        if time.monotonic() > until:
            ended = False
            break
    assert ended
