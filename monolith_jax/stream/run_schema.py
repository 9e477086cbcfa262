"""How the columns of a log's events change while a run reads it.

In: the schema that the run has so far, and that of further events. Out: the schema of both, or why they do not go together; and
batches brought into the run's schema. The rules:

* a further column is taken as it first comes: whole numbers as int64, numbers as float64, text as string, lists of these;
* a column that is not there is null; so are further columns in the events before they came;
* a known column may come in a type that says the same: a narrower or unsigned whole number if it fits int64, a whole number or
  a narrower float for a float64 (if exact), large strings and dictionaries for strings, null for anything, and lists likewise;
* any other type is refused, and with it the whole message: guessing would train on wrong values without a word;
* a reserved name is refused: an impression with a column `like` would bring its own label;
* a struct, map, union or the like is refused, as no feature could read it.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa

from monolith_jax.stream.kinds import native_kind

MAX_COLUMNS = 1000
"""Most columns of events: names that are made of ids would otherwise fill the memory."""
MAX_DEPTH = 3
"""Most lists within one another."""
_types = pa.types


class SchemaFault(ValueError):
    """Events that do not go with the run's schema; the message is a short, countable reason."""


def _is_list(kind: pa.DataType) -> bool:
    return _types.is_list(kind) or _types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    if _types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return _types.is_string(kind) or _types.is_large_string(kind)


def says_nothing(kind: pa.DataType) -> bool:
    """Returns whether a column of this type holds only nulls or empty lists, and so has no type yet."""
    return _types.is_null(kind) or (_is_list(kind) and says_nothing(kind.value_type))


def _is_carried(kind: pa.DataType, depth: int = 0) -> bool:
    if _is_list(kind):
        return depth < MAX_DEPTH and _is_carried(kind.value_type, depth + 1)
    if _types.is_dictionary(kind):
        return _is_text(kind)
    plain = (_types.is_boolean, _types.is_integer, _types.is_floating, _types.is_temporal, _types.is_binary, _is_text)
    return any(is_kind(kind) for is_kind in plain)


def _goes_with(given: pa.DataType, known: pa.DataType) -> bool:
    if given == known or says_nothing(given):
        return True
    if _is_list(given) and _is_list(known):
        return _goes_with(given.value_type, known.value_type)
    if _types.is_integer(given):
        return _types.is_integer(known) or _types.is_floating(known)
    if _types.is_floating(given):
        return _types.is_floating(known)
    return _is_text(given) and _is_text(known)


def extended(known: pa.Schema, given: pa.Schema, reserved: Collection[str] = ()) -> pa.Schema:
    """Returns the run's schema with the further columns of another.

    Args:
        known: The run's.
        given: Of further events.
        reserved: Names that no further column may have.

    Raises:
        SchemaFault: A column has changed its type, is there twice, reserved or of a type that is not carried; or there are too
            many.
    """
    kinds = dict(zip(known.names, known.types, strict=True))
    further: list[pa.Field] = []
    seen: set[str] = set()
    for name, kind in zip(given.names, given.types, strict=True):
        if name in seen:
            raise SchemaFault(f"schema: column {name[:50]!r} is there twice")
        seen.add(name)
        if name in kinds:
            if not _goes_with(kind, kinds[name]):
                raise SchemaFault(f"schema: column {name!r} is {str(kind)[:100]}, was {kinds[name]}")
        elif not says_nothing(kind):
            if name in reserved:
                raise SchemaFault(f"schema: column {name!r} is reserved for what a join makes")
            if not _is_carried(kind):
                raise SchemaFault(f"schema: column {name[:50]!r} is {str(kind)[:100]}, which is not carried")
            further.append(pa.field(name, native_kind(kind)))
    if len(known) + len(further) > MAX_COLUMNS:
        raise SchemaFault(f"schema: more than {MAX_COLUMNS} columns")
    return pa.schema([*known, *further]) if further else known


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Returns a batch in a schema that its own was added to by `extended`. Nulls in fields that must not be null stay.

    Raises:
        SchemaFault: A value does not fit the type.
    """
    places = {name: place for place, name in enumerate(batch.schema.names)}
    columns: list[pa.Array] = []
    for field in schema:
        place = places.get(field.name)
        column = pa.nulls(len(batch), field.type) if place is None else batch.column(place)
        if column.type != field.type:
            try:
                column = column.cast(field.type)
            except pa.ArrowException:
                raise SchemaFault(f"schema: a value of column {field.name!r} does not fit {field.type}") from None
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def concatenated(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Returns the rows of one or more batches; a column that came up between two of them is null before."""
    if all(batch.schema == batches[0].schema for batch in batches):
        return batches[0] if len(batches) == 1 else pa.concat_batches(batches)
    table = pa.concat_tables([pa.Table.from_batches([batch]) for batch in batches], promote_options="default")
    return table.combine_chunks().to_batches()[0]
