"""What a user did before: the last N videos of each user, with what came of them.

In: examples in stream order, from sources that do not log histories themselves. Out: the same examples with two list columns,
newest first: `history_<item>` (ids) and `history_action` (bit k set: label k of `HistoryConfig.actions` was positive). An
example sees only events of strictly earlier event time. State is one ring a user, bounded by `max_users`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.stream.events import labels


@dataclass(frozen=True)
class HistoryConfig:
    """Which history is kept."""

    length: int = 20
    """N, items kept of each user."""
    max_users: int = 100_000
    """Users that have a history; later ones have none, and are counted. Costs length * 17 bytes each."""
    actions: tuple[str, ...] = ("like", "long_view", "complete", "skip")
    """Labels, at most 8, that make up the action bits."""
    user_column: str = "user_id"
    """Column of the user, int64."""
    item_column: str = "video_id"
    """Column of the items, int64."""


@numba.njit(cache=True, nogil=True)
def _walk(users, items, actions, times, ring_items, ring_actions, ring_times, heads, out_items, out_actions, out_lengths):
    # In stream order: each example reads its user's ring, then adds itself.
    length = ring_items.shape[1]
    for i in range(users.size):
        user = users[i]
        out_lengths[i] = 0
        if user < 0:
            continue
        for k in range(length):
            place = (heads[user] - 1 - k) % length
            if k >= heads[user] or k >= length:
                break
            if ring_times[user, place] < times[i]:
                at = out_lengths[i]
                out_items[i, at], out_actions[i, at] = ring_items[user, place], ring_actions[user, place]
                out_lengths[i] = at + 1
        place = heads[user] % length
        ring_items[user, place], ring_actions[user, place], ring_times[user, place] = items[i], actions[i], times[i]
        heads[user] += 1


class History:
    """The rings of all users."""

    def __init__(self, config: HistoryConfig) -> None:
        """Makes empty rings.

        Raises:
            ValueError: More than 8 actions, or a length below 1.
        """
        if len(config.actions) > 8 or config.length < 1:
            raise ValueError(f"HistoryConfig: at most 8 actions and a length of at least 1, got {config}")
        self._config = config
        self._layout = MapLayout(("history." + config.user_column,), (config.max_users,), 2)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        size = 2 * self._layout.rows_per_shard
        self._maps = IdMaps(self._layout)
        self._items = np.zeros((size, self._config.length), np.int64)
        self._actions = np.zeros((size, self._config.length), np.uint8)
        self._times = np.zeros((size, self._config.length), np.int64)
        self._heads = np.zeros(size, np.int64)

    def extend(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        """Returns examples with their histories, and remembers them."""
        config, number = self._config, examples.num_rows
        values, _ = labels(examples, config.actions)
        bits = (values > 0) @ (1 << np.arange(len(config.actions)))
        times = examples.column("event_time_ms").to_numpy()
        users = rows_of(self._maps, examples.column(config.user_column).to_numpy(), times)
        items = np.zeros((number, config.length), np.int64)
        actions = np.zeros((number, config.length), np.uint8)
        lengths = np.zeros(number, np.int32)
        _walk(
            users, examples.column(config.item_column).to_numpy(), bits.astype(np.uint8), times,
            self._items, self._actions, self._times, self._heads, items, actions, lengths,
        )  # fmt: skip
        there = np.arange(config.length) < lengths[:, None]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        examples = examples.append_column(
            "history_" + config.item_column, pa.ListArray.from_arrays(offsets, pa.array(items[there]))
        )
        return examples.append_column(
            "history_action", pa.ListArray.from_arrays(offsets, pa.array(actions[there].astype(np.int64)))
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of everything."""
        state = {f"maps.{name}": array for name, array in self._maps.get_state().items()}
        rings = {"items": self._items, "actions": self._actions, "times": self._times, "heads": self._heads}
        return state | {name: array.copy() for name, array in rings.items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned."""
        self._maps.set_state({name[5:]: array for name, array in state.items() if name.startswith("maps.")})
        for mine, name in ((self._items, "items"), (self._actions, "actions"), (self._times, "times"), (self._heads, "heads")):
            mine[:] = state[name]


def rows_of(maps: IdMaps, ids: np.ndarray, times_ms: np.ndarray) -> np.ndarray:
    """Returns the flat row of each id in the only table of `maps`, int64, -1 where the table is full; new ids get one."""
    distinct, inverse = np.unique(ids, return_inverse=True)
    keys = distinct.view(np.uint64)
    seen_s = np.full(keys.size, int(times_ms.max()) // 1000 if times_ms.size else 0, np.uint32)
    shards, rows, *_ = maps.lookup_or_insert(keys, maps.hashes_of(keys, 0), np.zeros(keys.size, np.int32), seen_s)
    flat = np.where(rows >= 0, shards.astype(np.int64) * maps.layout.rows_per_shard + rows, -1)
    return flat[inverse]
