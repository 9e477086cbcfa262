"""What changed on the devices, to a folder of deltas, beside the loop.

In: steps that ran, with their plans, and the state right after them. Out: versions in a `DeltaFolder`.

    planners agree when -> loop follows plans, has the devices read between two steps -> threads fetch, quantise, write, commit

At most one delta is on its way; what changes meanwhile goes into the next. Bases go their way in a thread of their own: their
state is that of a delta, and later deltas do not wait for them. With several processes each writes what its shards have, the
same cut after cut, and the first one commits.

A run that goes on opens a new epoch. What readers took from after the restored state is in its first delta, as the trainer has
it by then, or as deletions; `epochs` tells how that is known, and when it begins with a base instead.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from monolith_jax.ids.cuckoo import IdMaps
from monolith_jax.ids.messages import everyone
from monolith_jax.planner import Planned
from monolith_jax.sync.delta import DeltaFolder, Version, next_epoch
from monolith_jax.sync.epochs import Opening, open_epoch
from monolith_jax.sync.gather import Gathered, VectorReader, make_copy
from monolith_jax.sync.schedule import PublisherConfig, Schedule
from monolith_jax.sync.touched import GroupRows, Touched
from monolith_jax.sync.writer import Job, Writer
from monolith_jax.tables.table import Group
from monolith_jax.types import CUT_BASE, CUT_DENSE, CUT_ROWS, Cut, Exchange

_Read = tuple[tuple[tuple[str, ...], Gathered, GroupRows], ...]


class Publisher:
    """Publishes a run: `start`, then the loop's calls, then `close`."""

    def __init__(
        self,
        config: PublisherConfig,
        folder: Path,
        groups: Sequence[Group],
        mesh: Mesh,
        exchange: Exchange | None = None,
        gin: str = "",
    ) -> None:
        """Nothing is read or written yet.

        Args:
            config: When and where.
            folder: The run folder.
            groups: The model's groups of tables.
            mesh: The mesh.
            exchange: To the other processes, each of which publishes its own shards; none: this is the only one.
            gin: The run's configuration, kept with each base.

        Raises:
            ValueError: A setting is out of range, or a table is in two tiers.
        """
        config.check()
        if tiered := [table.name for group in groups if group.tiered for table in group.tables]:
            raise ValueError(
                f"Experiment.publisher reads rows from the devices, but those of {', '.join(tiered)} are in two tiers: set "
                "TableConfig.memory of them to 'device', or publish from snapshots"
            )
        self._config, self._exchange = config, exchange
        self._names = [group.maps.names for group in groups]
        process = (exchange.process_id, exchange.num_processes) if exchange else (0, 1)
        self._is_first = process[0] == 0
        self._folder = DeltaFolder(config.folder or folder.absolute() / "deltas")
        self._touched = Touched([group.maps for group in groups], *process)
        self._readers = [VectorReader(group, mesh) for group in groups]
        self._copy = make_copy(mesh)
        self._writer = Writer(self._folder, process, config.format, config.retry_s, gin, self._is_durable)
        self._opening = Opening(0, None, None)
        self._previous: Version | None = None
        self._sequence = self._step = 0
        self._of_snapshot: int | None = None
        self.schedule = Schedule(config)
        """For the planner: when to publish."""

    def set_state(self, state: Mapping[str, Any] | None) -> None:
        """Is told what `get_state` returned when the snapshot was made that was restored; None: nothing was published then."""
        self._of_snapshot = None if state is None else state["epoch"]

    def get_state(self) -> dict[str, Any]:
        """Returns what a snapshot keeps, JSON-able."""
        return {"epoch": self._opening.epoch}

    def start(self, maps: Sequence[IdMaps], step: int, state: Any) -> None:
        """Opens an epoch. All processes call it together, before the planner starts.

        Args:
            maps: Id maps of each group, as they were restored or are in a new run.
            step: Steps done.
            state: The state to start from.

        Raises:
            ValueError: The folder cannot be read.
        """
        told = None
        if self._is_first:
            told = open_epoch(self._folder, next_epoch(self._folder.root), step, self._of_snapshot).to_json()
        opening = Opening.from_json(everyone(self._exchange, told)[0])
        self._opening, self._previous, self._step = opening, opening.previous, step
        self._writer.base = opening.base
        self._touched.restore(maps)
        for table, ids in opening.ids(self._folder).items():
            self._touched.rewind(table, ids, maps)
        for reader, array in zip(self._readers, state.groups, strict=True):
            reader.compile(array)
        jax.block_until_ready(self._copy(state.weights))

    def after_step(self, state: Any, planned: Planned) -> None:
        """Follows a step that was dispatched; publishes the state after it where that was agreed.

        Raises:
            Exception: Whatever kept the threads from writing.
        """
        self._writer.check()
        self._touched.follow(planned.plans, planned.freed)
        self._step += 1
        if planned.cut is not None:
            self.cut(state, planned.cut)

    def cut(self, state: Any, cut: Cut) -> None:
        """Starts a publication of a state, before the next step uses it up.

        Raises:
            Exception: Whatever kept the threads from writing.
        """
        assert cut.step == self._step, f"a publication of step {cut.step} comes after step {self._step}"
        began = time.monotonic()
        self._writer.check()
        if self._touched.is_taken:
            self._writer.wait()  # Only the last publication of a run does not wait for its turn.
        taken = self._touched.take()
        anew = self._opening.base is None and self._sequence == 0
        with_base = bool(cut.kind & CUT_BASE)
        dense = self._copy(state.weights) if anew or with_base or cut.kind & CUT_DENSE else None
        rows = self._read(state, self._touched.live() if anew or with_base else taken.groups)
        if anew:
            self._writer.start(Job(self._next(), None, True, cut, rows, {}, dense, began))
            if with_base:
                self.schedule.ended(CUT_BASE)
            return
        version, base = self._next(), None
        if with_base:
            base = Job(self._next(), version, True, cut, rows, {}, dense, began)
            rows = self._read(state, taken.groups)
        self._writer.start(Job(version, self._previous, False, cut, rows, taken.deleted, dense, began, base))
        self._previous = version

    def finish(self) -> None:
        """Waits until all that was cut is there; the planner's last cut is of the last step.

        Raises:
            Exception: Whatever kept the threads from writing.
        """
        self._writer.wait()

    def close(self) -> None:
        """Gives up what is not written yet, and ends the threads."""
        self._writer.close()

    def metrics(self) -> dict[str, Any]:
        """Returns what there is to tell of the last delta, for metrics.jsonl."""
        return self._writer.told

    def _next(self) -> Version:
        self._sequence += 1
        return Version(self._opening.epoch, self._sequence - 1)

    def _read(self, state: Any, rows: Sequence[GroupRows]) -> _Read:
        parts = zip(self._names, self._readers, state.groups, rows, strict=True)
        return tuple((names, reader.read(array, of_group.rows), of_group) for names, reader, array, of_group in parts)

    def _is_durable(self, job: Job) -> None:
        """Is called in the threads that write."""
        if job.is_base and job.previous is not None:
            self.schedule.ended(CUT_BASE)
        else:
            self._touched.done()
            self.schedule.ended(CUT_ROWS)
        if job.is_base and self._is_first:
            with contextlib.suppress(OSError):  # What stays is taken away with the next base.
                self._folder.prune(self._config.keep_bases)
