"""One partition of the stream, read: batches of examples to features and labels of a fixed number of rows.

In: an iterator of `Batch`es, and what the partition remembers (histories, counters). Out: `Part`s, a short one padded. A
partition has its own memories, dead letters and position, so its examples are the same whoever reads it. Where a two-tower is
trained, each part also has rows of drawn videos (`negatives`), which no label, metric or count knows of.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from monolith_jax.feature_columns import with_lake_columns
from monolith_jax.features import FeatureLayout, Features, featurize
from monolith_jax.ids.strings import string_ids
from monolith_jax.negatives import Drawn, NegativeSampler
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.events import labels
from monolith_jax.types import GroupIds

if TYPE_CHECKING:
    from monolith_jax.stream.batcher import Batch  # At run time it would bring grain along.


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


class Fetched(enum.Enum):
    """What a partition has for the next batch."""

    READY = enum.auto()
    """Examples."""
    IDLE = enum.auto()
    """Nothing for now: a live stream from which nothing came for a while."""
    ENDED = enum.auto()
    """Nothing any more."""


class Part(NamedTuple):
    """A partition's rows of a batch."""

    features: Features
    observed: Observed
    num_examples: int
    """The first so many rows are no padding."""
    epoch: int
    shift_ms: int
    """What is added to event times: a further pass over the data goes on in time where the last one was."""
    told: Mapping[str, float] = {}
    """What a live stream tells of itself."""
    drawn: Drawn | None = None
    """What the two-tower learns from beside the examples; None: there is no two-tower."""


class Reader:
    """Reads one partition."""

    def __init__(
        self,
        batches: Any,
        memories: Sequence[Memory],
        dead_letters: DeadLetters,
        num_rows: int,
        negatives: NegativeSampler | None = None,
    ) -> None:
        """Takes over its parts; nothing is read yet.

        Args:
            batches: Iterator of `Batch` with get_state, set_state and close; none has more rows than `num_rows`.
            memories: Histories and counters, in the order in which they extend examples.
            dead_letters: Where rejected rows go.
            num_rows: Rows of a part, to which short batches are padded.
            negatives: Draws videos for the two-tower; none: there is none that learns from this.
        """
        self._batches = batches
        self.memories = tuple(memories)
        self.dead_letters = dead_letters
        self.num_rows = num_rows
        self._negatives = negatives
        self._fetched: Batch | None = None
        self._position: dict[str, Any] = {}
        self._epoch = self._shift_ms = 0
        self._told: Mapping[str, float] = {}

    def fetch(self) -> Fetched:
        """Reads the next batch, if none waits to be taken, past those of which all was set aside.

        What was fetched does not show in the state before it is taken: an error elsewhere loses none of it.

        Raises:
            ValueError, OSError: The input cannot be read on; all before it was returned, and the position is behind that.
        """
        while self._fetched is None:
            position = self._batches.get_state()
            batch = next(self._batches, None)
            if batch is None:
                return Fetched.ENDED
            if batch.examples.num_rows or batch.is_idle:
                self._fetched, self._position = batch, position
            else:
                self.dead_letters.add(batch.rejected)
        return Fetched.IDLE if self._fetched.is_idle else Fetched.READY

    def take(self, layout: FeatureLayout, label_names: Sequence[str], group_column: str, now_ms: int = 0) -> Part:
        """Returns the part that the fetched batch makes; the memories have seen it then.

        It is empty at the stream's end, and where nothing came for a while.

        Args:
            layout: The features.
            label_names: Labels of the heads.
            group_column: Column whose values group the within-user metrics.
            now_ms: The time, at which a further pass over the data begins.

        Raises:
            ValueError: The examples do not fit the features or labels. The memories may be half way through.
        """
        batch, self._fetched = self._fetched, None
        if batch is not None:
            self.dead_letters.add(batch.rejected)
            self._told = batch.told
        if batch is None or batch.is_idle:
            # What it counted still counts when it has ended.
            drawn = self._negatives.nothing() if self._negatives else None
            return _empty_part(layout, len(label_names), self.num_rows)._replace(told=self._told, drawn=drawn)
        if is_further_pass := batch.epoch != self._epoch:
            self._epoch = batch.epoch
            for memory in self.memories:
                memory.reset()
        examples = batch.examples
        for memory in self.memories:
            examples = memory.extend(examples)
        examples = with_lake_columns(examples, layout.features)
        features = featurize(examples, layout)
        drawn = self._negatives.take(examples, features) if self._negatives else None
        observed = observe(examples, label_names, group_column)
        if is_further_pass:
            self._shift_ms = now_ms - int(np.median(observed.event_time_ms))
        features, observed = _padded(features, observed, self.num_rows)
        return Part(features, observed, examples.num_rows, batch.epoch, self._shift_ms, batch.told, drawn)

    @property
    def position(self) -> dict[str, Any]:
        """Where what is taken next starts in the stream."""
        return self._batches.get_state() if self._fetched is None else self._position

    def get_state(self) -> dict[str, Any]:
        """Returns a copy of all of the partition's state: memories and negatives are arrays, the rest small and JSON-able."""
        of_negatives = {"negatives": self._negatives.get_state()} if self._negatives else {}
        return of_negatives | {
            "memories": [memory.get_state() for memory in self.memories],
            "stream": self.position,
            "dead_letters": self.dead_letters.get_state(),
            "epoch": self._epoch,
            "shift_ms": self._shift_ms,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `get_state` returned."""
        for memory, of_memory in zip(self.memories, state["memories"], strict=True):
            memory.set_state(of_memory)
        if self._negatives:
            self._negatives.set_state(state["negatives"])
        self._batches.set_state(state["stream"])
        self._fetched = None
        self.dead_letters.set_state(state["dead_letters"])
        self._epoch, self._shift_ms = state["epoch"], state["shift_ms"]

    def close(self) -> None:
        """Ends reading ahead."""
        self._batches.close()


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


def _empty_part(layout: FeatureLayout, num_heads: int, num_rows: int) -> Part:
    """Returns the part of a partition that has ended: no ids, masks of 0."""
    groups, weights = [], []
    for index, slots in enumerate(layout.groups):
        shape = (num_rows, layout.num_positions(index))
        groups.append(GroupIds(np.zeros(shape, np.int64), np.zeros(shape, np.bool_)))
        weights.append(np.zeros(shape, np.float32) if any(slot.weighted for slot in slots) else None)
    features = Features(tuple(groups), tuple(weights), np.zeros((num_rows, layout.num_dense), np.float32))
    zeros = np.zeros(num_rows, np.int64)
    of_heads = np.zeros((num_rows, num_heads), np.float32)
    return Part(features, Observed(zeros, zeros, of_heads, of_heads, None), 0, 0, 0)


def joined(parts: Sequence[Part]) -> tuple[Features, Observed]:
    """Returns the rows of parts, one after the other."""
    if len(parts) == 1:
        return parts[0].features, parts[0].observed
    groups = tuple(
        GroupIds(np.concatenate([group.ids for group in of_parts]), np.concatenate([group.valid for group in of_parts]))
        for of_parts in zip(*(part.features.groups for part in parts), strict=True)
    )
    weights = tuple(
        None if of_parts[0] is None else np.concatenate([one for one in of_parts if one is not None])
        for of_parts in zip(*(part.features.weights for part in parts), strict=True)
    )
    features = Features(groups, weights, np.concatenate([part.features.dense for part in parts]))
    times, users, values, masks = (
        np.concatenate(arrays) for arrays in zip(*(part.observed[:4] for part in parts), strict=True)
    )
    known = [part.observed.optimal for part in parts]
    if all(one is None for one in known):
        return features, Observed(times, users, values, masks, None)
    blank = np.full_like(parts[0].observed.labels, np.nan)
    return features, Observed(times, users, values, masks, np.concatenate([blank if one is None else one for one in known]))
