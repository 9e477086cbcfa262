"""Holds what is written to be what is read: in every format, of several processes, whole or not at all."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.sync.delta import (
    FORMATS,
    Content,
    DeltaFolder,
    Rows,
    Version,
    dequantised,
    next_epoch,
    quantised,
)
from tests.sync.written_log import BASE, DENSE, NEXT, manifest, rows_of, write, write_two


def assert_holds(got: Content, wanted: Content, format: str) -> None:
    filled = {table: rows for table, rows in wanted.rows.items() if len(rows.ids)}
    assert got.rows.keys() == filled.keys()
    for table, rows in filled.items():
        stored, scales = quantised(rows.vectors, format)
        assert got.rows[table].vectors.dtype == format
        np.testing.assert_array_equal(got.rows[table].ids, rows.ids, strict=True)
        np.testing.assert_array_equal(got.rows[table].vectors, stored, strict=True)
        if scales is None:
            assert got.rows[table].scales is None
        else:
            np.testing.assert_array_equal(got.rows[table].scales, scales, strict=True)  # pyright: ignore[reportArgumentType]
    deleted = {table: ids for table, ids in wanted.deleted.items() if len(ids)}
    assert got.deleted.keys() == deleted.keys()
    for table, ids in deleted.items():
        np.testing.assert_array_equal(got.deleted[table], ids, strict=True)
    assert (got.dense is None) == (wanted.dense is None)
    if got.dense is not None and wanted.dense is not None:
        assert got.dense.keys() == wanted.dense.keys()
        for name, weight in wanted.dense.items():
            np.testing.assert_array_equal(got.dense[name], weight, strict=True)


INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def contents(draw: st.DrawFn) -> Content:
    rows: dict[str, Rows] = {}
    for table in draw(st.sets(st.text(min_size=1, max_size=5), max_size=4)):
        ids = draw(st.lists(INT64, max_size=6, unique=True))
        shape = (len(ids), draw(st.sampled_from([1, 3, 8])))
        vectors = draw(hnp.arrays(np.float32, shape, elements=st.floats(-6e4, 6e4, width=32)))
        rows[table] = Rows(np.array(ids, np.int64), vectors)
    deleted = draw(st.dictionaries(st.text(min_size=1, max_size=5), st.lists(INT64, max_size=4), max_size=3))
    kinds = st.sampled_from([np.float32, np.float64, np.float16, np.int32, np.bool_])
    weights = kinds.flatmap(lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, min_side=0, max_side=3)))
    dense = draw(st.none() | st.dictionaries(st.text(max_size=6), weights, max_size=3))
    return Content(rows=rows, deleted={table: np.array(ids, np.int64) for table, ids in deleted.items()}, dense=dense)


@settings(deadline=None, max_examples=60)
@given(content=contents(), format=st.sampled_from(FORMATS))
def test_what_is_written_is_read(content: Content, format: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("log")
    folder = DeltaFolder(root)
    told = write(folder, NEXT, content, format, BASE)
    for reader in (folder, DeltaFolder(str(root))):
        assert reader.manifest(NEXT) == told
        assert_holds(reader.read(NEXT), content, format)
    tables = {*content.rows, *content.deleted}
    wanted = {t: [len(content.rows[t].ids) if t in content.rows else 0, len(content.deleted.get(t, []))] for t in tables}
    assert told.counts == wanted
    assert told.dims == {table: rows.vectors.shape[1] for table, rows in content.rows.items()}
    shutil.rmtree(root)


@pytest.mark.parametrize("format", FORMATS)
def test_large_rows_are_written_in_batches_and_read_as_one(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monolith_jax.sync.delta_files.BATCH_BYTES", 4096)
    content = Content(rows={"user": rows_of(5000, 16), "tag": rows_of(7, 16, 1)}, dense={})
    folder = DeltaFolder(tmp_path)
    write(folder, BASE, content, format)
    got = folder.read(BASE)
    assert_holds(got, content, format)
    assert not any(array.flags.writeable for rows in got.rows.values() for array in (rows.ids, rows.vectors))


def test_any_number_of_tables(tmp_path: Path) -> None:
    content = Content(
        rows={f"table {n}": rows_of(1, 1 + n % 2, n) for n in range(300)}, deleted={"table 299": np.arange(3)}, dense={}
    )
    folder = DeltaFolder(tmp_path)
    told = write(folder, BASE, Content(rows=content.rows, dense={}))
    assert len(told.files) == 3
    write(folder, NEXT, content, previous=BASE)
    assert_holds(folder.read(NEXT), content, "float32")


def test_blocks_become_one_version(tmp_path: Path) -> None:
    rows = rows_of(100, 4)
    blocks = [
        Content(rows={"user": Rows(rows.ids[first : first + 30], rows.vectors[first : first + 30])})
        for first in range(0, 100, 30)
    ]
    folder = DeltaFolder(tmp_path)
    folder.write_part(BASE, 0, iter([*blocks, Content(dense=DENSE)]), "int8")
    folder.commit(manifest(BASE, "int8"))
    assert_holds(folder.read(BASE), Content(rows={"user": rows}, dense=DENSE), "int8")
    with pytest.raises(ValueError, match=r"later block has rows of tag, the first has user: the first must name every table"):
        folder.write_part(NEXT, 0, [blocks[0], Content(rows={"tag": rows})], "int8")


def test_the_parts_of_several_processes_are_one_version(tmp_path: Path) -> None:
    writers = [DeltaFolder(tmp_path) for _ in range(3)]
    parts = [
        Content(
            rows={"user": rows_of(10 + process, 4, process)},
            deleted={"user": np.array([process])},
            dense=None if process else DENSE,
        )
        for process in range(3)
    ]
    for process in (2, 0):
        writers[process].write_part(NEXT, process, parts[process], "float16")
    with pytest.raises(TimeoutError, match=r"process 1 has not written its part of 00000001-0000000002"):
        writers[0].commit(manifest(NEXT, "float16", BASE), num_processes=3, timeout_s=0.05)
    assert DeltaFolder(tmp_path).versions() == []
    late = threading.Timer(0.1, writers[1].write_part, (NEXT, 1, parts[1], "float16"))
    late.start()
    told = writers[0].commit(manifest(NEXT, "float16", BASE), num_processes=3)
    late.join()
    assert told.counts == {"user": [33, 3]} and len(told.files) == 7
    rows = [part.rows["user"] for part in parts]
    whole = Rows(np.concatenate([one.ids for one in rows]), np.concatenate([one.vectors for one in rows]))
    wanted = Content(rows={"user": whole}, deleted={"user": np.arange(3)}, dense=DENSE)
    assert_holds(DeltaFolder(tmp_path).read(NEXT), wanted, "float16")
    assert {path.name for path in (tmp_path / NEXT.folder).iterdir()} == {"manifest.json", *told.files}


@pytest.mark.parametrize("format", FORMATS)
def test_pyarrow_and_json_alone_read_it(format: str, tmp_path: Path) -> None:
    write_two(tmp_path, format)
    told = json.loads((tmp_path / NEXT.folder / "manifest.json").read_text())
    assert told["kind"] == "delta" and told["version"] == [1, 2] and told["previous"] == told["base"] == [1, 1]
    assert told["counts"] == {"user": [30, 2], "video": [20, 1], "author": [5, 0]} and told["schema"] == 1
    found: dict[str, dict[int, list[float]]] = {}
    for name, (size, checksum) in told["files"].items():
        data = (tmp_path / NEXT.folder / name).read_bytes()
        assert len(data) == size and xxhash.xxh3_64_hexdigest(data) == checksum
        table = pa.ipc.open_file(data).read_all()
        if name.startswith("rows-"):
            for row in table.to_pylist():
                scale = row.get("scale", 1.0)
                found.setdefault(row["table"], {})[row["id"]] = [value * scale for value in row["vector"]]
        elif name.startswith("deleted-"):
            assert table.select(["table", "id"]).to_pylist() == [
                {"table": "user", "id": 1},
                {"table": "user", "id": -5},
                {"table": "video", "id": 2**62},
            ]
        else:
            assert name == "dense-0.arrow"
            assert [(row["name"], row["dtype"], row["shape"]) for row in table.to_pylist()] == [
                ("towers/kernel", "float32", [2, 3]),
                ("bias", "float32", []),
                ("steps", "int64", [2]),
            ]
            assert table["data"][0].as_py() == DENSE["towers/kernel"].tobytes()
    rows = rows_of(20, 8, 1)
    stored, scales = quantised(rows.vectors, format)
    wanted = dequantised(Rows(rows.ids, stored, scales))
    np.testing.assert_allclose([found["video"][one] for one in rows.ids.tolist()], wanted, rtol=1e-6)
    assert len(found["user"]) == 30 and len(found["author"]) == 5


def test_nothing_is_seen_before_the_commit_and_discard_takes_it_away(tmp_path: Path) -> None:
    folder, reader = DeltaFolder(tmp_path), DeltaFolder(tmp_path)
    folder.write_part(BASE, 0, Content(dense=DENSE), "float32")
    assert reader.versions() == [] and reader.chain() == []
    folder.discard(BASE)
    folder.discard(BASE)
    assert list(tmp_path.iterdir()) == []
    write(folder, NEXT, Content(dense=DENSE), "float32")
    folder.discard(NEXT)
    assert reader.versions() == [NEXT]


def test_a_version_is_written_once(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    folder.write_part(BASE, 0, Content(dense={}), "float32")
    with pytest.raises(ValueError, match=r"part-0\.json was written before.*next sequence number"):
        folder.write_part(BASE, 0, Content(dense={}), "float32")
    folder.commit(manifest(BASE))
    with pytest.raises(ValueError, match="is committed: take the next sequence number"):
        folder.commit(manifest(BASE))


def test_a_trainer_that_was_followed_by_another_must_stop(tmp_path: Path) -> None:
    assert next_epoch(tmp_path) == 1 and next_epoch(tmp_path / "nothing") == 1
    old, new = DeltaFolder(tmp_path), DeltaFolder(tmp_path)
    write(old, BASE, Content(dense={}))
    old.write_part(NEXT, 0, Content(), "float32")
    assert next_epoch(tmp_path) == 2
    new.write_part(Version(2, 1), 0, Content(dense={}), "float32")
    assert not (tmp_path / NEXT.folder).exists()
    for act in (
        lambda: old.commit(manifest(NEXT, previous=BASE)),
        lambda: old.write_part(Version(1, 3), 0, Content(), "float32"),
    ):
        with pytest.raises(ValueError, match="has epoch 2, this writer is of epoch 1: another trainer has started"):
            act()


def test_what_contradicts_itself_is_not_committed(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    folder.write_part(BASE, 0, Content(rows={"user": rows_of(3, 4)}, deleted={"user": np.array([1])}), "float32")
    for wrong, why in (
        (manifest(BASE), "has no dense weights"),
        (manifest(BASE, kind="full"), "kind of .* is 'full'"),
        (manifest(BASE, base=Version(1, 0)), "names .* as its base; expected itself"),
        (manifest(BASE, kind="delta"), "expected a lower version"),
        (manifest(BASE, previous=NEXT), "as previous; expected a lower"),
        (manifest(BASE, "int8"), "in another format than int8"),
    ):
        with pytest.raises(ValueError, match=why):
            folder.commit(wrong)
    folder.write_part(NEXT, 0, Content(rows={"user": rows_of(3, 4)}, deleted={"user": np.array([1])}, dense={}), "float32")
    with pytest.raises(ValueError, match="has deleted ids"):
        folder.commit(manifest(NEXT))
    with pytest.raises(ValueError, match="expected what JSON holds"):
        folder.commit(manifest(NEXT, previous=BASE, position=[np.int64(1)]))
    (tmp_path / NEXT.folder / "rows-0-4.arrow").unlink()
    with pytest.raises(ValueError, match=r"rows-0-4\.arrow is gone"):
        folder.commit(manifest(NEXT, previous=BASE))
    assert folder.versions() == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            Content(rows={"user": Rows(np.arange(3), np.zeros((3, 2)))}),
            r"vectors of user: expected float32 \[3, dim\], got float64",
        ),
        (Content(rows={"user": Rows(np.arange(3), np.zeros((2, 2), np.float32))}), r"got float32 \[2, 2\]"),
        (Content(rows={"user": Rows(np.arange(3.0), np.zeros((3, 2), np.float32))}), r"ids of user: expected int64 \[N\]"),
        (Content(deleted={"user": np.arange(3, dtype=np.int32)}), r"ids of user: expected int64 \[N\], got int32"),
        (Content(dense={"bias": np.array(["a"])}), "dense weight bias is of <U1"),
    ],
)
def test_wrong_arrays_are_refused(content: Content, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        DeltaFolder(tmp_path).write_part(BASE, 0, content, "float32")


@pytest.fixture(scope="module")
def touched() -> Iterator[Rows]:
    yield rows_of(2000, 1024)


@pytest.mark.parametrize(("format", "most"), [("float16", 206e6), ("int8", 105e6)])
def test_a_hundred_thousand_rows_of_dim_1024_fit(format: str, most: float, touched: Rows, tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    write(folder, NEXT, Content(rows={"video": touched}), format, BASE)
    total = sum(path.stat().st_size for path in (tmp_path / NEXT.folder).iterdir())
    assert total * 50 <= most + 49 * 4096, "what does not grow with the rows is at most 4096 bytes"


@pytest.mark.slow
@pytest.mark.parametrize(("format", "most"), [("float16", 206e6), ("int8", 105e6)])
def test_a_hundred_thousand_rows_of_dim_1024_fit_in_full(format: str, most: float, tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    rows = rows_of(100_000, 1024)
    write(folder, NEXT, Content(rows={"video": rows}), format, BASE)
    assert sum(path.stat().st_size for path in (tmp_path / NEXT.folder).iterdir()) <= most
    assert_holds(folder.read(NEXT), Content(rows={"video": rows}), format)
