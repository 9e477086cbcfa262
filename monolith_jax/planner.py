"""Batches to plans and inputs on the device, in stream order, at most two steps ahead.

In: an iterator of `Batch`es. Out: `Planned` steps. All that changes host state (histories, counters, id maps, dead letters,
the position in the stream) happens here, in one thread, in plan order; so that state is ahead of the device, and whoever wants
to save it gets a frozen copy of it as it was right after one plan, on that plan.

    source --chunks--> batcher --batches--> [ planner thread: history, features, labels, ids -> rows ] --2 ahead--> loop
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import pyarrow as pa

from monolith_jax.features import Features, featurize
from monolith_jax.ids.mapper import Mapper
from monolith_jax.ids.strings import string_ids
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.events import labels
from monolith_jax.train.state import Inputs, Model, input_shardings
from monolith_jax.types import FreedRows, GroupIds

AHEAD = 2


class Memory(Protocol):
    """What adds columns to examples from those before them: histories, counters."""

    @property
    def num_refused(self) -> int:
        """Examples that came too late to get a place."""
        ...

    def extend(self, examples: pa.RecordBatch) -> pa.RecordBatch: ...  # noqa: D102
    def reset(self) -> None: ...  # noqa: D102
    def get_state(self) -> dict[str, np.ndarray]: ...  # noqa: D102
    def set_state(self, state: Mapping[str, np.ndarray]) -> None: ...  # noqa: D102


class Observed(NamedTuple):
    """What the host knows of a batch, for the metrics. Rows of padding have masks of 0."""

    event_time_ms: np.ndarray
    """int64 [B]"""
    groups: np.ndarray
    """int64 [B], the user, for metrics within users."""
    labels: np.ndarray
    """float32 [B, T]"""
    masks: np.ndarray
    """float32 [B, T]"""
    optimal: np.ndarray | None
    """float32 [B, T], the best possible scores where the source knows them (NaN where not)."""


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
    position: dict[str, Any]
    """Where the batch starts in the stream, for error messages."""
    frozen: dict[str, Any] | None
    """Host state right after this plan, if it was asked for."""


class _End(NamedTuple):
    frozen: dict[str, Any]
    error: BaseException | None


class Planner:
    """Plans steps in a thread of its own."""

    def __init__(
        self,
        model: Model,
        batches: Any,
        memories: Sequence[Memory],
        mapper: Mapper,
        dead_letters: DeadLetters,
        batch_size: int,
        group_column: str = "user_id",
        freeze_every: int = 0,
        max_steps: int = 0,
        insert: bool = True,
    ) -> None:
        """Takes over its parts; nothing runs before iteration starts.

        Args:
            model: The model that is trained.
            batches: Iterator of `Batch` with get_state, set_state and close.
            memories: Histories and counters, in the order in which they extend examples.
            mapper: Id maps.
            dead_letters: Where rejected rows go.
            batch_size: B, to which short batches are padded.
            group_column: Column whose values group the within-user metrics.
            freeze_every: A copy of the host state comes with every plan whose number is a multiple of this; 0: never.
            max_steps: Plans after which it ends, counted from the first of the run's life; 0: at the end of the stream.
            insert: Whether new ids get rows (False: frozen tables, for tests on held-out data).
        """
        self._model = model
        self._batches = batches
        self._memories = tuple(memories)
        self._mapper = mapper
        self._dead_letters = dead_letters
        self._batch_size = batch_size
        self._group_column = group_column
        self._freeze_every = freeze_every
        self._max_steps = max_steps
        self._insert = insert
        self._step = 0
        self._epoch = 0
        self._now_ms = self._shift_ms = 0
        # The plan that waits for room in the queue is one of those ahead.
        self._queue: Queue[Planned | _End] = Queue(maxsize=AHEAD - 1)
        self._stop, self._abandon = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.frozen_at_end: dict[str, Any] | None = None
        """Host state after the last plan, once iteration has ended."""

    def __iter__(self) -> Iterator[Planned]:
        """Yields steps; raises what reading raised, after the steps before it."""
        self._thread = threading.Thread(target=self._run, name="planner", daemon=True)
        self._thread.start()
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                self._thread.join()
                self.frozen_at_end = item.frozen
                if item.error is not None:
                    raise item.error
                return
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
        self._batches.close()

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
            frozen = self.get_state()
        except Exception as raised:  # Every error is the consumer's to see; the host's state may be half way through a plan.
            error = raised
        self._put(_End(frozen, error))

    def _plan_all(self) -> Exception | None:
        """Plans to the end. Returns the error at which the input cannot be read on: all before it is whole and can be kept."""
        while not self._stop.is_set() and not (self._max_steps and self._step >= self._max_steps):
            position = self._batches.get_state()
            try:
                batch = next(self._batches, None)
            except (ValueError, OSError) as error:
                return error
            if batch is None:
                return None
            self._dead_letters.add(batch.rejected)
            if batch.examples.num_rows:
                self._put(self._plan(batch.examples, batch.epoch, position))
        return None

    def _put(self, item: Planned | _End) -> None:
        while not self._abandon.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except Full:
                continue

    def _plan(self, examples: pa.RecordBatch, epoch: int, position: dict[str, Any]) -> Planned:
        if epoch != self._epoch:
            for memory in self._memories:
                memory.reset()
        for memory in self._memories:
            examples = memory.extend(examples)
        features = featurize(examples, self._model.layout)
        observed = observe(examples, [head.label for head in self._model.heads], self._group_column)
        features, observed = _padded(features, observed, self._batch_size)
        times_ms = self._advance_time(observed.event_time_ms[: examples.num_rows], epoch)
        times_ms = np.pad(times_ms, (0, self._batch_size - times_ms.size), mode="edge")
        plan = self._mapper.plan(features.groups, times_ms, self._now_ms, self._step, self._insert)
        inputs = Inputs(plan.groups, features.weights, features.dense, observed.labels, observed.masks)
        inputs = jax.device_put(inputs, input_shardings(self._model, inputs))
        self._step += 1
        freeze = self._freeze_every and self._step % self._freeze_every == 0
        frozen = self.get_state() if freeze else None
        return Planned(inputs, observed, examples.num_rows, epoch, plan.stats, plan.freed, position, frozen)

    def _advance_time(self, event_time_ms: np.ndarray, epoch: int) -> np.ndarray:
        """Moves the time on; returns when ids count as seen.

        The time is the highest median of a batch, never going back: a few events from the future expire nothing, and are seen
        now. A further pass over the data goes on in time where the last one ended.
        """
        median = int(np.median(event_time_ms))
        if epoch != self._epoch:
            self._shift_ms, self._epoch = self._now_ms - median, epoch
        self._now_ms = max(self._now_ms, median + self._shift_ms)
        return np.minimum(event_time_ms + self._shift_ms, self._now_ms)

    def get_state(self) -> dict[str, Any]:
        """Returns a copy of all host state: `maps` and `memories` are arrays, the rest is small and JSON-able."""
        return {
            "maps": self._mapper.get_state(),
            "memories": [memory.get_state() for memory in self._memories],
            "stream": self._batches.get_state(),
            "dead_letters": self._dead_letters.get_state(),
            "step": self._step,
            "epoch": self._epoch,
            "time": [self._now_ms, self._shift_ms],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `get_state` returned. Before iteration only."""
        assert self._thread is None, "the planner is running"
        self._mapper.set_state(state["maps"])
        for memory, of_memory in zip(self._memories, state["memories"], strict=True):
            memory.set_state(of_memory)
        self._batches.set_state(state["stream"])
        self._dead_letters.set_state(state["dead_letters"])
        self._step, self._epoch = state["step"], state["epoch"]
        self._now_ms, self._shift_ms = state["time"]


def observe(examples: pa.RecordBatch, names: Sequence[str], group_column: str) -> Observed:
    """Returns what the metrics need of examples: labels and masks of the named heads, times, users, best scores."""
    values, masks = labels(examples, names)
    columns = examples.schema.names
    if "weight" in columns:
        weight = examples.column("weight").fill_null(1.0).to_numpy(zero_copy_only=False)
        masks *= weight.astype(np.float32)[:, None]
    optimal = None
    if any(f"optimal_{name}" in columns for name in names):
        optimal = np.full(values.shape, np.nan, np.float32)
        for task, name in enumerate(names):
            if f"optimal_{name}" in columns:
                optimal[:, task] = examples.column(f"optimal_{name}").to_numpy(zero_copy_only=False)
    groups = np.zeros(examples.num_rows, np.int64)
    if group_column in columns:
        column = examples.column(group_column)
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        groups = string_ids(column) if is_text else column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return Observed(examples.column("event_time_ms").to_numpy(zero_copy_only=False), groups, values, masks, optimal)


def _padded(features: Features, observed: Observed, size: int) -> tuple[Features, Observed]:
    """Pads a short batch: no ids, masks of 0, the last event time again."""
    missing = size - observed.labels.shape[0]
    if not missing:
        return features, observed

    def pad(array: Any) -> Any:
        return None if array is None else np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])

    groups = tuple(GroupIds(pad(group.ids), pad(group.valid)) for group in features.groups)
    features = Features(groups, tuple(pad(weights) for weights in features.weights), pad(features.dense))
    times = np.concatenate([observed.event_time_ms, np.full(missing, observed.event_time_ms[-1])])
    rest = (pad(observed.groups), pad(observed.labels), pad(observed.masks), pad(observed.optimal))
    return features, Observed(times, *rest)
