"""A table as it grows: what each new snapshot added.

In: a table, and the snapshot up to which it is known. Out: the rows that were appended or upserted since, in the order of
snapshots, and the snapshot up to which they go: the position. What rewrites rows without changing them (compaction) brings
nothing. Of a features table these are partial rows, as each stream wrote them: whoever follows it merges them by the times of
their groups (`versions`), and so holds what the table holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from monolith_jax.lake.warehouse import WarehouseConfig, open_table


class Changes(NamedTuple):
    """What came to a table."""

    rows: pa.Table
    snapshot: int
    """The position: up to which snapshot they go."""


class Expired(ValueError):
    """Changes have expired before they were read: what the table holds has to be read instead."""


class Changelog:
    """Follows one table. For one thread."""

    def __init__(self, config: WarehouseConfig, name: str, snapshot: int | None = None, columns: Sequence[str] = ()) -> None:
        """Opens the table.

        Args:
            config: The warehouse.
            name: The table.
            snapshot: Up to which it is known already; 0: nothing is; None: up to now, and what it holds is read by `whole`.
            columns: Which are read; none: all.

        Raises:
            ValueError: There is no such table, or no such column.
        """
        self.table = open_table(config, name)
        if unknown := sorted({*columns} - {*self.table.field_names}):
            raise ValueError(
                f"the table {name!r} has no column {', '.join(unknown)}; there: {', '.join(self.table.field_names)}"
            )
        self._config, self._name, self._columns = config, name, list(columns)
        self._manager = self.table.snapshot_manager()
        self.snapshot = self.newest() if snapshot is None else snapshot
        self._begins = self.snapshot

    def newest(self) -> int:
        """Returns the table's newest snapshot; 0: there is none."""
        found = self._manager.get_latest_snapshot()
        return found.id if found else 0

    def whole(self) -> pa.Table:
        """Returns the table as it is at the position where following began, merged."""
        return read_at(self.table, Moment(self._begins), self._columns)

    def poll(self, until: int | None = None) -> Changes:
        """Returns what came since the last poll; no rows if nothing did.

        Args:
            until: Up to which snapshot at most; None: all.

        Raises:
            Expired: Snapshots that were not read have expired.
        """
        newest = self.newest() if until is None else min(until, self.newest())
        if newest <= self.snapshot:
            return Changes(self._schema().empty_table(), self.snapshot)
        if self._manager.get_snapshot_by_id(self.snapshot + 1) is None:
            raise Expired(
                f"the table {self._name!r} was read up to snapshot {self.snapshot}, and the next one has expired: begin anew "
                "with what it holds now, and let python -m launch.lake tidy keep snapshots for longer"
            )
        from pypaimon.read.native_plan import native_plan  # pyright: ignore[reportMissingImports]

        if self._manager.get_snapshot_by_id(newest).schema_id != self.table.table_schema.id:
            # Columns that were added since are only known to a table that is opened now.
            self.table = open_table(self._config, self._name)
        plan = native_plan(
            self.table,
            predicate=None,
            projection=self._columns or None,
            incremental_range=(self.snapshot, newest),
            incremental_mode="delta",
        )
        rows = self._builder().new_read().to_arrow(plan.splits()) if plan.splits() else self._schema().empty_table()
        self.snapshot = newest
        return Changes(rows, newest)

    def _builder(self) -> Any:
        builder = self.table.new_read_builder()
        return builder.with_projection(self._columns) if self._columns else builder

    def _schema(self) -> pa.Schema:
        from pypaimon.schema.data_types import PyarrowFieldParser  # pyright: ignore[reportMissingImports]

        return PyarrowFieldParser.from_paimon_schema(self._builder().read_type())


class Moment(NamedTuple):
    """A state of a table that can be read again."""

    snapshot: int
    """Number of the snapshot; 0: before the first."""
    tag: str = ""
    """The tag that keeps it; "": none does."""


def table_at(table: Any, moment: Moment) -> Any:
    """Returns a table as it was, with the columns that it had.

    Raises:
        ValueError: The moment has expired, or the tag was removed.
    """
    if not moment.snapshot:
        return table
    if moment.tag:
        if table.tag_manager().get(moment.tag) is None:
            raise ValueError(f"{table.identifier} has no tag {moment.tag!r} any more")
        return table.copy({"scan.tag-name": moment.tag})
    if table.snapshot_manager().get_snapshot_by_id(moment.snapshot) is None:
        raise ValueError(
            f"snapshot {moment.snapshot} of {table.identifier} has expired: begin anew, and keep what is read for long under a "
            "name (python -m launch.lake tag)"
        )
    return table.copy({"scan.snapshot-id": str(moment.snapshot)})


def read_at(table: Any, moment: Moment, columns: Sequence[str] = (), where: Any = None) -> pa.Table:
    """Returns what a table held at a moment, rows of features tables merged.

    Args:
        table: As it is now.
        moment: Which.
        columns: Which are read; none: all that there were.
        where: A predicate of Paimon's, pushed down to the files; None: all rows.
    """
    from pypaimon.schema.data_types import PyarrowFieldParser  # pyright: ignore[reportMissingImports]

    builder = table_at(table, moment).new_read_builder()
    if columns:
        builder = builder.with_projection(list(columns))
    if where is not None:
        builder = builder.with_filter(where)
    splits = builder.new_scan().plan().splits() if moment.snapshot else []
    if not splits:
        return PyarrowFieldParser.from_paimon_schema(builder.read_type()).empty_table()
    return builder.new_read().to_arrow(splits)
