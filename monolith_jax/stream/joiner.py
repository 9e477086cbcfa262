"""Joins what was shown with what followed: impressions and actions in any order to examples.

In: cuts of a stream, each a batch of impressions, a batch of actions, and a watermark (no event before it is waited for). Out:
examples: the impressions' columns, and what came within the window of each. What comes out follows from the calls alone, not
from memory, spilling or hashing.

An impression is *open* from its arrival until the watermark reaches its event time + `window_s`; then it is *closed*: emitted.
With `late_s` it is kept that much longer. Impressions are kept in buckets by classes of event time, and a `Router` tells in
which bucket the impression of an action may be, so that actions are laid beside it without a look at it; a bucket is read in
when its first row closes. Only there, and where the router names two buckets, are keys compared.

State is not saved. A new `Joiner` that is fed the cuts from `oldest_cut` on comes to the same state. For this a duplicate is
remembered as long as it would be kept were it none, and no impression of its key is taken meanwhile; an action that comes
meanwhile waits for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from monolith_jax.stream.buckets import Bucket, Buckets
from monolith_jax.stream.cut_ledger import CutLedger
from monolith_jax.stream.events import ACTIONS, OUTCOME
from monolith_jax.stream.join_input import NO_ACTIONS, action_rows, impression_rows, keys_of_actions
from monolith_jax.stream.join_kernels import ARRIVAL, BITS, TIME, VALUE
from monolith_jax.stream.open_rows import (
    OUTCOMES,
    Hit,
    Index,
    Keys,
    Piece,
    column_i64,
    grouped,
    keys_of,
    single_outcomes,
    stacked,
    with_earlier,
)
from monolith_jax.stream.router import BUCKETS, NOWHERE
from monolith_jax.stream.waiting import Waiting

CLASSES = BUCKETS // 2
"""Classes of event time in the time that an impression is kept; the other half is for events ahead of the watermark."""
COUNTS = (
    *("impressions", "actions", "examples", "late_impressions", "late_or_orphan_actions", "applied_late_actions"),
    *("unknown_actions", "duplicates", "negatives_dropped", "dropped_impressions", "spilled_bytes"),
)
"""What is counted. late_or_orphan_actions: none was open for them until the watermark reached their event time + window.
duplicates: impressions of a key that is held, event ids that the impression has had, with `at_once` kinds that it has had."""
_BEFORE_ALL = -(2**62)


@dataclass(frozen=True)
class JoinerConfig:
    """How impressions and actions are joined."""

    window_s: float = 600.0
    """An example is emitted when the watermark reaches the event time of its impression + this."""
    emit: Literal["close", "at_once"] = "close"
    """close: one example when the window closes; at_once: a negative when the impression comes, and a further example, in which
    only that outcome is not null, when the first action of a kind comes."""
    late_s: float = 0.0
    """How long after its window an impression is kept so that late actions make further examples, in which all but their
    outcome is null. It was learned as absent before, uncorrected. 0: they are only counted."""
    positive: str = ""
    """One of `ACTIONS`: an example without it is a negative, for `negative_rate`."""
    negative_rate: float = 1.0
    """Share of negatives that is kept, each with weight 1 / it; the head of `positive` corrects its log-odds instead."""
    memory_mb: float = 256.0
    """Budget of what is held in memory; what is beyond goes to disk, but for 5 bytes an impression and a waiting action."""

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field is out of range, or two do not go together.
        """
        if not 0.001 <= self.window_s <= 1e9:
            raise ValueError(f"JoinerConfig.window_s must be 0.001 to 1e9 seconds, got {self.window_s}")
        if self.emit not in ("close", "at_once"):
            raise ValueError(f"JoinerConfig.emit must be 'close' or 'at_once', got {self.emit!r}")
        if not 0 <= self.late_s <= 1e9:
            raise ValueError(f"JoinerConfig.late_s must be 0 to 1e9 seconds, got {self.late_s}")
        if not 0 < self.negative_rate <= 1:
            raise ValueError(f"JoinerConfig.negative_rate must be above 0 and at most 1, got {self.negative_rate}")
        if self.positive and self.positive not in ACTIONS:
            raise ValueError(f"JoinerConfig.positive must be one of {', '.join(ACTIONS)}, got {self.positive!r}")
        if self.negative_rate < 1 and not self.positive:
            raise ValueError("JoinerConfig.negative_rate below 1 needs `positive`: the action without which one is a negative")
        if self.emit == "at_once" and (self.negative_rate < 1 or self.late_s > 0):
            raise ValueError(
                "JoinerConfig: emit='at_once' goes with neither negative_rate below 1 nor late_s; set emit='close'"
            )
        if self.memory_mb <= 0:
            raise ValueError(f"JoinerConfig.memory_mb must be above 0, got {self.memory_mb}")


class Joiner:
    """Joins one stream. One caller at a time."""

    def __init__(self, config: JoinerConfig, folder: Path) -> None:
        """Makes an empty one.

        Args:
            config: How to join.
            folder: For what does not fit into memory. Emptied now and at `close`; nothing there is needed after a crash.
        """
        self._config = config
        self._window = round(config.window_s * 1000)
        self._hold = self._window + round(config.late_s * 1000)
        self._at_once = config.emit == "at_once"
        self._span = -(-self._hold // CLASSES)
        self._schema: pa.Schema | None = None
        self._buckets = Buckets(folder, int(config.memory_mb * 2**20))
        self._waiting = Waiting(self._window, self._span, self._buckets.spill)
        self._watermark = _BEFORE_ALL
        self._ledger = CutLedger()
        self._counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self._num_open, self._num_actions, self._spilled_before = 0, 0, 0
        self._out: list[pa.RecordBatch] = []

    @property
    def oldest_cut(self) -> int:
        """The cut from which on a new joiner must be fed to go on as this one would."""
        return self._ledger.oldest(self._watermark)

    @property
    def num_open(self) -> int:
        """Impressions whose window has not closed."""
        return self._num_open

    @property
    def counts(self) -> dict[str, int]:
        """What came, what went, and what was dropped and why, since the start. Keys are `COUNTS`."""
        return dict(self._counts)

    def set_counts(self, counts: Mapping[str, int]) -> None:
        """Takes over the counts of a run that goes on."""
        self._counts = {name: int(counts.get(name, 0)) for name in COUNTS}

    @property
    def memory_bytes(self) -> int:
        """Bytes held in memory."""
        return self._buckets.num_bytes + self._waiting.num_bytes

    def close(self) -> None:
        """Removes the folder."""
        self._buckets.spill.close()

    def join(
        self, cut: int, impressions: pa.RecordBatch | None, actions: pa.RecordBatch | None, watermark_ms: int
    ) -> pa.RecordBatch | None:
        """Takes in a cut's events, then returns the examples that are due.

        Args:
            cut: Number of the cut, larger than that of the call before.
            impressions: Columns of `IMPRESSION` and any others; taken before the actions. They may gain columns.
            actions: Columns of `ACTION`; others are ignored.
            watermark_ms: Not smaller than in the call before. Events count as late by the watermark of the call before.

        Returns:
            Examples: first those for late actions (with `at_once` all), in order of arrival, then those whose window closed, in
            order of (event time, arrival). None: there are none.

        Raises:
            ValueError: Cut or watermark goes back, or a column is missing, of another type than before, or null.
        """
        if watermark_ms < self._watermark:
            raise ValueError(f"Joiner.join: the watermark goes back from {self._watermark} to {watermark_ms} in cut {cut}")
        rows, done = None, NO_ACTIONS
        if impressions is not None and impressions.num_rows:
            rows = impression_rows(impressions, self._schema, self._example_schema(pa.schema([])).names)
        if actions is not None and actions.num_rows:
            done = action_rows(actions)
        # Nothing is refused from here on, so that a refused cut has changed nothing.
        self._ledger.begin(cut, self._watermark)
        if rows is not None:
            self._schema = rows.schema
            self._take_impressions(rows)
        if actions is not None:
            self._counts["actions"] += actions.num_rows
            self._counts["unknown_actions"] += actions.num_rows - len(done)
        if len(done):
            self._take_actions(done)
        due = [number for number in self._buckets.numbers() if self._is_due(number, watermark_ms)]
        self._read_in(due)
        for number in due:
            self._emit(number, watermark_ms)
            self._forget(number, watermark_ms)
        self._counts["late_or_orphan_actions"] += self._waiting.expire(watermark_ms)
        self._watermark = watermark_ms
        if self._schema is not None:
            self._buckets.shrink(self._waiting, self._schema)
            self._counts["spilled_bytes"] += self._buckets.spill.num_bytes - self._spilled_before
            self._spilled_before = self._buckets.spill.num_bytes
        out = [rows for rows in self._out if rows.num_rows]
        self._out = []
        if not out:
            return None
        assert self._schema is not None
        examples = stacked(out, self._example_schema(self._schema))
        self._counts["examples"] += examples.num_rows
        return examples

    def _is_due(self, number: int, watermark_ms: int) -> bool:
        """Whether rows of a class may have to be emitted or forgotten."""
        start, end = number * self._span, (self._buckets[number].last + 1) * self._span
        may_close = start + self._window <= watermark_ms and end + self._window > self._watermark
        return may_close or start + self._hold <= watermark_ms

    def _example_schema(self, schema: pa.Schema) -> pa.Schema:
        fields = [*schema, *OUTCOMES]
        if self._config.negative_rate < 1:
            fields.append(OUTCOME.field("weight"))
        return pa.schema(fields)

    def _take_impressions(self, rows: pa.RecordBatch) -> None:
        times = column_i64(rows, "event_time_ms")
        self._counts["impressions"] += times.size
        self._ledger.add(int(times.max()) + self._hold)
        late = times + self._window <= self._watermark
        if late.any():
            self._counts["late_impressions"] += int(late.sum())
            rows = rows.filter(pa.array(~late))
            times = column_i64(rows, "event_time_ms")
        keys = keys_of(column_i64(rows, "request_id"), column_i64(rows, "video_id"))
        taken = Index(keys).first == np.arange(times.size)
        pulled = self._buckets.drop_held(keys, taken, self._watermark - self._hold)
        classes = self._buckets.place(times // self._span, self._at_once)
        if not taken.all():
            self._counts["duplicates"] += int((~taken).sum())
            self._buckets.add_shadows(keys.at(~taken), times[~taken], classes[~taken])
            rows, keys, classes = rows.filter(pa.array(taken)), keys.at(taken), classes[taken]
        self._num_open += classes.size
        self._add_rows(rows, classes)
        self._buckets.insert(keys, classes)
        # Only now known to wait: they lay beside rows of other keys.
        self._waiting.add(np.concatenate([pulled, self._buckets.take_strays()]))
        self._counts["late_or_orphan_actions"] += self._waiting.expire(self._watermark)
        actions, owners = self._waiting.claim(keys)
        hits = self._lay(actions, classes[owners])
        if self._at_once:
            # Each impression, and right after it the actions that had come before.
            first = np.zeros(len(actions), np.bool_)
            for hit in hits:
                first[hit.places[hit.news == 2]] = True
            self._out.append(with_earlier(rows, actions[first], owners[first]))

    def _add_rows(self, rows: pa.RecordBatch, classes: np.ndarray) -> None:
        for number, part in grouped(classes):
            # A part of something larger would keep all of it in memory.
            alone = part.size == rows.num_rows and rows.get_total_buffer_size() < 2 * rows.nbytes
            mine = rows if alone else rows.take(pa.array(part))
            bucket = self._buckets[number]
            if bucket.has_pieces or self._at_once:
                piece = Piece.of(mine)
                piece.closed = mine.num_rows if self._at_once else 0
                bucket.add_piece(piece, rows.schema)
            else:
                bucket.add_rows(mine)

    def _take_actions(self, actions: np.ndarray) -> None:
        self._ledger.add(int(actions[:, TIME].max()) + self._window)
        actions[:, BITS] |= np.arange(self._num_actions, self._num_actions + len(actions)) << ARRIVAL
        self._num_actions += len(actions)
        keys = keys_of_actions(actions)
        classes = self._buckets.classes(keys, self._watermark - self._hold)
        self._waiting.add(actions[classes == NOWHERE])
        placed = classes != NOWHERE
        if not placed.all():
            actions, classes = actions[placed], classes[placed]
        self._emit_late(actions, self._lay(actions, classes))

    def _lay(self, actions: np.ndarray, classes: np.ndarray) -> list[Hit]:
        """Lays actions beside the rows of their classes; returns those that found rows which have been read in."""
        hits: list[Hit] = []
        for number, places in grouped(classes):
            bucket = self._buckets[number]
            mine = actions if places.size == len(actions) else actions[places]
            if bucket.is_cold:
                bucket.add_actions(mine)
                continue
            keys, found = keys_of_actions(mine), np.zeros(places.size, np.bool_)
            for piece in bucket.pieces:
                rows = piece.find(keys)
                here = np.flatnonzero(rows >= 0)
                if here.size:
                    news, repeated = piece.apply(mine[here], rows[here])
                    self._counts["duplicates"] += repeated + (int((news == 1).sum()) if self._at_once else 0)
                    hits.append(Hit(piece, places[here], rows[here], news))
                    found[here] = True
            if not found.all():
                self._turn_away(bucket, mine[~found], keys.at(~found))
        return hits

    def _turn_away(self, bucket: Bucket, actions: np.ndarray, keys: Keys) -> None:
        """Actions that have no row in the bucket: of a duplicate they are counted, others wait."""
        shadowed = bucket.shadowed(keys, self._watermark - self._hold)
        self._counts["late_or_orphan_actions"] += int(shadowed.sum())
        self._waiting.add(actions[~shadowed])

    def _emit_late(self, actions: np.ndarray, hits: list[Hit]) -> None:
        """Emits a further example for each action of a row that was emitted; with `at_once` for the first of its kind."""
        parts: list[pa.RecordBatch] = []
        places = [np.empty(0, np.int64)]
        for hit in hits:
            late = (hit.rows < hit.piece.closed) & (hit.news >= (2 if self._at_once else 1))
            if late.any():
                parts.append(hit.piece.rows.take(pa.array(hit.rows[late])))
                places.append(hit.places[late])
        if not parts:
            return
        assert self._schema is not None
        rows, at = stacked(parts, self._schema), np.concatenate(places)
        order = np.argsort(at)
        mine = actions[at[order]]
        self._counts["applied_late_actions"] += 0 if self._at_once else len(mine)
        self._out.append(self._rated(single_outcomes(rows.take(pa.array(order)), mine[:, BITS] & 255, mine[:, VALUE])))

    def _rated(self, examples: pa.RecordBatch, rates: np.ndarray | None = None) -> pa.RecordBatch:
        if self._config.negative_rate == 1:
            return examples
        rates = np.ones(examples.num_rows, np.float32) if rates is None else rates
        return examples.append_column(OUTCOME.field("weight"), pa.array(1 / rates))

    def _read_in(self, due: list[int]) -> None:
        """Makes pieces of the chunks of buckets, and applies the actions that were laid beside them."""
        left: list[np.ndarray] = []
        for number in due:
            bucket = self._buckets[number]
            if not bucket.is_cold:
                continue
            assert self._schema is not None
            piece, actions = bucket.read_in(self._schema)
            rows = piece.find(keys_of_actions(actions))
            _, repeated = piece.apply(actions, rows)
            self._counts["duplicates"] += repeated
            if (rows < 0).any():
                left.append(actions[rows < 0])
        if left:
            # The router named a bucket that did not have their keys; now they go where they belong.
            actions = np.concatenate(left)
            classes = self._buckets.exact_classes(keys_of_actions(actions), self._watermark - self._hold)
            self._waiting.add(actions[classes == NOWHERE])
            self._lay(actions[classes != NOWHERE], classes[classes != NOWHERE])

    def _emit(self, number: int, watermark_ms: int) -> None:
        """Emits the rows of a class whose window has closed."""
        parts: list[pa.RecordBatch] = []
        for piece in self._buckets[number].pieces:
            last = int(np.searchsorted(piece.times, watermark_ms - self._window, "right"))
            if self._at_once:
                self._num_open -= max(last - piece.gone, 0)
            elif last > piece.closed:
                self._num_open -= last - piece.closed
                parts.append(self._sampled(piece, piece.closed, last))
                piece.closed = last
        if len(parts) == 1:
            self._out.append(parts[0])
        elif parts:
            assert self._schema is not None
            examples = stacked(parts, self._example_schema(self._schema))
            self._out.append(examples.take(pa.array(np.argsort(column_i64(examples, "event_time_ms"), kind="stable"))))

    def _sampled(self, piece: Piece, first: int, last: int) -> pa.RecordBatch:
        examples, config = piece.examples(first, last), self._config
        if config.negative_rate == 1:
            return examples
        positive = (piece.came[first:last] >> (ACTIONS.index(config.positive) + 2)) & 1 > 0
        # Other bits of the hash than those that find a place in a table.
        chance = ((piece.keys.hashes[first:last] * np.uint64(0xD1342543DE82EF95)) >> np.uint64(11)) * 2.0**-53
        kept = positive | (chance < config.negative_rate)
        self._counts["negatives_dropped"] += int((~kept).sum())
        rates = np.where(positive, 1, config.negative_rate).astype(np.float32)
        return self._rated(examples, rates).filter(pa.array(kept))

    def _forget(self, number: int, watermark_ms: int) -> None:
        """Drops the rows of a class that are kept no longer, and the class when none is left."""
        bucket = self._buckets[number]
        for piece in bucket.pieces:
            gone = int(np.searchsorted(piece.times, watermark_ms - self._hold, "right"))
            self._buckets.remove(piece.keys.hashes[piece.gone : gone], number)
            piece.gone = max(gone, piece.gone)
        bucket.drop_gone()
        if not bucket.has_pieces and not (bucket.shadows and (bucket.last + 1) * self._span + self._hold > watermark_ms):
            self._buckets.drop(number)
