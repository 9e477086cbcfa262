import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.stream import tabular
from monolith_jax.stream.tabular import Cursor, count_rows, open_table, read_rows, seek_row, start


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, cursor: Cursor | None = None, num_rows: int = 3, end_row: int | None = None) -> list[tabular.RawRows]:
    file = open_table(path, name=path.name)
    return list(read_rows(file, cursor or start(file), num_rows=num_rows, columns=file.columns, end_row=end_row))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.parquet"])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_pieces_are_exact_from_any_row(tmp_path: Path, name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "BLOCK_BYTES", block)
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"a": np.arange(11), "b": np.arange(11) * 2}), path, row_group_size=4)
    else:
        write(path, b"a,b\r\n" + b"".join(b"%d,%d\r\n" % (i, 2 * i) for i in range(11))[:-2])
    file = open_table(path)
    assert count_rows(file) == 11
    for row in range(12):
        pieces = read(path, seek_row(file, row), end_row=10)
        values = [int(value) for piece in pieces for value in piece.batch.column("a").to_pylist()]
        assert values == list(range(row, 10))
        assert all(piece.num_rows == 3 for piece in pieces[:-1])
        assert [int(row) for piece in pieces for row in piece.rows] == values


def test_quotes_byte_order_mark_and_empty_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeff"a",b\n"1,2",\n"x""y",5" wide\n'.encode())
    (piece,) = read(path)
    assert piece.batch.to_pylist() == [{"a": "1,2", "b": None}, {"a": 'x"y', "b": '5" wide'}]


def test_lines_that_are_no_rows_are_set_aside(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'a,b\n1,1\n2\n3,3,3\n4,\xff4\n5,"open\n6,6\n7,7\n8,"open too\n9,9\n')
    pieces = read(path, num_rows=20)
    assert [row["a"] for piece in pieces for row in piece.batch.to_pylist()] == ["1", "6", "7", "9"]
    assert [(row.where, row.reason) for piece in pieces for row in piece.rejected] == [
        ("a.csv:3", "not 2 fields"),
        ("a.csv:4", "not 2 fields"),
        ("a.csv:5", "not UTF-8"),
        ("a.csv:6", "quotes do not match"),
        ("a.csv:9", "quotes do not match"),
    ]
    assert [pieces[0].where(i) for i in range(4)] == ["a.csv:2", "a.csv:7", "a.csv:8", "a.csv:10"]
    assert pieces[0].raw(1) == "6,6" and pieces[0].rejected[2].raw == "4,\\xff4"


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([b"1,2", b"", b'"', b'1,"2', b"1,2,3", b"\xff,1", b'"1""",2', b'a"b,c', b'""",1', b"1", b'"a" ,2'])
    )
)
def test_no_line_is_lost_whatever_it_holds(lines: list[bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.csv", b"a,b\n" + b"\n".join([*lines, b"3,4"]) + b"\n")
        pieces = read(path, num_rows=4)
    places = [piece.where(i) for piece in pieces for i in range(piece.batch.num_rows)]
    places += [row.where for piece in pieces for row in piece.rejected]
    assert sorted(places) == sorted(f"a.csv:{i + 2}" for i in range(len(lines) + 1))


def test_truncated_gzip_gives_what_is_there_and_says_how_much(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 1 << 40, 4000)
    whole = gzip.compress(b"a,b\n" + b"".join(b"%d,%d\n" % (i, value) for i, value in enumerate(noise)))
    path = tmp_path / "a.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    file, got = open_table(path, name="a.csv.gz"), []
    with pytest.raises(ValueError, match=r"a.csv.gz: the gzip archive is cut short or damaged.*; \d+ rows were read") as caught:
        for piece in read_rows(file, start(file), num_rows=500, columns=file.columns, end_row=None):
            got += piece.batch.column("a").to_pylist()
    assert got == [str(i) for i in range(len(got))] and len(got) > 1000
    assert f"; {len(got)} rows were read" in str(caught.value)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="damaged"):
        open_table(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", "empty .0 bytes"),
        ("a.csv", b"a,b\n", "no rows after the header"),
        ("a.csv.gz", b"", "no text"),
        ("a.csv", b"\xffa,b\n1,2\n", "header is not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", "repeat"),
        ("a.parquet", b"PAR1 and then nothing", "not a Parquet file"),
    ],
)
def test_files_that_cannot_be_opened(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_table(write(tmp_path / name, data))


def test_a_file_without_line_breaks_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(tabular, "BLOCK_BYTES", 100)
    with pytest.raises(ValueError, match="longer than 1000 bytes"):
        read(write(tmp_path / "a.csv", b"a,b\n" + b"1" * 5000))


def test_damaged_parquet_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": np.random.default_rng(0).integers(0, 1 << 60, 5000)}), path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[100:30_000] = bytes(29_900)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged Parquet file; 0 rows"):
        read(path)
