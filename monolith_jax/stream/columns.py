"""Any table as a stream: Parquet or CSV files with a map of column names.

In: files in stream order, and what their columns mean. Out: examples with the columns renamed, typed and checked. Columns
with a meaning (`EXAMPLE`'s, event time, ids, actions) get its type; others are int64, float64 or string, as `types` says or
as the first rows of the first file show (a later value that is not of that type sets its row aside).
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream import validate
from monolith_jax.stream.events import EXAMPLE
from monolith_jax.stream.files import Reading, check_reading, how_to_sort, num_part_rows, num_rows, read_files
from monolith_jax.stream.kinds import infer_kinds
from monolith_jax.stream.remote import RemotePath, is_remote, joined, matching, path_of
from monolith_jax.stream.tabular import RawRows, TableFile, open_table, require_columns
from monolith_jax.types import Chunk, Position, Rejected

_KINDS = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "string": pa.string()}
_IDS = ("user_id", "video_id", "author_id", "sound_id")
_NOT_NEGATIVE = {"duration_ms": "negative duration", "play_time_ms": "negative play time", "dwell_ms": "negative dwell time"}
_NOT_NEGATIVE |= {"weight": "negative weight"}
_MS = {"s": 1000.0, "ms": 1.0, "us": 0.001}
TIME = "event_time_ms"
_OPENED_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsConfig:
    """What to read of which files."""

    paths: tuple[str, ...]
    """Files or glob patterns, in stream order; the files of a pattern in name order. `.parquet`, else CSV, plain or `.gz`.
    Local, or `s3://bucket/key`, `hdfs://namenode:port/path`, `webhdfs://host:port/path`; how to get there is in the environment
    variables of S3's and Hadoop's clients (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `HADOOP_CONF_DIR`, ...)."""
    folder: str = ""
    """Where relative paths start, also a URL; "" is the working folder."""
    columns: tuple[tuple[str, str], ...] = ()
    """(column in the file, column of the example)."""
    keep_others: bool = True
    """Columns that are not named pass under their own name, but for those of `positive`; False: they are not read."""
    positive: tuple[tuple[str, str, str], ...] = ()
    """(label, column in the file, value): the label is true where the trimmed raw value is this, null where there is none."""
    types: tuple[tuple[str, str], ...] = ()
    """(column in the file, `int`, `float`, `bool` or `string`) where the first rows would mislead."""
    time_column: str = ""
    """Column in the file with the event time; "": the one that becomes `event_time_ms`, or else the row number is the time."""
    time_unit: str = "ms"
    """Unit of a numeric time: `s`, `ms` or `us` since 1970. Parquet timestamps need none."""
    delimiter: str = ","
    """CSV: what parts two fields."""
    part: tuple[float, float] = (0.0, 1.0)
    """Share of the rows to read by stream order, cut at row floor(share * n): (0.8, 1.0) is the last 20 %."""
    epochs: int = 1
    """Passes over the part. The checks start afresh at each."""
    chunk_rows: int = 4096
    """Rows of a chunk."""
    max_backwards_s: float = 3600.0
    """A row whose event time is further behind the newest so far is set aside."""
    divide: Literal["users", "files"] = "users"
    """With several partitions (`TrainConfig.partitions`, N): each reads all files and keeps its users (chunks in turn where
    there is no `user_id`); or file i is partition i mod N's, which reads no other: for logs with as many files for each stretch
    of time, divided by user already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """The columns of an example, worked out from config and files."""

    names: dict[str, str]
    """Column of the example to column in the file."""
    kinds: dict[str, pa.DataType]
    """Column of the example to its type."""
    time: str
    """Column in the file with the event time; "": none."""


def _open_files(config: ColumnsConfig) -> tuple[TableFile, ...]:
    paths: list[str] = []
    for path in config.paths:
        pattern = joined(config.folder, path)
        found = matching(pattern)
        if not found:
            raise ValueError(f"no file matches {pattern!r}" + ("" if is_remote(pattern) else f" (in {Path.cwd()})"))
        paths += found
    if not paths:
        raise ValueError("ColumnsConfig.paths is empty; name at least one file")

    def opened(path: str) -> TableFile:
        return open_table(path_of(path), name=path, delimiter=config.delimiter)

    if not any(map(is_remote, paths)):
        return tuple(map(opened, paths))
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:  # each is a few trips to the server
        return tuple(pool.map(opened, paths))


def _layout(config: ColumnsConfig, files: tuple[TableFile, ...]) -> _Layout:
    labels = {label: column for label, column, _ in config.positive}
    named = {theirs: ours for theirs, ours in config.columns if ours != TIME}
    times = [theirs for theirs, ours in config.columns if ours == TIME] or [TIME] * (TIME in files[0].columns)
    time = config.time_column or next(iter(times), "")
    others = (
        [name for name in files[0].columns if name not in {*named, *labels.values(), time, TIME}] if config.keep_others else []
    )
    pairs = [*((ours, theirs) for theirs, ours in named.items()), *((name, name) for name in others), *labels.items()]
    names = dict(pairs)
    if len(names) < len(pairs) or TIME in labels:
        seen = [ours for ours, _ in pairs]
        raise ValueError(
            f"two columns would be called {sorted({ours for ours in seen if seen.count(ours) > 1} or {TIME})}; rename one"
        )
    wanted: list[str] = sorted({*names.values(), *([time] if time else []), *(column for column, _ in config.types)})
    for file in files:
        require_columns(file, wanted)
    inferred = infer_kinds(files[0], wanted)
    asked = {column: _KINDS[kind] for column, kind in config.types}
    kinds = {ours: _kind(ours, asked.get(theirs, inferred[theirs])) for ours, theirs in names.items() if ours not in labels}
    return _Layout(names=names, kinds=kinds, time=time)


def _kind(ours: str, found: pa.DataType) -> pa.DataType:
    """Returns the type of an example's column: its meaning's, or what was found."""
    if ours in _IDS:
        return pa.string() if found == pa.string() else pa.int64()
    if ours not in EXAMPLE.names or ours == "tag_id":
        return found
    return pa.float64() if ours == "weight" else EXAMPLE.field(ours).type


@dataclass(frozen=True, slots=True)
class ColumnsSource:
    """A `Source` over table files of any columns."""

    config: ColumnsConfig
    """What to read."""
    index: int = 0
    """Which partition of the files this is."""
    number: int = 1
    """How many there are; each has every `number`-th file, and `part` is a share of the rows of those."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        config = self.config
        check_reading(config.part, config.epochs, config.chunk_rows, config.max_backwards_s)
        if config.time_unit not in _MS:
            raise ValueError(f"time_unit must be one of {', '.join(_MS)}, got {config.time_unit!r}")
        unknown = [kind for _, kind in config.types if kind not in _KINDS]
        if unknown:
            raise ValueError(f"types must be of {', '.join(_KINDS)}, got {', '.join(unknown)}")

    def _reading(self) -> tuple[Reading, _Layout]:
        config, files = self.config, _open_files(self.config)
        layout = _layout(config, files)
        theirs = (*layout.names.values(), *((layout.time,) if layout.time else ()))
        wanted = tuple(sorted(set(theirs), key=theirs.index))
        first = files[0].path
        output = Path("sorted") if isinstance(first, RemotePath) else first.parent / "sorted"
        patterns = " ".join(f"'{path}'" for path in config.paths)
        mine = files[self.index :: self.number]
        if not mine:
            raise ValueError(
                f"ColumnsConfig.divide is 'files' and there are {len(files)} files for {self.number} partitions; use fewer "
                "(TrainConfig.partitions), more files, or divide 'users'"
            )
        reading = Reading(
            files=mine,
            columns=(wanted,) * len(mine),
            part=config.part,
            epochs=config.epochs,
            chunk_rows=config.chunk_rows,
            how_to_sort=how_to_sort(patterns, output, layout.time, f"ColumnsConfig.paths = ('{output}/*.parquet',)"),
        )
        return reading, layout

    @property
    def num_examples(self) -> int | None:
        """Rows of all passes, those that will be set aside counted; None where that takes a pass over the files."""
        return num_part_rows(self._reading()[0])

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from `position` on.

        Raises:
            ValueError: A file or column is missing, a file is empty or damaged, or the rows are not in time order.
        """
        reading, layout = self._reading()
        config, max_backwards_ms = self.config, int(1000 * self.config.max_backwards_s)
        before = _rows_before(reading.files) if not layout.time else {}

        def examples(raw: RawRows, trail: validate.Trail) -> tuple[pa.RecordBatch, tuple[Rejected, ...], validate.Trail]:
            batch, faults = _typed(raw, config, layout, before)
            if layout.time:
                good = validate.good_rows(faults, batch.num_rows)
                times = pc.fill_null(batch.column(TIME), 0).to_numpy(zero_copy_only=False)
                both = {"user_id", "video_id"} <= set(batch.schema.names)
                users, videos = (batch.column("user_id"), batch.column("video_id")) if both else (None, None)
                late, trail = validate.in_order(times, users, videos, good, trail, max_backwards_ms)
                faults += late
            batch, rejected = validate.split(batch, faults, raw.where, raw.raw)
            return batch, rejected, trail

        yield from read_files(reading, position, examples)


def _rows_before(files: tuple[TableFile, ...]) -> dict[str, int]:
    """Returns the rows of all files before each, by name."""
    before, total = {}, 0
    for file in files:
        before[file.name] = total
        total += num_rows(file) if file is not files[-1] else 0
    return before


def _typed(
    raw: RawRows, config: ColumnsConfig, layout: _Layout, before: dict[str, int]
) -> tuple[pa.RecordBatch, list[validate.Fault]]:
    """Returns the columns of the examples, typed, and the faults of single rows."""
    columns: dict[str, pa.Array] = {}
    faults: list[validate.Fault] = []
    for ours, kind in layout.kinds.items():
        theirs = layout.names[ours]
        columns[ours], found = validate.convert(raw.batch.column(theirs), theirs, kind, raw.file_name)
        faults += found
        if ours in ("user_id", "video_id"):
            faults.append(validate.required(columns[ours], theirs))
        if ours in _NOT_NEGATIVE:
            faults.append(validate.not_negative(columns[ours], _NOT_NEGATIVE[ours]))
        if ours == "weight":
            columns[ours] = columns[ours].cast(pa.float32())
    for label, theirs, value in config.positive:
        text = pc.utf8_trim_whitespace(raw.batch.column(theirs).cast(pa.string()))
        columns[label] = pc.equal(text, value.strip())
    if layout.time:
        columns[TIME], found = _event_times(raw, layout.time, config.time_unit)
        faults += found
    else:
        columns[TIME] = pa.array(raw.rows + before[raw.file_name])
    return pa.RecordBatch.from_pydict(columns), faults


def _event_times(raw: RawRows, name: str, unit: str) -> tuple[pa.Array, list[validate.Fault]]:
    column = raw.batch.column(name)
    if pa.types.is_timestamp(column.type):
        times, faults = column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()), []
    elif unit == "ms":
        times, faults = validate.convert(column, name, pa.int64(), raw.file_name)
    else:
        numbers, faults = validate.convert(column, name, pa.float64(), raw.file_name)
        inside = pc.min_element_wise(pc.multiply(numbers, _MS[unit]), pa.scalar(float(validate.LAST_MS)), skip_nulls=False)
        times = pc.round(pc.max_element_wise(inside, pa.scalar(0.0), skip_nulls=False)).cast(pa.int64())
    return times, [*faults, validate.required(times, name), validate.in_time_range(times)]
