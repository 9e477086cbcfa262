"""The seams between the stages, and the axis letters of device code.

Words (one meaning each): an *event* is an impression or an action; an *example* is an impression with all that followed it;
an *id* is a raw 64-bit identity in the name space of one table; a *row* is the position that an id owns in a table; a
*vector* is the floats at a row; a *plan* tells the device for one step which rows to gather and where they go.

Axis letters: B batch, F features, N list, P id positions of an example, D dim, R rows of a shard, W row width, L shards,
S devices, V touched rows of a device, T tasks, E experts, K candidates. `x_BD` has shape [B, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

Array = Any
"""An array of numpy on the host, of jax on the device."""

Position = Mapping[str, Any]
"""Where reading goes on: a small JSON-able mapping of a source's own making. `{}` is the start of the stream."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """One input row that was set aside."""

    where: str
    """Where it stood, as a person would look it up: `file.csv:1234` (1-based line), `ratings.parquet#77` (0-based row)."""
    reason: str
    """A short, countable class of fault: `negative duration`, `time went backwards`, `duplicate`, ..."""
    raw: str
    """The row as it was read, shortened to 500 characters."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring rows of a stream, checked: the good ones as examples, the others with their reason."""

    examples: pa.RecordBatch
    rejected: tuple[Rejected, ...]
    position: Position
    """Where reading goes on after this chunk. `read(position)` yields the same chunks that would have followed."""
    epoch: int = 0
    """Which pass over the data this is. Time starts again with each."""
    ends_batch: bool = False
    """Whether a batch ends behind this chunk, however short it is: a live stream does not keep examples waiting."""
    told: Mapping[str, float] = field(default_factory=dict)
    """What a live stream tells of itself: lag, ages. Read from the clock, so no part of the examples."""


class Source(Protocol):
    """Examples in stream order, readable from any position that it has handed out.

    A source holds no moving state: two reads from one position yield equal chunks. Chunks have at most a few thousand rows,
    so that memory stays constant however long the stream is.
    """

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from `position` to the end of the stream.

        Raises:
            ValueError: The input cannot be read at all (missing file or column, truncated archive).
        """
        ...

    @property
    def num_examples(self) -> int | None:
        """Examples from start to end where that is cheap to know, else None."""
        ...


class GroupPlan(NamedTuple):
    """What the device is told about the rows of one group for one step. All int32 but `fresh_ids`; shapes are padded."""

    touched: Array
    """[S, V] rows in each device's part of the group, distinct; padding counts up from the part's end."""
    sent: Array
    """[S owners, S slices, U] which of the touched rows an owner sends to a slice of the batch; padding is V."""
    positions: Array
    """[B, P] index into what the slice receives (owner * U + u); S U: a refused id; S U + 1: an empty position."""
    fresh_rows: Array
    """[S, F] rows in each device's part that start afresh in this step, padded like `touched`."""
    fresh_ids: Array
    """uint32 [S, F, 2] low and high half of the ids of the fresh rows."""
    fresh_tables: Array
    """[S, F] index of the table of each fresh row in its group."""
    num_sent: Array
    """[S owners, S slices] how many of `sent` are no padding; they come first."""
    touched_rows: Array = None
    """[S, V] of a group in two tiers, whose `touched` and `fresh_rows` name slots: the row in the shard that each touched slot
    holds. None where slots are rows."""


class FreedRows(NamedTuple):
    """The ids of a group whose rows this plan took from them. The next plan may give the rows to others."""

    ids: np.ndarray
    """int64 [N]"""
    tables: np.ndarray
    """int32 [N], index of each id's table in the group."""
    shards: np.ndarray
    """int32 [N]"""
    rows: np.ndarray
    """int32 [N], row in the shard's table."""


class Moves(NamedTuple):
    """The slots of a group in two tiers that a plan gives to other rows, by shard. All [N], of this process's shards."""

    shards: np.ndarray
    """int32, counted from the first of this process's."""
    slots: np.ndarray
    """int32, places in the shard's part of the device array."""
    rows: np.ndarray
    """int32, row in the shard that the slot holds from this plan on."""
    evicted: np.ndarray
    """int32, row in the shard that it held before, -1: none."""
    loaded: np.ndarray
    """bool, whether the row comes from the host; else it is fresh, and its first value is made on the device."""


class Plan(NamedTuple):
    """What the host tells the device for one step."""

    groups: tuple[GroupPlan, ...]
    freed: tuple[FreedRows, ...]
    """Of each group; not for the device."""
    stats: dict[str, float]
    """Counts of this step, as `ids.mapper` says."""
    moves: tuple[Moves | None, ...] = ()
    """Of each group, None where all of its rows are on the device; not for the device."""


class GroupIds(NamedTuple):
    """The ids of a batch that look up one group of tables."""

    ids: np.ndarray
    """int64 [B, P]"""
    valid: np.ndarray
    """bool [B, P], whether the position holds an id."""


class Retrieval(NamedTuple):
    """What the two-tower learns from in a step of B examples: each is a query, and all R rows of the step are candidates."""

    weight: Array
    """float32 [B], what the example counts as a positive; 0: it is none."""
    log_q: Array
    """float32 [R], log of how often the row's video is among the candidates of a step, in expectation; inf: no candidate."""
    key: Array
    """uint32 [R], mixed bits of the video's id: equal for equal videos."""


class Cut(NamedTuple):
    """A publication, agreed on by the planners of all processes: of the state right after a step."""

    step: int
    """Steps done."""
    kind: int
    """Bits: CUT_ROWS always; CUT_DENSE, CUT_BASE."""
    event_time_ms: int
    """The watermark."""
    position: tuple[Position, ...]
    """Where reading goes on in each partition."""


CUT_ROWS, CUT_DENSE, CUT_BASE = 1, 2, 4
"""What a publication holds: the changed rows; the dense weights; all rows, as a new base."""


class Cuts(Protocol):
    """Who asks for publications. The planner's thread calls it."""

    def wanted(self, now_ms: int) -> int:
        """Returns what a publication would hold if this process alone had its way, as bits; 0: none now.

        Args:
            now_ms: The time of the stream.
        """
        ...

    def agreed(self, kind: int, now_ms: int) -> None:
        """Is told that there will be one: the loop comes to it after the steps that are planned."""
        ...


class Exchange(Protocol):
    """What the planners of several processes tell one another. All call the same functions in the same order."""

    @property
    def process_id(self) -> int:
        """This process, from 0."""
        ...

    @property
    def num_processes(self) -> int:
        """P"""
        ...

    def gather(self, words: np.ndarray) -> np.ndarray:
        """Returns everyone's words, uint32 [P, n], from this process's [n]; n is the same everywhere."""
        ...

    def swap(self, blocks: np.ndarray) -> np.ndarray:
        """Returns what each has for this process, uint32 [P, n], from what this one has for each; n is the same everywhere."""
        ...
