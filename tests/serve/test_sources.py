from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.sources import Sources, SourcesConfig, sources_bytes
from monolith_jax.serve.trending import TrendingConfig

T = 1_700_000_000_000


def ids_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int64)


def uploaded(sources: Sources, *rows: tuple[int, int, int]) -> None:
    """Uploads (video, author, seconds after T)."""
    videos, authors, seconds = (ids_of(*(row[side] for row in rows)) for side in range(3))
    sources.videos(videos, authors, T + 1000 * seconds)


def small(**fields: Any) -> Sources:
    return Sources(SourcesConfig(**{"max_videos": 1000, "max_authors": 100, **fields}))


UPLOADS = st.lists(st.tuples(st.integers(-2, 30), st.integers(0, 3), st.integers(0, 20)), max_size=15)


@settings(deadline=None, max_examples=80)
@given(calls=st.lists(UPLOADS, max_size=4), n=st.integers(0, 12), now=st.integers(0, 25))
def test_fresh_is_the_newest_in_time(calls: list[list[tuple[int, int, int]]], n: int, now: int) -> None:
    sources, times = small(fresh_s=10.0), {}
    for rows in calls:
        uploaded(sources, *rows)
        times |= {video: second for video, _, second in rows}
    fresh = [video for video in sorted(times, key=lambda one: (-times[one], one)) if now - 10 < times[video] <= now]
    assert sources.fresh(n, T + 1000 * now).tolist() == fresh[:n]


def test_fresh_keeps_the_newest_of_many() -> None:
    sources = small(max_fresh=3)
    for second in (3, 1, 5, 2, 4):
        uploaded(sources, (second, 0, second))
    assert sources.fresh(9, T + 9000).tolist() == [5, 4, 3]


@settings(deadline=None, max_examples=80)
@given(calls=st.lists(UPLOADS, max_size=4), authors=st.lists(st.integers(0, 4), max_size=4), n=st.integers(0, 12))
def test_newest_videos_of_authors(calls: list[list[tuple[int, int, int]]], authors: list[int], n: int) -> None:
    sources = small(videos_per_author=3)
    of: dict[int, list[tuple[int, int]]] = {}
    for rows in calls:
        uploaded(sources, *rows)
        for video, author, second in rows:
            mine = of.setdefault(author, [])
            if video not in [one for one, _ in mine]:
                newer = sum(time > second for _, time in mine)
                mine.insert(newer, (video, second))
                del mine[3:]
    found = sorted((-second, video) for author in set(authors) for video, second in of.get(author, []))
    distinct = list(dict.fromkeys(video for _, video in found))
    # Of a video with two authors both times count; asked for all, so that it is the earlier or later time that decides.
    assert sources.of_authors(ids_of(*authors), 100).tolist() == distinct
    if len(distinct) == len(found):
        # Of those of one moment any may be left out.
        times = {video: second for second, video in found}
        some = sources.of_authors(ids_of(*authors), n).tolist()
        assert [times[one] for one in some] == [times[one] for one in distinct[:n]] and len(set(some)) == len(some)


def test_videos_without_a_known_author() -> None:
    sources = small()
    sources.videos(ids_of(1, 2), ids_of(7, 7), ids_of(T, T), np.array([False, True]))
    assert sources.of_authors(ids_of(7), 5).tolist() == [2]
    assert sources.fresh(5, T).tolist() == [1, 2]
    assert sources.of_authors(ids_of(), 5).size == 0


def test_of_more_authors_than_there_is_room_for_the_least_active_are_forgotten() -> None:
    sources = small(max_authors=8)
    uploaded(sources, *((author, author, author) for author in range(8)))
    uploaded(sources, (100, 0, 20), (101, 8, 21))
    assert [sources.of_authors(ids_of(author), 5).tolist() for author in (0, 1, 8)] == [[100, 0], [], [101]]
    assert sources.metrics()["authors_replaced"] == 1


def test_explore_draws_what_few_have_been_shown() -> None:
    sources, rng = small(explore_impressions=2), np.random.default_rng(0)
    uploaded(sources, *((video, 0, video) for video in range(100)))
    sources.impressions(np.repeat(np.arange(90), 2))
    sources.impressions(ids_of(95, 1234))
    counts = np.zeros(100)
    for _ in range(3000):
        drawn = sources.explore(5, rng)
        assert np.unique(drawn).size == 5 and drawn.min() >= 90
        counts[drawn] += 1
    # Each with equal chance, 1 in 2: 1500 +- 27.
    assert (abs(counts[90:] - 1500) < 140).all()
    more = sources.explore(30, rng)
    assert set(range(90, 100)) == set(more[:10].tolist()) and np.unique(more).size == 30
    assert np.unique(sources.explore(1000, rng)).size == 100
    uploaded(sources, (5, 0, 200))  # It keeps its impressions.
    assert 5 not in sources.explore(10, rng)
    assert small().explore(5, rng).size == 0


def test_trending_counts_actions() -> None:
    sources = small()
    sources.acted(ids_of(1, 2, 2), np.array([1.0, 1.0, float("nan")]), ids_of(T - 1, T, T))
    assert sources.trending(5, T).tolist() == [2, 1]
    assert sources.metrics()["trending/set_aside"] == 1


def test_a_video_that_is_removed_comes_from_nowhere() -> None:
    sources, rng = small(max_videos=8), np.random.default_rng(0)
    uploaded(sources, *((video, 0, video) for video in range(12)))
    sources.acted(np.arange(12), np.ones(12), np.full(12, T))
    gone = ids_of(0, 11, 99)
    sources.remove(gone)
    lists = [
        sources.fresh(99, T + 10**6),
        sources.trending(99, T),
        sources.of_authors(ids_of(0), 99),
        sources.explore(99, rng),
    ]
    assert [len(one) for one in lists] == [10, 10, 10, 7]
    assert not any(np.isin(gone, one).any() for one in lists)
    uploaded(sources, (11, 0, 12))
    assert sources.of_authors(ids_of(0), 2).tolist() == [11, 10]
    assert sources.metrics()["videos_replaced"] == 4


def test_quotas_bytes_and_bad_configs() -> None:
    assert sum(SourcesConfig().quotas.values()) == 1000
    config = SourcesConfig(max_videos=100, max_authors=50, max_fresh=10, counts=TrendingConfig(max_videos=64, size=5))
    sources = Sources(config)
    uploaded(sources, *((video, 0, video) for video in range(20)))
    sources.acted(np.arange(10), np.ones(10), np.full(10, T))
    parts = (
        sources,
        sources._videos,
        sources._authors,
        sources._uploads,
        sources._fresh,
        sources._counts,
        sources._counts._top,
    )
    arrays = [one for of in parts for one in vars(of).values() if isinstance(one, np.ndarray)]
    assert sources_bytes(config) == sum(array.nbytes for array in arrays)
    for fields in ({"two_tower": -1}, {"fresh_s": 0.0}, {"fresh_s": float("nan")}, {"max_authors": 0}):
        with pytest.raises(ValueError, match=f"SourcesConfig.{next(iter(fields))}"):
            SourcesConfig(**fields)  # pyright: ignore[reportArgumentType]
