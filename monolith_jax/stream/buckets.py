"""All impressions that are held, in buckets by classes of event time, in memory or on disk.

In: impressions with the numbers of their classes, actions laid beside them, keys to look for. Out: what a bucket holds, read
back when it is needed; which bucket a key is in. A bucket is *cold* until its first row closes: batches as they came, and
actions that are not yet joined. Then it is read in and has pieces. Past the budget cold buckets go to disk, the largest first,
and if that is not enough those that have pieces, the oldest first, as fewest actions still come for them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from monolith_jax.stream.join_input import NO_ACTIONS, keys_of_actions
from monolith_jax.stream.open_rows import Index, Keys, Piece, column_i64, grouped, keys_of, stacked
from monolith_jax.stream.router import BUCKETS, NOWHERE, SEVERAL, Router
from monolith_jax.stream.spill import Spill
from monolith_jax.stream.waiting import Waiting

_MOST_PIECES = 8
_FEW = 4096
"""Neighbouring classes share a bucket up to so many rows: a bucket has its price, however few it holds."""
_STATE = 6
"""Columns of int64 that a piece on disk has a row, its features apart."""


class Bucket:
    """The impressions of one class of times, or of a few neighbours."""

    def __init__(self, number: int, spill: Spill) -> None:
        """Makes an empty one."""
        self.number, self.last = number, number
        """First and last of the neighbouring classes that share it."""
        self.num_placed = 0
        """Rows that were ever placed in it."""
        self._spill = spill
        self._chunks: list[pa.RecordBatch] = []
        self._actions: list[np.ndarray] = []
        self._pieces: list[Piece] = []
        self._asleep = False
        self._stored: Piece | None = None
        self._on_disk = False
        self.cold_bytes = 0
        """Bytes in memory of what was not read in."""
        self.shadows: list[tuple[Keys, np.ndarray]] = []
        """Keys and times of duplicates: dropped, but as long as one of them would be kept no other of its key is taken."""

    @property
    def is_cold(self) -> bool:
        """Whether there are rows that were not read in."""
        return bool(self._chunks) or self._on_disk

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        shadows = sum(32 * times.size for _, times in self.shadows)
        return self.cold_bytes + shadows + sum(piece.num_bytes for piece in self._pieces)

    @property
    def has_pieces(self) -> bool:
        """Whether there are rows that were read in."""
        return bool(self._pieces) or self._asleep

    @property
    def pieces(self) -> list[Piece]:
        """The rows that were read in."""
        if self._asleep:
            self._wake()
        return self._pieces

    def add_rows(self, rows: pa.RecordBatch) -> None:
        """Adds impressions as they came."""
        self._chunks.append(rows)
        self.cold_bytes += rows.nbytes

    def add_actions(self, actions: np.ndarray) -> None:
        """Lays actions, int64 [N, 6], beside the rows."""
        self._actions.append(actions)
        self.cold_bytes += actions.nbytes

    def add_piece(self, piece: Piece, schema: pa.Schema) -> None:
        """Adds rows that are read in."""
        if len(self.pieces) >= _MOST_PIECES:
            self._pieces = [Piece.merged(self._pieces, schema)]
        self._pieces.append(piece)

    def read_in(self, schema: pa.Schema) -> tuple[Piece, np.ndarray]:
        """Makes a piece of the rows; returns it and the actions that were laid beside them, int64 [N, 6]."""
        chunks = [*(self._spill.rows(self._file("rows")) if self._on_disk else ()), *self._chunks]
        piece = Piece.of(stacked(chunks, schema))
        actions = np.concatenate([NO_ACTIONS, *self._all_actions()])
        self._chunks, self._actions, self.cold_bytes = [], [], 0
        if self._on_disk:
            self._on_disk = False
            for kind in ("rows", "keys", "actions"):
                self._spill.remove(self._file(kind))
        self.add_piece(piece, schema)
        return piece, actions

    def pull(self, keys: Keys) -> np.ndarray:
        """Removes the actions of some keys from those beside rows that were not read in, and returns them; int64 [N, 6]."""
        index = Index(keys)
        return self._pull(lambda actions: index.find(actions) >= 0)

    def pull_strays(self) -> np.ndarray:
        """Removes the actions that lie beside rows of which none has their key, and returns them; int64 [N, 6]."""
        if not self._actions and not self._on_disk:
            return NO_ACTIONS
        everything = zip(*self._cold_keys(), *(keys for keys, _ in self.shadows), strict=True)
        index = Index(Keys(*(np.concatenate(arrays) for arrays in everything)))
        return self._pull(lambda actions: index.find(actions) < 0)

    def _pull(self, wanted: Callable[[Keys], np.ndarray]) -> np.ndarray:
        actions = np.concatenate([NO_ACTIONS, *self._all_actions()])
        mine = wanted(keys_of_actions(actions))
        if not mine.any():
            return NO_ACTIONS
        self.cold_bytes -= sum(one.nbytes for one in self._actions)
        self._spill.remove(self._file("actions"))
        self._actions = [actions[~mine]]
        self.cold_bytes += self._actions[0].nbytes
        return actions[mine]

    def shadowed(self, keys: Keys, after_ms: int) -> np.ndarray:
        """Returns which keys have a duplicate whose time is later than `after_ms`; bool [N]."""
        found = np.zeros(keys.hashes.size, np.bool_)
        for shadow, times in self.shadows:
            live = shadow.at(times > after_ms)
            if live.hashes.size:
                found |= Index(live).find(keys) >= 0
        return found

    def has_row(self, keys: Keys) -> np.ndarray:
        """Returns which keys have a row that is not forgotten; bool [N]."""
        found, index = np.zeros(keys.hashes.size, np.bool_), None
        for piece in self.pieces:
            found |= piece.find(keys) >= 0
        for chunk in self._cold_keys():
            index = index or Index(keys)
            asked = index.find(chunk)
            found[asked[asked >= 0]] = True
        return found[index.first] if index else found

    def all_keys(self) -> list[Keys]:
        """Returns the keys of everything that the router knows of this bucket."""
        if self._asleep:
            keys, _, _, (_, gone) = self._state()
            pieces = [keys.at(slice(gone, None))]
        else:
            pieces = [piece.keys.at(slice(piece.gone, None)) for piece in self._pieces]
        return [*self._cold_keys(), *pieces, *(keys for keys, _ in self.shadows)]

    def drop_gone(self) -> None:
        """Drops the pieces all of whose rows are forgotten."""
        self._pieces = [piece for piece in self.pieces if piece.gone < piece.times.size]

    def spill_cold(self) -> None:
        """Moves what was not read in to disk."""
        if self._chunks:
            rows = stacked(self._chunks, self._chunks[-1].schema)
            self._spill.append_rows(self._file("rows"), [rows])
            self._spill.append(self._file("keys"), [_pairs(rows)])
        self._spill.append(self._file("actions"), self._actions)
        self._on_disk |= bool(self._chunks)
        self._chunks, self._actions, self.cold_bytes = [], [], 0

    def sleep(self, schema: pa.Schema) -> None:
        """Moves what was read in to disk."""
        if not self._pieces:
            return
        if len(self._pieces) > 1:
            self._pieces = [Piece.merged(self._pieces, schema)]
        piece = self._pieces[0]
        if piece is not self._stored:
            # Read before the file goes: they may stand in it.
            rows = piece.rows
            self._spill.remove(self._file("features"))
            self._spill.append_rows(self._file("features"), [rows])
        rows, ids = piece.seen()
        head = np.array([piece.times.size, ids.size, piece.closed, piece.gone])
        keys = (piece.keys.requests, piece.keys.videos)
        columns = (*keys, piece.times, piece.play, piece.dwell, piece.came.astype(np.int64))
        self._spill.replace(self._file("state"), [head, *columns, rows.astype(np.int64), ids])
        self._pieces, self._asleep, self._stored = [], True, None

    def remove(self) -> None:
        """Removes the files."""
        if self._spill.num_bytes:
            for kind in ("rows", "keys", "actions", "features", "state"):
                self._spill.remove(self._file(kind))

    def _file(self, kind: str) -> str:
        return f"{self.number}.{kind}"

    def _all_actions(self) -> list[np.ndarray]:
        stored = self._spill.array(self._file("actions")).reshape(-1, 6) if self._on_disk else NO_ACTIONS
        return [stored, *self._actions] if stored.size else self._actions

    def _cold_keys(self) -> Iterator[Keys]:
        if self._on_disk:
            pairs = self._spill.array(self._file("keys")).reshape(-1, 2)
            yield keys_of(np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]))
        for rows in self._chunks:
            yield keys_of(column_i64(rows, "request_id"), column_i64(rows, "video_id"))

    def _state(self) -> tuple[Keys, np.ndarray, np.ndarray, tuple[int, int]]:
        state = self._spill.array(self._file("state"))
        size, closed, gone = int(state[0]), int(state[2]), int(state[3])
        columns = state[4 : 4 + _STATE * size].reshape(_STATE, size)
        return keys_of(columns[0], columns[1]), columns[2:], state[4 + _STATE * size :].reshape(2, -1), (closed, gone)

    def _wake(self) -> None:
        keys, (times, play, dwell, came), (rows, ids), (closed, gone) = self._state()
        piece = Piece(keys, times, partial(_first_batch, self._spill, self._file("features")))
        piece.play, piece.dwell, piece.came = play, dwell, came.astype(np.uint16)
        piece.closed, piece.gone = closed, gone
        piece.see(rows, ids)
        self._asleep, self._stored = False, piece
        self._pieces = [piece, *self._pieces]


def _first_batch(spill: Spill, name: str) -> pa.RecordBatch:
    return spill.rows(name)[0]


def _pairs(rows: pa.RecordBatch) -> np.ndarray:
    return np.stack([column_i64(rows, "request_id"), column_i64(rows, "video_id")], axis=1)


class Buckets:
    """The buckets and the router that knows which keys are in them."""

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        """Makes none yet. The folder is emptied."""
        self.spill = Spill(folder)
        self._budget = budget_bytes
        self._buckets: dict[int, Bucket] = {}
        self._slots: dict[int, int] = {}
        self._last_slot = -1
        self._classes_of: dict[int, list[int]] = {}
        self.router = Router()
        self._strays: list[np.ndarray] = []

    def __getitem__(self, number: int) -> Bucket:
        """Returns the bucket of a class, a new one if there was none."""
        if number not in self._buckets:
            self._buckets[number] = Bucket(number, self.spill)
            turns = (slot % BUCKETS for slot in range(self._last_slot + 1, self._last_slot + 1 + BUCKETS))
            self._last_slot = next((slot for slot in turns if slot not in self._classes_of), (self._last_slot + 1) % BUCKETS)
            self._slots[number] = self._last_slot
            self._classes_of.setdefault(self._last_slot, []).append(number)
        return self._buckets[number]

    def place(self, classes: np.ndarray, hot: bool) -> np.ndarray:
        """Returns the bucket of each class, int64 [N]; neighbours share one while it has few rows.

        Args:
            classes: int64 [N], of rows that are about to be added.
            hot: Whether a bucket that was read in may take further classes.
        """
        found, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
        numbers, placed = self.numbers(), np.empty(found.size, np.int64)
        for index, (one, count) in enumerate(zip(found.tolist(), counts.tolist(), strict=True)):
            below = bisect.bisect_right(numbers, one) - 1
            bucket = self._buckets[numbers[below]] if below >= 0 else None
            if bucket is None or (one > bucket.last and (bucket.num_placed + count > _FEW or (bucket.has_pieces and not hot))):
                numbers.insert(below + 1, one)
                bucket = self[one]
            bucket.last = max(bucket.last, one)
            bucket.num_placed += count
            placed[index] = bucket.number
        return placed[inverse]

    def _slots_of(self, numbers: np.ndarray) -> np.ndarray:
        found, inverse = np.unique(numbers, return_inverse=True)
        return np.array([self._slots[one] for one in found.tolist()], np.int32)[inverse]

    def numbers(self) -> list[int]:
        """Returns the classes that have a bucket, ascending."""
        return sorted(self._buckets)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self.router.num_bytes + sum(bucket.num_bytes for bucket in self._buckets.values())

    def insert(self, keys: Keys, classes: np.ndarray) -> None:
        """Tells the router of keys; they are in their buckets already."""
        if classes.size:
            self.router.insert(keys.hashes, self._slots_of(classes), self._everything)

    def take_strays(self) -> np.ndarray:
        """Returns actions, int64 [N, 6], that lay beside rows of other keys until the router grew."""
        strays, self._strays = self._strays, []
        return np.concatenate([NO_ACTIONS, *strays])

    def remove(self, hashes: np.ndarray, number: int) -> None:
        """Tells the router that keys of a class are gone."""
        self.router.remove(hashes, np.full(hashes.size, self._slots[number], np.int32))

    def drop(self, number: int) -> None:
        """Drops a bucket that holds no rows."""
        bucket = self._buckets.pop(number)
        for keys, _ in bucket.shadows:
            self.remove(keys.hashes, number)
        bucket.remove()
        slot = self._slots.pop(number)
        self._classes_of[slot].remove(number)
        if not self._classes_of[slot]:
            del self._classes_of[slot]

    def classes(self, keys: Keys, after_ms: int) -> np.ndarray:
        """Returns the class of the row of each key, int64 [N], or NOWHERE.

        Where the router names one bucket, it is believed: the bucket need not have the key. Where it names several, keys are
        compared. A duplicate later than `after_ms` counts when there is no row.
        """
        only = np.full(BUCKETS + 2, SEVERAL, np.int64)
        only[NOWHERE] = NOWHERE
        for slot, numbers in self._classes_of.items():
            only[slot] = numbers[0] if len(numbers) == 1 else SEVERAL
        classes = only[self.router.route(keys.hashes)]
        several = np.flatnonzero(classes == SEVERAL)
        if several.size:
            classes[several] = self.exact_classes(keys.at(several), after_ms)
        return classes

    def exact_classes(self, keys: Keys, after_ms: int) -> np.ndarray:
        """Returns what `classes` does, and believes nothing."""
        classes = np.full(keys.hashes.size, NOWHERE, np.int64)
        shadows = classes.copy()
        for bucket, places in self.candidates(keys):
            asked = keys.at(places)
            classes[places[bucket.has_row(asked)]] = bucket.number
            shadows[places[bucket.shadowed(asked, after_ms)]] = bucket.number
        return np.where(classes == NOWHERE, shadows, classes)

    def drop_held(self, keys: Keys, taken: np.ndarray, after_ms: int) -> np.ndarray:
        """Clears `taken`, bool [N], where a key is held already, be it by a duplicate later than `after_ms`.

        Returns:
            int64 [M, 6], actions of the other keys that lay beside rows of other keys, and do no more.
        """
        suspects = np.flatnonzero(taken & (self.router.route(keys.hashes) != NOWHERE))
        pulled = [NO_ACTIONS]
        for bucket, which in self.candidates(keys.at(suspects)):
            places = suspects[which]
            asked = keys.at(places)
            held = bucket.has_row(asked) | bucket.shadowed(asked, after_ms)
            taken[places[held]] = False
            if not held.all():
                pulled.append(bucket.pull(asked.at(~held)))
        return np.concatenate(pulled)

    def add_shadows(self, keys: Keys, times: np.ndarray, classes: np.ndarray) -> None:
        """Remembers duplicates."""
        for number, places in grouped(classes):
            self[number].shadows.append((keys.at(places), times[places]))
        self.insert(keys, classes)

    def candidates(self, keys: Keys) -> Iterator[tuple[Bucket, np.ndarray]]:
        """Yields each bucket that may have some of the keys, with the places of those keys."""
        which, slots = self.router.candidates(keys.hashes)
        for slot in np.unique(slots):
            for number in self._classes_of.get(int(slot), ()):
                yield self._buckets[number], which[slots == slot]

    def shrink(self, waiting: Waiting, schema: pa.Schema) -> None:
        """Moves buckets, then waiting actions, to disk if more than the budget is held."""
        held = self.num_bytes + waiting.num_bytes
        if held <= self._budget:
            return
        # Some more than needed, so that not every call has to; the largest first, which takes the fewest files.
        target = self._budget - self._budget // 8
        for bucket in sorted(self._buckets.values(), key=lambda bucket: bucket.cold_bytes, reverse=True):
            if held <= target or not bucket.cold_bytes:
                break
            held -= bucket.cold_bytes
            bucket.spill_cold()
        if held > target:
            held -= waiting.part_bytes
            waiting.spill()
        for number in self.numbers():
            bucket = self._buckets[number]
            if held > self._budget and bucket.num_bytes:
                held -= bucket.num_bytes
                bucket.sleep(schema)
                held += bucket.num_bytes

    def _everything(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number, bucket in self._buckets.items():
            # The impression of a stray would not be taken for these rows any more, and not look for it here.
            self._strays.append(bucket.pull_strays())
            for keys in bucket.all_keys():
                yield keys.hashes, np.full(keys.hashes.size, self._slots[number], np.int32)
