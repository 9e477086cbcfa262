"""Batches to plans and inputs on the device, in stream order, at most two steps ahead.

In: readers of the stream's partitions. Out: `Planned` steps. All that changes host state (histories, counters, id maps, dead
letters, the position in the stream) happens here, in one thread, in plan order; so that state is ahead of the device, and
whoever wants to save it gets a frozen copy of it as it was right after one plan, on that plan.

    source --chunks--> batcher --batches--> [ planner thread: history, features, labels, ids -> rows ] --2 ahead--> loop

A batch of B examples (and where a two-tower is trained, M drawn videos) has an Nth of them from each of N partitions, in their
order, which P processes share evenly: each reads, plans and copies its part, and all plan in rounds (`rounds`), so that the
batches, and what is learned, do not depend on P.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from typing import Any, NamedTuple

import numpy as np

from monolith_jax.ids.mapper import Mapper
from monolith_jax.ids.messages import everyone
from monolith_jax.negatives import interleaved, num_blocks, side_by_side
from monolith_jax.packing import pack, stacked, unpack
from monolith_jax.reader import Fetched, Observed, Part, Reader, joined
from monolith_jax.rounds import agree, may_go_on
from monolith_jax.train.state import Inputs, Model, place_inputs
from monolith_jax.types import CUT_BASE, CUT_DENSE, CUT_ROWS, Cut, Cuts, Exchange, FreedRows, GroupPlan, Moves

AHEAD = 2
IDLE_S = 0.01


@dataclass(frozen=True)
class Planned:
    """One step, ready to run."""

    inputs: Inputs
    """On the device."""
    observed: Observed
    num_examples: int
    epoch: int
    stats: dict[str, float]
    freed: tuple[FreedRows, ...]
    """The rows of each group that this plan took from their ids."""
    position: list[dict[str, Any]]
    """Where the batch starts in each partition that this process reads, for error messages."""
    frozen: dict[str, Any] | None
    """Host state right after this plan, if it was asked for."""
    moves: tuple[Moves | None, ...] = ()
    """What the host must bring to the device before the step, and take from it, for each group."""
    told: dict[str, float] = field(default_factory=dict)
    """What the live streams of this process tell of themselves; empty where the input is no live stream."""
    times_ms: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [n] event times of this process's examples."""
    plans: tuple[GroupPlan, ...] = ()
    """What the devices were told of each group, on the host."""
    cut: Cut | None = None
    """The publication of the state after this step, if there is one."""


class _End(NamedTuple):
    frozen: dict[str, Any]
    error: BaseException | None


class Planner:
    """Plans steps in a thread of its own."""

    def __init__(
        self,
        model: Model,
        readers: Sequence[Reader],
        mapper: Mapper,
        exchange: Exchange | None = None,
        group_column: str = "user_id",
        freeze_every: int = 0,
        max_steps: int = 0,
        insert: bool = True,
        cuts: Cuts | None = None,
    ) -> None:
        """Takes over its parts; nothing runs before iteration starts.

        Args:
            model: The model that is trained.
            readers: Of this process's partitions, in their order; equal numbers of rows.
            mapper: Id maps.
            exchange: To the other processes; none: this is the only one.
            group_column: Column whose values group the within-user metrics.
            freeze_every: A copy of the host state comes with every plan whose number is a multiple of this; 0: never.
            max_steps: Plans after which it ends, counted from the first of the run's life; 0: at the end of the stream.
            insert: Whether new ids get rows (False: frozen tables, for tests on held-out data).
            cuts: Asks for publications; none: there are none.
        """
        self._model = model
        self._readers = tuple(readers)
        self._mapper = mapper
        self._exchange = exchange
        self._num_partitions = len(self._readers) * (exchange.num_processes if exchange else 1)
        batch_size = self._readers[0].num_rows * self._num_partitions
        self._sizes = (batch_size, model.num_drawn, model.groups[0].maps.num_shards)
        self._labels = [head.label for head in model.heads]
        self._group_column = group_column
        self._freeze_every = freeze_every
        self._max_steps = max_steps
        self._insert = insert
        self._cuts = cuts
        self._step = self._now_ms = self._asked_ms = 0
        self._cut_steps = dict.fromkeys((CUT_ROWS, CUT_DENSE), 0)
        # The plan that waits for room in the queue is one of those ahead.
        self._queue: Queue[Planned | Cut | _End] = Queue(maxsize=AHEAD - 1)
        self._stop, self._abandon = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.stopped = False
        """Whether it ended because this process was told to stop, or with several, one of them."""
        self.frozen_at_end: dict[str, Any] | None = None
        """Host state after the last plan, once iteration has ended."""

    def __iter__(self) -> Iterator[Planned]:
        """Yields steps; raises what reading raised, after the steps before it."""
        return self.steps(lambda: None)

    def steps(self, idle: Callable[[], None], cut: Callable[[Cut], None] = lambda cut: None) -> Iterator[Planned]:
        """Like `__iter__`, and calls `idle` when there is none for `IDLE_S`, and `cut` for publications between two steps."""
        self._thread = threading.Thread(target=self._run, name="planner", daemon=True)
        self._thread.start()
        while True:
            try:
                item = self._queue.get(timeout=IDLE_S)
            except Empty:
                idle()
                item = self._queue.get()
            if isinstance(item, _End):
                self._thread.join()
                self.frozen_at_end = item.frozen
                if item.error is not None:
                    raise item.error
                return
            if isinstance(item, Cut):
                cut(item)
            else:
                yield item

    def stop(self) -> None:
        """Ends planning soon; the plans already made are still yielded."""
        self._stop.set()

    def close(self) -> None:
        """Ends the thread and closes the batches. Plans that were not taken are lost."""
        self._stop.set()
        self._abandon.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except Empty:
                continue
        for reader in self._readers:
            reader.close()

    def _run(self) -> None:
        frozen, error = {}, None
        with contextlib.suppress(OSError):
            # On a CPU host it shares the cores with the devices' threads, which wait for one another: it takes their gaps.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        try:
            if self._freeze_every:
                # Takes the memory for it before the first step, not at a later one.
                self._mapper.get_state()
            error = self._plan_all()
            if self._is_unpublished(CUT_ROWS | CUT_DENSE):
                self._put(self._make_cut(CUT_ROWS | CUT_DENSE))
            # Whoever only tests changes nothing that is worth keeping.
            frozen = self.get_state() if self._insert else {}
        except Exception as raised:  # Every error is the consumer's to see; the host's state may be half way through a plan.
            error = raised
        self._put(_End(frozen, error))

    def _plan_all(self) -> Exception | None:
        """Plans to the end. Returns the error at which the input cannot be read on: all before it is whole and can be kept."""
        while not (self._max_steps and self._step >= self._max_steps):
            fetched, error = self._fetch()
            ready, ended = Fetched.READY in fetched, all(one is Fetched.ENDED for one in fetched)
            self._asked_ms = self._now_ms
            wanted = self._cuts.wanted(self._asked_ms) if self._cuts else 0
            go = may_go_on(self._exchange, ready, ended, self._stop.is_set(), error is not None, wanted)
            self.stopped = go.stop
            if go.failed is not None:
                said = everyone(self._exchange, str(error or ""))
                return error or ValueError(f"process {go.failed} cannot read its input on: {said[go.failed]}")
            if go.stop or go.ended:
                return None
            if go.ready:
                self._put(self._plan(go.cut))
                continue
            self._take()  # A turn in which nothing came, anywhere: no plan.
            if self._is_unpublished(go.cut):
                self._put(self._make_cut(go.cut))
        return None

    def _is_unpublished(self, kind: int) -> bool:
        """Tells whether rows, or dense weights if they are meant, changed since they were last published."""
        return self._cuts is not None and any(kind & part and self._step > step for part, step in self._cut_steps.items())

    def _fetch(self) -> tuple[list[Fetched], Exception | None]:
        """Returns what the partitions have, and the first error: that input cannot be read on."""
        fetched, first_error = [], None
        for reader in self._readers:
            try:
                fetched.append(reader.fetch())
            except (ValueError, OSError) as error:
                first_error = first_error or error
        return fetched, first_error

    def _put(self, item: Planned | Cut | _End) -> None:
        while not self._abandon.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except Full:
                continue

    def _take(self) -> list[Part]:
        arguments = (self._model.layout, self._labels, self._group_column, self._now_ms)
        return [reader.take(*arguments) for reader in self._readers]

    def _make_cut(self, kind: int) -> Cut:
        """Returns the publication of the state after the plans so far."""
        assert self._cuts is not None
        # The time that was asked with: the next step is asked for with that of this one.
        self._cuts.agreed(kind, self._asked_ms)
        self._cut_steps[CUT_ROWS] = self._step
        if kind & (CUT_DENSE | CUT_BASE):
            self._cut_steps[CUT_DENSE] = self._step
        of_all = everyone(self._exchange, [reader.position for reader in self._readers])
        return Cut(self._step, kind, self._now_ms, tuple(position for of_process in of_all for position in of_process))

    def _plan(self, cut: int = 0) -> Planned:
        position = [reader.position for reader in self._readers]
        parts = self._take()
        features, observed = joined(parts)
        now = agree(self._exchange, parts, observed)
        # Never going back. What comes from the future is seen now.
        self._now_ms = max(self._now_ms, now.watermark_ms)
        shift_ms = np.repeat([part.shift_ms for part in parts], self._readers[0].num_rows)
        times_ms = np.minimum(observed.event_time_ms + shift_ms, self._now_ms)
        drawn, retrieval = [part.drawn for part in parts if part.drawn is not None], None
        if drawn:
            blocks = num_blocks(*self._sizes) // (self._exchange.num_processes if self._exchange else 1)
            features, retrieval = side_by_side(features, drawn, blocks)
            # No time: that a video is drawn keeps no id from expiring.
            of_drawn = np.zeros(len(features.dense) - times_ms.size, np.int64)
            times_ms = interleaved(times_ms, of_drawn, blocks)
        plan = self._mapper.plan(features.groups, times_ms, self._now_ms, self._step, self._insert)
        inputs = Inputs(plan.groups, features.weights, features.dense, observed.labels, observed.masks, retrieval)
        inputs = place_inputs(self._model, inputs)
        self._step += 1
        freeze = self._freeze_every and self._step % self._freeze_every == 0
        frozen = self.get_state() if freeze else None
        times_ms = np.concatenate([part.observed.event_time_ms[: part.num_examples] for part in parts])
        told = (plan.stats, plan.freed, position, frozen, plan.moves, _told(parts), times_ms)
        observed = now.observed
        if self._num_partitions > 1:
            # Partitions are not at the same time: their rows count in the period that the watermark is in.
            observed = observed._replace(event_time_ms=np.full_like(observed.event_time_ms, self._now_ms))
        made = self._make_cut(cut) if cut else None
        return Planned(inputs, observed, now.num_examples, now.epoch, *told, plan.groups, made)

    def get_state(self) -> dict[str, Any]:
        """Returns a copy of this process's host state.

        `maps` are arrays by shard, `parts` is uint8 [partitions, rows, 2^20] with as many rows in all processes, the rest is
        small, JSON-able and the same in all of them.
        """
        packed = [pack(reader.get_state()) for reader in self._readers]
        most = max(len(rows) for rows in packed)
        if self._exchange:
            most = int(self._exchange.gather(np.array([most], np.uint32)).max())
        return {
            "maps": self._mapper.get_state(),
            "parts": stacked(packed, most),
            "step": self._step,
            "now_ms": self._now_ms,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `get_state` returned. Before iteration only."""
        assert self._thread is None, "the planner is running"
        self._mapper.set_state(state["maps"])
        for reader, rows in zip(self._readers, state["parts"], strict=True):
            reader.set_state(unpack(rows))
        self._step, self._now_ms = state["step"], state["now_ms"]
        self._cut_steps = dict.fromkeys(self._cut_steps, self._step)


def _told(parts: Sequence[Part]) -> dict[str, float]:
    """Returns what live streams tell: of ages, in seconds, the highest, of all else the sum."""
    names = dict.fromkeys(name for part in parts for name in part.told)
    values = {name: [part.told[name] for part in parts if name in part.told] for name in names}
    return {name: max(of_name) if name.endswith("_s") else sum(of_name) for name, of_name in values.items()}
