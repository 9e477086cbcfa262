"""What happens, to the parts of the pipeline that remember it: videos come, are shown, users act.

In: record batches of videos, impressions, actions or examples, or a log of them. Out: nothing; the catalogue, the index, the
users' state, the seen filter and the sources are changed. Any number of threads may call; they take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from monolith_jax.serve.catalogue import Catalogue
from monolith_jax.serve.indexer import Indexer
from monolith_jax.serve.log_tail import LogTail
from monolith_jax.serve.seen import SeenFilter
from monolith_jax.serve.source_report import SourceReport
from monolith_jax.serve.sources import Sources
from monolith_jax.serve.user_state import UserState
from monolith_jax.stream.events import valid_mask
from monolith_jax.stream.history import ids_of

POSITIVE: Mapping[str, float] = {"like": 1.0, "comment": 1.0, "share": 2.0, "follow": 1.0}
"""Actions that trending counts, with the weight of each, and that are hits of the source that gave a video."""


class Events:
    """Tells the parts of a pipeline what happened."""

    def __init__(
        self,
        catalogue: Catalogue,
        indexer: Indexer | None,
        user_state: UserState,
        seen: SeenFilter,
        sources: Sources,
        report: SourceReport,
    ) -> None:
        """Takes over the parts."""
        self._catalogue, self._indexer, self._user_state = catalogue, indexer, user_state
        self._seen, self._sources, self._report = seen, sources, report
        self._closed, self._thread = threading.Event(), None
        self.faults, self.rows_refused, self.last_fault = 0, 0, ""
        self._lock = threading.RLock()
        self.latest = (0, 0)
        """Who was shown something last, and when, Unix time in ms."""

    def videos(self, videos: pa.RecordBatch) -> None:
        """Takes videos in, new ones and new values of known ones.

        Args:
            videos: The catalogue's columns; `event_time_ms`, if it is there, is when each was uploaded.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        with self._lock:
            upserted = self._catalogue.upsert(videos)
            if upserted.removed.size:
                self._sources.remove(upserted.removed)
            ids, there = ids_of(videos, "video_id", "the catalogue")
            rows = there & np.isin(ids, upserted.new)
            times = np.zeros(ids.size, np.int64)
            if "event_time_ms" in videos.schema.names:
                times = videos.column("event_time_ms").fill_null(0).to_numpy()
            authors, known = np.zeros(ids.size, np.int64), np.zeros(ids.size, np.bool_)
            if "author_id" in videos.schema.names:
                authors, known = ids_of(videos, "author_id", "the catalogue")
            self._sources.videos(ids[rows], authors[rows], times[rows], known[rows])
            if self._indexer:
                self._indexer.remove(upserted.removed)
                self._indexer.add(ids[there])

    def remove(self, ids: np.ndarray) -> int:
        """Takes videos out, int64 [N]: none is shown from here on; returns how many were there."""
        with self._lock:
            number = self._catalogue.remove(ids)
            self._sources.remove(ids)
            if self._indexer:
                self._indexer.remove(ids)
            return number

    def impressions(self, impressions: pa.RecordBatch) -> None:
        """Takes impressions in: a video that is not known is one that has come.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        with self._lock:
            videos, there = ids_of(impressions, "video_id", "an impression")
            users, known = ids_of(impressions, "user_id", "an impression")
            new = there & ~self._catalogue.known(videos)
            if new.any():
                try:
                    self.videos(impressions.filter(pa.array(new)))
                except ValueError as error:  # What was shown was seen, whether or not the catalogue can take it.
                    self._fault(error, int(np.count_nonzero(new)))
            self._sources.impressions(videos[there])
            both = there & known
            self._seen.add(users[both], videos[both])
            times = impressions.column("event_time_ms")
            both &= valid_mask(times)
            if both.any():
                last = int(np.flatnonzero(both)[-1])
                self.latest = int(users[last]), times[last].as_py()

    def actions(self, actions: pa.RecordBatch) -> None:
        """Takes actions in, in the order in which they come: the next request of their users feels them.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        with self._lock:
            self._user_state.observe(actions, self._durations, self._authors)
            users, user_known = ids_of(actions, "user_id", "an action")
            acted, video_known = ids_of(actions, "video_id", "an action")
            self._seen.add(users[user_known & video_known], acted[user_known & video_known])
            name = actions.column("action").cast(pa.string()).fill_null("").to_numpy(zero_copy_only=False)
            weights = np.array([POSITIVE.get(one, 0.0) for one in name.tolist()])
            videos, there = ids_of(actions, "video_id", "an action")
            self._liked(actions, videos, np.where(there, weights, 0.0))

    def examples(self, examples: pa.RecordBatch) -> None:
        """Takes examples in: impressions with all that followed, from a source that is no log.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        with self._lock:
            self.impressions(examples)
            self._user_state.observe_examples(examples)
            weights = np.zeros(examples.num_rows)
            for name, weight in POSITIVE.items():
                if name in examples.schema.names:
                    weights += weight * examples.column(name).fill_null(False).to_numpy(zero_copy_only=False)
            videos, there = ids_of(examples, "video_id", "an example")
            self._liked(examples, videos, np.where(there, weights, 0.0))

    def _fault(self, error: Exception, rows: int) -> None:
        self.faults += 1
        self.rows_refused += rows
        self.last_fault = f"{type(error).__name__}: {error}"

    def _liked(self, batch: pa.RecordBatch, videos: np.ndarray, weights: np.ndarray) -> None:
        rows = np.flatnonzero(weights)
        if not rows.size:
            return
        times = batch.column("event_time_ms")
        rows = rows[valid_mask(times)[rows]]
        self._sources.acted(videos[rows], weights[rows], times.fill_null(0).to_numpy()[rows])
        if "request_id" in batch.schema.names:
            requests, told = ids_of(batch, "request_id", "an action")
            rows = rows[told[rows]]
            self._report.acted(requests[rows], videos[rows], np.ones(rows.size, np.bool_))

    def _durations(self, videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._values("duration_ms", videos)

    def _authors(self, videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._values("author_id", videos)

    def _values(self, name: str, videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._catalogue.config.columns:
            return np.zeros(videos.size, np.int64), np.zeros(videos.size, np.bool_)
        return self._catalogue.values(name, videos)

    def rebuild(self, tail: LogTail) -> int:
        """Takes in all that a log has from where a tail begins; returns how many events."""
        taken = 0
        for events in tail.catch_up():
            taken += self._take(events.impressions, events.actions)
        return taken

    def _take(self, impressions: pa.RecordBatch | None, actions: pa.RecordBatch | None) -> int:
        # Impressions first: an action finds its video's duration and author. What is wrong with one does not lose the other.
        for take, batch in ((self.impressions, impressions), (self.actions, actions)):
            try:
                if batch is not None:
                    take(batch)
            except ValueError as error:
                self._fault(error, 0 if batch is None else batch.num_rows)
        return sum(batch.num_rows for batch in (impressions, actions) if batch is not None)

    def follow(self, tail: LogTail, period_s: float = 0.02) -> None:
        """Starts a thread that takes in what comes to a log."""
        assert self._thread is None, "follow() was called before"
        self._thread = threading.Thread(target=self._follow, args=(tail, period_s), name="events", daemon=True)
        self._thread.start()

    def _follow(self, tail: LogTail, period_s: float) -> None:
        while not self._closed.wait(period_s):
            try:
                events = tail.poll()
                self._take(events.impressions, events.actions)
            except Exception as error:  # What is remembered goes on being served.
                self._fault(error, 0)
        tail.close()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def metrics(self) -> dict[str, Any]:
        """Returns what each part has counted."""
        return {
            "videos": len(self._catalogue),
            "videos_refused": self._catalogue.refused,
            "user_state": self._user_state.metrics(),
            "seen": self._seen.metrics(),
            "sources": self._sources.metrics(),
            "report": self._report.report(),
            "faults": self.faults,
            "rows_refused": self.rows_refused,
            "last_fault": self.last_fault,
        }
