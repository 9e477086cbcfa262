"""Held-out sessions are judged as of their request, whoever else is there, and however the source cuts its chunks."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from launch.evaluation import sessions
from launch.evaluation.past import Past
from launch.evaluation.sessions import Asked, replay
from monolith_jax.serve.pipeline import Pipeline
from monolith_jax.types import Chunk, Source

MINUTE_MS = 60_000
# User, video, minute, like. User 1 likes 12 after user 2 brought it in, and 10, which training showed.
ROWS = [(1, 11, 0, 1), (2, 12, 1, 0), (1, 12, 2, 1), (1, 10, 3, 1), (2, 11, 4, 1), (1, 11, 60, 1), (1, 13, 61, 1)]


class Stub:
    """Answers nothing, and keeps how many examples it had been told of at each request."""

    def __init__(self) -> None:
        self.told, self.asked, self.indexer = 0, list[tuple[int, int]](), None
        self.events = SimpleNamespace(examples=self.tell)

    def tell(self, examples: pa.RecordBatch) -> None:
        self.told += examples.num_rows

    def explain(self, request: Any) -> tuple[Any, Any]:
        self.asked.append((request.user_id, self.told))
        return SimpleNamespace(user_id=request.user_id), None


class Rows:
    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, position: Any) -> Iterator[Chunk]:
        for start in range(0, len(ROWS), self.size):
            user, video, minute, like = zip(*ROWS[start : start + self.size], strict=True)
            columns = {"user_id": user, "video_id": video, "event_time_ms": np.array(minute) * MINUTE_MS, "like": like}
            yield Chunk(pa.RecordBatch.from_pydict({name: pa.array(one) for name, one in columns.items()}), (), {}, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("most", [1, 2, 9])
def test_sessions_are_judged_as_of_their_request(size: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    none = np.zeros(0, np.int64)
    monkeypatch.setattr(sessions.Asked, "of", lambda feed, _: Asked(feed, none, none, none))
    pipeline, past = Stub(), Past()
    past.add_training(np.array([1, 3]), np.array([10, 13]))
    past.end_training()
    found = list(replay(cast(Pipeline, pipeline), cast(Source, Rows(size)), [], ("like",), 10, False, most, past))
    every = [(1, [11, 12], 2), (2, [11], 0), (1, [13], 0)]
    assert [(one.feed.user_id, one.wanted, one.unknown) for one in found] == every[:most]
    assert pipeline.asked == [(1, 0), (2, 1), (1, 5)][:most]
