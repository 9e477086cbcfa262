"""From the values of candidates to the pool that the rules of a feed choose from.

In: values of candidates. Out: which of them are in the pool, and what order they have where the rules cannot speak.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.serve.catalogue import Taken
from monolith_jax.serve.index import VideoIndex
from monolith_jax.serve.rerank import Pool, SetAside, Slate


class Candidates(NamedTuple):
    """Candidates with what is known of them."""

    ids: np.ndarray
    source: np.ndarray
    """int8 [K], the first source that gave each."""
    is_explore: np.ndarray
    """bool [K], whether the explore source has it."""
    is_spare: np.ndarray
    """bool [K], whether it is there only because others are too few."""
    taken: Taken
    values: np.ndarray
    """float32 [K]"""
    scores: np.ndarray | None
    """float32 [K, T]"""
    live: pa.RecordBatch | None = None
    """What the cache of features had of them."""


def pool_of(candidates: Candidates, rows: np.ndarray, index: VideoIndex | None) -> Pool:
    """Returns what the rules look at of some candidates, rows int64 [N]; vectors are those of the index."""
    columns = candidates.taken.columns

    def single(name: str) -> tuple[np.ndarray, np.ndarray]:
        values, lengths = columns.get(name, (np.zeros(candidates.ids.size, np.int64),) * 2)
        return values[rows], lengths[rows] > 0

    authors, author_known = single("author_id")
    sounds, sound_known = single("sound_id")
    tags, of_tags = columns.get("tag_id", (np.zeros((candidates.ids.size, 1), np.int64), np.zeros(candidates.ids.size)))
    tags = tags[rows] if tags.ndim == 2 else tags[rows, None]
    none = np.zeros(rows.size, np.bool_)  # What is unsafe or blocked was left out before it was ranked.
    return Pool(
        ids=candidates.ids[rows],
        scores=behind(candidates.values[rows], candidates.is_spare[rows]),
        authors=authors,
        author_known=author_known,
        sounds=sounds,
        sound_known=sound_known,
        tags=tags,
        tag_known=np.arange(tags.shape[1]) < of_tags[rows, None],
        explore=candidates.is_explore[rows],
        unsafe=none,
        blocked=none,
        vectors=index.vectors(candidates.ids[rows])[0] if index is not None else None,
    )


def best(values: np.ndarray, always: np.ndarray, number: int) -> np.ndarray:
    """Returns the candidates with the highest values, and those that are to be there always, in their order, int64 [N]."""
    if values.size <= number:
        return np.arange(values.size)
    chosen = always.copy()
    chosen[np.argpartition(-values, number)[:number]] = True
    return np.flatnonzero(chosen)


def shared(tags: np.ndarray, lengths: np.ndarray, others: np.ndarray, of_others: np.ndarray) -> np.ndarray:
    """Returns with what share of other videos each has a tag in common, float64 [K].

    Args:
        tags: int64 [K] or [K, G].
        lengths: int32 [K], how many of each row count.
        others: int64 [N] or [N, G], tags of the others.
        of_others: int32 [N].
    """
    tags, others = tags.reshape(len(tags), -1), others.reshape(len(others), -1)
    there = np.arange(tags.shape[1]) < lengths[:, None]
    found = np.zeros(len(tags))
    for of_other, number in zip(others, of_others, strict=True):
        found += (np.isin(tags, of_other[:number]) & there).any(1)
    return found / max(len(others), 1)


def behind(values: np.ndarray, is_spare: np.ndarray) -> np.ndarray:
    """Returns values [K] with those of spare candidates moved below all others, by three standard deviations."""
    fine = np.isfinite(values)
    first = fine & ~is_spare
    if not is_spare.any() or not first.any():
        return values
    spare = fine & is_spare
    gap = values[first].min() - 3 * values[first].std() - values[spare].max(initial=-np.inf) if spare.any() else 0.0
    return np.where(spare, values + min(gap, 0.0), values).astype(np.float32)


def by_score(pool: Pool, number: int) -> Slate:
    """Returns the best of a pool that may be shown, without any other rule."""
    fine = np.isfinite(pool.scores)
    order = np.argsort(np.where(fine, -pool.scores, np.inf), kind="stable")[: min(number, int(fine.sum()))]
    return Slate(order, np.ones(order.size, np.float32), np.zeros(order.size, np.bool_), (), SetAside(0, 0, 0, 0), 0)
