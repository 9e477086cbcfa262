"""A row of table files read as one stream: parts, passes, chunks and positions.

In: files in stream order, and a function that makes examples of raw rows. Out: `Chunk`s, from any position on. All
file sources share this; what differs between them is the function.

A position is `{epoch, file, row, byte, newest_ms, keys, backwards}`: the place of the next row, and what the checks must
know of the rows before it. Memory is a few chunks.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from monolith_jax.stream.remote import AnyPath
from monolith_jax.stream.tabular import Cursor, RawRows, TableFile, count_rows, read_rows, seek_row, start
from monolith_jax.stream.validate import Trail
from monolith_jax.types import Chunk, Position, Rejected

MAX_BACKWARDS_ROWS = 100
MAX_BACKWARDS_SHARE = 0.1
"""A file of which more than this share of the rows so far (and more than `MAX_BACKWARDS_ROWS`) go backwards is refused."""

Convert = Callable[[RawRows, Trail], tuple[pa.RecordBatch, tuple[Rejected, ...], Trail]]
"""Raw rows and the trail of the rows before, to good examples, the rows set aside, and the trail for the rows after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read of which files, and in which pieces."""

    files: tuple[TableFile, ...]
    """In stream order."""
    columns: tuple[tuple[str, ...], ...]
    """The columns to read of each file."""
    part: tuple[float, float]
    """Share of the rows to read, by stream order: row floor(part[0] * n) up to row floor(part[1] * n)."""
    epochs: int
    """Passes over the part."""
    chunk_rows: int
    """Rows of a chunk; the last of a file is shorter."""
    how_to_sort: str
    """What to tell a user whose rows are not in time order."""


def check_reading(part: tuple[float, float], epochs: int, chunk_rows: int, max_backwards_s: float) -> None:
    """Raises ValueError if a common field of the file sources is out of range."""
    if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise ValueError(f"part must be (from, to) with 0 <= from < to <= 1, got {part}")
    if epochs < 1 or chunk_rows < 1:
        raise ValueError(f"epochs and chunk_rows must be at least 1, got {epochs} and {chunk_rows}")
    if not max_backwards_s >= 0:
        raise ValueError(f"max_backwards_s must be 0 or more, got {max_backwards_s}")


@lru_cache(maxsize=1024)
def _counted(file: TableFile, num_bytes: int, changed_ns: int) -> int:
    """Counts once per file and state of the file."""
    del num_bytes, changed_ns
    return count_rows(file)


def num_rows(file: TableFile) -> int:
    """Returns the number of rows of a file; a CSV file is read through for it once."""
    stat = file.path.stat()
    return _counted(file, stat.st_size, stat.st_mtime_ns)


def bounds(counts: Sequence[int], part: tuple[float, float]) -> tuple[tuple[int, int], ...]:
    """Returns for each file the rows [first, end) that belong to the part.

    Args:
        counts: Rows of each file.
        part: Share of all rows, from and to.
    """
    total = sum(counts)
    first, end = math.floor(part[0] * total), math.floor(part[1] * total)
    result, before = [], 0
    for count in counts:
        result.append((min(max(first - before, 0), count), min(max(end - before, 0), count)))
        before += count
    return tuple(result)


def num_part_rows(reading: Reading) -> int | None:
    """Returns the rows of all passes, bad ones counted; None where that takes a pass over the files."""
    if reading.part == (0.0, 1.0) and any(file.delimiter is not None for file in reading.files):
        return None
    return reading.epochs * sum(end - first for first, end in bounds([num_rows(file) for file in reading.files], reading.part))


def _ranges(reading: Reading) -> tuple[tuple[int, int | None], ...]:
    if reading.part == (0.0, 1.0):
        return ((0, None),) * len(reading.files)
    return bounds([num_rows(file) for file in reading.files], reading.part)


def _refuse_unsorted(file: TableFile, row: int, read: int, backwards: int, trail: Trail, how_to_sort: str) -> None:
    if backwards <= MAX_BACKWARDS_ROWS or backwards <= MAX_BACKWARDS_SHARE * read:
        return
    raise ValueError(
        f"{file.name}: not in time order: {backwards} of the {read} rows up to row {row} are far behind the newest time before "
        f"them ({trail.newest_ms} ms). {how_to_sort}"
    )


def read_files(reading: Reading, position: Position, convert: Convert) -> Iterator[Chunk]:
    """Yields the chunks of files from a position on.

    Args:
        reading: What is read.
        position: `{}` or one that a chunk of the same reading had.
        convert: Makes examples of raw rows.

    Raises:
        ValueError: A file is damaged or not in time order, or the position is none of this reading's.
    """
    ranges = _ranges(reading)
    epoch, index, cursor, trail, backwards = _resumed(reading, position)
    while epoch < reading.epochs:
        while index < len(reading.files):
            file, (first, end) = reading.files[index], ranges[index]
            if end is None or first < end:
                cursor = cursor or (seek_row(file, first) if first else start(file))
                pieces = read_rows(file, cursor, num_rows=reading.chunk_rows, columns=reading.columns[index], end_row=end)
                for raw in pieces:
                    examples, rejected, trail = convert(raw, trail)
                    rejected = tuple(sorted((*raw.rejected, *rejected), key=lambda r: _row_of(r.where)))
                    backwards += sum(r.reason == "time went backwards" for r in rejected)
                    row = raw.after.row
                    _refuse_unsorted(file, row, row - first, backwards, trail, reading.how_to_sort)
                    place = {"epoch": epoch, "file": index, "row": row, "byte": raw.after.byte}
                    seen = {"newest_ms": trail.newest_ms, "keys": [list(key) for key in trail.keys], "backwards": backwards}
                    yield Chunk(examples, rejected, place | seen, epoch)
            index, cursor, backwards = index + 1, None, 0
        epoch, index, trail = epoch + 1, 0, Trail()


def _row_of(where: str) -> int:
    return int(where.replace("#", ":").rpartition(":")[2])


def _resumed(reading: Reading, position: Position) -> tuple[int, int, Cursor | None, Trail, int]:
    if not position:
        return 0, 0, None, Trail(), 0
    index = position["file"]
    if index >= len(reading.files):
        raise ValueError(f"the position is in file {index + 1}, but there are {len(reading.files)}; were files taken away?")
    file, cursor = reading.files[index], Cursor(row=position["row"], byte=position["byte"])
    plain = file.delimiter is not None and file.path.suffix != ".gz"
    if plain and cursor.byte > file.path.stat().st_size:
        raise ValueError(f"{file.name}: the position is at byte {cursor.byte}, behind the file's end; has the file changed?")
    if file.delimiter is None and cursor.row > num_rows(file):
        raise ValueError(f"{file.name}: the position is at row {cursor.row}, behind the file's end; has the file changed?")
    trail = Trail(newest_ms=position["newest_ms"], keys=tuple((user, video) for user, video in position["keys"]))
    return position["epoch"], index, cursor, trail, position["backwards"]


def how_to_sort(logs: str, output: AnyPath, time_column: str, then: str) -> str:
    """Returns what to tell a user whose rows are not in time order."""
    return (
        f"Sort them once: python -m launch.sort --input {logs} --output {output} --time_column {time_column} ; then read the "
        f"sorted files ({then}). Or raise max_backwards_s if the rows are meant to be this far out of order."
    )
