"""A bounded number of ids, each with a slot: who keeps something by slot keeps it in arrays of constant size.

In: 64-bit ids and when each was used. Out: their slots. An id may stand in any of the eight slots of one bucket, which its hash
chooses; where all are taken, the id that was used least recently loses its slot. Nothing grows and nothing is hashed anew.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.ids.lines import jit, mix

WAYS = 8
"""Slots of a bucket."""
EMPTY = np.iinfo(np.int64).min
"""When a slot without an id was used."""

_S32 = np.uint64(32)


@jit
def _find(ids, slot_ids, used, slots):
    # int64 [N] ids, int64 [S] of each slot, int64 [N] out: -1 where an id has none.
    num_buckets = np.uint64(used.size // WAYS)
    for i in range(ids.size):
        first = np.int64(((mix(np.uint64(ids[i])) >> _S32) * num_buckets) >> _S32) * WAYS
        slots[i] = -1
        for slot in range(first, first + WAYS):
            if slot_ids[slot] == ids[i] and used[slot] != EMPTY:
                slots[i] = slot
                break


@jit
def _take(ids, stamps, slot_ids, used, slots, fresh):
    # As `_find`, but gives slots. fresh int64 [N] out: those that were given; returns how many, and how many were taken over.
    num_buckets = np.uint64(used.size // WAYS)
    given, replaced = 0, 0
    for i in range(ids.size):
        first = np.int64(((mix(np.uint64(ids[i])) >> _S32) * num_buckets) >> _S32) * WAYS
        found, least = np.int64(-1), first
        for slot in range(first, first + WAYS):
            if slot_ids[slot] == ids[i] and used[slot] != EMPTY:
                found = slot
                break
            if used[slot] < used[least]:
                least = slot
        stamp = max(stamps[i], EMPTY + 1)
        if found < 0:
            found = least
            replaced += used[found] != EMPTY
            fresh[given] = found
            given += 1
            slot_ids[found], used[found] = ids[i], stamp
        else:
            used[found] = max(used[found], stamp)
        slots[i] = found
    for i in range(ids.size):
        if slot_ids[slots[i]] != ids[i]:
            slots[i] = -1
    return given, replaced


class IdSlots:
    """The slots of ids. One caller at a time.

    Buckets fill unevenly: where as many ids are used as there are slots, about one in seven has none; where half as many, one
    in a hundred and fifty.
    """

    def __init__(self, number: int) -> None:
        """Makes `number` empty slots, rounded up to whole buckets.

        Raises:
            ValueError: Not one, or more than 2^34.
        """
        if not 1 <= number <= 1 << 34:
            raise ValueError(f"expected 1 to 2^34 ids to keep something of, got {number}")
        self.size = -(-number // WAYS) * WAYS
        """S."""
        self.ids = np.zeros(self.size, np.int64)
        """Of each slot; says nothing where it is empty."""
        self.used = np.full(self.size, EMPTY, np.int64)
        """When each slot was used last; `EMPTY`: it has no id."""
        self.replaced = 0
        """Ids so far that lost their slot to others."""
        self._number = 0

    def __len__(self) -> int:
        """Returns how many ids have a slot."""
        return self._number

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Returns the slot of each id of int64 [N], int64 [N], -1 where it has none."""
        slots = np.empty(ids.size, np.int64)
        _find(ids, self.ids, self.used, slots)
        return slots

    def take(self, ids: np.ndarray, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives a slot to each id that has none.

        Args:
            ids: int64 [N], may repeat.
            stamps: int64 [N], when each is used; an id keeps its largest.

        Returns:
            int64 [N]: the slot of each id; -1 where an id after it in this call has taken the slot over. int64 [M]: the slots
            that were given in this call, some perhaps twice: what is kept there is another id's, so clear it first.
        """
        slots, fresh = np.empty(ids.size, np.int64), np.empty(ids.size, np.int64)
        given, replaced = _take(ids, stamps, self.ids, self.used, slots, fresh)
        self.replaced += replaced
        self._number += given - replaced
        return slots, fresh[:given]

    def remove(self, ids: np.ndarray) -> np.ndarray:
        """Takes the slots of ids from them, and returns those, int64 [M]; ids without one are passed over."""
        slots = np.unique(self.find(ids))
        slots = slots[slots >= 0]
        self.used[slots] = EMPTY
        self._number -= slots.size
        return slots


def id_slots_bytes(number: int) -> int:
    """Returns the bytes of the arrays of `IdSlots(number)`."""
    return -(-number // WAYS) * WAYS * 16
