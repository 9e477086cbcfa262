"""Scored candidates to a feed: hard rules, diversity, and a share of positions that explore.

In: a pool of scored candidates with what the rules look at. Out: rows of the pool in the order of the feed, the chance of each.

At each position the candidates that break no rule compete, or, where there are none, those that break the least (`relax`). The
feed takes the one that adds most, or, at an exploring position, any of those from the explore source. Unsafe videos and blocked
authors never enter, so a feed is shorter than asked for only if the pool has too few videos left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from monolith_jax.serve.rerank_kernels import KINDS, NEVER, NONE, Rules, Traits, diversity_of, eligible, fill

DiversityKind = Literal["dpp", "mmr", "none"]
Rule = Literal["tag", "sound", "author"]
"""A rule that may be relaxed."""


@dataclass(frozen=True)
class RerankConfig:
    """The rules of a feed, and what it is balanced by."""

    explore_share: float = 0.2
    """Chance that a position goes to a candidate of the explore source, drawn uniformly."""
    author_gap: int = 1
    """Positions after a video at which its author may not come again; 1: never twice in a row; 0: no such rule."""
    sound_gap: int = 1
    """The same for the sound."""
    tag_window: int = 5
    """w, length of the windows in which videos of one tag are counted; 0: no such rule."""
    max_of_tag: int = 2
    """m, videos of one tag that a window may have."""
    relax: tuple[Rule, ...] = ("tag", "sound", "author")
    """The rules from the first to be broken to the last, where no candidate keeps them all. One that is left out is never
    broken: the feed ends instead."""
    diversity: DiversityKind = "mmr"
    """mmr: by the cosine with the most alike; dpp: by the volume that the vectors span; none: in the order of the scores. Of
    simulated feeds of 10 for viewers who tire of what is alike, mmr gave as much or more at an equal loss of score."""
    diversity_weight: float = 0.5
    """0: the scores alone; 1: diversity alone. A score counts in standard deviations of the diversity pool's scores. In that
    simulation mmr at 0.5 cost about 0.5 % of the score, as dpp did at 0.3."""
    diversity_pool: int = 100
    """Candidates, at each position the best scored of those that may stand there, among which diversity decides."""

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field is out of its range.
        """
        for name in ("explore_share", "diversity_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"RerankConfig.{name} must be from 0 to 1, got {getattr(self, name)}")
        for name, least in (("author_gap", 0), ("sound_gap", 0), ("tag_window", 0), ("max_of_tag", 1), ("diversity_pool", 1)):
            if getattr(self, name) < least:
                off = "; to switch the rule off set tag_window = 0" if name == "max_of_tag" else ""
                raise ValueError(f"RerankConfig.{name} must be at least {least}, got {getattr(self, name)}{off}")
        if self.diversity not in KINDS:
            raise ValueError(f"RerankConfig.diversity must be one of {', '.join(KINDS)}, got {self.diversity!r}")
        unknown = sorted(set(self.relax) - set(get_args(Rule)))
        if unknown or len(set(self.relax)) < len(self.relax):
            raise ValueError(
                f"RerankConfig.relax must list each of {', '.join(get_args(Rule))} at most once, in the order in which they "
                f"are relaxed, got {self.relax}; safety labels and blocked authors are never relaxed"
            )


class Pool(NamedTuple):
    """Scored candidates. K of them, with up to G tags."""

    ids: np.ndarray
    """int64 [K], of the videos; a video that comes twice is shown once, by its best row."""
    scores: np.ndarray
    """float32 [K], the ranker's values. Rows that are not finite are set aside."""
    authors: np.ndarray
    """int64 [K]."""
    author_known: np.ndarray
    """bool [K]; an unknown author is unlike any other."""
    sounds: np.ndarray
    """int64 [K]."""
    sound_known: np.ndarray
    """bool [K]."""
    tags: np.ndarray
    """int64 [K, G]."""
    tag_known: np.ndarray
    """bool [K, G]."""
    explore: np.ndarray
    """bool [K], whether the explore source gave it. Of a repeated video one such row is enough, here and below."""
    unsafe: np.ndarray
    """bool [K], whether its safety labels forbid it."""
    blocked: np.ndarray
    """bool [K], whether the user blocked its author."""
    vectors: np.ndarray | None = None
    """float32 [K, D], of any length: cosines count. None, or a row of zeros or with NaN: a cosine of 0 with any other."""


class SetAside(NamedTuple):
    """Rows of a pool that could not be shown; each is counted once, by the first reason."""

    unsafe: int
    blocked: int
    no_score: int
    repeated: int


class Slate(NamedTuple):
    """A feed of n videos."""

    order: np.ndarray
    """int64 [n], rows of the pool."""
    propensity: np.ndarray
    """float32 [n], the probability that this video got this position, given the positions before it."""
    explored: np.ndarray
    """bool [n], whether it was drawn to explore."""
    relaxed: tuple[tuple[int, Rule], ...]
    """Positions (from 0) with a rule that each breaks, in the order in which rules are relaxed."""
    aside: SetAside
    """What was set aside."""
    no_vector: int
    """Candidates that diversity could not judge because they have no usable vector; all of them: the feed is in score order."""


def rerank(pool: Pool, config: RerankConfig, number: int, rng: np.random.Generator) -> Slate:
    """Picks a feed.

    Args:
        pool: K candidates in any order; among equals the first wins.
        config: The rules.
        number: Videos wanted.
        rng: Gives two numbers a position; the slate is a function of these, the pool and the config.

    Returns:
        The feed: `number` videos, or as many as the pool has that are safe, not blocked and have a score.

    Raises:
        ValueError: Arrays of a wrong dtype or length; a negative number.
    """
    if number < 0:
        raise ValueError(f"number must be at least 0, got {number}")
    pool, size = _checked(pool), len(pool.ids)
    kept, drawable, aside = np.empty(size, np.int64), np.zeros(size, np.bool_), np.zeros(4, np.int64)
    by_score = np.argsort(-pool.scores, kind="stable")
    flags = pool.unsafe, pool.blocked, pool.explore
    rows = kept[: eligible(pool.ids.view(np.uint64), pool.scores, by_score, *flags, kept, drawable, aside)]

    number = min(number, len(rows))
    kind = NONE if pool.vectors is None else KINDS[config.diversity]
    vectors = np.zeros((size, 0), np.float32) if pool.vectors is None or kind == NONE else pool.vectors
    limit = config.diversity_pool if kind != NONE else 1
    picked, chance, broken = np.empty(number, np.int64), np.empty(number), np.zeros(number, np.int64)
    explored = np.zeros(number, np.bool_)
    length, no_vector = fill(
        rows, pool.scores, Traits(*pool[2:8]), _rules(config), drawable, float(config.explore_share), limit,
        diversity_of(kind, float(config.diversity_weight), vectors, number), rng.random((number, 2)),
        picked, chance, explored, broken,
    )  # fmt: skip
    if pool.vectors is None and config.diversity != "none":
        no_vector = len(rows)
    relaxed: tuple[tuple[int, Rule], ...] = tuple(
        (position, rule)
        for position in np.flatnonzero(broken[:length]).tolist()
        for bit, rule in enumerate(config.relax)
        if broken[position] >> bit & 1
    )
    propensity = chance[:length].astype(np.float32)
    return Slate(picked[:length], propensity, explored[:length], relaxed, SetAside(*aside.tolist()), no_vector)


def _rules(config: RerankConfig) -> Rules:
    bits = {rule: 1 << config.relax.index(rule) if rule in config.relax else NEVER for rule in get_args(Rule)}
    sizes = config.author_gap, config.sound_gap, config.tag_window, config.max_of_tag
    return Rules(*sizes, author_bit=bits["author"], sound_bit=bits["sound"], tag_bit=bits["tag"])


_DTYPES: dict[str, type] = {"ids": np.int64, "authors": np.int64, "sounds": np.int64, "tags": np.int64}
_DTYPES |= {"scores": np.float32, "vectors": np.float32}
_DIMS = {"tags": 2, "tag_known": 2, "vectors": 2}


def _checked(pool: Pool) -> Pool:
    """Returns the pool in C order and writable: numba would compile its kernels anew for arrays of another kind."""
    size, arrays = len(pool.ids), {name: array for name, array in pool._asdict().items() if array is not None}
    for name, array in arrays.items():
        dtype, dims = np.dtype(_DTYPES.get(name, np.bool_)), _DIMS.get(name, 1)
        if not (array.dtype == dtype and array.ndim == dims and len(array) == size):
            shape = f"[{size}, ...]" if dims == 2 else f"[{size}]"
            raise ValueError(
                f"Pool.{name} must be {dtype} of shape {shape} as ids are, got {array.dtype} of shape {array.shape}"
            )
    if pool.tags.shape != pool.tag_known.shape:
        raise ValueError(f"Pool.tags {pool.tags.shape} and tag_known {pool.tag_known.shape} must have one shape: pad both")
    return pool._replace(**{name: np.require(array, requirements=["C", "W"]) for name, array in arrays.items()})
