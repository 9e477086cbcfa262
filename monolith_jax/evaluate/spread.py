"""Figures of several seeds to a mean and what it is worth. In: one value a seed, NaN where it is undefined. Out: a `Spread`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Spread(NamedTuple):
    """A mean over seeds."""

    mean: float
    """NaN where no value is defined."""
    sd: float
    """Standard deviation of a sample; NaN of one value, and where the mean is not finite."""
    low: float
    """Where the interval of the mean begins; NaN where `sd` is."""
    high: float
    """Where it ends."""
    number: int
    """Of defined values."""

    @property
    def is_above(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def is_below(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0


def spread(values: Sequence[float], confidence: float = 0.95) -> Spread:
    """Returns the mean with Student's interval: what means of as many seeds would hold in a share `confidence` of cases.

    Args:
        values: One a seed; NaN is left out. One that is infinite (a loss that diverged) makes the mean so, without interval.
        confidence: In (0, 1).

    Raises:
        ValueError: `confidence` is no share.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    there = np.asarray([value for value in values if not math.isnan(value)], np.float64)
    number, nan = there.size, math.nan
    if number < 2:
        return Spread(float(there[0]) if number else nan, nan, nan, nan, number)
    if not np.isfinite(there).all():
        return Spread(sum(there.tolist()), nan, nan, nan, number)
    mean, sd = float(there.mean()), float(there.std(ddof=1))
    half = _quantile((1 + confidence) / 2, number - 1) * sd / math.sqrt(number)
    return Spread(mean, sd, mean - half, mean + half, number)


@functools.cache
def _quantile(share: float, freedom: int) -> float:
    # A report asks for thousands of intervals of the same few numbers of seeds.
    return float(stats.t.ppf(share, freedom))


def paired(values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95) -> Spread:
    """Returns the spread of the differences to a baseline, seed by seed: what the seed makes of both cancels.

    Args:
        values: By seed.
        baseline: By seed; seeds that one of both lacks are left out.
        confidence: In (0, 1).
    """
    return spread([values[seed] - baseline[seed] for seed in values if seed in baseline], confidence)
