"""Recall: from all videos to the thousand that are ranked.

In: requests. Out: the candidates of each: by the two-tower from the index, and from the sources that are not learned, each
video once, none that the user has seen. Where a source fails, the others fill its places.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

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
"""Popular videos that come first where there are too few candidates."""
_ANYTHING = 2000
"""Any videos that come behind those."""
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
        in_time = [one for one in asked if self._clock.has_time(one, "recall")]
        if len(in_time) < len(asked):
            found = iter(self.search(in_time))
            return [next(found) if one in in_time else none[0] for one in asked]
        try:
            vectors = self.user_vectors([one.row for one in asked])
            ids, scores = self._index.search(vectors, number + _SPARE)
            self._recent.extend(vectors)
        except Exception as error:  # Whatever went wrong, the other sources go on, and so do the other requests.
            if len(asked) > 1:
                return [self.search([one])[0] for one in asked]
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
        sources: dict[str, Callable[[], np.ndarray]] = {
            "similar": lambda: self._similar(asked),
            "fresh": lambda: self._sources.fresh(quotas["fresh"] + _SPARE, now_ms),
            "trending": lambda: self._sources.trending(quotas["trending"] + _SPARE, now_ms),
            "followed": lambda: self._followed(asked, quotas["followed"] + _SPARE),
            "explore": lambda: self._sources.explore(quotas["explore"] + _SPARE, asked.rng),
        }
        lists = {"two_tower": hits}
        for name, give in sources.items():
            try:
                lists[name] = give()
            except Exception as error:  # The others fill its places.
                self._clock.failed([asked], "recall", error)
        merged = merge(lists, quotas, lambda ids: self._seen.unseen(user, ids))
        self._clock.note([asked], "merge", began_s)
        return merged

    def _followed(self, asked: Asked, number: int) -> np.ndarray:
        followed = self._user_state.followed(asked.request.user_id)
        followed = np.concatenate([np.array(asked.request.followed_authors, np.int64), followed])
        return self._sources.of_authors(followed, number)

    def _similar(self, asked: Asked) -> np.ndarray:
        """Returns videos like those that the user liked last, by turns, int64 [N]."""
        number = self._quotas["similar"]
        if not number or self._index is None or not asked.liked.size:
            return np.zeros(0, np.int64)
        vectors, known = self._index.vectors(asked.liked[:_LIKED])
        if not known.any():
            return np.zeros(0, np.int64)
        ids, scores = self._index.search(vectors[known], number)
        found = ids.T[scores.T > -np.inf]
        return found[~np.isin(found, asked.liked)]

    def anything(self, asked: Asked, merged: Merged) -> Merged:
        """Returns candidates, and behind them any videos, popular ones first, also such as the user has seen.

        Args:
            asked: The request.
            merged: The candidates.

        Returns:
            All of them; `sources` is 0 for the others.
        """
        popular = self._sources.trending(_POPULAR, asked.time_ms)
        rest = self._catalogue.some(_ANYTHING, asked.rng)
        others = np.concatenate([popular, rest])
        of_others = np.repeat(np.array([SOURCES.index("trending"), SOURCES.index("fresh")], np.int8), [popular.size, rest.size])
        _, first = np.unique(others, return_index=True)
        new = np.sort(first[~np.isin(others[first], merged.ids)])
        ids, source = np.concatenate([merged.ids, others[new]]), np.concatenate([merged.source, of_others[new]])
        return Merged(ids, source, np.concatenate([merged.sources, np.zeros(new.size, np.uint8)]))


def _together(rows: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Returns rows as one batch; a column that one request left null takes the type that another gave it."""
    tables = [pa.Table.from_batches([row]) for row in rows]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks().to_batches()[0]
