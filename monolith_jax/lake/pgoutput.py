"""What PostgreSQL's logical replication says, made into rows of profiles (pgoutput, version 1 of its protocol).

In: messages of the protocol, and which tables and columns tell profiles. Out: Arrow rows of a subject's id, the time of the
commit, and the columns of the group `profile`; a row that was deleted is one of nulls. A transaction comes whole, after its
commit. A long value that an update did not touch is not told ("unchanged"): the old row has it where the table's replica
identity is FULL. Where it was not, whoever reads has to look it up, and gets that of now.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from monolith_jax.lake.tables import GROUPS, ColumnGroup, Subject, key_of

_EPOCH_US = 946_684_800_000_000
"""PostgreSQL counts from the year 2000."""
# Kinds of messages and of values: letters, as numbers.
_BEGIN, _COMMIT, _RELATION, _INSERT, _UPDATE, _DELETE, _TRUNCATE = b"BCRIUDT"
_NULL, _UNCHANGED, _TEXT = b"nut"
_OLD, _KEY, _NEW = b"OKN"
_PACKED = 8192
_SIZE = struct.Struct(">I")
UNCHANGED = object()
"""Stands for a value that is what it was."""

_INTEGERS, _TEXTS = (20, 21, 23), (25, 1042, 1043)
_TYPES: dict[str, tuple[tuple[int, ...], str]] = {
    "int64": (_INTEGERS, "bigint, integer or smallint"),
    "string": (_TEXTS, "text or varchar"),
    "double": ((700, 701, 1700, *_INTEGERS), "double precision, real, numeric or an integer"),
    "list": ((1016, 1005, 1007), "bigint[], integer[] or smallint[]"),
}
"""Of each Arrow type the numbers of those PostgreSQL types that fit, and their names."""

Row = Sequence[Any]
"""Values in the order of the plan's `wanted`: bytes or str, None, or UNCHANGED."""


def profile_of(subject: Subject) -> ColumnGroup:
    """Returns the columns of profiles."""
    (group,) = (one for one in GROUPS[subject] if one.name == "profile")
    return group


def profile_schema(subject: Subject) -> pa.Schema:
    """Returns the columns of rows of profiles: the id, the time, and the values."""
    group = profile_of(subject)
    first = [pa.field(key_of(subject), pa.int64(), nullable=False), pa.field(group.time_column, pa.int64(), nullable=False)]
    return pa.schema([*first, *(pa.field(*column) for column in group.columns)])


@dataclass(frozen=True)
class ProfileTable:
    """A table of profiles, and where in it the columns are."""

    subject: Subject
    schema: str
    name: str
    columns: tuple[str, ...]
    """The table's names for the key and for the group's columns, in the order of the group."""

    def places(self, types: dict[str, int]) -> list[int]:
        """Returns where the columns are among those of the table, by name with the numbers of their types.

        Raises:
            ValueError: One is missing or of a type that does not fit.
        """
        there, group = [*types], profile_of(self.subject)
        for column, (_, wanted) in zip(self.columns, ((key_of(self.subject), pa.int64()), *group.columns), strict=True):
            if column not in types:
                raise ValueError(f"table {self.schema}.{self.name} has no column {column}; there: {', '.join(there)}")
            oids, names = _TYPES["list" if pa.types.is_list(wanted) else str(wanted)]
            if types[column] not in oids:
                raise ValueError(
                    f"column {column} of table {self.schema}.{self.name} is of type number {types[column]}, expected {names}"
                )
        return [there.index(column) for column in self.columns]


class ProfileRows:
    """Rows of one subject, not yet handed on."""

    def __init__(self, subject: Subject) -> None:
        """Begins without any."""
        self._subject: Subject = subject
        self._rows: list[Row] = []
        self._times_ms: list[int] = []
        self._packed: list[pa.RecordBatch] = []
        self._num_packed = 0
        self._num_whole = 0

    def add(self, row: Row, time_ms: int) -> None:
        """Adds a row: its key and the values of the group, bytes or str or None."""
        self._rows.append(row)
        self._times_ms.append(time_ms)
        if len(self._rows) >= _PACKED:  # which takes a tenth of the memory
            self._pack()

    def end(self) -> int:
        """Notes that the rows so far are whole transactions; returns how many there are."""
        self._num_whole = self._num_packed + len(self._rows)
        return self._num_whole

    def take(self) -> pa.RecordBatch:
        """Returns the rows of whole transactions, of `profile_schema`, and lets go of them."""
        self._pack()
        rows = pa.concat_batches(self._packed)
        whole, rest = rows.slice(0, self._num_whole), rows.slice(self._num_whole)
        self._packed, self._num_packed, self._num_whole = [rest], rest.num_rows, 0
        return whole

    def _pack(self) -> None:
        schema = profile_schema(self._subject)
        keys, *columns = zip(*self._rows, strict=True) if self._rows else [()] * (len(schema) - 1)
        arrays = [_column(values, field.type) for values, field in zip(columns, [*schema][2:], strict=True)]
        arrays = [_column(keys, pa.int64()), pa.array(self._times_ms, pa.int64()), *arrays]
        self._packed.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
        self._num_packed += len(self._rows)
        self._rows, self._times_ms = [], []


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_list(kind):
        return pa.array([None if value is None else _integers(value) for value in values], kind)
    if pa.types.is_floating(kind):
        return pa.array([None if value is None else float(value) for value in values], kind)
    texts = pa.array(values, pa.string())
    return texts if pa.types.is_string(kind) else texts.cast(kind)


def _integers(text: bytes | str) -> list[int | None]:
    """Returns the integers of an array as PostgreSQL writes it; of one with several dimensions all of them."""
    plain = (text if isinstance(text, str) else text.decode()).rpartition("=")[2].replace("{", "").replace("}", "")
    return [None if one == "NULL" else int(one) for one in plain.split(",")] if plain else []


@dataclass(frozen=True)
class _Plan:
    """What is taken of the rows of a relation."""

    table: ProfileTable
    wanted: tuple[int, ...]
    """Where the key and the group's columns are."""
    number: int
    """Columns of the relation."""

    @property
    def nothing(self) -> Row:
        """Values of a row that is no longer there."""
        return [None] * (len(self.wanted) - 1)


class Decoder:
    """Follows the messages of one connection; whoever connects anew needs a new one."""

    def __init__(
        self, tables: Sequence[ProfileTable], look_up: Callable[[ProfileTable, Row], Row], ignore_truncate: bool
    ) -> None:
        """Starts before the first message.

        Args:
            tables: What is read; whatever else comes is passed over.
            look_up: Returns a row whose unchanged values are unknown with the values that the table has now.
            ignore_truncate: TRUNCATE does nothing, rather than being an error.
        """
        self._tables = {(table.schema, table.name): table for table in tables}
        self._plans: dict[int, _Plan] = {}
        self._look_up, self._ignore_truncate = look_up, ignore_truncate
        self._time_ms = 0
        self.is_open = False
        """Whether a transaction has begun that has not ended."""
        self.position = 0
        """End of the last transaction."""
        self.num_set_aside = 0
        """Rows without a key."""
        self._rows: dict[Subject, ProfileRows] = {table.subject: ProfileRows(table.subject) for table in tables}
        self.num_rows = 0
        """Rows that `take` would return."""

    def take(self) -> dict[Subject, pa.RecordBatch]:
        """Returns the rows of the transactions that have ended since the last time, of those subjects that have any."""
        if not self.num_rows:
            return {}
        taken: dict[Subject, pa.RecordBatch] = {}
        for subject, rows in self._rows.items():
            if (batch := rows.take()).num_rows:
                taken[subject] = batch
        self.num_rows = 0
        return taken

    def feed(self, message: bytes) -> None:
        """Takes in one message.

        Raises:
            ValueError: A table has changed so that a column is missing or of a wrong type, or was truncated.
        """
        kind = message[0]
        if kind in (_INSERT, _UPDATE, _DELETE):
            plan = self._plans.get(_SIZE.unpack_from(message, 1)[0])
            if plan is not None:
                self._change(message, plan)
        elif kind == _BEGIN:
            self._time_ms = (int.from_bytes(message[9:17], signed=True) + _EPOCH_US) // 1000
            self.is_open = True
        elif kind == _COMMIT:
            self.position = int.from_bytes(message[10:18])
            self.is_open = False
            self.num_rows = sum([rows.end() for rows in self._rows.values()])
        elif kind == _RELATION:
            self._relation(message)
        elif kind == _TRUNCATE:
            self._truncate(message)

    def _change(self, message: bytes, plan: _Plan) -> None:
        old: Row | None = None
        new: Row | None = None
        at, end = 5, len(message)
        while at < end:
            part = message[at]
            row, at = _row(message, at + 1, plan)
            if part == _NEW:
                new = row
            else:
                old = row
        subject = plan.table.subject
        if new is None:
            assert old is not None, "a change of nothing"
            self._add(subject, [old[0], *plan.nothing])
            return
        if UNCHANGED in new:
            if old is not None and message[5] == _OLD:
                new = [before if value is UNCHANGED else value for value, before in zip(new, old, strict=True)]
            else:
                new = self._look_up(plan.table, new)
        if old is not None and old[0] is not None and old[0] != new[0]:
            self._add(subject, [old[0], *plan.nothing])
        self._add(subject, new)

    def _add(self, subject: Subject, row: Row) -> None:
        if row[0] is None:
            self.num_set_aside += 1
            return
        self._rows[subject].add(row, self._time_ms)

    def _relation(self, message: bytes) -> None:
        number = int.from_bytes(message[1:5])
        self._plans.pop(number, None)
        schema, name, after = message[5:].split(b"\0", 2)
        table = self._tables.get((schema.decode() or "pg_catalog", name.decode()))
        if table is None:
            return
        columns, at, types, keys = int.from_bytes(after[1:3]), 3, {}, set()
        for _ in range(columns):
            end = after.index(0, at + 1)
            column = after[at + 1 : end].decode()
            types[column] = int.from_bytes(after[end + 1 : end + 5])
            if after[at] & 1:
                keys.add(column)
            at = end + 9
        places = table.places(types)
        if table.columns[0] not in keys:
            raise ValueError(identity_missing(table))
        self._plans[number] = _Plan(table, tuple(places), columns)

    def _truncate(self, message: bytes) -> None:
        number = int.from_bytes(message[1:5])
        for at in range(6, 6 + 4 * number, 4):
            plan = self._plans.get(int.from_bytes(message[at : at + 4]))
            if plan is not None and not self._ignore_truncate:
                raise ValueError(
                    f"table {plan.table.schema}.{plan.table.name} was truncated, which does not say whose profiles are gone: "
                    "DELETE them, or set PostgresConfig.ignore_truncate to keep them as they were"
                )


def identity_missing(table: ProfileTable) -> str:
    """Returns what is wrong with a table whose deletions would not tell whose they are."""
    return (
        f"the replica identity of table {table.schema}.{table.name} does not hold {table.columns[0]}: "
        f"ALTER TABLE {table.schema}.{table.name} REPLICA IDENTITY FULL"
    )


def _row(message: bytes, at: int, plan: _Plan) -> tuple[Row, int]:
    """Returns the values that are wanted of the row that begins at `at`, and where it ends."""
    values: list[Any] = []
    add, size_at = values.append, _SIZE.unpack_from
    at += 2
    for _ in range(plan.number):
        kind = message[at]
        if kind == _TEXT:
            start = at + 5
            at = start + size_at(message, at + 1)[0]
            add(message[start:at])
        else:
            add(None if kind == _NULL else UNCHANGED)
            at += 1
    return [values[place] for place in plan.wanted], at
