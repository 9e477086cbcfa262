"""The surface of a log of events: topics divided into partitions, each a row of messages with growing offsets.

In: the address of a log. Out: a `Log` to read from, or a `Producer` to append with. Two kinds of log stand behind it: segment
files in a folder (`file:///folder`; `file_log`, `file_producer`), and Kafka (`kafka://host:port,host:port`; `kafka_log`,
`kafka_producer`, extra `kafka`). What a payload means is not the log's affair (`formats`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class LogPartition(NamedTuple):
    """One partition of a topic. Not to be confused with the partitions of a run, each of which reads some of these."""

    topic: str
    number: int


@dataclass(frozen=True, slots=True)
class Message:
    """One message, as it was appended."""

    offset: int
    payload: bytes
    timestamp_ms: int
    """Unix time at which it was appended."""
    schema: int = 0
    """Number of the schema that its payload has, uint64; 0: none was given."""
    fault: str = ""
    """Why the payload cannot be trusted; it holds what was read."""


class Log(Protocol):
    """Reads a log. A partition is read from where `seek` put it; one that was never sought is not read."""

    def num_partitions(self, topic: str) -> int:
        """Returns how many partitions a topic has.

        Raises:
            ValueError: There is no such topic, or no such log.
        """
        ...

    def bounds(self, partition: LogPartition, within_s: float = 30.0) -> tuple[int, int]:
        """Returns the first offset that is still there, and the one behind the last message. Asks the log afresh.

        Raises:
            OSError: It has not answered within so many seconds.
        """
        ...

    def offset_at(self, partition: LogPartition, timestamp_ms: int) -> int:
        """Returns the first offset appended at or after a time; the end if there is none."""
        ...

    def seek(self, partition: LogPartition, offset: int) -> None:
        """Reads this partition from an offset on."""
        ...

    def at(self, partition: LogPartition) -> int:
        """Returns where a partition is read. Offsets without a message are passed as soon as that is known."""
        ...

    def poll(self, max_messages: int, max_bytes: int, timeout_s: float) -> dict[LogPartition, list[Message]]:
        """Returns the next messages of the partitions that are not paused, in order within each.

        At most so many messages and (but for the first message) payload bytes in all; partitions take turns. Waits up to
        `timeout_s` when nothing is there; then returns none.

        Raises:
            ValueError: What comes next is not there any more (retention), or the log refuses.
        """
        ...

    def read_to(self, partition: LogPartition, end: int) -> list[Message]:
        """Returns the messages from where the partition is read up to offset `end`, exclusive; waits until they are there.

        Raises:
            ValueError: They are not there any more.
        """
        ...

    def pause(self, partitions: Set[LogPartition]) -> None:
        """Makes `poll` leave these out, and no others."""
        ...

    def unread(self) -> dict[LogPartition, int]:
        """Returns how many messages each sought partition has ahead of where it is read, as far as is known without asking."""
        ...

    def close(self) -> None:
        """Lets go of files, threads and connections."""
        ...


class Producer(Protocol):
    """Appends to a log."""

    def create(self, topic: str, partitions: int, forever: bool = False) -> None:
        """Makes a topic unless it is there; `forever`: with a retention of its own, which takes nothing.

        Raises:
            ValueError: It is there with another number of partitions.
        """
        ...

    def append(self, partition: LogPartition, payload: bytes, schema: int = 0, timestamp_ms: int | None = None) -> None:
        """Appends a message; the time is now unless given. It may wait in memory until `flush`."""
        ...

    def flush(self) -> None:
        """Returns when all that was appended is in the log.

        Raises:
            OSError: Some of it is not.
        """
        ...

    def close(self) -> None:
        """Flushes, and lets go."""
        ...


def take_turns(
    names: Sequence[LogPartition], most: int, room: int, read: Callable[[LogPartition, int, int, bool, list[Message]], int]
) -> dict[LogPartition, list[Message]]:
    """Shares the limits of one `poll` among partitions: each may take its part, then whoever has more takes what is left.

    Args:
        names: The partitions, in the order in which they are asked.
        most: At most so many messages in all.
        room: But for the first message, at most so many payload bytes in all.
        read: Appends messages of a partition to a list and returns their bytes, given the most messages, the most bytes, and
            whether the first message may be larger.
    """
    found: dict[LogPartition, list[Message]] = {}
    for share, name in zip(range(len(names), 0, -1), names, strict=True):
        into: list[Message] = []
        room -= read(name, -(-most // share), -(-room // share), not found, into)
        most -= len(into)
        if into:
            found[name] = into
    for name, into in found.items():
        before = len(into)
        room -= read(name, most, room, False, into)
        most -= len(into) - before
    return found


def open_log(url: str, options: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> Log:
    """Opens a log for reading.

    Args:
        url: `file:///folder` or `kafka://host:port,host:port`.
        options: Of a file log, `file_log.OPTIONS`; of Kafka, options of the client, by the names that librdkafka gives them.

    Raises:
        ValueError: The address or an option is not understood, or there is no log.
        ImportError: `kafka://` without the extra `kafka`.
    """
    if _kind(url) == "file":
        from monolith_jax.stream.file_log import FileLog, folder_of

        return FileLog(folder_of(url), options)
    from monolith_jax.stream.kafka_log import KafkaLog

    return KafkaLog(url, options)


def open_producer(url: str, options: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> Producer:
    """Opens a log for appending; takes and raises what `open_log` does."""
    if _kind(url) == "file":
        from monolith_jax.stream.file_log import folder_of
        from monolith_jax.stream.file_producer import FileProducer

        return FileProducer(folder_of(url), options)
    from monolith_jax.stream.kafka_producer import KafkaProducer

    return KafkaProducer(url, options)


def _kind(url: str) -> str:
    kind, separator, _ = url.partition("://")
    if not separator or kind not in ("file", "kafka"):
        raise ValueError(f"{url!r} is no address of a log; write file:///folder or kafka://host:port,host:port")
    return kind
