"""Metrics of lists, against definitions written out and against scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from sklearn.metrics.pairwise import cosine_similarity

from monolith_jax.evaluate import retrieval

Lists = tuple[np.ndarray, list[np.ndarray]]


@st.composite
def lists(draw: st.DrawFn) -> Lists:
    users, length, videos = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = np.full((users, length), -1)
    for row in found:
        number = rng.integers(0, min(length, videos) + 1)
        row[:number] = rng.permutation(videos)[:number]
    return found, [rng.permutation(videos)[: rng.integers(0, videos + 1)] for _ in range(users)]


def of_one(found: list[int], wanted: set[int], k: int) -> dict[str, float]:
    """Returns the metrics of one user by their definitions."""
    if not wanted:
        return dict.fromkeys(retrieval.NAMES, math.nan)
    number, gained, first = 0, 0.0, 0
    for place, video in enumerate(found[:k], 1):
        if video != -1 and video in wanted:
            number += 1
            gained += 1 / math.log2(place + 1)
            first = first or place
    best = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(wanted)) + 1))
    values = (number / len(wanted), gained / best, float(first > 0), 1 / first if first else 0.0, number / k)
    return dict(zip(retrieval.NAMES, values, strict=True))


@given(lists())
@settings(max_examples=60, deadline=None)
def test_metrics_of_a_user_are_their_definitions(given_lists: Lists) -> None:
    found, wanted = given_lists
    at = range(1, found.shape[1] + 1)
    got = retrieval.per_user(found, wanted, at)
    assert len(got) == len(retrieval.NAMES) * len(at)
    for k in at:
        for row, (of_user, right) in enumerate(zip(found.tolist(), wanted, strict=True)):
            for name, value in of_one(of_user, set(right.tolist()), k).items():
                assert got[f"{name}@{k}"][row] == pytest.approx(value, nan_ok=True, abs=1e-12), (name, k, row)
    right = [[video != -1 and video in of.tolist() for video in row] for row, of in zip(found.tolist(), wanted, strict=True)]
    np.testing.assert_array_equal(retrieval.hits(found, wanted), right)


@given(lists())
@settings(max_examples=40, deadline=None)
def test_figures_of_all_lists_are_their_definitions(given_lists: Lists) -> None:
    found, _ = given_lists
    rng = np.random.default_rng(found.size)
    videos = rng.permutation(12)
    counts, vectors = rng.integers(0, 50, 12), rng.normal(size=(12, 3))
    vectors[3] = 0
    row_of = {int(video): row for row, video in enumerate(videos)}
    for k in range(1, found.shape[1] + 1):
        shown = {video for row in found[:, :k].tolist() for video in row} - {-1}
        assert retrieval.coverage(found, 12, k) == pytest.approx(len(shown) / 12)
        novel = retrieval.novelty(found, videos, counts, k)
        diverse = retrieval.intra_list_diversity(found, videos, vectors, k)
        for row, of_user in enumerate(found[:, :k].tolist()):
            there = [row_of[video] for video in of_user if video != -1]
            bits = [-math.log2((counts[at] + 1) / (counts.sum() + 12)) for at in there]
            assert novel[row] == pytest.approx(sum(bits) / len(bits) if bits else math.nan, nan_ok=True)
            there = [at for at in there if vectors[at].any()]
            pairs = [(a, b) for position, a in enumerate(there) for b in there[position + 1 :]]
            alike = [float(vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b])) for a, b in pairs]
            assert diverse[row] == pytest.approx(1 - sum(alike) / len(alike) if alike else math.nan, nan_ok=True, abs=1e-9)


def test_ndcg_and_diversity_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(20, 30))
    relevant = rng.random((20, 30)) < 0.2
    relevant[:, 0] = True
    found = np.argsort(-scores, axis=1)
    got = retrieval.per_user(found, [np.flatnonzero(row) for row in relevant], (5, 30))
    for k in (5, 30):
        assert retrieval.means(got)[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevant, scores, k=k))
    vectors = rng.normal(size=(30, 4)).astype(np.float32)
    for row, diverse in enumerate(retrieval.intra_list_diversity(found, np.arange(30), vectors, 10)):
        alike = cosine_similarity(vectors[found[row, :10]])
        assert diverse == pytest.approx(1 - alike[np.triu_indices(10, 1)].mean(), abs=1e-6)


def test_means_leave_out_who_wants_nothing() -> None:
    found = np.array([[1, 2], [3, -1]])
    got = retrieval.means(retrieval.per_user(found, [np.array([2, 2, 9]), np.array([], np.int64)], (2,)))
    assert got["recall@2"] == 0.5 and got["mrr@2"] == 0.5 and got["precision@2"] == 0.5
    nothing = retrieval.means(retrieval.per_user(np.full((1, 2), -1), [np.array([], np.int64)], (2,)))
    assert all(math.isnan(value) for value in nothing.values())


def test_what_cannot_be_is_refused() -> None:
    found = np.array([[1, 1]])
    with pytest.raises(ValueError, match="video twice"):
        retrieval.per_user(found, [np.array([1])], (1,))
    with pytest.raises(ValueError, match=r"must be \[2, K\]"):
        retrieval.per_user(np.array([[1, 2]]), [np.array([1])] * 2, (1,))
    with pytest.raises(ValueError, match="make longer lists"):
        retrieval.per_user(np.array([[1, 2]]), [np.array([1])], (3,))
    with pytest.raises(ValueError, match="said to have 1"):
        retrieval.coverage(np.array([[1, 2]]), 1, 2)
    with pytest.raises(ValueError, match="not among the 1 of the catalogue"):
        retrieval.novelty(np.array([[1, 2]]), np.array([1]), np.array([4]), 2)
    with pytest.raises(ValueError, match="a row for each video"):
        retrieval.intra_list_diversity(np.array([[1, 2]]), np.array([1, 2]), np.ones((1, 4)), 2)
