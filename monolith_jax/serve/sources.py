"""Where candidates come from besides the two-tower: fresh videos, trending ones, those of followed authors, and explore.

In: uploads, impressions and actions, as they come. Out: lists of videos, best first, for `merge`. Memory is bounded; what is
forgotten for it is counted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from monolith_jax.serve.id_slots import EMPTY, IdSlots, id_slots_bytes
from monolith_jax.serve.merge import SOURCES
from monolith_jax.serve.recent import RecentItems, recent_bytes
from monolith_jax.serve.trending import Trending, TrendingConfig, trending_bytes


@dataclass(frozen=True)
class SourcesConfig:
    """How many candidates each source gives (0: it is switched off), and what they are made of."""

    two_tower: int = 600
    """Candidates from the index, by the user's vector."""
    similar: int = 100
    """Candidates from the index, by the vectors of the videos that the user liked last (`UserStateConfig.positive`)."""
    fresh: int = 100
    """Newest uploads."""
    trending: int = 100
    """Videos with the highest decayed counts."""
    followed: int = 50
    """Newest videos of the authors that the user follows."""
    explore: int = 50
    """Videos drawn at random of those that few have been shown."""
    fresh_s: float = 86_400.0
    """A video is fresh for so long."""
    max_fresh: int = 4096
    """Newest videos that are kept in a list."""
    explore_impressions: int = 100
    """Explore draws videos that were shown less often than this, as long as there are any."""
    max_videos: int = 1 << 17
    """Newest videos among which explore draws. Costs 20 bytes each."""
    max_authors: int = 20_000
    """Authors whose newest videos are kept; the least recently active of more are forgotten."""
    videos_per_author: int = 20
    """Newest videos that are kept of each author. Costs 16 bytes each."""
    counts: TrendingConfig = field(default_factory=TrendingConfig)
    """What trending counts."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        for name in (*SOURCES, "explore_impressions"):
            if getattr(self, name) < 0:
                raise ValueError(f"SourcesConfig.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("fresh_s", "max_fresh", "max_videos", "max_authors", "videos_per_author"):
            if not getattr(self, name) > 0:
                raise ValueError(f"SourcesConfig.{name} must be above 0, got {getattr(self, name)}")

    @property
    def quotas(self) -> dict[str, int]:
        """The candidates of each source, for `merge`."""
        return {name: getattr(self, name) for name in SOURCES}


@dataclass(frozen=True)
class _Fresh:
    """Newest first; replaced as a whole, so that who reads it needs no lock."""

    videos: np.ndarray
    times_ms: np.ndarray


class Sources:
    """All that is not learned. Any number of threads may tell and ask."""

    def __init__(self, config: SourcesConfig) -> None:
        """Knows no videos yet."""
        self._config = config
        self._videos = IdSlots(config.max_videos)
        self._shown = np.zeros(self._videos.size, np.int32)
        self._authors = IdSlots(config.max_authors)
        self._uploads = RecentItems(self._authors.size, config.videos_per_author)
        self._fresh = _Fresh(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._counts = Trending(config.counts)
        self._lock = threading.Lock()

    def videos(
        self, ids: np.ndarray, authors: np.ndarray, times_ms: np.ndarray, authors_known: np.ndarray | None = None
    ) -> None:
        """Takes uploads in.

        Args:
            ids: int64 [N]. One that comes again keeps its impressions, and stays with a former author too.
            authors: int64 [N].
            times_ms: int64 [N], when each was uploaded.
            authors_known: bool [N], whose author is known; None: all.
        """
        known = np.ones(ids.size, np.bool_) if authors_known is None else authors_known
        with self._lock:
            self._fresh = self._with(ids, times_ms)
            self._shown[self._videos.take(ids, times_ms)[1]] = 0
            slots, new = self._authors.take(authors[known], times_ms[known])
            self._uploads.clear(new)
            self._uploads.add(slots, ids[known], times_ms[known])

    def _with(self, ids: np.ndarray, times_ms: np.ndarray) -> _Fresh:
        every = np.concatenate([ids[::-1], self._fresh.videos])
        times = np.concatenate([times_ms[::-1], self._fresh.times_ms])
        videos, first = np.unique(every, return_index=True)  # What is told last counts.
        times = times[first]
        newest = np.lexsort((videos, -times))[: self._config.max_fresh]
        return _Fresh(videos[newest], times[newest])

    def impressions(self, ids: np.ndarray) -> None:
        """Counts that videos, int64 [N], were shown; those that are not known are passed over."""
        with self._lock:
            slots = self._videos.find(ids)
            np.add.at(self._shown, slots[slots >= 0], 1)

    def acted(self, videos: np.ndarray, weights: np.ndarray, times_ms: np.ndarray) -> None:
        """Counts actions for trending; see `Trending.add`."""
        self._counts.add(videos, weights, times_ms)

    def remove(self, ids: np.ndarray) -> None:
        """Forgets videos, int64 [N], at once: no source gives them any more until they are uploaded again."""
        self._counts.remove(ids)
        with self._lock:
            stay = ~np.isin(self._fresh.videos, ids)
            self._fresh = _Fresh(self._fresh.videos[stay], self._fresh.times_ms[stay])
            slots, places = np.nonzero(np.isin(self._uploads.items, ids))
            self._videos.remove(ids)
            self._uploads.drop(slots, self._uploads.items[slots, places])

    def fresh(self, n: int, now_ms: int) -> np.ndarray:
        """Returns the newest videos that are fresh at a time, int64 [M], M <= n, newest first; none that is uploaded later."""
        fresh = self._fresh
        first = int(np.searchsorted(-fresh.times_ms, -now_ms, side="left"))
        oldest = int(now_ms - 1000 * self._config.fresh_s)
        end = int(np.searchsorted(-fresh.times_ms, -oldest, side="left"))
        return fresh.videos[first : min(end, first + n)]

    def trending(self, n: int, now_ms: int) -> np.ndarray:
        """Returns the videos with the highest decayed counts, int64 [M], M <= n, the highest first."""
        return self._counts.top(n, now_ms)[0]

    def of_authors(self, authors: np.ndarray, n: int) -> np.ndarray:
        """Returns the newest videos of authors, int64 [A]: int64 [M], M <= n, distinct, newest first."""
        distinct = np.unique(authors)
        with self._lock:
            before = np.full(distinct.size, np.iinfo(np.int64).max)
            slots = self._authors.find(distinct)
            videos, times, _, _ = self._uploads.newest(slots, before, n)
        order = np.lexsort((videos, -times))
        videos = videos[order]
        _, first = np.unique(videos, return_index=True)  # One that changed its author may be there twice.
        return videos[np.sort(first)][:n]

    def explore(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draws videos without replacement, all that are suitable with equal chance.

        Args:
            n: At most so many.
            rng: What draws.

        Returns:
            int64 [M], in random order: of those shown less than `explore_impressions` times; if they are fewer than n, all of
            them, then others.
        """
        used, shown, limit = self._videos.used, self._shown, self._config.explore_impressions
        with self._lock:
            slots = rng.integers(0, used.size, 4 * n + 64)
            slots = slots[np.sort(np.unique(slots, return_index=True)[1])]
            slots = slots[(used[slots] != EMPTY) & (shown[slots] < limit)][:n]
            if slots.size < n:
                there = np.flatnonzero(used != EMPTY)
                few = there[shown[there] < limit]
                slots = rng.choice(few, min(n, few.size), replace=False)
                if slots.size < n:
                    others = there[shown[there] >= limit]
                    slots = np.concatenate([slots, rng.choice(others, min(n - slots.size, others.size), replace=False)])
            return self._videos.ids[slots]

    def metrics(self) -> dict[str, int]:
        """Returns how many videos and authors are known, and what was forgotten or set aside."""
        counts = {"videos": len(self._videos), "videos_replaced": self._videos.replaced}
        counts |= {"authors": len(self._authors), "authors_replaced": self._authors.replaced, "fresh": self._fresh.videos.size}
        return counts | {f"trending/{name}": value for name, value in self._counts.metrics().items()}


def sources_bytes(config: SourcesConfig) -> int:
    """Returns the bytes of the arrays of `Sources`: with the defaults, about 11 MB."""
    videos, authors = id_slots_bytes(config.max_videos), id_slots_bytes(config.max_authors)
    of_authors = authors + recent_bytes(authors // 16, config.videos_per_author)
    return videos + videos // 16 * 4 + of_authors + 16 * config.max_fresh + trending_bytes(config.counts)
