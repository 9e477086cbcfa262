"""The cut log: all that decides what a live stream becomes, and is not a function of its events.

In: cuts, as they are made. Out: the same cuts, in order, from any number on. How much of which partition was read, when a batch
was ended early, how far time had gone, what was skipped: a clock or the network decided that. A cut is written, and out of this
process, before its examples are trained on; so a run that goes on after a crash takes the same cuts, up to the last one, and
learns the same. The number of a cut is its offset in a log of its own, in the run folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from monolith_jax.stream.file_log import FileLog
from monolith_jax.stream.file_producer import FileProducer
from monolith_jax.stream.log import LogPartition
from monolith_jax.stream.log_segments import list_segments, segment_path

KEEP_S = 14 * 24 * 3600
"""Cuts are kept for two weeks: a snapshot that is older cannot be gone on from."""
_CUTS = LogPartition("cuts", 0)
_BEFORE = -(1 << 62)


class Read(NamedTuple):
    """Messages of one partition, from one offset up to another, exclusive."""

    partition: LogPartition
    begin: int
    end: int


class Cut(NamedTuple):
    """One step of a live stream."""

    reads: tuple[Read, ...] = ()
    """What it reads, in this order."""
    watermark_ms: int = _BEFORE
    """The event time up to which nothing more is waited for, after what it reads; never going back."""
    ends_batch: bool = False
    """Whether a batch ends behind its examples."""
    starts: tuple[Read, ...] = ()
    """Partitions that are read from `begin` on from now on, before what it reads; `end` -1: without end."""
    skipped: int = 0
    """Messages that `starts` leaves out. What was open is dropped with them."""
    is_last: bool = False
    """Whether the stream ends behind it."""


class CutLog:
    """The cuts of one partition of a run."""

    def __init__(self, folder: Path, first: int = 0) -> None:
        """Opens the cut log in a folder, or starts one, whose first cut then has the number `first`.

        Raises:
            ValueError: Another process has it open.
        """
        self._producer = FileProducer(folder, {"retention_s": str(KEEP_S), "fsync_s": "inf"})
        self._producer.create(_CUTS.topic, 1)
        where = folder / _CUTS.topic / str(_CUTS.number)
        if first and not list_segments(where):
            segment_path(where, first).touch()
        # Takes the partition, so that a second process is refused now, and cuts a torn tail.
        self._producer.next_offset(_CUTS)
        self._log = FileLog(folder)

    @property
    def bounds(self) -> tuple[int, int]:
        """The first cut that is there, and the number of the next one."""
        return self._log.bounds(_CUTS)

    def append(self, cut: Cut) -> None:
        """Appends a cut; it outlives this process when this returns."""
        self._producer.append(_CUTS, to_bytes(cut))
        self._producer.flush()

    def read(self, begin: int, end: int) -> Iterator[Cut]:
        """Yields the cuts [begin, end).

        Raises:
            ValueError: They are not there any more, or damaged.
        """
        first, next_one = self.bounds
        if not first <= begin <= end <= next_one:
            raise ValueError(
                f"the run goes on from cuts {begin} to {end} of its stream, but {first} to {next_one} are there: were files "
                "under the run folder's stream/ removed, or is the snapshot older than two weeks? Take a newer snapshot, or a "
                "new run folder"
            )
        at = begin
        if at < end:
            self._log.seek(_CUTS, at)
        while at < end:
            for message in self._log.poll(end - at, 1 << 20, 1.0).get(_CUTS, []):
                if message.fault or message.offset != at:
                    raise ValueError(f"cut {at} of the run's stream is damaged: {message.fault or 'it is missing'}")
                at += 1
                yield from_bytes(message.payload)

    def close(self) -> None:
        """Lets go of the files."""
        self._producer.close()
        self._log.close()


def sync(folder: Path) -> None:
    """Returns when the cuts in a folder outlive the machine: before a snapshot that needs them is whole.

    Args:
        folder: That of a `CutLog`; any process or thread may have it open.
    """
    where = folder / _CUTS.topic / str(_CUTS.number)
    if not where.exists():
        return  # The stream has not come to its log yet.
    for path in (*sorted(where.glob("*.log"))[-2:], where):  # A segment that was full long ago is on the disk by now.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def to_bytes(cut: Cut) -> bytes:
    """Returns a cut as one line of JSON."""
    rows = {name: [[*read.partition, read.begin, read.end] for read in getattr(cut, name)] for name in ("reads", "starts")}
    return json.dumps({**cut._asdict(), **rows}, separators=(",", ":")).encode()


def from_bytes(data: bytes) -> Cut:
    """Returns the cut that `to_bytes` wrote."""
    fields = json.loads(data)
    for name in ("reads", "starts"):
        fields[name] = tuple(Read(LogPartition(topic, number), begin, end) for topic, number, begin, end in fields[name])
    return Cut(**fields)
