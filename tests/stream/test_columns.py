import gzip
import tracemalloc
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from monolith_jax.stream.columns import ColumnsConfig, ColumnsSource
from monolith_jax.stream.events import labels
from tests.stream.resume import assert_resumes, counts_of, reasons_of, rows_of

T0 = 1_649_400_000


def source(*paths: Path, **fields: object) -> ColumnsSource:
    return ColumnsSource(ColumnsConfig(paths=tuple(map(str, paths)), **{"chunk_rows": 3, **fields}))  # pyright: ignore


MAP = {"columns": (("uid", "user_id"), ("item", "video_id"), ("liked", "like")), "time_column": "ts", "time_unit": "s"}


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet"])
def test_columns_are_renamed_typed_and_passed(tmp_path: Path, ending: str) -> None:
    for index in range(2):
        rows = np.arange(5) + 5 * index
        table = pa.table(
            {"uid": rows, "item": [f"v{i}" for i in rows], "liked": rows % 2, "ts": T0 + rows / 4, "price": rows / 2}
        )
        path = tmp_path / f"{index}{ending}"
        if ending == ".parquet":
            pq.write_table(table, path, row_group_size=2)
        else:
            with pa.output_stream(str(path)) as stream:
                pa_csv.write_csv(table, stream)
    one = source(tmp_path / f"*{ending}", epochs=2, **MAP)
    chunks = assert_resumes(one)
    assert not counts_of(chunks)
    rows = rows_of(chunks)
    assert rows[:10] == rows[10:]
    assert rows[7] == {"user_id": 7, "video_id": "v7", "like": True, "event_time_ms": 1000 * T0 + 1750, "price": 3.5}
    assert one.num_examples == (20 if ending == ".parquet" else None)
    last = source(tmp_path / f"*{ending}", part=(0.45, 1.0), keep_others=False, **MAP)
    assert [row["user_id"] for row in rows_of(assert_resumes(last))] == [4, 5, 6, 7, 8, 9]
    assert last.num_examples == 6 and "price" not in rows_of(list(last.read({})))[0]


def test_bad_rows_are_set_aside(tmp_path: Path) -> None:
    lines = [
        "uid,item,liked,ts,price",
        *(f"{i},a,1,{T0 + i},{i}" for i in range(8192)),
        f"x,a,1,{T0 + 9000},1",
        f"2,b,5,{T0 + 9000},1",
    ]
    lines += [f"3,c,1,{T0 + 9000},many", f"4,,1,{T0 + 9000},1", "5,e,1,1e300,1", f"6,f,1,{T0 + 9001},1", f"6,f,1,{T0 + 9001},1"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    chunks = assert_resumes(source(tmp_path / "a.csv", **MAP | {"chunk_rows": 1024}))
    assert reasons_of(chunks) == {
        "a.csv:8194": "uid is not a whole number",
        "a.csv:8195": "liked is not 0 or 1",
        "a.csv:8196": "price is not a whole number",
        "a.csv:8197": "item is missing",
        "a.csv:8198": "time out of range",
        "a.csv:8200": "duplicate",
    }
    kept = rows_of(list(source(tmp_path / "a.csv", types=(("price", "string"), ("uid", "string")), **MAP).read({})))
    assert {row["user_id"] for row in kept} >= {"x", "3"} and kept[-1]["price"] == "1"


def test_rows_without_time_are_numbered_and_labels_come_from_values(tmp_path: Path) -> None:
    for index, values in enumerate((["no", " yes. "], ["yes.", None, "no"])):
        table = pa.table({"age": pa.array(range(len(values))), "answer": pa.array(values, pa.large_string())})
        pq.write_table(table, tmp_path / f"{index}.parquet")
    chunks = assert_resumes(
        source(tmp_path / "0.parquet", tmp_path / "1.parquet", positive=(("says_yes", "answer", "yes."),), chunk_rows=2)
    )
    rows = rows_of(chunks)
    assert [row["event_time_ms"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["says_yes"] for row in rows] == [False, True, True, None, False]
    assert set(rows[0]) == {"age", "says_yes", "event_time_ms"}  # the raw answer would give the label away
    assert labels(chunks[1].examples, ["says_yes"])[1].tolist() == [[1], [0]]


def test_parquet_timestamps_and_lists(tmp_path: Path) -> None:
    when = datetime(2022, 4, 8, 6, 40)
    table = pa.table(
        {
            "user_id": [1],
            "video_id": [2],
            "at": pa.array([when], pa.timestamp("us")),
            "tag_id": pa.array([[1, 2]], pa.large_list(pa.int32())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = rows_of(list(source(tmp_path / "a.parquet", columns=(("at", "event_time_ms"),)).read({})))
    assert row == {"user_id": 1, "video_id": 2, "tag_id": [1, 2], "event_time_ms": 1000 * T0}


def test_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uid,item,liked,ts\n1,2,1,5\n")
    for fields, message in (
        ({"paths": ()}, "paths is empty"),
        ({"paths": (str(tmp_path / "*.parquet"),)}, "no file matches"),
        ({"columns": (("user", "user_id"),)}, "no column 'user'; the file has: uid, item, liked, ts"),
        ({"columns": (("uid", "item"),)}, "two columns would be called"),
        ({"time_unit": "h"}, "time_unit must be one of s, ms, us"),
        ({"types": (("uid", "int32"),)}, "types must be of"),
        ({"epochs": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            list(ColumnsSource(ColumnsConfig(**{"paths": (str(tmp_path / "a.csv"),), **fields})).read({}))
    end = list(source(tmp_path / "a.csv").read({}))[-1].position
    (tmp_path / "a.csv").write_text("uid,item,liked,ts\n1,\n")
    with pytest.raises(ValueError, match="behind the file's end"):
        list(source(tmp_path / "a.csv").read(end))
    with pytest.raises(ValueError, match="the position is in file 3"):
        list(source(tmp_path / "a.csv").read({**end, "file": 2}))


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str) -> None:
    peaks = []
    for num_rows in (40_000, 200_000):
        rows = np.arange(num_rows)
        table = pa.table({"uid": rows, "item": rows, "liked": rows % 2, "ts": T0 + rows, "price": rows * 1.5})
        path = tmp_path / f"{num_rows}{ending}"
        if ending == ".parquet":
            pq.write_table(table, path, row_group_size=20_000)
        else:
            with pa.output_stream(str(path), compression=None) as stream:
                text = pa.BufferOutputStream()
                pa_csv.write_csv(table, text)
                data = text.getvalue().to_pybytes()
                stream.write(gzip.compress(data, 1) if ending.endswith("gz") else data)
        del table, rows
        before, peak, seen = pa.total_allocated_bytes(), 0, 0
        tracemalloc.start()
        for chunk in source(path, **MAP | {"chunk_rows": 4096}).read({}):
            peak, seen = max(peak, pa.total_allocated_bytes() - before), seen + chunk.examples.num_rows
        peaks.append(peak + tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert seen == num_rows
    assert peaks[1] < 1.3 * peaks[0]


def test_census_sample(data_folder: Path) -> None:
    positive = (("income_over_50k", "income_50k", "50000+."), ("never_married", "marital_stat", "Never married"))
    path = data_folder / "census_income_kdd" / "train.parquet"
    chunks = list(source(path, positive=positive, chunk_rows=8192).read({}))
    values = np.concatenate([labels(chunk.examples, ["income_over_50k", "never_married"])[0] for chunk in chunks])
    assert values.sum(0).tolist() == [12_382, 86_485] and len(values) == 199_523
