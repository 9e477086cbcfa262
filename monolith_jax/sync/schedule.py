"""When to publish, and what. In: the clock or the events' time. Out: what the planners agree on (`types.Cuts`)."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Literal

from monolith_jax.sync.quantise import Format, check_format
from monolith_jax.types import CUT_BASE, CUT_DENSE, CUT_ROWS


@dataclass(frozen=True)
class PublisherConfig:
    """How the trained state is brought to the serving side."""

    folder: str = ""
    """Folder of the deltas, or an object store (`s3://bucket/deltas`, `gs://`); empty: `deltas` in the run folder."""
    period_s: float = 0.25
    """Seconds between publications of the rows that changed. A slow folder makes it longer: the next one waits."""
    dense_period_s: float = 1.0
    """Seconds between publications of the dense weights, which go along with rows."""
    time: Literal["wall", "event"] = "wall"
    """What these seconds are counted in: those of the clock, or those of the events however fast they are learned from."""
    format: Format = "float16"
    """Of the vectors: float32, float16, or int8 with a scale for each row."""
    base_every: int = 1000
    """Deltas after which all rows are written anew, as a base for new readers to start from. A snapshot brings one too."""
    keep_bases: int = 2
    """Bases kept, with all deltas after the oldest of them. More is kept where a living reader needs it."""
    retry_s: float = 300.0
    """Seconds for which a write that fails is tried again; then the run ends."""

    def check(self) -> None:
        """Raises ValueError where a setting is out of range."""
        check_format(self.format)
        if self.time not in ("wall", "event"):
            raise ValueError(f"PublisherConfig.time must be 'wall' or 'event', got {self.time!r}")
        for name in ("period_s", "dense_period_s", "retry_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"PublisherConfig.{name} must be 0 or above, got {getattr(self, name)}")
        for name in ("base_every", "keep_bases"):
            if getattr(self, name) < 1:
                raise ValueError(f"PublisherConfig.{name} must be at least 1, got {getattr(self, name)}")


class Schedule:
    """Keeps one delta and one base at most on their way. Any thread may call it."""

    def __init__(self, config: PublisherConfig) -> None:
        """Publishes as soon as there is something."""
        self._config, self._lock = config, threading.Lock()
        self._last = self._last_dense = -math.inf
        self._deltas, self._base_due = 0, False
        self._delta_open = self._base_open = False

    def wanted(self, now_ms: int) -> int:
        """Returns what a publication would hold; see `types.Cuts`."""
        config, now = self._config, self._now(now_ms)
        with self._lock:
            if self._delta_open or now - self._last < config.period_s:
                return 0
            kind = CUT_ROWS
            if now - self._last_dense >= config.dense_period_s:
                kind |= CUT_DENSE
            if (self._base_due or self._deltas >= config.base_every) and not self._base_open:
                kind |= CUT_BASE
            return kind

    def agreed(self, kind: int, now_ms: int) -> None:
        """Notes that there will be a publication; `ended` ends it."""
        with self._lock:
            self._last, self._delta_open = self._now(now_ms), True
            self._deltas += 1
            if kind & CUT_DENSE:
                self._last_dense = self._last
            if kind & CUT_BASE:
                self._base_due, self._deltas, self._base_open = False, 0, True

    def ended(self, kind: int) -> None:
        """Notes that a delta (CUT_ROWS) or a base (CUT_BASE) is durable."""
        with self._lock:
            if kind & CUT_ROWS:
                self._delta_open = False
            if kind & CUT_BASE:
                self._base_open = False

    def want_base(self) -> None:
        """Asks for a base at the next publication."""
        self._base_due = True

    def _now(self, now_ms: int) -> float:
        return now_ms / 1000 if self._config.time == "event" else time.monotonic()
