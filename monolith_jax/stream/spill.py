"""Files for what the joiner holds and has no memory for.

In: record batches and arrays, with the name of a file. Out: the same, in order. Files are only ever appended to, read whole and
removed whole, so nothing is ever looked for, and space is given back with the file. What the kernel keeps of them in its cache
is no memory of the process. Nothing is synced: after a crash the folder is emptied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

_HEADER = 64
"""Bytes before a batch: number of its schema and length, int64 each, and what aligns the batch."""


class Spill:
    """The files."""

    def __init__(self, folder: Path) -> None:
        """Empties the folder."""
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.num_bytes = 0
        """Bytes written so far."""
        self._schemas: list[pa.Schema] = []

    def append_rows(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Appends batches to a file."""
        parts: list[pa.Buffer | bytes] = []
        for batch in batches:
            number = self._number_of(batch.schema)
            message = batch.serialize()
            padding = -message.size % _HEADER
            header = np.array([number, message.size + padding, *[0] * 6], np.int64)
            parts += [header.tobytes(), message, bytes(padding)]
        self._append(name, parts)

    def rows(self, name: str) -> list[pa.RecordBatch]:
        """Returns the batches of a file; none if there is no such file."""
        content = self._content(name)
        buffer, at, batches = pa.py_buffer(content), 0, []
        while at < content.size:
            number, size = content[at : at + 16].view(np.int64)
            batches.append(pa.ipc.read_record_batch(buffer.slice(at + _HEADER, int(size)), self._schemas[number]))
            at += _HEADER + int(size)
        return batches

    def append(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Appends arrays to a file."""
        self._append(name, [np.ascontiguousarray(array).data for array in arrays if array.size])

    def replace(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Writes a file anew."""
        self._append(name, [np.ascontiguousarray(array).data for array in arrays if array.size], "wb")

    def array(self, name: str, dtype: type = np.int64) -> np.ndarray:
        """Returns what was appended to a file, flat; nothing if there is no such file."""
        return self._content(name).view(dtype)

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _number_of(self, schema: pa.Schema) -> int:
        for at in reversed(range(len(self._schemas))):
            if self._schemas[at].equals(schema):
                return at
        self._schemas.append(schema)
        return len(self._schemas) - 1

    def _append(self, name: str, parts: Sequence[pa.Buffer | bytes | memoryview], mode: Literal["ab", "wb"] = "ab") -> None:
        if not parts:
            return
        with open(self.folder / name, mode, buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                self.num_bytes += len(view)
                while view:
                    view = view[file.write(view) :]

    def _content(self, name: str) -> np.ndarray:
        try:
            file = open(self.folder / name, "rb", buffering=0)
        except FileNotFoundError:
            return np.empty(0, np.uint8)
        with file:
            content, at = np.empty(os.fstat(file.fileno()).st_size, np.uint8), 0
            while at < content.size:
                at += file.readinto(content[at:].data)
        return content
