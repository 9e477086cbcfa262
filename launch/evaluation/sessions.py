"""Held-out examples as sessions that are replayed: what a pipeline would have answered, and what the user liked then.

In: a pipeline that knows what training saw, and the held-out examples in the order of time. Out: `Asked`, one a session with a
positive. A session is a user's examples without a gap of half an hour; the request is made at its first one, before the
pipeline is told of it. What the pipeline answers was never shown, and does not count as seen; what is in the examples does.
All is judged as of the request: what others do during a session, and how the source cuts its chunks, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from launch.evaluation.held_out import remember
from launch.evaluation.past import Past
from launch.evaluation.retrieval import is_positive
from monolith_jax.reader import Memory
from monolith_jax.serve.pipeline import Pipeline
from monolith_jax.serve.pool import Candidates
from monolith_jax.serve.request import Feed, Request
from monolith_jax.stream.history import ids_of
from monolith_jax.stream.run_schema import concatenated
from monolith_jax.types import Source

GAP_MS = 30 * 60 * 1000
"""Of a user's examples: the next session begins."""


@dataclass
class Asked:
    """A request that was answered, and what its session liked."""

    feed: Feed
    pool: np.ndarray
    """int64 [K], the candidates of recall, in its order."""
    source: np.ndarray
    """int8 [K], where each is from."""
    ranked: np.ndarray
    """int64 [K], the same, best first."""
    wanted: list[int] = field(default_factory=list)
    """Videos that the user liked in the session; those that were shown to the user before the request are left out."""
    unknown: int = 0
    """How many of these no one had been shown before the request: they could not be found."""

    @classmethod
    def of(cls, feed: Feed, candidates: Candidates) -> Asked:
        """Returns what was answered, without what was added only because others were too few."""
        of_recall = ~candidates.is_spare
        ids, values = candidates.ids[of_recall], candidates.values[of_recall]
        return cls(feed, ids, candidates.source[of_recall], ids[np.argsort(-values, kind="stable")])


def tell(pipeline: Pipeline, examples: pa.RecordBatch, again: bool) -> None:
    """Tells a pipeline of examples; `again`: known videos have new values of their columns."""
    pipeline.events.examples(examples)
    if again:
        tell_anew(pipeline, examples)
    if pipeline.indexer:
        pipeline.indexer.step()


def tell_anew(pipeline: Pipeline, examples: pa.RecordBatch) -> None:
    """Tells a pipeline the columns of videos as their last examples have them."""
    videos, _ = ids_of(examples, "video_id", "an example")
    _, last = np.unique(videos[::-1], return_index=True)
    pipeline.events.videos(examples.take(pa.array(videos.size - 1 - last)))


@dataclass
class _Session:
    """A session that may go on."""

    asked: Asked
    number: int
    """Of the held-out example that the request was made at."""
    last_ms: int
    shown: set[int] = field(default_factory=set)
    """Videos of the session."""

    def take(self, past: Past, user: int, video: int, is_liked: bool) -> None:
        """Takes the next example."""
        self.shown.add(video)
        wanted = self.asked.wanted
        if is_liked and video not in wanted and not past.shown(user, video):
            wanted.append(video)
            self.asked.unknown += not past.known(video, self.number)


def replay(
    pipeline: Pipeline,
    source: Source,
    memories: Sequence[Memory],
    positives: Sequence[str],
    number: int,
    again: bool,
    most: int,
    past: Past,
) -> Iterator[Asked]:
    """Yields the sessions with something to be found, in the order in which they began.

    Args:
        pipeline: It knows what came before.
        source: The held-out examples, in the order of time.
        memories: What the examples' columns are extended by.
        positives: Labels of what a user liked.
        number: Videos of a feed.
        again: Whether videos' columns change with each example.
        most: Sessions at most; once there are so many, no more is read than to the end of each.
        past: Who was shown what in training; it goes on.
    """
    of_users: dict[int, _Session] = {}
    asked: list[Asked] = []
    untold: list[pa.RecordBatch] = []
    count = 0
    for chunk in source.read({}):
        if chunk.epoch:
            break
        if not chunk.examples.num_rows:
            continue
        if len(asked) >= most and _are_over(of_users, chunk.examples):
            break
        examples = remember(memories, chunk.examples)
        users, _ = ids_of(examples, "user_id", "an example")
        videos, _ = ids_of(examples, "video_id", "an example")
        times = examples.column("event_time_ms").to_numpy()
        liked, told = is_positive(examples, positives), 0
        for row, (user, video, time_ms) in enumerate(zip(users.tolist(), videos.tolist(), times.tolist(), strict=True)):
            one = of_users.get(user)
            if one is None or time_ms - one.last_ms > GAP_MS:
                if len(asked) >= most:
                    continue
                _tell_all(pipeline, [*untold, examples.slice(told, row - told)], again)
                untold, told = [], row
                if one is not None:
                    past.add(user, one.shown)
                feed = pipeline.explain(_request(examples, row, user, time_ms, number))
                one = of_users[user] = _Session(Asked.of(*feed), count + row, time_ms)
                asked.append(one.asked)
            one.last_ms = time_ms
            past.note(video, count + row)
            one.take(past, user, video, bool(liked[row]))
        untold.append(examples.slice(told))
        count += examples.num_rows
        if len(asked) >= most:
            untold = []  # Nobody asks any more.
    _tell_all(pipeline, untold, again)
    yield from (one for one in asked if one.wanted)


def _are_over(of_users: Mapping[int, _Session], examples: pa.RecordBatch) -> bool:
    """Returns whether these examples and those behind them are too late for all sessions."""
    return examples.column("event_time_ms")[0].as_py() - max(one.last_ms for one in of_users.values()) > GAP_MS


def _tell_all(pipeline: Pipeline, parts: Sequence[pa.RecordBatch], again: bool) -> None:
    """Tells a pipeline of examples at once, however they came."""
    if filled := [part for part in parts if part.num_rows]:
        tell(pipeline, concatenated(filled), again)


def _request(examples: pa.RecordBatch, row: int, user: int, time_ms: int, number: int) -> Request:
    """Returns the request that a session begins with; what else the example has is its context."""
    context = examples.slice(row, 1).to_pylist()[0]
    return Request(user, number, time_ms=time_ms, context=context)
