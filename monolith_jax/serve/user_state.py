"""What each user did just now: the features that a request's history has, changed by the action before it.

In: actions as they come, or examples of a source. Out: the last videos of a user with what came of each, newest first, as
`stream.history` gives them to examples: same bits, only what is strictly earlier; and the authors that the user has followed.
Memory is bounded: the least recently active of more users is forgotten. Nothing is saved: after a restart the state is rebuilt
from the log (`events`), and as a user's events are read in the log's order both times, it is the one before.

The first action on a video makes it the newest of its user; further ones add to its bits and move nothing. A video that was
shown and had no action, not even a play, is not in the history, whereas an example always is: an entry of its own each time, as
in `stream.history`.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.serve.id_slots import EMPTY, IdSlots, id_slots_bytes
from monolith_jax.serve.recent import RecentItems, recent_bytes
from monolith_jax.stream.decoder import TIMED_ACTIONS
from monolith_jax.stream.events import ACTIONS, DERIVED_LABELS, labels, valid_mask
from monolith_jax.stream.history import ids_of

HISTORY_COLUMNS = ("history_video_id", "history_action")
"""As `HistoryConfig` with its defaults names them."""

Lookup = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Of video ids, int64 [N]: a value of each, [N], and whether it is known, bool [N]."""

_NAMES = pa.array([*ACTIONS, *TIMED_ACTIONS])
_TIMES = dict(zip(TIMED_ACTIONS, ("play_time_ms", "dwell_ms"), strict=True))
_LABELS = (*ACTIONS, *DERIVED_LABELS, *_TIMES.values())
_NEEDED = ("user_id", "video_id", "action", "value", "event_time_ms")
_MOST_MS = np.iinfo(np.int32).max
_BLOCK = 512
"""Events that are added at a time: a request waits no longer than that."""


@dataclass(frozen=True)
class UserStateConfig:
    """What is kept of each user."""

    length: int = 20
    """N, videos in the history; as `HistoryConfig.length`."""
    max_users: int = 100_000
    """Users that are kept; where more are active, the least recently active are forgotten, and counted. As these are kept in
    buckets, twice as many as are expected lose one in a hundred and fifty, exactly as many one in seven."""
    actions: tuple[str, ...] = ("like", "long_view", "complete", "skip")
    """Labels, at most 8, that make up the action bits; as `HistoryConfig.actions`."""
    positive: str = ""
    """One of the actions, whose videos come in lists of their own; as `HistoryConfig.positive`."""
    followed: int = 50
    """Authors that are kept of those a user has followed; 0: none."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        if self.length < 1 or self.max_users < 1 or self.followed < 0:
            raise ValueError(f"UserStateConfig: length and max_users of at least 1, followed of at least 0, got {self}")
        if len(self.actions) > 8:
            raise ValueError(f"UserStateConfig.actions: at most 8 labels, got {len(self.actions)}")
        if self.positive and self.positive not in self.actions:
            raise ValueError(f"UserStateConfig.positive is {self.positive!r}, expected one of the actions {self.actions}")
        if unknown := [name for name in self.actions if name not in _LABELS]:
            raise ValueError(
                f"UserStateConfig.actions has {', '.join(unknown)}, which no action tells; choose from {', '.join(_LABELS)}"
            )


class UserState:
    """The state of all users. One caller observes, any number ask."""

    def __init__(self, config: UserStateConfig) -> None:
        """Knows no users yet."""
        self._config = config
        self._slots = IdSlots(config.max_users)
        self._videos = RecentItems(self._slots.size, config.length, marked=True)
        self._followed = RecentItems(self._slots.size, config.followed)
        self._skip = 1 << config.actions.index("skip") if "skip" in config.actions else 0
        self._set_aside: Counter[str] = Counter()
        self._observed = self._late = 0
        self._lock = threading.Lock()

    def observe(self, actions: pa.RecordBatch, durations: Lookup | None = None, authors: Lookup | None = None) -> int:
        """Takes actions in, in the order in which they come.

        Args:
            actions: Columns of `stream.events.ACTION` (others are not looked at). Rows with nulls, an unknown action, or a time
                that is missing or negative are set aside and counted.
            durations: Of videos, in ms; without it, labels that need the duration stay undefined.
            authors: Of videos; without it, nobody is known to be followed.

        Returns:
            How many rows were taken.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        rows, code, value = self._good(actions)
        if not rows.size:
            return 0
        users, videos = (ids_of(actions, name, "ACTION")[0][rows] for name in ("user_id", "video_id"))
        times = actions.column("event_time_ms").fill_null(0).to_numpy()[rows]
        played = code == len(ACTIONS)
        bits = self._bits(_outcomes(videos, code, value, durations))
        play_ms = np.where(played, np.minimum(value, _MOST_MS), -1).astype(np.int32)
        follow = np.zeros(rows.size, np.bool_)
        author_ids = np.zeros(rows.size, np.int64)
        if authors is not None and self._config.followed:
            at = np.flatnonzero(code == ACTIONS.index("follow"))
            if at.size:
                found, known = authors(videos[at])
                author_ids[at], follow[at] = found, known
        self._add(users, videos, times, bits, play_ms, False, (author_ids, follow))
        return int(rows.size)

    def observe_examples(self, examples: pa.RecordBatch) -> int:
        """Takes examples in: each is an entry of its user's history, as if `stream.history` had seen it.

        Args:
            examples: Columns `user_id`, `video_id` (int64 or string; rows with null are set aside), `event_time_ms`, and those
                that the labels need.

        Returns:
            How many rows were taken.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        users, user_known = ids_of(examples, "user_id", "EXAMPLE")
        videos, video_known = ids_of(examples, "video_id", "EXAMPLE")
        times, time_known = _times_of(examples)
        rows = self._without({"no user_id": user_known, "no video_id": video_known, "no event_time_ms": time_known})
        play_ms = np.full(len(examples), -1, np.int32)
        if "play_time_ms" in examples.schema.names:
            play = pc.fill_null(pc.cast(examples.column("play_time_ms"), pa.float64(), safe=False), -1.0)
            play_ms = np.clip(np.nan_to_num(play.to_numpy(zero_copy_only=False), nan=-1.0), -1, _MOST_MS).astype(np.int32)
        bits = self._bits(examples)
        self._add(users[rows], videos[rows], times[rows], bits[rows], play_ms[rows], True, None)
        return int(rows.size)

    def history(self, user_id: int, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a user's last videos and what came of them: int64 [n] ids and int64 [n] action bits, newest first.

        Only those whose first action is strictly earlier than `now_ms`; none of a user that is not known.
        """
        videos, bits = self._newest(self._videos, user_id, now_ms)
        return videos, bits.astype(np.int64)

    def followed(self, user_id: int) -> np.ndarray:
        """Returns the authors that a user has followed, int64 [n], newest first; each where it was followed first."""
        return self._newest(self._followed, user_id, np.iinfo(np.int64).max)[0]

    def users(self, number: int) -> np.ndarray:
        """Returns users who were active last, int64 [N], at most so many."""
        with self._lock:
            used = self._slots.used
            slots = np.argsort(used)[::-1][:number]
            return self._slots.ids[slots[used[slots] != EMPTY]].copy()

    def metrics(self) -> dict[str, int]:
        """Returns what there is and what was counted: users, forgotten ones, events, and those set aside by reason."""
        set_aside = {f"set_aside/{reason}": count for reason, count in self._set_aside.items()}
        counts = {"users": len(self._slots), "users_replaced": self._slots.replaced, "observed": self._observed}
        return counts | {"too_old": self._late} | set_aside

    def _good(self, actions: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the rows that are actions, int64 [N], their codes in `_NAMES`, int64 [N], and values, float64 [N]."""
        if missing := [name for name in _NEEDED if name not in actions.schema.names]:
            raise ValueError(f"actions have no column {', '.join(missing)}; there: {', '.join(actions.schema.names)}")
        try:
            action = actions.column("action").cast(pa.string())
            values = pc.fill_null(pc.cast(actions.column("value"), pa.float64(), safe=False), float("nan"))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"actions need strings in column 'action' and numbers in 'value': {error}") from None
        code = pc.fill_null(pc.index_in(action, _NAMES), -1).to_numpy(zero_copy_only=False)
        value = values.to_numpy(zero_copy_only=False)
        timed = code >= len(ACTIONS)
        rows = self._without(
            {
                "no user_id": ids_of(actions, "user_id", "ACTION")[1],
                "no video_id": ids_of(actions, "video_id", "ACTION")[1],
                "no event_time_ms": _times_of(actions)[1],
                "unknown action": code >= 0,
                "value is missing": ~timed | ~np.isnan(value),
                "negative value": ~timed | ~(value < 0),
            }
        )
        return rows, code[rows].astype(np.int64), value[rows]

    def _without(self, good: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the rows that are good in every way, int64; counts the others by the first way in which they are not."""
        left = np.ones(len(next(iter(good.values()))), np.bool_)
        for reason, mask in good.items():
            if bad := int(np.count_nonzero(left & ~mask)):
                self._set_aside[reason] += bad
            left &= mask
        return np.flatnonzero(left)

    def _bits(self, outcomes: pa.RecordBatch) -> np.ndarray:
        values, _ = labels(outcomes, self._config.actions)
        return ((values > 0) @ (1 << np.arange(len(self._config.actions)))).astype(np.uint8)

    def _add(
        self,
        users: np.ndarray,
        videos: np.ndarray,
        times: np.ndarray,
        bits: np.ndarray,
        play_ms: np.ndarray,
        repeats: bool,
        follows: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        for first in range(0, users.size, _BLOCK):
            part = slice(first, first + _BLOCK)
            with self._lock:
                slots, fresh = self._slots.take(users[part], times[part])
                for ring in (self._videos, self._followed):
                    ring.clear(fresh)
                self._observed += slots.size
                self._late += self._videos.add(slots, videos[part], times[part], bits[part], play_ms[part], self._skip, repeats)
                if follows is not None and follows[1][part].any():
                    self._followed.add(np.where(follows[1][part], slots, -1), follows[0][part], times[part])

    def _newest(self, rings: RecentItems, user_id: int, before_ms: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            slots = self._slots.find(np.array([user_id], np.int64))
            items, _, bits, _ = rings.newest(slots, np.array([before_ms], np.int64), rings.items.shape[1])
        return items, bits


def user_state_bytes(config: UserStateConfig) -> int:
    """Returns the bytes of the arrays of a `UserState`: with the defaults, about 1.3 KB a user."""
    slots = id_slots_bytes(config.max_users)
    return slots + recent_bytes(slots // 16, config.length, marked=True) + recent_bytes(slots // 16, config.followed)


def _times_of(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Returns event times, int64 [B], 0 where null, and where they are not, bool [B]."""
    names = batch.schema.names
    if "event_time_ms" not in names or not pa.types.is_int64(batch.column("event_time_ms").type):
        raise ValueError(f"events need an int64 column 'event_time_ms'; there: {', '.join(names)}")
    column = batch.column("event_time_ms")
    return column.fill_null(0).to_numpy(), valid_mask(column)


def _outcomes(videos: np.ndarray, code: np.ndarray, value: np.ndarray, durations: Lookup | None) -> pa.RecordBatch:
    """Returns what each action by itself would make of an impression, as columns that `labels` reads."""
    played = code == len(ACTIONS)
    duration = np.full(code.size, np.nan)
    if durations is not None and played.any():
        found, known = durations(videos[played])
        duration[played] = np.where(known, found, np.nan)
    columns: dict[str, np.ndarray] = {name: code == number for number, name in enumerate(ACTIONS)}
    for number, name in enumerate(_TIMES.values(), len(ACTIONS)):
        columns[name] = np.where(code == number, value, np.nan)
    return pa.record_batch({name: pa.array(one) for name, one in (columns | {"duration_ms": duration}).items()})
