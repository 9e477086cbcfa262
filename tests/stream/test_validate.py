import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.stream.validate import MAX_KEYS, Trail, convert, in_order, in_time_range, not_negative, required, split


def faulty(faults: list[tuple[np.ndarray, str]]) -> dict[int, str]:
    return {int(row): reason for mask, reason in faults for row in np.flatnonzero(mask)}


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(-(2**65), 2**65).map(str), st.sampled_from(["", "x", "1.5", " 7 ", "8.0", "nan", "-"])),
        max_size=9,
    )
)
def test_integers_agree_with_python(values: list[str]) -> None:
    column, faults = convert(pa.array(values, pa.string()), "n", pa.int64(), "f")
    expected, reasons = [], {}
    for row, text in enumerate(values):
        whole = text.strip().removesuffix(".0")
        value = None
        if whole.removeprefix("-").isdigit():
            value = int(whole) if -(2**63) <= int(whole) < 2**63 else None
            if value is None:
                reasons[row] = "n is out of range"
        elif whole not in ("", "nan"):
            reasons[row] = "n is not a whole number"
        expected.append(value)
    assert column.to_pylist() == expected
    assert faulty(faults) == reasons


def test_floats_and_flags() -> None:
    column, faults = convert(pa.array(["1e3", "+2.5", "inf", "a", "", "NaN"]), "x", pa.float64(), "f")
    assert column.to_pylist()[:2] == [1000, 2.5] and column.to_pylist()[4:] == [None, None]
    assert faulty(faults) == {2: "x is not a number", 3: "x is not a number"}
    column, faults = convert(pa.array(["1", "False", "TRUE", "0.0", "2", None, "yes"]), "x", pa.bool_(), "f")
    assert column.to_pylist()[:4] == [True, False, True, False] and column[5].as_py() is None
    assert faulty(faults) == {4: "x is not 0 or 1", 6: "x is not 0 or 1"}
    column, faults = convert(pa.array([0, 1, 3, None]), "x", pa.bool_(), "f")
    assert column.to_pylist()[:2] == [False, True] and faulty(faults) == {2: "x is not 0 or 1"}
    assert faulty(convert(pa.array([1, 2**63], pa.uint64()), "x", pa.int64(), "f")[1]) == {1: "x is out of range"}


def test_a_column_of_a_wrong_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"f.csv: column 'n' should hold whole numbers, got string such as 'a'"):
        convert(pa.array(["a"] * 10), "n", pa.int64(), "f.csv")
    with pytest.raises(ValueError, match=r"column 'n' should hold numbers, got list"):
        convert(pa.array([[1.0]]), "n", pa.float64(), "f.parquet")
    assert faulty(convert(pa.array(["a"] * 9), "n", pa.int64(), "f")[1]).keys() == set(range(9))


def test_single_checks() -> None:
    assert faulty([required(pa.array([1, None]), "user_id")]) == {1: "user_id is missing"}
    assert faulty([not_negative(pa.array([-1, 0, None]), "negative duration")]) == {0: "negative duration"}
    times = pa.array([946_684_799_999, 946_684_800_000, 4_102_444_799_999, 4_102_444_800_000, None])
    assert faulty([in_time_range(times)]) == {0: "time out of range", 3: "time out of range"}


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(100, 130), st.booleans()), max_size=30)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(0, 10), st.booleans())
def test_order_of_one_chunk_agrees_with_a_slow_model(
    rows: list[tuple[int, int, int, bool]], allowed: int, strings: bool
) -> None:
    newest, seen, expected = None, set(), {}
    for index, (user, video, time, good) in enumerate(rows):
        if not good:
            continue
        if newest is not None and time < newest - allowed:
            expected[index] = "time went backwards"
            continue
        newest = time if newest is None else max(newest, time)
        if (user, video, time) in seen:
            expected[index] = "duplicate"
        seen.add((user, video, time))
    kind = pa.string() if strings else pa.int64()
    users, videos = (pa.array([row[i] for row in rows], pa.int64()).cast(kind) for i in (0, 1))
    times, good = np.array([row[2] for row in rows], np.int64), np.array([row[3] for row in rows], bool)
    faults, trail = in_order(times, users, videos, good, Trail(), allowed)
    assert faulty(faults) == expected
    assert trail.newest_ms == newest
    assert {(int(u), int(v)) for u, v in trail.keys} == {(u, v) for u, v, time in seen if time == newest}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1)), max_size=24), st.integers(1, 5))
def test_in_a_stream_in_order_chunks_do_not_matter(steps: list[tuple[int, int, int]], size: int) -> None:
    users, videos = np.array([s[0] for s in steps], np.int64), np.array([s[1] for s in steps], np.int64)
    times = 1000 + np.cumsum(np.array([s[2] for s in steps], np.int64))

    def run(chunk: int) -> tuple[dict[int, str], Trail]:
        trail, found = Trail(), {}
        for start in range(0, len(times), chunk):
            part = slice(start, start + chunk)
            good = np.ones(len(times[part]), bool)
            faults, trail = in_order(times[part], pa.array(users[part]), pa.array(videos[part]), good, trail, 0)
            found |= {start + row: reason for row, reason in faulty(faults).items()}
        return found, Trail(trail.newest_ms, tuple(sorted(trail.keys)))

    assert run(size) == run(1000)


def test_the_trail_stays_small() -> None:
    ids = pa.array(np.arange(3 * MAX_KEYS))
    _, trail = in_order(np.full(3 * MAX_KEYS, 5), ids, ids, np.ones(3 * MAX_KEYS, bool), Trail(), 0)
    assert len(trail.keys) == MAX_KEYS and trail.keys[-1] == (3 * MAX_KEYS - 1,) * 2


def test_split_gives_the_first_reason_and_shortens_the_row() -> None:
    batch = pa.RecordBatch.from_pydict({"n": [0, 1, 2]})
    faults = [(np.array([False, True, False]), "first"), (np.array([True, True, False]), "second")]
    good, rejected = split(batch, faults, lambda row: f"f:{row}", lambda row: "x" * 1000)
    assert good.to_pydict() == {"n": [2]}
    assert [(row.where, row.reason, len(row.raw)) for row in rejected] == [("f:0", "second", 500), ("f:1", "first", 500)]
