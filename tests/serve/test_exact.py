"""The exact best against numpy."""

import numpy as np
import pytest

from monolith_jax.serve.exact import exact_top_k


@pytest.mark.parametrize(
    ("number", "k", "block"), [(1000, 10, 128), (1000, 10, 5000), (50, 50, 7), (5, 9, 3), (1, 1, 1), (0, 3, 4)]
)
def test_is_the_best_of_all(number: int, k: int, block: int) -> None:
    rng = np.random.default_rng(number)
    vectors, queries = rng.normal(size=(number, 8)).astype(np.float32), rng.normal(size=(6, 8)).astype(np.float32)
    at, scores = exact_top_k(vectors, queries, k, block)
    assert at.shape == scores.shape == (6, k)
    there = min(number, k)
    expected = queries @ vectors.T
    np.testing.assert_array_equal(at[:, :there], np.argsort(-expected, 1, kind="stable")[:, :there])
    np.testing.assert_allclose(scores[:, :there], -np.sort(-expected, 1)[:, :there], rtol=1e-5, atol=1e-6)
    assert (at[:, there:] == -1).all() and np.isneginf(scores[:, there:]).all()


def test_refuses() -> None:
    some = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="NaN"):
        exact_top_k(some, np.full((1, 4), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="expected vectors"):
        exact_top_k(some, np.ones((1, 5), np.float32), 1)
    with pytest.raises(ValueError, match="at least 1"):
        exact_top_k(some, some, 0)
