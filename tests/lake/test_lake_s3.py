"""The lake on an S3 server (SeaweedFS): written, followed, tidied and learned from as on a disk."""

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("pypaimon")

from launch.bench.s3_server import S3Server
from monolith_jax.lake.jobs import TidyConfig
from monolith_jax.lake.tidy import tidy_table
from monolith_jax.lake.warehouse import TABLES, WarehouseConfig, make_tables
from tests.lake.lake_of import Lake, sorted_rows
from tests.lake.test_history import chunks_of, examples_of, source
from tests.stream.event_log import found_in, make_world

WORLD = make_world(800)


@dataclasses.dataclass(frozen=True)
class LakeOnS3(Lake):
    """A lake whose log is on the disk and whose warehouse is not."""

    path: str

    @property
    def warehouse(self) -> WarehouseConfig:
        return WarehouseConfig(path=self.path)


@pytest.fixture
def lake(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """Returns an empty lake on the server, which is in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    lake = LakeOnS3(tmp_path, f"s3://{s3_server.bucket}/{tmp_path.name}")
    make_tables(lake.warehouse)
    return lake


def test_a_lake_in_a_bucket_holds_what_one_on_a_disk_does(lake: Lake, tmp_path: Path) -> None:
    disk = Lake(tmp_path)
    make_tables(disk.warehouse)
    with closing(lake.feed()) as feed:
        feed.send_world(WORLD)
    follower = lake.changelog("user_features", 0)
    for one in (lake, disk):
        one.ingest(100_000)
        one.examples()
    for name in ("events", "examples", "user_features", "user_features_log"):
        assert sorted_rows(lake.rows(name)) == sorted_rows(disk.rows(name)), name
    assert follower.poll().rows.num_rows >= len(lake.rows("user_features"))
    before = {name: sorted_rows(lake.rows(name)) for name in TABLES}
    tidied = [
        tidy_table(lake.warehouse, name, TidyConfig(retention_s=0.0, keep=1, orphan_s=0.0, most_files=2)) for name in TABLES
    ]
    assert sum(one.files_before for one in tidied) > sum(one.files_after for one in tidied)
    assert sum(one.snapshots_expired for one in tidied) > 0 < sum(one.files_removed for one in tidied)
    assert {name: sorted_rows(lake.rows(name)) for name in TABLES} == before
    lake.ingest()
    lake.examples()
    assert {name: sorted_rows(lake.rows(name)) for name in TABLES} == before, "the jobs know where they were"
    assert found_in(examples_of(chunks_of(source(lake, log=lake.log())))) == WORLD.examples
