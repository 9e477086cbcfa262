"""Recall: from all videos to the thousand that are ranked.

In: requests. Out: the candidates of each: by the two-tower from the index, and from the sources that are not learned, each
video once, none that the user has seen. Where a source fails, the others fill its places.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from monolith_jax.features import featurize
from monolith_jax.serve.asked import Asked, Clock
from monolith_jax.serve.catalogue import Catalogue
from monolith_jax.serve.encode import Encoder
from monolith_jax.serve.index import VideoIndex
from monolith_jax.serve.merge import SOURCES, Merged, merge
from monolith_jax.serve.seen import SeenFilter
from monolith_jax.serve.sources import Sources
from monolith_jax.serve.user_state import UserState

_POPULAR = 500
"""Videos that stand in where recall fails."""
_ANYTHING = 2000
"""Videos that are looked through where nothing else may be shown."""
_SPARE = 200
"""Candidates that a source gives beyond its quota: some were seen, or come from another source too."""

_RECENT = 2048
"""Users whose vectors are kept, for the index to learn from."""
_LIKED = 2
"""Videos that others are like."""


class Recall:
    """All sources. Any number of threads may ask."""

    def __init__(
        self,
        quotas: dict[str, int],
        encoder: Encoder | None,
        index: VideoIndex | None,
        sources: Sources,
        seen: SeenFilter,
        user_state: UserState,
        catalogue: Catalogue,
        clock: Clock,
    ) -> None:
        """Takes over its parts; without encoder and index the sources that are not learned give all candidates."""
        self._quotas, self._encoder, self._index, self._sources = quotas, encoder, index, sources
        self._seen, self._user_state, self._catalogue, self._clock = seen, user_state, catalogue, clock
        self._recent: deque[np.ndarray] = deque(maxlen=_RECENT)

    def search(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """Returns videos by the two-tower for each request, int64 [N], best first; none where that cannot be."""
        began_s, number = time.perf_counter(), self._quotas["two_tower"]
        none = [np.zeros(0, np.int64)] * len(asked)
        if not asked or not number:
            return none
        if self._encoder is None or self._index is None or not len(self._index):
            for one in asked:
                one.flags.append("no_index")
            return none
        if not all([self._clock.has_time(one, "recall") for one in asked]):
            return none
        try:
            vectors = self.user_vectors([one.row for one in asked])
            ids, scores = self._index.search(vectors, number + _SPARE)
            self._recent.extend(vectors)
        except Exception as error:  # Whatever went wrong, the other sources go on.
            self._clock.failed(asked, "recall", error)
            return none
        self._clock.note(asked, "recall", began_s)
        return [of_one[found > -np.inf] for of_one, found in zip(ids, scores, strict=True)]

    def recent(self) -> np.ndarray:
        """Returns the vectors of users who asked last, float32 [Q, D]."""
        vectors = self._recent.copy()
        return np.stack(list(vectors)) if vectors else np.zeros((0, 0), np.float32)

    def user_vectors(self, rows: Sequence[pa.RecordBatch]) -> np.ndarray:
        """Returns the two-tower's vectors of users, float32 [B, D], given the row of each request."""
        assert self._encoder is not None
        together = rows[0] if len(rows) == 1 else _together(rows)
        return self._encoder.users(featurize(together, self._encoder.user_layout))

    def candidates(self, asked: Asked, hits: np.ndarray) -> Merged:
        """Returns the candidates of a request, given what `search` returned for it."""
        began_s, quotas, now_ms, user = time.perf_counter(), self._quotas, asked.time_ms, asked.request.user_id
        try:
            followed = np.concatenate([np.array(asked.request.followed_authors, np.int64), self._user_state.followed(user)])
            lists = {
                "two_tower": hits,
                "similar": self._similar(asked),
                "fresh": self._sources.fresh(quotas["fresh"] + _SPARE, now_ms),
                "trending": self._sources.trending(quotas["trending"] + _SPARE, now_ms),
                "followed": self._sources.of_authors(followed, quotas["followed"] + _SPARE),
                "explore": self._sources.explore(quotas["explore"] + _SPARE, asked.rng),
            }
            merged = merge(lists, quotas, lambda ids: self._seen.unseen(user, ids))
        except Exception as error:  # Popular videos have to do.
            self._clock.failed([asked], "recall", error)
            merged = self._popular(now_ms)
        self._clock.note([asked], "merge", began_s)
        return merged

    def _similar(self, asked: Asked) -> np.ndarray:
        """Returns videos like those that the user liked last, by turns, int64 [N]."""
        number = self._quotas["similar"]
        if not number or self._index is None or not asked.liked.size:
            return np.zeros(0, np.int64)
        vectors, known = self._index.vectors(asked.liked[:_LIKED])
        if not known.any():
            return np.zeros(0, np.int64)
        ids, scores = self._index.search(vectors[known], number)
        return ids.T[scores.T > -np.inf]

    def _popular(self, now_ms: int) -> Merged:
        popular = self._sources.trending(_POPULAR, now_ms)
        ids = popular if popular.size else self._sources.fresh(_POPULAR, now_ms)
        source = np.full(ids.size, SOURCES.index("trending" if popular.size else "fresh"), np.int8)
        return Merged(ids, source, np.zeros(ids.size, np.uint8))

    def anything(self, asked: Asked, ids: np.ndarray, source: np.ndarray) -> Merged:
        """Returns candidates, and behind them any videos, popular ones first, also such as the user has seen.

        Args:
            asked: The request.
            ids: The candidates, int64 [K].
            source: Their sources, int8 [K].

        Returns:
            All of them; `sources` is 0 for the others.
        """
        popular = self._popular(asked.time_ms)
        rest = self._catalogue.sweep(_ANYTHING)
        others = np.concatenate([popular.ids, rest])
        of_others = np.concatenate([popular.source, np.full(rest.size, SOURCES.index("explore"), np.int8)])
        _, first = np.unique(others, return_index=True)
        new = np.sort(first[~np.isin(others[first], ids)])
        sources = np.concatenate([np.uint8(1) << source.astype(np.uint8), np.zeros(new.size, np.uint8)])
        return Merged(np.concatenate([ids, others[new]]), np.concatenate([source, of_others[new]]), sources)


def _together(rows: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Returns rows as one batch; a column that one request left null takes the type that another gave it."""
    tables = [pa.Table.from_batches([row]) for row in rows]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks().to_batches()[0]
