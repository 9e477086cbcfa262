"""What is known of users and videos now, as the lake's tables have it, in memory: a request looks at no file.

In: changes of features, as they come from the lake. Out: the features of the videos and of the user of a request, as of its
time, by the rules of `lake.versions`, in the columns that training has of them (`user_<column>`, `video_<column>`). Memory is
bounded: users and videos of which nothing came for long leave first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from monolith_jax.lake.tables import Subject
from monolith_jax.lake.versions import FeatureState, state_bytes

_BLOCK = 512
"""Changes that are written while requests wait."""
_PAUSE_S = 0.0001
"""Between two blocks: a lock is not fair, and who waits would go on waiting."""

Changes = Sequence[tuple[Subject, pa.RecordBatch]]
"""Rows of features tables or of their logs, by subject."""


@dataclass(frozen=True)
class FeatureCacheConfig:
    """How much is kept of the lake's features."""

    max_users: int = 100_000
    """Users; beyond, those of whom nothing came for long leave. Costs 680 bytes each."""
    max_videos: int = 1_000_000
    """Videos, likewise. Costs 590 bytes each."""
    user_versions: int = 4
    """Of each group of a user's columns: as many as come within `ColumnGroup.known_ms`, and one that counts by then."""
    video_versions: int = 2
    """The same of a video: counts come once in a minute."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        if min(self.max_users, self.max_videos, self.user_versions, self.video_versions) < 1:
            raise ValueError(f"FeatureCacheConfig: all must be at least 1, got {self}")


class FeatureCache:
    """The features. One caller observes, any number ask."""

    def __init__(self, config: FeatureCacheConfig) -> None:
        """Knows nothing yet."""
        self.config = config
        self._states: dict[Subject, FeatureState] = {
            "user": FeatureState("user", config.max_users, config.user_versions),
            "video": FeatureState("video", config.max_videos, config.video_versions),
        }
        self._locks = {name: threading.Lock() for name in self._states}
        self._closed, self._thread = threading.Event(), None
        self.faults, self.last_fault, self.has_ended = 0, "", False
        self.latest_ms: dict[Subject, int] = dict.fromkeys(self._states, 0)
        """The latest time of a change of each."""

    def columns(self, subject: Subject) -> tuple[str, ...]:
        """Returns the names of the columns that there are of a subject."""
        return self._states[subject].columns

    def wanted(self, subject: Subject, columns: Collection[str]) -> tuple[str, ...]:
        """Returns those of `columns` that there are of a subject, and the times of their groups."""
        rows, found = self._states[subject].rows, [name for name in self.columns(subject) if name in columns]
        groups = zip(rows.groups, rows.groups_of(found), strict=True)
        times = [f"{subject}_{group.time_column}" for group, is_wanted in groups if is_wanted]
        return tuple(name for name in self.columns(subject) if name in [*found, *times])

    def observe(self, subject: Subject, batch: pa.RecordBatch) -> None:
        """Takes changes in: the next request sees them.

        Args:
            subject: Of whom.
            batch: Rows of the features table or of its log.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        state, lock = self._states[subject], self._locks[subject]
        changes = state.rows.encode(batch)
        for first in range(0, changes.ids.size, _BLOCK):
            part = changes.part(first, first + _BLOCK)
            with lock:
                state.write(part)
            time.sleep(_PAUSE_S)
        if changes.entry_rows.size:
            latest_ms = int(changes.times_ms[changes.entry_rows, changes.entry_groups].max())
            self.latest_ms[subject] = max(self.latest_ms[subject], latest_ms)

    def videos(self, ids: np.ndarray, time_ms: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Returns what is known of videos just before a time.

        Args:
            ids: int64 [N].
            time_ms: Unix time.
            columns: Some of `columns("video")`; None: all.

        Raises:
            ValueError: There is no such column.
        """
        return self.as_of("video", ids, time_ms, columns)

    def user(self, id: int, time_ms: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Returns what is known of a user just before a time, a row; as `videos`.

        Raises:
            ValueError: There is no such column.
        """
        return self.as_of("user", np.array([id], np.int64), time_ms, columns)

    def as_of(self, subject: Subject, ids: np.ndarray, time_ms: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Returns what is known of ids, int64 [N], just before a time, a row each; as `videos`.

        Raises:
            ValueError: There is no such column.
        """
        state = self._states[subject]
        times_ms = np.full(ids.size, time_ms, np.int64)
        with self._locks[subject]:
            seen = state.gather(ids, times_ms, None, columns)
        return state.rows.decode(seen, columns)

    def follow(self, reader: Iterator[Changes], retry_s: float = 1.0) -> None:
        """Starts a thread that takes in what a reader of the lake's changes yields.

        Args:
            reader: Yields lists of changes, empty ones where nothing came, so that the thread can end. After an error it is
                asked again.
            retry_s: Until then.
        """
        assert self._thread is None, "follow() was called before"
        self._thread = threading.Thread(target=self._follow, args=(reader, retry_s), name="features", daemon=True)
        self._thread.start()

    def _follow(self, reader: Iterator[Changes], retry_s: float) -> None:
        while not self._closed.is_set():
            try:
                for subject, batch in next(reader):
                    self.observe(subject, batch)
            except StopIteration:
                self.has_ended = True
                return
            except Exception as error:  # What is known goes on being served.
                self.faults += 1
                self.last_fault = f"{type(error).__name__}: {error}"
                self._closed.wait(retry_s)

    def close(self) -> None:
        """Ends the thread, once its reader has yielded."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, when full."""
        return feature_cache_bytes(self.config)

    def metrics(self) -> dict[str, Any]:
        """Returns what was counted of each subject, and how the following goes."""
        of_subjects = {
            f"{name}s": {**state.metrics(), "latest_ms": self.latest_ms[name]} for name, state in self._states.items()
        }
        return {**of_subjects, "faults": self.faults, "last_fault": self.last_fault, "has_ended": self.has_ended}


def feature_cache_bytes(config: FeatureCacheConfig) -> int:
    """Returns the bytes of a full cache, but for its texts."""
    of_users = state_bytes("user", config.max_users, config.user_versions)
    return of_users + state_bytes("video", config.max_videos, config.video_versions)
