"""How often videos were watched lately: the windows of `counters`, fed by the epochs of the ingest, and kept across restarts.

In: the events of each epoch. Out: rows of `video_features_log` for the windows that end with it. The counts are saved beside
the table `events` now and then; after a restart the epochs since are counted again, each by itself, as they were.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from monolith_jax.lake.counters import WindowCounts, WindowCountsConfig
from monolith_jax.lake.tables import DAY, features_log_schema
from monolith_jax.lake.times import day_of

SAVE_EVERY_S = 60.0
_BESIDE = "beside"
_KEPT = 2


class Counted(NamedTuple):
    """What is counted in an epoch."""

    impressions: pa.RecordBatch
    actions: pa.RecordBatch
    watermark_ms: int
    """No more than late events are earlier; 0: nobody knows."""


class VideoCounts:
    """The counts of one ingest."""

    def __init__(self, table: Any, config: WindowCountsConfig) -> None:
        """Begins with nothing.

        Args:
            table: `events`, beside which the counts are saved.
            config: How much is kept.
        """
        self._table, self._counts = table, WindowCounts(config)
        self._saved_s, self._saved_epoch = -SAVE_EVERY_S, -1

    def add(self, epoch: Counted) -> pa.Table:
        """Counts an epoch; returns what windows that have ended by its watermark tell, as rows of the log of features."""
        self._counts.add_impressions(epoch.impressions)
        self._counts.add_actions(epoch.actions)
        return _rows(self._counts.advance(epoch.watermark_ms)) if epoch.watermark_ms > 0 else _rows({})

    def metrics(self) -> dict[str, int]:
        """Returns what was counted beside the videos: late, unmatched and refused events."""
        counts = self._counts
        late = {f"late_{name}": number for name, number in counts.num_late.items()}
        return late | {"unmatched_plays": counts.num_unmatched, "refused": counts.num_refused}

    def save(self, epoch: int, beside: Mapping[str, Any], at_once: bool = False) -> None:
        """Saves the counts as they are behind an epoch that all tables have.

        Args:
            epoch: The epoch.
            beside: What else the next start needs, JSON-able.
            at_once: Whether it is to be saved although it was not long ago; of the same epoch nothing is saved twice.
        """
        if epoch == self._saved_epoch or (not at_once and time.monotonic() - self._saved_s < SAVE_EVERY_S):
            return
        data = io.BytesIO()
        arrays: dict[str, Any] = {_BESIDE: np.frombuffer(json.dumps(beside).encode(), np.uint8)}
        arrays |= self._counts.get_state()
        np.savez(data, **arrays)
        held = data.getvalue()
        files = self._table.file_io
        files.check_or_mkdirs(self._folder)
        path = f"{self._folder}/counts-{epoch:012d}"
        if files.exists(path):
            files.delete(path)
        with files.new_output_stream(path) as stream:
            stream.write(xxhash.xxh3_64_digest(held) + held)
        self._saved_s, self._saved_epoch = time.monotonic(), epoch
        for old in saved_epochs(self._table)[:-_KEPT]:
            files.delete_quietly(f"{self._folder}/counts-{old:012d}")

    def restore(self, epoch: int, since: Callable[[int], Iterator[Counted]]) -> None:
        """Takes up where the counts were before an epoch.

        Args:
            epoch: What it brings is to be counted next.
            since: Yields the epochs behind one, up to `epoch`, that excluded.
        """
        saved = [number for number in saved_epochs(self._table) if number < epoch]
        begin = next((number for number in reversed(saved) if self.load(number) is not None), -1)
        for one in since(begin):
            self.add(one)

    def load(self, epoch: int) -> dict[str, Any] | None:
        """Takes over the counts that were saved behind an epoch; returns what was saved beside them, None where there are none.

        Raises:
            ValueError: They are of another `WindowCountsConfig`.
        """
        if epoch not in saved_epochs(self._table) or (data := self._read(epoch)) is None:
            return None
        arrays = dict(np.load(io.BytesIO(data)))
        beside = json.loads(arrays.pop(_BESIDE).tobytes())
        try:
            self._counts.set_state(arrays)
        except ValueError as error:
            raise ValueError(
                f"{error} To count with other settings from now on, stop the ingest, remove {self._folder}/counts-*, and "
                "start it again: counts are too low until the longest window is over"
            ) from None
        self._saved_epoch = epoch
        return beside

    @property
    def _folder(self) -> str:
        return _folder_of(self._table)

    def _read(self, epoch: int) -> bytes | None:
        """Returns what was saved behind an epoch; None where it is not whole."""
        with self._table.file_io.new_input_stream(f"{self._folder}/counts-{epoch:012d}") as stream:
            data = stream.read()
        return data[8:] if xxhash.xxh3_64_digest(data[8:]) == data[:8] else None


def _folder_of(table: Any) -> str:
    return f"{str(table.table_path).rstrip('/')}/state"


def saved_epochs(table: Any) -> list[int]:
    """Returns the epochs of `events` behind which counts were saved, in order."""
    there = table.file_io.list_status(_folder_of(table)) if table.file_io.exists(_folder_of(table)) else []
    names = [one.path.rsplit("/", 1)[-1] for one in there]
    return sorted(int(name.removeprefix("counts-")) for name in names if name.startswith("counts-"))


def _rows(windows: Mapping[str, pa.RecordBatch]) -> pa.Table:
    """Returns rows of the log of features, of one group each."""
    schema, tables = features_log_schema("video"), []
    for name, batch in windows.items():
        times = batch.column(f"{name}_ms")
        columns = dict(zip(batch.schema.names, batch.columns, strict=True)) | {"event_time_ms": times, DAY: day_of(times)}
        arrays = [columns.get(field.name, None) for field in schema]
        filled = [
            pa.nulls(batch.num_rows, field.type) if one is None else one for one, field in zip(arrays, schema, strict=True)
        ]
        tables.append(pa.Table.from_arrays(filled, schema=schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()
