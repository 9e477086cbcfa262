from collections.abc import Sequence

import pyarrow as pa
import pytest

from monolith_jax.stream.events import ACTIONS, DERIVED_LABELS, EXAMPLE, IMPRESSION, OUTCOME, labels, valid_mask


def derived(name: str, play_ms: Sequence[int | None], duration_ms: Sequence[int | None]) -> list[float | None]:
    batch = pa.record_batch({"play_time_ms": pa.array(play_ms, pa.int64()), "duration_ms": pa.array(duration_ms, pa.int64())})
    values, masks = labels(batch, [name])
    assert values.shape == masks.shape == (len(play_ms), 1) and values.dtype == masks.dtype == "float32"
    assert not values[masks == 0].any(), "an undefined label is 0"
    return [value if mask else None for value, mask in zip(values[:, 0].tolist(), masks[:, 0].tolist(), strict=True)]


@pytest.mark.parametrize(
    ("name", "play_ms", "duration_ms", "expected"),
    [
        ("complete", [18_999, 19_000, 19_001, 0], [20_000] * 4, [0, 1, 1, 0]),
        ("rewatch", [14_999, 15_000, 40_000], [10_000] * 3, [0, 1, 1]),
        # Short videos count when they are seen to the end, long ones from 18 s on.
        ("long_view", [9_999, 10_000, 17_999, 18_000, 17_999, 18_000], [10_000] * 2 + [18_000] * 2 + [60_000] * 2, [0, 1] * 3),
        ("skip", [0, 2_999, 3_000, 90_000], [60_000, None, 0, -5], [1, 1, 0, 0]),
        ("play_ratio", [0, 5_000, 10_000, 49_999, 50_000, 10**9], [10_000] * 6, [0, 0.5, 1, 4.9999, 5, 5]),
    ],
)
def test_border_values(name: str, play_ms: list, duration_ms: list, expected: list[float]) -> None:
    assert derived(name, play_ms, duration_ms) == pytest.approx(expected)


def test_the_border_of_complete_is_exact_for_every_duration() -> None:
    durations = [*range(20, 400_001, 20)]
    least = [duration // 20 * 19 for duration in durations]
    assert derived("complete", [*least, *(play - 1 for play in least)], durations * 2) == [1] * len(least) + [0] * len(least)


@pytest.mark.parametrize("name", ["complete", "rewatch", "long_view", "play_ratio"])
def test_without_a_duration_or_a_play_time_there_is_no_label(name: str) -> None:
    expected = [None, None, None, None, derived(name, [7], [1])[0]]
    assert derived(name, [7, 7, 7, None, 7], [None, 0, -1, 1, 1]) == expected


def test_skip_needs_the_play_time_alone() -> None:
    assert derived("skip", [None, 5], [9, None]) == [None, 1]
    values, masks = labels(pa.record_batch({"play_time_ms": [5]}), ["skip"])
    assert values.tolist() == masks.tolist() == [[1]]


def test_columns_are_labels() -> None:
    batch = pa.record_batch(
        {
            "like": [True, False, None],
            "count": pa.array([2, 0, -3]),
            "rating": [0.5, float("nan"), None],
            "huge": pa.array([2**62 + 1, None, 0]),
        }
    )
    values, masks = labels(batch, ["like", "count", "rating", "huge"])
    assert values.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert masks.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]]
    sliced = [array.tolist() for array in labels(batch.slice(1, 1), ["huge", "like"])]
    assert sliced == [[[0, 0]], [[0, 1]]]
    assert [array.shape for array in labels(batch.slice(3), ["like", "count"])] == [(0, 2)] * 2
    assert [array.shape for array in labels(batch, [])] == [(3, 0)] * 2


def test_clear_errors() -> None:
    batch = pa.record_batch({"play_time_ms": [5], "like": [True], "title": ["x"], "tags": pa.array([[1]])})
    with pytest.raises(ValueError, match=r"label needs the column 'follow', which the source does not yield; .*complete.*like"):
        labels(batch, ["follow"])
    with pytest.raises(ValueError, match="label needs the column 'duration_ms'"):
        labels(batch, ["complete"])
    for name, kind in (("title", "string"), ("tags", "list")):
        with pytest.raises(ValueError, match=f"label needs numbers or booleans in column '{name}', which is {kind}"):
            labels(batch, [name])


def test_an_example_is_an_impression_and_its_outcome() -> None:
    assert EXAMPLE.names == [*IMPRESSION.names, *OUTCOME.names] and len(set(EXAMPLE.names)) == len(EXAMPLE.names)
    assert set(ACTIONS) <= set(OUTCOME.names) and not set(DERIVED_LABELS) & set(EXAMPLE.names)
    # A batch with nothing known has no labels but can be read.
    nulls = pa.RecordBatch.from_pylist([{"event_time_ms": 1, "user_id": 1, "video_id": 1}], EXAMPLE)
    names = [*DERIVED_LABELS, *ACTIONS]
    assert not labels(nulls, names)[1].any()


def test_valid_mask_of_slices() -> None:
    array = pa.array([None, 1, None, 2, *[3] * 9])
    assert valid_mask(array.slice(1, 3)).tolist() == [True, False, True]
    assert valid_mask(array.slice(4)).all() and valid_mask(array.slice(2, 0)).shape == (0,)
