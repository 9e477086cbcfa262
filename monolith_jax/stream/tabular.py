"""One table file, read piece by piece from any place in it.

In: a CSV file (plain or `.gz`, UTF-8, any delimiter, with or without a header line) or a Parquet file. Out: `RawRows`:
the next rows of the file, CSV columns as strings and Parquet columns in their own types, with the place and text of each,
and a `Cursor` from which the next rows follow. Pieces have exactly the rows that are asked for, so they do not depend on
where reading started; memory is a few pieces, whatever the size of the file.

A CSV row is a line: a quoted field cannot hold a line break (its lines are set aside). A cursor is a byte offset, so that
reading goes on at once in a plain file; a `.gz` is decompressed up to it.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from monolith_jax.stream.remote import AnyPath, opened_parquet
from monolith_jax.stream.validate import RAW_CHARS
from monolith_jax.types import Rejected

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 24
FORMATS = (".csv", ".csv.gz", ".parquet")
"""Endings of the files that sources look for."""

_GZIP_FAULTS = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFile:
    """A file whose columns are known."""

    path: AnyPath
    """Where it is."""
    name: str
    """What messages call it."""
    columns: tuple[str, ...]
    """Its columns, in file order."""
    delimiter: str | None
    """CSV: what parts two fields, one or more characters. None: Parquet."""
    header_bytes: int = 0
    """CSV: length of the header line with its line break; 0 without header."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place between two rows."""

    row: int
    """Rows before it, bad ones counted."""
    byte: int
    """CSV: offset in the uncompressed file. Parquet: 0."""


@dataclass(frozen=True, slots=True)
class RawRows:
    """Neighbouring rows of a file."""

    file_name: str
    """What messages call the file."""
    batch: pa.RecordBatch
    """The rows that have the right number of fields."""
    rows: np.ndarray
    """int64 [rows of `batch`]: the number of each in the file, from 0."""
    where: Callable[[int], str]
    """A row of `batch` to its place in the file."""
    raw: Callable[[int], str]
    """A row of `batch` to its text."""
    rejected: tuple[Rejected, ...]
    """The rows that are not in `batch`."""
    num_rows: int
    """Rows of the file in this piece, bad ones counted."""
    after: Cursor
    """Where the next rows start."""


@contextmanager
def _opened(path: AnyPath) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if path.suffix == ".gz":
            with gzip.open(file, "rb") as stream:
                yield cast(IO[bytes], stream)
        else:
            yield file


def _damaged(file_name: str, row: int, error: BaseException) -> ValueError:
    return ValueError(
        f"{file_name}: the gzip archive is cut short or damaged ({error}); {row} rows were read before the break. Fetch or "
        "pack the file again; reading can then go on from the last position."
    )


def open_table(path: AnyPath, *, name: str = "", columns: Sequence[str] = (), delimiter: str = ",") -> TableFile:
    """Returns a file with its columns.

    Args:
        path: The file; `.parquet` is Parquet, all else is CSV, `.gz` is decompressed.
        name: What messages call it; "" is the path.
        columns: Names of the columns of a CSV file without a header line; () reads the header.
        delimiter: What parts two fields of a CSV file.

    Raises:
        ValueError: The file is not there, is empty, is damaged at its start, or its header is not UTF-8.
    """
    name = name or str(path)
    if not path.is_file():
        raise ValueError(f"{name}: there is no such file ({path.absolute()})")
    if path.stat().st_size == 0:
        raise ValueError(f"{name}: the file is empty (0 bytes)")
    return _open_parquet(path, name) if path.suffix == ".parquet" else _open_csv(path, name, columns, delimiter)


def _open_parquet(path: AnyPath, name: str) -> TableFile:
    try:
        with opened_parquet(path) as parquet:
            columns, num_rows = tuple(parquet.schema_arrow.names), parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not a Parquet file, or cut short: {error}") from error
    if num_rows == 0:
        raise ValueError(f"{name}: the file is empty (no rows)")
    return TableFile(path=path, name=name, columns=columns, delimiter=None)


def _open_csv(path: AnyPath, name: str, columns: Sequence[str], delimiter: str) -> TableFile:
    try:
        with _opened(path) as stream:
            first = stream.readline(MAX_LINE_BYTES)
            more = first if columns else stream.read(1)
    except _GZIP_FAULTS as error:
        raise _damaged(name, 0, error) from error
    if not more:
        raise ValueError(f"{name}: the file is empty ({'no rows after the header' if first else 'no text'})")
    if columns:
        return TableFile(path=path, name=name, columns=tuple(columns), delimiter=delimiter)
    try:
        header = first.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: the header is not UTF-8 (byte {error.start}); is this a CSV file?") from error
    names = tuple(field.strip() for field in next(csv.reader([header.replace(delimiter, "\x1f")], delimiter="\x1f"), []))
    if len(set(names)) != len(names):
        raise ValueError(f"{name}: column names repeat in the header: {header[:RAW_CHARS]!r}")
    return TableFile(path=path, name=name, columns=names, delimiter=delimiter, header_bytes=len(first))


def require_columns(file: TableFile, needed: Sequence[str]) -> None:
    """Raises ValueError if a needed column is not in the file."""
    missing = [column for column in needed if column not in file.columns]
    if missing:
        raise ValueError(f"{file.name}: no column {', '.join(map(repr, missing))}; the file has: {', '.join(file.columns)}")


def start(file: TableFile) -> Cursor:
    """Returns the cursor before the first row."""
    return Cursor(row=0, byte=file.header_bytes)


def count_rows(file: TableFile) -> int:
    """Returns the number of rows, bad ones counted. Parquet: from its footer; CSV: counts line breaks, a pass over the file."""
    if file.delimiter is None:
        with opened_parquet(file.path) as parquet:
            return parquet.metadata.num_rows
    lines, last = 0, b"\n"
    with _opened(file.path) as stream:
        try:
            while block := stream.read(BLOCK_BYTES):
                lines += block.count(b"\n")
                last = block[-1:]
        except _GZIP_FAULTS as error:
            raise _damaged(file.name, max(lines - bool(file.header_bytes), 0), error) from error
    return lines + (last != b"\n") - bool(file.header_bytes)


def seek_row(file: TableFile, row: int) -> Cursor:
    """Returns the cursor before a row. CSV: a pass over the file up to it."""
    if file.delimiter is None or row == 0:
        return Cursor(row=row, byte=0 if file.delimiter is None else file.header_bytes)
    offset, left = 0, row + bool(file.header_bytes)
    with _opened(file.path) as stream:
        while block := stream.read(BLOCK_BYTES):
            breaks = block.count(b"\n")
            if breaks >= left:
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
                return Cursor(row=row, byte=offset + int(ends[left - 1]) + 1)
            left -= breaks
            offset += len(block)
    return Cursor(row=row, byte=offset)


def read_rows(
    file: TableFile, cursor: Cursor, *, num_rows: int, columns: Sequence[str], end_row: int | None
) -> Iterator[RawRows]:
    """Yields the rows of a file from a cursor on.

    Args:
        file: The file.
        cursor: Where to start.
        num_rows: Rows of each piece; the last one is shorter.
        columns: The columns to read.
        end_row: Row of the file before which to stop; None: the file's end.

    Raises:
        ValueError: The file is damaged; what stands before the damage was yielded.
    """
    if file.delimiter is None:
        yield from _parquet_rows(file, cursor, num_rows, list(columns), end_row)
        return
    for text, ends in _csv_pieces(file, cursor, num_rows, end_row):
        after = Cursor(row=cursor.row + len(ends), byte=cursor.byte + len(text))
        yield _parse(file, text, ends, cursor.row, list(columns), after)
        cursor = after


def _csv_pieces(file: TableFile, cursor: Cursor, num_rows: int, end_row: int | None) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields the text of the next `num_rows` lines, and int64 [lines] where each ends."""
    row, damage, more = cursor.row, None, True
    text, ends = b"", np.empty(0, np.int64)
    with _opened(file.path) as stream:
        try:
            stream.seek(cursor.byte)
        except _GZIP_FAULTS as error:
            raise _damaged(file.name, row, error) from error
        while True:
            wanted = num_rows if end_row is None else min(num_rows, end_row - row)
            while more and len(ends) < wanted:
                try:  # read1: what was decompressed before a break is not lost
                    block = stream.read1(BLOCK_BYTES)  # pyright: ignore[reportAttributeAccessIssue]
                except _GZIP_FAULTS as error:
                    block, damage = b"", error
                more = bool(block)
                scanned = len(text)
                text += block
                ends = np.concatenate([ends, np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + scanned + 1])
                if not len(ends) and len(text) > MAX_LINE_BYTES:
                    raise ValueError(
                        f"{file.name}: the line of row {row} is longer than {MAX_LINE_BYTES} bytes; is this a CSV file?"
                    )
            if not more and damage is None and len(text) > (ends[-1] if len(ends) else 0):
                ends = np.append(ends, len(text))  # a last line without line break
            taken = ends[: max(wanted, 0)]
            if not len(taken):
                break
            cut = int(taken[-1])
            yield text[:cut], taken
            text, ends, row = text[cut:], ends[len(taken) :] - cut, row + len(taken)
    if damage is not None and (end_row is None or row < end_row):
        raise _damaged(file.name, row, damage) from damage


def _not_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return True
    return False


def _quotes_open(line: bytes, delimiter: str) -> bool:
    try:
        list(csv.reader([line.decode().rstrip("\r\n")], delimiter=delimiter, strict=True))
    except csv.Error:
        return True
    return False


def _parse(file: TableFile, text: bytes, ends: np.ndarray, first_row: int, columns: list[str], after: Cursor) -> RawRows:
    """Returns lines as columns of strings; those that cannot be parted into fields are set aside."""
    starts = np.concatenate([[0], ends[:-1]])
    faults: dict[int, str] = {}

    def line(index: int) -> bytes:
        return text[starts[index] : ends[index]]

    try:
        text.decode()
    except UnicodeDecodeError:
        faults = {i: "not UTF-8" for i in range(len(ends)) if _not_utf8(line(i))}
    kept, batch = _fields(file, text, starts, ends, columns, faults)
    if len(kept) != batch.num_rows:  # an open quote has swallowed a line break: find the lines that have one
        delimiter = "\x1f" if file.delimiter is None or len(file.delimiter) > 1 else file.delimiter
        faults |= {int(i): "quotes do not match" for i in kept if b'"' in line(i) and _quotes_open(line(i), delimiter)}
        kept, batch = _fields(file, text, starts, ends, columns, faults)
    assert len(kept) == batch.num_rows, f"{file.name}: {len(kept)} lines gave {batch.num_rows} rows"

    def where(index: int) -> str:
        return f"{file.name}:{first_row + index + 1 + bool(file.header_bytes)}"

    def raw(index: int) -> str:
        return line(index).decode(errors="backslashreplace").rstrip("\r\n")[:RAW_CHARS]

    return RawRows(
        file_name=file.name,
        batch=batch,
        rows=first_row + kept,
        where=lambda i: where(int(kept[i])),
        raw=lambda i: raw(int(kept[i])),
        rejected=tuple(Rejected(where(i), faults[i], raw(i)) for i in sorted(faults)),
        num_rows=len(ends),
        after=after,
    )


def _fields(
    file: TableFile, text: bytes, starts: np.ndarray, ends: np.ndarray, columns: list[str], faults: dict[int, str]
) -> tuple[np.ndarray, pa.RecordBatch]:
    """Parts lines into fields; adds the lines with too few or too many to `faults`. Returns the lines kept, and their rows."""
    kept = np.delete(np.arange(len(ends)), sorted(faults))
    if faults:
        text = b"".join(text[starts[i] : ends[i]] for i in kept)
    delimiter = file.delimiter or ","
    if len(delimiter) > 1:
        text, delimiter = text.replace(delimiter.encode(), b"\x1f"), "\x1f"
    wrong: list[int] = []

    def set_aside(row: pa_csv.InvalidRow) -> str:
        assert row.number is not None
        wrong.append(row.number - 1)
        return "skip"

    empty = pa.RecordBatch.from_pydict({name: pa.array([], pa.string()) for name in columns})
    if not len(kept):
        return kept, empty
    table = pa_csv.read_csv(
        pa.BufferReader(text),
        pa_csv.ReadOptions(column_names=list(file.columns), use_threads=False, block_size=len(text) + 1),
        pa_csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if b'"' in text else False,
            ignore_empty_lines=False,
            invalid_row_handler=set_aside,
        ),
        pa_csv.ConvertOptions(
            include_columns=columns,
            column_types=dict.fromkeys(columns, pa.string()),
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
            null_values=[""],
        ),
    )
    faults |= {int(kept[i]): f"not {len(file.columns)} fields" for i in wrong}
    return np.delete(kept, wrong), table.combine_chunks().to_batches()[0] if table.num_rows else empty


def _parquet_rows(file: TableFile, cursor: Cursor, num_rows: int, columns: list[str], end_row: int | None) -> Iterator[RawRows]:
    row, pending, held = cursor.row, list[pa.RecordBatch](), 0
    try:
        with opened_parquet(file.path) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            firsts = np.concatenate([[0], np.cumsum(sizes)])
            end = int(firsts[-1]) if end_row is None else min(end_row, int(firsts[-1]))
            group = int(np.searchsorted(firsts, row, side="right")) - 1
            skip = row - int(firsts[group])
            batches = _batches(parquet, range(group, len(sizes)), num_rows, columns)
            while row < end:
                wanted = min(num_rows, end - row)
                while held < wanted:
                    batch = next(batches)
                    dropped = min(skip, batch.num_rows)
                    skip -= dropped
                    pending.append(batch.slice(dropped))
                    held += batch.num_rows - dropped
                joined = pa.Table.from_batches(pending).combine_chunks().to_batches()[0]
                row += wanted
                held -= wanted
                pending = [joined.slice(wanted)] if held else []
                yield _parquet_piece(file, joined.slice(0, wanted), row)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.name}: damaged Parquet file; {row} rows were read before the break: {error}") from error


def _batches(parquet: pq.ParquetFile, groups: range, num_rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields row groups in pieces. Asked for one by one: what has been fetched of a remote one is kept until the next."""
    for group in groups:
        yield from parquet.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False)


def _parquet_piece(file: TableFile, batch: pa.RecordBatch, end: int) -> RawRows:
    first = end - batch.num_rows
    return RawRows(
        file_name=file.name,
        batch=batch,
        rows=np.arange(first, end),
        where=lambda i: f"{file.name}#{first + i}",
        raw=lambda i: json.dumps(batch.slice(i, 1).to_pylist()[0], default=str)[:RAW_CHARS],
        rejected=(),
        num_rows=batch.num_rows,
        after=Cursor(row=end, byte=0),
    )
