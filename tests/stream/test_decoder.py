import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from monolith_jax.stream.decoder import MAX_MESSAGE_BYTES
from monolith_jax.stream.events import ACTIONS, IMPRESSION
from monolith_jax.stream.formats import (
    FORMATS,
    announce,
    encode,
)
from monolith_jax.stream.protobuf_events import message_class
from tests.stream.event_topic import ROW, TOPIC, Topic, batch_of, dumped, sealed

ROOT = Path(__file__).parents[2]


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
        (dumped()[:-1] + b', "place": "\xff"}', "not JSON"),
        (b"{}", "event_time_ms is missing"),
    ],
)
def test_bad_json_is_set_aside(payload: bytes, reason: str) -> None:
    assert Topic("json").refused(payload) == reason


def test_messages_that_are_events_only_together_are_none() -> None:
    topic = Topic("json")
    two = dumped()[:-1] + b'}}\n{"p":' + dumped()
    for halves in ((dumped()[:-1], b"}"), (dumped()[:-1] + b',"x":"', b'"}'), (dumped()[:-1] + b',"x":', b"1}")):
        rows, rejected = topic.decode([topic.message(one) for one in (two, *halves, dumped(author_id=9))])
        assert [row["author_id"] for row in rows] == [9] and len(rejected) == 3


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


def test_protobuf_columns_come_in_the_order_of_their_names() -> None:
    topic = Topic("protobuf")
    further = [f"x{number:02}" for number in range(40)]
    topic.read(batch_of({**ROW, **dict.fromkeys(reversed(further), 1)}))
    assert topic.decoder.schema.names == [*IMPRESSION.names, *further]


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
