"""The end of a log of impressions and actions, as it grows: what user state is rebuilt from, and kept up by.

In: the address of a log, and how far back to begin. Out: record batches of impressions and of actions, in the log's order
within each partition, which is all that one user's events need. Unlike `stream.live` it joins nothing and writes nothing down:
two tails of one log read the same events of each user in the same order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple

import pyarrow as pa

from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.formats import Schemas
from monolith_jax.stream.log import LogPartition, Message, open_log
from monolith_jax.stream.log_source import LogConfig
from monolith_jax.stream.run_schema import concatenated

MAX_REASONS = 100
"""Reasons that are counted by themselves; further ones are counted together."""
STALLED_S = 60.0
"""So long without a message, where there are some, the log is held to be broken."""


class Events(NamedTuple):
    """What a poll brought."""

    impressions: pa.RecordBatch | None
    """Columns of `stream.events.IMPRESSION` and the features logged then. None: there were none."""
    actions: pa.RecordBatch | None
    """Columns of `stream.events.ACTION`, and any others."""


class LogTail:
    """Reads all partitions of both topics. For one thread."""

    def __init__(self, config: LogConfig, horizon_s: float = 0.0) -> None:
        """Opens the log; nothing is read yet.

        Args:
            config: The log; `joiner` and what else says how examples are made is not looked at.
            horizon_s: Begins with what the log took so long before its newest message; 0: at the end, inf: at the start.

        Raises:
            ValueError: There is no such log or topic.
        """
        if not horizon_s >= 0:
            raise ValueError(f"horizon_s must be at least 0, got {horizon_s}")
        self._config = config
        with ExitStack() as opened:
            self._log = opened.enter_context(closing(open_log(config.url, config.options)))
            schemas = opened.enter_context(closing(open_log(config.url, config.options)))
            self._decoders = {
                config.impressions: Decoder(
                    "impression",
                    config.impressions,
                    config.format,
                    Schemas(schemas, config.impressions),
                    future_s=config.future_s,
                ),
                config.actions: Decoder(
                    "action", config.actions, config.format, Schemas(schemas, config.actions), future_s=config.future_s
                ),
            }
            topics = tuple(self._decoders)
            self._partitions = [LogPartition(topic, one) for topic in topics for one in range(self._log.num_partitions(topic))]
            self._start(horizon_s)
            self._opened = opened.pop_all()
        self.set_aside: Counter[str] = Counter()
        """Messages and events that are none, by reason."""
        self.lost = 0
        """Messages that retention took before they were read."""

    def close(self) -> None:
        """Lets go of the log."""
        self._opened.close()

    def _start(self, horizon_s: float) -> None:
        bounds = {one: self._log.bounds(one) for one in self._partitions}
        newest_ms = 0
        for partition, (first, end) in bounds.items():
            if end > first and 0 < horizon_s < float("inf"):
                self._log.seek(partition, end - 1)
                newest_ms = max(newest_ms, *(message.timestamp_ms for message in self._log.read_to(partition, end)), 0)
        for partition, (first, end) in bounds.items():
            begin = end if horizon_s == 0 else first
            if end > first and 0 < horizon_s < float("inf"):
                begin = self._log.offset_at(partition, newest_ms - int(1000 * horizon_s))
            self._log.seek(partition, max(first, min(begin, end)))

    def poll(self, timeout_s: float = 0.0) -> Events:
        """Returns what came since the last poll, at most `poll_messages` and `poll_bytes` of the config.

        Bad messages are counted and left out. Waits up to `timeout_s` when nothing is there.

        Raises:
            ValueError: The log refuses.
        """
        try:
            found = self._log.poll(self._config.poll_messages, self._config.poll_bytes, timeout_s)
        except ValueError:
            if not self._pass_lost():
                raise
            found = {}
        return self._decoded(found)

    def catch_up(self) -> Iterator[Events]:
        """Yields polls until all that was in the log at the first of them is read.

        Raises:
            ValueError: The log refuses.
            OSError: Nothing came for a minute although there is something.
        """
        ends = {one: self._log.bounds(one)[1] for one in self._partitions}
        came_s = time.monotonic()
        while any(self._log.at(one) < end for one, end in ends.items()):
            before = self._places()
            yield self.poll(0.2)
            if self._places() != before:
                came_s = time.monotonic()
            elif time.monotonic() - came_s > STALLED_S:
                raise OSError(
                    f"{self._config.url} has brought nothing for {STALLED_S:.0f} s, although there are unread messages"
                )

    def unread(self) -> int:
        """Returns how many messages are ahead, as far as is known."""
        return sum(self._log.unread().values())

    def _places(self) -> list[int]:
        return [self._log.at(one) for one in self._partitions]

    def _pass_lost(self) -> bool:
        """Goes on where the log begins now, in partitions that were read too slowly; says whether there were any."""
        passed = False
        for partition in self._partitions:
            first, at = self._log.bounds(partition)[0], self._log.at(partition)
            if at < first:
                self.lost += first - at
                self._log.seek(partition, first)
                passed = True
        return passed

    def _decoded(self, found: dict[LogPartition, list[Message]]) -> Events:
        batches: dict[str, list[pa.RecordBatch]] = {topic: [] for topic in self._decoders}
        for partition, messages in found.items():
            batch, rejected = self._decoders[partition.topic].decode(partition, messages)
            if batch.num_rows:
                batches[partition.topic].append(batch)
            for one in rejected:
                known = one.reason in self.set_aside or len(self.set_aside) < MAX_REASONS
                self.set_aside[one.reason if known else "other reasons"] += 1
        of_topics = [concatenated(batches[one]) if batches[one] else None for one in self._decoders]
        return Events(*of_topics)
