"""The types of columns whose types nobody has named.

In: a table file. Out: an Arrow type a column: int64, float64, bool or string, or a Parquet column's own type where it is
none of these (lists, timestamps). CSV columns are looked at: all whole numbers are int64, all numbers float64, else string.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream.remote import opened_parquet
from monolith_jax.stream.tabular import TableFile, read_rows, start

SAMPLE_ROWS = 8192


def native_kind(kind: pa.DataType) -> pa.DataType:
    """Returns the type that examples have for a Parquet column of a type."""
    types = pa.types
    if types.is_integer(kind):
        return pa.int64()
    if types.is_floating(kind) or types.is_decimal(kind):
        return pa.float64()
    if types.is_large_string(kind) or types.is_dictionary(kind):
        return pa.string()
    if types.is_list(kind) or types.is_large_list(kind):
        return pa.list_(native_kind(kind.value_type))
    return kind


def narrow(column: pa.Array, kind: pa.DataType | None) -> pa.DataType | None:
    """Returns the type of a column of strings, given the type of the rows before.

    Args:
        column: More of its strings.
        kind: None (only nulls so far), int64, float64 or string.
    """
    given = pc.utf8_trim_whitespace(pc.drop_null(column))
    if not len(given) or kind == pa.string():
        return kind
    if pc.any(pc.match_substring_regex(given, r"^-?0[0-9]")).as_py():  # "007" is a name: as a number it would lose its zeros
        return pa.string()
    for next_kind in (pa.int64(), pa.float64()) if kind != pa.float64() else (pa.float64(),):
        try:
            given.cast(next_kind)
            return next_kind
        except pa.ArrowInvalid:
            continue
    return pa.string()


def parquet_schema(file: TableFile) -> pa.Schema:
    """Returns the columns of a Parquet file with their types."""
    with opened_parquet(file.path) as parquet:
        return parquet.schema_arrow


def infer_kinds(file: TableFile, columns: Sequence[str], sample_rows: int | None = SAMPLE_ROWS) -> dict[str, pa.DataType]:
    """Returns the type of each column.

    Args:
        file: The file.
        columns: Columns of it.
        sample_rows: CSV: looks at this many first rows; None: at all.
    """
    if file.delimiter is None:
        schema = parquet_schema(file)
        kinds: dict[str, pa.DataType | None] = {name: native_kind(schema.field(name).type) for name in columns}
    else:
        kinds = dict.fromkeys(columns)
        for raw in read_rows(file, start(file), num_rows=SAMPLE_ROWS, columns=columns, end_row=sample_rows):
            kinds = {name: narrow(raw.batch.column(name), kind) for name, kind in kinds.items()}
    return {name: kind or pa.string() for name, kind in kinds.items()}
