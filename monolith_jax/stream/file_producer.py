"""Appends to a log in a folder.

In: payloads. Out: the segment files that `log_segments` describes. Appends gather in memory until `flush`, or until there is a
megabyte of them; then one write takes them to the operating system, where every reader sees them and where they outlive this
process. They outlive the machine from the next sync on, which comes with the first flush `fsync_s` seconds after the last one.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from monolith_jax.stream.file_log import count_partitions, read_options, topic_folder
from monolith_jax.stream.log import LogPartition
from monolith_jax.stream.log_segments import MAX_PAYLOAD, Segment, frame_header, list_segments, segment_path

_BUFFER_BYTES = 1 << 20
_MOST_PARTS = 1024  # the kernel takes no more in one write
_RETENTION_CHECK_S = 1.0


class FileProducer:
    """Appends to a log in a folder; see `Producer`. For one thread. One process at a time appends to a partition."""

    def __init__(self, folder: Path, options: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> None:
        """Touches no file yet.

        Args:
            folder: The folder of topics; made when it is not there.
            options: By name. `fsync_s`: a flush syncs when so many seconds have passed since the last sync; 0: each does, inf:
                none does. `segment_bytes`: a segment that has so many is full. `retention_bytes`, `retention_s`: the oldest
                segment is removed while the partition has more bytes, or when its last append is so many seconds ago; the
                newest stays.

        Raises:
            ValueError: An option is not understood.
        """
        self._folder = folder
        self._options = read_options(options)
        self._tails: dict[LogPartition, _Tail] = {}

    def create(self, topic: str, partitions: int, forever: bool = False) -> None:
        """Makes a topic unless it is there. Retention is the producer's affair: `forever` changes nothing.

        Raises:
            ValueError: It is there with another number of partitions.
        """
        where = topic_folder(self._folder, topic)
        if partitions < 1:
            raise ValueError(f"topic {topic!r} cannot have {partitions} partitions; it needs one at least")
        there = count_partitions(self._folder, topic)
        if not there:
            # Under another name first: nobody sees a topic with some of its partitions.
            new = self._folder / f".{topic}.{os.getpid()}"
            for number in range(partitions):
                (new / str(number)).mkdir(parents=True, exist_ok=True)
            try:
                new.rename(where)
                return
            except OSError:  # another process was faster
                there = count_partitions(self._folder, topic)
                for number in range(partitions):
                    (new / str(number)).rmdir()
                new.rmdir()
        if there != partitions:
            raise ValueError(
                f"topic {topic!r} in {self._folder} has {there} partitions, not {partitions}. Ask for {there}, or take "
                "another name"
            )

    def next_offset(self, partition: LogPartition) -> int:
        """Returns the offset that the next append gets. From here on no other process can append to the partition.

        Raises:
            ValueError: There is no such partition, or another producer appends to it.
        """
        return self._tail(partition).offset

    def append(self, partition: LogPartition, payload: bytes, schema: int = 0, timestamp_ms: int | None = None) -> None:
        """Appends a message; see `Producer.append`.

        Raises:
            ValueError: There is no such partition, another producer appends to it, or the payload is larger than 1 GiB.
            OSError: What had gathered in memory cannot be written. It is kept, and this message with it: flush again.
        """
        tail = self._tails.get(partition) or self._tail(partition)
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"{partition}: a payload of {len(payload)} bytes; the most is {MAX_PAYLOAD}. Split it")
        tail.append(payload, schema, time.time_ns() // 1_000_000 if timestamp_ms is None else timestamp_ms)

    def flush(self) -> None:
        """Hands all that was appended to the operating system; see `fsync_s`.

        Raises:
            OSError: Some of it was not taken, as on a full disk. It is kept: flush again.
        """
        for tail in self._tails.values():
            tail.flush()

    def close(self) -> None:
        """Flushes, syncs unless `fsync_s` is inf, and lets other producers append."""
        try:
            for tail in self._tails.values():
                tail.flush(last=True)
        finally:
            for tail in self._tails.values():
                tail.close()
            self._tails = {}

    def _tail(self, partition: LogPartition) -> _Tail:
        tail = self._tails.get(partition)
        if tail is None:
            number = count_partitions(self._folder, partition.topic)
            if not 0 <= partition.number < number:
                raise ValueError(
                    f"{self._folder} has no {partition}: topic {partition.topic!r} has {number} partitions. `create` "
                    "makes a topic"
                )
            tail = _Tail(partition, topic_folder(self._folder, partition.topic) / str(partition.number), self._options)
            self._tails[partition] = tail
        return tail


class _Tail:
    """The end of one partition: the open segment, and what waits to be written to it."""

    def __init__(self, partition: LogPartition, where: Path, options: Mapping[str, float]) -> None:
        """Takes the partition's lock, and cuts a torn tail: what readers cannot read and so have not read."""
        self._where = where
        self._options = options
        self._lock = os.open(where / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(
                f"{partition} in {where.parent.parent} has a producer already, and takes one at a time. Close that one, or "
                "append to another partition"
            ) from None
        self._parts: list[bytes] = []
        self._waiting = 0
        self._torn = False
        self._synced_s = self._looked_s = time.monotonic()
        segments = list_segments(where)
        self._file = self._size = self.offset = self._written = 0
        self._start(segments[-1] if segments else 0)
        self._retain()

    def append(self, payload: bytes, schema: int, timestamp_ms: int) -> None:
        """Puts a frame behind those that wait."""
        header = frame_header(self.offset, payload, timestamp_ms, schema)
        self._parts += (header, payload)
        self.offset += 1
        self._waiting += len(header) + len(payload)
        if self._waiting >= _BUFFER_BYTES:
            self._write()

    def flush(self, last: bool = False) -> None:
        """Writes what waits, and syncs when it is time, or in any case if it is the `last` one."""
        if self._parts:
            self._write()
        now_s = time.monotonic()
        fsync_s = self._options["fsync_s"]
        if self._dirty and (now_s - self._synced_s >= fsync_s or (last and fsync_s != float("inf"))):
            os.fdatasync(self._file)
            self._dirty = False
            self._synced_s = now_s
        if now_s - self._looked_s >= _RETENTION_CHECK_S:
            self._looked_s = now_s
            self._retain()

    def close(self) -> None:
        """Closes the files; the lock goes with its file."""
        os.close(self._file)
        os.close(self._lock)

    def _start(self, first: int) -> None:
        """Goes on with a segment; makes it when it is not there."""
        self._file = os.open(segment_path(self._where, first), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        segment = Segment(self._where, first)
        segment.skip_to()
        segment.close()
        self._size = segment.place
        self.offset = max(self.offset, segment.offset)
        if os.fstat(self._file).st_size > self._size:
            os.ftruncate(self._file, self._size)
        self._written = segment.offset
        self._dirty = False
        if self._options["fsync_s"] != float("inf"):
            folder = os.open(self._where, os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(folder)
            os.close(folder)

    def _write(self) -> None:
        if self._size >= self._options["segment_bytes"] and not self._torn:
            full = self._file
            if self._options["fsync_s"] != float("inf"):
                os.fdatasync(full)
            self._start(self._written)
            os.close(full)
            self._retain()
        self._dirty = True
        while self._parts:
            some = self._parts[:_MOST_PARTS]
            written = os.writev(self._file, some)
            self._size += written
            self._waiting -= written
            done = 0
            while done < len(some) and written >= len(some[done]):
                written -= len(some[done])
                done += 1
            del self._parts[:done]
            if written:  # the disk took fewer bytes than it was given: the next write goes on in the middle of a frame
                self._parts[0] = self._parts[0][written:]
            self._written = self.offset - len(self._parts) // 2
            self._torn = written > 0 or len(self._parts) % 2 == 1

    def _retain(self) -> None:
        """Removes the oldest segments while there are too many bytes or they are too old; never the newest."""
        most, age_s = self._options["retention_bytes"], self._options["retention_s"]
        if most == age_s == float("inf"):
            return
        paths = [segment_path(self._where, first) for first in list_segments(self._where)]
        facts = [path.stat() for path in paths]
        total = sum(fact.st_size for fact in facts)
        for path, fact in zip(paths[:-1], facts[:-1], strict=True):
            if total <= most and time.time() - fact.st_mtime <= age_s:
                break
            path.unlink()
            total -= fact.st_size
