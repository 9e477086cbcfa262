"""An experiment to a trained run folder: puts the parts together and runs the loop.

In: an `Experiment` and a run folder. Out: `config.gin`, `metrics.jsonl`, `dead_letters.jsonl` and `snapshots/` in that folder,
and a closing table. A folder that holds a snapshot goes on from it. Where there are several processes, all do this together, on
one folder; process 0 writes and prints.
"""

from __future__ import annotations

import dataclasses
import fcntl
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from launch.identity import identity
from launch.process import prepare
from launch.readers import corrected_heads, log_of, make_memories, make_readers, num_examples, stream_folder
from monolith_jax.evaluate.prequential import Prequential
from monolith_jax.evaluate.report import closing_table
from monolith_jax.experiment import Experiment, to_gin
from monolith_jax.host_copy import on_cpu
from monolith_jax.ids.exchange import Exchange
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.ids.mapper import Mapper
from monolith_jax.ids.messages import everyone
from monolith_jax.ids.threads import make_threads
from monolith_jax.mesh import make_mesh, num_devices
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.planner import Planner
from monolith_jax.reader import Memory, Reader
from monolith_jax.snapshot import Committed, SnapshotConfig, Snapshots, find
from monolith_jax.stream.cuts import sync
from monolith_jax.stream.dead_letter import set_aside
from monolith_jax.sync.publisher import Publisher
from monolith_jax.tables.table import TableConfig, make_tier
from monolith_jax.train.grow import can_grow, restore_grown
from monolith_jax.train.log import RunLog
from monolith_jax.train.loop import UNPUBLISHED, TrainConfig, predict, run
from monolith_jax.train.state import Model, TrainState, first_state, make_model
from monolith_jax.train.step import make_predict_step, make_train_step
from monolith_jax.train.tiers import Tiers
from monolith_jax.train.warm_start import take_over


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is put together from."""

    model: Model
    state: TrainState
    mapper: Mapper
    partitions: range
    """Those that this process reads."""
    memories: tuple[list[Memory], ...]
    """Of each of these partitions."""
    exchange: Exchange | None
    """To the other processes."""
    tiers: Tiers
    """The rows that are not on the devices."""


def assemble(experiment: Experiment) -> Parts:
    """Makes the model, its first state and the host's state.

    Raises:
        ValueError: The configs do not fit together, or not to the processes.
    """
    mesh, config = make_mesh(experiment.mesh), experiment.train
    exchange = Exchange() if jax.process_count() > 1 else None
    process_id, num_processes = (exchange.process_id, exchange.num_processes) if exchange else (0, 1)
    _check_batch(config, num_devices(mesh), num_processes)
    if experiment.retrieval:
        _check_negatives(experiment.retrieval, config.partitions, num_devices(mesh))
    model, weights = make_model(
        experiment.model, experiment.tables, experiment.features, corrected_heads(experiment),
        experiment.dense_optimizer, config.seed, experiment.mesh.num_shards, mesh, experiment.wire,
        experiment.retrieval,
    )  # fmt: skip
    threads = make_threads(experiment.mapper)
    mappers = [
        GroupMapper(
            group.maps,
            model.layout.position_tables(index, group.maps.names),
            num_devices(mesh),
            [Rule(table.admission, table.ttl_s) for table in group.tables],
            threads,
            process_id,
            num_processes,
            tier=make_tier(group, num_processes),
        )
        for index, group in enumerate(model.groups)
    ]
    share = config.partitions // num_processes
    mine = range(process_id * share, (process_id + 1) * share)
    mapper = Mapper(mappers, num_devices(mesh), exchange)
    memories = tuple(make_memories(experiment) for _ in mine)
    return Parts(model, first_state(model, weights), mapper, mine, memories, exchange, Tiers(model, exchange))


def _check_batch(config: TrainConfig, devices: int, num_processes: int) -> None:
    if config.batch_size % devices:
        raise ValueError(f"TrainConfig.batch_size {config.batch_size} is no multiple of the {devices} devices")
    if config.partitions < 1 or config.batch_size % config.partitions:
        raise ValueError(
            f"TrainConfig.partitions is {config.partitions}, which does not divide the batch_size {config.batch_size}; "
            "use 1 or another divisor"
        )
    if config.partitions % num_processes:
        raise ValueError(
            f"TrainConfig.partitions is {config.partitions}, which {num_processes} processes cannot share evenly; set it to a "
            f"multiple of {num_processes} (for a new run: it stays for the run's life), or start fewer processes"
        )


def _check_negatives(config: TwoTowerConfig, partitions: int, devices: int) -> None:
    if config.num_negatives % devices or config.num_negatives % partitions:
        raise ValueError(
            f"TwoTowerConfig.num_negatives is {config.num_negatives}, which {devices} devices and {partitions} partitions "
            "cannot share evenly; use a multiple of both"
        )


Held = Callable[[Planner, RunLog], AbstractContextManager[Any]]


def train(
    experiment: Experiment, workdir: Path, console: Console | None = None, held: Held | None = None
) -> dict[str, dict[str, Any]]:
    """Trains, or goes on training, and tests; returns the totals of each head.

    `held` is entered for as long as the loop runs, in place of what lets SIGTERM end it, which only a main thread may.

    Raises:
        ValueError: The configs do not fit together or to the snapshot, or the input cannot be read.
        FloatingPointError: A loss was not finite.
    """
    prepare(experiment.mesh)
    parts = assemble(experiment)
    first = not parts.exchange or parts.exchange.process_id == 0
    workdir.mkdir(parents=True, exist_ok=True)
    with alone(workdir) if first else nullcontext():
        return _train(experiment, workdir, parts, first, console or Console(quiet=not first), held or _stopped_by_sigterm)


@contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Holds a run folder, which a second run would cut files of that the first still writes.

    Raises:
        ValueError: Another process holds it.
    """
    with (workdir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process trains in {workdir}. Wait for it or stop it, or take another --workdir"
            ) from None
        yield


def _train(
    experiment: Experiment, workdir: Path, parts: Parts, first: bool, console: Console, held: Held
) -> dict[str, dict[str, Any]]:
    publisher = _make_publisher(experiment, parts, workdir)
    tell = partial(_tell_committed, console, publisher) if first else None
    snapshots = Snapshots(experiment.snapshots, workdir / "snapshots", tell=tell, exchange=parts.exchange)
    config = experiment.train
    readers = make_readers(experiment, experiment.source, parts.partitions, parts.memories, workdir, layout=parts.model.layout)
    planner = Planner(
        parts.model, readers, parts.mapper, parts.exchange, freeze_every=experiment.snapshots.period_steps,
        max_steps=config.steps, cuts=publisher.schedule if publisher else None,
    )  # fmt: skip
    total = num_examples(experiment.source)
    if config.steps:
        total = min(total or config.steps * config.batch_size, config.steps * config.batch_size)
    measures = Prequential(experiment.prequential, [(head.label, head.kind) for head in experiment.heads])
    log = RunLog(workdir, measures, config.log_every, total, config.tensorboard, console, first)
    who = identity(experiment)

    def save(state: TrainState, frozen: Mapping[str, Any]) -> None:
        if log_of(experiment.source):
            for index in parts.partitions:
                sync(stream_folder(workdir, index))
        extras = log.get_state() | ({"publisher": publisher.get_state()} if publisher else {})
        snapshots.save(log.steps, parts.tiers.whole(state), frozen, extras, who)
        log.last_snapshot = f"step {log.steps} in {workdir / 'snapshots'}"

    try:
        state = _begin(parts, snapshots, planner, log, who, experiment.tables, config.warm_start, console, publisher)
        if publisher:
            publisher.start([group.maps for group in parts.mapper.groups], log.steps, state)
            log.also = publisher.metrics
        if experiment.snapshots.period_steps and on_cpu(state):
            snapshots.prepare(parts.tiers.whole(state))
        if first:
            (workdir / "config.gin").write_text(to_gin(experiment), encoding="utf-8")
        with log, held(planner, log):
            state = run(state, planner, make_train_step(parts.model), log, save, parts.tiers, publisher or UNPUBLISHED)
    finally:
        with ExitStack() as closing:
            if publisher:
                closing.callback(publisher.close)
            closing.callback(snapshots.close)
            closing.callback(planner.close)
    if planner.stopped:
        console.print(
            f"stopped by SIGTERM after step {log.steps:,}, saved; the same command goes on from there", highlight=False
        )
        return {}
    totals = _finish(experiment, parts, state, log, readers, workdir, console)
    return totals


def _make_publisher(experiment: Experiment, parts: Parts, workdir: Path) -> Publisher | None:
    if experiment.publisher is None:
        return None
    return Publisher(experiment.publisher, workdir, parts.model.groups, parts.model.mesh, parts.exchange, to_gin(experiment))


def _tell_committed(console: Console, publisher: Publisher | None, committed: Committed) -> None:
    if publisher:
        publisher.schedule.want_base()
    # Not into metrics.jsonl: when a snapshot is whole depends on the clock, and a run that goes on must write the same file.
    console.print(
        f"saved step {committed.step:,}: {committed.num_bytes / 1e6:,.1f} MB on disk, whole after {committed.seconds:.1f} s"
        + committed.mirrored,
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
    publisher: Publisher | None,
) -> TrainState:
    """Returns the state to start from: the newest snapshot, a warm start, or nothing learned yet."""
    step = newest_snapshot(parts, snapshots)
    if step is not None:
        like = parts.tiers.like(parts.state)
        if can_grow(snapshots.read_meta(step)["identity"], who):
            _refuse_several(parts, "tables take new sizes or rules")
            restored = restore_grown(snapshots, step, parts.model, like, parts.mapper, tables)
            console.print("tables take their new sizes and rules; every id keeps its row", highlight=False)
        else:
            restored = snapshots.restore(step, like, who)
        planner.set_state(restored.host)
        log.set_state(restored.extras)
        if publisher:
            publisher.set_state(restored.extras.get("publisher"))
        log.last_snapshot = f"step {step}"
        console.print(f"going on from the snapshot of step {step:,}{snapshots.origin}", highlight=False)
        return parts.tiers.split(restored.state)
    if not warm_start:
        return parts.state
    _refuse_several(parts, "TrainConfig.warm_start takes over another run")
    old = Snapshots(SnapshotConfig(), find(Path(warm_start)), read_only=True)
    latest = old.latest()
    assert latest is not None, "find() returned a folder without a snapshot"
    state, lines = take_over(
        parts.model, parts.state, parts.mapper, old.restore_plain(latest), old.read_meta(latest)["identity"]
    )
    old.close()
    console.print(f"warm start from step {latest:,} of {warm_start}:\n  " + "\n  ".join(lines), highlight=False)
    return parts.tiers.split(state)


def newest_snapshot(parts: Parts, snapshots: Snapshots) -> int | None:
    """Returns the step of the newest snapshot, the same in all processes."""
    seen = everyone(parts.exchange, snapshots.latest())
    if len(set(seen)) > 1:
        raise ValueError(
            f"the processes see different newest snapshots, of steps {', '.join(map(str, seen))}: is --workdir on a file "
            "system that all hosts share? If it is, start again in a minute"
        )
    return seen[0]


def _refuse_several(parts: Parts, what: str) -> None:
    if parts.exchange:
        raise ValueError(
            f"{what}, which one process does alone: start the same command once as one process with TrainConfig.steps at the "
            f"step it begins with plus 1, then go on with {parts.exchange.num_processes}"
        )


def _finish(
    experiment: Experiment, parts: Parts, state: TrainState, log: RunLog, readers: list[Reader], workdir: Path, console: Console
) -> dict[str, dict[str, Any]]:
    """Writes totals, tests and the summary; prints the closing table."""
    totals = log.close_measures()
    tests = test(experiment, parts, state, workdir) if experiment.test_source else []
    rows = int(sum(group.maps.num_rows.sum() for group in parts.mapper.groups))
    mine = [rows, sum(memory.num_refused for reader in readers for memory in reader.memories)]
    counts = [reader.dead_letters.get_state()["counts"] for reader in readers]
    of_all = everyone(parts.exchange, [*mine, counts, dict(log.told)])
    rejected = sum((Counter(counts) for _, _, of_process, _ in of_all for counts in of_process), Counter[str]())
    told = [of_process[3] for of_process in of_all]
    summary = {
        "kind": "summary",
        "steps": log.steps,
        "examples": log.examples,
        "seconds": round(log.seconds, 1),
        "rows": sum(of_process[0] for of_process in of_all),
        "rejected": dict(rejected.most_common()),
        "without_history_or_counters": sum(of_process[1] for of_process in of_all),
    }
    if any(told):
        names = dict.fromkeys(name for one in told for name in one if not name.endswith("_s"))
        summary["stream"] = {name: sum(one.get(name, 0) for one in told) for name in names}
    summary |= log.retrieval
    log.write([*totals.values(), *tests, summary])
    if totals:
        console.print(closing_table(totals, tests))
    if log.retrieval:
        found = ", ".join(f"{name.removeprefix('retrieval_')} {value:.4f}" for name, value in log.retrieval.items())
        console.print(f"two-tower, before training on each batch: {found} (of the batch's videos)", highlight=False)
    letters = set_aside(rejected, workdir / "dead_letters*.jsonl")
    console.print(f"{log.steps:,} steps, {log.examples:,} examples, {summary['rows']:,} ids in tables, {letters}")
    if "stream" in summary:
        joined = ", ".join(f"{value:,.0f} {name.replace('_', ' ')}" for name, value in summary["stream"].items() if value)
        console.print(f"the stream: {joined or 'nothing late, nothing repeated'}", highlight=False)
    console.print(f"more: python -m launch.evaluate --workdir={workdir}", highlight=False, soft_wrap=True)
    return totals


def test(experiment: Experiment, parts: Parts, state: TrainState, workdir: Path) -> list[dict[str, Any]]:
    """Scores the held-out source with a state that stays as it is (tables in two tiers use it up); returns a row a head.

    Histories and counters go on, as they would in production: an example sees what came before it, never itself.
    """
    assert experiment.test_source is not None
    measures = Prequential(experiment.prequential, [(head.label, head.kind) for head in experiment.heads])
    readers = make_readers(experiment, experiment.test_source, parts.partitions, parts.memories, workdir, "_test")
    planner = Planner(parts.model, readers, parts.mapper, parts.exchange, insert=False)
    try:
        predict(
            state,
            planner,
            make_predict_step(parts.model),
            lambda seen, scores: measures.add(seen.event_time_ms, seen.groups, scores, seen.labels, seen.masks, seen.optimal),
            parts.tiers,
        )
    finally:
        planner.close()
    measures.close()
    return [{**row, "kind": "test", "name": "test"} for row in measures.totals().values()]


@contextmanager
def _stopped_by_sigterm(planner: Planner, log: RunLog) -> Any:
    """Lets SIGTERM end the run in good order, in all processes: the steps planned are run and saved."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: planner.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
