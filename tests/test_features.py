import math
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.features import (
    MISSING_BUCKET,
    BucketFeatureConfig,
    CrossFeatureConfig,
    DenseFeatureConfig,
    FeatureConfig,
    Features,
    IdFeatureConfig,
    TimeFeatureConfig,
    feature_layout,
    featurize,
    restricted,
)
from monolith_jax.ids.strings import string_ids


def read(batch: pa.RecordBatch, *features: FeatureConfig) -> Features:
    """Featurizes with one group that holds every table."""
    tables = list(dict.fromkeys(feature.table for feature in features if not isinstance(feature, DenseFeatureConfig)))
    return featurize(batch, feature_layout(features, [tables] if tables else []))


def ids_of(batch: pa.RecordBatch, feature: FeatureConfig) -> list[list[int | None]]:
    """Returns the ids of one feature, None where there is none."""
    ids, valid = read(batch, feature).groups[0]
    assert ids.dtype == np.int64 and valid.dtype == np.bool_
    return [[key if there else None for key, there in zip(*row, strict=True)] for row in zip(ids.tolist(), valid, strict=True)]


def column(values: list | pa.Array, kind: pa.DataType | None = None) -> pa.RecordBatch:
    return pa.record_batch({"x": values if isinstance(values, pa.Array) else pa.array(values, kind)})


ONE = IdFeatureConfig(name="f", column="x", table="t")
EDGES = [-1, 0, 2**63 - 1, -(2**63), None, 7]


def test_ids_stay_64_bit() -> None:
    assert ids_of(column(EDGES, pa.int64()), ONE) == [[value] for value in EDGES]
    unsigned = column([2**64 - 1, 2**63, None], pa.uint64())
    assert ids_of(unsigned, ONE) == [[-1], [-(2**63)], [None]]
    assert ids_of(column([True, False, None]), ONE) == [[1], [0], [None]]
    assert ids_of(column([3, None], pa.int16()), ONE) == [[3], [None]]
    assert ids_of(column([None, None], pa.null()), ONE) == [[None], [None]]
    assert ids_of(column([], pa.int64()), ONE) == []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_are_hashed_whatever_their_type(kind: pa.DataType) -> None:
    values = ["abc", None, "", "abc", "12"]
    hashes = dict(zip(values, string_ids(pa.array(values)).tolist(), strict=True))
    expected = [[None if value is None else hashes[value]] for value in values]
    assert ids_of(column(pa.array(values, pa.string()).cast(kind)), ONE) == expected
    assert hashes["abc"] == np.uint64(0x44BC2CF5AD770999).astype(np.int64)
    lists = column(pa.array([["abc", None], None, [], ["12", "abc"]], pa.list_(kind)))
    two = IdFeatureConfig(name="f", column="x", table="t", max_length=2)
    assert ids_of(lists, two) == [[hashes["abc"], None], [None] * 2, [None] * 2, [hashes["12"], hashes["abc"]]]


LISTS = [[1, 2, 3, 4], None, [], [5], [None, 6], [7, None, 8], [-1, 0]]


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())])
@pytest.mark.parametrize("max_length", [1, 3, 5])
def test_lists_keep_their_first_ids(max_length: int, kind: pa.DataType) -> None:
    feature = IdFeatureConfig(name="f", column="x", table="t", max_length=max_length)
    expected = [((values or []) + [None] * 5)[:max_length] for values in LISTS]
    assert ids_of(column(LISTS, kind), feature) == expected
    for start, length in ((0, 3), (1, 4), (4, 3), (6, 1), (3, 0)):
        assert ids_of(column(LISTS, kind).slice(start, length), feature) == expected[start : start + length]


def test_a_single_id_fills_the_first_position_of_a_list() -> None:
    feature = IdFeatureConfig(name="f", column="x", table="t", max_length=3)
    assert ids_of(column([5, None]), feature) == [[5, None, None], [None, None, None]]


def test_what_is_under_a_null_list_does_not_matter() -> None:
    offsets, values = pa.array([0, 2, 4, 5], pa.int32()), pa.array([1, 2, 3, 4, 5])
    mask = pa.array([False, True, False])
    lists = pa.ListArray.from_arrays(offsets, values, mask=mask)
    two = IdFeatureConfig(name="f", column="x", table="t", max_length=2, weight_column="w")
    weights = pa.array([[0.1, 0.2], None, [0.5]], pa.list_(pa.float64()))
    for beside in (weights, pa.ListArray.from_arrays(offsets, pa.array([0.1, 0.2, 9.0, 9.0, 0.5]), mask=mask)):
        found = read(pa.record_batch({"x": lists, "w": beside}), two)
        assert found.groups[0].valid.tolist() == [[True, True], [False, False], [True, False]]
        assert found.groups[0].ids[found.groups[0].valid].tolist() == [1, 2, 5]
        assert found.weights[0] is not None
        assert found.weights[0][found.groups[0].valid].tolist() == pytest.approx([0.1, 0.2, 0.5])


def test_weights_stand_beside_their_ids() -> None:
    ids = [[1, 2, 3], None, [4], [], [None, 5]]
    weights = [[0.1, 0.2, 0.3], None, [None], None, [0.7, math.nan]]
    batch = pa.record_batch({"x": pa.array(ids), "w": pa.array(weights), "y": [1, 2, None, 4, 5], "v": [0.5, None, 3, -1, 2]})
    features = (
        IdFeatureConfig(name="list", column="x", table="t", max_length=2, weight_column="w"),
        IdFeatureConfig(name="one", column="y", table="t", weight_column="v"),
        IdFeatureConfig(name="plain", column="y", table="t"),
    )
    for start in range(5):
        found = read(batch.slice(start), *features)
        weight, (_, valid) = found.weights[0], found.groups[0]
        assert weight is not None and weight.dtype == np.float32
        # "plain" comes first: a feature of one unweighted id.
        expected = [[1, 0.1, 0.2, 0.5], [1, 1, 1, 0], [1, 0, 1, 3], [1, 1, 1, -1], [1, 0.7, 0, 2]]
        there = [[True, True, True, True], [True, False, False, True], [False, True, False, False], [True, False, False, True]]
        there.append([True, False, True, True])
        assert valid.tolist() == there[start:]
        assert weight[valid].tolist() == pytest.approx(np.array(expected)[start:][valid].tolist())
    assert read(batch, features[2]).weights == (None,)


def test_order_and_place_of_features() -> None:
    features = (
        IdFeatureConfig(name="tags", column="x", table="tag", max_length=3, combiner="mean"),
        IdFeatureConfig(name="user", column="y", table="user"),
        IdFeatureConfig(name="history", column="x", table="video", max_length=2, combiner="none"),
        DenseFeatureConfig(name="n", column="y"),
        IdFeatureConfig(name="video", column="y", table="video"),
    )
    layout = feature_layout(features, [["video", "user"], ["tag"]])
    places = [[(slot.feature, slot.start, slot.length, slot.combiner) for slot in slots] for slots in layout.groups]
    assert places == [[("user", 0, 1, "sum"), ("video", 1, 1, "sum"), ("history", 2, 2, "none")], [("tags", 0, 3, "mean")]]
    assert layout.position_tables(0, ["video", "user"]) == [1, 0, 0, 0] and layout.position_tables(1, ["tag"]) == [0] * 3
    assert (layout.num_positions(0), layout.num_positions(1), layout.num_dense) == (4, 3, 1)
    batch = pa.record_batch({"x": pa.array([[1, 2, 3, 4]]), "y": [9]})
    found = featurize(batch, layout)
    assert [group.ids.tolist() for group in found.groups] == [[[9, 9, 1, 2]], [[1, 2, 3]]]
    assert found.dense.tolist() == [[9.0]] and found.dense.dtype == np.float32


def crossed(columns: dict[str, list], *names: str) -> list[int]:
    feature = CrossFeatureConfig(name="f", columns=names, table="t")
    ids, valid = read(pa.record_batch({name: pa.array(values) for name, values in columns.items()}), feature).groups[0]
    assert valid.all()
    return ids[:, 0].tolist()


def test_crosses_tell_every_combination_apart() -> None:
    values = [None, 0, 1, 2, -1, 2**63 - 1]
    pairs = [(a, b) for a in values for b in values]
    columns = {"a": [a for a, _ in pairs], "b": [b for _, b in pairs]}
    forth, back = crossed(columns, "a", "b"), crossed(columns, "b", "a")
    assert len(set(forth)) == len(pairs)
    assert all((one == other) == (a == b) for one, other, (a, b) in zip(forth, back, pairs, strict=True)), "order matters"
    assert len({*crossed(columns, "a"), *crossed(columns, "a", "a")}) == 2 * len(values)
    # The same combination gives the same id wherever it stands.
    assert crossed({"a": [5, *columns["a"][::-1]], "b": [5, *columns["b"][::-1]]}, "a", "b")[1:] == forth[::-1]
    strings = {"a": ["x", None, "", "x"], "b": [True, False, None, True]}
    ids = crossed(strings, "a", "b")
    assert ids[0] == ids[3] and len(set(ids)) == 3


def test_a_null_string_is_one_value_of_a_cross() -> None:
    under = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"xxyy"), pa.py_buffer(b"\0")
    )
    feature = CrossFeatureConfig(name="f", columns=("x",), table="t")
    ids = {row[0] for array in (under, pa.array([None, None], pa.string())) for row in ids_of(column(array), feature)}
    assert len(ids) == 1


def test_bucket_edges() -> None:
    feature = BucketFeatureConfig(name="f", column="x", boundaries=(-1.5, 0, 10), table="t")
    values = [-math.inf, -2, -1.5, -0.1, 0, 9.99, 10, math.inf, None, math.nan]
    assert [row[0] for row in ids_of(column(values, pa.float64()), feature)] == [0, 0, 1, 1, 2, 2, 3, 3] + [MISSING_BUCKET] * 2
    assert ids_of(column([True, False, None]), feature) == [[2], [2], [MISSING_BUCKET]]
    assert ids_of(column([2**60 + 1, -(2**60), 10], pa.int64()), feature) == [[3], [0], [3]]
    everything = BucketFeatureConfig(name="f", column="x", boundaries=(), table="t")
    assert ids_of(column([5.0, None]), everything) == [[0], [MISSING_BUCKET]]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(-(10**12), 4 * 10**12)), max_size=10),
    st.sampled_from([0, 8, -3.5, 5.75, 14, -12]),
)
def test_hours_and_weekdays_agree_with_datetime(times_ms: list[int | None], utc_offset_h: float) -> None:
    times_ms = [*times_ms, 0, -1, 3_599_999, 3_600_000, 86_399_999, 86_400_000]
    batch = pa.record_batch({"event_time_ms": pa.array(times_ms, pa.int64())})
    zone = timezone(timedelta(hours=utc_offset_h))
    local = [
        None if t is None else (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=t)).astimezone(zone) for t in times_ms
    ]
    for unit, expected in (
        ("hour", [MISSING_BUCKET if t is None else t.hour for t in local]),
        ("weekday", [MISSING_BUCKET if t is None else t.weekday() for t in local]),
    ):
        feature = TimeFeatureConfig(name="f", unit=unit, table="t", utc_offset_h=utc_offset_h)  # pyright: ignore[reportArgumentType]
        assert [row[0] for row in ids_of(batch, feature)] == expected


def test_dense_values_are_scaled() -> None:
    batch = pa.record_batch({"x": [3.0, None, math.nan, -8.0], "b": [True, False, None, True], "i": [2**60, 1, 0, None]})
    plain = DenseFeatureConfig(name="a", column="x", mean=1, std=4)
    log = DenseFeatureConfig(name="b", column="x", scale="log", mean=0.5, std=2)
    found = read(batch, plain, DenseFeatureConfig(name="c", column="b"), log, DenseFeatureConfig(name="d", column="i")).dense
    expected = [
        [0.5, 1, (math.log(4) - 0.5) / 2, 2**60],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
        [-2.25, 1, (-math.log(9) - 0.5) / 2, 0],
    ]
    assert found.dtype == np.float32 and np.allclose(found, expected)
    assert featurize(batch, feature_layout([], [])).dense.shape == (4, 0)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2)])
def test_dense_vectors(kind: pa.DataType) -> None:
    vectors = [[1, 2], None, [3, None], [5, 6], [7, 8]]
    vector = DenseFeatureConfig(name="v", column="x", size=2, mean=1)
    number = DenseFeatureConfig(name="n", column="y")
    expected = np.array([[0, 1, 1], [0, 0, 2], [2, 0, 3], [4, 5, 4], [6, 7, 5]])
    batch = pa.record_batch({"x": pa.array(vectors, kind), "y": [1, 2, 3, 4, 5]})
    for start, length in ((0, 5), (1, 2), (3, 2), (1, 1), (2, 0)):
        assert np.array_equal(read(batch.slice(start, length), vector, number).dense, expected[start : start + length])


@pytest.mark.parametrize(
    ("features", "groups", "message"),
    [
        ([ONE, ONE], [["t"]], "used more than once: f"),
        ([ONE], [["a"], ["b"]], "feature 'f' names the table 't'; tables there: a, b"),
        ([ONE], [["t", "left"]], "tables without a feature: left"),
        ([BucketFeatureConfig(name="f", column="x", boundaries=(1, 1), table="t")], [["t"]], "boundaries must ascend"),
        ([BucketFeatureConfig(name="f", column="x", boundaries=(2, 1), table="t")], [["t"]], "boundaries must ascend"),
        ([IdFeatureConfig(name="f", column="x", table="t", max_length=0)], [["t"]], "max_length must be at least 1"),
        ([DenseFeatureConfig(name="f", column="x", std=0)], [], "std above 0, got 1 and 0"),
        ([DenseFeatureConfig(name="f", column="x", size=0)], [], "size must be at least 1"),
    ],
)
def test_layouts_that_cannot_be(features: list[FeatureConfig], groups: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_layout(features, groups)


WEIGHTED = IdFeatureConfig(name="f", column="x", table="t", max_length=2, weight_column="w")
LIST = pa.array([[1], [2, 3]])


@pytest.mark.parametrize(
    ("columns", "feature", "message"),
    [
        ({"y": [1]}, ONE, "feature 'f' needs the column 'x'; columns there: y"),
        ({"x": [1.5]}, ONE, "feature 'f' needs int64 or string ids in 'x', which is double"),
        ({"x": pa.array([{"a": 1}])}, ONE, "needs int64 or string ids in 'x', which is struct"),
        (
            {"x": LIST},
            CrossFeatureConfig(name="f", columns=("x",), table="t"),
            "needs int64 or string ids in 'x', which is list",
        ),
        ({"x": ["a"]}, BucketFeatureConfig(name="f", column="x", boundaries=(), table="t"), "needs numbers in column 'x'"),
        ({"x": LIST}, BucketFeatureConfig(name="f", column="x", boundaries=(), table="t"), "which is list"),
        ({"y": [1]}, TimeFeatureConfig(name="f", unit="hour", table="t"), "needs the column 'event_time_ms'"),
        ({"x": LIST}, WEIGHTED, "feature 'f' needs the column 'w'"),
        ({"x": LIST, "w": [1.0, 2.0]}, WEIGHTED, "lists of weights in 'w' must be as long as those of ids in 'x'"),
        ({"x": LIST, "w": pa.array([[1.0, 2.0], [3.0]])}, WEIGHTED, "must be as long"),
        ({"x": LIST, "w": pa.array([[1.0], None])}, WEIGHTED, "must be as long"),
        ({"x": LIST, "w": pa.array([["a"], ["b", "c"]])}, WEIGHTED, "needs numbers in column 'w'"),
        ({"x": [1, 2]}, DenseFeatureConfig(name="f", column="x", size=2), "size is 2, but column 'x' has an example with 1"),
        ({"x": pa.array([[1, 2, 3], [4]])}, DenseFeatureConfig(name="f", column="x", size=2), "an example with 3"),
        ({"x": pa.array([[1, 2, 3, 4], None])}, DenseFeatureConfig(name="f", column="x", size=2), "an example with 4"),
        ({"x": LIST}, DenseFeatureConfig(name="f", column="x"), "size is 1, but column 'x' has an example with 2"),
        ({"x": ["a"]}, DenseFeatureConfig(name="f", column="x"), "needs numbers in column 'x', which is string"),
    ],
)
def test_columns_that_cannot_be_read(columns: dict, feature: FeatureConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(pa.record_batch(columns), feature)


MIXED = (
    IdFeatureConfig(name="user", column="user", table="user"),
    IdFeatureConfig(name="name", column="name", table="name"),
    IdFeatureConfig(name="tags", column="tags", table="tag", max_length=2, weight_column="weights", combiner="mean"),
    CrossFeatureConfig(name="cross", columns=("user", "name", "flag"), table="user"),
    BucketFeatureConfig(name="bucket", column="number", boundaries=(0, 1), table="name"),
    TimeFeatureConfig(name="hour", unit="hour", table="user"),
    DenseFeatureConfig(name="number", column="number", scale="log"),
    DenseFeatureConfig(name="vector", column="vector", size=2),
)
ROW = st.fixed_dictionaries(
    {
        "user": st.one_of(st.none(), st.sampled_from([-1, 0, 5, 2**62])),
        "name": st.one_of(st.none(), st.text(max_size=3)),
        "flag": st.one_of(st.none(), st.booleans()),
        "tags": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=4)),
        "number": st.one_of(st.none(), st.floats(-5, 5)),
        "vector": st.one_of(st.none(), st.lists(st.floats(-5, 5), min_size=2, max_size=2)),
        "event_time_ms": st.integers(0, 10**12),
    }
)
SCHEMA = pa.schema(
    {
        **{"user": pa.int64(), "name": pa.string(), "flag": pa.bool_(), "tags": pa.list_(pa.int64())},
        **{"number": pa.float64(), "vector": pa.list_(pa.float64()), "event_time_ms": pa.int64()},
        "weights": pa.list_(pa.float32()),
    }
)


@settings(deadline=None, max_examples=50)
@given(st.lists(ROW, min_size=1, max_size=8), st.integers(0, 8))
def test_a_batch_gives_what_its_rows_give(rows: list[dict], first: int) -> None:
    for index, row in enumerate(rows):
        row["weights"] = row["tags"] and [0.5 * index + k for k in range(len(row["tags"]))]
    layout = feature_layout(MIXED, [["user", "name"], ["tag"]])
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    whole = _leaves(featurize(batch, layout))
    for start in range(len(rows)):
        for one in (batch.slice(start, 1), pa.RecordBatch.from_pylist(rows[start : start + 1], SCHEMA)):
            for leaf, expected in zip(_leaves(featurize(one, layout)), whole, strict=True):
                assert np.array_equal(leaf, expected[start : start + 1])
    for leaf, expected in zip(_leaves(featurize(batch.slice(first), layout)), whole, strict=True):
        assert np.array_equal(leaf, expected[first:])


def _leaves(features: Features) -> list[np.ndarray]:
    weights = [weights for weights in features.weights if weights is not None]
    return [*(leaf for group in features.groups for leaf in group), *weights, features.dense]


def test_a_restricted_layout_gives_the_same_ids_of_fewer_features() -> None:
    features = [
        IdFeatureConfig(name="user", column="user_id", table="user"),
        IdFeatureConfig(name="tags", column="tag_id", table="tag", max_length=2),
        IdFeatureConfig(name="video", column="video_id", table="video"),
        DenseFeatureConfig(name="duration", column="duration_ms"),
        DenseFeatureConfig(name="age", column="age"),
    ]
    layout = feature_layout(features, [["user", "video"], ["tag"]])
    of_video = restricted(layout, ["tags", "video", "age"])
    examples = pa.RecordBatch.from_pydict(
        {"user_id": [1, 2], "tag_id": [[5, 6], [7]], "video_id": [8, 9], "duration_ms": [1.0, 2.0], "age": [3.0, 4.0]}
    )
    found = featurize(examples, of_video)
    np.testing.assert_array_equal(found.groups[0].ids, [[8], [9]])
    np.testing.assert_array_equal(found.groups[1].ids, [[5, 6], [7, 0]])
    np.testing.assert_array_equal(found.dense, [[3.0], [4.0]])
    assert restricted(layout, ["user"]).num_positions(1) == 0
    with pytest.raises(ValueError, match="no feature sound"):
        restricted(layout, ["sound"])
