"""A request on its way through the stages: what it has cost so far, and what time is left for.

In: requests, and the beginnings of stages. Out: flags and timings of each, and what a stage is expected to take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.serve.request import Request

_LEARN = 0.05
"""Share of the newest time in what a stage is expected to take."""
_FIRST_MS = 10.0
"""What a stage is expected to take at most after its first time, which may compile."""
_MUST = ("merge", "rerank", "feed")
"""Stages that every request goes through."""
_SAFE = 1.5
"""Times as long a stage may take before its deadline is in danger."""


class Asked(NamedTuple):
    """A request that is being answered."""

    request: Request
    request_id: int
    time_ms: int
    row: pa.RecordBatch
    """The columns of user and request, one row."""
    liked: np.ndarray
    """int64 [N], the videos that the user liked last (`UserStateConfig.positive`), newest first."""
    began_s: float
    rng: np.random.Generator
    flags: list[str]
    timings_ms: dict[str, float]


class Clock:
    """What the stages take, of all requests. Any number of threads may call."""

    def __init__(self) -> None:
        """Knows nothing of any stage: a first request finds time for all of them."""
        self.costs_ms: dict[str, float] = {}
        self.last_fault = ""

    def note(self, asked: Sequence[Asked], stage: str, began_s: float) -> None:
        """Notes that a stage of requests, which began at a time of `time.perf_counter`, is done."""
        took = 1000 * (time.perf_counter() - began_s)
        for one in asked:
            one.timings_ms[stage] = one.timings_ms.get(stage, 0.0) + took
        each = took / max(len(asked), 1)
        before = self.costs_ms.get(stage, min(each, _FIRST_MS))
        # A pause, or a program that is compiled, says nothing of the next request.
        self.costs_ms[stage] = before + _LEARN * (min(each, 4 * before + 1) - before)

    def has_time(self, asked: Asked, stage: str) -> bool:
        """Returns whether a stage, and what must follow it, will be done before the deadline; if not, flags it."""
        if asked.request.deadline_ms == math.inf:
            return True
        left_ms = asked.request.deadline_ms - 1000 * (time.perf_counter() - asked.began_s)
        if left_ms > _SAFE * sum(self.costs_ms.get(name, 0.0) for name in (stage, *_MUST)):
            return True
        # Who never tries never learns that it has become cheaper.
        self.costs_ms[stage] = self.costs_ms.get(stage, 0.0) * (1 - _LEARN)
        asked.flags.append(f"deadline_{stage}")
        return False

    def failed(self, asked: Sequence[Asked], stage: str, error: Exception) -> None:
        """Flags requests of which a stage has failed."""
        self.last_fault = f"{stage}: {type(error).__name__}: {error}"
        for one in asked:
            one.flags.append(f"{stage}_failed")
