"""Streams of files on real servers: S3 (SeaweedFS), HDFS (Apache's) by its own protocol and by WebHDFS."""

import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch.bench.hdfs_server import HdfsServer
from launch.bench.s3_server import S3Server
from monolith_jax.stream.columns import ColumnsConfig, ColumnsSource
from monolith_jax.stream.remote import RemotePath, matching
from tests.stream.resume import assert_resumes, rows_of
from tests.stream.test_remote import source, table, write

TREE = "tree ä%20"


def put(url: str, folder: Path) -> None:
    """Copies a folder to a server."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            where, name = RemotePath(f"{url}/{path.relative_to(folder)}").filesystem()
            if not url.startswith("s3://"):
                where.create_dir(os.path.dirname(name))
            with where.open_output_stream(name, compression=None) as stream:
                stream.write(path.read_bytes())


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Returns the address of a folder that holds the files of `write`, of each ending, and those files here."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        address = f"s3://{server.bucket}"
        for name, value in server.environment.items():
            request.getfixturevalue("monkeypatch").setenv(name, value)
    else:
        hdfs: HdfsServer = request.getfixturevalue("hdfs")
        address = hdfs.url if request.param == "hdfs" else hdfs.web_url
    folder = f"{address}/{TREE}/{tmp_path.name}"
    for ending in (".parquet", ".csv", ".csv.gz"):
        write(tmp_path / "here", ending)
    put(folder, tmp_path / "here")
    return folder


each_server = pytest.mark.parametrize("url", ["s3", "hdfs", "webhdfs"], indirect=True)


@each_server
@pytest.mark.parametrize("ending", [".parquet", ".csv", ".csv.gz"])
def test_all_is_as_with_local_files(url: str, ending: str, tmp_path: Path) -> None:
    for fields in ({"chunk_rows": 16}, {"part": (0.3, 0.9), "epochs": 2, "chunk_rows": 25}):
        here = source(f"{tmp_path}/here/*/*{ending}", **fields)
        there = source(f"**/*{ending}", folder=url, **fields)
        chunks = assert_resumes(there)
        assert rows_of(chunks) == rows_of(list(here.read({}))) and len(rows_of(chunks)) >= 90
        assert [chunk.position for chunk in chunks] == [chunk.position for chunk in here.read({})]
        assert there.num_examples == here.num_examples
    halves = [ColumnsSource(source(f"{url}/*/*{ending}", divide="files").config, index, 2) for index in range(2)]
    assert [len(rows_of(list(half.read({})))) for half in halves] == [60, 30]


@each_server
def test_patterns(url: str) -> None:
    assert matching(f"{url}/day=*/[bc].csv*") == [f"{url}/day=1/{name}" for name in ("b.csv", "b.csv.gz", "c.csv", "c.csv.gz")]
    assert matching(f"{url}/no/*") == matching(f"{url}/day=?/d*/*") == []
    assert not RemotePath(f"{url}/day=1").is_file() and RemotePath(f"{url}/day=1/b.csv").stat().st_size > 0
    assert not RemotePath(f"{url}/day=3").exists()


@each_server
def test_clear_errors(url: str, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    (cut / "d").mkdir(parents=True)
    (cut / "d" / "z.parquet").write_bytes((tmp_path / "here/day=2/a.parquet").read_bytes()[:-9])
    put(url, cut)
    with pytest.raises(ValueError, match=re.escape(f"{url}/d/z.parquet: not a Parquet file, or cut short")):
        list(source(f"{url}/*/*.parquet").read({}))
    with pytest.raises(ValueError, match=re.escape(f"{url}/no.parquet: there is no such file")):
        list(source(f"{url}/no.parquet").read({}))
    with pytest.raises(ValueError, match="no file matches"):
        list(source(f"{url}/*.parquet").read({}))


def test_a_server_that_dies_is_no_end_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require_s3: None) -> None:
    server = S3Server(tmp_path / "server")
    server.start()
    try:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "here").mkdir()
        rows = table(0, 60_000)
        pq.write_table(rows, tmp_path / "here/a.parquet", row_group_size=20_000)
        (tmp_path / "here/a.csv").write_text(
            "user_id,video_id,event_time_ms\n" + "".join(f"{i % 7},{i},{1_649_400_000_000 + i}\n" for i in range(120_000))
        )
        url = f"s3://{server.bucket}/x"
        put(url, tmp_path / "here")
        one = {ending: ColumnsSource(ColumnsConfig(paths=(f"{url}/a{ending}",))) for ending in (".csv", ".parquet")}
        whole = {ending: rows_of(list(of.read({}))) for ending, of in one.items()}
        begun = {ending: of.read({}) for ending, of in one.items()}
        first = {ending: next(chunks) for ending, chunks in begun.items()}
        server.kill()
        for ending, chunks in begun.items():
            with pytest.raises((OSError, ValueError)) as raised:
                list(chunks)
            assert "a" + ending in str(raised.value)
        with pytest.raises(ValueError, match=re.escape(f"{url}/a.csv: cannot be looked up: ")):
            list(one[".csv"].read({}))
        server.start()
        for ending, of in one.items():
            again = rows_of(list(of.read(first[ending].position)))
            assert rows_of([first[ending]]) + again == whole[ending]
    finally:
        server.kill()
