"""A trained run to a pipeline that answers requests.

In: an experiment, and a folder of deltas or an export. Out: a `Pipeline`, with the videos and users that the run's source tells
of. What recommending, its benchmark and its tests share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from launch.readers import log_of, open_source
from monolith_jax.experiment import Experiment
from monolith_jax.lake.feature_changes import FeatureChanges
from monolith_jax.lake.history import LakeConfig
from monolith_jax.serve.crosses import table_of
from monolith_jax.serve.feature_cache import FeatureCache
from monolith_jax.serve.log_tail import LogTail
from monolith_jax.serve.pipeline import Pipeline
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.stream.events import ACTION


def open_pipeline(experiment: Experiment, deltas: Path, retrieval: tuple[Experiment, Path] | None = None) -> Pipeline:
    """Returns a pipeline that serves the newest version; it knows no videos yet (`replay`).

    Args:
        experiment: Of the ranker, and of the two-tower where both were trained together; its `serving` says how to answer.
        deltas: Their folder of deltas.
        retrieval: Of a two-tower that was trained apart: its experiment and folder.

    Raises:
        ValueError: There is nothing to serve, or `Experiment.serving` is not set or does not fit.
    """
    if experiment.serving is None:
        raise ValueError(
            "Experiment.serving is not set: give --gin.Experiment.serving=@ServingConfig(), and a RankConfig; "
            "configs/for_you.gin shows how"
        )
    _check_history(experiment)
    both = (experiment, deltas) if experiment.retrieval and retrieval is None else retrieval
    ranker = _served(experiment, deltas) if experiment.model else None
    two_tower = None
    if both is not None:
        two_tower = ranker if ranker and both[0] is experiment else _served(*both)
    pipeline = Pipeline(experiment.serving, ranker, two_tower)
    if pipeline.features:
        _follow_lake(pipeline.features, experiment)
    return pipeline


def _follow_lake(features: FeatureCache, experiment: Experiment) -> None:
    """Fills the cache with what the lake holds, and keeps it up with what changes."""
    if not isinstance(experiment.source, LakeConfig):
        raise ValueError(
            f"ServingConfig.features is set, and Experiment.source is a {type(experiment.source).__name__}: features are in a "
            "lake; let the source be a LakeConfig, as configs/train_lake.gin has it, or set ServingConfig.features to None"
        )
    changes = FeatureChanges(experiment.source.warehouse)
    for found in changes.whole():
        for subject, batch in found:
            features.observe(subject, batch)
    features.follow(changes.follow())


def _check_history(experiment: Experiment) -> None:
    """Refuses a user state whose histories would not be those that the model was trained with."""
    history, serving = experiment.history, experiment.serving
    if history is None or serving is None:
        return
    state = serving.user_state
    for name in ("length", "actions", "positive"):
        if getattr(state, name) != getattr(history, name):
            raise ValueError(
                f"UserStateConfig.{name} is {getattr(state, name)!r}, and the model was trained with HistoryConfig.{name} "
                f"{getattr(history, name)!r}: it would read other histories than it knows; set both alike"
            )
    if missing := sorted(set(history.columns) - set(serving.catalogue.columns)):
        raise ValueError(f"HistoryConfig.columns has {', '.join(missing)}: name them in CatalogueConfig.columns, too")


def _served(experiment: Experiment, deltas: Path) -> ServedModel:
    two_tower = experiment.retrieval
    table = table_of(experiment.features, two_tower.video_column) if two_tower else ""
    follow = (table,) if table else ()
    return ServedModel(
        deltas, experiment.features, experiment.tables, experiment.model, experiment.heads,
        num_shards=experiment.mesh.num_shards, batch_sizes=(64,), two_tower=two_tower, follow=follow,
    )  # fmt: skip


def replay(pipeline: Pipeline, experiment: Experiment, most: int, tell: Callable[[int], None] = lambda number: None) -> int:
    """Tells a pipeline what a run's source has: from files the first examples, from a log its newest events.

    Args:
        pipeline: It.
        experiment: Of the run.
        most: Examples at most, or of a log, seconds that it goes back.
        tell: Called now and then with how many were read.

    Returns:
        How many examples or events there were.
    """
    if log := log_of(experiment.source):
        tail = LogTail(log, float(most))
        number = pipeline.events.rebuild(tail)
        tail.close()
        return number
    number = 0
    for chunk in open_source(experiment.source).read({}):
        examples = chunk.examples.slice(0, most - number)
        if not examples.num_rows or chunk.epoch:
            break
        pipeline.events.examples(examples)
        number += examples.num_rows
        tell(number)
    return number


def actions_of(
    user_id: int, videos: np.ndarray | Sequence[int], names: Sequence[str], time_ms: int, request_id: int | None = None
) -> pa.RecordBatch:
    """Returns actions of a user, the last at a time and each before it a millisecond earlier, as `stream.events.ACTION`."""
    number = len(names)
    columns = {
        "event_time_ms": pa.array(time_ms - number + 1 + np.arange(number)),
        "request_id": pa.array([request_id] * number, pa.int64()),
        "user_id": pa.array(np.full(number, user_id)),
        "video_id": pa.array(np.asarray(videos, np.int64)),
        "action": pa.array(list(names), pa.string()),
        "value": pa.nulls(number, pa.int64()),
        "event_id": pa.nulls(number, pa.int64()),
    }
    return pa.RecordBatch.from_arrays([columns[field.name] for field in ACTION], schema=ACTION)
