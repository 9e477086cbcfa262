"""Keeps the index in step with the model and the catalogue: videos enter, move and leave as deltas arrive.

In: what the served model's deltas changed, and videos that are new in the catalogue. Out: vectors in the index, made by the
two-tower's video side from the version that is served. The dense weights move all vectors a little: a slow sweep goes round the
catalogue and makes them anew, so that none is older than the catalogue's size over `refresh_per_s`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from monolith_jax.serve.catalogue import Catalogue
from monolith_jax.serve.changes import Changed
from monolith_jax.serve.encode import Encoder
from monolith_jax.serve.index import VideoIndex
from monolith_jax.serve.served_model import ServedModel

_BLOCK = 256
"""Videos whose vectors are made at once: a request waits for no more than that."""

_BUILD = 1 << 16
_UNCHANGED = Changed(np.zeros(0, np.int64), np.zeros(0, np.int64))
_LEARN_S = 600.0
"""How often the index is laid out for those who ask now: towers and users drift."""
_LEAST = 256
"""Users that it takes for that."""


class Indexer:
    """The one writer of an index. One thread at a time calls `step` (`watch` starts one); any other may call `add`."""

    def __init__(
        self,
        model: ServedModel,
        encoder: Encoder,
        catalogue: Catalogue,
        layout: int,
        index: VideoIndex,
        table: str,
        refresh_per_s: int,
        gone: Callable[[np.ndarray], None],
        recent: Callable[[], np.ndarray] = lambda: np.zeros((0, 0), np.float32),
    ) -> None:
        """Takes over its parts; the index is filled by `step`.

        Args:
            model: The served two-tower; made with `follow` of `table`.
            encoder: Makes vectors.
            catalogue: The videos.
            layout: Which of its layouts the encoder reads.
            index: Where vectors go.
            table: Table of the videos' ids; empty: the towers read no id, so that no row moves a vector.
            refresh_per_s: Videos whose vectors are made anew in a second, beside those that changed.
            gone: Is told ids of videos that leave, because training let them go.
            recent: Gives vectors of users who asked last, float32 [Q, D].
        """
        self._model, self._encoder, self._catalogue, self._layout = model, encoder, catalogue, layout
        self._index, self._table, self._refresh_per_s, self._gone = index, table, refresh_per_s, gone
        self._recent, self._learned_s = recent, time.monotonic()
        self._pending: list[np.ndarray] = []
        self._leaving: list[np.ndarray] = []
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._watcher: threading.Thread | None = None
        self._due, self._last_s = 0.0, time.monotonic()
        self._counts = {"encoded": 0, "refreshed": 0, "left": 0, "learned": 0, "faults": 0}
        self.last_fault = ""

    def add(self, ids: np.ndarray) -> None:
        """Asks for the vectors of videos that are new in the catalogue, or have new columns, int64 [N]."""
        if ids.size:
            with self._lock:
                self._pending.append(ids)

    def remove(self, ids: np.ndarray) -> None:
        """Asks for videos to be taken out of the index, int64 [N]; as they are in no catalogue, none is shown until then."""
        if ids.size:
            with self._lock:
                self._leaving.append(ids)

    def step(self) -> int:
        """Brings the index up to what has changed, and refreshes what is due; returns how many vectors were made."""
        changed = self._model.take_changed(self._table) if self._table else _UNCHANGED
        if changed.deleted.size:
            self._counts["left"] += self._catalogue.remove(changed.deleted)
            self._index.remove(changed.deleted)
            self._gone(changed.deleted)
        with self._lock:
            pending, self._pending = self._pending, []
            leaving, self._leaving = self._leaving, []
        if leaving:
            self._remove_unknown(np.concatenate(leaving))
        asked = np.unique(np.concatenate([changed.written, *pending]))
        made = self._encode(asked)
        self._counts["encoded"] += made
        now_s = time.monotonic()
        if now_s - self._learned_s > _LEARN_S:
            self._learned_s, users = now_s, self._recent()
            if len(users) >= _LEAST:
                self._index.learn(users)
                self._counts["learned"] += 1
        self._due = min(self._due + (now_s - self._last_s) * self._refresh_per_s, float(self._refresh_per_s))
        self._last_s = now_s
        if self._due >= 1:
            refreshed = self._encode(self._catalogue.sweep(int(self._due)))
            self._due -= int(self._due)
            self._counts["refreshed"] += refreshed
            made += refreshed
        return made

    def _remove_unknown(self, ids: np.ndarray) -> None:
        """Takes those of some videos out of the index that are not in the catalogue any more."""
        self._index.remove(ids[~self._catalogue.known(ids)])

    def _encode(self, ids: np.ndarray) -> int:
        made = 0
        for first in range(0, ids.size, _BLOCK):
            of_block = ids[first : first + _BLOCK]
            taken = self._catalogue.take(of_block, self._layout)
            assert taken.features is not None
            if taken.known.any():
                vectors = self._encoder.videos(taken.features)[taken.known]
                self._index.upsert(of_block[taken.known], vectors)
                self._remove_unknown(of_block[taken.known])  # Some may have left meanwhile.
                made += len(vectors)
        return made

    def build(self, queries: np.ndarray | None = None) -> int:
        """Fills an empty index with all videos of the catalogue at once; returns how many vectors were made.

        Args:
            queries: float32 [Q, D], a sample of the users' vectors, for `VideoIndex.build`.
        """
        with self._lock:
            self._pending = []
        ids, vectors = self._catalogue.ids(), []
        for first in range(0, ids.size, _BUILD):
            taken = self._catalogue.take(ids[first : first + _BUILD], self._layout)
            assert taken.features is not None
            vectors.append(self._encoder.videos(taken.features))
        if vectors:
            self._index.build(ids, np.concatenate(vectors), queries)
            self._remove_unknown(ids)
        return ids.size

    def watch(self, period_s: float) -> None:
        """Starts a thread that calls `step` every `period_s` seconds."""
        assert self._watcher is None, "watch() was called before"
        self._watcher = threading.Thread(target=self._watch, args=(period_s,), name="indexer", daemon=True)
        self._watcher.start()

    def _watch(self, period_s: float) -> None:
        while not self._closed.wait(period_s):
            try:
                self.step()
            except Exception as error:  # The index as it is goes on being searched.
                self._counts["faults"] += 1
                self.last_fault = f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()

    def metrics(self) -> dict[str, Any]:
        """Returns what was made anew, and what the index tells."""
        return {**self._index.metrics(), **self._counts, "last_fault": self.last_fault}
