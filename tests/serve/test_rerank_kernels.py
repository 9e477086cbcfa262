"""Diverse feeds against brute force: whole determinants, all similarities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.rerank import DiversityKind, Pool, RerankConfig, rerank
from tests.serve import rerank_oracle as oracle

KINDS: tuple[DiversityKind, ...] = ("dpp", "mmr")


def pool_of(seed: int, size: int, dim: int) -> Pool:
    rng = np.random.default_rng(seed)
    return oracle.random_pool(rng, size, {"unsafe": 0, "blocked": 0, "odd": 0, "explore": 0.5})._replace(
        vectors=rng.normal(size=(size, dim)).astype(np.float32)
    )


def order(pool: Pool, config: RerankConfig, number: int) -> list[int]:
    return rerank(pool, config, number, np.random.default_rng(0)).order.tolist()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 20),
    st.sampled_from(KINDS),
    st.sampled_from([0.05, 0.5, 0.95]),
    st.sampled_from([2, 100]),
    st.sampled_from([0, 1]),
    st.sampled_from([0.0, 0.5]),
)
def test_each_pick_adds_most(
    seed: int, size: int, kind: DiversityKind, weight: float, limit: int, gap: int, share: float
) -> None:
    # More dimensions than picks: determinants are far from 0. What was drawn counts for what comes after it.
    pool = pool_of(seed, size, 24)
    config = RerankConfig(share, gap, gap, 4 * gap, 1, diversity=kind, diversity_weight=weight, diversity_pool=limit)
    left, shown = oracle.eligible(pool), []
    slate = rerank(pool, config, 8, np.random.default_rng(seed))
    for row, explored in zip(slate.order.tolist(), slate.explored, strict=True):
        cost = {
            other: sum(2 ** config.relax.index(rule) for rule in oracle.broken(pool, config, shown, other)) for other in left
        }
        open_to = [other for other in left if cost[other] == min(cost.values())][:limit]
        if not explored:
            adds = {other: oracle.added(pool, config, shown, other) for other in open_to}
            assert row in open_to and adds[row] == pytest.approx(max(adds.values()), abs=1e-4)
        left.remove(row)
        shown.append(row)


def test_dpp_is_greedy_on_the_determinant_of_the_kernel() -> None:
    # Written as in the paper: L = diag(q) S diag(q), S = (1 + cosine) / 2, q = exp(alpha r), alpha = (1 - weight) / (2 weight).
    pool, weight, number = pool_of(4, 30, 12), 0.4, 8
    config = RerankConfig(0, 0, 0, 0, diversity="dpp", diversity_weight=weight)
    relevance = np.array([oracle.relevances(pool, config)[row] for row in range(30)])
    q = np.exp((1 - weight) / (2 * weight) * relevance)
    kernel = q[:, None] * (1 + oracle.cosines(pool, list(range(30)))) / 2 * q
    greedy: list[int] = []
    for _ in range(number):
        rest = [row for row in range(30) if row not in greedy]
        greedy.append(max(rest, key=lambda row: np.linalg.det(kernel[np.ix_([*greedy, row], [*greedy, row])])))
    assert order(pool, config, number) == greedy


@pytest.mark.parametrize("kind", KINDS)
def test_weight_goes_from_scores_to_spread(kind: DiversityKind) -> None:
    scores, likenesses = np.zeros(3), np.zeros(3)
    for seed in range(20):
        pool = pool_of(seed, 40, 8)
        for at, weight in enumerate((0.0, 0.3, 0.9)):
            rows = order(pool, RerankConfig(0, 0, 0, 0, diversity=kind, diversity_weight=weight), 6)
            similarities = oracle.cosines(pool, rows)
            scores[at] += pool.scores[rows].mean()
            likenesses[at] += np.sort(similarities, axis=1)[:, -2].mean()
            assert weight or rows == oracle.eligible(pool)[:6]
    assert scores[0] > scores[1] > scores[2] and likenesses[0] > likenesses[1] > likenesses[2]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_come_last_but_come(kind: DiversityKind) -> None:
    # Three directions, each four times: after three there are copies only, and the feed goes on by score.
    vectors = np.repeat(np.array([[1, 0], [0, 1], [1, 1]], np.float32), 4, axis=0)
    pool = pool_of(2, 12, 2)._replace(vectors=vectors, scores=np.linspace(1, 0, 12, dtype=np.float32))
    rows = order(pool, RerankConfig(0, 0, 0, 0, diversity=kind, diversity_weight=0.9), 12)
    assert sorted(rows) == list(range(12)) and rows[:3] == [0, 4, 8]
    assert rows[3:] == [1, 2, 3, 5, 6, 7, 9, 10, 11]


@pytest.mark.parametrize("kind", KINDS)
def test_without_vectors_the_scores_decide(kind: DiversityKind) -> None:
    pool = pool_of(3, 15, 4)
    assert pool.vectors is not None
    config = RerankConfig(0, 0, 0, 0, diversity=kind, diversity_weight=0.9)
    broken = np.where(np.arange(15)[:, None] % 2, np.nan, 0).astype(np.float32) * np.ones((15, 4), np.float32)
    for vectors in (None, broken):
        slate = rerank(pool._replace(vectors=vectors), config, 15, np.random.default_rng(0))
        assert slate.order.tolist() == oracle.eligible(pool) and slate.no_vector == 15
    some = pool.vectors.copy()
    some[[2, 5]] = [[0] * 4, [np.inf] * 4]
    assert rerank(pool._replace(vectors=some), config, 15, np.random.default_rng(0)).no_vector == 2
    assert rerank(pool._replace(vectors=None), RerankConfig(diversity="none"), 5, np.random.default_rng(0)).no_vector == 0
