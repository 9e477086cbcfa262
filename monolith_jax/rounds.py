"""What the planners of all processes agree on before each plan: whether there is one, and what is in it.

In: this process's part of a batch, and whether it wants to stop. Out: a `Round`, the same in all processes. Where one process
compiled another shape, stopped a step earlier or took another time than the others, all would hang or diverge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from monolith_jax.reader import Observed, Part
from monolith_jax.types import Exchange


class Go(NamedTuple):
    """Whether all go on."""

    ready: bool
    """Whether a process has examples."""
    ended: bool
    """Whether all streams have ended."""
    stop: bool
    """Whether a process was told to stop."""
    failed: int | None
    """A process that cannot read on."""
    cut: int = 0
    """What a publication of the state after this round's plan holds; 0: there is none."""


class Round(NamedTuple):
    """One round of all planners."""

    observed: Observed
    """Of the whole batch, the processes' rows one after the other."""
    num_examples: int
    """Rows of the whole batch that are no padding."""
    watermark_ms: int
    """The lowest median time of a partition, shifted by the passes over its data: no partition is far behind it, so what was
    seen in this batch does not count as old. A few events from the future do not move it."""
    epoch: int
    """The latest of those that the rows are of."""


def may_go_on(exchange: Exchange | None, ready: bool, ended: bool, stop: bool, failed: bool, cut: int = 0) -> Go:
    """Returns whether all go on, before anything of a batch is taken. All processes call it, the same number of times.

    State is published when every process can do so, by the first one's clock.
    """
    flags = np.array([[ready, ended, stop, failed, cut]], np.uint32)
    if exchange is not None:
        flags = exchange.gather(flags[0])
    failed_ones = np.flatnonzero(flags[:, 3])
    first_failed = int(failed_ones[0]) if failed_ones.size else None
    agreed = int(flags[0, 4]) if flags[:, 4].all() else 0
    return Go(bool(flags[:, 0].any()), bool(flags[:, 1].all()), bool(flags[:, 2].any()), first_failed, agreed)


def agree(exchange: Exchange | None, parts: Sequence[Part], observed: Observed) -> Round:
    """Returns the round of all processes, after `may_go_on`.

    Args:
        exchange: To the others; none: this is the only process.
        parts: This process's parts of the batch; some process's part has examples.
        observed: Their rows together.
    """
    numbers = np.array([[part.num_examples, part.epoch, part.shift_ms] for part in parts], np.int64)
    if exchange is not None:
        num_heads = observed.labels.shape[1]
        words = exchange.gather(np.concatenate([numbers.view(np.uint32).reshape(-1), _words(observed)]))
        first = 2 * numbers.size
        numbers = np.ascontiguousarray(words[:, :first]).view(np.int64).reshape(-1, 3)
        observed = _observed(words[:, first:], num_heads)
    size = len(observed.event_time_ms) // len(numbers)
    parts_ms, there = observed.event_time_ms.reshape(-1, size), numbers[numbers[:, 0] > 0]
    medians = [int(np.median(row[:n])) + shift for row, (n, _, shift) in zip(parts_ms, numbers.tolist(), strict=True) if n]
    return Round(observed, int(numbers[:, 0].sum()), min(medians), int(there[:, 1].max()))


def _words(observed: Observed) -> np.ndarray:
    """Returns what is observed as words, uint32 [n]; best scores that nobody knows as NaN."""
    optimal = np.full_like(observed.labels, np.nan) if observed.optimal is None else observed.optimal
    arrays = (observed.event_time_ms, observed.groups, observed.labels, observed.masks, optimal)
    return np.concatenate([np.ascontiguousarray(array).view(np.uint32).reshape(-1) for array in arrays])


def _observed(words: np.ndarray, num_heads: int) -> Observed:
    """Returns what the processes observed, from their words [P, n]."""
    size = words.shape[1] // (4 + 3 * num_heads)
    columns, at = [], 0
    for dtype, width in ((np.int64, 1), (np.int64, 1), *((np.float32, num_heads),) * 3):
        length = size * width * np.dtype(dtype).itemsize // 4
        column = np.ascontiguousarray(words[:, at : at + length]).view(dtype)
        columns.append(column.reshape(-1) if dtype is np.int64 else column.reshape(-1, width))
        at += length
    times, groups, labels, masks, optimal = columns
    return Observed(times, groups, labels, masks, None if np.isnan(optimal).all() else optimal)
