"""Everything that the Flink jobs need, running on this machine: Kafka, PostgreSQL, a Flink cluster, a warehouse."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2  # pyright: ignore[reportMissingModuleSource]
import pyarrow as pa

from launch.bench.kafka_broker import Broker
from launch.bench.postgres_server import PostgresServer
from launch.flink.local import Cluster, rendered
from monolith_jax.lake.warehouse import WarehouseConfig, open_table
from monolith_jax.stream import formats
from monolith_jax.stream.events import ACTION, IMPRESSION
from monolith_jax.stream.log import LogPartition, open_producer

PARTITIONS = 2
JOBS = ("events", "user_features", "video_features")
PROFILES = """
CREATE TABLE user_profiles (user_id bigint PRIMARY KEY, country text, language text, age bigint);
CREATE TABLE video_profiles (
  video_id bigint PRIMARY KEY, author_id bigint, sound_id bigint, tag_id bigint[], duration_ms bigint, quality double precision
);
ALTER TABLE user_profiles REPLICA IDENTITY FULL;
ALTER TABLE video_profiles REPLICA IDENTITY FULL;
CREATE PUBLICATION flink_user_profiles FOR TABLE user_profiles;
CREATE PUBLICATION flink_video_profiles FOR TABLE video_profiles;
"""


def until(ready: Callable[[], Any], within_s: float = 60.0) -> Any:
    """Returns what `ready` returns once that is true; fails when it is not so long."""
    end = time.monotonic() + within_s
    while not (found := ready()):
        assert time.monotonic() < end, f"not in {within_s} s"
        time.sleep(0.05)
    return found


class FlinkLake:
    """The servers, and a warehouse that jobs of `launch/flink` write."""

    def __init__(self, folder: Path) -> None:
        """Starts what there is but for the jobs."""
        self.warehouse = WarehouseConfig(path=str(folder / "warehouse"))
        self.jobs: dict[str, str] = {}
        self.impressions: list[Mapping[str, Any]] = []
        self.actions: list[Mapping[str, Any]] = []
        self._checkpoints: dict[str, str] = {}
        self.broker, self.postgres = Broker(folder / "kafka"), PostgresServer(folder / "postgres")
        self.cluster = Cluster(folder / "flink")
        self.broker.start()
        self.postgres.start()
        self.cluster.start()
        self.write_postgres(PROFILES)
        with closing(open_producer(self.broker.url)) as producer:
            for topic in ("impressions", "actions"):
                producer.create(topic, PARTITIONS)

    def stop(self) -> None:
        """Ends everything."""
        self.cluster.stop()
        self.postgres.stop()
        self.broker.stop()

    @property
    def variables(self) -> dict[str, str]:
        """What the files of SQL leave open."""
        return {
            "KAFKA": f"127.0.0.1:{self.broker.port}",
            "WAREHOUSE": self.warehouse.path,
            "OUT_OF_ORDER_S": "1",
            "IDLE_S": "0",
            "POSTGRES_HOST": "127.0.0.1",
            "POSTGRES_PORT": str(self.postgres.port),
            "POSTGRES_USER": "postgres",
            "POSTGRES_PASSWORD": "any",
            "POSTGRES_DATABASE": "postgres",
            "SNAPSHOT_MS": str(int(time.time() * 1000)),
        }

    def submit(self, jobs: Sequence[str] = JOBS) -> None:
        """Begins jobs."""
        files = ["tables.sql", "sources.sql", *(f"{job}.sql" for job in jobs)]
        self.jobs |= dict(zip(jobs, self.cluster.sql(rendered(files, self.variables)), strict=True))

    def resume(self) -> None:
        """Begins the jobs where their last checkpoints are: after the JobManager was killed, which knows of none."""
        variables = self.variables
        texts = [rendered(["tables.sql", "sources.sql"], variables)]
        for job, number in self.jobs.items():
            # One that was killed before its first checkpoint begins again where it began.
            with contextlib.suppress(FileNotFoundError):
                self._checkpoints[job] = self.cluster.last_checkpoint(number)
            texts += [f"SET 'execution.state-recovery.path' = '{self._checkpoints[job]}';"]
            texts += [rendered([f"{job}.sql"], variables)]
        self.jobs = dict(zip(self.jobs, self.cluster.sql("\n".join(texts)), strict=True))

    def settled(self) -> None:
        """Returns when all that the jobs have read is in the lake: a checkpoint is committed before the next one ends."""
        for job in self.jobs.values():
            for _ in range(2):
                self.cluster.checkpointed(job)

    def write_postgres(self, text: str, rows: Iterable[Sequence[Any]] = ((),)) -> None:
        """Runs a statement for each row, in one transaction."""
        with closing(psycopg2.connect(self.postgres.dsn)) as connection:
            with connection, connection.cursor() as cursor:
                for row in rows:
                    cursor.execute(text, row)

    def produce(self, impressions: Sequence[Mapping[str, Any]], actions: Sequence[Mapping[str, Any]]) -> None:
        """Writes events to the log, by their users, in their order; they are kept in `impressions` and `actions`."""
        with closing(open_producer(self.broker.url)) as producer:
            for topic, rows, schema in (("impressions", impressions, IMPRESSION), ("actions", actions, ACTION)):
                payloads = formats.encode(pa.RecordBatch.from_pylist([*rows], schema), "json")
                for row, payload in zip(rows, payloads, strict=True):
                    producer.append(LogPartition(topic, row["user_id"] % PARTITIONS), payload)
            producer.flush()
        self.impressions += impressions
        self.actions += actions

    def read(self, name: str) -> list[dict[str, Any]]:
        """Returns the rows of a table, as pypaimon and its Rust core read them."""
        builder = open_table(self.warehouse, name).new_read_builder()
        splits = builder.new_scan().plan().splits()
        return builder.new_read().to_arrow(splits).to_pylist() if splits else []

    def num_rows(self, name: str) -> int:
        """Returns how many rows an append table has."""
        snapshot = open_table(self.warehouse, name).snapshot_manager().get_latest_snapshot()
        return snapshot.total_record_count if snapshot else 0
