"""An experiment's source to the readers of this process's partitions.

In: an `Experiment`, a run folder. Out: a `Reader` for each partition; and what a live stream asks of the rest of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from monolith_jax.experiment import Experiment, SourceConfig
from monolith_jax.features import FeatureLayout
from monolith_jax.lake.history import LakeConfig, LakeSource
from monolith_jax.models.losses import HeadConfig
from monolith_jax.negatives import NegativeSampler
from monolith_jax.reader import Memory, Reader
from monolith_jax.stream.batcher import batches
from monolith_jax.stream.columns import ColumnsConfig, ColumnsSource
from monolith_jax.stream.counters import Counters
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.events import ACTIONS
from monolith_jax.stream.history import History
from monolith_jax.stream.kuairand import KuaiRandConfig, KuaiRandSource
from monolith_jax.stream.log_source import LogConfig, LogSource
from monolith_jax.stream.movielens import MovieLensConfig, MovieLensSource
from monolith_jax.stream.partitions import partition
from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource
from monolith_jax.types import Source


def log_of(source: SourceConfig) -> LogConfig | None:
    """Returns the log that a source is, or that it goes on with; None: it ends by itself."""
    return source.log if isinstance(source, LakeConfig) else source if isinstance(source, LogConfig) else None


def open_source(config: SourceConfig) -> Source:
    """Returns the whole stream of a config; of one that goes on with a log, what comes before.

    Raises:
        ValueError: It is a log, which has no end.
    """
    match config:
        case SyntheticConfig():
            return SyntheticSource(config)
        case KuaiRandConfig():
            return KuaiRandSource(config)
        case MovieLensConfig():
            return MovieLensSource(config)
        case ColumnsConfig():
            return ColumnsSource(config)
        case LogConfig():
            raise ValueError(f"the log {config.url} has no end: it is read by training alone")
        case LakeConfig():
            return LakeSource(dataclasses.replace(config, log=None), Path(), 1)


def num_examples(config: SourceConfig) -> int | None:
    """Returns the examples of a stream where that is cheap to know."""
    return None if isinstance(config, LogConfig) or log_of(config) else open_source(config).num_examples


def make_memories(experiment: Experiment) -> list[Memory]:
    """Returns what a partition remembers.

    Raises:
        ValueError: A live stream shows impressions more than once.
    """
    memories: list[Memory] = []
    if experiment.history:
        memories.append(History(experiment.history))
    if experiment.counters:
        memories.append(Counters(experiment.counters))
    log = log_of(experiment.source)
    if memories and log and (log.joiner.emit == "at_once" or log.joiner.late_s):
        raise ValueError(
            "Experiment.history and counters go by examples, and with JoinerConfig.emit 'at_once' or late_s an impression is "
            "an example again with each action: they would count it twice, and show the model what it is to predict. Log "
            "histories and counts as features of the impression, or use emit 'close' and late_s 0"
        )
    return memories


def stream_folder(workdir: Path, index: int, suffix: str = "") -> Path:
    """Returns where the cuts of a partition of a live stream are."""
    return workdir / f"stream{suffix}" / str(index)


def make_readers(
    experiment: Experiment,
    config: SourceConfig,
    partitions: Sequence[int],
    memories: Sequence[Sequence[Memory]],
    workdir: Path,
    suffix: str = "",
    layout: FeatureLayout | None = None,
) -> list[Reader]:
    """Returns the readers of partitions; rejected rows of partition 0 go to `dead_letters<suffix>.jsonl`.

    Args:
        experiment: The run.
        config: What is read: its source, or its test source.
        partitions: Those that this process reads.
        memories: Of each of these.
        workdir: The run folder.
        suffix: Sets the files of one source apart from those of another.
        layout: The features, for the videos that a two-tower is trained with; None: none is trained from this source.
    """
    train = experiment.train
    rows = train.batch_size // train.partitions
    column = experiment.history.user_column if experiment.history else "user_id"
    whole = None if isinstance(config, LogConfig | LakeConfig) else open_source(config)
    readers = []
    for index, of_partition in zip(partitions, memories, strict=True):
        if isinstance(config, LogConfig):
            folder = stream_folder(workdir, index, suffix)
            source: Source = LogSource(config, folder, rows, index, train.partitions, train.max_lag_s)
        elif isinstance(config, LakeConfig):
            folder = stream_folder(workdir, index, suffix)
            source = LakeSource(config, folder, rows, index, train.partitions, train.max_lag_s)
        else:
            assert whole is not None
            source = partition(whole, index, train.partitions, column)
        name = f"dead_letters{suffix}.{index}.jsonl" if index else f"dead_letters{suffix}.jsonl"
        negatives = None
        if experiment.retrieval and layout:
            numbers = (train.batch_size, train.partitions, index, train.seed)
            negatives = NegativeSampler(experiment.retrieval, layout, *numbers)
        readers.append(Reader(batches(source, rows), of_partition, DeadLetters(workdir / name), rows, negatives))
    return readers


def corrected_heads(experiment: Experiment) -> tuple[HeadConfig, ...]:
    """Returns the heads with the corrections that the joiner makes necessary."""
    log = log_of(experiment.source)
    if log is None:
        return experiment.heads
    joiner, heads = log.joiner, []
    for head in experiment.heads:
        if head.kind == "binary" and joiner.emit == "at_once" and head.label in ACTIONS:
            head = dataclasses.replace(head, early_negatives=True)
        if head.kind == "binary" and joiner.negative_rate < 1 and head.label == joiner.positive:
            head = dataclasses.replace(head, negative_rate=joiner.negative_rate)
        heads.append(head)
    return tuple(heads)
