"""What a user did before: the last N videos of each user, with what came of them.

In: examples in stream order, from sources that do not log histories themselves. Out: the same examples with list columns,
newest first: `history_<item>` (ids), `history_action` (bit k set: label k of `HistoryConfig.actions` was positive), and what
`HistoryConfig.columns` tell of each item. An example sees only events of strictly earlier event time. State is one ring a
user, bounded by `max_users`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.ids.footprint import map_bytes
from monolith_jax.ids.strings import string_ids
from monolith_jax.stream.events import labels, valid_mask


@dataclass(frozen=True)
class HistoryConfig:
    """Which history is kept."""

    length: int = 20
    """N, items kept of each user."""
    max_users: int = 100_000
    """Users that have a history; later ones have none, and their examples are counted. Costs length * 17 bytes each."""
    actions: tuple[str, ...] = ("like", "long_view", "complete", "skip")
    """Labels, at most 8, that make up the action bits."""
    user_column: str = "user_id"
    """Column of the user, int64 or string. Null: no history."""
    item_column: str = "video_id"
    """Column of the items, int64 or string (then the history holds the hashes). Null: not remembered."""
    columns: tuple[str, ...] = ()
    """Columns of ids that are kept of each item, so that a user is known by the authors and tags of the past, too: list columns
    `history_<column>` beside the items, null where it was. Of a list its first id. Costs length * 16 bytes a user each."""


@numba.njit(cache=True, nogil=True)
def _walk(
    users, items, remembered, actions, times, told, ring_items, ring_actions, ring_times, ring_told, heads,
    out_items, out_actions, out_told, out_lengths,
):  # fmt: skip
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
                for c in range(told.shape[1]):
                    out_told[i, at, c] = ring_told[user, place, c]
                out_lengths[i] = at + 1
        if not remembered[i]:
            continue
        place = heads[user] % length
        ring_items[user, place], ring_actions[user, place], ring_times[user, place] = items[i], actions[i], times[i]
        for c in range(told.shape[1]):
            ring_told[user, place, c] = told[i, c]
        heads[user] += 1


class History:
    """The rings of all users."""

    def __init__(self, config: HistoryConfig) -> None:
        """Makes empty rings.

        Raises:
            ValueError: More than 8 actions, or no items or users.
        """
        if len(config.actions) > 8 or config.length < 1 or config.max_users < 1:
            raise ValueError(f"HistoryConfig: at most 8 actions, length and max_users of at least 1, got {config}")
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
        self._told = np.zeros((size, self._config.length, 2 * len(self._config.columns)), np.int64)
        self._heads = np.zeros(size, np.int64)
        self._refused = np.zeros(1, np.int64)

    @property
    def num_refused(self) -> int:
        """Examples so far whose user has no history because there are `max_users` already."""
        return int(self._refused[0])

    def extend(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        """Returns examples with their histories, and remembers them.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        config, number = self._config, examples.num_rows
        values, _ = labels(examples, config.actions)
        bits = (values > 0) @ (1 << np.arange(len(config.actions)))
        times = examples.column("event_time_ms").to_numpy()
        user_ids, known = ids_of(examples, config.user_column, "HistoryConfig.user_column")
        item_ids, remembered = ids_of(examples, config.item_column, "HistoryConfig.item_column")
        users = rows_of(self._maps, user_ids, known)
        self._refused += np.count_nonzero(known & (users < 0))
        told = np.concatenate([np.zeros((number, 0), np.int64), *told_of(examples, config.columns)], axis=1)
        items = np.zeros((number, config.length), np.int64)
        of_items = np.zeros((number, config.length, told.shape[1]), np.int64)
        actions = np.zeros((number, config.length), np.uint8)
        lengths = np.zeros(number, np.int32)
        _walk(
            users, item_ids, remembered, bits.astype(np.uint8), times, told,
            self._items, self._actions, self._times, self._told, self._heads, items, actions, of_items, lengths,
        )  # fmt: skip
        there = np.arange(config.length) < lengths[:, None]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        examples = examples.append_column(
            "history_" + config.item_column, pa.ListArray.from_arrays(offsets, pa.array(items[there]))
        )
        for at, name in enumerate(config.columns):
            values = pa.array(of_items[there][:, 2 * at], mask=of_items[there][:, 2 * at + 1] == 0)
            examples = examples.append_column("history_" + name, pa.ListArray.from_arrays(offsets, values))
        return examples.append_column(
            "history_action", pa.ListArray.from_arrays(offsets, pa.array(actions[there].astype(np.int64)))
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of everything."""
        state = {f"maps.{name}": array for name, array in self._maps.get_state().items()}
        return state | {name: array.copy() for name, array in self._arrays().items()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The state is of another config or damaged.
        """
        self._maps.set_state({name[5:]: array for name, array in state.items() if name.startswith("maps.")})
        take_over(self._arrays(), state, "HistoryConfig")

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            "items": self._items,
            "actions": self._actions,
            "times": self._times,
            "heads": self._heads,
            "refused": self._refused,
        }
        return arrays | ({"told": self._told} if self._config.columns else {})


def take_over(arrays: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], config: str) -> None:
    """Copies a state into arrays.

    Raises:
        ValueError: An array is missing or of another shape; the message names `config`.
    """
    for name, array in arrays.items():
        if name not in state or state[name].shape != array.shape:
            there = state[name].shape if name in state else "nothing"
            raise ValueError(f"the state of {name!r} is {there}, expected {array.shape}; was it made with another {config}?")
    for name, array in arrays.items():
        array[:] = state[name]


def history_bytes(config: HistoryConfig) -> int:
    """Returns the bytes of the arrays of a `History`."""
    layout = MapLayout(("history." + config.user_column,), (config.max_users,), 2)
    return (
        sum(map_bytes(layout).values()) + 2 * layout.rows_per_shard * ((17 + 16 * len(config.columns)) * config.length + 8) + 8
    )


def ids_of(examples: pa.RecordBatch, column: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids in a column, int64 [B] (strings hashed, 0 where null), and where it is not null, bool [B].

    Raises:
        ValueError: The column is missing or holds no ids; the message names `field`.
    """
    if column not in examples.schema.names:
        raise ValueError(f"{field} is {column!r}, which the source does not yield; there: {', '.join(examples.schema.names)}")
    array = examples.column(column)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return string_ids(array), valid_mask(array)
    if not pa.types.is_int64(array.type):
        raise ValueError(f"{field} is {column!r}, which is {array.type}; expected int64 or string")
    return array.fill_null(0).to_numpy(), valid_mask(array)


def told_of(examples: pa.RecordBatch, columns: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids in columns, of lists the first ones: of each int64 [B, 2], the id, and 1 where there is one.

    Raises:
        ValueError: A column is missing or holds no ids.
    """
    found = []
    for name in columns:
        if name not in examples.schema.names or not pa.types.is_list(examples.column(name).type):
            ids, there = ids_of(examples, name, "HistoryConfig.columns")
        else:
            array = examples.column(name)
            values, not_null = ids_of(pa.record_batch({name: array.values}), name, "HistoryConfig.columns")
            starts, lengths = array.offsets.to_numpy()[:-1], np.where(valid_mask(array), np.diff(array.offsets.to_numpy()), 0)
            at = np.minimum(starts, max(values.size - 1, 0))
            ids = values[at] if values.size else np.zeros(len(array), np.int64)
            there = (lengths > 0) & (not_null[at] if values.size else False)
        found.append(np.stack([np.where(there, ids, 0), there], axis=1).astype(np.int64))
    return found


def rows_of(maps: IdMaps, ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns the flat row of each id in the only table of `maps`, int64 [B], -1 where unknown or the table is full.

    New ids get rows in stream order, so that who finds a place does not depend on where batches are cut.
    """
    distinct, first, inverse = np.unique(ids[known], return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = distinct.size
    shards, rows, *_ = maps.lookup_or_insert(distinct[order], 0, np.zeros(number, np.uint32))
    flat = np.empty(number, np.int64)
    flat[order] = np.where(rows >= 0, shards.astype(np.int64) * maps.layout.rows_per_shard + rows, -1)
    out = np.full(ids.size, -1, np.int64)
    out[known] = flat[inverse]
    return out
