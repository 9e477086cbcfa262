"""How far time has gone in a live stream of several partitions.

In: the newest event time that came of each partition, and when. Out: the watermark, the event time up to which nothing more is
waited for: the least of the partitions' newest times. A partition from which nothing comes holds nobody up for longer than
`idle_s`; one that is far ahead of the others waits for them, or all that it brings would have to be kept open meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

from monolith_jax.stream.log import LogPartition


class Watermarks:
    """The newest times of partitions."""

    def __init__(
        self,
        partitions: Sequence[LogPartition],
        newest_ms: Mapping[LogPartition, int],
        now_s: float,
        idle: Set[LogPartition] = frozenset(),
    ) -> None:
        """Looks at partitions, active from `now_s` on.

        Args:
            partitions: All that are read.
            newest_ms: The newest event time of each that has brought something; its owner keeps it up.
            now_s: Now, by a clock that never goes back.
            idle: Those of which nothing is waited for until they bring something.
        """
        self.newest_ms = newest_ms
        self._seen_s = dict.fromkeys(partitions, now_s)
        self._read_s = dict(self._seen_s)
        self._idle = set(idle)
        self._ended: set[LogPartition] = set()

    def saw(self, partition: LogPartition, now_s: float, num_events: int = 1) -> None:
        """Notes that messages came; one that brings only such as are no events is as quiet as one that brings none."""
        self._read_s[partition] = now_s
        if num_events:
            self._seen_s[partition] = now_s
            self._idle.discard(partition)

    def end(self, partition: LogPartition) -> None:
        """Notes that nothing more will come."""
        self._ended.add(partition)

    @property
    def all_ended(self) -> bool:
        """Whether nothing more will come of any."""
        return len(self._ended) == len(self._seen_s)

    def look_for_idle(self, idle_s: float, now_s: float, has_unread: Callable[[LogPartition], bool]) -> None:
        """Notes which partitions have been quiet for too long; one that has something unread, and is not read, is not."""
        for partition, seen_s in self._seen_s.items():
            if partition in self._idle or partition in self._ended or now_s - seen_s < idle_s:
                continue
            if now_s - self._read_s[partition] >= idle_s and has_unread(partition):
                self._seen_s[partition] = now_s
            else:
                self._idle.add(partition)

    def watermark_ms(self) -> int | None:
        """Returns the least newest time of the active partitions; None while one of them has brought nothing yet.

        Where all are idle there is nothing to wait for: the highest.
        """
        active = self._seen_s.keys() - self._idle - self._ended
        if not active:
            return max(self.newest_ms.values(), default=None)
        times = [self.newest_ms.get(partition) for partition in active]
        return None if None in times else min(time for time in times if time is not None)

    def ahead(self, span_ms: int) -> set[LogPartition]:
        """Returns the partitions that are further than a span ahead of the slowest active one: they wait for it."""
        active = self._seen_s.keys() - self._idle - self._ended
        known = [self.newest_ms[partition] for partition in active if partition in self.newest_ms]
        if len(known) < len(active):
            # One has brought nothing yet: the others wait until it does, or is idle, once they have brought something.
            return {partition for partition in active if partition in self.newest_ms}
        least = min(known, default=0)
        return {partition for partition in active if self.newest_ms[partition] > least + span_ms} | self._ended
