"""Messages of one event each, read many at a time; and what a decoder gathers of them.

In: payloads in `json`, `protobuf` or `debezium`. Out: batches in a `Work`, whose schema grows with them, and reasons for those
that are no events. A thousand is parsed at once; where that fails it is halved until the bad ones stand alone, in order, so
that what a message adds to the schema is there for the next.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.stream import protobuf_events
from monolith_jax.stream.log import Message
from monolith_jax.stream.payloads import (
    MAX_JSON_BYTES,
    MAX_JSON_ROWS,
    BadPayload,
    after_row,
    json_fault,
    read_json,
    unsafe_json,
)
from monolith_jax.stream.run_schema import MAX_COLUMNS, SchemaFault, conform, extended

Parse = Callable[[Sequence[int], pa.Schema], pa.RecordBatch]
"""Reads the messages with these indexes as a row each, given the run's schema; raises `BadPayload` or `SchemaFault`."""


class _Piece(NamedTuple):
    """Events of neighbouring messages."""

    batch: pa.RecordBatch
    members: np.ndarray
    """int64, the index of each message."""
    rows: np.ndarray
    """int64, how many events each holds."""


class Work:
    """What one call of a decoder has found so far."""

    def __init__(
        self, schema: pa.Schema, messages: Sequence[Message], bad: dict[int, str], reserved: Collection[str] = ()
    ) -> None:
        """Begins.

        Args:
            schema: The run's, which grows.
            messages: All of the call.
            bad: Why a message is set aside, by its index; more are added.
            reserved: Names that no further column may have.
        """
        self.schema, self.messages, self.bad, self.reserved = schema, messages, bad, reserved
        self._pieces: list[_Piece] = []

    def add(self, batches: list[pa.RecordBatch], members: Sequence[int]) -> None:
        """Takes batches of one schema that the run's was extended by, the events of a message each."""
        try:
            self._add(conform(pa.concat_batches(batches), self.schema), members, [len(batch) for batch in batches])
        except (SchemaFault, pa.ArrowException):
            for batch, index in zip(batches, members, strict=True):  # the values of some do not fit
                try:
                    self._add(conform(batch, self.schema), [index], [len(batch)])
                except SchemaFault as fault:
                    self.bad[index] = str(fault)

    def add_singles(self, batch: pa.RecordBatch, members: Sequence[int]) -> None:
        """Takes a row of each of these messages.

        Raises:
            SchemaFault: The rows do not go with the run's schema.
        """
        schema = extended(self.schema, batch.schema, self.reserved)
        self._add(conform(batch, schema), members, np.ones(len(members), np.int64))
        self.schema = schema

    def _add(self, batch: pa.RecordBatch, members: Sequence[int], rows: Sequence[int] | np.ndarray) -> None:
        self._pieces.append(_Piece(batch, np.asarray(members, np.int64), np.asarray(rows, np.int64)))

    def joined(self) -> tuple[pa.RecordBatch, np.ndarray, np.ndarray]:
        """Returns all events in the schema, the index of each message taken, int64 [M], and where its events end, int64 [M]."""
        if not self._pieces:
            arrays = [pa.nulls(0, field.type) for field in self.schema]
            return pa.RecordBatch.from_arrays(arrays, schema=self.schema), np.zeros(0, np.int64), np.zeros(0, np.int64)
        parts = [conform(piece.batch, self.schema) for piece in self._pieces]
        members = np.concatenate([piece.members for piece in self._pieces])
        ends = np.cumsum(np.concatenate([piece.rows for piece in self._pieces]))
        return parts[0] if len(parts) == 1 else pa.concat_batches(parts), members, ends


def _blocks(payloads: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    first = size = 0
    for index, payload in enumerate(payloads):
        if index > first and (index - first == MAX_JSON_ROWS or size + len(payload) > MAX_JSON_BYTES):
            yield first, index
            first, size = index, 0
        size += len(payload)
    if first < len(payloads):
        yield first, len(payloads)


def _by_halves(work: Work, members: Sequence[int], parse: Parse, fault_of: Callable[[int, ValueError], str]) -> None:
    """Adds what can be parsed: all at once, else each half. `fault_of` says what is wrong with a message that stands alone."""
    todo = [list(members)]
    while todo:
        block = todo.pop()
        try:
            work.add_singles(parse(block, work.schema), block)
        except (BadPayload, SchemaFault) as fault:
            if len(block) == 1:
                work.bad[block[0]] = fault_of(block[0], fault)
            else:
                middle = len(block) // 2
                todo += [block[middle:], block[:middle]]


def _read_json(work: Work, payloads: dict[int, bytes]) -> None:
    """Reads payloads by the index of their message."""
    for index, payload in payloads.items():
        if reason := unsafe_json(payload):
            work.bad[index] = reason
    members = [index for index in payloads if index not in work.bad]

    def parse(block: Sequence[int], known: pa.Schema) -> pa.RecordBatch:
        return read_json([payloads[index] for index in block], known)

    def fault_of(index: int, fault: ValueError) -> str:
        return _json_fault(fault, payloads[index], work.schema)

    for first, end in _blocks([payloads[index] for index in members]):
        block = members[first:end]
        try:
            work.add_singles(parse(block, work.schema), block)
        except (BadPayload, SchemaFault):
            # Most bad ones are no JSON at all, which is found without parsing the others again and again.
            reasons = {index: json_fault(payloads[index]) for index in block}
            work.bad.update({index: reason for index, reason in reasons.items() if reason})
            if left := [index for index in block if not reasons[index]]:
                _by_halves(work, left, parse, fault_of)


def _json_fault(fault: ValueError, payload: bytes, known: pa.Schema) -> str:
    """Returns what is wrong with a JSON object that did not parse with the types that are known."""
    if isinstance(fault, SchemaFault):
        return str(fault)
    try:
        extended(known, read_json([payload], pa.schema([])).schema)
    except (BadPayload, SchemaFault) as closer:
        return str(closer)
    return str(fault)


def _json(work: Work, good: Sequence[int], _: str) -> None:
    _read_json(work, {index: work.messages[index].payload for index in good})


def _debezium(work: Work, good: Sequence[int], _: str) -> None:
    rows: dict[int, bytes] = {}
    for index in good:
        try:
            rows[index] = after_row(work.messages[index].payload)
        except BadPayload as fault:
            work.bad[index] = str(fault)
    _read_json(work, rows)


def _protobuf(work: Work, good: Sequence[int], name: str) -> None:
    found: dict[int, Any] = {}
    for index in good:
        message = protobuf_events.parse(name, work.messages[index].payload)
        if message is None:
            work.bad[index] = "not a protobuf event"
        elif len(message.integers) + len(message.numbers) + len(message.texts) > MAX_COLUMNS:
            work.bad[index] = f"schema: more than {MAX_COLUMNS} columns"
        else:
            found[index] = message

    def parse(block: Sequence[int], _: pa.Schema) -> pa.RecordBatch:
        return protobuf_events.columns_of(name, [found[index] for index in block])

    members = list(found)
    for first, end in _blocks([work.messages[index].payload for index in members]):
        _by_halves(work, members[first:end], parse, lambda _, fault: str(fault))


READERS: dict[str, Callable[[Work, Sequence[int], str], None]] = {"json": _json, "debezium": _debezium, "protobuf": _protobuf}
"""By format: adds to a `Work` the events of those messages whose indexes are given; the last is the protobuf message's name."""
