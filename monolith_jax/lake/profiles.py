"""From PostgreSQL to the lake: what users and videos say of themselves.

In: changes of profiles (`postgres`), from where the lake ends. Out: epochs; each appends the changes to the logs of features
and brings the group `profile` of `user_features` and `video_features` up to date. The database keeps what no epoch holds yet.
What a crash left undone of an epoch is made again from the same transactions.
"""

from __future__ import annotations

import dataclasses
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
IDLE_BYTES = 2**24
"""When other tables have written so much, an epoch without rows tells how far the lake is, so that it need not be kept."""


class Profiles:
    """Brings changes of profiles into a lake, epoch by epoch. For one thread."""

    def __init__(self, config: PostgresConfig, warehouse: WarehouseConfig) -> None:
        """Opens the tables, and makes up for what a crash left undone.

        Raises:
            ValueError: There is no such table here or in the database, or the database does not keep what is missing.
        """
        self._config = config
        with ExitStack() as opened:
            names = [f"{one}_features{suffix}" for suffix in ("_log", "") for one in GROUPS]
            self._writers = {name: opened.enter_context(closing(TableWriter(warehouse, name, WRITER))) for name in names}
            self._first = next(iter(self._writers.values()))
            last = self._first.last
            self.epoch, self.position = last.epoch, last.told.get("end", START)
            self._told = self.position
            if any(one.last.epoch < last.epoch for one in self._writers.values()):
                self._make_again(last.told["begin"], last.told["end"])
            self._reader = opened.enter_context(closing(ProfileReader(config, self.position)))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Lets go of database and tables."""
        self._opened.close()

    @property
    def set_aside(self) -> dict[str, int]:
        """Rows without a key, by reason."""
        return {"rows without a key": self._reader.num_set_aside} if self._reader.num_set_aside else {}

    def _make_again(self, begin: int, end: int) -> None:
        """Makes the last epoch again where a table lacks it."""
        if begin == START:
            # The rows that were there at the start cannot be read as they were: they are read anew. Those of the tables that
            # had them then stand twice in a log, which changes nothing that is looked up there.
            self.position = START
            return
        found: list[ProfileChanges] = []
        # A transaction at a time, so as to stop exactly where the epoch ended.
        with closing(ProfileReader(dataclasses.replace(self._config, max_rows=1), begin)) as reader:
            while begin < end and (changes := reader.poll(1.0)).position <= end:
                found.append(changes)
                begin = changes.position
        self._write(found, self.epoch, {})

    def step(self, commit_s: float) -> int:
        """Makes an epoch of the changes that come within so many seconds; returns how many there are.

        Raises:
            ValueError: A table has no such column, or was truncated; or what is missing is not kept any more.
        """
        begin, found, until = self.position, [], time.monotonic() + commit_s
        while (now := time.monotonic()) < until or (found and found[-1].position == START):
            changes = self._reader.poll(max(min(WAIT_S, until - now), 0.0))
            if changes.num_rows or changes.position != self.position:
                found.append(changes)
                self.position = max(self.position, changes.position)
            elif found and found[-1].position != START:
                break  # Nothing more for now: a change is seen the sooner.
        number = sum(one.num_rows for one in found)
        # No position is confirmed that the lake does not tell: after a restart changes before it would be asked for.
        if not number and self.position - self._told < IDLE_BYTES:
            return 0
        self.epoch += 1
        self._write(found, self.epoch, {"begin": begin, "end": self.position})
        self._told = self.position
        self._reader.confirm(self.position)
        return number

    def _write(self, found: list[ProfileChanges], epoch: int, told: dict[str, int]) -> None:
        rows: dict[Subject, pa.Table] = {}
        for subject in GROUPS:
            batches = [one.rows[subject] for one in found if subject in one.rows]
            if batches:
                rows[subject] = pa.Table.from_batches(batches)
        for name, writer in self._writers.items():
            subject: Subject = "user" if name.startswith("user") else "video"
            if subject in rows and writer.last.epoch < epoch:
                writer.write(
                    _log_of(rows[subject]) if name.endswith("_log") else newest_of(rows[subject], key_of(subject), "profile_ms")
                )
            writer.commit(epoch, told if writer is self._first else {})


def _log_of(profiles: pa.Table) -> pa.Table:
    times = profiles.column("profile_ms").combine_chunks()
    return profiles.append_column("event_time_ms", times).append_column(DAY, day_of(times))
