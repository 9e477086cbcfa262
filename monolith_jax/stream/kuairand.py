"""KuaiRand: real short-video impressions with what followed them (Gao et al., CIKM 2022; kuairand.com).

In: a folder in the official layout (KuaiRand-Pure, -1K, -27K, or their `data` folder), CSV plain or `.gz`, or Parquet
with the same columns: `log_standard*`, `user_features*`, `video_features_basic*`. Out: examples in stream order.

An example holds `EXAMPLE`'s event time, ids, outcomes and duration (0 in the log means unknown: null), and as logged
features the log's `tab` and `is_rand` where they are there, `hour_of_day` (Beijing time, from the event time), the
user's features under their own names (prefixed `user_` where they are not), and the video's `video_type`, `upload_type`
and `video_age_days` (Beijing days from the day of upload to the impression, not below 0). Users and videos without
features get nulls. Not read: `date` and `hourmin` (the event time says it), `long_view` (`events.labels` derives it), and
`comment_stay_time` and `profile_stay_time`, which are outcomes that a feature would leak.

The feature tables are held in memory (50 bytes a video: 1.6 GB for the 32 million of KuaiRand-27K, and about twice that
while they load, a minute or two). The log is streamed.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream import validate
from monolith_jax.stream.files import Reading, check_reading, how_to_sort, num_part_rows, read_files
from monolith_jax.stream.side_table import SideTable, days_of, find_one, join, load_side_table, split_ids
from monolith_jax.stream.tabular import FORMATS, RawRows, TableFile, open_table, require_columns
from monolith_jax.types import Chunk, Position, Rejected

_NUMBERS = {"user_id": "user_id", "video_id": "video_id", "time_ms": "event_time_ms"}
_TIMES = {"play_time_ms": "play_time_ms", "duration_ms": "duration_ms"}
_ACTIONS = {
    "is_click": "click",
    "is_like": "like",
    "is_comment": "comment",
    "is_forward": "share",
    "is_follow": "follow",
    "is_profile_enter": "profile",
    "is_hate": "dislike",
}
_LOGGED = ("tab", "is_rand")
_VIDEO_COLUMNS = ("author_id", "music_id", "tag", "video_type", "upload_type", "upload_dt")
_BEIJING_MS = 8 * 3_600_000
_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class KuaiRandConfig:
    """What to read of a KuaiRand folder."""

    folder: str
    """The folder of the logs, or its parent with a folder `data`."""
    features_folder: str = ""
    """The folder of the feature files; "" is `folder`. Name it if the logs are sorted copies in a folder of their own."""
    logs: tuple[str, ...] = ()
    """Names of log files in `folder`, in stream order; () finds `log_standard*` in name order. `log_random*` must be named."""
    features: bool = True
    """Join the features of users and videos; False: ids and outcomes only."""
    part: tuple[float, float] = (0.0, 1.0)
    """Share of the rows to read by stream order, cut at row floor(share * n): (0.8, 1.0) is the last 20 %."""
    epochs: int = 1
    """Passes over the part. The checks start afresh at each."""
    chunk_rows: int = 4096
    """Rows of a chunk."""
    max_backwards_s: float = 3600.0
    """A row whose event time is further behind the newest so far is set aside."""


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"KuaiRand folder {name!r} is not there ({folder.absolute()})")
    inner = folder / "data"
    return inner if inner.is_dir() and not any(folder.glob("log_*")) and any(inner.glob("*_*")) else folder


def _log_paths(config: KuaiRandConfig) -> list[Path]:
    folder = _folder(config.folder)
    if config.logs:
        return [folder / name for name in config.logs]
    found = sorted(path for path in folder.glob("log_standard*") if path.name.endswith(FORMATS))
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
        raise ValueError(f"{folder}: no log_standard*.csv, .csv.gz or .parquet; the folder has: {there}")
    stems = [path.name.partition(".")[0] for path in found]
    if len(set(stems)) < len(stems) or len({path.suffix == ".parquet" for path in found}) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: the same log may be there in two formats ({names}); name the ones to read in logs")
    return found


def _open_logs(config: KuaiRandConfig) -> tuple[TableFile, ...]:
    files = tuple(open_table(path, name=path.name) for path in _log_paths(config))
    for file in files:
        require_columns(file, [*_NUMBERS, *_TIMES, *_ACTIONS])
    return files


def _load_users(folder: Path) -> SideTable:
    file = open_table(find_one(folder, "user_features"))
    require_columns(file, ["user_id"])
    table = load_side_table(file, "user_id", dict.fromkeys(file.columns))
    columns = {}
    for name, column in zip(table.columns.schema.names, table.columns.columns, strict=True):
        columns[name if name.startswith("user_") else f"user_{name}"] = _whole(column)
    return SideTable(table.ids, pa.RecordBatch.from_pydict(columns))


def _whole(column: pa.Array) -> pa.Array:
    """Returns codes that were written as floats (because some are missing) as int64, and all other columns as they are."""
    try:
        return column.cast(pa.int64()) if column.type == pa.float64() else column
    except pa.ArrowInvalid:
        return column


def _load_videos(folder: Path) -> SideTable:
    file = open_table(find_one(folder, "video_features_basic"))
    require_columns(file, ["video_id", *_VIDEO_COLUMNS])
    kinds: dict[str, pa.DataType | None] = dict.fromkeys(_VIDEO_COLUMNS, pa.string())
    kinds |= {"author_id": pa.int64(), "music_id": pa.int64()}
    changes = {"tag": split_ids, "upload_dt": days_of}
    table = load_side_table(file, "video_id", {"video_id": pa.int64(), **kinds}, changes)
    names = {"music_id": "sound_id", "tag": "tag_id", "upload_dt": "upload_day"}
    return SideTable(table.ids, table.columns.rename_columns([names.get(name, name) for name in table.columns.schema.names]))


@dataclass(frozen=True, slots=True)
class KuaiRandSource:
    """A `Source` over a KuaiRand folder."""

    config: KuaiRandConfig
    """What to read."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        config = self.config
        check_reading(config.part, config.epochs, config.chunk_rows, config.max_backwards_s)

    def _reading(self) -> Reading:
        config, files = self.config, _open_logs(self.config)
        wanted = (*_NUMBERS, *_TIMES, *_ACTIONS, *_LOGGED)
        folder = files[0].path.parent
        logs = f"'{folder}/log_standard*'" if not config.logs else " ".join(str(file.path) for file in files)
        then = f"KuaiRandConfig.folder = {str(folder / 'sorted')!r}, features_folder = {str(folder)!r}"
        return Reading(
            files=files,
            columns=tuple(tuple(name for name in wanted if name in file.columns) for file in files),
            part=config.part,
            epochs=config.epochs,
            chunk_rows=config.chunk_rows,
            how_to_sort=how_to_sort(logs, folder / "sorted", "time_ms", then),
        )

    @property
    def num_examples(self) -> int | None:
        """Rows of all passes, those that will be set aside counted; None where that takes a pass over the logs."""
        return num_part_rows(self._reading())

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from `position` on.

        Raises:
            ValueError: A file or column is missing, a file is empty or damaged, or the log is not in time order.
        """
        reading = self._reading()
        side: list[tuple[str, SideTable]] = []
        if self.config.features:
            folder = _folder(self.config.features_folder or self.config.folder)
            side = [("user_id", _load_users(folder)), ("video_id", _load_videos(folder))]
        logged = tuple(name for name in _LOGGED if any(name in file.columns for file in reading.files))
        max_backwards_ms = int(1000 * self.config.max_backwards_s)

        def examples(raw: RawRows, trail: validate.Trail) -> tuple[pa.RecordBatch, tuple[Rejected, ...], validate.Trail]:
            batch, faults = _checked(raw, logged)
            good = validate.good_rows(faults, batch.num_rows)
            times = pc.fill_null(batch.column("event_time_ms"), 0).to_numpy(zero_copy_only=False)
            late, trail = validate.in_order(
                times, batch.column("user_id"), batch.column("video_id"), good, trail, max_backwards_ms
            )
            batch, rejected = validate.split(batch, [*faults, *late], raw.where, raw.raw)
            return _with_features(batch, side), rejected, trail

        yield from read_files(reading, position, examples)


def _checked(raw: RawRows, logged: tuple[str, ...]) -> tuple[pa.RecordBatch, list[validate.Fault]]:
    """Returns the log's columns under our names, typed, and the faults of single rows."""
    columns: dict[str, pa.Array] = {}
    faults: list[validate.Fault] = []
    kinds = dict.fromkeys(_NUMBERS | _TIMES, pa.int64()) | dict.fromkeys(_ACTIONS, pa.bool_())
    for name, kind in (kinds | dict.fromkeys(logged, pa.int64())).items():
        ours = (_NUMBERS | _TIMES | _ACTIONS).get(name, name)
        if name not in raw.batch.schema.names:
            columns[ours] = pa.nulls(raw.batch.num_rows, kind)
            continue
        columns[ours], found = validate.convert(raw.batch.column(name), name, kind, raw.file_name)
        faults += found
    faults += [validate.required(columns[ours], name) for name, ours in _NUMBERS.items()]
    faults.append(validate.not_negative(columns["duration_ms"], "negative duration"))
    faults.append(validate.not_negative(columns["play_time_ms"], "negative play time"))
    faults.append(validate.in_time_range(columns["event_time_ms"]))
    unknown = pc.equal(columns["duration_ms"], 0)
    columns["duration_ms"] = pc.if_else(unknown, pa.scalar(None, pa.int64()), columns["duration_ms"])
    return pa.RecordBatch.from_pydict(columns), faults


def _with_features(batch: pa.RecordBatch, side: list[tuple[str, SideTable]]) -> pa.RecordBatch:
    """Joins features to good rows, and derives those that depend on the event time."""
    beijing_ms = batch.column("event_time_ms").to_numpy(zero_copy_only=False) + _BEIJING_MS
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns["hour_of_day"] = pa.array(beijing_ms // 3_600_000 % 24)
    for key, table in side:
        columns |= join(table, columns[key])
    if "upload_day" in columns:
        age = pc.subtract(pa.array(beijing_ms / _DAY_MS), columns.pop("upload_day").cast(pa.float64()))
        columns["video_age_days"] = pc.max_element_wise(age, pa.scalar(0.0), skip_nulls=False)
    return pa.RecordBatch.from_pydict(columns)
