"""Intervals: the same as resampling example by example, and they hold what they should hold as often as they say."""

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error, roc_auc_score

from monolith_jax.evaluate import bootstrap, metrics


def sample(users: int, each: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scores, labels and users, whose examples are alike."""
    rng = np.random.default_rng(seed)
    of = np.repeat(rng.permutation(users) * 7 - 3, each)
    own = np.repeat(rng.normal(size=users), each)
    labels = own + rng.normal(size=of.size) > 0.3
    scores = 1 / (1 + np.exp(-(0.5 * own + 0.5 * labels + rng.normal(size=of.size))))
    return (np.round(scores, 1) if ties else scores).astype(np.float32), labels.astype(np.float32), of


def naive(scores: np.ndarray, labels: np.ndarray, users: np.ndarray, number: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the metrics of resamples that are written out: a user drawn twice is two users with the same examples."""
    names, rows = np.unique(users), []
    for count in bootstrap.counts(names.size, number, seed):
        drawn = [(user, copy) for user, times in zip(names, count.astype(int), strict=True) for copy in range(times)]
        at = np.concatenate([np.flatnonzero(users == user) for user, _ in drawn])
        groups = np.concatenate([np.full((users == user).sum(), number) for number, (user, _) in enumerate(drawn)])
        x, y = scores[at], labels[at]
        of_one = metrics.log_loss(x, y), metrics.normalised_entropy(x, y), metrics.calibration(x, y)
        rows.append((metrics.auc(x, y), metrics.gauc(x, y, groups)[0], *of_one))
    return dict(zip(bootstrap.METRICS["binary"], np.array(rows).T, strict=True))


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_resampling_written_out(ties: bool) -> None:
    scores, labels, users = sample(9, 6, 5, ties)
    got, wanted = bootstrap.of_head(scores, labels, users, number=40, seed=11), naive(scores, labels, users, 40, 11)
    assert tuple(got) == bootstrap.METRICS["binary"]
    for name, interval in got.items():
        there = wanted[name][~np.isnan(wanted[name])]
        assert interval[1:] == pytest.approx(np.quantile(there, (0.025, 0.975)).tolist(), rel=1e-6), name


def test_values_are_those_of_all_examples_and_of_scikit_learn() -> None:
    scores, labels, users = sample(50, 8, 1)
    got = bootstrap.of_head(scores, labels, users, number=0)
    assert got["auc"].value == pytest.approx(roc_auc_score(labels, scores))
    assert got["log_loss"].value == pytest.approx(log_loss(labels, scores.astype(np.float64)))
    base = log_loss(labels, np.full(labels.size, labels.mean()))
    assert got["normalised_entropy"].value == pytest.approx(got["log_loss"].value / base)
    assert got["gauc"].value == pytest.approx(metrics.gauc(scores, labels, users)[0])
    assert got["calibration"].value == pytest.approx(scores.mean() / labels.mean(), rel=1e-5)
    assert math.isnan(got["auc"].low) and math.isnan(got["auc"].high)
    values = bootstrap.of_head(scores, labels * 3, users, "regression", number=20)
    assert values["mae"].value == pytest.approx(mean_absolute_error(labels * 3, scores))
    assert values["rmse"].value == pytest.approx(math.sqrt(mean_squared_error(labels * 3, scores)))
    assert values["mae"].low < values["mae"].value < values["mae"].high


def test_the_order_of_examples_and_what_users_are_called_change_nothing() -> None:
    scores, labels, users = sample(30, 4, 2)
    order = np.random.default_rng(0).permutation(scores.size)
    one = bootstrap.of_head(scores, labels, users, number=30)
    other = bootstrap.of_head(scores[order], labels[order], users[order] * 5 + 1, number=30)
    for name, interval in one.items():
        assert other[name] == pytest.approx(interval)
    assert one != bootstrap.of_head(scores, labels, users, number=30, seed=1)


def test_means_of_users() -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0])
    got = bootstrap.of_means({"recall": values, "nothing": np.full(4, math.nan)}, number=60, seed=4)
    drawn = []
    for count in bootstrap.counts(4, 60, 4):
        at = np.repeat(np.arange(4), count.astype(int))
        there = values[at][~np.isnan(values[at])]
        drawn += [there.mean()] if there.size else []
    assert got["recall"] == pytest.approx((3.0, *np.quantile(drawn, (0.025, 0.975))))
    assert all(math.isnan(value) for value in got["nothing"])


def test_undefined_is_not_a_number() -> None:
    none = np.zeros(0)
    assert all(math.isnan(one) for interval in bootstrap.of_head(none, none, none).values() for one in interval)
    one_class = bootstrap.of_head(np.array([0.2, 0.4]), np.array([0, 0]), np.array([1, 2]), number=5)
    assert math.isnan(one_class["auc"].value) and math.isnan(one_class["calibration"].value)
    assert one_class["log_loss"].value > 0


def test_what_makes_no_sense_is_refused() -> None:
    one = np.array([0.5])
    with pytest.raises(ValueError, match="confidence between 0 and 1"):
        bootstrap.of_head(one, one, one, confidence=1.0)
    with pytest.raises(ValueError, match="one of binary, regression"):
        bootstrap.of_head(one, one, one, "ordinal")
    with pytest.raises(ValueError, match=r"users \[N\]"):
        bootstrap.of_head(one, one, np.array([1, 2]))
    with pytest.raises(ValueError, match="of one length"):
        bootstrap.of_means({"a": one, "b": np.zeros(2)})


def held(worlds: int, users: int, number: int) -> tuple[int, int]:
    """Returns in how many worlds the interval of the AUC holds the truth, drawing users, and drawing examples."""
    truth = metrics.auc(*sample(60_000, 10, 10_000)[:2])
    of_users = of_examples = 0
    for seed in range(worlds):
        scores, labels, groups = sample(users, 10, seed)
        for alone in (False, True):
            who = np.arange(scores.size) if alone else groups
            _, low, high = bootstrap.of_head(scores, labels, who, number=number, seed=seed)["auc"]
            of_examples += alone and low <= truth <= high
            of_users += (not alone) and low <= truth <= high
    return of_users, of_examples


@pytest.mark.slow
def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    of_users, of_examples = held(worlds=200, users=100, number=300)
    assert 0.90 <= of_users / 200 <= 0.985
    assert of_examples < of_users - 10, "examples drawn one by one give intervals that are too narrow"
