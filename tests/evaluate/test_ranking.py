"""Tables of scored examples: the figures are scikit-learn's, and the segments are what they say."""

import math

import numpy as np
import pyarrow as pa
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from monolith_jax.evaluate import ranking
from monolith_jax.evaluate.ranking import Scored, segment

HEADS = (("like", "binary"), ("play", "regression"))


def scored(number: int = 400, seed: int = 0) -> Scored:
    rng = np.random.default_rng(seed)
    scores = rng.random((number, 2)).astype(np.float32)
    labels = np.stack([rng.random(number) < scores[:, 0], scores[:, 1] + rng.normal(size=number)], 1).astype(np.float32)
    masks = (rng.random((number, 2)) < 0.8).astype(np.float32)
    return Scored(np.arange(number), rng.integers(0, 30, number), scores, labels, masks)


def test_rows_hold_the_metrics_of_their_examples() -> None:
    examples = scored()
    tags = segment("tag_id", pa.array(examples.users % 3))
    rows = ranking.table(examples, HEADS, [tags], number=30)
    assert [(row["segment"], row["value"], row["head"]) for row in rows[:2]] == [("all", "", "like"), ("all", "", "play")]
    assert len(rows) == 2 + 3 * 2
    for row in rows:
        of_tag = True if row["segment"] == "all" else examples.users % 3 == int(row["value"])
        head = [name for name, _ in HEADS].index(row["head"])
        there = (examples.masks[:, head] != 0) & of_tag
        x, y = examples.scores[there, head].astype(np.float64), examples.labels[there, head]
        assert row["examples"] == there.sum() and row["users"] == np.unique(examples.users[there]).size
        if head:
            assert row["rmse"] == pytest.approx(math.sqrt(np.square(x - y).mean()), rel=1e-5) and "auc" not in row
            continue
        assert row["positives"] == y.sum()
        assert row["auc"] == pytest.approx(roc_auc_score(y, x)) and row["log_loss"] == pytest.approx(log_loss(y, x))
        assert row["auc_low"] < row["auc"] < row["auc_high"]


def test_the_reliability_curve_is_that_of_scikit_learn() -> None:
    examples = scored(1000)
    rows = [row for row in ranking.reliability(examples, HEADS, 5) if row["head"] == "like"]
    there = examples.masks[:, 0] != 0
    right, predicted = calibration_curve(examples.labels[there, 0], examples.scores[there, 0], n_bins=5, strategy="quantile")
    assert sum(row["examples"] for row in rows) == there.sum()
    assert [row["prediction"] for row in rows] == pytest.approx(predicted.tolist(), abs=0.01)
    assert [row["label"] for row in rows] == pytest.approx(right.tolist(), abs=0.02)


def test_undefined_is_none() -> None:
    rows = ranking.table(scored()._replace(masks=np.zeros((400, 2), np.float32)), HEADS, number=5)
    assert rows[0]["examples"] == 0 and rows[0]["auc"] is None and rows[1]["rmse_low"] is None


def test_names_are_told_apart_by_how_frequent_they_are() -> None:
    one = segment("device", pa.array(["a", "b", "b", None, "c", "c", "c", "d"]), most=2)
    assert one.values == ("c", "b", "other", "none")
    assert one.codes.tolist() == [2, 1, 1, 3, 0, 0, 0, 2]
    assert segment("is_new", pa.array([True, False, True])).values == ("True", "False")
    assert segment("author_id", pa.array(np.arange(100)), most=3).values[-1] == "other"
    of_lists = segment("tag_id", pa.array([[3, 4], [], None, [3]]))
    assert of_lists.values == ("3", "none") and of_lists.codes.tolist() == [0, 1, 1, 0]


def test_names_of_segments_are_told_apart() -> None:
    large = segment("upload_ms", pa.array(1_650_000_000_000 + np.arange(100)))
    assert len(set(large.values)) == 4 and large.values[1] == "1650000000025 to 1650000000050"
    one = segment("device", pa.array(["none", "none", "none", "other", "other", None, "a"]), most=2)
    assert one.values == ("'none'", "'other'", "other", "none") and one.codes.tolist() == [0, 0, 0, 1, 1, 3, 2]


def test_hours_are_those_of_event_time() -> None:
    one = ranking.hours(np.array([7_200_000, 3_599_999, 0]))
    assert one.values == ("1970-01-01T00", "1970-01-01T02") and one.codes.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="hold out a shorter time"):
        ranking.hours(np.arange(2000) * 3_600_000)


def test_amounts_are_cut_into_parts_of_equal_size() -> None:
    one = segment("duration_ms", pa.array(np.arange(100)))
    assert one.values == ("< 25", "25 to 50", "50 to 75", ">= 75")
    assert np.bincount(one.codes).tolist() == [25] * 4
    tied = segment("ratio", pa.array([0.0] * 9 + [1.0, math.nan]))
    assert sum(np.bincount(tied.codes)) == 11 and tied.values[-1] == "none"
    assert segment("ratio", pa.array([2.0, 2.0])).values == ("2",)
    assert segment("ratio", pa.array([], pa.float64())).values == ()


def test_what_does_not_fit_is_refused() -> None:
    examples = scored()
    with pytest.raises(ValueError, match=r"expected scores, labels and masks \[400, 1\]"):
        ranking.table(examples, HEADS[:1])
    broken = examples.scores.copy()
    broken[np.flatnonzero(examples.masks[:, 0])[0], 0] = np.nan
    with pytest.raises(ValueError, match="1 times a score is not finite"):
        ranking.reliability(examples._replace(scores=broken), HEADS)
    with pytest.raises(ValueError, match="there are 400 examples"):
        ranking.table(examples, HEADS, [segment("a", pa.array([1]))])
    with pytest.raises(ValueError, match="takes strings, numbers"):
        segment("when", pa.array([1], pa.timestamp("ms")))
