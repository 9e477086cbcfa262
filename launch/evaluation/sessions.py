"""Held-out examples as sessions that are replayed: what a pipeline would have answered, and what the user liked then.

In: a pipeline that knows what training saw, and the held-out examples in the order of time. Out: `Asked`, one a session with a
positive. A session is a user's examples without a gap of half an hour; the request is made at its first one, before the
pipeline is told of it. What the pipeline answers was never shown, and does not count as seen; what is in the examples does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from launch.evaluation.held_out import remember
from launch.evaluation.retrieval import is_positive
from monolith_jax.reader import Memory
from monolith_jax.serve.pipeline import Pipeline
from monolith_jax.serve.pool import Candidates
from monolith_jax.serve.request import Feed, Request
from monolith_jax.stream.history import ids_of
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
    """Videos that the user liked in the session; those that were shown to the user before are left out."""
    unknown: int = 0
    """How many of these no one had been shown before: they could not be found."""

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


def replay(
    pipeline: Pipeline,
    source: Source,
    memories: Sequence[Memory],
    positives: Sequence[str],
    number: int,
    again: bool,
    most: int,
) -> Iterator[Asked]:
    """Yields the sessions with something to be found, in the order in which they began.

    Args:
        pipeline: It knows what came before.
        source: The held-out examples, in the order of time.
        memories: What the examples' columns are extended by.
        positives: Labels of what a user liked.
        number: Videos of a feed.
        again: Whether videos' columns change with each example.
        most: Sessions at most; the rest is not read.
    """
    open_sessions: dict[int, tuple[int, Asked]] = {}  # By user: the time of the last example.
    asked: list[Asked] = []
    for chunk in source.read({}):
        if chunk.epoch or len(asked) >= most:
            break
        if not chunk.examples.num_rows:
            continue
        examples = remember(memories, chunk.examples)
        users, _ = ids_of(examples, "user_id", "an example")
        videos, _ = ids_of(examples, "video_id", "an example")
        times = examples.column("event_time_ms").to_numpy()
        liked, told = is_positive(examples, positives), 0
        for row, (user, video, time_ms) in enumerate(zip(users.tolist(), videos.tolist(), times.tolist(), strict=True)):
            last = open_sessions.get(user)
            if last is None or time_ms - last[0] > GAP_MS:
                if len(asked) >= most:
                    continue
                if row > told:
                    tell(pipeline, examples.slice(told, row - told), again)
                    told = row
                one = Asked.of(*pipeline.explain(_request(examples, row, user, time_ms, number)))
                asked.append(one)
            else:
                one = last[1]
            open_sessions[user] = (time_ms, one)
            if liked[row] and video not in one.wanted and pipeline.seen.unseen(user, np.array([video]))[0]:
                one.wanted.append(video)
                one.unknown += not pipeline.catalogue.known(np.array([video]))[0]
        tell(pipeline, examples.slice(told), again)
    yield from (one for one in asked if one.wanted)


def _request(examples: pa.RecordBatch, row: int, user: int, time_ms: int, number: int) -> Request:
    """Returns the request that a session begins with; what else the example has is its context."""
    context = examples.slice(row, 1).to_pylist()[0]
    return Request(user, number, time_ms=time_ms, context=context)
