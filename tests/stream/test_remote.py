"""Files of other machines without any: an S3 that is a folder. tests/lake/test_remote_servers.py has the servers themselves."""

import glob
import gzip
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from launch import sort
from monolith_jax.stream import remote
from monolith_jax.stream.columns import ColumnsConfig, ColumnsSource
from monolith_jax.stream.remote import RemotePath, joined, matching, path_of
from tests.stream.resume import assert_resumes, rows_of

URLS = "s3://bucket"
T0 = 1_649_400_000_000


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder that is the bucket."""
    folder = tmp_path / "servers" / "bucket"
    folder.mkdir(parents=True)
    monkeypatch.setattr(remote, "_s3", lambda *_: fs.SubTreeFileSystem(str(folder.parent), fs.LocalFileSystem()))
    return folder


def table(first: int, count: int) -> pa.Table:
    rows = np.arange(first, first + count)
    wide = {f"f{i}": np.random.default_rng(i).random(count) for i in range(8)}
    return pa.table({"user_id": rows % 7, "video_id": rows, "event_time_ms": T0 + 1000 * rows, "like": rows % 3 == 0, **wide})


def write(folder: Path, ending: str) -> None:
    """Writes 90 rows in three files of two days."""
    for index, name in enumerate(("day=1/b", "day=1/c", "day=2/a")):
        path = folder / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = table(30 * index, 30)
        if ending == ".parquet":
            pq.write_table(rows, path, row_group_size=8)
        else:
            text = io.BytesIO()
            pa_csv.write_csv(rows, text)
            path.write_bytes(gzip.compress(text.getvalue()) if ending.endswith("gz") else text.getvalue())


def source(path: str, **fields: Any) -> ColumnsSource:
    return ColumnsSource(ColumnsConfig(**{"paths": (path,), "chunk_rows": 7, **fields}))


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".csv.gz"])
@pytest.mark.parametrize("fields", [{}, {"part": (0.3, 0.9), "epochs": 2}, {"divide": "files"}], ids=str)
def test_all_is_as_with_local_files(bucket: Path, ending: str, fields: dict) -> None:
    write(bucket, ending)
    number = 2 if fields.get("divide") == "files" else 1
    for index in range(number):
        here = ColumnsSource(source(f"{bucket}/*/*{ending}", **fields).config, index, number)
        there = ColumnsSource(source(f"day=*/*{ending}", folder=URLS, **fields).config, index, number)
        chunks = assert_resumes(there)
        assert rows_of(chunks) == rows_of(list(here.read({})))
        assert [chunk.position for chunk in chunks] == [chunk.position for chunk in here.read({})]
        assert there.num_examples == here.num_examples


def test_only_what_is_wanted_is_fetched(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(0, 80_000), bucket / "a.parquet", row_group_size=20_000, use_dictionary=False, compression="none")
    fetched = []
    opened = RemotePath.open_random

    class Counted(io.RawIOBase):
        def __init__(self, file: pa.NativeFile) -> None:
            self.file = file
            self.tell, self.seek, self.size = file.tell, file.seek, file.size

        def read(self, size: int = -1, /) -> bytes:
            fetched.append(size)
            return self.file.read(size)

        readable = seekable = lambda self: True

    monkeypatch.setattr(RemotePath, "open_random", lambda self: pa.PythonFile(Counted(opened(self)), mode="r"))
    few = source(f"{URLS}/a.parquet", columns=(("user_id", "user_id"),), keep_others=False, chunk_rows=1000)
    chunks = iter(few.read({}))
    assert next(chunks).examples.schema.names == ["user_id", "event_time_ms"]
    columns = 80_000 * 16
    assert columns / 4 < sum(fetched) < columns / 2, "the first row group of two columns of 12, and the footer"
    assert sum(chunk.examples.num_rows for chunk in chunks) == 79_000
    assert columns < sum(fetched) < 1.3 * columns
    assert max(fetched) <= 1.1 * 20_000 * 8


@pytest.mark.parametrize("ending", [".parquet", ".csv.gz"])
def test_a_truncated_file_is_refused_by_name(bucket: Path, ending: str) -> None:
    write(bucket, ending)
    path = bucket / f"day=2/a{ending}"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"s3://bucket/day=2/a\{ending}: .*cut short"):
        list(source(f"{URLS}/**/*{ending}").read({}))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"s3://bucket/day=2/a\{ending}: the file is empty"):
        list(source(f"{URLS}/**/*{ending}").read({}))


def test_a_short_answer_is_no_end_of_file(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bucket, ".csv")

    class Short(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(size)[:-1] if self.tell() else super().read(size)

    path = RemotePath(f"{URLS}/day=1/b.csv")
    data = (bucket / "day=1/b.csv").read_bytes()
    monkeypatch.setattr(RemotePath, "open_random", lambda self: Short(data))
    with path.open() as stream:
        assert stream.read(10) == data[:10]
        stream.seek(5)
        assert stream.read(10) == data[5:15]
    with path.open() as stream, pytest.raises(OSError, match=r"s3://bucket/day=1/b.csv: .* bytes came of"):
        stream.seek(len(data) - 5)
        stream.read()


def test_a_file_is_read_ahead_in_blocks(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).bytes(50_001)
    (bucket / "a.csv").write_bytes(data)
    fetched, read = list[tuple[int, int]](), remote._WholeFile.read

    def counted(self: Any, size: int = -1, /) -> bytes:
        fetched.append((self.tell(), size))
        return read(self, size)

    monkeypatch.setattr(remote._WholeFile, "read", counted)
    monkeypatch.setattr(remote, "_FIRST_BLOCK_BYTES", 100)
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1600)
    monkeypatch.setattr(remote, "BUFFER_BYTES", 10)
    with RemotePath(f"{URLS}/a.csv").open() as stream:
        assert stream.read(50) == data[:50]
        assert fetched == [(0, 100)], "a header takes one block"
        assert stream.read(60) == data[50:110]
        stream.seek(45_000)
        assert stream.read() == data[45_000:]
        for place in np.random.default_rng(1).integers(0, 60_000, 50).tolist():
            assert stream.seek(place) == place == stream.tell()
            assert stream.read(place % 3000) == data[place : place + place % 3000]
    assert (45_000, 100) in fetched and max(size for _, size in fetched) == 1600


def test_an_object_whose_name_has_magic_is_found(bucket: Path) -> None:
    (bucket / "a[1]#%20 ?.csv").write_text("user_id\n5\n")
    assert rows_of(list(source(f"{URLS}/a[1]#%20 ?.csv").read({}))) == [{"user_id": 5, "event_time_ms": 0}]


PARTS = st.sampled_from(["a", "b.csv", "*", "**", "*.csv", ".h", ".*", "[ab]*", "?", "day=*"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=4))
def test_patterns_are_those_of_glob(bucket: Path, parts: list[str]) -> None:
    for name in ("a/a/b.csv", "a/b.csv", "b.csv", "a/.h/b.csv", ".h/a", "day=1/a/b.csv", "day=2/b.csv", "ab/a", "a.csv/x"):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).touch()
    found = [path.removeprefix(URLS).removeprefix("/") for path in matching(f"{URLS}/{'/'.join(parts)}")]
    local = glob.glob(str(bucket / "/".join(parts)), recursive=True)
    expected = sorted({os.path.relpath(path, bucket) for path in local if os.path.isfile(path)})
    if not glob.has_magic("/".join(parts)):
        expected = [path for path in found if (bucket / path).is_file()]
    assert sorted(path for path in found if (bucket / path).is_file()) == expected


def test_folders_and_paths_join() -> None:
    assert joined("", "a/b") == "a/b" and joined("/data", "a") == "/data/a" and joined("data", "/a") == "/a"
    assert joined("s3://b/x/", "a/*.csv") == "s3://b/x/a/*.csv" and joined("s3://b", "hdfs://n:1/a") == "hdfs://n:1/a"
    assert path_of("a/b") == Path("a/b") and path_of("s3://b/k.csv.gz").suffix == ".gz"
    assert str(RemotePath("s3://b/x/k.csv").parent / "l") == "s3://b/x/l"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://host/a.csv", "cannot read ftp://; a path is local or starts with one of s3://, hdfs://, webhdfs://"),
        ("s3:///a.csv", "there is no bucket after s3://"),
        ("hdfs:///a.csv", "there is no host after hdfs://"),
        ("s3://key:secret@bucket/a.csv", r"s3://\.\.\.@bucket/a.csv: keys do not belong into a path"),
        ("s3://bucket/no.csv", "s3://bucket/no.csv: there is no such file"),
        ("s3://bucket/no/*.csv", "no file matches 's3://bucket/no/\\*.csv'$"),
        ("hdfs://host:port/a.csv", "'port' is no port"),
    ],
)
def test_clear_errors(bucket: Path, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        list(source(path).read({}))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "module"), [("hdfs", "hdfs_native.fsspec"), ("webhdfs", "fsspec.implementations.webhdfs")])
def test_a_missing_client_names_the_extra(scheme: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{scheme}:// needs more packages; pip install 'monolith_jax\[hdfs\]'"):
        RemotePath(f"{scheme}://nowhere:1/a").exists()


def test_a_client_is_told_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    client: Callable[..., Any] = lambda **options: told.append(options) or fs.LocalFileSystem()  # noqa: E731
    monkeypatch.setattr(fs, "S3FileSystem", client)
    monkeypatch.setattr(fs, "resolve_s3_region", lambda bucket: f"region-of-{bucket}")
    for name in (*remote._S3_VARIABLES, *remote._S3_KEYS):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("", ""), ("AWS_ENDPOINT_URL", "http://a"), ("AWS_ENDPOINT_URL_S3", "http://b"), ("AWS_REGION", "r")):
        if name:
            monkeypatch.setenv(name, value)
        RemotePath("s3://told-by-the-environment/a").filesystem()
        RemotePath("s3://told-by-the-environment/b").filesystem()
    assert [(one["endpoint_override"], one["region"]) for one in told] == [
        (None, "region-of-told-by-the-environment"),
        ("http://a", "us-east-1"),
        ("http://b", "us-east-1"),
        ("http://b", "r"),
    ]


def test_a_log_on_a_server_is_sorted(bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(0, 50)
    pq.write_table(rows.take(np.arange(50)[::-1]), bucket / "a.parquet")
    arguments = ["--input", f"{URLS}/*.parquet", "--output", str(tmp_path / "sorted"), "--time_column", "event_time_ms"]
    assert sort.main(arguments) == 0, capsys.readouterr().err
    assert pq.read_table(tmp_path / "sorted").to_pydict() == rows.to_pydict()
