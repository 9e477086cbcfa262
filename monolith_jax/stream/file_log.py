"""A log in a folder: segment files that one process a partition appends to and any number of processes read.

In: `file:///folder`. Out: `FileLog`. The files are `<folder>/<topic>/<partition>/<first offset, 20 digits>.log`;
`log_segments` describes their frames, `file_producer` writes them. Readers and producer share only the files: a reader sees a
message once all of it has reached the operating system, and looks for more every few milliseconds.
"""

from __future__ import annotations

import bisect
import re
import time
from collections.abc import Callable, Mapping, Sequence, Set
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from monolith_jax.stream.log import LogPartition, Message, take_turns
from monolith_jax.stream.log_segments import Segment, list_segments

OPTIONS = {
    "fsync_s": 1.0,
    "retention_bytes": float("inf"),
    "retention_s": float("inf"),
    "segment_bytes": float(64 << 20),
}
"""What a producer takes, and its value when it is not given; a reader takes the same names, so that both can share a list."""
Found = TypeVar("Found")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.005, 0.020
_NO_LIMIT = 1 << 62
_TOPIC = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def folder_of(url: str) -> Path:
    """Returns the folder that `file:///folder` names.

    Raises:
        ValueError: It names none.
    """
    scheme, _, rest = url.partition("://")
    if scheme != "file" or not rest.startswith("/") or rest == "/":
        raise ValueError(f"{url!r} names no folder; write file:///absolute/folder, with three slashes")
    return Path(unquote(rest))


def read_options(options: Mapping[str, str] | Sequence[tuple[str, str]]) -> dict[str, float]:
    """Returns every option with its value.

    Raises:
        ValueError: A name is unknown, or a value is no number of the right sign.
    """
    values = dict(OPTIONS)
    for name, text in options.items() if isinstance(options, Mapping) else options:
        if name not in values:
            near = get_close_matches(name, OPTIONS, 2, 0.4) or sorted(OPTIONS)
            raise ValueError(
                f"a file log has no option {name!r}; nearest: {', '.join(near)}. All: {', '.join(sorted(OPTIONS))}"
            )
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = -1.0
        if not values[name] >= 0 or (name == "segment_bytes" and values[name] < 1):
            raise ValueError(f"option {name} of a file log is {text!r}; expected a number that is not negative, or inf")
    return values


def topic_folder(folder: Path, topic: str) -> Path:
    """Returns where a topic stands.

    Raises:
        ValueError: It cannot be the name of a topic.
    """
    if not _TOPIC.fullmatch(topic):
        raise ValueError(f"{topic!r} is no name of a topic; use letters, digits, '-', '_' and, but for the first, '.'")
    return folder / topic


def count_partitions(folder: Path, topic: str) -> int:
    """Returns how many partitions a topic has, 0 if it is not there."""
    where = topic_folder(folder, topic)
    return sum(name.name.isdigit() for name in where.iterdir()) if where.is_dir() else 0


class FileLog:
    """Reads a log in a folder; see `Log`. For one thread."""

    def __init__(self, folder: Path, options: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> None:
        """Opens the log.

        Args:
            folder: The folder of topics.
            options: `OPTIONS`, by name; they matter to a producer.

        Raises:
            ValueError: There is no such folder, or an option is not understood.
        """
        read_options(options)
        if not folder.is_dir():
            raise ValueError(
                f"there is no log at {folder}: no such folder. A producer makes it; start that first, or look at the address"
            )
        self._folder = folder
        self._cursors: dict[LogPartition, _Cursor] = {}
        self._ends: dict[LogPartition, Segment] = {}
        self._paused: frozenset[LogPartition] = frozenset()
        self._turn = 0

    def num_partitions(self, topic: str) -> int:
        """Returns how many partitions a topic has.

        Raises:
            ValueError: There is no such topic.
        """
        number = count_partitions(self._folder, topic)
        if not number:
            there = sorted(path.name for path in self._folder.iterdir() if path.is_dir() and not path.name.startswith("."))
            raise ValueError(
                f"{self._folder} has no topic {topic!r}; it has: {', '.join(there) or 'none'}. A producer's `create` makes one"
            )
        return number

    def bounds(self, partition: LogPartition, within_s: float = 0.0) -> tuple[int, int]:
        """Returns the first offset that is still there, and the one behind the last message. Files answer at once."""
        where = self._where(partition)
        segments = list_segments(where)
        return (segments[0], self._end(partition, where)) if segments else (0, 0)

    def offset_at(self, partition: LogPartition, timestamp_ms: int) -> int:
        """Returns the first offset appended at or after a time; the end if there is none.

        Times are taken to grow with the offsets: where they do not, messages before the result may be as late.
        """
        where = self._where(partition)

        def starts_late(first: int) -> bool:
            segment = _open(where, first)
            if segment is None:
                return False  # retention took it: the answer stands in a later one
            time_ms = segment.skip_to_time(-_NO_LIMIT)
            late = time_ms is not None and time_ms >= timestamp_ms
            segment.close()
            return late

        segments = list_segments(where)
        index = bisect.bisect_left(segments, True, key=starts_late)
        for first in segments[max(0, index - 1) : index + 1]:
            segment = _open(where, first)
            if segment is None:
                continue
            found = segment.skip_to_time(timestamp_ms)
            segment.close()
            if found is not None:
                return segment.offset
        return self.bounds(partition)[1]

    def seek(self, partition: LogPartition, offset: int) -> None:
        """Reads this partition from an offset on. Whether that is there, the next read says.

        Raises:
            ValueError: There is no such partition, or the offset is negative.
        """
        if offset < 0:
            raise ValueError(f"{partition} cannot be read from offset {offset}; offsets start at 0")
        where = self._where(partition)
        if partition in self._cursors:
            self._cursors[partition].close()
        self._cursors[partition] = _Cursor(partition, where, offset)

    def at(self, partition: LogPartition) -> int:
        """Returns where a partition is read."""
        return self._cursors[partition].offset

    def poll(self, max_messages: int, max_bytes: int, timeout_s: float) -> dict[LogPartition, list[Message]]:
        """Returns the next messages of the partitions that are not paused; see `Log.poll`."""
        found = _wait(lambda: self._read(max_messages, max_bytes), time.monotonic() + timeout_s)
        return found or {}

    def _read(self, most: int, room: int) -> dict[LogPartition, list[Message]]:
        names = [name for name in self._cursors if name not in self._paused]
        if not names:
            return {}
        self._turn = (self._turn + 1) % len(names)
        return take_turns(names[self._turn :] + names[: self._turn], most, room, self._read_one)

    def _read_one(self, name: LogPartition, most: int, room: int, any_size: bool, into: list[Message]) -> int:
        return self._cursors[name].read(most, room, any_size, into)

    def read_to(self, partition: LogPartition, end: int) -> list[Message]:
        """Returns the messages up to offset `end`, exclusive; waits until they are there. See `Log.read_to`."""
        cursor = self._cursors[partition]
        messages: list[Message] = []

        def is_there() -> bool:
            cursor.read(max(0, end - cursor.offset), _NO_LIMIT, True, messages)
            return cursor.offset >= end

        _wait(is_there, float("inf"))
        return messages

    def pause(self, partitions: Set[LogPartition]) -> None:
        """Makes `poll` leave these out, and no others."""
        self._paused = frozenset(partitions)

    def unread(self) -> dict[LogPartition, int]:
        """Returns how many messages each sought partition has ahead of where it is read."""
        return {name: max(0, self._end(name, cursor.where) - cursor.offset) for name, cursor in self._cursors.items()}

    def close(self) -> None:
        """Closes the files."""
        for one in (*self._cursors.values(), *self._ends.values()):
            one.close()
        self._cursors, self._ends = {}, {}

    def _where(self, partition: LogPartition) -> Path:
        number = self.num_partitions(partition.topic)
        if not 0 <= partition.number < number:
            raise ValueError(
                f"topic {partition.topic!r} has partitions 0 to {number - 1}, none with the number {partition.number}"
            )
        return self._folder / partition.topic / str(partition.number)

    def _end(self, partition: LogPartition, where: Path) -> int:
        """Returns the offset behind the last message; walks on from where the end was the last time."""
        while segments := list_segments(where):
            end = self._ends.get(partition)
            if end is None or end.first != segments[-1]:
                new = _open(where, segments[-1])
                if new is None:
                    continue
                if end is not None:
                    end.close()
                self._ends[partition] = end = new
            end.skip_to()
            return end.offset
        return 0


class _Cursor:
    """Where one partition is read."""

    def __init__(self, partition: LogPartition, where: Path, offset: int) -> None:
        self.partition = partition
        self.where = where
        self._start = offset
        self._segment: Segment | None = None
        self._removed = False

    @property
    def offset(self) -> int:
        """Offset of the message that comes next."""
        return self._start if self._segment is None else self._segment.offset

    def close(self) -> None:
        """Closes the segment that is read."""
        if self._segment is not None:
            self._start = self._segment.offset
            self._segment.close()
            self._segment = None

    def read(self, most: int, room: int, any_size: bool, into: list[Message]) -> int:
        """Appends the next messages to `into` and returns how many payload bytes they have; see `Segment.read`."""
        taken = 0
        before = len(into)
        while len(into) - before < most and self._open():
            assert self._segment is not None
            left = most - len(into) + before
            more, ended = self._segment.read(left, room - taken, any_size and len(into) == before, into)
            taken += more
            if not ended or not self._go_on():
                break
        return taken

    def _go_on(self) -> bool:
        """Says whether to read on: once more in a segment that was found to be full only now, then in the next one."""
        segment = self._segment
        assert segment is not None
        if segment.sealed is not None or self._removed:
            self.close()
            return True
        segments = list_segments(self.where)
        later = [first for first in segments if first > segment.first]
        if not later:
            return False
        if segment.first in segments:
            segment.sealed = later[0]
        else:
            self._removed = True  # by retention, and perhaps the next one with it: `later` does not tell where this one ends
        return True

    def _open(self) -> bool:
        """Opens the segment that has the next offset; says whether there is one.

        Raises:
            ValueError: Retention took the offset, or the log ends before it.
        """
        while self._segment is None:
            segments = list_segments(self.where)
            if not segments and self._start == 0:
                return False
            if not segments:
                raise ValueError(_beyond(self.partition, self._start, 0))
            if self._start < segments[0]:
                raise ValueError(_gone(self.partition, self._start, segments[0]))
            index = bisect.bisect_right(segments, self._start) - 1
            segment = _open(self.where, segments[index])
            if segment is None:
                continue
            segment.sealed = segments[index + 1] if index + 1 < len(segments) else None
            segment.skip_to(self._start)
            if segment.offset < self._start:
                segment.close()
                raise ValueError(_beyond(self.partition, self._start, segment.offset))
            self._segment = segment
            self._removed = False
        return True


def _open(where: Path, first: int) -> Segment | None:
    """Opens a segment, none if retention has just taken it."""
    try:
        return Segment(where, first)
    except FileNotFoundError:
        return None


def _gone(partition: LogPartition, wanted: int, first: int) -> str:
    return (
        f"{partition} was to be read from offset {wanted}, but retention has taken what is before offset {first}. Start "
        f"from {first}, and keep more (retention_s, retention_bytes) or read more often"
    )


def _beyond(partition: LogPartition, wanted: int, end: int) -> str:
    return (
        f"{partition} was to be read from offset {wanted}, but it ends at {end}: it is another log than the one where that "
        "offset was, or has lost its end. Start from an offset within it"
    )


def _wait(attempt: Callable[[], Found], until: float) -> Found:
    """Returns what an attempt finds; tries again until it finds something or the time is over."""
    pause_s = _FIRST_WAIT_S
    while not (found := attempt()):
        left_s = until - time.monotonic()
        if left_s <= 0:
            break
        time.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * 1.3, _LONGEST_WAIT_S)
    return found
