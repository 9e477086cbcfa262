"""Payloads as batches, in whatever schema they have: what is damaged or is no event is told by a short, countable reason.

In: bytes that anyone may have written, and the run's schema so far. Out: record batches whose every value is valid, or
`BadPayload`. Whether their columns go with the run's is not asked here (`run_schema`).
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json as arrow_json

from monolith_jax.stream.formats import HEAD, VERSION
from monolith_jax.stream.run_schema import MAX_COLUMNS

MAX_BRACKETS = 64
"""A JSON message with more opening brackets is looked at closely: deep ones would exhaust the stack of who parses them."""
MAX_DEPTH = 16
LARGE = 65_536
"""Bytes from which a JSON message's names are counted before it is parsed."""
MAX_JSON_BYTES, MAX_JSON_ROWS = 1 << 20, 1024
"""What is parsed at once. More would gain nothing, and a name that occurs once takes a place in each row."""

_WORDS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
"""Texts, and brackets outside of them. Possessive, and a text may lack its end: else garbage could take quadratic time."""


class BadPayload(ValueError):
    """A payload that holds no event; the message is a short, countable reason."""


def read_arrow(payload: bytes, schema: pa.Schema) -> pa.RecordBatch:
    """Returns the events of an Arrow message, every value checked to be valid.

    Raises:
        BadPayload: It is damaged, or no record batch of this schema.
    """
    if len(payload) < HEAD.size:
        raise BadPayload("shorter than its head")
    checksum, version = HEAD.unpack_from(payload)
    view = memoryview(payload)
    if zlib.crc32(view[4:]) != checksum:
        raise BadPayload("checksum does not match")
    if version != VERSION:
        raise BadPayload("unknown version")
    try:
        batch = pa.ipc.read_record_batch(pa.py_buffer(view[HEAD.size :]), schema)
        # Nothing may read a value before: offsets and lengths point anywhere in a batch that is wrong with a right checksum.
        batch.validate(full=True)
    except Exception:  # Arrow raises several kinds, OSError among them
        raise BadPayload("not an Arrow record batch of its schema") from None
    return batch


def _is_deep(payload: bytes) -> bool:
    depth = 0
    for word in _WORDS.finditer(payload):
        depth += (word[0] in (b"{", b"[")) - (word[0] in (b"}", b"]"))
        if depth > MAX_DEPTH:
            return True
    return False


def unsafe_json(payload: bytes) -> str:
    """Returns why a payload must not even be parsed with others, "" if it may."""
    if payload.count(b"[") + payload.count(b"{") > MAX_BRACKETS and _is_deep(payload):
        return "nested too deeply"
    if len(payload) > LARGE and payload.count(b'":') > 4 * MAX_COLUMNS:
        return f"schema: more than {MAX_COLUMNS} columns"
    return ""


def read_json(payloads: Sequence[bytes], known: pa.Schema) -> pa.RecordBatch:
    """Returns a row for each payload.

    Args:
        payloads: An object of columns each; none for which `unsafe_json` has a reason.
        known: Columns that must have these types. Others get the type of their values; text that looks like a date is text.

    Raises:
        BadPayload: One of them is no such object, or of other types.
    """
    batch = _read_json(payloads, known)
    dates = [field for field in batch.schema if field.name not in known.names and _as_text(field.type) != field.type]
    if not dates:
        return batch
    return _read_json(payloads, pa.schema([*known, *(pa.field(field.name, _as_text(field.type)) for field in dates)]))


def _as_text(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    return pa.list_(_as_text(kind.value_type)) if pa.types.is_list(kind) else kind


def _read_json(payloads: Sequence[bytes], known: pa.Schema) -> pa.RecordBatch:
    # In an object of its own, so that two halves in two messages, or two objects in one, cannot pass for one object a message.
    data = b'{"p":' + b'}\n{"p":'.join(payloads) + b"}\n"
    fields = pa.struct([pa.field(field.name, field.type) for field in known])
    try:
        table = arrow_json.read_json(
            pa.BufferReader(data),
            arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            arrow_json.ParseOptions(pa.schema([pa.field("p", fields)])),
        )
        if table.num_rows != len(payloads) or table.column_names != ["p"]:
            raise BadPayload("not one JSON object")
        column = table.column("p")
        rows = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        rows.validate(full=True)
        if rows.null_count:
            raise BadPayload("not a JSON object")
        return pa.RecordBatch.from_arrays(rows.flatten(), names=[field.name for field in rows.type])
    except (pa.ArrowException, UnicodeError, MemoryError):
        raise BadPayload("not JSON events of these types") from None


def json_fault(payload: bytes) -> str:
    """Returns why a payload that could not be read is no JSON object, "" if it is one."""
    try:
        value = json.loads(payload)
    except Exception as error:  # RecursionError and the limit of digits among them
        several = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        return "several JSON values" if several else "not JSON"
    return "" if isinstance(value, dict) else "not a JSON object"


def after_row(payload: bytes) -> bytes:
    """Returns the row that a Debezium envelope says is there now, as JSON.

    Args:
        payload: An envelope, bare or with its schema around it.

    Raises:
        BadPayload: It is none, or the row is gone: a deletion takes back an event that may have been trained on, which nothing
            can undo, so that it is set aside and counted.
    """
    if not payload:
        raise BadPayload("debezium: a tombstone")
    try:
        found: Any = json.loads(payload)
        if isinstance(found, dict) and "payload" in found and "op" not in found:
            found = found["payload"]
    except Exception:
        raise BadPayload("not JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("op"), str):
        raise BadPayload("debezium: no envelope")
    # An update of an event is taken like a new one: with the same `event_id` it counts once.
    if found["op"] not in ("c", "r", "u"):
        raise BadPayload("debezium: a deletion" if found["op"] == "d" else "debezium: no change of a row")
    if not isinstance(found.get("after"), dict):
        raise BadPayload("debezium: no row after the change")
    try:
        return json.dumps(found["after"]).encode()
    except Exception:
        raise BadPayload("debezium: no row after the change") from None
