"""Prequential metrics: what counts in which period, what the rows say, and that a resumed run says the same."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from monolith_jax.evaluate import metrics
from monolith_jax.evaluate.prequential import Prequential, PrequentialConfig

Batch = tuple[np.ndarray, ...]
HOUR = 3_600_000
HEADS = [("complete", "binary"), ("play_ratio", "regression")]
START = 1_700_000_000_000 // HOUR * HOUR


def _stream(batches: int = 12, size: int = 200, seed: int = 0, hours: int = 4) -> Iterator[Batch]:
    """Yields batches of the columns that `add` takes, over some hours of event time, a little out of order."""
    rng = np.random.default_rng(seed)
    total = batches * size
    time = START + np.sort(rng.integers(0, hours * HOUR, total)) - rng.integers(0, HOUR // 20, total)
    time = np.maximum(time, START)
    best = rng.uniform(0.05, 0.95, (total, 2)).astype(np.float32)
    scores = np.clip(best + rng.normal(0, 0.1, best.shape), 0.01, 0.99).astype(np.float32)
    labels = np.stack([rng.random(total) < best[:, 0], best[:, 1] + rng.normal(0, 0.05, total)], 1).astype(np.float32)
    masks = (rng.random(best.shape) < 0.9).astype(np.float32)
    users = rng.integers(0, 20, total)
    for start in range(0, total, size):
        yield tuple(column[start : start + size] for column in (time, users, scores, labels, masks, best))


def _whole(batches: list[Batch]) -> list[np.ndarray]:
    return [np.concatenate(column) for column in zip(*batches, strict=True)]


def _run(
    config: PrequentialConfig | None = None, batches: list[Batch] | None = None, heads: list[tuple[str, str]] = HEADS
) -> tuple[Prequential, list[dict[str, Any]]]:
    prequential = Prequential(config or PrequentialConfig(), heads)
    rows = []
    for batch in batches or _stream():
        rows += prequential.add(*batch)
    return prequential, rows + prequential.close()


def test_rows_hold_the_metrics_of_their_hour() -> None:
    batches = list(_stream(batches=1, size=3000))  # in one batch nothing is late, so an hour is an hour
    _, rows = _run(batches=batches)
    time, users, scores, labels, masks, best = _whole(batches)
    hours = np.unique(time // HOUR)
    assert [(row["period_start_ms"] // HOUR, row["head"]) for row in rows] == [(h, name) for h in hours for name, _ in HEADS]
    for row in rows:
        head = [name for name, _ in HEADS].index(row["head"])
        here = (time // HOUR == row["period_start_ms"] // HOUR) & (masks[:, head] > 0)
        s, y, b = (column[here, head].astype(np.float64) for column in (scores, labels, best))
        assert row["kind"] == "period"
        assert row["examples"] == here.sum()
        assert row["late"] == 0
        np.testing.assert_allclose(row["calibration"], s.mean() / y.mean(), rtol=1e-9)
        if head:
            assert row["auc"] is None and row["positives"] is None
            np.testing.assert_allclose(row["mae"], np.abs(s - y).mean(), rtol=1e-9)
            np.testing.assert_allclose(row["rmse"], np.sqrt(np.square(s - y).mean()), rtol=1e-9)
            np.testing.assert_allclose(row["optimal_rmse"], np.sqrt(np.square(b - y).mean()), rtol=1e-9)
            continue
        assert row["positives"] == y.sum()
        assert row["mae"] is None
        np.testing.assert_allclose(row["auc"], roc_auc_score(y, s), rtol=1e-12)
        np.testing.assert_allclose([row["gauc"], row["gauc_share"]], metrics.gauc(s, y, users[here]), rtol=1e-12)
        np.testing.assert_allclose(row["log_loss"], log_loss(y, s), rtol=1e-9)
        np.testing.assert_allclose(row["optimal_auc"], roc_auc_score(y, b), rtol=1e-12)
        np.testing.assert_allclose(row["optimal_log_loss"], log_loss(y, b), rtol=1e-9)


def test_totals_are_of_the_whole_run_and_include_the_open_period() -> None:
    prequential = Prequential(PrequentialConfig(), HEADS)
    batches = list(_stream())
    for batch in batches:
        prequential.add(*batch)
    before = prequential.totals()
    _, _, scores, labels, masks, best = _whole(batches)
    here = masks[:, 0] > 0
    s, y, b = (column[here, 0].astype(np.float64) for column in (scores, labels, best))
    total = before["complete"]
    assert (total["kind"], total["head"], total["examples"]) == ("total", "complete", here.sum())
    np.testing.assert_allclose([total["auc"], total["optimal_auc"]], [roc_auc_score(y, s), roc_auc_score(y, b)], rtol=1e-12)
    assert total["auc_error"] == 0
    base = log_loss(y, np.full(y.size, y.mean()))
    np.testing.assert_allclose(total["base_log_loss"], base, rtol=1e-9)
    np.testing.assert_allclose(total["learned"], (base - log_loss(y, s)) / (base - log_loss(y, b)), rtol=1e-9)
    here = masks[:, 1] > 0
    s, y, b = (column[here, 1].astype(np.float64) for column in (scores, labels, best))
    reached, possible = np.square(s - y).mean(), np.square(b - y).mean()
    np.testing.assert_allclose(before["play_ratio"]["learned"], (y.var() - reached) / (y.var() - possible), rtol=1e-6)
    np.testing.assert_allclose(before["play_ratio"]["base_rmse"], y.std(), rtol=1e-9)
    prequential.close()
    assert prequential.totals() == before


def test_gauc_of_the_run_weighs_the_periods_by_examples() -> None:
    prequential, rows = _run()
    rows = [row for row in rows if row["head"] == "complete"]
    counted = [row["gauc_share"] * row["examples"] for row in rows]
    wanted = np.average([row["gauc"] for row in rows], weights=counted)
    np.testing.assert_allclose(prequential.totals()["complete"]["gauc"], wanted, rtol=1e-12)


@pytest.mark.parametrize("stop", range(0, 12, 3))
@pytest.mark.parametrize("config", [PrequentialConfig(), PrequentialConfig(max_examples=500, max_scores=64)])
def test_a_resumed_run_gives_the_same_rows(stop: int, config: PrequentialConfig) -> None:
    batches = list(_stream())
    whole, wanted = _run(config, batches)
    first = Prequential(config, HEADS)
    rows = [row for batch in batches[:stop] for row in first.add(*batch)]
    state = first.get_state()
    assert all(isinstance(array, np.ndarray) and array.size for array in state.values())
    first.add(*batches[stop])  # what happens after the snapshot does not reach into it
    second = Prequential(config, HEADS)
    second.set_state(state)
    rows += [row for batch in batches[stop:] for row in second.add(*batch)]
    assert rows + second.close() == wanted
    assert second.totals() == whole.totals()


def test_padding_and_masked_labels_do_not_count() -> None:
    batches = list(_stream())
    _, wanted = _run(batches=batches)
    padded = []
    for time, users, scores, labels, masks, best in batches:
        labels = np.where(masks > 0, labels, np.nan)  # behind a mask anything may stand
        scores = np.where(masks > 0, scores, np.nan)
        short = [time, users, scores, labels, masks, best]
        filler = (9 * 10**15, 0, np.nan, 0, 0, np.nan)
        pads = [np.full((5, *column.shape[1:]), value, column.dtype) for column, value in zip(short, filler, strict=True)]
        padded.append(tuple(np.concatenate(pair) for pair in zip(short, pads, strict=True)))
    assert _run(batches=padded)[1] == wanted


def _one(
    prequential: Prequential, time: int, score: float = 0.5, label: float = 1.0, optimal: float | None = None
) -> list[dict[str, Any]]:
    best = None if optimal is None else np.full((1, 1), optimal, np.float32)
    scores, labels, masks = (np.full((1, 1), value, np.float32) for value in (score, label, 1))
    return prequential.add(np.array([time]), np.array([1]), scores, labels, masks, best)


def test_late_examples_count_in_the_open_period() -> None:
    prequential = Prequential(PrequentialConfig(), [("like", "binary")])
    assert _one(prequential, START + 5) == []
    (row,) = _one(prequential, START + 3 * HOUR)
    assert (row["period_start_ms"], row["examples"], row["late"]) == (START, 1, 0)
    assert _one(prequential, START + 6) == []
    assert _one(prequential, START + 3 * HOUR + 1) == []
    (row,) = prequential.close()  # no rows for the hours without examples
    assert (row["period_start_ms"], row["examples"], row["late"]) == (START + 3 * HOUR, 3, 1)
    assert prequential.close() == []
    assert prequential.totals()["like"]["late"] == 1


def test_one_batch_may_close_several_periods() -> None:
    prequential = Prequential(PrequentialConfig(period_s=0.5), [("like", "binary")])
    time = np.array([2600, 100, 700, 200, 1400])
    ones = np.ones((5, 1), np.float32)
    rows = prequential.add(time, time, ones / 2, ones, ones, None)
    assert [(row["period_start_ms"], row["examples"]) for row in rows] == [(0, 2), (500, 1), (1000, 1)]
    assert rows[0]["auc"] is None  # one class only
    assert rows[0]["optimal_auc"] is None


def test_optimal_scores_may_be_unknown_in_part() -> None:
    prequential = Prequential(PrequentialConfig(), [("like", "binary")])
    for at, (score, label, best) in enumerate([(0.4, 1, None), (0.6, 1, 0.9), (0.7, 0, 0.2), (0.1, 0, np.nan)]):
        _one(prequential, START + at, score, label, best)
    total = prequential.totals()["like"]
    assert (total["auc"], total["optimal_auc"]) == (0.5, 1.0)
    np.testing.assert_allclose(total["optimal_log_loss"], -np.log([0.9, 0.8]).mean(), rtol=1e-6)
    reached = -np.log([0.6, 0.3]).mean()  # learned compares on the same examples
    np.testing.assert_allclose(total["learned"], (np.log(2) - reached) / (np.log(2) + np.log([0.9, 0.8]).mean()), rtol=1e-6)


def test_large_periods_stay_within_memory_and_bound() -> None:
    config = PrequentialConfig(max_examples=300, max_scores=100)
    prequential, rows = _run(config)
    exact, wanted = _run()
    for row, full in zip(rows, wanted, strict=True):
        assert row["examples"] == full["examples"]
        for name in ("log_loss", "calibration", "rmse"):
            assert row[name] == (full[name] and pytest.approx(full[name], rel=1e-9))
    total = prequential.totals()["complete"]
    assert 0 < abs(total["auc"] - exact.totals()["complete"]["auc"]) <= total["auc_error"] < 0.02
    assert max(array.size for array in prequential.get_state().values()) <= 300


def test_state_of_other_heads_is_refused() -> None:
    prequential = Prequential(PrequentialConfig(), HEADS)
    for other in (Prequential(PrequentialConfig(), HEADS[:1]), Prequential(PrequentialConfig(period_s=60), HEADS)):
        with pytest.raises(ValueError, match="same heads and period"):
            other.set_state(prequential.get_state())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="binary, regression"):
        Prequential(PrequentialConfig(), [("like", "ordinal")])
    with pytest.raises(ValueError, match="different names"):
        Prequential(PrequentialConfig(), [("like", "binary"), ("like", "binary")])
    for wrong in ({"period_s": 0}, {"max_examples": 0}, {"max_scores": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PrequentialConfig(**wrong)
    prequential = Prequential(PrequentialConfig(), [("like", "binary")])
    with pytest.raises(ValueError, match=r"not finite, for like \(1\)"):
        _one(prequential, START, score=float("nan"))
    with pytest.raises(ValueError, match=r"labels \(3, 1\)"):
        prequential.add(np.zeros(2, int), np.zeros(2, int), np.zeros((2, 1)), np.zeros((3, 1)), np.ones((2, 1)))
    assert prequential.close() == []
