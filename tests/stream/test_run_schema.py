import json
from typing import Any

import pyarrow as pa
import pytest

from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.events import IMPRESSION
from monolith_jax.stream.formats import (
    FORMATS,
)
from tests.stream.event_topic import PLACE, ROW, TOPIC, T, Topic, batch_of, dumped


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


@pytest.mark.parametrize("format", FORMATS)
def test_an_impression_cannot_bring_its_own_label(format: str) -> None:
    for name in ("like", "play_time_ms", "weight"):
        topic = Topic(format)
        rows, rejected = topic.decode([*topic.messages(batch_of({**ROW, name: 1})), *topic.messages(batch_of(ROW))])
        assert len(rows) == 1 and [one.reason for one in rejected] == [
            f"schema: column {name!r} is reserved for what a join makes"
        ]


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
