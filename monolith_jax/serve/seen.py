"""What a user has seen, so that it is not shown again: a ring of 32-bit fingerprints of the last videos of each user.

In: users and the videos that were shown to them. Out: which of some candidates are new to a user. What left the ring, or was
shown to a user who was forgotten since, is new again. A video that was never shown is taken for seen with a chance of at most
`videos` / 2^32 (1,000 remembered: one in four million candidates), and is so for that user only.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from monolith_jax.ids.lines import jit, mix
from monolith_jax.serve.id_slots import IdSlots, id_slots_bytes

_S32 = np.uint64(32)
_BLOCK = 512
"""Videos that are added at a time: a request waits no longer than that."""


@dataclass(frozen=True)
class SeenConfig:
    """How much is remembered."""

    max_users: int = 100_000
    """Users that are remembered; where more are shown something, the least recently served are forgotten, and counted."""
    videos: int = 500
    """Videos that are remembered of each user. Costs 4 bytes each."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        if self.max_users < 1 or not 1 <= self.videos <= 1 << 20:
            raise ValueError(f"SeenConfig: max_users of at least 1, videos of 1 to 2^20, got {self}")


@jit
def _fingerprint(user, video):
    return np.uint32(mix(np.uint64(video) ^ mix(np.uint64(user))) >> _S32)


@jit
def _add(users, videos, slots, prints, heads, sizes):
    # In order; a video that is remembered stays where it is.
    length = prints.shape[1]
    for i in range(users.size):
        slot = slots[i]
        if slot < 0:
            continue
        mark, known = _fingerprint(users[i], videos[i]), False
        for k in range(sizes[slot]):
            known |= prints[slot, k] == mark
        if not known:
            prints[slot, heads[slot]] = mark
            heads[slot] = heads[slot] + 1 if heads[slot] + 1 < length else 0
            sizes[slot] = min(sizes[slot] + 1, length)


@jit
def _unseen(user, videos, prints, size, unseen):
    # A table that is at most half full, by the low bits of the fingerprints: places of prints + 1, 0: empty.
    room = 16
    while room < 2 * size:
        room *= 2
    mask, table = np.uint32(room - 1), np.zeros(room, np.int32)
    for k in range(size):
        at = prints[k] & mask
        while table[at]:
            at = (at + np.uint32(1)) & mask
        table[at] = k + 1
    for i in range(videos.size):
        mark = _fingerprint(user, videos[i])
        at = mark & mask
        unseen[i] = True
        while table[at]:
            if prints[table[at] - 1] == mark:
                unseen[i] = False
                break
            at = (at + np.uint32(1)) & mask


class SeenFilter:
    """What all users have seen. One caller adds at a time, any number ask."""

    def __init__(self, config: SeenConfig) -> None:
        """Remembers nothing yet."""
        self._slots = IdSlots(config.max_users)
        self._prints = np.zeros((self._slots.size, config.videos), np.uint32)
        self._heads = np.zeros(self._slots.size, np.int32)
        self._sizes = np.zeros(self._slots.size, np.int32)
        self._clock = 0
        self._lock = threading.Lock()

    def add(self, users: np.ndarray | int, videos: np.ndarray) -> None:
        """Remembers videos, in order.

        Args:
            users: int64 [B], or one user.
            videos: int64 [B], what each was shown.
        """
        users = np.broadcast_to(np.asarray(users, np.int64), videos.shape)
        for first in range(0, videos.size, _BLOCK):
            part = slice(first, first + _BLOCK)
            with self._lock:
                self._clock += 1
                mine = np.ascontiguousarray(users[part])
                slots, fresh = self._slots.take(mine, np.full(mine.size, self._clock))
                self._heads[fresh] = 0
                self._sizes[fresh] = 0
                _add(mine, videos[part], slots, self._prints, self._heads, self._sizes)

    def unseen(self, user: int, videos: np.ndarray) -> np.ndarray:
        """Returns which of `videos`, int64 [K], a user has not seen, as far as is remembered, bool [K]."""
        out = np.ones(videos.size, np.bool_)
        with self._lock:
            slot = int(self._slots.find(np.array([user], np.int64))[0])
            if slot >= 0:
                _unseen(np.int64(user), videos, self._prints[slot], self._sizes[slot], out)
        return out

    def metrics(self) -> dict[str, int]:
        """Returns how many users are remembered, and how many were forgotten."""
        return {"users": len(self._slots), "users_replaced": self._slots.replaced}


def seen_bytes(config: SeenConfig) -> int:
    """Returns the bytes of the arrays of a `SeenFilter`."""
    slots = id_slots_bytes(config.max_users)
    return slots + slots // 16 * (4 * config.videos + 8)
