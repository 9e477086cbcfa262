"""Feeds to impressions: what was shown, with the features as the models saw them, so that training sees what serving saw.

In: a feed, the row of its request, the columns of its videos and what was looked up of them. Out: impressions
(`stream.events.IMPRESSION` and the logged columns), which `stream.feed.Outlet` sends to a log; joined with the actions that
follow they are the next examples.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from monolith_jax.serve.request import Feed
from monolith_jax.stream.events import IMPRESSION

FEED_COLUMNS = ("position", "source", "propensity", "explored", "value")
"""What an impression tells of the feed that it was in."""


def impressions_of(
    feed: Feed, request: pa.RecordBatch, videos: pa.RecordBatch, live: pa.RecordBatch | None = None
) -> pa.RecordBatch:
    """Returns the impressions of a feed, one a video, in order.

    Args:
        feed: What was answered.
        request: Its row: columns of user and request, histories among them.
        videos: Columns of its videos, a row each. A column of the request with the same name is left out.
        live: Further columns of them, as they were when they were ranked.
    """
    number = len(feed)
    columns: dict[str, pa.Array] = {
        "event_time_ms": pa.array(np.full(number, feed.time_ms)),
        "request_id": pa.array(np.full(number, feed.request_id)),
        "user_id": pa.array(np.full(number, feed.user_id)),
    }
    columns |= dict(zip(videos.schema.names, videos.columns, strict=True))
    if live is not None:
        columns |= dict(zip(live.schema.names, live.columns, strict=True))
    repeated = request.take(pa.array(np.zeros(number, np.int64)))
    for name, array in zip(repeated.schema.names, repeated.columns, strict=True):
        columns.setdefault(name, array)
    columns |= {
        "position": pa.array(np.arange(number)),
        "source": pa.array(feed.sources, pa.string()),
        "propensity": pa.array(feed.propensities),
        "explored": pa.array(feed.explored),
        "value": pa.array(feed.values),
    }
    for field in IMPRESSION:
        columns.setdefault(field.name, pa.nulls(number, field.type))
    fields = [pa.field(name, array.type, IMPRESSION.field(name).nullable if name in IMPRESSION.names else True)
              for name, array in columns.items()]  # fmt: skip
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=pa.schema(fields))
