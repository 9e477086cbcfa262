"""Metrics of lists of videos: what of a user's videos was found, how much of the catalogue is shown, how alike a list is.

In: `found` int64 [U, K], a list a user, best first, no video twice, padded with -1; and `wanted`, the videos to be found of a
user. Where -1 may be the id of a video, give places in the catalogue instead of ids. Out: arrays with a value a user, float64
[U], so that they can be resampled (`bootstrap`), NaN where a user has none; or a number of all lists together. Everything is
over numpy arrays of all users at once, in memory of a few times U x K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

NAMES = ("recall", "ndcg", "hit_rate", "mrr", "precision")
"""What `per_user` gives, each at every K."""
_BLOCK = 4096
"""Users whose videos' vectors are held at once."""


def _check(found: np.ndarray, users: int | None = None) -> np.ndarray:
    found = np.asarray(found, np.int64)
    if found.ndim != 2 or (users is not None and found.shape[0] != users):
        wanted = "[U, K]" if users is None else f"[{users}, K], a row for each user with wanted videos"
        raise ValueError(f"found must be {wanted}, got {found.shape}")
    ordered = np.sort(found, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)).any(axis=1)
    if twice.any():
        row = int(np.flatnonzero(twice)[0])
        raise ValueError(f"the list of user row {row} has a video twice; each may be found once (pad with -1)")
    return found


def _check_at(at: Sequence[int], length: int) -> None:
    if not at or min(at) < 1 or max(at) > length:
        raise ValueError(f"K must be from 1 to the length of the lists, {length}, got {tuple(at)}; make longer lists")


def hits(found: np.ndarray, wanted: Sequence[np.ndarray]) -> np.ndarray:
    """Returns which of the videos found are wanted.

    Args:
        found: int64 [U, K].
        wanted: U arrays, int64, those of each user; a video that is there twice counts once.

    Returns:
        bool [U, K]; False where there is padding.

    Raises:
        ValueError: The shapes differ, or a list has a video twice.
    """
    return _hits(_check(found, len(wanted)), [np.unique(one) for one in wanted])


def _hits(found: np.ndarray, wanted: Sequence[np.ndarray]) -> np.ndarray:
    none = np.zeros(0, np.int64)
    right = np.concatenate([none, *wanted]).astype(np.int64, copy=False)
    row = np.repeat(np.arange(len(wanted)), [len(one) for one in wanted])
    videos, codes = np.unique(right, return_inverse=True)
    if not videos.size or not found.size:
        return np.zeros(found.shape, np.bool_)
    at = np.minimum(np.searchsorted(videos, found), videos.size - 1)
    # A pair of user and video as one number; sorted by construction, as rows ascend and codes do within each.
    pairs = row * videos.size + codes
    asked = np.arange(len(wanted))[:, None] * videos.size + at
    there = np.minimum(np.searchsorted(pairs, asked), pairs.size - 1)
    return (videos[at] == found) & (found != -1) & (pairs[there] == asked)


def per_user(found: np.ndarray, wanted: Sequence[np.ndarray], at: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns metrics of each user's list, float64 [U] by name and K, such as `recall@10`; NaN where nothing is wanted.

    With gains of 1 for what is wanted and 0 for the rest, of the first K videos:

    * recall: the share of the wanted videos that are among them (over all wanted ones, also where these are more than K);
    * precision: the share of the K places that hold a wanted video (a short list has empty places);
    * hit_rate: 1 where there is one wanted video among them, else 0;
    * mrr: 1 / place of the first wanted one, 0 where there is none (Voorhees 1999, "The TREC-8 question answering track
      report");
    * ndcg: the sum of 1 / log2(1 + place) over the wanted ones, divided by the same of the best possible list, whose first
      min(K, wanted) places are right (Järvelin and Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques").

    Args:
        found: int64 [U, K'], K' at least the largest K.
        wanted: U arrays of videos.
        at: The Ks.

    Raises:
        ValueError: The shapes differ, a list has a video twice, or is shorter than a K.
    """
    found = _check(found, len(wanted))
    _check_at(at, found.shape[1])
    sets = [np.unique(one) for one in wanted]
    right = _hits(found, sets)
    sizes = np.array([one.size for one in sets], np.int64)
    none = sizes == 0
    places = np.arange(1, found.shape[1] + 1)
    gains = 1.0 / np.log2(places + 1.0)
    best = np.concatenate([[0.0], np.cumsum(gains)])
    number, gained = np.cumsum(right, axis=1), np.cumsum(right * gains, axis=1)
    first = np.where(right.any(axis=1), right.argmax(axis=1) + 1, np.iinfo(np.int64).max)
    out: dict[str, np.ndarray] = {}
    for k in at:
        of_k = {
            "recall": number[:, k - 1] / np.maximum(sizes, 1),
            "ndcg": gained[:, k - 1] / np.maximum(best[np.minimum(sizes, k)], 1e-300),
            "hit_rate": (first <= k).astype(np.float64),
            "mrr": np.where(first <= k, 1.0 / first, 0.0),
            "precision": number[:, k - 1] / k,
        }
        out |= {f"{name}@{k}": np.where(none, np.nan, of_k[name]) for name in NAMES}
    return out


def means(of_users: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the mean over the users that have a value, NaN where none has."""
    found = {}
    for name, values in of_users.items():
        there = values[~np.isnan(values)]
        found[name] = float(there.mean()) if there.size else float("nan")
    return found


def coverage(found: np.ndarray, catalogue: int, k: int) -> float:
    """Returns the share of the catalogue that is among the first K of at least one list.

    "Catalogue coverage" of Ge, Delgado-Battenfeld and Jannach 2010, "Beyond accuracy: evaluating recommender systems by
    coverage and serendipity".

    Args:
        found: int64 [U, K'].
        catalogue: Videos that could have been found.
        k: K.

    Raises:
        ValueError: There are more videos in the lists than in the catalogue, or K does not fit.
    """
    found = _check(found)
    _check_at((k,), found.shape[1])
    shown = np.unique(found[:, :k])
    number = int((shown != -1).sum())
    if number > catalogue:
        raise ValueError(f"the lists hold {number} videos, and the catalogue is said to have {catalogue}")
    return number / catalogue if catalogue else float("nan")


def novelty(found: np.ndarray, videos: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """Returns the mean self-information of the first K videos of each list, in bits, float64 [U]; NaN of an empty list.

    -log2 p(video), p its share of all interactions (Zhou et al. 2010, "Solving the apparent diversity-accuracy dilemma of
    recommender systems"). One is added to each count, so that a video without interactions has a finite one: p is
    (count + 1) / (sum of counts + number of videos).

    Args:
        found: int64 [U, K'].
        videos: int64 [N], the catalogue, none twice.
        counts: [N], interactions of each.
        k: K.

    Raises:
        ValueError: The shapes differ, K does not fit, or a list has a video that the catalogue has not.
    """
    found, videos, counts = _check(found), np.asarray(videos, np.int64), np.asarray(counts, np.float64)
    _check_at((k,), found.shape[1])
    if videos.shape != counts.shape or videos.ndim != 1:
        raise ValueError(f"videos and counts must be [N], got {videos.shape} and {counts.shape}")
    at, there = _rows(found[:, :k], videos)
    if missing := int((~there & (found[:, :k] != -1)).sum()):
        raise ValueError(f"{missing} places of the lists hold a video that is not among the {videos.size} of the catalogue")
    bits = -np.log2((counts + 1.0) / (counts.sum() + videos.size)) if videos.size else np.zeros(1)
    number = there.sum(axis=1)
    return np.where(number > 0, np.where(there, bits[at], 0.0).sum(axis=1) / np.maximum(number, 1), np.nan)


def intra_list_diversity(found: np.ndarray, videos: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Returns 1 - the mean cosine over the pairs of the first K videos of each list, float64 [U]: 0 if all are alike.

    Smyth and McClave 2001, "Similarity vs. diversity"; Ziegler et al. 2005, "Improving recommendation lists through topic
    diversification", with its pairwise similarity turned round. Videos without a vector, or with one of length 0, are left out;
    NaN where there is no pair.

    Args:
        found: int64 [U, K'].
        videos: int64 [N], none twice.
        vectors: float [N, D] of each, of any length.
        k: K.

    Raises:
        ValueError: The shapes differ, or K does not fit.
    """
    found, videos, vectors = _check(found), np.asarray(videos, np.int64), np.asarray(vectors)
    _check_at((k,), found.shape[1])
    if vectors.ndim != 2 or vectors.shape[0] != videos.size:
        raise ValueError(f"vectors must be [{videos.size}, D], a row for each video, got {vectors.shape}")
    length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    out = np.full(found.shape[0], np.nan)
    for start in range(0, found.shape[0], _BLOCK):
        at, there = _rows(found[start : start + _BLOCK, :k], videos)
        if not videos.size:
            continue
        there &= length[at] > 0
        scale = np.where(there, 1.0 / np.where(length[at] > 0, length[at], 1.0), 0.0)
        # The cosines of all pairs, each both ways and every video with itself, are the squared length of the units' sum.
        total = np.einsum("ukd,uk->ud", vectors[at].astype(np.float64), scale)
        number = there.sum(axis=1)
        pairs = number * (number - 1)
        cosines = np.einsum("ud,ud->u", total, total) - number
        out[start : start + _BLOCK] = np.where(pairs > 0, 1.0 - cosines / np.maximum(pairs, 1), np.nan)
    return out


def _rows(found: np.ndarray, videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions in `videos` of what was found, and where there is one; position 0 where not."""
    if not videos.size:
        return np.zeros(found.shape, np.int64), np.zeros(found.shape, np.bool_)
    order = np.argsort(videos, kind="stable")
    at = np.minimum(np.searchsorted(videos, found, sorter=order), videos.size - 1)
    rows = order[at]
    there = (videos[rows] == found) & (found != -1)
    return np.where(there, rows, 0), there
