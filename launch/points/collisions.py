"""What it costs when ids share rows: test AUC by epoch of one model, over rows of their own or shared by a hash.

The question of Monolith's Figure 7 (arXiv 2209.07663, section 3.1): MovieLens-25M, a rating of at least 3.5 to be predicted by
a DeepFM from user and movie alone. The ids are counted from 0 and hashed by MD5 of their digits modulo M, users and movies
apart, as it must have been for the paper's Table 1 (`launch.bench.collisions`).

In: a MovieLens folder, or nothing: then the synthetic world with as many users and videos as MovieLens-25M has users and
movies. Out: the figures by epoch, and how many ids share. The ids are rewritten in the examples; model and training are the
ordinary ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from launch.bench.collisions import place_of
from launch.points.measured import Base, Measured

if TYPE_CHECKING:
    import pyarrow as pa

    from launch.points.training import Training
    from launch.run import Parts
    from monolith_jax.experiment import Experiment
    from monolith_jax.types import Source

LABEL = "liked"
_KINDS = ("own", "md5", "quotient_remainder")


@dataclass(frozen=True)
class CollisionsPoint:
    """Trains on examples whose ids were rewritten, and tests after each epoch. The experiment reads them from macro DATA."""

    rows: str = "own"
    """`own`; `md5 M`: MD5 modulo M; `quotient_remainder M`: the sum of row id % M and row M + id // M, two rows for each id
    (Shi et al. 2020, "Compositional embeddings using complementary partitions"; with the sum, as the Monolith paper has it)."""
    movielens: str = ""
    """Folder of a MovieLens data set in any layout that `MovieLensConfig` reads; empty: the synthetic world."""
    users: int = 162_541
    """Of the world. MovieLens-25M has as many."""
    videos: int = 59_047
    examples: int = 3_000_000
    """Of the world."""
    label: str = "complete"
    """What the world's examples predict; of MovieLens it is a rating of 3.5 or more."""
    test_share: float = 0.1
    """Of the examples, drawn at random."""
    epochs: int = 3

    def __post_init__(self) -> None:
        """Raises ValueError where a setting is out of range."""
        kind, modulus = parse_rows(self.rows)
        if kind != "own" and modulus < 1:
            raise ValueError(f"CollisionsPoint.rows is {self.rows!r}; expected a modulus of 1 or more, as in 'md5 100000'")
        if not 0 < self.test_share < 1:
            raise ValueError(f"CollisionsPoint.test_share must be between 0 and 1, got {self.test_share}")
        for name in ("users", "videos", "examples", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"CollisionsPoint.{name} must be at least 1, got {getattr(self, name)}")


class Examples(NamedTuple):
    """Arrays of one length."""

    users: np.ndarray
    """int64, counted from 0."""
    videos: np.ndarray
    """int64, counted from 0."""
    labels: np.ndarray
    """bool."""
    num_users: int
    num_videos: int


def parse_rows(text: str) -> tuple[str, int]:
    """Returns kind and modulus (0: none).

    Raises:
        ValueError: The text is none of the kinds.
    """
    kind, _, modulus = text.partition(" ")
    if kind not in _KINDS or (kind == "own") != (not modulus) or not (modulus or "0").isdigit():
        raise ValueError(f"CollisionsPoint.rows is {text!r}; expected 'own', 'md5 M' or 'quotient_remainder M'")
    return kind, int(modulus or 0)


def rewritten(number: int, rows: str) -> np.ndarray:
    """Returns what stands for ids 0 to `number` - 1, int64 [number, 1], or [number, 2] where an id is the sum of two rows."""
    kind, modulus = parse_rows(rows)
    ids = np.arange(number)
    if kind == "md5":
        return np.fromiter((place_of(one, modulus) for one in range(number)), np.int64, number)[:, None]
    if kind == "quotient_remainder":
        return np.stack([ids % modulus, modulus + ids // modulus], axis=1)
    return ids[:, None]


def shared(keys: np.ndarray) -> tuple[int, int]:
    """Returns how many different keys there are of ids, and how many ids have a key that another has too."""
    _, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    return counts.size, int((counts[inverse.reshape(-1)] > 1).sum())


def read_examples(point: CollisionsPoint, seed: int) -> Examples:
    """Returns all examples, in the order of their source.

    Raises:
        ValueError: The MovieLens folder cannot be read.
    """
    if point.movielens:
        from monolith_jax.stream.movielens import MovieLensConfig, MovieLensSource

        parts = list(_columns(MovieLensSource(MovieLensConfig(folder=point.movielens, positive_rating=3.5)), "like"))
        users, videos, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        kept = [np.unique(ids, return_inverse=True) for ids in (users, videos)]
        (known_users, users), (known_videos, videos) = kept
        return Examples(users, videos, labels, known_users.size, known_videos.size)
    from monolith_jax.stream import world
    from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource

    config = SyntheticConfig(
        seed=seed, num_examples=point.examples, live_users=point.users, live_videos=point.videos, users_per_day=0.0,
        videos_per_day=0.0, drift_days=float("inf"), events_per_s=10.0,
    )  # fmt: skip
    users, videos, labels = [], [], []
    for of_users, of_videos, of_labels in _columns(SyntheticSource(config), point.label):
        users.append(world.indexes_of(seed, "user", of_users).astype(np.int64))
        videos.append(world.indexes_of(seed, "video", of_videos).astype(np.int64))
        labels.append(of_labels)
    indexes = [np.concatenate(column) for column in (users, videos)]
    # The first to arrive may not be shown at all: ids are counted from the first who is.
    users, videos = (index - index.min() for index in indexes)
    return Examples(users, videos, np.concatenate(labels), point.users, point.videos)


def _columns(source: Source, label: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields users, videos and labels of the examples whose label is known."""
    from monolith_jax.reader import observe

    for chunk in source.read({}):
        seen = observe(chunk.examples, [label], "user_id")
        known = seen.masks[:, 0] > 0
        videos = chunk.examples.column("video_id").to_numpy(zero_copy_only=False).astype(np.int64)
        yield seen.groups[known], videos[known], seen.labels[known, 0] > 0


def prepare(point: CollisionsPoint, seed: int, folder: Path) -> dict[str, float]:
    """Writes train.parquet and test.parquet; returns how many ids there are, and how many share.

    Columns: `user_id`, `user` and `video` (what stands for the ids, lists where it is two), `LABEL`. An id is sharing where
    another is the same to the model; quotient and remainder give each id a sum of its own, of rows that others have as well.

    Raises:
        ValueError: The examples cannot be read, or all of a part have one label.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    examples = read_examples(point, seed)
    in_test = np.random.default_rng(seed).random(examples.labels.size) < point.test_share
    for name, labels in (("training", examples.labels[~in_test]), ("test", examples.labels[in_test])):
        if not 0 < labels.sum() < labels.size:
            raise ValueError(
                f"of the {labels.size} examples of the {name} part {labels.sum()} are positive; AUC needs both kinds: "
                "raise CollisionsPoint.examples, or change its test_share or label"
            )
    facts: dict[str, float] = {"examples": float(examples.labels.size)}
    columns: dict[str, np.ndarray] = {}
    numbers = (("user", examples.users, examples.num_users), ("video", examples.videos, examples.num_videos))
    for name, ids, number in numbers:
        keys = rewritten(number, point.rows)
        distinct, sharing = shared(keys)
        facts |= {f"{name}s": number, f"{name}s_lost": number - distinct, f"{name}s_sharing": sharing / number}
        facts[f"{name}_rows"] = np.unique(keys).size
        columns[name] = keys[ids]
    for name, where in (("train", ~in_test), ("test", in_test)):
        arrays = {"user_id": pa.array(examples.users[where]), LABEL: pa.array(examples.labels[where])}
        arrays |= {column: _ids(keys[where]) for column, keys in columns.items()}
        pq.write_table(pa.table(arrays), folder / f"{name}.parquet", row_group_size=65_536)
    return facts


def _ids(keys: np.ndarray) -> pa.Array:
    import pyarrow as pa

    if keys.shape[1] == 1:
        return pa.array(keys[:, 0])
    offsets = np.arange(0, keys.size + 1, keys.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(keys.reshape(-1)))


def check(experiment: Experiment, rows: str, facts: dict[str, float]) -> None:
    """Refuses an experiment that would drop ids without a word.

    Args:
        experiment: Whose features read the columns `user` and `video`.
        rows: What stands for an id.
        facts: `user_rows` and `video_rows`: how many different rows the ids need.

    Raises:
        ValueError: A table is too small, or a feature reads one of the two rows of an id.
    """
    from monolith_jax.features import IdFeatureConfig

    for feature in experiment.features:
        if not isinstance(feature, IdFeatureConfig) or f"{feature.column}_rows" not in facts:
            continue
        name, needed = feature.name, int(facts[f"{feature.column}_rows"])
        most = next(table.max_rows for table in experiment.tables if table.name == feature.table)
        if needed > most:
            raise ValueError(
                f"feature {name!r} needs {needed} rows with CollisionsPoint.rows {rows!r}, but its table holds {most}; "
                f"raise {feature.table}/TableConfig.max_rows"
            )
        if parse_rows(rows)[0] == "quotient_remainder" and feature.max_length < 2:
            raise ValueError(
                f"feature {name!r} reads {feature.max_length} of the two rows of an id with CollisionsPoint.rows {rows!r}; "
                "set IdFeatureConfig.max_length to 2"
            )


def run(point: CollisionsPoint, base: Base, folder: Path) -> list[Measured]:
    """Trains and tests; returns `test_auc` and `test_log_loss` by epoch and of the last epoch, and what `prepare` tells.

    What an earlier try left is written anew.

    Raises:
        ValueError: The data cannot be read, or the configs do not fit together.
    """
    from launch.points.training import Training, check_experiment
    from launch.process import prepare as prepare_process
    from launch.run import assemble, test
    from monolith_jax.stream.columns import ColumnsConfig

    facts = prepare(point, base.seed, folder)
    experiment = base.load(f"DATA = {str(folder)!r}")
    check_experiment(experiment, "CollisionsPoint")
    check(experiment, point.rows, facts)
    source = experiment.source
    assert isinstance(source, ColumnsConfig), "the experiment reads the examples that the point wrote"
    tested = dataclasses.replace(experiment, test_source=dataclasses.replace(source, paths=("test.parquet",)))
    prepare_process(experiment.mesh)
    parts = assemble(experiment)
    training, measured = Training(parts), list[Measured]()
    for epoch in range(1, point.epochs + 1):
        _learn(experiment, parts, training, folder)
        row = next(row for row in test(tested, parts, training.state, folder) if row["head"] == LABEL)
        measured += [Measured(f"test_{name}", row[name], along="epoch", at=epoch) for name in ("auc", "log_loss")]
    measured += [one._replace(along="", at=float("nan")) for one in measured[-2:]]
    rows = sum(int(group.maps.num_rows.sum()) for group in parts.mapper.groups)
    measured.append(Measured("rows", float(rows)))
    for name in ("train", "test"):
        (folder / f"{name}.parquet").unlink()
    return measured + [Measured(name, value) for name, value in facts.items()]


def _learn(experiment: Experiment, parts: Parts, training: Training, folder: Path) -> None:
    """Learns from the source once, to its end."""
    from launch.readers import make_readers
    from monolith_jax.planner import Planner

    readers = make_readers(experiment, experiment.source, parts.partitions, parts.memories, folder)
    planner = Planner(parts.model, readers, parts.mapper)
    try:
        for planned in planner:
            training.step(planned)
    finally:
        planner.close()
