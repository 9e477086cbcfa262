"""What each source is worth: its share of the feeds, and how often what it gave was liked.

In: feeds with the source of each video, and later the actions. Out: by source, the videos that were fed, and how many of them
had a positive action. Memory is bounded: of more videos in feeds than `max_open`, the oldest are no longer waited for, and
count as without action.
"""

from __future__ import annotations

import threading

import numpy as np

from monolith_jax.ids.lines import jit, mix
from monolith_jax.serve.id_slots import IdSlots
from monolith_jax.serve.merge import SOURCES


@jit
def _keys(requests, videos, keys):
    # A 64-bit hash of each pair: two pairs out of 2^20 that are open have one with a chance of 2^-25.
    for i in range(requests.size):
        keys[i] = np.int64(mix(np.uint64(videos[i]) ^ mix(np.uint64(requests[i]) + np.uint64(0x2545F4914F6CDD1D))))


def _keys_of(requests: np.ndarray, videos: np.ndarray) -> np.ndarray:
    keys = np.empty(videos.size, np.int64)
    _keys(requests, videos, keys)
    return keys


class SourceReport:
    """Counts of all sources since the start. Any number tell and ask."""

    def __init__(self, max_open: int = 1 << 18) -> None:
        """Has counted nothing yet.

        Args:
            max_open: Videos in feeds that actions are waited for; costs 17 bytes each. They are kept in buckets (`id_slots`),
                so give twice what is shown in the time in which actions come.
        """
        self._slots = IdSlots(max_open)
        self._source = np.full(self._slots.size, -1, np.int8)
        self._fed, self._hits = np.zeros(len(SOURCES), np.int64), np.zeros(len(SOURCES), np.int64)
        self._feeds = self._not_open = 0
        self._lock = threading.Lock()

    def fed(self, request_id: int, video_ids: np.ndarray, sources: np.ndarray) -> None:
        """Counts a feed.

        Args:
            request_id: Of the feed.
            video_ids: int64 [n].
            sources: int8 [n], numbers in `SOURCES`.
        """
        keys = _keys_of(np.full(video_ids.size, request_id, np.int64), video_ids)
        with self._lock:
            self._feeds += 1
            slots, _ = self._slots.take(keys, np.full(keys.size, self._feeds))
            kept = slots >= 0
            self._source[slots[kept]] = sources[kept]
            self._fed += np.bincount(sources, minlength=len(SOURCES))

    def acted(self, request_ids: np.ndarray, video_ids: np.ndarray, positive: np.ndarray) -> None:
        """Counts actions; each video in a feed counts once.

        Args:
            request_ids: int64 [N], of the feeds that showed them.
            video_ids: int64 [N].
            positive: bool [N], what counts as a hit; others are passed over.
        """
        keys = np.unique(_keys_of(request_ids[positive], video_ids[positive]))
        with self._lock:
            slots = self._slots.find(keys)
            self._not_open += int(np.count_nonzero(slots < 0))
            sources = self._source[slots[slots >= 0]]
            self._source[slots[slots >= 0]] = -1
            self._hits += np.bincount(sources[sources >= 0], minlength=len(SOURCES))

    def report(self) -> dict[str, dict[str, float]]:
        """Returns by source: `fed` and `hits`, counts; `share` of all that was fed; `hit_rate`, hits / fed, 0 if none was."""
        with self._lock:
            fed, hits = self._fed.tolist(), self._hits.tolist()
        every = max(1, sum(fed))
        return {
            name: {"fed": fed[s], "hits": hits[s], "share": fed[s] / every, "hit_rate": hits[s] / max(1, fed[s])}
            for s, name in enumerate(SOURCES)
        }

    def metrics(self) -> dict[str, int]:
        """Returns the feeds, those videos that are no longer waited for, and positive actions on none that is."""
        return {"feeds": self._feeds, "replaced": self._slots.replaced, "not_open": self._not_open}
