"""Small values that every process tells every other, as JSON: errors in words, counts at the end of a run.

In: a value of each process. Out: those of all. Not for every step.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from monolith_jax.types import Exchange


def everyone(exchange: Exchange | None, value: Any) -> list[Any]:
    """Returns what each process gives, in their order. Called by all, from the planner's thread or while no planner runs."""
    if exchange is None:
        return [value]
    data = json.dumps(value).encode()
    lengths = exchange.gather(np.array([len(data)], np.uint32))[:, 0]
    padded = np.zeros(max(-(-int(lengths.max()) // 4), 1) * 4, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    words = exchange.gather(padded.view(np.uint32))
    return [json.loads(row.tobytes()[:length]) for row, length in zip(words, lengths, strict=True)]
