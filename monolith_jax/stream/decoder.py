"""Messages of a log as events in one schema, the bad ones set aside.

In: messages of a partition, in order. Out: their events in order, in the run's schema (`run_schema`), and what was set aside:
whole messages (`topic/partition@offset`) and single events of Arrow messages (`topic/partition@offset#row`), with a reason.
Whatever a message holds, nothing is raised. The state is the run's schema: the same messages in the same calls give
the same events.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream import validate
from monolith_jax.stream.events import ACTION, ACTIONS, IMPRESSION, OUTCOME, valid_mask
from monolith_jax.stream.formats import Schemas, check_format
from monolith_jax.stream.log import LogPartition, Message
from monolith_jax.stream.payloads import BadPayload, read_arrow
from monolith_jax.stream.run_schema import SchemaFault, extended
from monolith_jax.stream.single_events import READERS, Work
from monolith_jax.types import Rejected

TIMED_ACTIONS = ("play", "dwell")
"""Actions whose value is a time in ms."""
MAX_MESSAGE_BYTES = 16 << 20

_SCHEMAS = {"impression": IMPRESSION, "action": ACTION}
_REQUIRED = {
    "impression": ("event_time_ms", "request_id", "user_id", "video_id"),
    "action": ("event_time_ms", "request_id", "user_id", "video_id", "action"),
}
_RESERVED = {"impression": frozenset(OUTCOME.names), "action": frozenset()}
"""What a join adds to impressions: their own would be taken for it."""
_NAMES = pa.array([*ACTIONS, *TIMED_ACTIONS])


def _faults(batch: pa.RecordBatch, kind: str) -> list[validate.Fault]:
    """Returns the faults of single events. Rows are looked at only where a column as a whole is not fine."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    faults = [validate.required(columns[name], name) for name in _REQUIRED[kind] if columns[name].null_count]
    times = columns["event_time_ms"]
    if not _within(times, validate.FIRST_MS, validate.LAST_MS - 1):
        faults.append(validate.in_time_range(times))
    if kind == "impression":
        if not _within(columns["duration_ms"], 0, None):
            faults.append(validate.not_negative(columns["duration_ms"], "negative duration"))
        return faults
    action = columns["action"]
    codes = pc.fill_null(pc.index_in(action, _NAMES), -1).to_numpy()
    if (codes < 0).any():
        faults.append(((codes < 0) & valid_mask(action), "unknown action"))
    value = columns["value"]
    timed = codes >= len(ACTIONS)
    if (timed & (pc.fill_null(value, -1).to_numpy() < 0)).any():
        faults.append((timed & ~valid_mask(value), "value is missing"))
        faults.append((timed & (pc.fill_null(value, 0).to_numpy() < 0), "negative value"))
    return faults


def _within(column: pa.Array, low: int, high: int | None) -> bool:
    if column.null_count == len(column):
        return True
    found = pc.min_max(column)
    return found["min"].as_py() >= low and (high is None or found["max"].as_py() <= high)


class Decoder:
    """Decodes the messages of one topic."""

    def __init__(
        self,
        kind: Literal["impression", "action"],
        topic: str,
        format: str,
        schemas: Schemas | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        future_s: float = float("inf"),
    ) -> None:
        """Reads nothing yet.

        Args:
            kind: What the events are.
            topic: The topic, for messages to people.
            format: One of `formats.FORMATS`.
            schemas: Of the topic; needed for `arrow`.
            max_message_bytes: A longer payload is set aside.
            future_s: So is an event whose time is further ahead of the one at which its message was appended.

        Raises:
            ValueError: There is no such format, or it needs schemas.
        """
        check_format(format)
        if format == "arrow" and schemas is None:
            raise ValueError(f"topic {topic!r}: events in format arrow cannot be read without the schemas of their log")
        self._kind, self._topic, self._format, self._schemas = kind, topic, format, schemas
        self._max_bytes, self._future_ms = max_message_bytes, 1000 * future_s
        self._required = _REQUIRED[kind]
        self._schema = _SCHEMAS[kind]

    @property
    def schema(self) -> pa.Schema:
        """The run's schema: that of the events of the last call."""
        return self._schema

    def get_state(self) -> dict[str, Any]:
        """Returns the JSON-able state: the run's schema."""
        return {"schema": base64.b64encode(self._schema.serialize()).decode()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state.

        Raises:
            ValueError: It is none of this decoder's.
        """
        try:
            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(state["schema"])))
        except (KeyError, TypeError, ValueError, pa.ArrowException, OSError) as error:
            raise ValueError(f"the state of topic {self._topic!r} holds no schema: {error!r}") from None
        start = _SCHEMAS[self._kind]
        if not pa.schema(list(schema)[: len(start)]).equals(start):
            raise ValueError(
                f"the state of topic {self._topic!r} is not one of {self._kind}s; it begins with {schema.names[:8]}"
            )
        self._schema = schema

    def decode(self, partition: LogPartition, messages: Sequence[Message]) -> tuple[pa.RecordBatch, tuple[Rejected, ...]]:
        """Returns the events of messages.

        Args:
            partition: Where they stand.
            messages: In order.

        Returns:
            The good events in order, in `schema`, and what was set aside, in order.
        """
        events, rejected, _ = self.decode_with_offsets(partition, messages)
        return events, rejected

    def decode_with_offsets(
        self, partition: LogPartition, messages: Sequence[Message]
    ) -> tuple[pa.RecordBatch, tuple[Rejected, ...], np.ndarray]:
        """Returns what `decode` does, and the offset of each event's message, int64 [B]."""
        bad: dict[int, str] = {}
        for index, message in enumerate(messages):
            if message.fault:
                bad[index] = message.fault
            elif len(message.payload) > self._max_bytes:
                bad[index] = f"larger than {self._max_bytes} bytes"
            elif not message.payload and self._format != "debezium":
                bad[index] = "empty message"
        good = [index for index in range(len(messages)) if index not in bad]
        work = Work(self._schema, messages, bad, _RESERVED[self._kind])
        if self._format == "arrow":
            self._arrow(work, good)
        else:
            READERS[self._format](work, good, self._kind.capitalize())
        return self._checked(partition, work)

    def _arrow(self, work: Work, good: Sequence[int]) -> None:
        schemas = self._schemas
        assert schemas is not None
        numbers = {work.messages[index].schema for index in good}
        if any(number and schemas.find(number) is None for number in numbers):
            schemas.refresh()  # once a call: a number that nobody appended must not make every message wait for the log
        of_number: dict[int, pa.Schema | str] = {}
        run: list[pa.RecordBatch] = []
        members: list[int] = []
        last = 0
        for index in good:
            message = work.messages[index]
            if message.schema not in of_number:
                of_number[message.schema] = self._source_of(work, message.schema)
            schema = of_number[message.schema]
            if isinstance(schema, str):
                work.bad[index] = schema
                continue
            try:
                batch = read_arrow(message.payload, schema)
            except BadPayload as fault:
                work.bad[index] = str(fault)
                continue
            if run and message.schema != last:
                work.add(run, members)
                run, members = [], []
            last = message.schema
            run.append(batch)
            members.append(index)
        if run:
            work.add(run, members)

    def _source_of(self, work: Work, number: int) -> pa.Schema | str:
        """Returns the schema with a number, after the run's was extended by it; or why its messages are set aside."""
        if not number:
            return "no schema number"
        assert self._schemas is not None
        schema = self._schemas.find(number)
        if schema is None:
            return "unknown schema number"
        for name in self._required:
            if name not in schema.names:
                return f"schema: column {name!r} is missing"
        try:
            work.schema = extended(work.schema, schema, work.reserved)
        except SchemaFault as fault:
            return str(fault)
        return schema

    def _checked(self, partition: LogPartition, work: Work) -> tuple[pa.RecordBatch, tuple[Rejected, ...], np.ndarray]:
        batch, members, ends = work.joined()
        faults = _faults(batch, self._kind)
        times = batch.column("event_time_ms")
        appended = np.array([work.messages[index].timestamp_ms for index in members], np.int64)
        if len(members) and not _within(times, 0, int(min(appended.min() + self._future_ms, validate.LAST_MS))):
            latest = np.repeat(appended + self._future_ms, np.diff(ends, prepend=0))
            faults.append((pc.fill_null(times, 0).to_numpy() > latest, "time is ahead of the log"))
        name = f"{partition.topic}/{partition.number}@"
        many = self._format == "arrow"

        def member_of(row: int) -> int:
            return int(np.searchsorted(ends, row, side="right"))

        def where(row: int) -> str:
            of = member_of(row)
            inner = row - (int(ends[of - 1]) if of else 0)
            return f"{name}{work.messages[members[of]].offset}" + (f"#{inner}" if many else "")

        def raw(row: int) -> str:
            if many:
                return _row_text(batch.slice(row, 1))
            return _raw(work.messages[members[member_of(row)]].payload)

        kept, singles = validate.split(batch, faults, where, raw) if faults else (batch, ())
        kept = self._pruned(kept)
        offsets = np.repeat(np.array([work.messages[index].offset for index in members], np.int64), np.diff(ends, prepend=0))
        if faults:
            offsets = offsets[validate.good_rows(faults, len(batch))]
        if not work.bad:
            return kept, singles, offsets
        rejected = [
            (index, Rejected(f"{name}{work.messages[index].offset}", reason, _raw(work.messages[index].payload)))
            for index, reason in work.bad.items()
        ]
        rows = np.flatnonzero(~validate.good_rows(faults, len(batch)))
        rejected += [(int(members[member_of(int(row))]), one) for row, one in zip(rows, singles, strict=True)]
        return kept, tuple(one for _, one in sorted(rejected, key=lambda pair: pair[0])), offsets

    def _pruned(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Returns the batch without columns that only bad events had, and makes what is left the run's schema."""
        known = len(self._schema)
        keep = [place for place in range(len(batch.schema)) if place < known or batch.column(place).null_count < len(batch)]
        if len(keep) < len(batch.schema):
            batch = batch.select(keep)
        if len(keep) > known:
            self._schema = batch.schema
        return batch


def _row_text(row: pa.RecordBatch) -> str:
    try:
        return str(row.to_pylist()[0])
    except Exception:  # a time that Python has no type for
        return str(row.columns)


def _raw(payload: bytes) -> str:
    return repr(payload[: validate.RAW_CHARS])[: validate.RAW_CHARS]
