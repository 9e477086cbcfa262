"""What many do now: decayed counts of videos on the stream.

In: videos, what an action on each weighs, and when it was. Out: the videos of the highest decayed counts.

Forward decay (Cormode, Shkapenyuk, Srivastava, Xu, ICDE 2009): an event at time t adds weight * 2^((t - landmark) / half-life).
So nothing that is kept changes with time, the order of arrival does not matter (but for the last bits of sums), and which video
is ahead does not depend on when one asks. A bounded number of videos is counted, in buckets of eight as `id_slots` has them: in
a full one a new video takes the place of the least.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from monolith_jax.ids.lines import jit, mix
from monolith_jax.serve.id_slots import WAYS

_S32 = np.uint64(32)
_REBASE = 256.0
"""Half-lives after the landmark at which it moves on; float64 has room for 1,000."""


@dataclass(frozen=True)
class TrendingConfig:
    """What is counted, and how often it is looked at."""

    half_life_s: float = 3600.0
    """Time in which an action loses half its weight."""
    max_videos: int = 1 << 16
    """Videos that are counted; the least of more are forgotten, and counted. Costs 16 bytes each."""
    size: int = 1000
    """Videos in the list, at most."""
    refresh_s: float = 1.0
    """The list is made anew when the newest action is so much later than at the last time, or there were too few videos."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        if not 0 < self.half_life_s < float("inf") or not 0 <= self.refresh_s < float("inf"):
            raise ValueError(f"TrendingConfig: half_life_s above 0, refresh_s of at least 0, got {self}")
        if not 1 <= self.max_videos <= 1 << 30 or self.size < 1:
            raise ValueError(f"TrendingConfig: max_videos of 1 to 2^30, size of at least 1, got {self}")


@jit
def _add(videos, gains, ids, scores):
    # gains float64 [N] above 0; ids int64 [S], scores float64 [S], 0: empty. Returns how many videos were forgotten.
    num_buckets, forgotten = np.uint64(scores.size // WAYS), 0
    for i in range(videos.size):
        first = np.int64(((mix(np.uint64(videos[i])) >> _S32) * num_buckets) >> _S32) * WAYS
        found, least = np.int64(-1), first
        for slot in range(first, first + WAYS):
            if ids[slot] == videos[i] and scores[slot] > 0:
                found = slot
                break
            if scores[slot] < scores[least]:
                least = slot
        if found < 0:
            forgotten += scores[least] > 0
            found, ids[least], scores[least] = least, videos[i], 0.0
        scores[found] += gains[i]
    return forgotten


@dataclass(frozen=True)
class _Top:
    """A list that was made; replaced as a whole, so that who reads it needs no lock."""

    videos: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float64))
    landmark_ms: float = 0.0


class Trending:
    """The counts of all videos. Any number ask while others add."""

    def __init__(self, config: TrendingConfig) -> None:
        """Has counted nothing yet."""
        self._config = config
        size = -(-config.max_videos // WAYS) * WAYS
        self._ids, self._scores = np.zeros(size, np.int64), np.zeros(size, np.float64)
        self._landmark_ms = 0.0
        self._newest_ms: int | None = None
        self._made_ms = 0
        self._top = _Top()
        self._forgotten = self._set_aside = 0
        self._lock = threading.Lock()

    def add(self, videos: np.ndarray, weights: np.ndarray, times_ms: np.ndarray) -> None:
        """Counts actions.

        Args:
            videos: int64 [N], may repeat.
            weights: float [N], above 0 and at most 1e9; others, NaN too, are set aside and counted.
            times_ms: int64 [N].
        """
        good = (weights > 0) & (weights <= 1e9)
        with self._lock:
            self._set_aside += int(good.size - np.count_nonzero(good))
            if not good.any():
                return
            newest_ms = int(times_ms[good].max())
            if self._newest_ms is None:
                self._landmark_ms, self._made_ms = float(newest_ms), newest_ms
            self._newest_ms = newest_ms if self._newest_ms is None else max(self._newest_ms, newest_ms)
            self._rebase()
            gains = weights[good].astype(np.float64) * np.exp2(self._ages(times_ms[good]))
            there = gains > 0  # What is a thousand half-lives old weighs nothing.
            self._forgotten += _add(videos[good][there], gains[there], self._ids, self._scores)
            late_ms = 1000 * self._config.refresh_s
            if self._newest_ms - self._made_ms >= late_ms or self._top.videos.size < self._config.size:
                self._make()

    def top(self, n: int, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the videos of the list that are ahead.

        Args:
            n: At most so many.
            now_ms: The time by which their counts have decayed; it does not change their order.

        Returns:
            int64 [M] videos, the highest first and among equals the smaller id; float64 [M] their decayed counts.
        """
        top = self._top
        factor = np.exp2((top.landmark_ms - now_ms) / (1000 * self._config.half_life_s))
        return top.videos[:n], top.scores[:n] * factor

    def refresh(self) -> None:
        """Makes the list anew from all that was counted."""
        with self._lock:
            self._make()

    def remove(self, videos: np.ndarray) -> None:
        """Forgets videos, int64 [N], at once."""
        with self._lock:
            self._scores[np.isin(self._ids, videos)] = 0.0
            stay = ~np.isin(self._top.videos, videos)
            self._top = _Top(self._top.videos[stay], self._top.scores[stay], self._top.landmark_ms)

    def metrics(self) -> dict[str, int]:
        """Returns how many videos are counted, how many were forgotten, and how many actions were set aside."""
        videos = int(np.count_nonzero(self._scores))
        return {"videos": videos, "videos_forgotten": self._forgotten, "set_aside": self._set_aside}

    def _ages(self, times_ms: np.ndarray) -> np.ndarray:
        return (times_ms - self._landmark_ms) / (1000 * self._config.half_life_s)

    def _rebase(self) -> None:
        """Moves the landmark on before counts grow out of float64; what has become nothing by then is forgotten."""
        assert self._newest_ms is not None
        passed = (self._newest_ms - self._landmark_ms) / (1000 * self._config.half_life_s)
        if passed > _REBASE:
            self._scores *= np.exp2(-passed)
            self._landmark_ms = float(self._newest_ms)

    def _make(self) -> None:
        number = min(self._config.size, int(np.count_nonzero(self._scores)))
        self._made_ms = self._newest_ms or 0
        if not number:
            self._top = _Top()
            return
        # No copy of the largest by itself: equals at the end are told apart by their ids.
        least = np.partition(self._scores, self._scores.size - number)[self._scores.size - number]
        places = np.flatnonzero((self._scores >= least) & (self._scores > 0))
        places = places[np.lexsort((self._ids[places], -self._scores[places]))[:number]]
        self._top = _Top(self._ids[places], self._scores[places], self._landmark_ms)


def trending_bytes(config: TrendingConfig) -> int:
    """Returns the bytes of the arrays of a `Trending`."""
    return -(-config.max_videos // WAYS) * WAYS * 16 + config.size * 16
