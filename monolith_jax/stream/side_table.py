"""Feature tables of users and videos, joined to examples by id.

In: one CSV or Parquet file with an id column. Out: `SideTable`, sorted by id, and `join`, which looks ids up in it by
binary search. The table is read batch by batch and kept in memory in its final types.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream.kinds import infer_kinds
from monolith_jax.stream.tabular import FORMATS, TableFile, read_rows, start
from monolith_jax.stream.validate import convert

_BATCH_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class SideTable:
    """Features by id."""

    ids: np.ndarray
    """int64 [rows], ascending."""
    columns: pa.RecordBatch
    """The features of these ids, the id column left out. Strings are dictionary-encoded."""


def find_one(folder: Path, prefix: str) -> Path:
    """Returns the one table file in a folder whose name starts with a prefix.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = sorted(path for path in folder.glob(f"{prefix}*") if path.name.endswith(FORMATS))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{folder}: expected one file {prefix}*.csv, .csv.gz or .parquet, found {names}; to read without features set "
            "features = False"
        )
    return found[0]


def split_ids(text: pa.Array) -> pa.Array:
    """Returns lists of ids from strings such as "12,65"; null stays null."""
    return pc.cast(pc.split_pattern(text, ","), pa.list_(pa.int64()))


def days_of(text: pa.Array) -> pa.Array:
    """Returns days since 1970 from strings such as "2022-04-10", as int32; null stays null."""
    return text.cast(pa.date32()).cast(pa.int32())


def _batches(
    file: TableFile, kinds: Mapping[str, pa.DataType], changes: Mapping[str, Callable[[pa.Array], pa.Array]]
) -> Iterator[pa.RecordBatch]:
    for raw in read_rows(file, start(file), num_rows=_BATCH_ROWS, columns=list(kinds), end_row=None):
        if raw.rejected:
            raise ValueError(f"{raw.rejected[0].where}: {raw.rejected[0].reason} in a feature file: {raw.rejected[0].raw!r}")
        columns = {}
        for name, kind in kinds.items():
            column, faults = convert(raw.batch.column(name), name, kind, file.name)
            for mask, reason in faults:
                if mask.any():
                    row = int(np.argmax(mask))
                    raise ValueError(f"{raw.where(row)}: {reason} in a feature file: {raw.raw(row)!r}")
            try:
                column = changes[name](column) if name in changes else column
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file.name}: column {name!r} before row {raw.after.row}: {error}") from error
            columns[name] = column.dictionary_encode() if column.type == pa.string() else column  # few texts, many rows
        yield pa.RecordBatch.from_pydict(columns)


def load_side_table(
    file: TableFile,
    key: str,
    kinds: Mapping[str, pa.DataType | None],
    changes: Mapping[str, Callable[[pa.Array], pa.Array]] | None = None,
) -> SideTable:
    """Reads a feature file.

    Args:
        file: The file.
        key: Its id column, int64.
        kinds: The columns to read with their types; None finds out by a pass over the file (for small files).
        changes: What to make of a column after it has its type.

    Raises:
        ValueError: A value is not of its column's type, an id is missing, or the file is damaged.
    """
    found = infer_kinds(file, [name for name, kind in kinds.items() if kind is None], None)
    known = {name: kind or found[name] for name, kind in kinds.items()} | {key: pa.int64()}
    table = pa.Table.from_batches(list(_batches(file, known, changes or {}))).unify_dictionaries().combine_chunks()
    if table.column(key).null_count:
        raise ValueError(f"{file.name}: {table.column(key).null_count} rows without {key!r}")
    ids = table.column(key).to_numpy()
    table = table.drop_columns([key])
    if not np.all(ids[1:] > ids[:-1]):
        order = np.argsort(ids, kind="stable")
        ids, table = ids[order], table.take(pa.array(order)).combine_chunks()
        if not np.all(ids[1:] > ids[:-1]):
            twice = ids[1:][ids[1:] == ids[:-1]]
            raise ValueError(f"{file.name}: {key} {twice[0]} has more than one row ({len(twice)} rows too many)")
    return SideTable(ids, table.to_batches()[0])


def join(table: SideTable, ids: pa.Array) -> dict[str, pa.Array]:
    """Returns the features of ids, null for ids that the table does not have.

    Args:
        table: The features.
        ids: int64 [N], no nulls.
    """
    wanted = ids.to_numpy(zero_copy_only=False)
    at = np.minimum(np.searchsorted(table.ids, wanted), len(table.ids) - 1)
    rows = pa.array(at, mask=table.ids[at] != wanted)
    found = {name: table.columns.column(name).take(rows) for name in table.columns.schema.names}
    return {name: column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column for name, column in found.items()}
