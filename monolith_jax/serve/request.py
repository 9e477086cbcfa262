"""What is asked for, and what is answered.

In: a `Request`. Out: a `Feed`: videos in order, with what was predicted of each, where it came from and how likely it was to be
shown there; and what of the answer is not as it should be, as flags.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

FLAGS = {
    "unknown_user": "nothing is known of the user: no row in the tables and no action",
    "seen_again": "too few of the candidates may be shown; popular videos, and any others, were added, be they seen or not",
    "no_index": "the index is empty, or there is no two-tower model: the other sources fill the feed",
    "no_ranker": "there is no ranking model: the order is that of recall",
    "recall_failed": "a source raised an error: the others fill its places",
    "rank_failed": "the ranking model raised an error: the order is that of recall",
    "rerank_failed": "the rules raised an error: the order is that of the values",
    "deadline_recall": "there was no time for the two-tower: the other sources alone",
    "deadline_rank": "there was no time to rank: the order is that of recall",
    "short": "there were fewer videos that may be shown than asked for",
    "empty": "there was no video that may be shown",
}
"""What a feed may be marked with."""


@dataclass(frozen=True)
class Request:
    """One user who wants videos."""

    user_id: int
    number: int = 10
    """Videos of the feed."""
    time_ms: int | None = None
    """Unix time; None: now."""
    group: str = ""
    """The user's group, for the value weights of `RankConfig.groups`."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Further columns that features read: device, region, ... What is not given is null."""
    followed_authors: Sequence[int] = ()
    """Authors that the user follows, beside those that were followed on the stream."""
    blocked_authors: Sequence[int] = ()
    """Authors that must not be shown."""
    deadline_ms: float = math.inf
    """Milliseconds that the answer may take, from the call."""


@dataclass(frozen=True)
class Feed:
    """A ranked list of videos. Arrays have a row for each, in order."""

    request_id: int
    user_id: int
    time_ms: int
    video_ids: np.ndarray
    """int64 [N]"""
    values: np.ndarray
    """float32 [N], what they were ordered by; NaN where nothing was predicted."""
    scores: np.ndarray
    """[N, T], calibrated predictions of each head; NaN where nothing was predicted."""
    heads: tuple[str, ...]
    sources: tuple[str, ...]
    """Of each video, the source that it came from."""
    explored: np.ndarray
    """bool [N], whether chance put it there."""
    propensities: np.ndarray
    """float32 [N], how likely the video was to get this place, given those before it and the candidates,
    of which the explore source draws its own anew for each request."""
    relaxed: tuple[tuple[int, str], ...]
    """Rules that were broken because nothing else was left: place and rule."""
    flags: tuple[str, ...]
    """Keys of `FLAGS`."""
    version: tuple[int, int] | None
    """Of the ranking model, epoch and sequence; None: there was none."""
    timings_ms: Mapping[str, float]
    """Of each stage, and in total."""
    impressions: pa.RecordBatch | None
    """What is to be logged when it is shown (`feed_log`): features as the models saw them, source, propensity."""

    def __len__(self) -> int:
        """Returns the number of videos."""
        return self.video_ids.size


def request_row(
    request: Request,
    time_ms: int,
    columns: Sequence[str],
    known: Mapping[str, pa.Array],
    looked_up: Mapping[str, pa.Array] | None = None,
) -> pa.RecordBatch:
    """Returns the request as a row of an example: the columns that features of the user and of the request read.

    Args:
        request: It.
        time_ms: Its time.
        columns: Which columns; one that nobody knows is null.
        known: Lists that are kept of the user, by column: histories.
        looked_up: What else is known of the user, by column, a row each.

    Raises:
        ValueError: A value of the context is of a type that no column has.
    """
    arrays = []
    for name in columns:
        match name:
            case "user_id":
                arrays.append(pa.array([request.user_id], pa.int64()))
            case "event_time_ms":
                arrays.append(pa.array([time_ms], pa.int64()))
            case _ if looked_up and name in looked_up:
                arrays.append(looked_up[name])
            case _ if name in known:
                arrays.append(pa.ListArray.from_arrays(pa.array([0, len(known[name])], pa.int32()), known[name]))
            case _:
                arrays.append(_context(name, request.context.get(name)))
    return pa.RecordBatch.from_arrays(arrays, list(columns))


def _context(name: str, value: Any) -> pa.Array:
    if value is None:
        return pa.nulls(1, pa.int64())
    try:
        return pa.array([value])
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"Request.context[{name!r}] is {value!r}, which no column can hold: {error}") from None
