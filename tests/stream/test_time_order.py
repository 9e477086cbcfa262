import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import sort
from monolith_jax.stream import time_order
from monolith_jax.stream.time_order import sort_by_time


def sorted_rows(output: Path) -> list[dict]:
    return [row for path in sorted(output.glob("log_*.parquet")) for row in pq.read_table(path).to_pylist()]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(-50, 50), st.sampled_from([7, -(2**62), 2**62])), min_size=1, max_size=80),
    st.integers(1, 30),
)
def test_equals_a_stable_sort(times: list[int], rows_in_memory: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half = len(times) // 2 + 1
        rows = [{"time": time, "n": n} for n, time in enumerate(times)]
        for index, part in enumerate((rows[:half], rows[half:])):
            if part:
                pq.write_table(pa.Table.from_pylist(part), folder / f"{index}.parquet")
        inputs = sorted(folder.glob("*.parquet"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time_order, "_PIECE_ROWS", 3)
            done = sort_by_time(inputs, folder / "out", time_column="time", name="log", rows_in_memory=rows_in_memory)
        assert sorted_rows(folder / "out") == sorted(rows, key=lambda row: row["time"])
        assert done.num_rows == len(times) and not done.set_aside
        assert sorted(path.name for path in (folder / "out").iterdir()) == [path.name for path in done.files]


def test_csv_keeps_all_columns_in_the_type_of_all_values(tmp_path: Path) -> None:
    lines = ["t,whole,real,text,code,none", "3,1,1,a,007,", "2,-5,2.5,1,8,", "1,,3,2,9,", "x,1,1,a,1,", "1,2", ",1,1,1,1,"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    done = sort_by_time([tmp_path / "a.csv"], tmp_path / "out", time_column="t", name="log")
    assert sorted_rows(tmp_path / "out") == [
        {"t": 1, "whole": None, "real": 3.0, "text": "2", "code": "9", "none": None},
        {"t": 2, "whole": -5, "real": 2.5, "text": "1", "code": "8", "none": None},
        {"t": 3, "whole": 1, "real": 1.0, "text": "a", "code": "007", "none": None},
    ]
    assert done.set_aside == {"not 6 fields": 1, "t is missing": 1, "t is not a whole number": 1}
    letters = [json.loads(line) for line in (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()]
    assert {(Path(row["where"]).name, row["raw"]) for row in letters} == {
        ("a.csv:5", "x,1,1,a,1,"),
        ("a.csv:6", "1,2"),
        ("a.csv:7", ",1,1,1,1,"),
    }


def test_a_time_that_most_rows_share_needs_no_memory(tmp_path: Path) -> None:
    times = np.full(500_000, 5)
    times[::1000] = 3
    pq.write_table(pa.table({"t": times, "n": np.arange(len(times))}), tmp_path / "a.parquet", row_group_size=20_000)
    before = pa.total_allocated_bytes()
    peak = 0

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal peak
        peak = max(peak, pa.total_allocated_bytes() - before)

    sort_by_time(
        [tmp_path / "a.parquet"], tmp_path / "out", time_column="t", name="log", rows_in_memory=20_000, progress=progress
    )
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out").glob("log_*"))])
    order = np.argsort(times, kind="stable")
    assert np.array_equal(rows.column("n").to_numpy(), order)
    assert peak < 500_000 * 24 / 4  # a quarter of all rows


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    peaks = []
    for num_rows in (120_000, 480_000):
        path, out = tmp_path / f"{num_rows}.csv", tmp_path / str(num_rows)
        pa_csv.write_csv(pa.table({"t": rng.permutation(num_rows), "n": np.arange(num_rows)}), path)
        seen = [0]
        tracemalloc.start()
        sort_by_time(
            [path],
            out,
            time_column="t",
            name="log",
            rows_in_memory=30_000,
            progress=lambda *_, seen=seen: seen.append(pa.total_allocated_bytes()),
        )
        peaks.append(tracemalloc.get_traced_memory()[1] + max(seen))
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_refusals_leave_nothing_that_looks_like_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a.csv", "t,x\n1,2\n"), ("b.csv", "t,y\n1,2\n"), ("c.csv", "t,x\nq,2\n")):
        (tmp_path / name).write_text(text)
    pq.write_table(pa.table({"t": [1], "x": [2]}), tmp_path / "d.parquet")
    out = tmp_path / "out"
    for inputs, message in (
        (["a", "b"], "differ in columns: x, y"),
        (["a", "d"], "CSV and Parquet"),
        (["c"], "no row has a readable"),
    ):
        paths = [next(tmp_path.glob(f"{name}.*")) for name in inputs]
        with pytest.raises(ValueError, match=message):
            sort_by_time(paths, out, time_column="t", name="log")
        assert not list(out.glob("*.parquet")) and not list(out.glob(".*"))
    assert sort.main(["--input", str(tmp_path / "a.csv"), "--output", str(out), "--time_column", "time"]) == 1
    assert "no column 'time'; the file has: t, x" in capsys.readouterr().err
    sort_by_time([tmp_path / "a.csv"], out, time_column="t", name="log")
    with pytest.raises(ValueError, match=r"has log_00000.parquet already"):
        sort_by_time([tmp_path / "a.csv"], out, time_column="t", name="log")


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sort.main(["--help"])
    assert "python -m launch.sort --input" in capsys.readouterr().out
