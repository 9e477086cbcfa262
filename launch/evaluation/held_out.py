"""The held-out examples, as the model that is judged would be asked for them.

In: an experiment and the state of what its partitions remember (histories, counters). Out: batches of examples that see what
came before them, never themselves. Of a run that state is in the snapshot; of an exported folder, which has none, it is made
once more by reading the training source up to where the export stands, without learning from it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.readers import log_of, make_memories, open_source
from monolith_jax.packing import unpack
from monolith_jax.reader import Memory, observe
from monolith_jax.snapshot import SnapshotConfig, Snapshots, find
from monolith_jax.stream.batcher import batches
from monolith_jax.stream.partitions import partition

if TYPE_CHECKING:
    import pyarrow as pa

    from monolith_jax.experiment import Experiment, SourceConfig
    from monolith_jax.reader import Observed
    from monolith_jax.types import Source

Memories = Sequence[Sequence[Memory]]
"""Of each partition, what it remembers."""


def test_files(experiment: Experiment) -> SourceConfig:
    """Returns the held-out source.

    Raises:
        ValueError: There is none, or it is a log.
    """
    source = experiment.test_source
    if source is None:
        raise ValueError(
            "Experiment.test_source is not set, so nothing is held out to judge by. Name a source that the run did not learn "
            "from: --gin.Experiment.test_source='@test/ColumnsConfig()' --gin.test/ColumnsConfig.folder=FOLDER "
            "--gin.test/ColumnsConfig.paths=\"('FILE.parquet',)\", or the like of KuaiRandConfig and MovieLensConfig"
        )
    if log_of(source):
        raise ValueError(
            "Experiment.test_source is a log, and a log has no end: write the events of a period to files, and name "
            "these as --gin.Experiment.test_source='@test/ColumnsConfig()'"
        )
    return source


def restored(experiment: Experiment, run: Path, step: int | None = None) -> Memories:
    """Returns what the partitions of a run remembered at a snapshot; None: the newest.

    Raises:
        ValueError: There is no such snapshot any more, or it is of other memories.
    """
    snapshots = Snapshots(SnapshotConfig(), find(run), read_only=True)
    try:
        step = snapshots.latest() if step is None else step
        if step is None:
            raise ValueError(f"no snapshot in {run} is whole; wait for the first (SnapshotConfig.period_steps)")
        if step not in snapshots.steps():
            raise ValueError(
                f"the snapshot of step {step} in {run}, whose weights are judged, is gone: the run has replaced it meanwhile. "
                "Ask once more, or keep more of them (SnapshotConfig.keep)"
            )
        saved = [unpack(part)["memories"] for part in snapshots.restore_plain(step).host["parts"]]
    finally:
        snapshots.close()
    out = []
    for states in saved:
        memories = make_memories(experiment)
        for memory, state in zip(memories, states, strict=True):
            memory.set_state(state)
        out.append(memories)
    return out


def replayed(experiment: Experiment, positions: Sequence[Any]) -> Memories:
    """Returns what partitions remember once they have read the training source up to where a model stands.

    Args:
        experiment: Of the run.
        positions: Of each partition in the stream, as a base's manifest tells.

    Raises:
        ValueError: The training source is a log, or its files are others than those that were learned from.
    """
    out = []
    for index, position in enumerate(positions):
        memories = make_memories(experiment)
        if memories:
            _read_to(experiment, memories, index, len(positions), position)
        out.append(memories)
    return out


def _read_to(experiment: Experiment, memories: Sequence[Memory], index: int, number: int, position: Any) -> None:
    if log_of(experiment.source):
        raise ValueError(
            "histories and counters of an exported folder are made by reading the training source again, and this one's is a "
            "log, which may be gone: give the run folder, whose snapshot has them, as --workdir"
        )
    source = _part(experiment, open_source(experiment.source), index, number)
    stream, epoch = batches(source, experiment.train.batch_size // number, read_ahead=0), 0
    try:
        while _plain(stream.get_state()) != _plain(position):
            batch = next(stream, None)
            if batch is None:
                raise ValueError(
                    f"the training source ended before the place that the export stands at, {position}: Experiment.source "
                    "names other files than those that were learned from"
                )
            if batch.epoch != epoch:
                epoch = batch.epoch
                for memory in memories:
                    memory.reset()
            if batch.examples.num_rows:
                remember(memories, batch.examples)
    finally:
        stream.close()


def first_pass(experiment: Experiment, position: Any, notes: dict[str, str]) -> Iterator[pa.RecordBatch]:
    """Yields the training source's first pass, to a place if that is within it.

    Args:
        experiment: Of the run.
        position: The place, as a base's manifest tells it; None: none.
        notes: Gets as `training` what was yielded.

    Raises:
        ValueError: The training source is a log.
    """
    if log_of(experiment.source):
        raise ValueError("the training source is a log, which may be gone: it cannot be read again")
    notes["training"] = "the whole first pass"
    end, before = _plain(position), _plain({})
    for chunk in open_source(experiment.source).read({}):
        is_last = end is not None and before == end["position"]
        if is_last and chunk.epoch == 0:
            notes["training"] = "the first pass, to where the model stands"
        if chunk.epoch:
            break
        examples = chunk.examples.slice(0, end["row"]) if is_last and end is not None else chunk.examples
        if examples.num_rows:
            yield examples
        if is_last:
            break
        before = _plain(dict(chunk.position))


def _plain(position: Any) -> Any:
    """Returns a position as a manifest's JSON has it."""
    return json.loads(json.dumps(position))


def _part(experiment: Experiment, source: Source, index: int, number: int) -> Source:
    column = experiment.history.user_column if experiment.history else "user_id"
    return partition(source, index, number, column)


def remember(memories: Sequence[Memory], examples: pa.RecordBatch) -> pa.RecordBatch:
    """Returns examples with what is remembered of those before them; they are remembered from now on."""
    for memory in memories:
        examples = memory.extend(examples)
    return examples


def held_out(
    experiment: Experiment, memories: Memories, aside: Counter[str] | None = None
) -> Iterator[tuple[pa.RecordBatch, Observed]]:
    """Yields the held-out examples, partition by partition, each in the order of the stream; with what was observed.

    Args:
        experiment: With a test source.
        memories: Of each partition; they go on remembering.
        aside: Gets, by reason, how many rows are left out, and at "refused" how many a memory had no place for; the latter
            are yielded nevertheless.

    Raises:
        ValueError: There is no test source.
    """
    source, number = open_source(test_files(experiment)), len(memories)
    labels = [head.label for head in experiment.heads]
    aside = Counter() if aside is None else aside
    for index, of_partition in enumerate(memories):
        stream = batches(_part(experiment, source, index, number), experiment.train.batch_size // number)
        refused = sum(memory.num_refused for memory in of_partition)
        try:
            for batch in stream:
                aside.update(row.reason for row in batch.rejected)
                if batch.examples.num_rows:
                    examples = remember(of_partition, batch.examples)
                    yield examples, observe(examples, labels, "user_id")
        finally:
            stream.close()
        if more := sum(memory.num_refused for memory in of_partition) - refused:
            aside["refused"] += more
