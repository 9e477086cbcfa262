"""Actions whose impression has not come.

In: rows of actions, and the keys of impressions that come. Out: the actions that these have been waited for by, in order of
arrival. They are held in memory: 48 bytes each, until the watermark reaches their event time + window.
"""

from __future__ import annotations

import numpy as np

from monolith_jax.stream.join_input import NO_ACTIONS, keys_of_actions
from monolith_jax.stream.join_kernels import ARRIVAL, BITS, TIME
from monolith_jax.stream.open_rows import Index, Keys


class Waiting:
    """The actions that wait."""

    def __init__(self, window_ms: int) -> None:
        """Holds none. An action waits until the watermark reaches its event time + `window_ms`."""
        self._window = window_ms
        self._actions = NO_ACTIONS

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self._actions.nbytes

    def add(self, actions: np.ndarray) -> None:
        """Adds rows of actions, int64 [N, 6]."""
        if len(actions):
            self._actions = np.concatenate([self._actions, actions])

    def claim(self, keys: Keys) -> tuple[np.ndarray, np.ndarray]:
        """Returns the actions of distinct keys, int64 [M, 6], which wait no more, and which key each has, int32 [M]."""
        if not len(self._actions):
            return NO_ACTIONS, np.empty(0, np.int32)
        owners = Index(keys).find(keys_of_actions(self._actions))
        claimed = owners >= 0
        if not claimed.any():
            return NO_ACTIONS, np.empty(0, np.int32)
        actions, owners, self._actions = self._actions[claimed], owners[claimed], self._actions[~claimed]
        # Some came here late, because the router had taken them for others.
        order = np.argsort(actions[:, BITS] >> ARRIVAL)
        return actions[order], owners[order]

    def expire(self, watermark_ms: int) -> int:
        """Drops the actions that are not to wait longer; returns how many."""
        expired = self._actions[:, TIME] + self._window <= watermark_ms
        number = int(np.count_nonzero(expired))
        if number:
            self._actions = self._actions[~expired]
        return number
