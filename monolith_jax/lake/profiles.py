"""From PostgreSQL to the lake: what users and videos say of themselves.

In: changes of profiles (`postgres`), from where the lake ends. Out: epochs; each appends the changes to the logs of features
and brings the group `profile` of `user_features` and `video_features` up to date. The database keeps what no epoch holds yet.
What a crash left undone of an epoch is made again from the same transactions. The rows that are there at the start are one
epoch, which is not held in memory: they are written as they come.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from contextlib import ExitStack, closing

import pyarrow as pa

from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.ingest import newest_of
from monolith_jax.lake.postgres import START, PostgresConfig, ProfileChanges, ProfileReader
from monolith_jax.lake.tables import DAY, GROUPS, Subject, key_of
from monolith_jax.lake.times import day_of
from monolith_jax.lake.warehouse import WarehouseConfig

WRITER = "profiles"
WAIT_S = 0.02
FLUSH_ROWS = 1 << 19
"""Of an epoch: at the start it is all rows, and files are made of so many."""
IDLE_BYTES = 2**24
"""When other tables have written so much, an epoch without rows tells how far the lake is, so that it need not be kept."""


class Profiles:
    """Brings changes of profiles into a lake, epoch by epoch. For one thread."""

    def __init__(self, config: PostgresConfig, warehouse: WarehouseConfig) -> None:
        """Opens the tables.

        Raises:
            ValueError: There is no such table here, or the config names none there.
        """
        self._config = config
        with ExitStack() as opened:
            names = [f"{one}_features{suffix}" for suffix in ("_log", "") for one in GROUPS]
            self._writers = {name: opened.enter_context(closing(TableWriter(warehouse, name, WRITER))) for name in names}
            self._first = next(iter(self._writers.values()))
            last = self._first.last
            self.epoch, self.position = last.epoch, last.told.get("end", START)
            self._told, self._begin, self._end = self.position, self.position, START
            self._number, self._is_whole = 0, True
            if any(one.last.epoch < last.epoch for one in self._writers.values()):
                self._begin, self._end = last.told["begin"], last.told["end"]
                self.position = self._begin
            # A transaction at a time where an epoch is made again, so as to stop exactly where it ended.
            self._reader = self._new_reader(self.position, **({"max_rows": 1} if self._end else {}))
            opened.callback(lambda: self._reader.close())
            if self._end and self._begin == START:
                self._start_over()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Lets go of database and tables; what no epoch holds is dropped."""
        self._opened.close()

    @property
    def set_aside(self) -> dict[str, int]:
        """Rows without a key, and others that are not as they should be, by reason."""
        found = {
            "rows without a key": self._reader.num_set_aside,
            "old changes with long values of now": self._reader.num_looked_up,
        }
        return {reason: number for reason, number in found.items() if number}

    def end_now(self, timeout_s: float, stop: threading.Event) -> int:
        """Returns the `position` at which all is here that the database holds now.

        Raises:
            OSError: In so many seconds it was not there.
            ValueError: It does not let us in.
        """
        return self._reader.end_now(timeout_s, stop)

    def step(self, commit_s: float) -> int:
        """Takes in the changes that come within so many seconds, and makes an epoch of them; returns how many there are.

        While the rows of the start come there is no epoch: they are written, and the step that has the last of them makes it.
        It takes hardly longer than it may, also while the database is away or lets us wait.

        Raises:
            ValueError: A table has no such column, or was truncated; or what is missing is not kept any more.
        """
        until, before = time.monotonic() + commit_s, self._number
        if self._end:
            return self._make_again(until)
        moved = False
        while (now := time.monotonic()) < until:
            changes = self._reader.poll(max(min(WAIT_S, until - now), 0.0))
            self._write(changes, self.epoch + 1)
            self._is_whole = changes.position != START
            if not self._is_whole:
                self._begin = START
            elif changes.num_rows or changes.position != self.position:
                self.position, moved = changes.position, True
            elif moved:
                break  # Nothing more for now: a change is seen the sooner.
        number = self._number - before
        if self._is_whole and self._is_due():
            self.epoch += 1
            self._commit(self.epoch, {"begin": self._begin, "end": self.position})
            self._told = self._begin = self.position
            self._reader.confirm(self.position)
        return number

    def _is_due(self) -> bool:
        """Returns whether there is an epoch to be made.

        No position is confirmed that the lake does not tell: after a restart changes before it would be asked for. The driver
        does confirm some by itself, which is told the sooner.
        """
        if self._number or self._begin == START:
            return True
        return self.position - self._told >= (1 if self._reader.answered > self._told else IDLE_BYTES)

    def _make_again(self, until: float) -> int:
        """Makes the last epoch again where a table lacks it; returns how many changes came of it."""
        before = self._number
        while self._begin < self._end:
            if (now := time.monotonic()) >= until:
                return self._number - before
            changes = self._reader.poll(min(WAIT_S, until - now))
            if changes.position == START:  # The slot no longer begins there.
                self._start_over()
                return self._number - before
            if changes.position > self._end:
                break
            self._write(changes, self.epoch)
            self._begin = changes.position
        number = self._number - before
        self._commit(self.epoch, {})
        self._go_on_at(self._end)
        return number

    def _start_over(self) -> None:
        """Has all rows read anew.

        Those that were there at the start cannot be read as they were. Rows of the tables that have the last epoch then stand
        twice in a log, which changes nothing that is looked up there.
        """
        if self.epoch > 0:  # The lake may have later rows than those that hold since ever.
            self._config = dataclasses.replace(self._config, snapshot_ms=-1)
        self._go_on_at(START)

    def _go_on_at(self, position: int) -> None:
        self._reader.close()
        self._reader, self._begin, self._end = self._new_reader(position), position, START
        self.position = position

    def _new_reader(self, position: int, **fields: int) -> ProfileReader:
        return ProfileReader(dataclasses.replace(self._config, **fields), position)

    def _write(self, changes: ProfileChanges, epoch: int) -> None:
        """Writes changes to those tables that lack an epoch."""
        for name, writer in self._writers.items():
            subject: Subject = "user" if name.startswith("user") else "video"
            if subject in changes.rows and writer.last.epoch < epoch:
                rows = pa.Table.from_batches([changes.rows[subject]])
                writer.write(_log_of(rows) if name.endswith("_log") else newest_of(rows, key_of(subject), "profile_ms"))
        if (self._number + changes.num_rows) // FLUSH_ROWS > self._number // FLUSH_ROWS:
            for writer in self._writers.values():
                writer.flush(epoch)
        self._number += changes.num_rows

    def _commit(self, epoch: int, told: dict[str, int]) -> None:
        for writer in self._writers.values():
            writer.commit(epoch, told if writer is self._first else {})
        self._number = 0


def _log_of(profiles: pa.Table) -> pa.Table:
    times = profiles.column("profile_ms").combine_chunks()
    return profiles.append_column("event_time_ms", times).append_column(DAY, day_of(times))
