"""Events for the Flink jobs, and what has to come of them, in plain Python.

In: a seed. Out: impressions and actions in the order of their times, and counts of windows by their definition.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from monolith_jax.lake.tables import COUNTED, WINDOWS
from monolith_jax.stream.events import COMPLETE_RATIO

Event = Mapping[str, Any]
Counts = dict[tuple[str, int, int], tuple[int, ...]]
"""By name of the window, video, and end: the counts of `tables.COUNTED`."""
BEGIN_MS = 1_700_000_123_456
PLAY_INTERVAL_MS = 3_600_000
OUT_OF_ORDER_MS = 1000
LAST_VIDEO = 999
"""Of the events behind all others, which make windows fire."""
_USERS, _VIDEOS = 20, 15


def make_events(
    number: int, seed: int, begin_ms: int = BEGIN_MS, within_ms: int = 4 * 3_600_000, first_request: int = 0
) -> tuple[list[Event], list[Event]]:
    """Returns impressions and actions, each in the order of their times. No user sees two videos at one time.

    Args:
        number: How many impressions.
        seed: Of the random numbers.
        begin_ms: No event is before it.
        within_ms: So long impressions come.
        first_request: The request of the first one.
    """
    rng = random.Random(seed)
    impressions: list[Event] = []
    actions: list[Event] = []
    for request, at in enumerate(sorted(rng.sample(range(within_ms), number)), first_request):
        seen: dict[str, Any] = {
            "event_time_ms": begin_ms + at,
            "request_id": rng.choice([None, request, request, request, request]),
            "user_id": rng.randrange(_USERS),
            "video_id": rng.randrange(_VIDEOS),
        }
        duration = rng.choice([None, 0, 7000, 10_000, 12_340])
        told = {
            "author_id": rng.choice([None, 2**62]),
            "tag_id": rng.choice([None, [], [1], [1, 2, 3]]),
            "duration_ms": duration,
        }
        impressions.append(seen | told)
        complete = round((duration or 5000) * COMPLETE_RATIO)
        for _ in range(rng.randrange(3)):  # a player may tell twice
            later = rng.choice([0, 1, 900, 5000, 30_000, PLAY_INTERVAL_MS, PLAY_INTERVAL_MS + 1])
            play = {"action": "play", "value": complete + rng.choice([-1, 0, 3000]), "event_id": request}
            actions.append(seen | play | {"event_time_ms": seen["event_time_ms"] + later})
        if rng.random() < 0.3:
            actions.append(seen | {"action": rng.choice(["like", "share"]), "event_time_ms": seen["event_time_ms"] + 700})
        if rng.random() < 0.1:  # of an impression that nobody knows
            unknown = {"action": "play", "value": 99_999, "request_id": 10**9 + request}
            actions.append(seen | unknown)
    return impressions, sorted(actions, key=lambda one: one["event_time_ms"])


def last_events(time_ms: int) -> tuple[list[Event], list[Event]]:
    """Returns an impression and an action for each partition, which tell that it is so late; nothing counts them yet."""
    seen = [{"event_time_ms": time_ms, "request_id": None, "user_id": user, "video_id": LAST_VIDEO} for user in range(2)]
    return [{**one, "duration_ms": None} for one in seen], [{**one, "action": "dwell", "value": 1} for one in seen]


def counts_of(impressions: Sequence[Event], actions: Sequence[Event], watermark_ms: int) -> Counts:
    """Returns the counts of all windows that a watermark has made fire."""
    counted = [(one, "views") for one in impressions]
    counted += [(one, "likes") for one in actions if one["action"] == "like"]
    counted += [(one, "completes") for one in _completes(impressions, actions)]
    cells: Counter[tuple[str, int, int, str]] = Counter()
    for one, what in counted:
        for window in WINDOWS:
            first = one["event_time_ms"] // window.slide_ms * window.slide_ms + window.slide_ms
            for end in range(first, one["event_time_ms"] + window.size_ms + 1, window.slide_ms):
                if end - 1 <= watermark_ms:
                    cells[window.name, one["video_id"], end, what] += 1
    return {key: tuple(cells[*key, what] for what in COUNTED) for key in {cell[:3] for cell in cells}}


def _completes(impressions: Sequence[Event], actions: Sequence[Event]) -> list[Event]:
    """Returns the plays that are complete by the duration of their impression."""
    durations: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for one in impressions:
        known = durations.setdefault((one["request_id"], one["video_id"]), [])
        known.append((one["event_time_ms"], one["duration_ms"] or 0))
    found = []
    for one in actions:
        if one["action"] == "play" and one["request_id"] is not None:
            of_it = durations.get((one["request_id"], one["video_id"]), [])
            since = one["event_time_ms"]
            duration = max([length for at, length in of_it if 0 <= since - at <= PLAY_INTERVAL_MS], default=0)
            if duration and one["value"] >= COMPLETE_RATIO * duration:
                found.append(one)
    return found


def counts_in(rows: Sequence[Mapping[str, Any]]) -> Counts:
    """Returns the counts that a log of changes of videos holds.

    Raises:
        ValueError: It holds a window twice.
    """
    found: Counts = {}
    for row in rows:
        for window in WINDOWS:
            if (end := row[f"counts_{window.name}_ms"]) is not None:
                key = (window.name, row["video_id"], end)
                if key in found:
                    raise ValueError(f"a window is there twice: {key}")
                found[key] = tuple(row[f"{what}_{window.name}"] for what in COUNTED)
    return found
