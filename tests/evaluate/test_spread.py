"""Means over seeds: against numbers worked out by hand and scipy's own interval."""

import math

import numpy as np
import pytest
from scipy import stats

from monolith_jax.evaluate.spread import paired, spread


def test_by_hand() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.number) == (2.0, 1.0, 3)
    # t of 2 degrees at 0.975 is 4.3027, over the root of 3.
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert not found.is_above and not found.is_below


def test_as_scipy_has_it() -> None:
    values = np.random.default_rng(0).normal(5, 2, 12)
    found = spread(values.tolist(), 0.9)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 11, values.mean(), stats.sem(values)))
    assert found.is_above and spread((-values).tolist()).is_below


def test_what_is_undefined_is_left_out() -> None:
    assert spread([1.0, math.nan, 3.0])[:2] == spread([1.0, 3.0])[:2] and spread([1.0, math.nan, 3.0]).number == 2
    one, none = spread([4.0]), spread([math.nan])
    assert one.mean == 4.0 and math.isnan(one.sd) and math.isnan(one.low) and not one.is_above
    assert none.number == 0 and math.isnan(none.mean)
    with pytest.raises(ValueError, match=r"confidence must be between 0 and 1, got 1\.5"):
        spread([1.0], 1.5)


def test_what_diverged_has_no_interval() -> None:
    for values, mean in (([1.0, math.inf], math.inf), ([-math.inf, 1.0, 2.0], -math.inf)):
        found = spread(values)
        assert found.mean == mean and found.number == len(values)
        assert math.isnan(found.sd) and math.isnan(found.low) and not found.is_above and not found.is_below
    assert math.isnan(spread([math.inf, -math.inf]).mean)
    assert paired({0: math.inf, 1: 2.0}, {0: math.inf, 1: 1.0})[::4] == (1.0, 1), "inf less inf is undefined"


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired({0: 1.5, 1: 12.5, 2: 7.0}, {1: 12.0, 0: 1.0, 3: 9.0})
    assert (found.mean, found.sd, found.number) == (0.5, 0.0, 2) and found.low == found.high == 0.5
    assert paired({0: 1.0}, {1: 1.0}).number == 0
