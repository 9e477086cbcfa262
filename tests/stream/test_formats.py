import json
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import strategies as st

from monolith_jax.stream.decoder import MAX_MESSAGE_BYTES, Decoder
from monolith_jax.stream.events import ACTION, ACTIONS, IMPRESSION
from monolith_jax.stream.formats import (
    FORMATS,
    Schemas,
    announce,
    check_format,
    encode,
    schema_number,
    schemas_topic,
)
from monolith_jax.stream.log import LogPartition, Message
from monolith_jax.stream.protobuf_events import message_class
from monolith_jax.types import Rejected
from tests.stream.memory_log import MemoryLog
from tests.stream.mutated import actions, impressions

ROOT = Path(__file__).parents[2]
TOPIC = "impressions"
PLACE = LogPartition(TOPIC, 3)
T = 1_700_000_000_000
ROW: dict[str, Any] = {"event_time_ms": T, "request_id": 1, "user_id": 2, "video_id": 3}
DID: dict[str, Any] = {**ROW, "action": "like"}
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


class Topic:
    """A topic of one format: what is written to it, and its decoder."""

    def __init__(self, format: str = "arrow", kind: Literal["impression", "action"] = "impression") -> None:
        self.log = MemoryLog()
        self.format = format
        self.schemas = Schemas(self.log, TOPIC)
        self.decoder = Decoder(kind, TOPIC, format, self.schemas)
        self.next = 1000

    def messages(self, batch: pa.RecordBatch) -> list[Message]:
        number = announce(self.log, Schemas(self.log, TOPIC), TOPIC, batch.schema) if self.format == "arrow" else 0
        return [self.message(payload, number) for payload in encode(batch, self.format)]

    def message(self, payload: bytes, schema: int = 0, fault: str = "") -> Message:
        self.next += 1
        return Message(self.next - 1, payload, 0, schema, fault)

    def decode(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], tuple[Rejected, ...]]:
        batch, rejected = self.decoder.decode(PLACE, messages)
        assert batch.schema == self.decoder.schema
        batch.validate(full=True)
        return batch.to_pylist(), rejected

    def read(self, *batches: pa.RecordBatch) -> list[dict[str, Any]]:
        rows, rejected = self.decode([message for batch in batches for message in self.messages(batch)])
        assert not rejected
        return rows

    def refused(self, payload: bytes, schema: int = 0, fault: str = "") -> str:
        """Returns why a message is set aside, between two good ones that must come out."""
        start = IMPRESSION if "action" not in self.decoder.schema.names else ACTION
        good = batch_of(ROW if start is IMPRESSION else DID, schema=start)
        message = self.message(payload, schema, fault)
        rows, rejected = self.decode([*self.messages(good), message, *self.messages(good)])
        assert len(rows) == 2
        assert [one.where for one in rejected] == [f"{TOPIC}/3@{message.offset}"]
        assert rejected[0].raw == repr(payload[:500])[:500]
        return rejected[0].reason


def batch_of(*rows: dict[str, Any], schema: pa.Schema | None = None, **kinds: pa.DataType) -> pa.RecordBatch:
    """Returns rows as a batch in the types of the events' schemas, of `kinds`, or of their values."""
    names = list(dict.fromkeys(name for row in rows for name in row)) if schema is None else schema.names
    known = {field.name: field.type for field in [*IMPRESSION, *ACTION]} | kinds
    return pa.record_batch({name: pa.array([row.get(name) for row in rows], known.get(name)) for name in names})


def sealed(rest: bytes) -> bytes:
    return zlib.crc32(rest).to_bytes(4, "little") + rest


def dumped(**row: Any) -> bytes:
    return json.dumps(ROW | row).encode()


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


@pytest.mark.parametrize("format", FORMATS)
def test_further_columns_are_taken_and_missing_ones_are_null(format: str) -> None:
    topic = Topic(format)
    first = topic.read(batch_of({**ROW, "x": 1}), batch_of(ROW), batch_of({**ROW, "y": "text", "x": 2}))
    assert [(row["x"], row["y"]) for row in first] == [(1, None), (None, None), (2, "text")]
    assert [(row["x"], row["y"], row["author_id"]) for row in topic.read(batch_of(ROW))] == [(None, None, None)]
    assert topic.decoder.schema.names == [*IMPRESSION.names, "x", "y"]


def test_types_widen() -> None:
    topic = Topic()
    kinds = {"whole": pa.int32(), "real": pa.float32(), "text": pa.large_string(), "list": pa.list_(pa.int16())}
    row = {**ROW, "whole": 1, "real": 0.5, "text": "a", "list": [1]}
    topic.read(batch_of(row, **kinds))
    assert [str(topic.decoder.schema.field(name).type) for name in kinds] == ["int64", "double", "string", "list<item: int64>"]
    others = {
        "whole": (pa.int8(), pa.uint64(), pa.int64(), pa.null()),
        "real": (pa.float64(), pa.int64(), pa.float16(), pa.null()),
        "text": (pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.null()),
        "list": (pa.large_list(pa.int64()), pa.list_(pa.uint8()), pa.list_(pa.null())),
    }
    values = {"whole": 1, "real": 1, "text": "a", "list": [1]}
    for name, each in others.items():
        for kind in each:
            value = None if kind == pa.null() else [] if kind == pa.list_(pa.null()) else values[name]
            assert topic.read(batch_of({**ROW, name: value}, **{name: kind}))[0][name] == value


@pytest.mark.parametrize(
    ("first", "then", "reason"),
    [
        (1, "a", "schema: column 'x' is string, was int64"),
        (1, 1.5, "schema: column 'x' is double, was int64"),
        (1, True, "schema: column 'x' is bool, was int64"),
        ("a", 1, "schema: column 'x' is int64, was string"),
        ([1], 1, "schema: column 'x' is int64, was list<item: int64>"),
        ([1], ["a"], "schema: column 'x' is list<item: string>, was list<item: int64>"),
        (1, {"a": 1}, "schema: column 'x' is struct<a: int64>, was int64"),
        (None, {"a": 1}, "schema: column 'x' is struct<a: int64>, which is not carried"),
    ],
)
def test_a_changed_type_is_refused(first: object, then: object, reason: str) -> None:
    for format in ("arrow", "json", "debezium"):
        topic = Topic(format)
        topic.read(batch_of({**ROW, "x": first}))
        bad = topic.messages(batch_of({**ROW, "x": then}))
        rows, rejected = topic.decode([*topic.messages(batch_of(ROW)), *bad, *topic.messages(batch_of({**ROW, "x": first}))])
        assert [row.get("x") for row in rows] == [None, first]
        assert [(one.where, one.reason) for one in rejected] == [(f"{TOPIC}/3@{bad[0].offset}", reason)]


def test_a_type_that_changes_within_a_poll_is_refused_from_there_on() -> None:
    topic = Topic("json")
    rows, rejected = topic.decode([topic.message(dumped(x=value)) for value in (1, "a", 2, "b", 3)])
    assert [row["x"] for row in rows] == [1, 2, 3]
    assert [one.reason for one in rejected] == ["schema: column 'x' is string, was int64"] * 2


def test_values_that_do_not_fit_refuse_their_message_alone() -> None:
    topic = Topic()
    batches = [batch_of({**ROW, "x": value}, x=pa.uint64()) for value in (1, 2**63, 3)]
    rows, rejected = topic.decode([topic.messages(batch)[0] for batch in batches])
    assert [row["x"] for row in rows] == [1, 3]
    assert [one.reason for one in rejected] == ["schema: a value of column 'x' does not fit int64"]


def test_text_that_looks_like_a_time_is_text() -> None:
    topic = Topic("json")
    rows, rejected = topic.decode([topic.message(dumped(x="2024-01-01 10:00:00")), topic.message(dumped(x="soon"))])
    assert [row["x"] for row in rows] == ["2024-01-01 10:00:00", "soon"] and not rejected


def test_columns_of_bad_events_alone_are_not_taken() -> None:
    topic = Topic("json")
    _, rejected = topic.decode([topic.message(dumped(user_id=None, junk=1)), topic.message(dumped())])
    assert [one.reason for one in rejected] == ["user_id is missing"]
    assert topic.decoder.schema == IMPRESSION


def test_names_made_of_ids_do_not_fill_the_memory() -> None:
    topic = Topic("json")
    rows, rejected = topic.decode([topic.message(dumped(**{f"{k}-{i}": 1 for i in range(100)})) for k in range(12)])
    assert len(rows) == 9 and {one.reason for one in rejected} == {"schema: more than 1000 columns"}
    large = topic.message(dumped(**{f"a{i}": 1 for i in range(20_000)}))
    assert topic.decode([large])[1][0].reason == "schema: more than 1000 columns"


@pytest.mark.parametrize("format", FORMATS)
def test_the_state_is_the_schema(format: str) -> None:
    topic = Topic(format)
    topic.read(batch_of({**ROW, "x": 1}), batch_of({**ROW, "y": "a"}))
    state = json.loads(json.dumps(topic.decoder.get_state()))
    again = Decoder("impression", TOPIC, format, topic.schemas)
    assert again.schema == IMPRESSION
    again.set_state(state)
    messages = topic.messages(batch_of({**ROW, "z": 0.5}))
    assert again.decode(PLACE, messages)[0].equals(topic.decoder.decode(PLACE, messages)[0])
    assert again.schema == topic.decoder.schema and again.schema.names[-3:] == ["x", "y", "z"]


@pytest.mark.parametrize("state", [{}, {"schema": "AAAA"}, {"schema": 3}, {"schema": "?"}])
def test_a_wrong_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"the state of topic '{TOPIC}'"):
        Topic().decoder.set_state(state)
    with pytest.raises(ValueError, match="is not one of impressions"):
        Topic().decoder.set_state(Topic(kind="action").decoder.get_state())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user_id": None}, "user_id is missing"),
        ({"video_id": None}, "video_id is missing"),
        ({"event_time_ms": None}, "event_time_ms is missing"),
        ({"request_id": None}, "request_id is missing"),
        ({"event_time_ms": 946_684_799_999}, "time out of range"),
        ({"event_time_ms": 4_102_444_800_000}, "time out of range"),
        ({"duration_ms": -1}, "negative duration"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_single_bad_impressions_are_set_aside(format: str, change: dict[str, Any], reason: str) -> None:
    check_single(Topic(format), {**ROW, "duration_ms": 1}, change, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"action": None}, "action is missing"),
        ({"action": "lick"}, "unknown action"),
        ({"action": "play"}, "value is missing"),
        ({"action": "dwell", "value": -1}, "negative value"),
        ({"user_id": None}, "user_id is missing"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_single_bad_actions_are_set_aside(format: str, change: dict[str, Any], reason: str) -> None:
    check_single(Topic(format, "action"), {**ROW, "action": "like", "value": None}, change, reason)


def check_single(topic: Topic, row: dict[str, Any], change: dict[str, Any], reason: str) -> None:
    batch = batch_of(row, row, row | change, row)
    messages = [*topic.messages(batch), *topic.messages(batch)]
    rows, rejected = topic.decode(messages)
    assert [row["user_id"] for row in rows] == [2] * 6 and [one.reason for one in rejected] == [reason] * 2
    places = ["@1000#2", "@1001#2"] if topic.format == "arrow" else ["@1002", "@1006"]
    assert [one.where for one in rejected] == [f"{TOPIC}/3{place}" for place in places]
    assert "request_id" in rejected[0].raw or change == {"request_id": None} or topic.format == "protobuf"


def test_good_actions_pass() -> None:
    timed = [{"action": name, "value": 0} for name in ("play", "dwell")]
    rows = [
        {**ROW, "value": None, **one}
        for one in [*timed, *({"action": name} for name in ACTIONS), {"action": "like", "value": -7}]
    ]
    for format in FORMATS:
        assert [row["action"] for row in Topic(format, "action").read(batch_of(*rows))] == [row["action"] for row in rows]


def test_set_aside_rows_come_in_order() -> None:
    topic = Topic()
    bad_row = topic.messages(batch_of(ROW, {**ROW, "user_id": None}))
    _, rejected = topic.decode([topic.message(b""), *bad_row, topic.message(b"x", 1), *topic.messages(batch_of(ROW)), *bad_row])
    assert [one.where for one in rejected] == [f"{TOPIC}/3@{place}" for place in ("1001", "1000#1", "1002", "1000#1")]


def test_damaged_arrow_messages_are_set_aside() -> None:
    topic = Topic()
    [message] = topic.messages(batch_of(ROW))
    payload, number = message.payload, message.schema
    other = announce(topic.log, topic.schemas, TOPIC, batch_of({**ROW, "more": [1]}).schema)
    for bad in (payload[:-1], payload + b"x", payload[:50] + bytes([payload[50] ^ 1]) + payload[51:]):
        assert topic.refused(bad, number) == "checksum does not match"
    assert topic.refused(payload[:7], number) == "shorter than its head"
    assert topic.refused(b"", number) == "empty message"
    assert topic.refused(bytes(MAX_MESSAGE_BYTES + 1), number) == f"larger than {MAX_MESSAGE_BYTES} bytes"
    assert topic.refused(sealed(b"\2" + payload[5:]), number) == "unknown version"
    assert topic.refused(payload, 0) == "no schema number"
    assert topic.refused(payload, 7) == "unknown schema number"
    assert topic.refused(payload, number, "broken segment") == "broken segment"
    for rest in (payload[4:-8], payload[4:8], payload[4:8] + b"garbage", payload[4:8] + IMPRESSION.serialize().to_pybytes()):
        assert topic.refused(sealed(rest), number) == "not an Arrow record batch of its schema"
    assert topic.refused(payload, other) == "not an Arrow record batch of its schema"


def test_arrow_schemas_without_required_columns_are_refused() -> None:
    topic = Topic()
    for bad, reason in [
        (batch_of({"x": 1}), "schema: column 'event_time_ms' is missing"),
        (batch_of({**ROW, "user_id": "a"}, user_id=pa.string()), "schema: column 'user_id' is string, was int64"),
        (pa.record_batch([pa.array([T])] * 6, names=[*ROW, "x", "x"]), "schema: column 'x' is there twice"),
        (pa.record_batch([pa.array([T])] * 4 + [pa.array([{"a": 1}])], names=[*ROW, "x"]), "which is not carried"),
    ]:
        [message] = topic.messages(bad)
        assert topic.refused(message.payload, message.schema).endswith(reason)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"garbage", "not JSON"),
        (b"  ", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (dumped()[:-1], "not JSON"),
        (dumped()[:20], "not JSON"),
        (dumped() + dumped(), "several JSON values"),
        (dumped() + b"\n" + dumped(), "several JSON values"),
        (dumped()[:-1] + b'},"q":{"x":1}', "several JSON values"),
        (b"null", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (dumped(user_id="2"), "schema: column 'user_id' is string, was int64"),
        (dumped(user_id=2**63), "schema: column 'user_id' is double, was int64"),
        (dumped(user_id=2)[:-1] + b', "user_id": 3}', "not JSON events of these types"),
        (b'{"user_id": "\xff"}', "not JSON"),
        (b"{}", "event_time_ms is missing"),
    ],
)
def test_bad_json_is_set_aside(payload: bytes, reason: str) -> None:
    assert Topic("json").refused(payload) == reason


def test_brackets_within_text_are_no_nesting() -> None:
    topic = Topic("json")
    rows, rejected = topic.decode([topic.message(dumped(x='\\"[{' * 100)), topic.message(dumped(x="y", y=[[1]] * 100))])
    assert len(rows) == 2 and not rejected


def enveloped(op: str | None = "c", after: object = ROW, **more: object) -> dict[str, Any]:
    return {"before": None, "after": after, "source": {"table": "views"}, "op": op, "ts_ms": 1, **more}


def test_debezium_envelopes() -> None:
    topic = Topic("debezium")
    found = [enveloped(op) for op in ("c", "r", "u")] + [{"schema": {"type": "struct", "fields": []}, "payload": enveloped()}]
    rows, rejected = topic.decode([topic.message(json.dumps(one).encode()) for one in found])
    assert len(rows) == 4 and not rejected and rows[0]["user_id"] == 2


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "debezium: a tombstone"),
        (b"garbage", "not JSON"),
        (json.dumps(ROW).encode(), "debezium: no envelope"),
        (b'{"schema":null,"payload":null}', "debezium: no envelope"),
        (json.dumps(enveloped("d", None, before=ROW)).encode(), "debezium: a deletion"),
        (json.dumps(enveloped("t")).encode(), "debezium: no change of a row"),
        (json.dumps(enveloped("c", None)).encode(), "debezium: no row after the change"),
        (json.dumps(enveloped("c", ROW | {"user_id": "x"})).encode(), "schema: column 'user_id' is string, was int64"),
    ],
)
def test_bad_debezium_is_set_aside(payload: bytes, reason: str) -> None:
    assert Topic("debezium").refused(payload) == reason


def test_bad_protobuf_is_set_aside() -> None:
    topic = Topic("protobuf")
    make = message_class("Impression")
    assert topic.refused(b"\xff\xff") == "not a protobuf event"
    assert topic.refused(encode(batch_of({**ROW, "x": "text"}), "protobuf")[0][:-1]) == "not a protobuf event"
    assert topic.refused(make(**ROW, numbers={f"{i}": 1 for i in range(1001)}).SerializeToString()) == (
        "schema: more than 1000 columns"
    )
    twice = make(**ROW, numbers={"x": 1}, texts={"x": "a"}).SerializeToString()
    assert topic.refused(twice) == "schema: column 'x' is there twice"
    assert topic.refused(make(**ROW, texts={"user_id": "a"}).SerializeToString()) == "schema: column 'user_id' is there twice"


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


def test_nothing_is_something_too() -> None:
    for format in FORMATS:
        assert Topic(format).decode([]) == ([], ())


def fuzzed(number: int) -> dict[str, Any]:
    """Returns the counts of a process that must not crash: were Arrow to follow a wrong offset, no test would see it raise."""
    command = [sys.executable, "-m", "tests.stream.mutated", str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_mutated_messages_never_raise_and_never_lose_an_event() -> None:
    found = fuzzed(20_000)
    assert found["set aside"] > 15_000 and len(found["reasons"]) > 30


@pytest.mark.slow
def test_a_million_mutated_messages() -> None:
    assert fuzzed(1_000_000)["set aside"] > 750_000
