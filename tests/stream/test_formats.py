import re
from pathlib import Path
from typing import Any, Literal

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import strategies as st

from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.events import ACTION, IMPRESSION
from monolith_jax.stream.formats import (
    FORMATS,
    announce,
    check_format,
    encode,
    schema_number,
    schemas_topic,
)
from monolith_jax.stream.log import LogPartition
from monolith_jax.stream.protobuf_events import message_class
from tests.stream.event_topic import PLACE, ROW, TOPIC, T, Topic, batch_of
from tests.stream.mutated import actions, impressions

ROOT = Path(__file__).parents[2]
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def events(draw: st.DrawFn) -> list[dict[str, Any]]:
    times = st.integers(T, T + 10**9)
    row = st.fixed_dictionaries(
        {"event_time_ms": times, "request_id": INT64, "user_id": INT64, "video_id": INT64},
        optional={
            "author_id": INT64,
            "tag_id": st.lists(INT64, min_size=1, max_size=3),
            "duration_ms": st.integers(0, 2**60),
            "score": st.floats(allow_nan=False, allow_infinity=False),
            "place": TEXT,
            "count": INT64,
        },
    )
    return draw(st.lists(row, min_size=1, max_size=8))


@pytest.mark.parametrize("format", FORMATS)
@hypothesis.given(rows=events())
@hypothesis.settings(max_examples=40, deadline=None)
def test_what_is_encoded_is_decoded(format: str, rows: list[dict[str, Any]]) -> None:
    # A column with only whole floats would be told from whole numbers by its type alone, which JSON has not.
    batch = batch_of(*rows, score=pa.float64(), place=pa.string(), count=pa.int64())
    given = Topic(format).read(batch)
    assert [{name: value for name, value in row.items() if value is not None} for row in given] == rows


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["impression", "action"])
def test_many_events_of_both_kinds(format: str, kind: Literal["impression", "action"]) -> None:
    batch = (impressions if kind == "impression" else actions)(np.random.default_rng(0), 9000)
    topic = Topic(format, kind)
    messages = topic.messages(batch)
    assert len(messages) == (3 if format == "arrow" else 9000)
    decoded, rejected = topic.decoder.decode(PLACE, messages)
    assert not rejected and decoded.select(batch.schema.names).to_pylist() == batch.to_pylist()
    assert (
        decoded.schema.names[: len(IMPRESSION if kind == "impression" else ACTION)]
        == (IMPRESSION if kind == "impression" else ACTION).names
    )


def test_dictionaries_and_fixed_lists_are_sent_as_values() -> None:
    place = pa.array(["a", "b", "a"]).dictionary_encode()
    pair = pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2))
    batch = pa.record_batch({**{name: [T] * 3 for name in ROW}, "place": place, "pair": pair})
    for format in ("arrow", "json"):
        rows = Topic(format).read(batch)
        assert [row["place"] for row in rows] == ["a", "b", "a"] and rows[0]["pair"] == [1.0, 2.0]
    with pytest.raises(ValueError, match="no place for column 'pair'"):
        encode(batch, "protobuf")


def test_a_schema_has_one_number() -> None:
    assert schema_number(IMPRESSION) == schema_number(pa.schema(list(IMPRESSION), {"made": "elsewhere"})) != 0
    assert schema_number(IMPRESSION) == 12_902_576_519_888_523_779
    others = [IMPRESSION, ACTION, IMPRESSION.remove(1), IMPRESSION.set(1, pa.field("request_id", pa.int32()))]
    assert len({schema_number(one) for one in others}) == 4


def test_a_schema_is_announced_once() -> None:
    topic = Topic()
    for _ in range(2):
        for batch in (batch_of(ROW), batch_of({**ROW, "x": 1})):
            topic.read(batch)
    there = topic.log.topics[schemas_topic(TOPIC)]
    assert [len(partition) for partition in there] == [2]
    assert [schema_number(pa.ipc.read_schema(pa.py_buffer(one.payload))) for one in there[0]] == [
        one.schema for one in there[0]
    ]


def test_broken_schemas_are_as_good_as_none() -> None:
    topic = Topic()
    number = schema_number(batch_of(ROW).schema)
    payload = encode(batch_of(ROW), "arrow")[0]
    topic.log.create(schemas_topic(TOPIC), 1)
    for broken in (b"", b"garbage", ACTION.serialize().to_pybytes()):
        topic.log.append(LogPartition(schemas_topic(TOPIC), 0), broken, number)
        assert topic.decode([topic.message(payload, number)])[1][0].reason == "unknown schema number"
    assert announce(topic.log, topic.schemas, TOPIC, batch_of(ROW).schema) == number
    assert not topic.decode([topic.message(payload, number)])[1]


def test_event_proto_says_what_is_read() -> None:
    text = (ROOT / "monolith_jax/stream/event.proto").read_text()
    types = {value: name.removeprefix("TYPE_").lower() for name, value in descriptor_pb2.FieldDescriptorProto.Type.items()}
    for name in ("Impression", "Action"):
        [body] = re.findall(rf"message {name} {{(.*?)\n}}", text, re.DOTALL)
        written = {
            (label or "map", kind, field, int(number))
            for label, kind, field, number in re.findall(r"(?:(optional|repeated) )?(\S+|map<.*?>) (\w+) = (\d+);", body)
        }
        made = descriptor_pb2.DescriptorProto()
        message_class(name).DESCRIPTOR.CopyToProto(made)
        built = set()
        for field in made.field:
            if field.type_name:
                value = made.nested_type[field.number - 100].field[1]
                built.add(("map", f"map<string, {types[value.type]}>", field.name, field.number))
            else:
                label = "optional" if field.proto3_optional else "repeated"
                built.add((label, types[field.type], field.name, field.number))
        assert written == built


def test_a_format_must_exist() -> None:
    with pytest.raises(ValueError, match="no format 'avro'; choose one of arrow, json, protobuf, debezium"):
        check_format("avro")
    with pytest.raises(ValueError, match="without the schemas"):
        Decoder("impression", TOPIC, "arrow")
