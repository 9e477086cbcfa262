"""Writing to a table exactly once.

In: rows, by epoch, and whatever the writer needs to go on from there. Out: one snapshot an epoch, which holds both. An epoch
is a number that a writer counts; a table tells the last one that it has of a writer. After a crash the writer makes the epoch
that is missing in some tables again, from the same input, and a table that has it takes nothing (the idea of Flink's two-phase
commit sinks; the names of writer and epoch are Paimon's commit user and commit identifier).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from monolith_jax.lake.warehouse import WarehouseConfig, open_table, writing

TOLD = "monolith_jax"
"""Property of a snapshot: what its writer needs to go on, as JSON."""


class Committed(NamedTuple):
    """The last that a table has of a writer."""

    epoch: int
    """-1: nothing."""
    told: Mapping[str, Any]
    """What the writer said then."""
    snapshot: int
    """Number of the snapshot; 0: none."""


NOTHING = Committed(-1, {}, 0)


def last_commit(table: Any, writer: str) -> Committed:
    """Returns the last epoch that a table has of a writer.

    Raises:
        ValueError: Snapshots were expired that may hold it (all that are there are of other writers).
    """
    manager = table.snapshot_manager()
    newest = manager.get_latest_snapshot()
    number = newest.id if newest else 0
    while number > 0:
        snapshot = manager.get_snapshot_by_id(number)
        if snapshot is None:
            raise ValueError(
                f"the table {table.identifier} has no snapshot {number} any more, and none behind it is of the writer "
                f"{writer!r}: if it has written here before, nobody knows where it was. Expire by python -m launch.lake tidy, "
                "which keeps the last one of each writer, or name a new writer"
            )
        if snapshot.commit_user == writer:
            return Committed(snapshot.commit_identifier, told_of(snapshot), snapshot.id)
        number -= 1
    return NOTHING


def told_of(snapshot: Any) -> dict[str, Any]:
    """Returns what the writer of a snapshot said, {} if nothing."""
    return json.loads((snapshot.properties or {}).get(TOLD, "{}"))


class TableWriter:
    """Writes epochs of one writer to one table. Made, used and closed in one thread: Paimon's core refuses others."""

    def __init__(self, config: WarehouseConfig, name: str, writer: str) -> None:
        """Opens the table.

        Raises:
            ValueError: There is no such table.
        """
        self._config, self.name, self._writer = config, name, writer
        self._open()
        self.last = last_commit(self.table, writer)

    def _open(self) -> None:
        from pypaimon.schema.data_types import PyarrowFieldParser  # pyright: ignore[reportMissingImports]

        self.table = open_table(self._config, self.name)
        self.schema: pa.Schema = PyarrowFieldParser.from_paimon_schema(self.table.table_schema.fields)
        builder = self.table.new_stream_write_builder()._with_commit_user(self._writer)
        self._write, self._commit = builder.new_write(), builder.new_commit()

    def reopen(self) -> None:
        """Goes on with the table's columns as they are now; nothing may be written that is not committed."""
        self.close()
        self._open()

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Writes rows of the epoch that is being made; columns that are not given are null."""
        if not rows.num_rows:
            return
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        names = set(table.column_names)
        columns = [
            table.column(field.name).cast(field.type) if field.name in names else pa.nulls(table.num_rows, field.type)
            for field in self.schema
        ]
        self._write.write_arrow(pa.Table.from_arrays(columns, schema=self.schema))

    def commit(self, epoch: int, told: Mapping[str, Any]) -> None:
        """Makes what was written visible, as an epoch; of one that the table has already, nothing.

        Args:
            epoch: Above that of the last commit, or not above it: then what was written is dropped.
            told: JSON-able; `last.told` after a restart.

        Raises:
            ValueError: Another process writes to the table as the same writer.
        """
        messages = self._write.prepare_commit(epoch)
        if epoch <= self.last.epoch:
            self._commit.abort(messages)
            return
        with writing(self._config, self.name):
            if last_commit(self.table, self._writer).epoch != self.last.epoch:
                raise ValueError(f"another process writes {self.name!r} as {self._writer!r}: a job of launch.lake runs once")
            self._commit.commit(messages, epoch, snapshot_properties={TOLD: json.dumps(told, separators=(",", ":"))})
        self.last = Committed(epoch, told, self.last.snapshot)

    def close(self) -> None:
        """Lets go of the table; what was not committed is lost."""
        self._write.close()
        self._commit.close()
