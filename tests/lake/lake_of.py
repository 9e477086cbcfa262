"""A small lake for tests: a log, a warehouse beside it, and the jobs that bring one into the other."""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from monolith_jax.lake.changelog import Changelog, Moment, read_at
from monolith_jax.lake.counters import WindowCountsConfig
from monolith_jax.lake.examples import Examples
from monolith_jax.lake.ingest import Ingest
from monolith_jax.lake.warehouse import WarehouseConfig, make_tables, open_table
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.joiner import JoinerConfig
from monolith_jax.stream.log_source import LogConfig
from tests.stream.event_log import Feed

JOINER = JoinerConfig(window_s=3.0)
FEW_BYTES = 40_000
"""Of an epoch: a small world makes several."""


@dataclasses.dataclass(frozen=True)
class Lake:
    """A folder with a log and a warehouse."""

    folder: Path

    @property
    def warehouse(self) -> WarehouseConfig:
        return WarehouseConfig(path=str(self.folder / "warehouse"))

    def log(self, **fields: Any) -> LogConfig:
        fields = {"joiner": JOINER, "ends": True, "max_wait_s": 0.05, "idle_s": 0.3, "poll_bytes": 8000, **fields}
        return LogConfig(url=f"file://{self.folder}/log", **fields)

    def feed(self, **fields: Any) -> Feed:
        return Feed(f"file://{self.folder}/log", **fields)

    def open_ingest(self) -> Ingest:
        letters = DeadLetters(self.folder / "dead_letters.jsonl")
        return Ingest(self.log(), self.warehouse, letters, WindowCountsConfig(max_videos=5000), 1.0)

    def ingest(self, most_bytes: int = FEW_BYTES) -> int:
        """Brings all of the log in; returns how many epochs there are."""
        with closing(self.open_ingest()) as ingest:
            while ingest.step(0.2, most_bytes):
                pass
            return ingest.epoch + 1

    def examples(self, parts: int = 1, most_rows: int = 200) -> int:
        """Joins all of the log in; returns how many examples came."""
        letters = DeadLetters(self.folder / "dead_letters.examples.jsonl")
        number = 0
        with closing(Examples(self.log(), self.warehouse, self.folder / "joined", letters, parts)) as examples:
            while not examples.ended:
                number += examples.step(0.5, most_rows)
        return number

    def rows(self, name: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Returns what a table holds now."""
        return self.table(name, columns).to_pylist()

    def table(self, name: str, columns: Sequence[str] = ()) -> pa.Table:
        table = open_table(self.warehouse, name)
        newest = table.snapshot_manager().get_latest_snapshot()
        return read_at(table, Moment(newest.id if newest else 0), columns)

    def changelog(self, name: str, snapshot: int | None = None) -> Changelog:
        return Changelog(self.warehouse, name, snapshot)


def make_lake(folder: Path) -> Lake:
    """Returns a lake whose tables are there and empty."""
    lake = Lake(folder)
    make_tables(lake.warehouse)
    return lake


def sorted_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns rows in an order that depends on nothing but what they hold."""
    return sorted(repr(sorted(row.items())) for row in rows)
