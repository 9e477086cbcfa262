"""The rules of a feed in plain Python: what may come next, what it would break, and what each candidate adds."""

from __future__ import annotations

import numpy as np

from monolith_jax.serve.rerank import Pool, RerankConfig

DIM = 4


def random_pool(rng: np.random.Generator, size: int, shares: dict[str, float], values: int = 4, repeat: bool = False) -> Pool:
    """Returns a pool of few authors, sounds and tags; `shares` (0.2 each) say how often a bool holds, or a score is `odd`."""

    def some(name: str, *shape: int) -> np.ndarray:
        return rng.random((size, *shape)) < shares.get(name, 0.2)

    ids = rng.integers(-(2**63), 2**63, size, dtype=np.int64)
    ids[:2] = [0, -1][:size]
    scores = rng.integers(0, 6, size).astype(np.float32) if rng.random() < 0.5 else rng.normal(size=size).astype(np.float32)
    odd = some("odd")
    scores[odd] = rng.choice(np.array([np.nan, -np.inf, np.inf], np.float32), np.count_nonzero(odd))
    vectors = rng.normal(size=(size, DIM)).astype(np.float32) * rng.choice([0.0, 1, 3], size=(size, 1)).astype(np.float32)
    return Pool(
        ids=rng.choice(ids, size) if repeat and size else ids,
        scores=scores,
        authors=rng.integers(0, values, size),
        author_known=~some("unknown"),
        sounds=rng.integers(0, values, size),
        sound_known=~some("unknown"),
        tags=rng.integers(0, values, (size, 3)),
        tag_known=some("tagged", 3),
        explore=some("explore"),
        unsafe=some("unsafe"),
        blocked=some("blocked"),
        vectors=vectors,
    )


def eligible(pool: Pool) -> list[int]:
    """Returns the best row of each video that may be shown, from the best to the worst; the first among equals."""
    barred = {video for video, unsafe, blocked in zip(pool.ids, pool.unsafe, pool.blocked, strict=True) if unsafe or blocked}
    best: dict[int, int] = {}
    for row in sorted(np.flatnonzero(np.isfinite(pool.scores)).tolist(), key=lambda row: (-pool.scores[row], row)):
        if pool.ids[row] not in barred:
            best.setdefault(int(pool.ids[row]), row)
    return sorted(best.values(), key=lambda row: (-pool.scores[row], row))


def drawable(pool: Pool, row: int) -> bool:
    return bool(pool.explore[pool.ids == pool.ids[row]].any())


def tags_of(pool: Pool, row: int) -> set[int]:
    return set(pool.tags[row][pool.tag_known[row]].tolist())


def broken(pool: Pool, config: RerankConfig, feed: list[int], row: int) -> set[str]:
    """Returns the rules that a feed breaks at its end if this row is put there."""
    found: set[str] = set()
    position = len(feed)
    for rule, gap, values, known in (
        ("author", config.author_gap, pool.authors, pool.author_known),
        ("sound", config.sound_gap, pool.sounds, pool.sound_known),
    ):
        near = [other for at, other in enumerate(feed) if position - at <= gap]
        if known[row] and any(known[other] and values[other] == values[row] for other in near):
            found.add(rule)
    if config.tag_window:
        window = [*feed, row][-config.tag_window :]
        for tag in tags_of(pool, row):
            if sum(tag in tags_of(pool, other) for other in window) > config.max_of_tag:
                found.add("tag")
    return found


def cosines(pool: Pool, rows: list[int]) -> np.ndarray:
    vectors = np.zeros((len(rows), 1)) if pool.vectors is None else pool.vectors[rows].astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    similarities = unit @ unit.T
    np.fill_diagonal(similarities, 1)
    return similarities


def relevances(pool: Pool, config: RerankConfig) -> dict[int, float]:
    """Returns the scores in standard deviations of the best `diversity_pool`."""
    rows = eligible(pool)
    scores = pool.scores[rows].astype(np.float64)
    best = scores[: config.diversity_pool]
    scale = best.std() if best.size and best.std() > 0 else 1.0
    return dict(zip(rows, ((scores - (best.mean() if best.size else 0)) / scale).tolist(), strict=True))


def added(pool: Pool, config: RerankConfig, feed: list[int], row: int) -> float:
    """Returns what a row adds to a feed: by its determinant (of rows far from each other's span), or by all similarities."""
    relevance, weight = relevances(pool, config)[row], config.diversity_weight
    similarities = cosines(pool, [*feed, row])
    if config.diversity == "dpp":
        similarities = (1 + similarities) / 2
        with_row = np.linalg.slogdet(similarities)[1]
        without = np.linalg.slogdet(similarities[:-1, :-1])[1]
        return (1 - weight) * relevance + weight * (with_row - without)
    return (1 - weight) * relevance - weight * max(similarities[-1, :-1], default=0.0)
