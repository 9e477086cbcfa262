"""Partitions of sources: every example in exactly one of them, in the order of the stream."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monolith_jax.stream.columns import ColumnsConfig, ColumnsSource
from monolith_jax.stream.partitions import partition
from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource
from tests.small_model import SmallSource
from tests.stream.resume import assert_resumes, rows_of

T0_MS = 1_649_400_000_000


def write(folder: Path, sizes: list[int], timed: bool = True, **options: Any) -> ColumnsSource:
    """Writes files whose rows are numbered through."""
    first = 0
    for number, size in enumerate(sizes):
        ids = np.arange(first, first + size)
        table = pa.table(
            {"user_id": ids, "video_id": ids, "like": ids % 2 == 0, **({"event_time_ms": T0_MS + ids} if timed else {})}
        )
        pq.write_table(table, folder / f"{number}.parquet")
        first += size
    return ColumnsSource(ColumnsConfig(paths=(str(folder / "*.parquet"),), chunk_rows=3, **options))


def users_of(source: Any) -> list[int]:
    return [row["user_id"] for row in rows_of(assert_resumes(source))]


@pytest.mark.parametrize("text", [False, True])
def test_a_user_is_in_one_partition_and_all_examples_are(tmp_path: Path, text: bool) -> None:
    users = np.random.default_rng(0).integers(0, 40, 200)
    names = [f"u{user}" for user in users] if text else users
    table = pa.table({"user_id": names, "video_id": np.arange(200), "event_time_ms": T0_MS + np.arange(200)})
    pq.write_table(table, tmp_path / "0.parquet")
    source = ColumnsSource(ColumnsConfig(paths=(str(tmp_path / "0.parquet"),), chunk_rows=30))
    found = [rows_of(assert_resumes(partition(source, index, 3))) for index in range(3)]
    of_users = [{row["user_id"] for row in rows} for rows in found]
    assert sum(map(len, of_users)) == len(set.union(*of_users)) == len(set(users.tolist())) and all(of_users)
    videos = [[row["video_id"] for row in rows] for rows in found]
    assert sorted(video for of_part in videos for video in of_part) == list(range(200))
    assert all(of_part == sorted(of_part) for of_part in videos)
    assert partition(source, 0, 1) is source


def test_partitions_go_by_the_column_of_histories(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    columns = {name: rng.integers(0, 30, 200) for name in ("user_id", "device_id")} | {"video_id": np.arange(200)}
    pq.write_table(pa.table(columns | {"event_time_ms": T0_MS + np.arange(200)}), tmp_path / "0.parquet")
    source = ColumnsSource(ColumnsConfig(paths=(str(tmp_path / "0.parquet"),), chunk_rows=30))
    found = [rows_of(assert_resumes(partition(source, index, 2, "device_id"))) for index in range(2)]
    devices, users = ([{row[name] for row in rows} for rows in found] for name in ("device_id", "user_id"))
    assert not devices[0] & devices[1] and users[0] & users[1]


def test_without_users_chunks_are_dealt_out_by_turns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": np.arange(16), "event_time_ms": T0_MS + np.arange(16)}), tmp_path / "0.parquet")
    source = ColumnsSource(ColumnsConfig(paths=(str(tmp_path / "0.parquet"),), chunk_rows=3, epochs=2))
    found = [[row["a"] for row in rows_of(assert_resumes(partition(source, index, 4)))] for index in range(4)]
    # Six chunks a pass: the second one begins with the third partition.
    assert found[0] == [0, 1, 2, 12, 13, 14, 6, 7, 8] and found[3] == [9, 10, 11, 3, 4, 5, 15]


def test_files_are_dealt_out_by_turns(tmp_path: Path) -> None:
    source = write(tmp_path, [4, 2, 5, 3, 1], divide="files")
    parts = [partition(source, index, 3) for index in range(3)]
    assert [users_of(part) for part in parts] == [[0, 1, 2, 3, 11, 12, 13], [4, 5, 14], [6, 7, 8, 9, 10]]
    assert [part.num_examples for part in parts] == [7, 3, 5]


def test_fewer_files_than_partitions_are_refused(tmp_path: Path) -> None:
    source = partition(write(tmp_path, [4, 2], divide="files"), 2, 3)
    with pytest.raises(ValueError, match=r"2 files for 3 partitions; use fewer \(TrainConfig.partitions\)"):
        next(source.read({}))


def test_rejected_rows_are_the_first_partitions() -> None:
    parts = [partition(SmallSource(num_chunks=3, rejects=True), index, 2) for index in range(2)]
    assert [[one.where for chunk in part.read({}) for one in chunk.rejected] for part in parts] == [
        ["part#0", "part#1", "part#2"],
        [],
    ]


def test_a_synthetic_world_stays_the_same_world() -> None:
    whole = SyntheticSource(SyntheticConfig(num_examples=1002, chunk_rows=100))
    found = [pa.Table.from_batches([c.examples for c in assert_resumes(partition(whole, i, 4))]) for i in range(4)]
    together = pa.concat_tables(found).sort_by("event_time_ms")
    assert together.equals(pa.Table.from_batches([chunk.examples for chunk in whole.read({})]).combine_chunks())
