"""The TikTok data of DiffMM: what is learned, what is to be found, and the two-tower's examples of it.

"DiffMM: Multi-Modal Diffusion Model for Recommendation" (Jiang et al. 2024) split it by number of the video: whatever a user
has in `val` is numbered above all of the user's `trn`. Numbers are names here: no model sees their order. `inner` splits `trn`
in the same way, for choices of a recipe.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from launch.points.train import trained

if TYPE_CHECKING:
    import pyarrow as pa

    from monolith_jax.experiment import Experiment

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
"""Bindings of a two-tower that does not see content."""

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
        ValueError: A file or a column is missing, there is nothing to learn or nothing to find, or a video has no content.
    """
    import pyarrow.parquet as pq

    names = ("interactions.parquet", "image_feat.npz", "audio_feat.npz")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {', '.join(missing)}; give the TikTok data (RetrievalPoint.data, --data)")
    table = pq.read_table(folder / names[0])
    if missing := [name for name in ("user", "item", "split") if name not in table.column_names]:
        raise ValueError(f"{folder / names[0]} has no column {', '.join(missing)}, only {', '.join(table.column_names)}")
    users, videos = (table.column(name).to_numpy().astype(np.int64) for name in ("user", "item"))
    in_train = table.column("split").to_numpy() == "trn"
    if in_train.all() or not in_train.any():
        raise ValueError(
            f"{folder / names[0]} must have rows of split trn, to learn from, and of another, to find; got one kind"
        )
    order = np.lexsort((videos, users))
    users, videos, in_train = users[order], videos[order], in_train[order]
    content = []
    for name in names[1:]:
        with np.load(folder / name) as file:
            raw = file["feat"].astype(np.float32)
        if raw.ndim != 2 or len(raw) != len(content[0] if content else raw) or videos.max() >= len(raw):
            raise ValueError(f"{folder / name} must have a vector of each video 0 to {videos.max()} or more, got {raw.shape}")
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


def two_tower(data: Data, folder: Path, seed: int, load: Callable[..., Experiment]) -> Scores:
    """Trains, exports and serves a two-tower; returns its scores, by the served vectors.

    Args:
        data: What it learns from.
        folder: For examples, run and export; what is there goes.
        seed: Of the order of the examples and of histories that are drawn.
        load: Takes further bindings and returns the experiment, whose source reads from macro DATA.

    Raises:
        ValueError: SIGTERM came while it trained: what is half learned would give figures like any other.
    """
    import pyarrow as pa

    from launch.export import export
    from monolith_jax.features import featurize
    from monolith_jax.serve.encode import Encoder
    from monolith_jax.serve.served_model import ServedModel

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(data, folder / "examples.parquet", seed)
    experiment = load(f"DATA = {str(folder)!r}")
    trained(experiment, folder / "run")
    export(folder / "run", folder / "served", "float32")
    model = ServedModel(
        folder / "served", experiment.features, experiment.tables, None, (), num_shards=experiment.mesh.num_shards,
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

    return scores
