"""The blocks of an export hold the trainer's live rows, bit for bit, and nothing else."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from monolith_jax.sync.export import SavedTable, base_contents, host_vectors, saved_tables
from monolith_jax.tables.update import row_layout, vectors_of
from monolith_jax.train.step import make_train_step
from tests.serve.published import trained_rows, trained_weights
from tests.small_model import ADAGRAD, TABLES, Small, make_examples, make_small


@pytest.fixture(scope="module")
def small() -> Small:
    """Returns a model after some steps: a table of bfloat16, and two that share a group, the first of which is empty again."""
    tables = [
        dataclasses.replace(TABLES[0], dtype="bfloat16"), TABLES[1], dataclasses.replace(TABLES[2], optimizer=ADAGRAD),
    ]  # fmt: skip
    made = make_small(tables=tables)
    step = make_train_step(made.model)
    for number in range(3):
        made.state, _ = step(made.state, made.inputs_of(make_examples(32, number))[0])
    # What ids leave behind is still in the array.
    users, others = (group.maps for group in made.mapper.groups)
    users.erase(users.entries(0)[0][:5], 0)
    others.erase(others.entries(0)[0], 0)
    return made


def tables_of(small: Small) -> list[SavedTable]:
    return saved_tables(small.model.groups, small.mapper.get_state(), jax.device_get(small.state.groups))


def expected(small: Small) -> dict[str, dict[int, Any]]:
    """Returns the trainer's vectors by table and id, as its own code decodes them."""
    arrays = [vectors_of(group.rows, array) for group, array in zip(small.model.groups, small.state.groups, strict=True)]
    decoded = dataclasses.replace(small, state=small.state._replace(groups=tuple(arrays)))
    rows = trained_rows(decoded)
    return {name: dict(zip(ids.tolist(), vectors, strict=True)) for name, (ids, vectors) in rows.items()}


@pytest.mark.parametrize("most_bytes", [1, 100, 1 << 20])
def test_blocks_hold_all_live_rows(small: Small, most_bytes: int) -> None:
    wanted, tables = expected(small), tables_of(small)
    assert len(wanted["user"]) > 20 and len(wanted["video"]) > 20 and wanted["tag"] == {}
    for table in tables:
        blocks = list(table.blocks(most_bytes))
        assert all(block.vectors.nbytes <= max(most_bytes, 16) and block.vectors.dtype == np.float32 for block in blocks)
        ids = np.concatenate([np.zeros(0, np.int64), *(block.ids for block in blocks)])
        assert ids.tolist() == sorted(wanted[table.name])
        for block in blocks:
            np.testing.assert_array_equal(block.vectors, [wanted[table.name][one] for one in block.ids.tolist()])
    assert [table.name for table in tables if table.ids.size == 0] == ["tag"]


def test_contents_name_every_table_first(small: Small) -> None:
    dense = trained_weights(small)
    first, *rest = base_contents(tables_of(small), dense, 100)
    assert first.rows.keys() == {"user", "tag", "video"} and first.dense is dense
    assert all(not rows.ids.size and rows.vectors.shape == (0, 4) for rows in first.rows.values())
    assert all(block.dense is None and not block.deleted for block in rest)


@pytest.mark.parametrize("dim", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_without_a_device(dim: int, dtype: Any) -> None:
    layout = row_layout(ADAGRAD, dim, dtype)
    rows = np.random.default_rng(0).standard_normal((9, layout.width)).astype(np.float32)
    got = host_vectors(layout, rows[:, : layout.vector_width])
    np.testing.assert_array_equal(got, np.asarray(vectors_of(layout, jax.numpy.asarray(rows))))
    assert got.shape == (9, dim) and got.dtype == np.float32


def test_what_is_not_finite_is_refused(small: Small) -> None:
    video = next(table for table in tables_of(small) if table.name == "video")
    rows = video.rows.copy()
    rows[video.places[3], 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"a row of table video is not finite.*--step"):
        list(dataclasses.replace(video, rows=rows).blocks())
    with pytest.raises(FloatingPointError, match="dense weight w is not finite"):
        next(base_contents([], {"w": np.array([np.inf], np.float32)}))


def test_other_sizes_are_refused(small: Small) -> None:
    arrays = jax.device_get(small.state.groups)
    with pytest.raises(ValueError, match=r"rows of tables .* in the snapshot, expected .*other tables"):
        saved_tables(small.model.groups, small.mapper.get_state(), [array[:, 1:] for array in arrays])
