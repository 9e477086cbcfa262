"""A topic in memory that tests write to and decode, and rows as batches."""

import json
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.events import ACTION, IMPRESSION
from monolith_jax.stream.formats import (
    Schemas,
    announce,
    encode,
)
from monolith_jax.stream.log import LogPartition, Message
from monolith_jax.types import Rejected
from tests.stream.memory_log import MemoryLog

TOPIC = "impressions"
PLACE = LogPartition(TOPIC, 3)
T = 1_700_000_000_000
ROW: dict[str, Any] = {"event_time_ms": T, "request_id": 1, "user_id": 2, "video_id": 3}
DID: dict[str, Any] = {**ROW, "action": "like"}


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

    def column(name: str) -> pa.Array:
        values = [row.get(name) for row in rows]
        if known.get(name) == pa.float16():  # pyarrow 19 makes none of Python's numbers
            return pa.array(np.array(values, np.float16))
        return pa.array(values, known.get(name))

    return pa.record_batch({name: column(name) for name in names})


def sealed(rest: bytes) -> bytes:
    return zlib.crc32(rest).to_bytes(4, "little") + rest


def dumped(**row: Any) -> bytes:
    return json.dumps(ROW | row).encode()
