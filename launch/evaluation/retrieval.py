"""How well the two-tower finds held-out videos among all videos, by exact search; popularity beside it.

In: a `Subject` with a two-tower. Out: rows of metrics at several K with intervals over users, a table, a figure.

Users are those with a held-out positive, each asked once, as the first held-out example shows them: so the request knows what
came before all that is to be found. All videos of the training and the test source can be found, but for those that the user
was shown in training; to be found are the user's other held-out positives. Popularity is the order by training positives, the
same for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from launch.evaluation.held_out import held_out, test_files
from launch.evaluation.subject import Subject
from launch.evaluation.written import Row, table, with_interval
from launch.readers import log_of, open_source
from monolith_jax.evaluate import bootstrap, retrieval
from monolith_jax.feature_columns import columns_of
from monolith_jax.features import featurize
from monolith_jax.serve.encode import Encoder
from monolith_jax.serve.exact import exact_top_k
from monolith_jax.stream.events import labels
from monolith_jax.stream.history import ids_of

if TYPE_CHECKING:
    from monolith_jax.experiment import Experiment

BLOCK = 1024
"""Users that are asked for at once, and videos whose vectors are made at once."""
SHOWN = ("recall", "ndcg", "hit_rate", "mrr", "precision")


class Shown(NamedTuple):
    """A source, as far as it tells who was shown what."""

    users: np.ndarray
    """int64 [N]"""
    videos: np.ndarray
    """int64 [N]"""
    positive: np.ndarray
    """bool [N]"""


class Wanted(NamedTuple):
    """What is to be found."""

    rows: pa.RecordBatch
    """[U], each user's first held-out example."""
    wanted: list[np.ndarray]
    """Of each user."""
    seen: list[np.ndarray]
    """Of each user, what is left out."""
    dropped: int
    """Held-out positives that the user was shown in training already."""


def lengths(text: str) -> tuple[int, ...]:
    """Returns the Ks of a flag's text.

    Raises:
        ValueError: They are no numbers from 1.
    """
    try:
        at = tuple(sorted({int(one) for one in text.split(",")}))
    except ValueError:
        at = ()
    if not at or at[0] < 1:
        raise ValueError(f"--k is {text!r}; expected lengths of lists by commas, such as 10,20,50")
    return at


def measure(subject: Subject, at: Sequence[int], number: int, seed: int = 0) -> list[Row]:
    """Returns a row for each K and each of `two_tower` and `popularity`.

    Args:
        subject: The model.
        at: The Ks.
        number: Resamples of users for the intervals; 0: none.
        seed: Of the draws.

    Raises:
        ValueError: There is no two-tower, no test source, the training source is a log, or nobody has anything to be found.
    """
    check(subject.experiment)
    two_tower = subject.experiment.retrieval
    assert two_tower is not None
    train, rows = _sources(subject)
    asked = _wanted(subject, train)
    model = subject.model((1,))
    try:
        encoder = Encoder(model, user_sizes=(BLOCK,), video_sizes=(BLOCK,))
        _check_columns(encoder, rows)
        ids = ids_of(rows, two_tower.video_column, "a video")[0]
        vectors = encoder.videos(featurize(rows, encoder.video_layout))
        queries = encoder.users(featurize(asked.rows, encoder.user_layout))
    finally:
        model.close()
    counts = np.zeros(ids.size, np.int64)
    places = {video: place for place, video in enumerate(ids.tolist())}
    np.add.at(counts, [places[video] for video in train.videos[train.positive].tolist()], 1)
    # By place in the catalogue from here on: any number may be the id of a video, also the -1 of padding.
    wanted, seen = ([np.array([places[one] for one in of.tolist()], np.int64) for of in lists] for lists in asked[1:3])
    asked, ids = asked._replace(wanted=wanted, seen=seen), np.arange(ids.size)
    longest = min(max(at), ids.size)
    found = {
        "two_tower": ids_found(vectors, queries, ids, asked.seen, longest),
        "popularity": popular(counts, ids, asked.seen, longest),
    }
    told = {"users": len(asked.wanted), "videos": ids.size, "wanted": sum(one.size for one in asked.wanted)}
    told["dropped"] = asked.dropped
    out: list[Row] = []
    for by, lists in found.items():
        padded = np.pad(lists, ((0, 0), (0, max(at) - lists.shape[1])), constant_values=-1)
        for k in at:
            out.append(
                {"kind": "retrieval", "by": by, "k": k, **told, **_row(padded, asked, k, ids, counts, vectors, number, seed)}
            )
    return out


def check(experiment: Experiment) -> None:
    """Refuses what this part cannot judge.

    Raises:
        ValueError: There is no two-tower, or the training source is a log.
    """
    if experiment.retrieval is None:
        raise ValueError("this run has no two-tower (Experiment.retrieval), which --retrieval judges; ask for --ranking")
    if log_of(experiment.source):
        raise ValueError("--retrieval reads the training source for its videos, and this one's is a log, which may be gone")


def _check_columns(encoder: Encoder, rows: pa.RecordBatch) -> None:
    """Refuses features of videos whose columns come from counters: what a video's was at any one time is not known here."""
    for feature in encoder.video_layout.features:
        if missing := [name for name in columns_of(feature) if name not in rows.schema.names]:
            raise ValueError(
                f"feature {feature.name!r} of the two-tower's videos reads column {missing[0]!r}, which the source does not "
                "have (a counter's, say): --retrieval reads videos from the source alone; --feed judges the two-tower with it"
            )


def _row(
    found: np.ndarray, asked: Wanted, k: int, ids: np.ndarray, counts: np.ndarray, vectors: np.ndarray, number: int, seed: int
) -> dict[str, float | None]:
    of_users = {name.partition("@")[0]: values for name, values in retrieval.per_user(found, asked.wanted, (k,)).items()}
    of_users["novelty"] = retrieval.novelty(found, ids, counts, k)
    of_users["intra_list_diversity"] = retrieval.intra_list_diversity(found, ids, vectors, k)
    return {"coverage": retrieval.coverage(found, ids.size, k), **intervals(of_users, number, seed)}


def intervals(of_users: dict[str, np.ndarray], number: int, seed: int) -> dict[str, float | None]:
    """Returns means over users with their intervals as fields of a row, None where undefined."""
    out: dict[str, float | None] = {}
    for name, interval in bootstrap.of_means(of_users, number, seed=seed).items():
        for suffix, value in zip(("", "_low", "_high"), interval, strict=True):
            out[name + suffix] = float(value) if np.isfinite(value) else None
    return out


def _sources(subject: Subject) -> tuple[Shown, pa.RecordBatch]:
    """Returns what the training source showed, and of each video of both sources the row that told of it first."""
    known: set[int] = set()
    rows: list[pa.RecordBatch] = []
    train = _read(subject, subject.training(), known, rows)
    test = itertools.takewhile(lambda chunk: not chunk.epoch, open_source(test_files(subject.experiment)).read({}))
    _read(subject, (chunk.examples for chunk in test), known, rows)
    return train, together(rows)


def together(rows: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Returns batches as one; a column that one lacks is null there."""
    tables = [pa.Table.from_batches([one]) for one in rows]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks().to_batches()[0]


def _read(subject: Subject, source: Iterable[pa.RecordBatch], known: set[int], rows: list[pa.RecordBatch]) -> Shown:
    """Returns what examples showed; adds the rows of videos that are not known yet."""
    two_tower = subject.experiment.retrieval
    assert two_tower is not None
    parts: list[tuple[np.ndarray, ...]] = []
    for examples in source:
        if not examples.num_rows:
            continue
        videos, there = ids_of(examples, two_tower.video_column, "an example")
        users, of_user = ids_of(examples, "user_id", "an example")
        unique, first = np.unique(videos, return_index=True)
        new = [row for video, row in zip(unique.tolist(), first.tolist(), strict=True) if there[row] and video not in known]
        known.update(videos[new].tolist())
        rows.append(examples.take(pa.array(new, pa.int64())))
        both = there & of_user
        parts.append((users[both], videos[both], is_positive(examples, two_tower.positives)[both]))
    if not parts:
        raise ValueError("there are no examples in the training source before the model, or none in the test source")
    return Shown(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def is_positive(examples: pa.RecordBatch, names: Sequence[str]) -> np.ndarray:
    """Returns which examples have one of the labels, bool [N]."""
    values, masks = labels(examples, names)
    return np.any((values > 0) & (masks > 0), axis=1)


def _wanted(subject: Subject, train: Shown) -> Wanted:
    two_tower = subject.experiment.retrieval
    assert two_tower is not None
    first: dict[int, pa.RecordBatch] = {}
    found: dict[int, set[int]] = {}
    for examples, _ in held_out(subject.experiment, subject.memories(), subject.aside):
        users, known = ids_of(examples, "user_id", "an example")
        videos, there = ids_of(examples, two_tower.video_column, "an example")
        positive = is_positive(examples, two_tower.positives) & known & there
        for row, user in enumerate(users.tolist()):
            if known[row]:
                first.setdefault(user, examples.slice(row, 1))
            if positive[row]:
                found.setdefault(user, set()).add(int(videos[row]))
    order = np.argsort(train.users, kind="stable")
    users, starts = np.unique(train.users[order], return_index=True)
    shown = dict(zip(users.tolist(), np.split(train.videos[order], starts[1:]), strict=True))
    none, rows, wanted, seen, dropped = np.zeros(0, np.int64), [], [], [], 0
    for user, videos in found.items():
        before = np.unique(shown.get(user, none))
        new = np.setdiff1d(np.array(sorted(videos), np.int64), before)
        dropped += len(videos) - new.size
        if new.size:
            rows.append(first[user])
            wanted.append(new)
            seen.append(before)
    if not wanted:
        raise ValueError(
            f"nobody has a held-out positive ({', '.join(two_tower.positives)}) on a video not shown in training: there is "
            "nothing to find"
        )
    return Wanted(together(rows), wanted, seen, dropped)


def ids_found(vectors: np.ndarray, queries: np.ndarray, ids: np.ndarray, seen: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Returns the best videos of each query without those that were seen, int64 [U, number], padded with -1.

    Args:
        vectors: float32 [N, D].
        queries: float32 [U, D].
        ids: int64 [N].
        seen: Of each query.
        number: How many.
    """
    out = np.full((len(queries), number), -1, np.int64)
    # Those who have seen much are asked for together, as so many more have to be found; sizes are powers of two to compile few.
    order = np.argsort([one.size for one in seen], kind="stable")
    for start in range(0, order.size, BLOCK):
        block = order[start : start + BLOCK]
        most = number + max(seen[row].size for row in block)
        wide = min(1 << (most - 1).bit_length(), len(vectors))
        padded = np.pad(queries[block], ((0, BLOCK - block.size), (0, 0)))
        at, _ = exact_top_k(vectors, padded, wide)
        for row, places in zip(block.tolist(), at, strict=False):
            out[row] = _first(ids[places[places >= 0]], seen[row], number)
    return out


def popular(counts: np.ndarray, ids: np.ndarray, seen: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Returns the videos with the highest counts without those that each user has seen, int64 [U, number]."""
    order = ids[np.argsort(-counts, kind="stable")]
    return np.stack([_first(order[: number + one.size], one, number) for one in seen])


def _first(videos: np.ndarray, seen: np.ndarray, number: int) -> np.ndarray:
    left = videos[~np.isin(videos, seen)][:number]
    return np.pad(left, (0, number - left.size), constant_values=-1)


def tables(rows: Sequence[Row]) -> list[Any]:
    """Returns the rows as a table."""
    one = rows[0]
    title = f"Retrieval: {one['users']:,} users, {one['wanted']:,} videos to be found among {one['videos']:,}"
    names = [*SHOWN, "coverage", "novelty", "intra_list_diversity"]
    out = table(title, "by", "K", *(name.replace("_", " ") for name in names), caption="with intervals of resampled users")
    for row in rows:
        forms = [".2f" if name == "novelty" else ".4f" for name in names]
        out.add_row(
            row["by"], str(row["k"]), *(with_interval(row, name, form) for name, form in zip(names, forms, strict=True))
        )
    return [out]


def plot(rows: Sequence[Row], output: Path) -> list[Path]:
    """Draws recall and NDCG by K; returns the file, `retrieval.png`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from launch.evaluation.figures import pyplot

    draw = pyplot()
    figure, every = draw.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axes, name in zip(every, ("recall", "ndcg"), strict=True):
        for by, colour in (("two_tower", "#2563a8"), ("popularity", "#d1662b")):
            of_one = [row for row in rows if row["by"] == by]
            k, values = [row["k"] for row in of_one], [row[name] for row in of_one]
            axes.plot(k, values, marker="o", color=colour, label=by.replace("_", "-"))
            if all(row[f"{name}_low"] is not None for row in of_one):
                low, high = ([row[name + suffix] for row in of_one] for suffix in ("_low", "_high"))
                axes.fill_between(k, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_title({"recall": "recall", "ndcg": "NDCG"}[name])
        axes.set_xlabel("K")
        axes.set_ylim(bottom=0)
    every[0].legend(frameon=False)
    path = output / "retrieval.png"
    figure.savefig(path, dpi=130)
    draw.close(figure)
    return [path]
