"""Puts a log that is not in time order into time order, in constant memory.

In: CSV or Parquet files of one set of columns, in any order. Out: a folder of Parquet files `<name>_00000.parquet`, ...:
all rows by time, over the files in name order; rows of equal time keep their order. Nothing is lost: all columns are kept,
and rows that have no readable time, or cannot be parted into columns, go to `set_aside.jsonl` with place and reason.

An external merge sort. Pass 1 writes runs: as many rows as fit in memory, sorted. A sample of their times gives time ranges
with about as many rows each. Pass 2 collects each range from all runs, sorts it and writes it out. A time that very many rows
share is a range of its own, which needs no sorting and is copied piece by piece. Disk: about twice the size of the log.
CSV columns get the type that all their values have: int64, float64 or string.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from monolith_jax.stream import validate
from monolith_jax.stream.dead_letter import DeadLetters, set_aside
from monolith_jax.stream.kinds import narrow, parquet_schema
from monolith_jax.stream.remote import AnyPath
from monolith_jax.stream.tabular import TableFile, open_table, read_rows, require_columns, start

_TIME = "__time"
_FARTHEST = 1 << 62  # so that time + 1 is an int64 too
_PIECE_ROWS = 8192
_SAMPLES_OF_RUN = 256

Progress = Callable[[str, int, int | None], None]
"""Called with the stage, the rows done, and the rows in all (None: unknown)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """What `sort_by_time` did."""

    num_rows: int
    """Rows in order."""
    set_aside: dict[str, int]
    """Rows that were set aside, by reason."""
    files: tuple[Path, ...]
    """The files, in time order."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows in time order on disk."""

    path: Path
    firsts: np.ndarray
    """int64 [row groups + 1]: the time of each row group's first row, and of the last row."""
    sample: np.ndarray
    """int64: every so manieth time."""
    num_rows: int


def sort_by_time(
    inputs: Sequence[AnyPath],
    output: Path,
    *,
    time_column: str,
    name: str,
    rows_in_memory: int = 1_000_000,
    progress: Progress | None = None,
) -> Sorted:
    """Sorts files by time into a folder.

    Args:
        inputs: The files, here or on other machines, in the order that rows of equal time keep.
        output: The folder; made if it is not there.
        time_column: The column to sort by: whole numbers, or Parquet timestamps.
        name: What the names of the sorted files start with.
        rows_in_memory: Rows of a run; the process holds about three times as many at its peak.
        progress: Called now and then.

    Raises:
        ValueError: The inputs differ in columns, a file is missing or damaged, or the output has such files already.
    """
    files = [open_table(path, name=str(path)) for path in inputs]
    _check(files, output, time_column, name)
    runs_folder, ready = output / ".runs", output / ".sorted"
    letters = DeadLetters(output / "set_aside.jsonl")
    letters.set_state({"bytes": 0, "counts": {}})
    for folder in (runs_folder, ready):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        runs, kinds = _write_runs(files, time_column, runs_folder, rows_in_memory, letters, progress or _quiet)
        if not runs:
            raise ValueError(f"no row has a readable {time_column!r}:\n{set_aside(letters.counts, letters.path)}")
        written = _merge(runs, kinds, ready, name, rows_in_memory, progress or _quiet)
        done = tuple(path.rename(output / path.name) for path in written)  # only now: half a log would look like a whole one
        return Sorted(num_rows=sum(run.num_rows for run in runs), set_aside=letters.counts, files=done)
    finally:
        shutil.rmtree(runs_folder, ignore_errors=True)
        shutil.rmtree(ready, ignore_errors=True)


def _quiet(stage: str, done: int, total: int | None) -> None:
    del stage, done, total


def _check(files: Sequence[TableFile], output: Path, time_column: str, name: str) -> None:
    if not files:
        raise ValueError("there is nothing to sort: no input file")
    require_columns(files[0], [time_column])
    for file in files[1:]:
        if set(file.columns) != set(files[0].columns):
            differ = ", ".join(sorted(set(file.columns) ^ set(files[0].columns)))
            raise ValueError(f"{file.name} and {files[0].name} differ in columns: {differ}; sort them apart")
    schemas = [parquet_schema(file).remove_metadata() if file.delimiter is None else None for file in files]
    if any(schema != schemas[0] for schema in schemas):
        raise ValueError(f"the inputs are CSV and Parquet, or Parquet of unlike types ({files[0].name}, ...); sort them apart")
    there = sorted(output.glob(f"{name}_*.parquet"))
    if there:
        raise ValueError(f"{output} has {there[0].name} already; remove it or choose another output folder or name")


def _pieces(
    files: Sequence[TableFile], time_column: str, kinds: dict[str, pa.DataType | None], letters: DeadLetters
) -> Iterator[pa.RecordBatch]:
    """Yields the rows that have a time, with the time as first column; narrows the types of CSV columns in `kinds`."""
    for file in files:
        for raw in read_rows(file, start(file), num_rows=_PIECE_ROWS, columns=files[0].columns, end_row=None):
            column = raw.batch.column(time_column)
            if pa.types.is_temporal(column.type):
                times, faults = column.cast(pa.int64()), []
            else:
                times, faults = validate.convert(column, time_column, pa.int64(), file.name)
            far = pc.or_(pc.less(times, -_FARTHEST), pc.greater(times, _FARTHEST))
            far = pc.fill_null(far, False).to_numpy(zero_copy_only=False)
            faults = [*faults, validate.required(times, time_column), (far, f"{time_column} is out of range")]
            batch = pa.RecordBatch.from_arrays([times, *raw.batch.columns], [_TIME, *raw.batch.schema.names])
            batch, rejected = validate.split(batch, faults, raw.where, raw.raw)
            letters.add((*raw.rejected, *rejected))
            if file.delimiter is not None:
                kinds |= {column: narrow(batch.column(column), kinds[column]) for column in files[0].columns}
            yield batch


def _write_runs(
    files: Sequence[TableFile], time_column: str, folder: Path, rows_in_memory: int, letters: DeadLetters, progress: Progress
) -> tuple[list[_Run], dict[str, pa.DataType]]:
    kinds: dict[str, pa.DataType | None] = dict.fromkeys(files[0].columns)
    if files[0].delimiter is None:
        kinds |= {field.name: field.type for field in parquet_schema(files[0])}
    runs: list[_Run] = []
    held: list[pa.RecordBatch] = []
    num_held = done = 0
    for batch in _pieces(files, time_column, kinds, letters):
        held.append(batch)
        num_held += batch.num_rows
        done += batch.num_rows
        if num_held >= rows_in_memory:
            runs.append(_write_run(held, folder / f"{len(runs):06}.parquet", rows_in_memory))
            held, num_held = [], 0
        progress("reading", done, None)
    if num_held:
        runs.append(_write_run(held, folder / f"{len(runs):06}.parquet", rows_in_memory))
    return runs, {column: kind or pa.string() for column, kind in kinds.items()}


def _write_run(batches: list[pa.RecordBatch], path: Path, rows_in_memory: int) -> _Run:
    table = _in_order(pa.Table.from_batches(batches))
    times = table.column(_TIME).to_numpy()
    pq.write_table(table, path, row_group_size=_PIECE_ROWS, compression="zstd", use_dictionary=False, write_statistics=False)
    stride = max(rows_in_memory // _SAMPLES_OF_RUN, 1)
    sample = times[stride // 2 :: stride].copy()  # a view would keep the whole run in memory
    return _Run(path, np.append(times[::_PIECE_ROWS], times[-1]), sample, len(times))


def _in_order(table: pa.Table) -> pa.Table:
    times = table.column(_TIME).to_numpy()
    if np.all(times[1:] >= times[:-1]):
        return table
    return table.combine_chunks().take(pa.array(np.argsort(times, kind="stable")))


def _ranges(runs: Sequence[_Run], rows_in_memory: int) -> list[tuple[int, int]]:
    """Returns half-open time ranges, ascending, which hold all rows; none but those of a single time are much over memory."""
    lowest, highest = min(int(run.firsts[0]) for run in runs), max(int(run.firsts[-1]) for run in runs)
    samples = np.sort(np.concatenate([run.sample for run in runs]))
    num_ranges = -(-sum(run.num_rows for run in runs) // rows_in_memory)
    cuts = samples[len(samples) * np.arange(1, num_ranges) // num_ranges]
    shared = cuts[1:][cuts[1:] == cuts[:-1]]
    edges = sorted({lowest, highest + 1, *cuts.tolist(), *(shared + 1).tolist()})
    return list(pairwise(edges))


def _rows_between(run: _Run, low: int, high: int) -> Iterator[pa.Table]:
    """Yields the rows of a run with low <= time < high, a few row groups at a time."""
    first = max(int(np.searchsorted(run.firsts[:-1], low, side="left")) - 1, 0)
    end = int(np.searchsorted(run.firsts[:-1], high, side="left"))
    if first >= end:
        return
    with pq.ParquetFile(run.path, pre_buffer=False) as parquet:
        for group in range(first, end):
            table = parquet.read_row_group(group, use_threads=False)
            times = table.column(_TIME).to_numpy()
            begin, stop = np.searchsorted(times, [low, high], side="left")
            if begin < stop:
                yield table.take(pa.array(np.arange(begin, stop)))  # a slice would keep the whole row group in memory


def _collected(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    found = list(pieces)
    if found:
        yield _in_order(pa.concat_tables(found))


def _merge(
    runs: Sequence[_Run], kinds: dict[str, pa.DataType], folder: Path, name: str, rows_in_memory: int, progress: Progress
) -> list[Path]:
    schema = pa.schema(list(kinds.items()))
    total, done = sum(run.num_rows for run in runs), 0
    written: list[Path] = []
    for low, high in _ranges(runs, rows_in_memory):
        pieces = (piece for run in runs for piece in _rows_between(run, low, high))
        tables = pieces if high == low + 1 else _collected(pieces)
        path, writer = folder / f"{name}_{len(written):05}.parquet", None
        for table in tables:
            writer = writer or pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
            writer.write_table(_typed(table.drop_columns([_TIME]), schema), row_group_size=1 << 16)
            done += table.num_rows
            progress("sorting", done, total)
        if writer:
            writer.close()
            written.append(path)
    assert done == total, f"{total} rows went in, {done} came out"
    return written


def _typed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Casts text to the types that all values have (spaces around a number are no part of it)."""
    columns = []
    for field in schema:
        column = table.column(field.name).combine_chunks()
        text = pa.types.is_string(column.type) and field.type != pa.string()
        columns.append((validate.convert(column, field.name, field.type, "")[0] if text else column).cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)
