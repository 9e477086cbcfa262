"""What a message of a log holds: events as bytes, in one of four formats, and the schemas that one of them needs.

In: record batches of impressions or actions. Out: payloads, and the other way round the schemas by their numbers;
`decoder` turns payloads into events. The formats:

* `arrow`: up to 4096 events a message: crc32 of the rest (4 bytes, little endian), the number 1 (4 bytes: so that what follows
  is aligned), then one Arrow record batch in IPC form without its schema, whose number is in the message's header;
* `json`: an event a message, an object of columns; a column that is not there is null;
* `protobuf`: an event a message, as `event.proto` says;
* `debezium`: an event a message, the envelope of a change of a table (debezium.io), bare or as `{"schema":..., "payload":...}`.

Schemas of Arrow travel in the log itself: topic `<topic>-schemas`, one partition, each a message with its number in the header.
They must stay as long as messages that use them: `announce` makes the topic so; one made in Kafka by other means needs
`retention.ms=-1`.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from monolith_jax.stream import protobuf_events
from monolith_jax.stream.log import Log, LogPartition, Producer

MAX_ROWS = 4096
"""Most events of an Arrow message."""
HEAD = struct.Struct("<II")
"""What comes before the record batch: the checksum of all that follows it, and `VERSION`."""
VERSION = 1


def schema_number(schema: pa.Schema) -> int:
    """Returns a hash of names and types in their order, uint64, never 0: a schema has the same number wherever it is made."""
    text = json.dumps([[field.name, str(field.type)] for field in schema])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def schemas_topic(topic: str) -> str:
    """Returns the name of the topic that holds the schemas of another."""
    return f"{topic}-schemas"


def _sent_kind(kind: pa.DataType) -> pa.DataType:
    """Returns the type that is sent: a dictionary would be a message of its own, and not every reader knows fixed sizes."""
    if pa.types.is_dictionary(kind):
        return _sent_kind(kind.value_type)
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return pa.list_(_sent_kind(kind.value_type))
    return kind


def sent_schema(schema: pa.Schema) -> pa.Schema:
    """Returns the schema that batches of a schema have in an Arrow message: dictionaries as their values, no metadata."""
    return pa.schema([pa.field(field.name, _sent_kind(field.type)) for field in schema])


def _arrow(batch: pa.RecordBatch) -> list[bytes]:
    schema = sent_schema(batch.schema)
    columns = zip(batch.columns, schema, strict=True)
    plain = pa.RecordBatch.from_arrays(
        [column if column.type == field.type else column.cast(field.type) for column, field in columns],
        schema=schema,
    )
    payloads: list[bytes] = []
    for first in range(0, len(plain), MAX_ROWS):
        rest = VERSION.to_bytes(4, "little") + plain.slice(first, MAX_ROWS).serialize().to_pybytes()
        payloads.append(zlib.crc32(rest).to_bytes(4, "little") + rest)
    return payloads


def _objects(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if value is not None} for row in batch.to_pylist()]


def _json(batch: pa.RecordBatch) -> list[bytes]:
    dump = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, default=str).encode
    return [dump(row).encode() for row in _objects(batch)]


def _debezium(batch: pa.RecordBatch) -> list[bytes]:
    dump = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, default=str).encode
    return [
        dump({"before": None, "after": row, "source": {}, "op": "c", "ts_ms": row.get("event_time_ms")}).encode()
        for row in _objects(batch)
    ]


_ENCODERS: dict[str, Callable[[pa.RecordBatch], list[bytes]]] = {
    "arrow": _arrow,
    "json": _json,
    "protobuf": protobuf_events.encode,
    "debezium": _debezium,
}
FORMATS = tuple(_ENCODERS)
"""The names of the formats."""


def check_format(format: str) -> None:
    """Raises ValueError if there is no such format."""
    if format not in _ENCODERS:
        raise ValueError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")


def encode(batch: pa.RecordBatch, format: str) -> list[bytes]:
    """Returns the payloads that hold the events of a batch, in order.

    Args:
        batch: Impressions or actions, with any further columns.
        format: One of `FORMATS`. `arrow`: a message for each 4096 events; its header must have the number that `announce`
            returns for the batch's schema. The others: an event a message.

    Raises:
        ValueError: There is no such format, or it has no place for a column.
    """
    check_format(format)
    return _ENCODERS[format](batch)


class Schemas:
    """The schemas of a topic, by their numbers, as far as they stand in the log."""

    def __init__(self, log: Log, topic: str) -> None:
        """Reads nothing yet.

        Args:
            log: A log of its own, not the one that events are read from: `poll` there would return the schemas too.
            topic: The topic of the events.
        """
        self._log = log
        self._partition = LogPartition(schemas_topic(topic), 0)
        self._next: int | None = None
        self._found: dict[int, pa.Schema] = {}

    def refresh(self) -> None:
        """Reads what was appended since; nothing where there is no such topic yet. A broken schema is as good as none."""
        try:
            self._log.num_partitions(self._partition.topic)
        except ValueError:
            return
        first, end = self._log.bounds(self._partition)
        begin = first if self._next is None else max(first, self._next)
        if begin >= end:
            return
        self._log.seek(self._partition, begin)
        for message in self._log.read_to(self._partition, end):
            try:
                schema = pa.ipc.read_schema(pa.py_buffer(message.payload))
                number = schema_number(schema)
            except Exception:  # whatever Arrow makes of garbage: messages with this number are set aside and counted
                continue
            if not message.fault and number == message.schema:
                self._found[number] = schema
        self._next = end

    def find(self, number: int) -> pa.Schema | None:
        """Returns the schema with a number, None where it was not read."""
        return self._found.get(number)


def announce(producer: Producer, schemas: Schemas, topic: str, schema: pa.Schema) -> int:
    """Appends a schema to the schemas of a topic unless it stands there, and returns when it is in the log.

    Args:
        producer: Of the log that `schemas` reads.
        schemas: The schemas of this topic.
        topic: The topic of the events.
        schema: Of batches that are about to be encoded.

    Returns:
        The number for the headers of their messages.
    """
    sent = sent_schema(schema)
    number = schema_number(sent)
    if schemas.find(number) is None:
        schemas.refresh()
    if schemas.find(number) is None:
        producer.create(schemas_topic(topic), 1, forever=True)
        producer.append(LogPartition(schemas_topic(topic), 0), sent.serialize().to_pybytes(), schema=number)
        producer.flush()
        schemas.refresh()
    return number
