"""Events as protobuf messages, one each, as `event.proto` beside this file describes them to people and to other languages.

In: record batches, or payloads. Out: payloads, or a record batch. The descriptors are built from the Arrow schemas, so that no
compiler is needed; a test holds them and `event.proto` together.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from monolith_jax.stream.events import ACTION, IMPRESSION

SCHEMAS = {"Impression": IMPRESSION, "Action": ACTION}
"""By the name of the protobuf message. A field's number is its place in the schema, from 1."""
MAPS = {"integers": pa.int64(), "numbers": pa.float64(), "texts": pa.string()}
"""Where columns go that the schemas do not have. Their numbers count up from `FIRST_MAP`."""
FIRST_MAP = 100

_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {"int64": _Field.TYPE_INT64, "double": _Field.TYPE_DOUBLE, "string": _Field.TYPE_STRING}


def _add_map(message: descriptor_pb2.DescriptorProto, name: str, kind: pa.DataType, number: int) -> None:
    entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=_TYPES[str(kind)], label=_Field.LABEL_OPTIONAL)
    of = f".monolith_jax.{message.name}.{entry.name}"
    message.field.add(name=name, number=number, type=_Field.TYPE_MESSAGE, label=_Field.LABEL_REPEATED, type_name=of)


@cache
def message_class(name: str) -> Any:
    """Returns the class of the messages `Impression` or `Action`."""
    file = descriptor_pb2.FileDescriptorProto(name=f"monolith_jax/{name}.proto", package="monolith_jax", syntax="proto3")
    message = file.message_type.add(name=name)
    for number, field in enumerate(SCHEMAS[name], 1):
        if pa.types.is_list(field.type):
            kind = _TYPES[str(field.type.value_type)]
            message.field.add(name=field.name, number=number, type=kind, label=_Field.LABEL_REPEATED)
            continue
        # `optional` in proto3 is a union of one member: so an absent field differs from 0.
        added = message.field.add(name=field.name, number=number, type=_TYPES[str(field.type)], label=_Field.LABEL_OPTIONAL)
        added.proto3_optional = True
        added.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{field.name}")
    for number, (field_name, kind) in enumerate(MAPS.items(), FIRST_MAP):
        _add_map(message, field_name, kind, number)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"monolith_jax.{name}"))


def _map_of(field: pa.Field) -> str:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "integers"
    if pa.types.is_floating(kind):
        return "numbers"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "texts"
    raise ValueError(
        f"format protobuf has no place for column {field.name!r}, which is {kind}; use arrow or json, or leave it out"
    )


def encode(batch: pa.RecordBatch) -> list[bytes]:
    """Returns a payload for each event; a batch with a column `action` holds actions.

    Raises:
        ValueError: A column is none of numbers, truth values or text, nor in the schema.
    """
    name = "Action" if "action" in batch.schema.names else "Impression"
    schema = SCHEMAS[name]
    maps = {field.name: _map_of(field) for field in batch.schema if field.name not in schema.names}
    make = message_class(name)
    payloads: list[bytes] = []
    for row in batch.to_pylist():
        message = make(**{key: value for key, value in row.items() if value is not None and key not in maps})
        for key, of in maps.items():
            if row[key] is not None:
                getattr(message, of)[key] = row[key]
        payloads.append(message.SerializeToString())
    return payloads


def parse(name: str, payload: bytes) -> Any | None:
    """Returns the message that a payload holds, None where it holds none. Fields with other numbers are passed over."""
    try:
        return message_class(name).FromString(payload)
    except Exception:  # DecodeError, and whatever else garbage brings about
        return None


def columns_of(name: str, messages: Sequence[Any]) -> pa.RecordBatch:
    """Returns messages as a batch: the columns of the schema, then those of each map in the order of their names.

    A key that stands in several maps, or is a column of the schema, is a column for each: the caller refuses them.
    """
    columns: list[pa.Array] = []
    fields: list[pa.Field] = []
    for field in SCHEMAS[name]:
        values = _values(field.name, pa.types.is_list(field.type))
        columns.append(pa.array([values(message) for message in messages], field.type))
        fields.append(pa.field(field.name, field.type))
    for of, kind in MAPS.items():
        found = [dict(getattr(message, of)) for message in messages]
        for key in sorted({key for one in found for key in one}):  # a protobuf map has no order of its own
            columns.append(pa.array([one.get(key) for one in found], kind))
            fields.append(pa.field(key, kind))
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _values(field: str, repeated: bool) -> Callable[[Any], Any]:
    if repeated:
        return lambda message: list(getattr(message, field)) or None
    return lambda message: getattr(message, field) if message.HasField(field) else None
