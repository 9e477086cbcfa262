"""What a delta or base holds, to Arrow IPC files and back.

In: rows by table, deleted ids by table, dense weights. Out, for each process p that has any (pyarrow alone reads them):

* `rows-p-D.arrow`, for each dim D: `table` (dictionary), `id` int64, `vector` fixed_size_list<float32, float16 or int8, D>, and
  for int8 `scale` float32. The rows of a record batch are of one table;
* `deleted-p.arrow`: `table`, `id`;
* `dense-p.arrow`: `name`, `dtype`, `shape`, `data`: the bytes in C order, little endian.

Nothing is copied that need not be: one batch of a table is read as a view of the file's bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from monolith_jax.sync.quantise import Format, Rows, quantised
from monolith_jax.sync.storage import CountedFile, new_file

BATCH_BYTES = 64 << 20
"""Most bytes of float32 vectors in a record batch."""
_VALUES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
_DENSE = pa.schema(
    [("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.large_binary())]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What changed, or in a base what there is."""

    rows: Mapping[str, Rows] = field(default_factory=dict)
    """By table; a table without any may be missing, and is when it was read."""
    deleted: Mapping[str, np.ndarray] = field(default_factory=dict)
    """int64 ids by table; to be applied before `rows`, which may have them again."""
    dense: Mapping[str, np.ndarray] | None = None
    """Every dense weight by its path, or None: as before."""


@dataclass(slots=True)
class Part:
    """What one process wrote of a version."""

    dims: dict[str, int] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)


class _PartWriter:
    """Writes blocks of one process; a file is opened with its first row."""

    def __init__(self, folder: epath.Path, process: int, format: Format, open_files: ExitStack) -> None:
        self.part = Part()
        self._folder, self._process, self._format, self._open = folder, process, format, open_files
        self._tables: list[str] | None = None
        self._writers: dict[str, tuple[Any, CountedFile]] = {}

    def add(self, block: Content) -> None:
        if self._tables is None:
            self._tables = sorted({*block.rows, *block.deleted})
        unknown = sorted({*block.rows, *block.deleted} - set(self._tables))
        if unknown:
            raise ValueError(
                f"a later block has rows of {', '.join(unknown)}, the first has {', '.join(self._tables) or 'no table'}: the "
                "first must name every table, without rows where it has none"
            )
        for table, ids in block.deleted.items():
            _check_ids(table, ids)
            self._count(table, 0, len(ids))
            if len(ids):
                self._write("deleted", self._schema(), table, [pa.array(ids)])
        for table, rows in block.rows.items():
            self._check_rows(table, rows)
            self._count(table, len(rows.ids), 0)
            self._add_rows(table, rows)
        if block.dense is not None:
            self._add_dense(block.dense)

    def finish(self) -> Part:
        for name, (writer, file) in self._writers.items():
            writer.close()
            self.part.files[name] = file.told
        return self.part

    def _count(self, table: str, rows: int, deleted: int) -> None:
        before = self.part.counts.setdefault(table, [0, 0])
        self.part.counts[table] = [before[0] + rows, before[1] + deleted]

    def _check_rows(self, table: str, rows: Rows) -> None:
        _check_ids(table, rows.ids)
        shape, dtype = rows.vectors.shape, rows.vectors.dtype
        if dtype != np.float32 or len(shape) != 2 or shape[0] != len(rows.ids) or not shape[1]:
            raise ValueError(f"vectors of {table}: expected float32 [{len(rows.ids)}, dim], got {dtype} {list(shape)}")
        dim = self.part.dims.setdefault(table, shape[1])
        if dim != shape[1]:
            raise ValueError(f"vectors of {table} have {shape[1]} floats, those of a block before had {dim}")

    def _add_rows(self, table: str, rows: Rows) -> None:
        dim = rows.vectors.shape[1]
        fields = [pa.field("vector", pa.list_(_VALUES[self._format], dim))]
        if self._format == "int8":
            fields.append(pa.field("scale", pa.float32()))
        step = max(1, BATCH_BYTES // (4 * dim))
        for first in range(0, len(rows.ids), step):
            stored, scales = quantised(rows.vectors[first : first + step], self._format)
            columns = [pa.array(rows.ids[first : first + step]), _vector_column(stored, dim)]
            columns += [] if scales is None else [pa.array(scales)]
            self._write("rows", self._schema(*fields), table, columns, f"-{dim}")

    def _add_dense(self, dense: Mapping[str, np.ndarray]) -> None:
        columns: list[list[Any]] = [[], [], [], []]
        for name, weight in dense.items():
            plain = np.asarray(weight)
            if plain.dtype.kind not in "biuf":
                raise ValueError(
                    f"dense weight {name} is of {plain.dtype}; expected floats or integers of numpy: make it float32"
                )
            plain = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
            told = (name, plain.dtype.name, plain.shape, plain.tobytes())
            for column, value in zip(columns, told, strict=True):
                column.append(value)
        batch = pa.record_batch(columns, schema=_DENSE)
        self._writer("dense", _DENSE).write_batch(batch)

    def _schema(self, *fields: pa.Field) -> pa.Schema:
        assert self._tables is not None
        code = pa.int8() if len(self._tables) <= 128 else pa.int32()
        return pa.schema([pa.field("table", pa.dictionary(code, pa.string())), pa.field("id", pa.int64()), *fields])

    def _write(self, kind: str, schema: pa.Schema, table: str, columns: list[pa.Array], suffix: str = "") -> None:
        assert self._tables is not None
        codes = np.full(len(columns[0]), self._tables.index(table))
        named = pa.DictionaryArray.from_arrays(pa.array(codes, schema.field("table").type.index_type), self._tables)
        self._writer(kind, schema, suffix).write_batch(pa.RecordBatch.from_arrays([named, *columns], schema=schema))

    def _writer(self, kind: str, schema: pa.Schema, suffix: str = "") -> Any:
        name = f"{kind}-{self._process}{suffix}.arrow"
        if name not in self._writers:
            file = self._open.enter_context(new_file(self._folder / name))
            self._writers[name] = pa.ipc.new_file(file, schema), file
        return self._writers[name][0]


def write_files(folder: epath.Path, process: int, content: Content | Iterable[Content], format: Format) -> Part:
    """Writes the files of one process; see `DeltaFolder.write_part`.

    Args:
        folder: Where to; must be there.
        process: Which one this is.
        content: All that it has, whole or in blocks.
        format: Of the vectors.

    Raises:
        ValueError: A dtype or shape is wrong, or a value has no place in the format.
    """
    with ExitStack() as open_files:
        writer = _PartWriter(folder, process, format, open_files)
        for block in (content,) if isinstance(content, Content) else content:
            writer.add(block)
        return writer.finish()


def read_files(files: Mapping[str, bytes], format: Format) -> Content:
    """Returns what files hold.

    Args:
        files: The bytes of every file of a version, by name.
        format: Of the vectors.
    """
    rows: dict[str, list[Rows]] = {}
    deleted: dict[str, list[np.ndarray]] = {}
    dense: dict[str, np.ndarray] | None = None
    for name, data in files.items():
        batches = _batches(data)
        if name.startswith("rows-"):
            for batch in batches:
                rows.setdefault(_table_of(batch), []).append(_rows_of(batch, format))
        elif name.startswith("deleted-"):
            for batch in batches:
                deleted.setdefault(_table_of(batch), []).append(batch.column("id").to_numpy())
        else:
            dense = {} if dense is None else dense
            for batch in batches:
                dense |= _dense_of(batch)
    return Content(
        rows={table: _joined_rows(pieces) for table, pieces in rows.items()},
        deleted={table: _joined(pieces) for table, pieces in deleted.items()},
        dense=dense,
    )


def _check_ids(table: str, ids: np.ndarray) -> None:
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise ValueError(f"ids of {table}: expected int64 [N], got {ids.dtype} {list(ids.shape)}")


def _vector_column(stored: np.ndarray, dim: int) -> pa.Array:
    """Returns [N, D] as a column, without a copy."""
    flat = np.ascontiguousarray(stored).reshape(-1)
    kind = _VALUES[flat.dtype.name]
    values = pa.Array.from_buffers(kind, len(flat), [None, pa.py_buffer(flat)])
    return pa.FixedSizeListArray.from_arrays(values, dim)


def _batches(data: bytes) -> list[pa.RecordBatch]:
    file = pa.ipc.open_file(pa.py_buffer(data))
    return [file.get_batch(number) for number in range(file.num_record_batches)]


def _table_of(batch: pa.RecordBatch) -> str:
    return batch.column("table")[0].as_py()


def _rows_of(batch: pa.RecordBatch, format: Format) -> Rows:
    column = batch.column("vector")
    vectors = column.values.to_numpy().reshape(len(batch), column.type.list_size)
    return Rows(batch.column("id").to_numpy(), vectors, batch.column("scale").to_numpy() if format == "int8" else None)


def _dense_of(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    return {
        one["name"]: np.frombuffer(one["data"], np.dtype(one["dtype"]).newbyteorder("<")).reshape(one["shape"])
        for one in batch.to_pylist()
    }


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0]
    whole = np.concatenate(pieces)
    whole.flags.writeable = False
    return whole


def _joined_rows(pieces: Sequence[Rows]) -> Rows:
    ids, vectors, scales = zip(*pieces, strict=True)
    return Rows(_joined(ids), _joined(vectors), None if scales[0] is None else _joined(scales))
