"""From the values of candidates to the pool that the rules of a feed choose from.

In: values of candidates. Out: which of them are in the pool, and what order they have where the rules cannot speak.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.serve.rerank import Pool, SetAside, Slate


def best(values: np.ndarray, always: np.ndarray, number: int) -> np.ndarray:
    """Returns the candidates with the highest values, and those that are to be there always, in their order, int64 [N]."""
    if values.size <= number:
        return np.arange(values.size)
    chosen = always.copy()
    chosen[np.argpartition(-values, number)[:number]] = True
    return np.flatnonzero(chosen)


def behind(values: np.ndarray, is_spare: np.ndarray) -> np.ndarray:
    """Returns values [K] with those of spare candidates moved below all others, by three standard deviations."""
    fine = np.isfinite(values)
    first = fine & ~is_spare
    if not is_spare.any() or not first.any():
        return values
    spare = fine & is_spare
    gap = values[first].min() - 3 * values[first].std() - values[spare].max(initial=-np.inf) if spare.any() else 0.0
    return np.where(spare, values + min(gap, 0.0), values).astype(np.float32)


def by_score(pool: Pool, number: int) -> Slate:
    """Returns the best of a pool that may be shown, without any other rule."""
    fine = np.isfinite(pool.scores)
    order = np.argsort(np.where(fine, -pool.scores, np.inf), kind="stable")[: min(number, int(fine.sum()))]
    return Slate(order, np.ones(order.size, np.float32), np.zeros(order.size, np.bool_), (), SetAside(0, 0, 0, 0), 0)
