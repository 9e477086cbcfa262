"""A serving copy against a plain dict, and what its formats keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.serve.served_rows import Format, ServedRows
from monolith_jax.sync.delta import Rows, dequantised, quantised

FORMATS: tuple[Format, ...] = ("float32", "float16", "int8")
DIM = 5


def layout(rows: int = 200) -> MapLayout:
    return MapLayout(("user", "video"), (rows, rows), 8)


def rows_of(ids: np.ndarray, seed: int, format: Format) -> Rows:
    vectors = np.random.default_rng(seed).normal(size=(ids.size, DIM)).astype(np.float32)
    return Rows(ids, *quantised(vectors, format))


def some_ids(number: int, seed: int = 0) -> np.ndarray:
    edges = [0, -1, 2**63 - 1, -(2**63)]
    random = np.random.default_rng(seed).integers(-(2**63), 2**63, number - len(edges), dtype=np.int64)
    return np.unique(np.concatenate([np.array(edges, np.int64), random]))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_read_as_they_were_written(format: Format) -> None:
    copy, ids = ServedRows(layout(), DIM, format), some_ids(100)
    of_user, of_video = rows_of(ids, 1, format), rows_of(ids, 2, format)
    assert copy.write(0, of_user) == copy.write(1, of_video) == 0
    for table, rows in enumerate((of_user, of_video)):
        vectors, found = copy.vectors(table, ids)
        assert found.all()
        np.testing.assert_array_equal(vectors, dequantised(rows))
    np.testing.assert_array_equal(copy.num_rows, [ids.size, ids.size])


@pytest.mark.parametrize("format", FORMATS)
def test_all_of_a_format_is_read(format: Format) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every: dict[Format, np.ndarray] = {
        "float32": np.array([1e-45, -0.0, 3e38], np.float32),
        "float16": halves[np.isfinite(halves)],
        "int8": np.arange(-127, 128, dtype=np.int8),
    }
    stored = every[format][:, None]
    scales = np.geomspace(1e-30, 1e30, len(stored)).astype(np.float32) if format == "int8" else None
    ids = np.arange(len(stored), dtype=np.int64)
    copy = ServedRows(MapLayout(("user",), (len(stored),), 8), 1, format)
    copy.write(0, Rows(ids, stored, scales))
    expected = stored.astype(np.float32) * (1 if scales is None else scales[:, None])
    vectors, _ = copy.vectors(0, ids)
    np.testing.assert_array_equal(vectors.view(np.uint32), expected.astype(np.float32).view(np.uint32))


def test_a_batch_reads_each_position_from_its_table() -> None:
    copy, ids = ServedRows(layout(), DIM, "float32"), some_ids(90)
    of_user, of_video = rows_of(ids, 1, "float32"), rows_of(ids[::2], 2, "float32")
    copy.write(0, of_user)
    copy.write(1, of_video)
    batch = np.random.default_rng(3).choice(np.concatenate([ids, [12345]]), (70, 3))
    valid = np.random.default_rng(4).random((70, 3)) < 0.8
    tables = np.array([1, 0, 1], np.int32)
    vectors, found = copy.vectors_of_batch(batch, valid, tables)
    known = [dict(zip(rows.ids.tolist(), rows.vectors, strict=True)) for rows in (of_user, of_video)]
    for example, position in np.ndindex(batch.shape):
        of_id = known[tables[position]].get(int(batch[example, position])) if valid[example, position] else None
        assert found[example, position] == (of_id is not None)
        np.testing.assert_array_equal(vectors[example, position], np.zeros(DIM) if of_id is None else of_id)


def test_no_ids_and_no_positions() -> None:
    copy = ServedRows(layout(), DIM, "int8")
    nothing = np.zeros(0, np.int64)
    assert copy.write(0, rows_of(nothing, 0, "int8")) == 0
    copy.erase(0, nothing)
    assert copy.vectors(0, nothing)[0].shape == (0, DIM)
    vectors, _ = copy.vectors_of_batch(np.zeros((4, 0), np.int64), np.zeros((4, 0), np.bool_), np.zeros(0, np.int32))
    assert vectors.shape == (4, 0, DIM)


def test_a_full_table_refuses_and_counts() -> None:
    few = MapLayout(("user",), (16,), 2)
    copy, ids = ServedRows(few, DIM, "float32"), np.arange(100, dtype=np.int64)
    rows = rows_of(ids, 0, "float32")
    refused = copy.write(0, rows)
    room = int(few.caps.sum()) * few.num_shards
    assert refused >= 100 - room > 0
    vectors, found = copy.vectors(0, ids)
    assert found.sum() == 100 - refused
    np.testing.assert_array_equal(vectors, np.where(found[:, None], rows.vectors, 0))


@pytest.mark.parametrize("format", ["float16", "int8"])
def test_rows_of_two_formats_become_float32(format: Format) -> None:
    copy, ids = ServedRows(layout(), DIM, format), some_ids(50)
    old, new = rows_of(ids, 0, format), rows_of(ids[:20], 1, "float16" if format == "int8" else "int8")
    copy.write(0, old)
    copy.take_format("float16" if format == "int8" else "int8", empty=False)
    assert copy.format == "float32"
    copy.write(0, new)
    vectors, _ = copy.vectors(0, ids)
    np.testing.assert_array_equal(vectors, np.concatenate([dequantised(new), dequantised(old)[20:]]))
    copy.clear()
    copy.take_format(format, empty=True)
    assert copy.format == format and not copy.vectors(0, ids)[1].any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sequence_equals_a_dict(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(FORMATS))
    copy, other, model = ServedRows(layout(), DIM, format), ServedRows(layout(), DIM, format), dict[int, np.ndarray]()
    few = st.lists(st.sampled_from([-1, 0, 1, 5, 7919, 2**62, -(2**63)]), unique=True)
    for number in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["erase", "write", "clear", "copy"])):
            case "erase":
                gone = data.draw(few)
                copy.erase(1, np.array(gone, np.int64))
                for one in gone:
                    model.pop(one, None)
            case "write":
                rows = rows_of(np.array(data.draw(few), np.int64), number, format)
                assert copy.write(1, rows) == 0
                model |= dict(zip(rows.ids.tolist(), dequantised(rows), strict=True))
            case "clear":
                copy.clear()
                model.clear()
            case "copy":
                other.copy_from(copy)
                copy, other = other, copy
        asked = np.array([-1, 0, 1, 5, 7919, 2**62, -(2**63), 99], np.int64)
        vectors, found = copy.vectors(1, asked)
        assert found.tolist() == [one in model for one in asked.tolist()]
        np.testing.assert_array_equal(vectors, [model.get(one, np.zeros(DIM, np.float32)) for one in asked.tolist()])
        assert copy.num_rows.tolist() == [0, len(model)]
