"""The segment files of one partition of a file log: how a message stands in them, and how they are walked.

In: a segment's file, which a producer may be appending to at this moment. Out: `Message`s in order. A frame is a header (magic,
payload length, offset, time, schema, checksum of the payload, checksum of the header; little endian) and the payload. A segment
is named by its first offset. Since the header has a checksum of its own and tells the offset, damage costs the frames it hits
and no other: the walk goes on at the next whole header, and each lost offset comes out as a `Message` with a `fault`.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from monolith_jax.stream.log import Message

MAGIC = b"\xa7mjL"
MAX_PAYLOAD = (1 << 30) - 1
_FIELDS = struct.Struct("<4sIqqQI")
_CHECKSUM = struct.Struct("<I")
_HEADER = struct.Struct("<4sIqqQII")
_CHUNK = 2 << 20  # a read of frames: large against a frame, small against the caches of a core
_SCAN_CHUNK = 64 << 10  # a read of headers alone: most of a large payload is then left unread
_FAULT_BYTES = 1 << 20  # of a stretch without a whole header, this much is handed out


def frame_header(offset: int, payload: bytes, timestamp_ms: int, schema: int) -> bytes:
    """Returns the header of a frame; the payload follows it in the file."""
    fields = _FIELDS.pack(MAGIC, len(payload), offset, timestamp_ms, schema, crc32(payload))
    return fields + _CHECKSUM.pack(crc32(fields))


def segment_path(folder: Path, first: int) -> Path:
    """Returns the file of the segment that starts with an offset."""
    return folder / f"{first:020d}.log"


def list_segments(folder: Path) -> list[int]:
    """Returns the first offsets of a partition's segments, sorted."""
    names = os.listdir(folder)
    return sorted(int(name[:20]) for name in names if len(name) == 24 and name.endswith(".log") and name[:20].isdigit())


class Found(NamedTuple):
    """What stands next in a segment: a frame, or something in the place of one."""

    start: int
    """Position of the payload, or of what is in its place."""
    size: int
    after: int
    """Position of what follows."""
    timestamp_ms: int
    schema: int
    checksum: int
    fault: str


class Segment:
    """Walks one segment file. It reads the file as it grows and stops before a frame that is not all there."""

    def __init__(self, folder: Path, first: int) -> None:
        """Opens the segment that starts with an offset, and stands at its beginning.

        Raises:
            FileNotFoundError: It is not there.
        """
        self.first = first
        self.offset = first
        """Offset of what comes next."""
        self.place = 0
        """Position of what comes next."""
        self.sealed: int | None = None
        """First offset of the segment behind this one, once that is there: what is missing before it is lost, not late."""
        self._file = os.open(segment_path(folder, first), os.O_RDONLY | os.O_CLOEXEC)
        self._data = b""
        self._data_start = 0
        self._size = 0
        self._time = 0
        self._searched = (-1, -1)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def skip_to(self, offset: int | None = None) -> None:
        """Goes to an offset, or as far as there are whole frames. Payloads are not checked."""
        while offset is None or self.offset < offset:
            found = self._next(whole=False)
            if found is None:
                return
            self._pass(found)

    def skip_to_time(self, timestamp_ms: int) -> int | None:
        """Goes to the first message of this time or later, and returns its time; none, at the end, if there is none."""
        while (found := self._next(whole=False)) is not None:
            if not found.fault and found.timestamp_ms >= timestamp_ms:
                return found.timestamp_ms
            self._pass(found)
        return None

    def read(self, most: int, room: int, any_size: bool, into: list[Message]) -> tuple[int, bool]:
        """Appends the next messages to `into`.

        Args:
            most: At most so many messages.
            room: At most so many payload bytes.
            any_size: The first message may be larger than `room`.
            into: Gets the messages.

        Returns:
            How many bytes were taken, and whether the walk stopped because nothing whole is left.
        """
        taken = 0
        while most > 0:
            found = self._next(whole=True)
            if found is None:
                return taken, True
            start, size, _, timestamp_ms, schema, checksum, fault = found
            if size > room - taken and not any_size:
                return taken, False
            if fault:
                payload = os.pread(self._file, size, start)
            else:
                payload = self._data[start - self._data_start : start - self._data_start + size]
                if crc32(payload) != checksum:
                    fault = "damaged: checksum of the payload"
            into.append(Message(self.offset, payload, timestamp_ms, schema, fault))
            self._pass(found)
            taken += size
            most -= 1
            any_size = False
        return taken, False

    def _pass(self, found: Found) -> None:
        self.place = found.after
        self.offset += 1
        self._time = found.timestamp_ms

    def _next(self, whole: bool) -> Found | None:
        """Returns what stands next, none if it is not all there; `whole`: the payload is in `_data` then."""
        at = self.place - self._data_start
        data = self._data
        if at < 0 or at + _HEADER.size > len(data):
            if not self._fill(_HEADER.size, _CHUNK if whole else _SCAN_CHUNK):
                return self._end()
            at, data = 0, self._data
        magic, size, offset, timestamp_ms, schema, checksum, own = _HEADER.unpack_from(data, at)
        if magic != MAGIC or offset < self.offset or crc32(data[at : at + _FIELDS.size]) != own:
            return self._resync()
        if offset > self.offset:
            return Found(self.place, 0, self.place, self._time, 0, 0, "damaged: lost")
        start = self.place + _HEADER.size
        if whole:
            if at + _HEADER.size + size > len(data):
                # Looked at again from its header on: a producer may have cut a torn tail and put another frame here.
                return self._next(whole) if self._fill(_HEADER.size + size, _CHUNK) else self._end()
        elif start + size > self._size:
            self._size = os.fstat(self._file).st_size
            if start + size > self._size:
                return self._end()
        return Found(start, size, start + size, timestamp_ms, schema, checksum, "")

    def _fill(self, need: int, chunk: int) -> bool:
        self._data = os.pread(self._file, max(need, chunk), self.place)
        self._data_start = self.place
        return len(self._data) >= need

    def _end(self) -> Found | None:
        """Returns the lost message that stands where whole frames end; none if that may still be written."""
        self._data = b""  # a producer may put something else here
        if self.sealed is None or self.offset >= self.sealed:
            return None
        end = max(self.place, os.fstat(self._file).st_size)
        size = min(end - self.place, _FAULT_BYTES)
        return Found(self.place, size, end, self._time, 0, 0, "damaged: the segment ends before it")

    def _resync(self) -> Found | None:
        """Returns the stretch up to the next whole header, as one message; the other offsets lost in it follow it."""
        state = (self.place, os.fstat(self._file).st_size)
        if self._searched == state:  # a tail of damage is searched again only when it has grown
            return self._end()
        at = self._find_header(self.place)
        self._data = b""
        if at is None:
            self._searched = state
            return self._end()
        place, offset = at
        if offset == self.offset:  # no message was lost: a producer has replaced what stood here, or someone put bytes in
            self.place = place
            return self._next(whole=True)
        return Found(
            self.place, min(place - self.place, _FAULT_BYTES), place, self._time, 0, 0, "damaged: checksum of the header"
        )

    def _find_header(self, start: int) -> tuple[int, int] | None:
        """Returns position and offset of the first whole header from a position on."""
        while True:
            data = os.pread(self._file, _CHUNK, start)
            index = data.find(MAGIC)
            while 0 <= index <= len(data) - _HEADER.size:
                _, _, offset, _, _, _, own = _HEADER.unpack_from(data, index)
                if offset >= self.offset and crc32(data[index : index + _FIELDS.size]) == own:
                    return start + index, offset
                index = data.find(MAGIC, index + 1)
            if len(data) < _CHUNK:
                return None
            start += len(data) - _HEADER.size + 1
