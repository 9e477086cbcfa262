"""The last versions of each row of features: what was known of a user or of a video just before a moment.

In: changes (`FeatureState.apply`), in whatever order they come. Out: the features of ids as of times. A version with time e is
seen at t where e < t, strictly, as histories are; of equal times the later-written one counts. A group that goes stale
(`ColumnGroup.fresh_ms`) is seen while t <= e + fresh_ms; where it is stale, or nothing was ever told of it, its numbers are 0,
as a window in which nothing happens tells nothing. Of any other group that is not there, all is null. Times of groups are null
wherever no version counts.

State is bounded: `max_rows` ids (those of which nothing came for long make room), of each group `versions` versions. Where the
version that was seen then has been pushed out by newer ones, all of the group is null, and the read is counted as too old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.ids.footprint import map_bytes
from monolith_jax.lake import version_kernels
from monolith_jax.lake.rows import Encoded, FeatureRows, Seen
from monolith_jax.lake.tables import Subject
from monolith_jax.stream.history import take_over

COUNTED = ("written", "ignored", "refused", "evicted", "without_id", "reads", "too_old")
"""What is counted: versions that were taken, versions that came so late that no room is left for them, versions of ids for
which no room was found, ids that made room, rows without an id, groups that were read, and those of them that were too old."""
_READS, _TOO_OLD = COUNTED.index("reads"), COUNTED.index("too_old")
_WINDOW = 8
"""Rows that are looked at for each that must make room: the one of which nothing came for longest goes."""


class FeatureState:
    """The rows of one subject. Not thread safe, but that `encode` and `decode` may run beside `write` and `gather`."""

    def __init__(self, subject: Subject, max_rows: int, versions: int = 1) -> None:
        """Knows nothing yet.

        Args:
            subject: Whose features.
            max_rows: Ids that are kept.
            versions: V, of each group. 1 where reads go forward with the changes; else as many as may come between the time
                that is asked for and the newest change.

        Raises:
            ValueError: There is no room for a row or a version.
        """
        if max_rows < 1 or versions < 1:
            raise ValueError(f"FeatureState: max_rows and versions must be at least 1, got {max_rows} and {versions}")
        self.subject: Subject = subject
        self.max_rows, self.versions = max_rows, versions
        self._layout = _layout(subject, max_rows)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.rows = FeatureRows(self.subject)
        size = 2 * self._layout.rows_per_shard
        self._maps = IdMaps(self._layout)
        self._of_row = version_kernels.layout_of(self.rows, self.versions)
        self._table = np.zeros((size, self._of_row.starts[-1]), np.int64)
        """Bytes of `version_kernels`."""
        self._ids, self._latest_ms = np.zeros(size, np.int64), np.zeros(size, np.int64)
        """Of each row: whose it is, and the latest time of its changes."""
        self._used = np.zeros(size, np.bool_)
        self._hand = np.zeros(1, np.int64)
        """The row at which the search for room goes on."""
        self._told = np.zeros(len(COUNTED), np.int64)

    def __len__(self) -> int:
        """Returns how many ids there are."""
        return int(self._maps.num_rows[0])

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of `as_of`."""
        return self.rows.columns

    def apply(self, batch: pa.RecordBatch) -> None:
        """Takes changes in.

        Args:
            batch: Rows of the features table or of its log: the key, and of the groups that are set the time and all columns.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        self.write(self.rows.encode(batch))

    def write(self, changes: Encoded) -> None:
        """Takes changes in that `rows.encode` returned."""
        self._told[COUNTED.index("without_id")] += changes.without_id
        # In pieces of which each finds room: else those that come last would find none, of however many at once.
        for first in range(0, changes.entry_rows.size, self.max_rows):
            piece = slice(first, first + self.max_rows)
            entries = changes.entry_rows[piece], changes.entry_groups[piece]
            rows = self._rows_for(changes, *entries)
            version_kernels.write(self._table, self._of_row, rows, *entries, changes.times_ms, changes.words, self._told)

    def as_of(self, ids: np.ndarray, times_ms: np.ndarray, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Returns what was known of ids just before times.

        Args:
            ids: int64 [N].
            times_ms: int64 [N].
            columns: Some of `columns`; None: all. `<subject>_<column>`, each group's time, and `<subject>_known`.

        Raises:
            ValueError: There is no such column.
        """
        return self.rows.decode(self.gather(ids, times_ms, None, columns), columns)

    def gather(
        self,
        ids: np.ndarray,
        times_ms: np.ndarray,
        valid: np.ndarray | None = None,
        columns: Sequence[str] | None = None,
    ) -> Seen:
        """Returns what `rows.decode` makes columns of.

        Args:
            ids: int64 [N].
            times_ms: int64 [N].
            valid: bool [N], which rows have an id; None: all.
            columns: Which are wanted of `columns`; None: all.
        """
        seen, wanted = self._nothing(ids.size), self.rows.groups_of(columns)
        rows = self._lookup(ids, valid)
        self._told[_TOO_OLD] += version_kernels.read(self._table, self._of_row, wanted, rows, times_ms, *seen)
        self._told[_READS] += ids.size * int(np.count_nonzero(wanted))
        return seen

    def walk(
        self, ids: np.ndarray, times_ms: np.ndarray, changes: Encoded, valid: np.ndarray | None = None
    ) -> tuple[Seen, int]:
        """Takes changes in on the way through examples: each sees exactly the changes before it, however few versions are held.

        Args:
            ids: int64 [N], of the examples.
            times_ms: int64 [N], theirs, in any order.
            changes: Their entries in the order of time.
            valid: bool [N], which examples have an id; None: all.

        Returns:
            What the examples saw, and how many entries were taken in: those before the last example.
        """
        of_entries = changes.times_ms[changes.entry_rows, changes.entry_groups]
        assert (np.diff(of_entries) >= 0).all(), "changes in the order of time"
        number = int(np.searchsorted(of_entries, times_ms.max())) if times_ms.size else 0
        seen, order = self._nothing(ids.size), np.argsort(times_ms, kind="stable")
        in_order, begin = times_ms[order], 0
        for first in range(0, max(number, 1), self.max_rows):  # As `write` does.
            last = min(first + self.max_rows, number)
            end = int(np.searchsorted(in_order, of_entries[last], "right")) if last < number else order.size
            entries = changes.entry_rows[first:last], changes.entry_groups[first:last]
            changed = self._rows_for(changes, *entries)
            of_changes = *entries, changes.times_ms, changes.words
            rows, which = self._lookup(ids, valid), order[begin:end]
            version_kernels.walk(self._table, self._of_row, rows, times_ms, which, changed, *of_changes, *seen, self._told)
            # What no example of this piece was behind comes before those of the next.
            left = first + int(np.searchsorted(of_entries[first:last], in_order[end - 1])) if end > begin else first
            entries = changes.entry_rows[left:last], changes.entry_groups[left:last]
            of_changes = *entries, changes.times_ms, changes.words
            version_kernels.write(self._table, self._of_row, changed, *of_changes, self._told)
            begin = end
        return seen, number

    def _nothing(self, number: int) -> Seen:
        groups = len(self.rows.groups)
        return Seen(
            np.empty(number, np.bool_),
            np.empty((number, groups), np.bool_),
            np.empty((number, groups), np.int64),
            np.empty((self.rows.num_words, number), np.int64),
        )

    def _lookup(self, ids: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        shards, rows = self._maps.lookup(ids, 0)
        there = rows >= 0 if valid is None else valid & (rows >= 0)
        return np.where(there, shards.astype(np.int64) * self._layout.rows_per_shard + rows, -1)

    def _rows_for(self, changes: Encoded, entry_rows: np.ndarray, entry_groups: np.ndarray) -> np.ndarray:
        """Returns the row of each change that has entries among these, int64 [N], made where there is none; -1: no room."""
        out = np.full(changes.ids.size, -1, np.int64)
        if not entry_rows.size:
            return out
        # In stream order, so that who finds a place does not depend on where batches are cut.
        distinct, first, inverse = np.unique(changes.ids[entry_rows], return_index=True, return_inverse=True)
        order = np.argsort(first)
        wanted = distinct[order]
        flat = np.full(distinct.size, -1, np.int64)
        flat[order] = self._lookup(wanted)
        new = order[flat[order] < 0]
        self._make_room(len(self) + new.size - self.max_rows, flat[flat >= 0])
        shards, rows, *_ = self._maps.lookup_or_insert(distinct[new], 0, np.zeros(new.size, np.uint32))
        flat[new] = np.where(rows >= 0, shards.astype(np.int64) * self._layout.rows_per_shard + rows, -1)
        made = new[flat[new] >= 0]
        self._used[flat[made]], self._ids[flat[made]] = True, distinct[made]
        self._latest_ms[flat[made]] = np.iinfo(np.int64).min
        version_kernels.clear(self._table, self._of_row, flat[made])
        of_entries = flat[inverse]
        fine = of_entries >= 0
        np.maximum.at(self._latest_ms, of_entries[fine], changes.times_ms[entry_rows, entry_groups][fine])
        out[entry_rows] = of_entries
        return out

    def _make_room(self, missing: int, spared: np.ndarray) -> None:
        """Forgets so many ids, none of the rows of `spared`: of every few the one of which nothing came for longest."""
        while missing > 0:
            window = (self._hand[0] + np.arange(min(max(_WINDOW * missing, 64), self._used.size))) % self._used.size
            self._hand[0] = (self._hand[0] + window.size) % self._used.size
            window = window[self._used[window]]
            window = window[~np.isin(window, spared)]
            leaving = window[np.argsort(self._latest_ms[window], kind="stable")[:missing]]
            self._maps.erase(self._ids[leaving], 0)
            self._used[leaving] = False
            self._told[COUNTED.index("evicted")] += leaving.size
            missing -= leaving.size

    def metrics(self) -> dict[str, int]:
        """Returns how many rows there are, and what `COUNTED` says."""
        told = dict(zip(COUNTED, self._told.tolist(), strict=True))
        return {"rows": len(self), **told, "texts_refused": self.rows.texts_refused}

    def _arrays(self) -> dict[str, np.ndarray]:
        of_rows = {"ids": self._ids, "latest_ms": self._latest_ms, "used": self._used, "hand": self._hand, "told": self._told}
        return {"table": self._table, **of_rows}

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of everything."""
        state = {f"maps.{name}": array for name, array in self._maps.get_state().items()}
        state |= {f"texts.{name}": array for name, array in self.rows.get_state().items()}
        return state | {name: array.copy() for name, array in self._arrays().items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The state is of another subject or size, or damaged.
        """
        parts = {
            prefix: {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            for prefix in ("maps.", "texts.")
        }
        self._maps.set_state(parts["maps."])
        take_over(self._arrays(), state, "FeatureState")
        self.rows.set_state(parts["texts."])


def _layout(subject: Subject, max_rows: int) -> MapLayout:
    return MapLayout((f"features.{subject}",), (max_rows,), 2)


def state_bytes(subject: Subject, max_rows: int, versions: int = 1) -> int:
    """Returns the bytes of the arrays of a full `FeatureState`, but for its texts."""
    layout, rows = _layout(subject, max_rows), FeatureRows(subject)
    of_row = 8 * int(version_kernels.layout_of(rows, versions).starts[-1]) + 17
    return sum(map_bytes(layout).values()) + 2 * layout.rows_per_shard * of_row
