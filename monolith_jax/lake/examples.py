"""From the log to the table `examples`: impressions joined with what followed, in the order of the stream.

In: the log, read as a run reads it (`stream.live`), and where the lake ends. Out: epochs, each with the position in the stream
behind its examples and the cuts that lead there; so training reads the table, and goes on from the log where it ends
(`history`). What a crash leaves behind is not committed, and is read again.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from monolith_jax.lake.commits import TableWriter, resume_letters
from monolith_jax.lake.cut_files import hand_over, save
from monolith_jax.lake.warehouse import EXAMPLES_FIRST, WarehouseConfig, add_columns, alone, storable
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.live import LiveReading
from monolith_jax.stream.log_source import LogConfig
from monolith_jax.stream.run_schema import concatenated
from monolith_jax.types import Chunk

WRITER = "examples"
IDLE_S = 30.0
BATCH_ROWS = 1 << 20
"""The stream ends no batch early for want of examples: nobody waits for one."""


@dataclass
class _Part:
    """One partition of the stream."""

    number: int
    reading: LiveReading
    rows: int
    """Examples so far."""
    saved: int
    """Cuts before this one are in files."""
    epochs: deque[tuple[int, int, str]]
    """Epochs that have files of cuts which are still needed, where each ends, and what the file is called."""
    chunks: Iterator[Chunk] = field(init=False)
    ended: bool = False

    def __post_init__(self) -> None:
        """Begins to read."""
        self.chunks = self.reading.chunks()

    def told(self, epoch: int) -> dict[str, Any]:
        """Returns what is needed to go on behind an epoch, JSON-able."""
        position = dict(self.reading.position)
        while self.epochs and self.epochs[0][1] <= position["rewind"]:
            self.epochs.popleft()
        return {"position": position, "rows": self.rows, "epoch": epoch, "epochs": list(self.epochs)}


class Examples:
    """Joins a log into a lake, epoch by epoch. For one thread."""

    def __init__(
        self, log: LogConfig, warehouse: WarehouseConfig, folder: Path, dead_letters: DeadLetters, parts: int = 1
    ) -> None:
        """Opens log and table, and goes on where the lake ends.

        Args:
            log: The log, and how it is joined.
            warehouse: The lake.
            folder: For the cut logs, made anew each time, and what the joiner spills.
            dead_letters: Where messages go that are none.
            parts: Partitions of the stream, as `TrainConfig.partitions` of who will read on from the log.

        Raises:
            ValueError: There is no such log, topic or table; or the lake's examples are of another number of parts.
        """
        self._warehouse, self._dead_letters = warehouse, dead_letters
        self.not_kept: set[str] = set()
        """Columns of impressions that the table cannot take."""
        self._committed_s = time.monotonic()
        with ExitStack() as opened:
            opened.enter_context(alone(warehouse, WRITER))
            self._writer = opened.enter_context(closing(TableWriter(warehouse, "examples", WRITER)))
            last = self._writer.last
            self.epoch, states = last.epoch, last.told.get("parts", {})
            if states and len(states) != parts:
                raise ValueError(
                    f"the examples in {warehouse.path} are of {len(states)} partitions of the stream, asked for {parts}: their "
                    "number stays for the table's life"
                )
            if states:
                resume_letters(dead_letters, last.told["dead_letters"])
            self._parts = [
                _open(log, self._writer.table, folder, number, parts, states.get(str(number))) for number in range(parts)
            ]
            for part in self._parts:
                opened.callback(part.reading.close)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Lets go of log and table; what no epoch holds is read again next time."""
        self._opened.close()

    @property
    def ended(self) -> bool:
        """Whether the log ends (`LogConfig.ends`), and all of it was read."""
        return all(part.ended for part in self._parts)

    def step(self, commit_s: float, most_rows: int) -> int:
        """Makes an epoch of what is due within so many seconds, at most about so many examples; returns how many there are.

        Raises:
            ValueError: The log refuses.
        """
        until, rows = time.monotonic() + commit_s, 0
        found: dict[int, list[pa.RecordBatch]] = {part.number: [] for part in self._parts}
        while rows < most_rows and time.monotonic() < until and not self.ended:
            for part in self._parts:
                chunk = None if part.ended else next(part.chunks, None)
                part.ended = chunk is None
                if chunk is not None:
                    self._dead_letters.add(chunk.rejected)
                    rows += chunk.examples.num_rows
                    if chunk.examples.num_rows:
                        found[part.number].append(chunk.examples)
        return self._commit(found)

    def _commit(self, found: Mapping[int, list[pa.RecordBatch]]) -> int:
        epoch, tables = self.epoch + 1, []
        if not any(found.values()) and not self.ended and time.monotonic() - self._committed_s < IDLE_S:
            return 0  # Where nothing comes, where the stream is need not be told each time.
        for part in self._parts:
            position = part.reading.position
            cuts = list(part.reading.cuts.read(part.saved, position["cut"]))
            if cuts:
                token = save(self._writer.table, part.number, epoch, part.saved, cuts)
                part.saved = position["cut"]
                part.epochs.append((epoch, part.saved, token))
            if found[part.number]:
                rows, refused = storable(_rows_of(part, concatenated(found[part.number])), self._writer.schema)
                self.not_kept |= {*refused}
                tables.append(rows)
        if not tables and not any(part.epochs and part.epochs[-1][0] == epoch for part in self._parts):
            return 0
        self._add_columns(tables)
        for table in tables:
            self._writer.write(table)
        told = {
            "parts": {str(part.number): part.told(epoch) for part in self._parts},
            "dead_letters": self._dead_letters.get_state(),
        }
        self._writer.commit(epoch, told)
        self.epoch, self._committed_s = epoch, time.monotonic()
        return sum(table.num_rows for table in tables)

    def _add_columns(self, tables: Sequence[pa.Table]) -> None:
        """Gives `examples` the columns of features that impressions were logged with."""
        known = {*self._writer.schema.names}
        missing = {field.name: field for table in tables for field in table.schema if field.name not in known}
        if missing:
            add_columns(self._warehouse, "examples", list(missing.values()))
            self._writer.reopen()


def _open(log: LogConfig, table: Any, folder: Path, number: int, parts: int, told: Mapping[str, Any] | None) -> _Part:
    """Goes on with a partition of the stream where the lake ends."""
    where = folder / str(number)
    if told:
        position = hand_over(table, number, told, where)
    else:
        position = {}
        shutil.rmtree(where, ignore_errors=True)
    reading = LiveReading(log, where, BATCH_ROWS, number, parts, float("inf"), position)
    epochs = deque(map(tuple, told["epochs"])) if told else deque()
    return _Part(number, reading, told["rows"] if told else 0, position.get("cut", 0), epochs)


def _rows_of(part: _Part, examples: pa.RecordBatch) -> pa.Table:
    """Returns rows of the table; the part has them then."""
    number = examples.num_rows
    watermark_ms = max(part.reading.watermark_ms, 0)
    day = datetime.fromtimestamp(watermark_ms / 1000, UTC).strftime("%Y-%m-%d")
    first = [
        pa.DictionaryArray.from_arrays(np.zeros(number, np.int32), [day]).cast(pa.string()),
        pa.array(np.full(number, part.number, np.int32)),
        pa.array(np.arange(part.rows, part.rows + number)),
    ]
    part.rows += number
    names = [one.name for one in EXAMPLES_FIRST]
    kept = [name for name in examples.schema.names if name not in names]
    return pa.Table.from_arrays([*first, *(examples.column(name) for name in kept)], names=[*names, *kept])
