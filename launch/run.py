"""An experiment to a trained run folder: puts the parts together and runs the loop.

In: an `Experiment` and a run folder. Out: `config.gin`, `metrics.jsonl`, `dead_letters.jsonl` and `snapshots/` in that folder,
and a closing table. A folder that holds a snapshot goes on from it.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.process import prepare
from monolith_jax.evaluate.prequential import Prequential
from monolith_jax.evaluate.report import closing_table
from monolith_jax.experiment import Experiment, SourceConfig, to_gin
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.ids.mapper import Mapper
from monolith_jax.ids.threads import make_threads
from monolith_jax.mesh import make_mesh, num_devices
from monolith_jax.planner import Memory, Planner
from monolith_jax.snapshot import Committed, SnapshotConfig, Snapshots, find
from monolith_jax.stream.batcher import batches
from monolith_jax.stream.columns import ColumnsConfig, ColumnsSource
from monolith_jax.stream.counters import Counters
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.history import History
from monolith_jax.stream.kuairand import KuaiRandConfig, KuaiRandSource
from monolith_jax.stream.movielens import MovieLensConfig, MovieLensSource
from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource
from monolith_jax.tables.table import TableConfig
from monolith_jax.train.grow import can_grow, restore_grown
from monolith_jax.train.log import RunLog
from monolith_jax.train.loop import predict, run
from monolith_jax.train.state import Model, TrainState, first_state, make_model
from monolith_jax.train.step import make_predict_step, make_train_step
from monolith_jax.train.warm_start import take_over
from monolith_jax.types import Source


def open_source(config: SourceConfig) -> Source:
    """Returns the source of a config."""
    match config:
        case SyntheticConfig():
            return SyntheticSource(config)
        case KuaiRandConfig():
            return KuaiRandSource(config)
        case MovieLensConfig():
            return MovieLensSource(config)
        case ColumnsConfig():
            return ColumnsSource(config)


def identity(experiment: Experiment) -> dict[str, Any]:
    """Returns the configs that a run's state depends on; a snapshot of others is refused."""
    parts = ("source", "history", "counters", "features", "tables", "model", "heads", "dense_optimizer", "prequential")
    plain: dict[str, Any] = {}
    for name in parts:
        value = getattr(experiment, name)
        plain[name] = [_plain(part) for part in value] if isinstance(value, tuple) else _plain(value)
    train = experiment.train
    return plain | {"num_shards": experiment.mesh.num_shards, "batch_size": train.batch_size, "seed": train.seed}


def _plain(config: Any) -> Any:
    return None if config is None else {"is": type(config).__name__, **dataclasses.asdict(config)}


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is put together from."""

    model: Model
    state: TrainState
    mapper: Mapper
    memories: list[Memory]


def assemble(experiment: Experiment) -> Parts:
    """Makes the model, its first state and the host's state.

    Raises:
        ValueError: The configs do not fit together.
    """
    mesh = make_mesh(experiment.mesh)
    if experiment.train.batch_size % num_devices(mesh):
        raise ValueError(
            f"TrainConfig.batch_size {experiment.train.batch_size} is no multiple of the {num_devices(mesh)} devices"
        )
    model, weights = make_model(
        experiment.model, experiment.tables, experiment.features, experiment.heads,
        experiment.dense_optimizer, experiment.train.seed, experiment.mesh.num_shards, mesh,
        experiment.exchange,
    )  # fmt: skip
    threads = make_threads(experiment.mapper)
    mappers = [
        GroupMapper(
            group.maps,
            model.layout.position_tables(index, group.maps.names),
            num_devices(mesh),
            [Rule(table.admission, table.ttl_s) for table in group.tables],
            threads,
        )
        for index, group in enumerate(model.groups)
    ]
    memories: list[Memory] = []
    if experiment.history:
        memories.append(History(experiment.history))
    if experiment.counters:
        memories.append(Counters(experiment.counters))
    return Parts(model, first_state(model, weights), Mapper(mappers), memories)


def train(experiment: Experiment, workdir: Path, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """Trains, or goes on training, and tests; returns the totals of each head.

    Raises:
        ValueError: The configs do not fit together or to the snapshot, or the input cannot be read.
        FloatingPointError: A loss was not finite.
    """
    console = console or Console()
    prepare(experiment.mesh)
    parts = assemble(experiment)
    workdir.mkdir(parents=True, exist_ok=True)
    source = open_source(experiment.source)
    snapshots = Snapshots(experiment.snapshots, workdir / "snapshots", tell=partial(_tell_committed, console))
    dead_letters = DeadLetters(workdir / "dead_letters.jsonl")
    config = experiment.train
    planner = Planner(
        parts.model, batches(source, config.batch_size), parts.memories, parts.mapper, dead_letters, config.batch_size,
        freeze_every=experiment.snapshots.period_steps, max_steps=config.steps,
    )  # fmt: skip
    total = source.num_examples
    if config.steps:
        total = min(total or config.steps * config.batch_size, config.steps * config.batch_size)
    measures = Prequential(experiment.prequential, [(head.label, head.kind) for head in experiment.heads])
    log = RunLog(workdir, measures, config.log_every, total, config.tensorboard, console)
    who = identity(experiment)

    def save(state: TrainState, frozen: Mapping[str, Any]) -> None:
        snapshots.save(log.steps, state, frozen, log.get_state(), who)
        log.last_snapshot = f"step {log.steps} in {workdir / 'snapshots'}"

    try:
        state = _begin(parts, snapshots, planner, log, who, experiment.tables, config.warm_start, console)
        if experiment.snapshots.period_steps:
            snapshots.prepare(state)
        (workdir / "config.gin").write_text(to_gin(experiment), encoding="utf-8")
        with log, _stopped_by_sigterm(planner) as stopped:
            state = run(state, planner, make_train_step(parts.model), log, save)
    finally:
        planner.close()
        snapshots.close()
    if stopped:
        console.print(
            f"stopped by SIGTERM after step {log.steps:,}, saved; the same command goes on from there", highlight=False
        )
        return {}
    totals = _finish(experiment, parts, state, log, dead_letters, workdir, console)
    return totals


def _tell_committed(console: Console, committed: Committed) -> None:
    # Not into metrics.jsonl: when a snapshot is whole depends on the clock, and a run that goes on must write the same file.
    console.print(
        f"saved step {committed.step:,}: {committed.num_bytes / 1e6:,.1f} MB on disk, whole after {committed.seconds:.1f} s",
        highlight=False,
    )


def _begin(
    parts: Parts,
    snapshots: Snapshots,
    planner: Planner,
    log: RunLog,
    who: Mapping[str, Any],
    tables: Sequence[TableConfig],
    warm_start: str,
    console: Console,
) -> TrainState:
    """Returns the state to start from: the newest snapshot, a warm start, or nothing learned yet."""
    step = snapshots.latest()
    if step is not None:
        if can_grow(snapshots.read_meta(step)["identity"], who):
            restored = restore_grown(snapshots, step, parts.model, parts.state, parts.mapper, tables)
            console.print("tables take their new sizes and rules; every id keeps its row", highlight=False)
        else:
            restored = snapshots.restore(step, parts.state, who)
        planner.set_state(restored.host)
        log.set_state(restored.extras)
        log.last_snapshot = f"step {step}"
        console.print(f"going on from the snapshot of step {step:,}", highlight=False)
        return restored.state
    if not warm_start:
        return parts.state
    old = Snapshots(SnapshotConfig(), find(Path(warm_start)), read_only=True)
    latest = old.latest()
    assert latest is not None, "find() returned a folder without a snapshot"
    state, lines = take_over(
        parts.model, parts.state, parts.mapper, old.restore_plain(latest), old.read_meta(latest)["identity"]
    )
    old.close()
    console.print(f"warm start from step {latest:,} of {warm_start}:\n  " + "\n  ".join(lines), highlight=False)
    return state


def _finish(
    experiment: Experiment,
    parts: Parts,
    state: TrainState,
    log: RunLog,
    dead_letters: DeadLetters,
    workdir: Path,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Writes totals, tests and the summary; prints the closing table."""
    totals = log.close_measures()
    tests = test(experiment, parts, state, workdir) if experiment.test_source else []
    summary = {
        "kind": "summary",
        "steps": log.steps,
        "examples": log.examples,
        "seconds": round(log.seconds, 1),
        "rows": int(sum(group.maps.num_rows.sum() for group in parts.mapper.groups)),
        "rejected": dead_letters.counts,
        "without_history_or_counters": sum(memory.num_refused for memory in parts.memories),
    }
    log.write([*totals.values(), *tests, summary])
    console.print(closing_table(totals, tests))
    console.print(
        f"{log.steps:,} steps, {log.examples:,} examples, {summary['rows']:,} ids in tables, {dead_letters.summary()}"
    )
    console.print(f"more: python -m launch.evaluate --workdir={workdir}", highlight=False, soft_wrap=True)
    return totals


def test(experiment: Experiment, parts: Parts, state: TrainState, workdir: Path) -> list[dict[str, Any]]:
    """Scores the held-out source with a state that stays as it is; returns a row a head.

    Histories and counters go on, as they would in production: an example sees what came before it, never itself.
    """
    assert experiment.test_source is not None
    size = experiment.train.batch_size
    letters = DeadLetters(workdir / "dead_letters_test.jsonl")
    measures = Prequential(experiment.prequential, [(head.label, head.kind) for head in experiment.heads])
    source = open_source(experiment.test_source)
    planner = Planner(parts.model, batches(source, size), parts.memories, parts.mapper, letters, size, insert=False)
    try:
        predict(
            state,
            planner,
            make_predict_step(parts.model),
            lambda seen, scores: measures.add(seen.event_time_ms, seen.groups, scores, seen.labels, seen.masks, seen.optimal),
        )
    finally:
        planner.close()
    measures.close()
    return [{**row, "kind": "test", "name": "test"} for row in measures.totals().values()]


@contextmanager
def _stopped_by_sigterm(planner: Planner) -> Any:
    """Lets SIGTERM end the run in good order: the steps planned are run and saved."""
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        planner.stop()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
