from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.trending import Trending, TrendingConfig, trending_bytes

T = 1_700_000_000_000
HOUR_MS = 3_600_000


def counted(trending: Trending, *rows: tuple[int, float, float]) -> None:
    """Adds (video, weight, hours after T)."""
    videos, weights, hours = (np.array([row[side] for row in rows]) for side in range(3))
    trending.add(videos.astype(np.int64), weights.astype(np.float64), T + (HOUR_MS * hours).astype(np.int64))


@settings(deadline=None, max_examples=80)
@given(
    calls=st.lists(
        st.lists(st.tuples(st.integers(-3, 9), st.floats(0.1, 9), st.floats(0, 2000)), min_size=1, max_size=10), max_size=5
    ),
    n=st.integers(0, 20),
)
def test_agrees_with_decay_by_hand(calls: list[list[tuple[int, float, float]]], n: int) -> None:
    trending = Trending(TrendingConfig(half_life_s=36_000))
    for rows in calls:
        counted(trending, *rows)
    now = max((row[2] for rows in calls for row in rows), default=0.0) + 5
    scores: dict[int, float] = defaultdict(float)
    for rows in calls:
        for video, weight, hour in rows:
            scores[video] += weight * 2.0 ** -((now - hour) / 10)
    videos, found = trending.top(n, T + int(HOUR_MS * now))
    best = sorted(scores.values(), reverse=True)[:n]
    # Times are whole ms. What is more than a hundred half-lives behind may be lost among what is ahead.
    np.testing.assert_allclose(found, best[: found.size], rtol=1e-4)
    np.testing.assert_allclose(found, [scores[video] for video in videos.tolist()], rtol=1e-4)
    assert all(score < 1e-60 * max(best, default=0) for score in best[found.size :])


def test_order_does_not_depend_on_when_one_asks_and_equals_go_by_id() -> None:
    trending = Trending(TrendingConfig())
    counted(trending, (7, 1, 0), (3, 1, 0), (-5, 1, 0), (1, 2, 1))
    now, later = trending.top(3, T), trending.top(3, T + 50 * HOUR_MS)
    assert now[0].tolist() == later[0].tolist() == [1, -5, 3]
    np.testing.assert_allclose(later[1], now[1] * 2.0**-50)


def test_counts_stay_in_range_however_long_it_runs() -> None:
    trending = Trending(TrendingConfig())
    for step in range(40):
        counted(trending, (step, 1, 100 * step))
    videos, scores = trending.top(3, T + 3900 * HOUR_MS)
    assert videos.tolist() == [39, 38, 37]
    np.testing.assert_allclose(scores, [1, 2.0**-100, 2.0**-200])


def test_the_list_is_made_anew_every_so_often() -> None:
    trending = Trending(TrendingConfig(size=2, refresh_s=3600))
    counted(trending, (1, 1, 0), (2, 2, 0))
    counted(trending, (3, 9, 0.5))
    assert trending.top(5, T)[0].tolist() == [2, 1]
    counted(trending, (1, 0.1, 1))
    assert trending.top(5, T)[0].tolist() == [3, 2]
    counted(trending, (4, 99, 1.5))
    trending.refresh()
    assert trending.top(5, T)[0].tolist() == [4, 3]
    assert trending.top(1, T)[0].tolist() == [4]


def test_a_video_that_is_removed_is_gone_at_once() -> None:
    trending = Trending(TrendingConfig(refresh_s=3600))
    counted(trending, (1, 1, 0), (2, 2, 0), (3, 3, 0))
    trending.remove(np.array([3, 77]))
    assert trending.top(5, T)[0].tolist() == [2, 1]
    counted(trending, (4, 1, 2), (3, 0.5, 2))
    assert trending.top(5, T)[0].tolist() == [4, 2, 3, 1]


def test_bad_weights_are_set_aside() -> None:
    trending = Trending(TrendingConfig())
    counted(trending, (1, float("nan"), 0), (2, -1, 0), (3, 0, 0), (4, float("inf"), 0), (5, 1e10, 0))
    assert trending.top(5, T)[0].size == 0
    counted(trending, (6, 1, 0), (7, float("nan"), 0))
    assert trending.top(5, T)[0].tolist() == [6]
    assert trending.metrics() == {"videos": 1, "videos_forgotten": 0, "set_aside": 6}


def test_of_more_videos_than_there_is_room_for_the_least_go() -> None:
    trending = Trending(TrendingConfig(max_videos=8))
    counted(trending, *((video, 100 + video, 0) for video in range(4)))
    counted(trending, *((video, 1, 0) for video in range(100, 200)))
    assert trending.top(4, T)[0].tolist() == [3, 2, 1, 0]
    assert trending.metrics() == {"videos": 8, "videos_forgotten": 96, "set_aside": 0}


def test_bytes_and_bad_configs() -> None:
    config = TrendingConfig(max_videos=100, size=10)
    trending = Trending(config)
    counted(trending, *((video, 1, 0) for video in range(50)))
    arrays = [one for of in (trending, trending._top) for one in vars(of).values() if isinstance(one, np.ndarray)]
    assert trending_bytes(config) == sum(array.nbytes for array in arrays)
    for fields in ({"half_life_s": 0.0}, {"half_life_s": float("nan")}, {"refresh_s": -1.0}, {"max_videos": 0}, {"size": 0}):
        with pytest.raises(ValueError, match="TrendingConfig"):
            TrendingConfig(**fields)  # pyright: ignore[reportArgumentType]
