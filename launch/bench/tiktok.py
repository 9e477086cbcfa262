"""Two-tower retrieval on TikTok, all-rank: `configs/tiktok.gin` over several seeds against EASE and popularity, on one split.

Learns the split `trn` and finds the videos of `val`: for each user the best 20 of all videos but those of the user's `trn`, by
the served two-tower (`launch.export`, `ServedModel`, `Encoder`), exactly. Recall@20 is the share of a user's `val` videos that
are found, NDCG@20 has binary gains and the best possible order as 1; both are means over the users with `val` videos.

The data, "DiffMM: Multi-Modal Diffusion Model for Recommendation" (Jiang et al. 2024), was split by number of the video:
whatever a user has in `val` is numbered above all of the user's `trn`. Numbers are names here: no model sees their order.
`--inner` measures on a split made in the same way out of `trn`, for choices of the recipe; EASE's strength is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLE = "python -m launch.bench.tiktok --data $MONOLITH_JAX_DATA/tiktok_diffmm --workdir /tmp/tiktok --seeds 3"
K = 20
WANTED = {"recall_at_20": 0.120, "ndcg_at_20": 0.051}
STRENGTHS = (10.0, 30.0, 100.0, 300.0)
"""Of EASE, to choose from."""
MANY = 50
"""Examples that a user gives in one pass at most: 103 users have 70 % of all interactions."""
PASSES = 3
"""Passes that are written, each in an order of its own and with other examples of users with many."""
MAX_HISTORY = 20
DEVIATION = 0.4
"""Of the content: so that what the layers first make of it is not much longer than the vectors of ids that it is added to."""
BLOCK = 1024
"""Users that are scored at once."""
CONTENT = ("visual", "acoustic")
WITHOUT = ("TwoTowerConfig.user_features = ('liked',)", "TwoTowerConfig.video_features = ('video',)")

Scores = Callable[[np.ndarray], np.ndarray]
"""Users, int64 [B], to the scores of all videos, float32 [B, N]."""


class Pairs(NamedTuple):
    """Users and their videos, int64 [n] both, by user."""

    users: np.ndarray
    videos: np.ndarray


class Data(NamedTuple):
    """What is learned and what is to be found."""

    train: Pairs
    test: Pairs
    content: tuple[np.ndarray, ...]
    """float32 [N, 128] for each of `CONTENT`, of mean 0 in every number and deviation `DEVIATION`."""
    num_users: int

    @property
    def num_videos(self) -> int:
        """N"""
        return len(self.content[0])


def read(folder: Path) -> Data:
    """Returns the data of a folder.

    Raises:
        ValueError: A file is missing.
    """
    import pyarrow.parquet as pq

    names = ("interactions.parquet", "image_feat.npz", "audio_feat.npz")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {', '.join(missing)}; give the folder of the TikTok data as --data")
    table = pq.read_table(folder / names[0])
    users, videos = (table.column(name).to_numpy().astype(np.int64) for name in ("user", "item"))
    in_train = table.column("split").to_numpy() == "trn"
    order = np.lexsort((videos, users))
    users, videos, in_train = users[order], videos[order], in_train[order]
    content = []
    for name in names[1:]:
        with np.load(folder / name) as file:
            raw = file["feat"].astype(np.float32)
        content.append((raw - raw.mean(0)) / raw.std() * DEVIATION)
    train, test = (Pairs(users[where], videos[where]) for where in (in_train, ~in_train))
    return Data(train, test, tuple(content), int(users.max()) + 1)


def inner(data: Data, seed: int) -> Data:
    """Returns a split of the training pairs alone, made as `val` was: of a third of the users the last video is to be found."""
    users, videos = data.train
    chosen = np.random.default_rng(seed).random(data.num_users) < 1 / 3
    last = np.r_[users[1:] != users[:-1], True] & np.r_[False, users[1:] == users[:-1]] & chosen[users]
    return data._replace(train=Pairs(users[~last], videos[~last]), test=Pairs(users[last], videos[last]))


def by_user(pairs: Pairs, num_users: int) -> list[np.ndarray]:
    """Returns the videos of each user."""
    return np.split(pairs.videos, np.cumsum(np.bincount(pairs.users, minlength=num_users))[:-1])


def measures(found: np.ndarray, wanted: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the means of recall and NDCG at K.

    Args:
        found: int64 [U, K], videos of each user, best first, none twice.
        wanted: The videos to be found of each user, one or more, none twice.
    """
    gains = 1.0 / np.log2(np.arange(2, found.shape[1] + 2))
    recalls, ndcgs = [], []
    for of_user, right in zip(found, wanted, strict=True):
        hits = np.isin(of_user, right)
        recalls.append(hits.sum() / len(right))
        ndcgs.append(gains[hits].sum() / gains[: len(right)].sum())
    return float(np.mean(recalls)), float(np.mean(ndcgs))


def best(scores: np.ndarray, seen: Sequence[np.ndarray], number: int) -> np.ndarray:
    """Returns the videos [B, number] of the highest scores [B, N], best first, without those that a user has seen."""
    scores = scores.copy()
    for row, videos in zip(scores, seen, strict=True):
        row[videos] = -np.inf
    top = np.argpartition(-scores, number - 1, axis=1)[:, :number]
    order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
    return np.take_along_axis(top, order, 1)


def judged(data: Data, scores: Scores) -> tuple[float, float]:
    """Returns recall and NDCG at K of scores over all users with videos to be found."""
    seen, wanted = by_user(data.train, data.num_users), by_user(data.test, data.num_users)
    users = np.unique(data.test.users)
    found = [
        best(scores(block), [seen[user] for user in block], K)
        for block in (users[start : start + BLOCK] for start in range(0, users.size, BLOCK))
    ]
    return measures(np.concatenate(found), [wanted[user] for user in users])


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


def _matrix(data: Data) -> np.ndarray:
    matrix = np.zeros((data.num_users, data.num_videos), np.float32)
    matrix[data.train.users, data.train.videos] = 1.0
    return matrix


def of_ease(data: Data, strength: float) -> tuple[float, float]:
    """Returns recall and NDCG at K of EASE."""
    matrix = _matrix(data)
    weights = ease(matrix, strength)
    return judged(data, lambda users: matrix[users] @ weights)


def of_popularity(data: Data) -> tuple[float, float]:
    """Returns recall and NDCG at K of the same order for all: by the number of users."""
    counts = np.bincount(data.train.videos, minlength=data.num_videos).astype(np.float32)
    return judged(data, lambda users: np.tile(counts, (users.size, 1)))


def one_pass(data: Data, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Returns users, videos and histories without the video: what one pass teaches, in an order drawn at random.

    A user's only video has no history that it could be told from. Of users with more than `MANY` videos as many are drawn, each
    with a history drawn from the others.
    """
    users, videos, histories = [], [], []
    for user, own in enumerate(by_user(data.train, data.num_users)):
        if own.size < 2:
            continue
        for video in own if own.size <= MANY else rng.choice(own, MANY, replace=False):
            others = own[own != video]
            users.append(user)
            videos.append(video)
            histories.append(others if others.size <= MAX_HISTORY else rng.choice(others, MAX_HISTORY, replace=False))
    order = rng.permutation(len(users))
    return np.array(users)[order], np.array(videos)[order], [histories[index] for index in order]


def _lists(values: np.ndarray) -> pa.Array:
    import pyarrow as pa

    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def columns_of(data: Data, videos: np.ndarray) -> dict[str, Any]:
    """Returns the columns of videos."""
    contents = {name: _lists(values[videos]) for name, values in zip(CONTENT, data.content, strict=True)}
    return {"video_id": videos, **contents}


def columns_of_users(data: Data, histories: Sequence[np.ndarray]) -> dict[str, Any]:
    """Returns the columns of users with some histories: videos, and the mean of their content, zeros where there are none."""
    import pyarrow as pa

    columns: dict[str, Any] = {"liked": pa.array([list(history) for history in histories], pa.list_(pa.int64()))}
    for name, values in zip(CONTENT, data.content, strict=True):
        nothing = np.zeros(values.shape[1], np.float32)
        means = np.stack([values[history].mean(0) if history.size else nothing for history in histories])
        columns[f"liked_{name}"] = _lists(means)
    return columns


def prepare(data: Data, path: Path, seed: int) -> None:
    """Writes the examples: first every video once, shown and not liked, so that it can be drawn; then the passes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, number = np.random.default_rng(seed), data.num_videos
    catalogue = rng.permutation(number)
    parts = [(np.full(number, -1), catalogue, [np.zeros(0, np.int64)] * number, np.zeros(number, np.bool_))]
    for _ in range(PASSES):
        users, videos, histories = one_pass(data, rng)
        parts.append((users, videos, histories, np.ones(users.size, np.bool_)))
    writer = None
    for users, videos, histories, liked in parts:
        columns = {"user_id": users, **columns_of(data, videos), **columns_of_users(data, histories), "like": liked}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, use_dictionary=False)
        writer.write_table(table, row_group_size=4096)
    assert writer is not None
    writer.close()


def two_tower(data: Data, workdir: Path, seed: int, overrides: Sequence[str]) -> tuple[float, float]:
    """Trains, exports and serves; returns recall and NDCG at K by the served vectors."""
    import pyarrow as pa
    from rich.console import Console

    from launch.export import export
    from launch.run import train
    from monolith_jax.experiment import load
    from monolith_jax.features import featurize
    from monolith_jax.serve.encode import Encoder
    from monolith_jax.serve.served_model import ServedModel

    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    prepare(data, workdir / "examples.parquet", seed)
    bindings = [f"DATA = {str(workdir)!r}", f"TrainConfig.seed = {seed}", *overrides]
    experiment = load(["configs/tiktok.gin"], bindings)
    train(experiment, workdir / "run", Console(quiet=True))
    export(workdir / "run", workdir / "served", "float32")
    model = ServedModel(
        workdir / "served", experiment.features, experiment.tables, None, (), num_shards=experiment.mesh.num_shards,
        two_tower=experiment.retrieval,
    )  # fmt: skip
    encoder, rng = Encoder(model, user_sizes=(BLOCK,), video_sizes=(BLOCK,)), np.random.default_rng(seed)
    rows = pa.RecordBatch.from_pydict(columns_of(data, np.arange(data.num_videos)))
    videos = encoder.videos(featurize(rows, encoder.video_layout))
    histories = by_user(data.train, data.num_users)

    def scores(users: np.ndarray) -> np.ndarray:
        own = [histories[user] for user in users]
        own = [videos if videos.size <= MAX_HISTORY else rng.choice(videos, MAX_HISTORY, replace=False) for videos in own]
        asked = pa.RecordBatch.from_pydict({"user_id": users, **columns_of_users(data, own)})
        return encoder.users(featurize(asked, encoder.user_layout)) @ videos.T

    return judged(data, scores)


def figures_of(runs: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Returns what the last line tells, given recall and NDCG of each run by name; the model with content has the name ""."""
    figures: dict[str, Any] = {}
    for name, of_name in runs.items():
        for which, values in zip(("recall_at_20", "ndcg_at_20"), zip(*of_name, strict=True), strict=True):
            figures[f"{name}{which}"] = round(statistics.mean(values), 5)
            if not name:
                figures[f"{which}_by_seed"] = [round(value, 5) for value in values]
    return figures | {"met": all(figures[name] >= wanted for name, wanted in WANTED.items())}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 where both demands are met, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.tiktok",
        description=__doc__,
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="interactions and vectors of the videos")
    parser.add_argument("--workdir", type=Path, required=True, help="for the runs and their exports, which are replaced")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default: %(default)s)")
    parser.add_argument("--inner", action="store_true", help="measure on a split of trn, one a seed, never on val")
    parser.add_argument("--only", action="store_true", help="only the model with content")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING", help="override of configs/tiktok.gin")
    asked = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console
    from rich.table import Table

    console, data = Console(), read(asked.data)
    splits = [inner(data, seed) if asked.inner else data for seed in range(asked.seeds)]
    runs: dict[str, list[tuple[float, float]]] = {}
    for name, overrides in (("", ()), ("without_content_", WITHOUT))[: 1 if asked.only else 2]:
        runs[name] = []
        for seed, split in enumerate(splits):
            runs[name].append(two_tower(split, asked.workdir / f"{name}{seed}", seed, [*asked.gin, *overrides]))
            found = "recall {:.4f}, ndcg {:.4f}".format(*runs[name][-1])
            console.print(f"{name or 'with_content_'}seed {seed}: {found}", highlight=False)
    if not asked.only:
        strength = max(STRENGTHS, key=lambda one: of_ease(inner(data, 0), one)[0])
        runs["ease_"] = [of_ease(split, strength) for split in (splits if asked.inner else splits[:1])]
        runs["popularity_"] = [of_popularity(split) for split in splits]
    table = Table(
        "", "Recall@20", "sd", "NDCG@20", "sd", title="TikTok, all-rank, " + ("inner splits" if asked.inner else "val")
    )
    for name, of_name in runs.items():
        recalls, ndcgs = zip(*of_name, strict=True)
        cells = (f"{f(of):.4f}" for of in (recalls, ndcgs) for f in (statistics.mean, statistics.pstdev))
        table.add_row((name or "with_content_").rstrip("_").replace("_", " "), *cells)
    console.print(table)
    figures = figures_of(runs)
    if asked.inner:
        del figures["met"]  # The demands are on val.
    print(json.dumps(figures))
    return 0 if figures.get("met", True) else 1


if __name__ == "__main__":
    sys.exit(main())
