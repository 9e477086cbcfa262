"""The metrics equal scikit-learn's or a plain loop; the streaming AUC is exact, then within its own bound."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from monolith_jax.evaluate import metrics

SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-38, 1e-45, 3.4e38, -3.4e38, float(np.nextafter(np.float32(0.5), np.float32(1)))]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
EXAMPLES = st.lists(st.tuples(SCORE, st.booleans()), min_size=1, max_size=60)


def _arrays(examples: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = zip(*examples, strict=True)
    return np.array(scores, np.float32), np.array(labels, np.float32)


def _reference(scores: np.ndarray, labels: np.ndarray) -> float:
    return roc_auc_score(labels, scores.astype(np.float64)) if 0 < labels.sum() < labels.size else float("nan")


@settings(deadline=None)
@given(EXAMPLES)
def test_auc_equals_scikit_learn(examples: list[tuple[float, bool]]) -> None:
    scores, labels = _arrays(examples)
    np.testing.assert_allclose(metrics.auc(scores, labels), _reference(scores, labels), rtol=1e-12)


@settings(deadline=None)
@given(EXAMPLES, st.integers(0, 2**32 - 1))
def test_weighted_auc_equals_scikit_learn(examples: list[tuple[float, bool]], seed: int) -> None:
    scores, labels = _arrays([*examples, (0.1, True), (0.2, False)])
    weights = np.random.default_rng(seed).uniform(0.1, 3, scores.size)
    wanted = roc_auc_score(labels, scores.astype(np.float64), sample_weight=weights)
    np.testing.assert_allclose(metrics.auc(scores, labels, weights), wanted, rtol=1e-10)


@settings(deadline=None)
@given(EXAMPLES, st.integers(1, 20))
def test_streaming_auc_equals_scikit_learn_in_any_batches(examples: list[tuple[float, bool]], batch: int) -> None:
    scores, labels = _arrays(examples)
    stream = metrics.StreamingAuc()
    for start in range(0, scores.size, batch):
        stream.add(scores[start : start + batch], labels[start : start + batch])
        stream.value()  # reading in between changes nothing
    np.testing.assert_allclose(stream.value(), _reference(scores, labels), rtol=1e-12)
    assert stream.examples == scores.size
    assert not stream.error_bound() > 0


@settings(deadline=None)
@given(EXAMPLES, st.integers(2, 12))
def test_error_bound_holds_when_scores_are_joined(examples: list[tuple[float, bool]], max_scores: int) -> None:
    scores, labels = _arrays([*examples, (0.25, True), (0.75, False)])
    stream = metrics.StreamingAuc(max_scores)
    for start in range(0, scores.size, 7):
        stream.add(scores[start : start + 7], labels[start : start + 7])
    assert abs(stream.value() - _reference(scores, labels)) <= stream.error_bound() + 1e-12
    assert stream.get_state()["low"].size <= max_scores


def test_error_bound_is_small_for_many_scores_and_zero_for_ties() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(200_000, dtype=np.float32)
    labels = rng.random(scores.size) < scores
    stream = metrics.StreamingAuc(2**14)
    stream.add(scores, labels)
    assert 0 < stream.error_bound() < 2e-4
    assert abs(stream.value() - roc_auc_score(labels, scores)) < stream.error_bound()

    tied = np.where(scores < 0.5, np.float32(0.1), np.float32(0.9))
    stream = metrics.StreamingAuc(2)
    stream.add(np.array([0.10001, 0.90001, 0.5], np.float32), np.array([0, 0, 0], np.float32))
    stream.add(np.zeros(0, np.float32), np.zeros(0))
    exact = metrics.StreamingAuc(2)
    exact.add(tied, labels)
    assert exact.error_bound() == 0
    np.testing.assert_allclose(exact.value(), roc_auc_score(labels, tied), rtol=1e-12)


@settings(deadline=None)
@given(st.lists(EXAMPLES, min_size=2, max_size=4), st.randoms(use_true_random=False), st.sampled_from([2, 5, 1000]))
def test_merge_gives_the_same_in_any_order(parts: list[list[tuple[float, bool]]], random: Random, max_scores: int) -> None:
    def merged(order: list[list[tuple[float, bool]]]) -> metrics.StreamingAuc:
        out = metrics.StreamingAuc(max_scores)
        for part in order:
            one = metrics.StreamingAuc(max_scores)
            one.add(*_arrays(part))
            out.merge(one)
            assert one.examples == len(part)
        return out

    shuffled = random.sample(parts, len(parts))
    a, b = merged(parts), merged(shuffled)
    at_once = metrics.StreamingAuc(max_scores)
    at_once.add(*_arrays([example for part in parts for example in part]))
    for name, array in a.get_state().items():
        np.testing.assert_array_equal(array, b.get_state()[name])
        np.testing.assert_array_equal(array, at_once.get_state()[name])


@pytest.mark.parametrize("max_scores", [50, 10_000])
def test_state_goes_on_where_it_was(max_scores: int) -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=3000).astype(np.float32), rng.random(3000) < 0.3
    whole, first, second = (metrics.StreamingAuc(max_scores) for _ in range(3))
    whole.add(scores, labels)
    first.add(scores[:1000], labels[:1000])
    state = first.get_state()
    first.add(scores[:7], labels[:7])  # the state is a copy
    second.set_state(state)
    second.add(scores[1000:], labels[1000:])
    assert second.value() == whole.value()
    assert second.error_bound() == whole.error_bound()


def _gauc_by_loop(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    weighted = counted = 0.0
    for group in np.unique(groups):
        here = groups == group
        if 0 < labels[here].sum() < here.sum():
            weighted += roc_auc_score(labels[here], scores[here].astype(np.float64)) * here.sum()
            counted += here.sum()
    return (weighted / counted if counted else float("nan")), counted / scores.size


@settings(deadline=None)
@given(st.lists(st.tuples(SCORE, st.booleans(), st.sampled_from([-(2**63), -1, 0, 7, 2**63 - 1])), min_size=1, max_size=60))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gauc_equals_a_loop_over_groups(dtype: type, examples: list[tuple[float, bool, int]]) -> None:
    scores, labels, groups = (np.array(column) for column in zip(*examples, strict=True))
    scores = scores.astype(dtype)  # Two numbers can become one.
    got = metrics.gauc(scores, labels, groups)
    np.testing.assert_allclose(got, _gauc_by_loop(scores, labels, groups), rtol=1e-12)


def test_log_loss_equals_scikit_learn_and_clips() -> None:
    rng = np.random.default_rng(2)
    p, y = rng.uniform(0.01, 0.99, 500), rng.random(500) < 0.4
    np.testing.assert_allclose(metrics.log_loss(p, y), sklearn_log_loss(y, p), rtol=1e-12)
    np.testing.assert_allclose(
        metrics.log_loss(np.array([0, 1], np.float32), np.array([1, 0], np.float32)), -np.log(1e-7), rtol=1e-6
    )


def test_normalised_entropy_of_the_mean_is_one() -> None:
    y = np.repeat([1.0, 0.0], [30, 70])
    np.testing.assert_allclose(metrics.normalised_entropy(np.full(100, 0.3), y), 1.0, rtol=1e-12)
    assert metrics.normalised_entropy(y * 0.8 + 0.1, y) < 0.5


def test_calibration_and_its_bins() -> None:
    rng = np.random.default_rng(3)
    p = rng.random(40_000)
    y = rng.random(p.size) < p / 2
    np.testing.assert_allclose(metrics.calibration(p, y), 2, rtol=0.03)
    bins = metrics.calibration_bins(p, y, 10)
    np.testing.assert_allclose(bins.label, bins.prediction / 2, atol=0.03)
    assert bins.examples.tolist() == [4000] * 10
    assert metrics.calibration_bins(p[:3], y[:3]).examples.tolist() == [1, 1, 1]


def test_regression_errors() -> None:
    predictions, labels = np.array([1, 2, 5], np.float32), np.array([1, 4, 1], np.float32)
    np.testing.assert_allclose(metrics.mean_absolute_error(predictions, labels), 2)
    np.testing.assert_allclose(metrics.root_mean_squared_error(predictions, labels), np.sqrt(20 / 3))


def test_nothing_gives_nan() -> None:
    none = np.zeros(0, np.float32)
    for metric in (metrics.auc, metrics.log_loss, metrics.calibration, metrics.normalised_entropy):
        assert np.isnan(metric(none, none)), metric
    for metric in (metrics.mean_absolute_error, metrics.root_mean_squared_error):
        assert np.isnan(metric(none, none)), metric
    assert np.isnan(metrics.gauc(none, none, none)).all()
    assert np.isnan(metrics.StreamingAuc().value())
    assert np.isnan(metrics.StreamingAuc().error_bound())
    assert metrics.calibration_bins(none, none).examples.size == 0
    assert np.isnan(metrics.calibration(np.ones(3), np.zeros(3)))


def test_bad_input_is_refused() -> None:
    scores, labels = np.array([0.1, np.nan], np.float32), np.array([0, 1], np.float32)
    for call in (metrics.auc, metrics.StreamingAuc().add, lambda s, y: metrics.gauc(s, y, y)):
        with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
            call(scores, labels)
        with pytest.raises(ValueError, match="one shape"):
            call(scores[:1], np.array([0, 1, 1], np.float32))
    with pytest.raises(ValueError, match="max_scores"):
        metrics.StreamingAuc(1)
    with pytest.raises(ValueError, match="bins"):
        metrics.calibration_bins(labels, labels, 0)
