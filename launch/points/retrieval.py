"""Ways to find videos, side by side: popularity, EASE, matrix factorisation, a two-tower with and without content.

In: the TikTok data of DiffMM (`launch.points.tiktok`): the split `trn` is learned from. Out: of every user with videos in
`val`, the best of all videos but the user's own of `trn`, judged by recall, NDCG, hit rate and MRR at several K, and by how
much of the catalogue is shown and how well known it is. The strength of EASE's penalty, and size, penalty and confidence of the
factors, are chosen on a split of `trn`, never on `val`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from launch.points import tiktok
from launch.points.measured import Base, Measured
from launch.points.tiktok import BLOCK, Data, Scores, by_user
from monolith_jax.evaluate import retrieval

AT = (10, 20, 50)
K = 20
STRENGTHS = (10.0, 30.0, 100.0, 300.0)
"""Of EASE's penalty, to choose from."""
FACTORS, PENALTIES, CONFIDENCES = (32, 64), (100.0, 300.0, 1000.0), (10.0, 40.0)
"""Of matrix factorisation, to choose from. On the same split 128 factors, a confidence of 160, and penalties of 1 to 30 find
less than the best of these; too heavy a penalty for the confidence makes all factors 0."""
ROUNDS = 10
"""In each of which users and then videos are solved for."""
_FIRST = 0.01


@dataclass(frozen=True)
class RetrievalPoint:
    """Learns in one way, and finds the videos of `val`."""

    method: Literal["popularity", "ease", "factors", "two_tower"] = "two_tower"
    """`two_tower`: the experiment's."""
    data: str = "data/tiktok_diffmm"
    """Folder with interactions.parquet, image_feat.npz and audio_feat.npz."""


def run(point: RetrievalPoint, base: Base, folder: Path) -> list[Measured]:
    """Returns what was measured.

    Raises:
        ValueError: The data are not there, or not as `tiktok.read` expects them.
    """
    data = tiktok.read(Path(point.data))
    match point.method:
        case "popularity":
            scores, chosen = popularity_scores(data), {}
        case "ease":
            strength = best_strength(data)
            scores, chosen = ease_scores(data, strength), {"strength": strength}
        case "factors":
            settings = best_factors(data, base.seed)
            chosen = dict(zip(("factors", "penalty", "confidence"), settings, strict=True))
            scores = factor_scores(data, *settings, base.seed)
        case "two_tower":
            scores, chosen = tiktok.two_tower(data, folder / "two_tower", base.seed, base.load), {}
            (folder / "two_tower" / "examples.parquet").unlink()  # 121 MB, which the seed and the data make again.
    measured = [Measured(name, float(value)) for name, value in judged(data, scores).items()]
    return measured + [Measured(name, float(value)) for name, value in chosen.items()]


def found_of(data: Data, scores: Scores, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the best videos [U, number] of each user with videos to be found, without those of `train`; and these videos."""
    seen, wanted = by_user(data.train, data.num_users), by_user(data.test, data.num_users)
    users = np.unique(data.test.users)
    found = [
        best(scores(block), [seen[user] for user in block], number)
        for block in (users[start : start + BLOCK] for start in range(0, users.size, BLOCK))
    ]
    return np.concatenate(found), [wanted[user] for user in users]


def judged(data: Data, scores: Scores) -> dict[str, float]:
    """Returns means over users: `recall_at_20` and the like; `coverage_at_20`, `novelty_at_20`."""
    found, wanted = found_of(data, scores, max(AT))
    figures = retrieval.means(retrieval.per_user(found, wanted, AT))
    counts = np.bincount(data.train.videos, minlength=data.num_videos)
    figures[f"coverage@{K}"] = retrieval.coverage(found, data.num_videos, K)
    of_lists = retrieval.novelty(found, np.arange(data.num_videos), counts, K)
    figures[f"novelty@{K}"] = float(np.nanmean(of_lists))
    return {name.replace("@", "_at_"): value for name, value in figures.items()}


def best(scores: np.ndarray, seen: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Returns the videos [B, number] of the highest scores [B, N], best first, without those that a user has seen."""
    scores = scores.copy()
    for row, videos in zip(scores, seen, strict=True):
        row[videos] = -np.inf
    top = np.argpartition(-scores, number - 1, axis=1)[:, :number]
    order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
    return np.take_along_axis(top, order, 1)


def popularity_scores(data: Data) -> Scores:
    """Returns the same for all: the number of users of each video."""
    counts = np.bincount(data.train.videos, minlength=data.num_videos).astype(np.float32)
    return lambda users: np.tile(counts, (users.size, 1))


def ease(interactions: np.ndarray, strength: float) -> np.ndarray:
    """Returns EASE's weights between videos, [N, N] with a diagonal of 0, in closed form.

    With P = (X'X + strength I)^-1 they are -P_ij / P_jj: equation 8 of Steck 2019, "Embarrassingly Shallow Autoencoders for
    Sparse Data".

    Args:
        interactions: X, [U, N].
        strength: The L2 penalty.
    """
    gram = (interactions.T @ interactions).astype(np.float64)
    gram[np.diag_indices_from(gram)] += strength
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    weights[np.diag_indices_from(weights)] = 0.0
    return weights.astype(np.float32)


def ease_scores(data: Data, strength: float) -> Scores:
    """Returns EASE's."""
    matrix = matrix_of(data)
    weights = ease(matrix, strength)
    return lambda users: matrix[users] @ weights


def best_strength(data: Data) -> float:
    """Returns the strength that finds most on a split of what is learned."""
    split = tiktok.inner(data, 0)
    return max(STRENGTHS, key=lambda one: judged(split, ease_scores(split, one))[f"recall_at_{K}"])


def matrix_of(data: Data) -> np.ndarray:
    """Returns float32 [U, N]: 1 where the user has the video."""
    matrix = np.zeros((data.num_users, data.num_videos), np.float32)
    matrix[data.train.users, data.train.videos] = 1.0
    return matrix


def factorise(
    data: Data, factors: int, penalty: float, confidence: float, seed: int, rounds: int = ROUNDS
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors of users [U, D] and videos [N, D] by alternating least squares.

    Hu, Koren and Volinsky 2008, "Collaborative filtering for implicit feedback datasets", equations 3 to 5: a video that a user
    has counts as 1 with weight 1 + confidence, one that the user has not as 0 with weight 1.

    Args:
        data: Its `train` is learned.
        factors: D.
        penalty: Of the squares of all factors.
        confidence: Alpha.
        seed: Of the first factors of videos.
        rounds: In each, users are solved for, then videos.
    """
    rng = np.random.default_rng(seed)
    videos = rng.normal(0.0, _FIRST, (data.num_videos, factors))
    of_users = by_user(data.train, data.num_users)
    order = np.lexsort((data.train.users, data.train.videos))
    turned = tiktok.Pairs(data.train.videos[order], data.train.users[order])
    of_videos = by_user(turned, data.num_videos)
    users = np.zeros((data.num_users, factors))
    for _ in range(rounds):
        users = _solved(videos, of_users, penalty, confidence)
        videos = _solved(users, of_videos, penalty, confidence)
    return users.astype(np.float32), videos.astype(np.float32)


def _solved(others: np.ndarray, linked: list[np.ndarray], penalty: float, confidence: float) -> np.ndarray:
    """Returns the factors that are best given those of the other side, for each the normal equations."""
    gram = others.T @ others + penalty * np.eye(others.shape[1])
    out = np.zeros((len(linked), others.shape[1]))
    # Those with as many links are solved at once.
    sizes = np.array([one.size for one in linked])
    for size in np.unique(sizes[sizes > 0]):
        which = np.flatnonzero(sizes == size)
        for start in range(0, which.size, BLOCK):
            block = which[start : start + BLOCK]
            own = others[np.stack([linked[one] for one in block])]
            left = gram + confidence * (own.transpose(0, 2, 1) @ own)
            out[block] = np.linalg.solve(left, (1 + confidence) * own.sum(1)[:, :, None])[:, :, 0]
    return out


def factor_scores(data: Data, factors: int, penalty: float, confidence: float, seed: int) -> Scores:
    """Returns those of the factors."""
    of_users, of_videos = factorise(data, factors, penalty, confidence, seed)
    return lambda users: of_users[users] @ of_videos.T


def best_factors(data: Data, seed: int) -> tuple[int, float, float]:
    """Returns factors, penalty and confidence that find most on a split of what is learned."""
    split = tiktok.inner(data, 0)
    choices = itertools.product(FACTORS, PENALTIES, CONFIDENCES)
    return max(choices, key=lambda one: judged(split, factor_scores(split, *one, seed))[f"recall_at_{K}"])
