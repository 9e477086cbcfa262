"""Feeds of random pools against the rules in plain Python, and their propensities against frequencies."""

import dataclasses
import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.rerank import Pool, RerankConfig, SetAside, rerank
from tests.serve import rerank_oracle as oracle

SHARES = st.sampled_from([0.0, 0.0, 0.2, 0.6, 1.0])


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = ("odd", "unknown", "tagged", "explore", "unsafe", "blocked")
    shares = {name: draw(SHARES) for name in names}
    return oracle.random_pool(rng, draw(st.integers(0, 24)), shares, draw(st.integers(1, 6)), draw(st.booleans()))


def configs() -> st.SearchStrategy[RerankConfig]:
    rules = st.permutations(["tag", "sound", "author"]).flatmap(lambda some: st.sampled_from([some, some, some[:1], []]))
    return st.builds(
        RerankConfig,
        explore_share=st.sampled_from([0.0, 0.3, 1.0]),
        author_gap=st.integers(0, 4),
        sound_gap=st.integers(0, 2),
        tag_window=st.integers(0, 6),
        max_of_tag=st.integers(1, 3),
        relax=rules.map(tuple),
        diversity=st.sampled_from(["none", "mmr"]),
        diversity_weight=st.sampled_from([0.0, 0.3, 1.0]),
        diversity_pool=st.sampled_from([1, 3, 100]),
    )


def plain(size: int = 6, **changed: Any) -> Pool:
    """Returns a pool of distinct, safe videos of falling score."""
    one = np.arange(size, dtype=np.int64)
    off, on = np.zeros(size, np.bool_), np.ones(size, np.bool_)
    pool = Pool(one, -one.astype(np.float32), one, on, one, on, one[:, None], on[:, None], off, off, off)
    return pool._replace(**{name: np.asarray(value, getattr(pool, name).dtype) for name, value in changed.items()})


def feed(pool: Pool, config: RerankConfig, number: int = 10, seed: int = 0) -> list[int]:
    return rerank(pool, config, number, np.random.default_rng(seed)).order.tolist()


@settings(max_examples=250, deadline=None)
@given(pools(), configs(), st.integers(0, 30), st.integers(0, 5))
def test_each_position_breaks_least_and_logs_it(pool: Pool, config: RerankConfig, number: int, seed: int) -> None:
    slate = rerank(pool, config, number, np.random.default_rng(seed))
    left, shown = oracle.eligible(pool), []
    logged = defaultdict(list)
    for position, rule in slate.relaxed:
        logged[position].append(rule)
    for position, row in enumerate(slate.order.tolist()):
        would = {other: oracle.broken(pool, config, shown, other) for other in left}
        allowed = {other: rules for other, rules in would.items() if rules <= set(config.relax)}
        cost = {other: sum(2 ** config.relax.index(rule) for rule in rules) for other, rules in allowed.items()}
        open_to = [other for other in left if other in cost and cost[other] == min(cost.values())]
        assert row in open_to
        assert logged.pop(position, []) == [rule for rule in config.relax if rule in would[row]]
        draws = [other for other in open_to if oracle.drawable(pool, other)]
        assert not slate.explored[position] or row in draws
        best = open_to[0]
        if config.diversity == "mmr":
            adds = [oracle.added(pool, config, shown, other) for other in open_to[: config.diversity_pool]]
            best = open_to[int(np.argmax(adds))]
            if not slate.explored[position]:  # near ties are settled by rounding
                assert oracle.added(pool, config, shown, row) == pytest.approx(max(adds), abs=1e-5)
                best = row
            elif np.sum(np.array(adds) > max(adds) - 1e-5) > 1:
                best = -1
        if best >= 0:
            chance = (1 - config.explore_share if draws else 1) * (row == best)
            chance += config.explore_share / len(draws) if row in draws else 0
            assert slate.explored[position] or row == best
            assert slate.propensity[position] == pytest.approx(chance, abs=1e-6)
        left.remove(row)
        shown.append(row)
    assert not logged
    if set(config.relax) == {"tag", "sound", "author"}:
        assert len(shown) == min(number, len(oracle.eligible(pool)))
    elif len(shown) < number:
        assert all(oracle.broken(pool, config, shown, other) - set(config.relax) for other in left)


@settings(max_examples=100, deadline=None)
@given(pools())
def test_every_row_is_shown_or_set_aside(pool: Pool) -> None:
    slate = rerank(pool, RerankConfig(), 1000, np.random.default_rng(0))
    assert len(slate.order) + sum(slate.aside) == len(pool.ids)
    assert len(set(pool.ids[slate.order].tolist())) == len(slate.order)
    for name in ("unsafe", "blocked"):
        forbidden = pool.ids[getattr(pool, name)]
        assert not np.isin(pool.ids[slate.order], forbidden).any()
    assert slate.aside.unsafe == np.isin(pool.ids, pool.ids[pool.unsafe]).sum()


@settings(max_examples=50, deadline=None)
@given(pools(), configs(), st.integers(0, 12))
def test_same_random_numbers_give_the_same_feed(pool: Pool, config: RerankConfig, number: int) -> None:
    first, second = (rerank(pool, config, number, np.random.default_rng(7)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=50, deadline=None)
@given(pools(), st.integers(0, 30))
def test_without_rules_it_is_the_order_of_the_scores(pool: Pool, number: int) -> None:
    config = RerankConfig(0, 0, 0, 0, diversity="none")
    slate = rerank(pool, config, number, np.random.default_rng(0))
    assert slate.order.tolist() == oracle.eligible(pool)[:number]
    assert (slate.propensity == 1).all() and not slate.explored.any() and not slate.relaxed


def test_rules_hold_where_they_can_and_are_relaxed_in_order() -> None:
    config = RerankConfig(explore_share=0, diversity="none", tag_window=0)
    assert feed(plain(authors=[1, 1, 1, 2, 3, 3]), config) == [0, 3, 1, 4, 2, 5]
    assert feed(plain(authors=[1, 1, 1, 2, 3, 4]), dataclasses.replace(config, author_gap=2)) == [0, 3, 4, 1, 5, 2]
    assert feed(plain(4, sounds=[1, 1, 2, 2]), config) == [0, 2, 1, 3]
    # Row 1 breaks the author, row 2 the sound: the sound goes first, though row 1 scores better.
    pool = plain(3, authors=[1, 1, 2], sounds=[1, 2, 1])
    slate = rerank(pool, config, 3, np.random.default_rng(0))
    assert slate.order.tolist() == [0, 2, 1] and slate.relaxed == ((1, "sound"),)
    slate = rerank(pool, dataclasses.replace(config, relax=("author", "sound")), 3, np.random.default_rng(0))
    assert slate.order.tolist() == [0, 1, 2] and slate.relaxed == ((1, "author"),)
    assert feed(pool, dataclasses.replace(config, relax=())) == [0]


def test_a_pool_of_one_author_gives_a_whole_feed() -> None:
    slate = rerank(plain(authors=[1] * 6, tags=[[1]] * 6), RerankConfig(explore_share=0), 5, np.random.default_rng(0))
    assert slate.order.tolist() == [0, 1, 2, 3, 4]
    both = [(position, rule) for position in range(2, 5) for rule in ("tag", "author")]
    assert slate.relaxed == ((1, "author"), *both)


def test_unknown_authors_and_sounds_match_nobody() -> None:
    no = np.zeros(6, np.bool_)
    pool = plain(authors=[1] * 6, sounds=[1] * 6, author_known=no, sound_known=no)
    assert not rerank(pool, RerankConfig(), 6, np.random.default_rng(0)).relaxed


def test_no_window_has_more_of_a_tag() -> None:
    # A tag that a video lists twice counts once.
    tags, known = np.array([[1, 1], [1, 2], [1, 3], [4, 1], [5, 6], [5, 7], [8, 9]]), np.ones((7, 2), np.bool_)
    pool = plain(7)._replace(tags=tags, tag_known=known)
    config = RerankConfig(explore_share=0, diversity="none", tag_window=3, max_of_tag=2)
    assert feed(pool, config) == [0, 1, 4, 2, 3, 5, 6]
    assert feed(pool._replace(tag_known=~known), config) == list(range(7))


def test_no_copy_of_an_unsafe_or_blocked_video_is_shown() -> None:
    pool = plain(5, ids=[7, 8, 7, 8, 9], unsafe=[0, 0, 1, 0, 0], blocked=[0, 1, 0, 0, 0])
    slate = rerank(pool, RerankConfig(), 5, np.random.default_rng(0))
    assert slate.order.tolist() == [4] and slate.aside == SetAside(unsafe=2, blocked=2, no_score=0, repeated=0)


def test_a_repeated_video_is_its_best_row_and_drawn_if_any_row_may_be() -> None:
    pool = plain(4, ids=[5, 6, 5, 5], scores=[1, 0, 3, np.nan], explore=[1, 0, 0, 0])
    slate = rerank(pool, RerankConfig(explore_share=1), 4, np.random.default_rng(0))
    assert slate.order.tolist() == [2, 1] and slate.explored.tolist() == [True, False]
    assert slate.propensity.tolist() == [1, 1] and slate.aside == SetAside(0, 0, no_score=1, repeated=1)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_propensities_are_the_frequencies(share: float) -> None:
    # Rules and diversity are on; every feed is told apart by what stands before, so each position has its own chances.
    rng = np.random.default_rng(3)
    pool = oracle.random_pool(rng, 9, {"unsafe": 0, "blocked": 0, "odd": 0, "explore": 0.5})
    assert 2 < pool.explore.sum() < 8
    config = RerankConfig(explore_share=share, diversity_weight=0.5, tag_window=3, max_of_tag=1)
    seen: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    told: dict[tuple[int, ...], float] = {}
    for _ in range(20_000):
        slate = rerank(pool, config, 3, rng)
        order = slate.order.tolist()
        for position, row in enumerate(order):
            seen[tuple(order[:position])][row] += 1
            chance = float(slate.propensity[position])
            assert told.setdefault(tuple(order[: position + 1]), chance) == chance
    for before, counts in seen.items():
        total = counts.total()
        assert sum(told[*before, row] for row in counts) <= 1 + 1e-6
        if total > 1000:
            assert sum(told[*before, row] for row in counts) == pytest.approx(1, abs=1e-6)
            for row, count in counts.items():
                chance = told[*before, row]
                assert count / total == pytest.approx(chance, abs=4.5 * math.sqrt(chance * (1 - chance) / total) + 1e-6)


def test_inverse_propensities_estimate_without_bias() -> None:
    pool = plain(8, explore=[0, 1, 1, 0, 1, 0, 1, 0])._replace(scores=np.array([0, 5, 1, 2, 3, 1, 0, 4], np.float32))
    reward = np.array([9.0, 1, 4, 2, 0, 7, 5, 3])
    config, rng = RerankConfig(explore_share=0.3, diversity="none"), np.random.default_rng(0)
    truth, found = reward[pool.explore].sum(), []
    for _ in range(10_000):
        slate = rerank(pool, config, 2, rng)
        worth = np.where(pool.explore[slate.order], reward[slate.order], 0.0)
        weighted = worth / slate.propensity
        found.append((weighted[0], worth[0] + weighted[1]))  # at the second position all but the first can be drawn
    values = np.array(found)
    error = values.std(0) / np.sqrt(len(values))
    assert (np.abs(values.mean(0) - truth) < 4 * error).all() and (error < 0.05 * truth).all()


def test_exploring_positions_are_the_share() -> None:
    size, rng = 200, np.random.default_rng(1)
    pool = plain(size, explore=np.arange(size) % 2)
    slates = [rerank(pool, RerankConfig(explore_share=0.2, diversity="none"), 10, rng) for _ in range(1000)]
    by_position = np.mean([slate.explored for slate in slates], axis=0)
    np.testing.assert_allclose(by_position, 0.2, atol=4.5 * np.sqrt(0.16 / 1000))


@pytest.mark.parametrize("size", [0, 1])
def test_tiny_pools(size: int) -> None:
    for number in (0, 3):
        assert feed(plain(size), RerankConfig(), number) == list(range(min(size, number)))


def test_a_pool_is_left_as_it_was_and_may_be_read_only_and_strided() -> None:
    pool = oracle.random_pool(np.random.default_rng(5), 20, {})
    arrays = {name: array for name, array in pool._asdict().items() if array is not None}
    odd = pool._replace(**{name: np.repeat(array, 2, axis=0)[::2] for name, array in arrays.items()})
    for array in odd:
        assert array is not None
        array.flags.writeable = False
    assert feed(odd, RerankConfig()) == feed(pool, RerankConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"explore_share": 1.5}, "explore_share must be from 0 to 1, got 1.5"),
        ({"diversity_weight": float("nan")}, "diversity_weight must be from 0 to 1, got nan"),
        ({"author_gap": -1}, "author_gap must be at least 0, got -1"),
        ({"max_of_tag": 0}, "at least 1, got 0; to switch the rule off set tag_window = 0"),
        ({"diversity_pool": 0}, "diversity_pool must be at least 1"),
        ({"diversity": "dp"}, "diversity must be one of none, dpp, mmr, got 'dp'"),
        ({"relax": ("tag", "safety")}, "never relaxed"),
        ({"relax": ("tag", "tag")}, "at most once"),
    ],
)
def test_configs_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RerankConfig(**fields)


def test_malformed_pools_are_refused() -> None:
    pool, rng = plain(), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"Pool\.scores must be float32 of shape \[6\] as ids are, got float64"):
        rerank(pool._replace(scores=pool.scores.astype(np.float64)), RerankConfig(), 3, rng)
    with pytest.raises(ValueError, match=r"Pool\.unsafe must be bool"):
        rerank(pool._replace(unsafe=pool.unsafe[:3]), RerankConfig(), 3, rng)
    with pytest.raises(ValueError, match="must have one shape"):
        rerank(pool._replace(tags=np.zeros((6, 2), np.int64)), RerankConfig(), 3, rng)
    with pytest.raises(ValueError, match="number must be at least 0, got -1"):
        rerank(pool, RerankConfig(), -1, rng)
