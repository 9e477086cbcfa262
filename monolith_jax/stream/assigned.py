"""Which partitions of a log a partition of the run reads, and from where on.

In: the log, and where each was read to. Out: the same in every run that has read as much. The partitions of both topics are
dealt out by their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from monolith_jax.stream.cuts import Read
from monolith_jax.stream.log import Log, LogPartition


class Assigned(NamedTuple):
    """What is read."""

    partitions: list[LogPartition]
    starts: tuple[Read, ...]
    """Those that are new to the run, from where on; and those that end, if they do. `end` -1: without end."""
    quiet: set[LogPartition]
    """Those that have nothing unread."""


def assign(
    log: Log, url: str, topics: Sequence[str], index: int, number: int, at: Mapping[LogPartition, int], latest: bool, ends: bool
) -> Assigned:
    """Returns what partition `index` of `number` of the run reads.

    Args:
        log: The log.
        url: Its address, for messages.
        topics: Those that are joined.
        index: Which partition of the run.
        number: How many it has.
        at: Where each is read from that was read before.
        latest: Whether those of a new run begin at the log's end; partitions that were added later begin at their start.
        ends: Whether each ends where it ends now.

    Raises:
        ValueError: The topics are not divided alike, or not into a multiple of the run's partitions; or what was read of a
            partition is not what is there.
    """
    numbers = {topic: log.num_partitions(topic) for topic in topics}
    if len(set(numbers.values())) > 1:
        raise ValueError(
            f"{url}: topics that are joined have equally many partitions and one key, got "
            + ", ".join(f"{many} of {topic!r}" for topic, many in numbers.items())
        )
    many = numbers[topics[0]]
    if many % number:
        raise ValueError(
            f"TrainConfig.partitions is {number}, which does not divide the {many} partitions of {topics[0]!r}; use a divisor "
            "of them (for a new run: it stays for the run's life), or give the topics a multiple"
        )
    partitions = [LogPartition(topic, one) for topic in topics for one in range(index, many, number)]
    if gone := [one for one in at if one not in partitions]:
        raise ValueError(f"{url}: the run has read {gone[0]}, which is not there any more; is it another log?")
    starts, quiet = [], set()
    for partition in partitions:
        first, end = log.bounds(partition)
        begin = at.get(partition, end if latest else first)
        if not first <= begin <= end:
            raise ValueError(
                f"{url}: the run goes on from message {begin} of {partition}, but it holds {first} to {end}: was the topic "
                "made anew, or has retention taken what was not read? Start a new run folder"
            )
        if partition not in at or ends:
            starts.append(Read(partition, begin, end if ends else -1))
        if begin == end:
            quiet.add(partition)
    return Assigned(partitions, tuple(starts), quiet)
