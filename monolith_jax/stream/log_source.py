"""A live stream as a source: impressions and actions in a log, joined to examples as they come.

In: the address of a log, and a position. Out: chunks of examples from there on, without end unless `ends` is set. `live` says
how.

The partitions of both topics are divided among the partitions of the run by their number, so they must be as many, and a
multiple of those; and what belongs together (a user, an impression and its actions) must have one key in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from monolith_jax.stream.joiner import JoinerConfig
from monolith_jax.stream.live import LiveReading
from monolith_jax.types import Chunk, Position


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """A log of impressions and actions, and how it is read."""

    url: str
    """`file:///folder`, or `kafka://host:port,host:port` (extra `kafka`)."""
    impressions: str = "impressions"
    """Topic of what was shown, with the features logged then."""
    actions: str = "actions"
    """Topic of what users did then, in any order."""
    format: Literal["arrow", "json", "protobuf", "debezium"] = "arrow"
    """What the messages hold: record batches of events, or one event each."""
    joiner: JoinerConfig = field(default_factory=JoinerConfig)
    """How they become examples."""
    begin: Literal["earliest", "latest"] = "earliest"
    """Where a new run begins to read."""
    ends: bool = False
    """Whether the stream ends where the log ends when the run begins; all windows close then."""
    max_wait_s: float = 0.2
    """How long an example waits for its batch to fill; then the batch is short. A partition of the run to which nothing comes
    holds the others up as long in each step, so where users come unevenly it is to be short."""
    idle_s: float = 10.0
    """A partition that brings nothing for so long, and has nothing unread, does not hold the others up."""
    ahead_s: float = 60.0
    """How far in event time a partition may be ahead of the slowest; then it waits. Bounds what a run that catches up holds
    open."""
    future_s: float = 3600.0
    """Events further ahead of the time at which the log took them are set aside: they would close every window."""
    poll_messages: int = 4096
    """Messages of a cut, at most."""
    poll_bytes: int = 1 << 20
    """Bytes of a cut, about."""
    options: tuple[tuple[str, str], ...] = ()
    """Options of the Kafka client by librdkafka's names, TLS and SASL too: (('security.protocol', 'SASL_SSL'), ...)."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        for name in ("idle_s", "max_wait_s", "ahead_s", "future_s", "poll_messages", "poll_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"LogConfig.{name} must be above 0, got {getattr(self, name)}")
        if self.max_wait_s > 10:
            raise ValueError(f"LogConfig.max_wait_s must be at most 10, as stopping waits as long, got {self.max_wait_s}")
        if self.impressions == self.actions:
            raise ValueError(f"LogConfig.impressions and actions are both {self.actions!r}; they are two topics")


@dataclass(frozen=True)
class LogSource:
    """A `Source` over one partition of a run."""

    config: LogConfig
    folder: Path
    """Where the cut log is, and what the joiner spills."""
    batch_rows: int
    """Rows of a batch: how long examples wait is counted by it."""
    index: int = 0
    """Which partition of the run."""
    number: int = 1
    """How many there are."""
    max_lag_s: float = float("inf")
    """How old the next message may be before the stream skips ahead."""

    @property
    def num_examples(self) -> int | None:
        """Nobody knows."""
        return None

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from `position` on.

        Raises:
            ValueError: The log, a topic or a cut is not there, or the log does not reach back to the position.
        """
        reading = LiveReading(self.config, self.folder, self.batch_rows, self.index, self.number, self.max_lag_s, position)
        try:
            yield from reading.chunks()
        finally:
            reading.close()
