"""The joiner's rules in plain Python, an event at a time: what the tests compare it with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from monolith_jax.stream.events import ACTION, ACTIONS
from monolith_jax.stream.joiner import JoinerConfig


class Shown(NamedTuple):
    request: int
    video: int
    time: int
    mark: int
    """A logged feature."""


class Done(NamedTuple):
    request: int
    video: int
    time: int
    action: str
    value: int | None
    event: int | None


class Cut(NamedTuple):
    number: int
    shown: Sequence[Shown]
    done: Sequence[Done]
    watermark: int


def impressions(shown: Sequence[Shown], further: bool = False) -> pa.RecordBatch | None:
    if not shown:
        return None
    columns: dict[str, Any] = {
        "event_time_ms": pa.array([one.time for one in shown], pa.int64()),
        "request_id": pa.array([one.request for one in shown], pa.int64()),
        "user_id": pa.array([one.mark * 7 for one in shown], pa.int64()),
        "video_id": pa.array([one.video for one in shown], pa.int64()),
        "tags": pa.array([[one.mark] * (one.mark % 3) for one in shown], pa.list_(pa.int64())),
        "name": pa.array([f"n{one.mark}" if one.mark % 4 else None for one in shown], pa.string()),
        "score": pa.array([float(one.mark) for one in shown], pa.float32()),
    }
    if further:
        columns["gained"] = pa.array([one.mark for one in shown], pa.int32())
    return pa.RecordBatch.from_pydict(columns)


def actions(done: Sequence[Done]) -> pa.RecordBatch | None:
    if not done:
        return None
    columns = [
        [one.time for one in done],
        [one.request for one in done],
        [0] * len(done),
        [one.video for one in done],
        [one.action for one in done],
        [one.value for one in done],
        [one.event for one in done],
    ]
    return pa.RecordBatch.from_arrays(
        [pa.array(column, one.type) for column, one in zip(columns, ACTION, strict=True)], schema=ACTION
    )


@dataclass
class Row:
    shown: Shown
    arrival: int
    taken: bool
    closed: bool = False
    play: int | None = None
    dwell: int | None = None
    came: set[str] = field(default_factory=set)
    events: set[int] = field(default_factory=set)


class Oracle:
    def __init__(self, config: JoinerConfig) -> None:
        self.window = round(config.window_s * 1000)
        self.hold = self.window + round(config.late_s * 1000)
        self.at_once = config.emit == "at_once"
        self.rows: dict[tuple[int, int], list[Row]] = {}
        self.waiting: list[Done] = []
        self.watermark = -(2**62)
        self.arrival = 0
        self.counts: dict[str, int] = dict.fromkeys(
            ("late_impressions", "late_or_orphan_actions", "applied_late_actions", "duplicates", "examples"), 0
        )

    def join(self, cut: Cut) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for one in cut.shown:
            self._show(one, out)
        for one in cut.done:
            self._act(one, out)
        due = [row for rows in self.rows.values() for row in rows if row.taken and not row.closed]
        due = [row for row in due if row.shown.time + self.window <= cut.watermark]
        for row in sorted(due, key=lambda row: (row.shown.time, row.arrival)):
            row.closed = True
            if not self.at_once:
                times = {"play_time_ms": row.play, "dwell_ms": row.dwell}
                out.append(columns(row) | times | {name: name in row.came for name in ACTIONS})
        for key in list(self.rows):
            self.rows[key] = [row for row in self.rows[key] if row.shown.time + self.hold > cut.watermark]
        expired = [one for one in self.waiting if one.time + self.window <= cut.watermark]
        self.counts["late_or_orphan_actions"] += len(expired)
        self.waiting = [one for one in self.waiting if one.time + self.window > cut.watermark]
        self.watermark = cut.watermark
        self.counts["examples"] += len(out)
        return out

    def _show(self, one: Shown, out: list[dict[str, Any]]) -> None:
        self.arrival += 1
        if one.time + self.window <= self.watermark:
            self.counts["late_impressions"] += 1
            return
        rows = self.rows.setdefault((one.request, one.video), [])
        row = Row(one, self.arrival, not rows)
        rows.append(row)
        if not row.taken:
            self.counts["duplicates"] += 1
            return
        if self.at_once:
            out.append(columns(row) | {"play_time_ms": None, "dwell_ms": None} | dict.fromkeys(ACTIONS, False))
        mine = [act for act in self.waiting if (act.request, act.video) == (one.request, one.video)]
        self.waiting = [act for act in self.waiting if (act.request, act.video) != (one.request, one.video)]
        for act in mine:
            self._apply(row, act, out)

    def _act(self, act: Done, out: list[dict[str, Any]]) -> None:
        rows = self.rows.get((act.request, act.video), [])
        taken = [row for row in rows if row.taken]
        if taken:
            self._apply(taken[0], act, out)
        elif rows:
            self.counts["late_or_orphan_actions"] += 1
        else:
            self.waiting.append(act)

    def _apply(self, row: Row, act: Done, out: list[dict[str, Any]]) -> None:
        if act.event is not None and act.event in row.events:
            self.counts["duplicates"] += 1
            return
        if act.event is not None:
            row.events.add(act.event)
        if act.action in ("play", "dwell") and act.value is None:
            return
        first = act.action not in row.came
        row.came.add(act.action)
        if act.action == "play":
            row.play = max(act.value or 0, row.play or 0)
        if act.action == "dwell":
            row.dwell = max(act.value or 0, row.dwell or 0)
        if self.at_once and not first:
            self.counts["duplicates"] += 1
        if (self.at_once and first) or (row.closed and not self.at_once):
            self.counts["applied_late_actions"] += not self.at_once
            single: dict[str, Any] = dict.fromkeys(("play_time_ms", "dwell_ms", *ACTIONS))
            single[{"play": "play_time_ms", "dwell": "dwell_ms"}.get(act.action, act.action)] = (
                act.value if act.action in ("play", "dwell") else True
            )
            out.append(columns(row) | single)


def columns(row: Row) -> dict[str, Any]:
    batch = impressions([row.shown])
    assert batch is not None
    return batch.to_pylist()[0]


def run_oracle(config: JoinerConfig, cuts: Iterable[Cut]) -> tuple[list[list[dict[str, Any]]], dict[str, int]]:
    oracle = Oracle(config)
    out = [oracle.join(cut) for cut in cuts]
    return out, oracle.counts
