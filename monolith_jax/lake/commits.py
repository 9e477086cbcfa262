"""Writing to a table exactly once.

In: rows, by epoch, and whatever the writer needs to go on from there. Out: one snapshot an epoch, which holds both. An epoch
is a number that a writer counts; a table tells the last one that it has of a writer. After a crash the writer makes the epoch
that is missing in some tables again, from the same input, and a table that has it takes nothing (the idea of Flink's two-phase
commit sinks; the names of writer and epoch are Paimon's commit user and commit identifier).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from monolith_jax.lake.warehouse import WarehouseConfig, open_table, writing
from monolith_jax.stream.dead_letter import DeadLetters

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


def last_commit(table: Any, writer: str, above: int = 0) -> Committed:
    """Returns the last epoch that a table has of a writer.

    Args:
        table: The table.
        writer: The writer.
        above: Snapshots up to this one are known to be of others.

    Raises:
        ValueError: Snapshots that may hold it are gone, and nobody kept what they told.
    """
    manager = table.snapshot_manager()
    newest = manager.get_latest_snapshot()
    for number in range(newest.id if newest else 0, above, -1):
        snapshot = manager.get_snapshot_by_id(number)
        if snapshot is None:
            return _kept(table, writer, number)
        if snapshot.commit_user == writer:
            return Committed(snapshot.commit_identifier, told_of(snapshot), snapshot.id)
    return NOTHING


def _path_of_kept(table: Any) -> str:
    return f"{str(table.table_path).rstrip('/')}/state/writers.json"


def _kept(table: Any, writer: str, number: int) -> Committed:
    kept = kept_commits(table)
    if kept is None:
        raise ValueError(
            f"the table {table.identifier} has no snapshot {number} any more, and nothing tells where the writer {writer!r} "
            "was then. Only python -m launch.lake tidy keeps that when it expires snapshots: was it another program?"
        )
    return kept.get(writer, NOTHING)


def kept_commits(table: Any) -> dict[str, Committed] | None:
    """Returns the last commits of writers whose snapshots have expired; None: none ever has."""
    files, path = table.file_io, _path_of_kept(table)
    for one in (path, f"{path}.draft"):
        with contextlib.suppress(ValueError, OSError):
            if files.exists(one):
                return {name: Committed(*told) for name, told in json.loads(files.read_file_utf8(one)).items()}
    return None


def keep_commits(table: Any, expiring: Sequence[Any]) -> None:
    """Keeps what the last commits of writers told, before the snapshots expire that hold them."""
    kept = kept_commits(table) or {}
    for snapshot in sorted(expiring, key=lambda one: one.id):
        kept[snapshot.commit_user] = Committed(snapshot.commit_identifier, told_of(snapshot), snapshot.id)
    files, path = table.file_io, _path_of_kept(table)
    files.check_or_mkdirs(path.rsplit("/", 1)[0])
    text = json.dumps({name: list(one) for name, one in kept.items()})
    # The new one is whole before the old one goes; a crash between the two leaves the draft, which is as good.
    draft = f"{path}.draft"
    for one in (draft, path):
        if files.exists(one):
            files.delete(one)
        files.write_file(one, text, False)


def told_of(snapshot: Any) -> dict[str, Any]:
    """Returns what the writer of a snapshot said, {} if nothing."""
    return json.loads((snapshot.properties or {}).get(TOLD, "{}"))


def resume_letters(letters: DeadLetters, state: Mapping[str, Any]) -> None:
    """Goes on with a file of dead letters; with a new one where it is gone, as in another run folder: the counts stay.

    Raises:
        ValueError: The file is shorter than it was.
    """
    letters.set_state(state if letters.path.exists() else {**state, "bytes": 0})


class TableWriter:
    """Writes epochs of one writer to one table. Made, used and closed in one thread: Paimon's core refuses others."""

    def __init__(self, config: WarehouseConfig, name: str, writer: str) -> None:
        """Opens the table.

        Raises:
            ValueError: There is no such table.
        """
        self._config, self.name, self._writer = config, name, writer
        self._open()
        self._checked = self._newest()
        self.last = last_commit(self.table, writer)

    def _open(self) -> None:
        from pypaimon.schema.data_types import PyarrowFieldParser  # pyright: ignore[reportMissingImports]

        self.table = open_table(self._config, self.name)
        self.schema: pa.Schema = PyarrowFieldParser.from_paimon_schema(self.table.table_schema.fields)
        builder = self.table.new_stream_write_builder()._with_commit_user(self._writer)
        self._write, self._commit = builder.new_write(), builder.new_commit()
        self._flushed: list[Any] = []

    def _newest(self) -> int:
        newest = self.table.snapshot_manager().get_latest_snapshot()
        return newest.id if newest else 0

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

    def flush(self, epoch: int) -> None:
        """Makes files of what was written of an epoch so far, which frees its memory; they are seen once it is committed."""
        self._flushed += self._write.prepare_commit(epoch)

    def commit(self, epoch: int, told: Mapping[str, Any]) -> None:
        """Makes what was written visible, as an epoch; of one that the table has already, nothing.

        Args:
            epoch: Above that of the last commit, or not above it: then what was written is dropped.
            told: JSON-able; `last.told` after a restart.

        Raises:
            ValueError: Another process writes to the table as the same writer.
        """
        self.flush(epoch)
        messages, self._flushed = self._flushed, []
        if epoch <= self.last.epoch:
            self._commit.abort(messages)
            return
        with writing(self._config, self.name):
            if last_commit(self.table, self._writer, self._checked).epoch not in (NOTHING.epoch, self.last.epoch):
                raise ValueError(f"another process writes {self.name!r} as {self._writer!r}: a job of launch.lake runs once")
            self._commit.commit(messages, epoch, snapshot_properties={TOLD: json.dumps(told, separators=(",", ":"))})
            self._checked = self._newest()
        self.last = Committed(epoch, told, self._checked)

    def close(self) -> None:
        """Lets go of the table; what was not committed is lost."""
        self._write.close()
        self._commit.close()
