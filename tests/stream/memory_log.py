"""A log in memory: what a test appends is there at once."""

from collections.abc import Set

from monolith_jax.stream.log import LogPartition, Message


class MemoryLog:
    """A `Log` and a `Producer` at the same time."""

    def __init__(self) -> None:
        self.topics: dict[str, list[list[Message]]] = {}
        self._at: dict[LogPartition, int] = {}

    def create(self, topic: str, partitions: int, forever: bool = False) -> None:
        self.topics.setdefault(topic, [[] for _ in range(partitions)])

    def append(self, partition: LogPartition, payload: bytes, schema: int = 0, timestamp_ms: int | None = None) -> None:
        there = self.topics[partition.topic][partition.number]
        there.append(Message(len(there), payload, timestamp_ms or 0, schema))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def num_partitions(self, topic: str) -> int:
        if topic not in self.topics:
            raise ValueError(f"no topic {topic}")
        return len(self.topics[topic])

    def at(self, partition: LogPartition) -> int:
        return self._at[partition]

    def bounds(self, partition: LogPartition, within_s: float = 0.0) -> tuple[int, int]:
        return 0, len(self.topics[partition.topic][partition.number])

    def offset_at(self, partition: LogPartition, timestamp_ms: int) -> int:
        raise NotImplementedError

    def seek(self, partition: LogPartition, offset: int) -> None:
        self._at[partition] = offset

    def poll(self, max_messages: int, max_bytes: int, timeout_s: float) -> dict[LogPartition, list[Message]]:
        raise NotImplementedError

    def read_to(self, partition: LogPartition, end: int) -> list[Message]:
        return self.topics[partition.topic][partition.number][self._at[partition] : end]

    def pause(self, partitions: Set[LogPartition]) -> None:
        pass

    def unread(self) -> dict[LogPartition, int]:
        return {}
