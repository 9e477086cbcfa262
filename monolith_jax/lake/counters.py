"""What happens to a video in a sliding window: views, completes and likes of the last five minutes, hour and day.

In: impressions and actions, and how far their time has gone. Out: of each window that time has passed, one row for each video
of which anything was counted in it. These are the rows that Flink SQL's `HOP` makes of the same events and watermarks
(`launch/flink`), for a machine that has no Flink.

Windows are [end - size, end), and each multiple of the slide is an end; one fires once the watermark is at end - 1. An event
that comes after some of its windows have fired counts in the others; one of which all have is dropped, and counted as late.
A play counts when its own time is past, by the duration of its impression. (Where plays or impressions are late, and another
event of their request and video has been looked at already, Flink drops some that count here.)
Events are counted in panes as wide as a slide, of which a window is a whole number; the running total of a window takes in one
pane and lets go of another whenever it fires. Panes hold only what happened, so memory goes by the videos of a pane.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.ids.lines import jit
from monolith_jax.lake.impressions import OpenImpressions
from monolith_jax.lake.tables import COUNTED, WINDOWS, Window
from monolith_jax.stream.events import COMPLETE_RATIO, valid_mask
from monolith_jax.stream.history import ids_of

VIEW, COMPLETE, LIKE = range(3)
_NEVER = np.iinfo(np.int64).min // 2
_SHARDS = 2


@dataclass(frozen=True)
class WindowCountsConfig:
    """How much is kept."""

    max_videos: int = 500_000
    """Videos that are counted; events of further ones are counted as refused, until others have had none for a day. Costs
    some 100 bytes each, and 16 for each pane that something happened in."""
    play_interval_s: float = 3600.0
    """A play belongs to the impression of its request and video that was at most so long before it."""
    max_impressions: int = 4_000_000
    """Impressions that plays are waited for; of more, the first ones are forgotten, and counted. Costs 40 to 56 bytes each."""


@jit
def _merged(cells_1, counts_1, cells_2, counts_2, cells, counts):
    """Merges counts of distinct cells in order, int64 each, into room for both; returns how many cells there are."""
    i, j, size = 0, 0, 0
    while i < cells_1.size or j < cells_2.size:
        first = j == cells_2.size or (i < cells_1.size and cells_1[i] <= cells_2[j])
        both = first and j < cells_2.size and cells_1[i] == cells_2[j]
        cells[size] = cells_1[i] if first else cells_2[j]
        counts[size] = 0
        if first:
            counts[size] += counts_1[i]
            i += 1
        if both or not first:
            counts[size] += counts_2[j]
            j += 1
        size += 1
    return size


class _Pane:
    """The counts of one slide: cells (what * rows + row) and how often, in parts that are merged now and then."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, cells: np.ndarray, counts: np.ndarray) -> None:
        self._parts.append((cells, counts))
        # As with the digits of a number: however small its batch is, an event is merged only a few times.
        while len(self._parts) > 1 and self._parts[-2][0].size <= 2 * self._parts[-1][0].size:
            self._merge_last()

    def merge(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns distinct cells in order, and their counts, int64 [N] each."""
        while len(self._parts) > 1:
            self._merge_last()
        return self._parts[0]

    def _merge_last(self) -> None:
        (cells_1, counts_1), (cells_2, counts_2) = self._parts.pop(), self._parts.pop()
        cells, counts = np.empty((2, cells_1.size + cells_2.size), np.int64)
        size = _merged(cells_1, counts_1, cells_2, counts_2, cells, counts)
        # Not a view: what is left over would be kept.
        self._parts.append((cells[:size].copy(), counts[:size].copy()))


class _WindowTotals:
    """The panes of one window, and what its next firing will tell."""

    def __init__(self, window: Window, num_rows: int) -> None:
        self.window = window
        self.panes: defaultdict[int, _Pane] = defaultdict(_Pane)
        self.totals = np.zeros(len(COUNTED) * num_rows, np.int64)
        self.num_late = np.zeros(1, np.int64)

    def fired_until(self, watermark_ms: int) -> int:
        """Returns the last end that has fired."""
        return (watermark_ms + 1) // self.window.slide_ms * self.window.slide_ms

    def add(self, time_ms: int, cells: np.ndarray, counts: np.ndarray, watermark_ms: int) -> None:
        """Counts events of one pane: distinct cells in order, and how often each, int64 [N]."""
        slide, fired = self.window.slide_ms, self.fired_until(watermark_ms)
        end = (time_ms // slide + 1) * slide
        if end - slide + self.window.size_ms <= fired:
            self.num_late += counts.sum()  # the last window that has the pane has fired
            return
        if end <= fired:
            self.totals[cells] += counts
        self.panes[end].add(cells, counts)

    def fire(self, before_ms: int, watermark_ms: int, num_rows: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Returns end, rows [N] and counts [3, N] of the windows that a watermark makes fire; `num_rows` are in use."""
        slide, size = self.window.slide_ms, self.window.size_ms
        fired, last = self.fired_until(before_ms), self.fired_until(watermark_ms)
        table = self.totals.reshape(len(COUNTED), -1)[:, :num_rows]
        out = []
        while self.panes:
            # Where nothing is in the window, nothing happens until the next pane.
            first = min(self.panes)
            end = fired + slide if first <= fired else first
            if end > last:
                break
            if end in self.panes:
                cells, counts = self.panes[end].merge()
                self.totals[cells] += counts
            rows = np.flatnonzero(np.bitwise_or.reduce(table, axis=0))
            out.append((end, rows, table[:, rows]))
            if (gone := end - size + slide) in self.panes:
                cells, counts = self.panes.pop(gone).merge()
                self.totals[cells] -= counts
            fired = end
        return out


class WindowCounts:
    """The counts of all windows. Not thread safe: one caller at a time."""

    def __init__(self, config: WindowCountsConfig, windows: Sequence[Window] = WINDOWS) -> None:
        """Makes empty counts.

        Args:
            config: How much is kept.
            windows: What is counted over.

        Raises:
            ValueError: A field is out of its range, or a window is no multiple of its slide.
        """
        if config.max_videos < 1 or config.max_impressions < 1 or not config.play_interval_s >= 0:
            raise ValueError(
                "WindowCountsConfig: max_videos and max_impressions must be at least 1, play_interval_s at least 0, "
                f"got {config}"
            )
        for window in windows:
            if window.slide_ms < 1 or window.size_ms < 1 or window.size_ms % window.slide_ms:
                raise ValueError(f"windows: size_ms must be a multiple of slide_ms, got {window}")
        self._config, self._asked = config, tuple(windows)
        self._layout = MapLayout(("lake.counters",), (config.max_videos,), _SHARDS)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        config = self._config
        num_rows = _SHARDS * self._layout.rows_per_shard
        self._maps = IdMaps(self._layout)
        self._ids = np.zeros(num_rows, np.int64)
        self._used = np.zeros(num_rows, np.bool_)
        self._num_rows = 0  # in use, holes among them
        self._refused = np.zeros(1, np.int64)
        self._watermark_ms = np.full(1, _NEVER, np.int64)
        self._windows = [_WindowTotals(window, num_rows) for window in self._asked]
        self._impressions = OpenImpressions(round(1000 * config.play_interval_s), config.max_impressions)

    @property
    def watermark_ms(self) -> int | None:
        """How far time has gone; None: nobody said."""
        return int(self._watermark_ms[0]) if self._watermark_ms[0] > _NEVER else None

    @property
    def num_refused(self) -> int:
        """Views, completes and likes so far that were not counted, because there are `max_videos` already."""
        return int(self._refused[0])

    @property
    def num_late(self) -> dict[str, int]:
        """Views, completes and likes so far that came after all their windows had fired, by name of the window."""
        return {one.window.name: int(one.num_late[0]) for one in self._windows}

    @property
    def num_unmatched(self) -> int:
        """Plays so far that no impression was found for."""
        return self._impressions.num_unmatched

    @property
    def num_forgotten(self) -> int:
        """Impressions so far that had to go before their time, since there were `max_impressions`."""
        return self._impressions.num_forgotten

    def add_impressions(self, impressions: pa.RecordBatch) -> None:
        """Counts views. Columns of `stream.events.IMPRESSION`: `event_time_ms`, `video_id`, `request_id`, `duration_ms`.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        times, videos = _int64(impressions, "event_time_ms"), _int64(impressions, "video_id")
        self._count(times, videos, VIEW)
        requests, known = ids_of(impressions, "request_id", "a column of impressions")
        fresh = np.stack([requests, videos, times, _int64(impressions, "duration_ms")])
        self._impressions.add_impressions(fresh if known.all() else fresh[:, known], int(self._watermark_ms[0]))

    def add_actions(self, actions: pa.RecordBatch) -> None:
        """Counts likes, and completes of those plays that are of one. Columns of `stream.events.ACTION`.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        times, videos = _int64(actions, "event_time_ms"), _int64(actions, "video_id")
        if "action" not in actions.schema.names:
            raise ValueError(f"a column of actions is missing: action; there: {', '.join(actions.schema.names)}")
        action = actions.column("action")
        names = pa.array(["like", "play"], action.type)
        code = pc.index_in(action, names).fill_null(-1).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        is_like, is_play = code == 0, code == 1
        self._count(times[is_like], videos[is_like], LIKE)
        requests, known = ids_of(actions, "request_id", "a column of actions")
        values = _int64(actions, "value")
        self._impressions.add_plays(
            np.stack([requests, videos, times, values])[:, is_play & known & valid_mask(actions["value"])]
        )

    def advance(self, watermark_ms: int) -> dict[str, pa.RecordBatch]:
        """Says that no more than late events come up to this time; one that is not later than the last changes nothing.

        Returns:
            Of each group of columns of `video_features`, `counts_<window>`, the rows of the windows that this makes fire:
            `video_id`, `counts_<window>_ms` (the end of the window), and `views_<window>` and so on. In the order of the ends.
        """
        before_ms = int(self._watermark_ms[0])
        if watermark_ms <= before_ms:
            return {f"counts_{one.window.name}": self._rows(one.window, []) for one in self._windows}
        plays, durations = self._impressions.due(watermark_ms, before_ms)
        _, videos, times, values = plays
        complete = (durations > 0) & (values >= COMPLETE_RATIO * durations)
        self._count(times[complete], videos[complete], COMPLETE)
        out = {}
        for one in self._windows:
            fired = one.fire(before_ms, watermark_ms, self._num_rows)
            out[f"counts_{one.window.name}"] = self._rows(one.window, fired)
        longest = max(self._asked, key=lambda window: window.slide_ms).slide_ms
        self._watermark_ms[0] = watermark_ms
        if (before_ms + 1) // longest < (watermark_ms + 1) // longest:
            self._drop_quiet()
        return out

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of everything."""
        state = {f"maps.{name}": array for name, array in self._maps.get_state().items()}
        state |= {f"impressions.{name}": array for name, array in self._impressions.get_state().items()}
        state |= {name: array.copy() for name, array in self._arrays().items()}
        for one in self._windows:
            ends = np.array(sorted(one.panes), np.int64)
            panes = [one.panes[int(end)].merge() for end in ends]
            sizes = np.array([cells.size for cells, _ in panes], np.int64)
            cells, counts = (np.concatenate([np.empty(0, np.int64), *arrays]) for arrays in _transposed(panes))
            named = {"ends": ends, "sizes": sizes, "cells": cells, "counts": counts, "totals": one.totals.copy()}
            state |= {f"{one.window.name}/{name}": array for name, array in named.items()}
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The state is of another config or damaged.
        """
        wanted = [*self._arrays(), *(f"{one.window.name}/totals" for one in self._windows)]
        for name in wanted:
            there = state[name].shape if name in state else "nothing"
            mine = self._windows[0].totals.shape if name.endswith("/totals") else self._arrays()[name].shape
            if there != mine:
                raise ValueError(
                    f"the state of {name!r} is {there}, expected {mine}; was it made with another WindowCountsConfig?"
                )
        self._maps.set_state({name[5:]: array for name, array in state.items() if name.startswith("maps.")})
        self._impressions.set_state({name[12:]: array for name, array in state.items() if name.startswith("impressions.")})
        for name, array in self._arrays().items():
            array[:] = state[name]
        self._num_rows = _rows_until_last(self._used)
        for one in self._windows:
            ends, sizes, cells, counts, one.totals[:] = (
                state[f"{one.window.name}/{name}"] for name in ("ends", "sizes", "cells", "counts", "totals")
            )
            one.panes.clear()
            for end, size, last in zip(ends, sizes, np.cumsum(sizes), strict=True):
                one.panes[int(end)].add(cells[last - size : last].copy(), counts[last - size : last].copy())

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"ids": self._ids, "used": self._used, "refused": self._refused, "watermark_ms": self._watermark_ms}
        return arrays | {f"{one.window.name}/late": one.num_late for one in self._windows}

    def _count(self, times_ms: np.ndarray, videos: np.ndarray, what: int) -> None:
        rows = self._rows_of(videos)
        if (refused := np.count_nonzero(rows < 0)) > 0:
            self._refused += refused
            rows, times_ms = rows[rows >= 0], times_ms[rows >= 0]
        slide = math.gcd(*(window.slide_ms for window in self._asked))
        num_cells = len(COUNTED) * self._ids.size
        for pane, cells, counts in _by_pane(times_ms // slide, rows + what * self._ids.size, num_cells):
            for one in self._windows:
                one.add(pane * slide, cells, counts, int(self._watermark_ms[0]))

    def _rows_of(self, videos: np.ndarray) -> np.ndarray:
        """Returns the rows of videos, int64 [N], -1 where there is no room. New ones get theirs in the order of events."""
        shards, rows = self._maps.lookup(videos, 0)
        # Those that came first have the lowest numbers in both shards.
        flat = np.where(rows >= 0, rows.astype(np.int64) * _SHARDS + shards, -1)
        if (absent := np.flatnonzero(rows < 0)).size:
            distinct, first, inverse = np.unique(videos[absent], return_index=True, return_inverse=True)
            order = np.argsort(first)
            shards, rows, *_ = self._maps.lookup_or_insert(distinct[order], 0, np.zeros(order.size, np.uint32))
            fresh = np.empty(order.size, np.int64)
            fresh[order] = np.where(rows >= 0, rows.astype(np.int64) * _SHARDS + shards, -1)
            self._ids[fresh[fresh >= 0]] = distinct[fresh >= 0]
            self._used[fresh[fresh >= 0]] = True
            self._num_rows = max(self._num_rows, int(fresh.max()) + 1)
            flat[absent] = fresh[inverse]
        return flat

    def _rows(self, window: Window, fired: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> pa.RecordBatch:
        rows = np.concatenate([np.empty(0, np.int64), *(rows for _, rows, _ in fired)])
        ends = np.repeat(np.array([end for end, *_ in fired], np.int64), [rows.size for _, rows, _ in fired])
        counts = np.concatenate([np.empty((len(COUNTED), 0), np.int64), *(counts for *_, counts in fired)], axis=1)
        names = ["video_id", f"counts_{window.name}_ms", *(f"{name}_{window.name}" for name in COUNTED)]
        return pa.record_batch([pa.array(array) for array in (self._ids[rows], ends, *counts)], names)

    def _drop_quiet(self) -> None:
        """Makes room: drops the videos of which nothing is in any pane."""
        alive = np.zeros(self._ids.size, np.bool_)
        for one in self._windows:
            for pane in one.panes.values():
                alive[pane.merge()[0] % alive.size] = True
        quiet = np.flatnonzero(self._used & ~alive)
        self._maps.erase(self._ids[quiet], 0)
        self._used[quiet] = False
        self._num_rows = _rows_until_last(self._used)


def _int64(batch: pa.RecordBatch, name: str) -> np.ndarray:
    if name not in batch.schema.names:
        raise ValueError(f"a column is missing: {name}; there: {', '.join(batch.schema.names)}")
    column = batch.column(name)
    if not pa.types.is_int64(column.type):
        raise ValueError(f"column {name} is {column.type}, expected int64")
    return column.fill_null(0).to_numpy()


def _rows_until_last(used: np.ndarray) -> int:
    return used.size - int(np.argmax(used[::-1])) if used.any() else 0


def _transposed(panes: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [cells for cells, _ in panes], [counts for _, counts in panes]


def _by_pane(panes: np.ndarray, cells: np.ndarray, num_cells: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Returns of each pane its number, its distinct cells in order, and how often each is there."""
    if not panes.size:
        return []
    first = int(panes.min())
    if int(panes.max()) - first >= 2**62 // num_cells:
        numbers, panes = np.unique(panes, return_inverse=True)
    else:
        numbers, panes = None, panes - first
    keys = np.sort(panes * num_cells + cells)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    counts = np.diff(starts, append=keys.size)
    of_pane, distinct = np.divmod(keys[starts], num_cells)
    edges = np.flatnonzero(np.concatenate([[True], of_pane[1:] != of_pane[:-1]]))
    out = []
    for start, end in zip(edges, [*edges[1:], of_pane.size], strict=True):
        pane = int(of_pane[start]) + first if numbers is None else int(numbers[of_pane[start]])
        out.append((pane, distinct[start:end], counts[start:end]))
    return out
