"""What the joiner holds and has no memory for, in an embedded key-value store (LMDB).

In: record batches and arrays, with a name. Out: the same, in order. What has a name is only ever appended to, read whole and
removed whole; what was removed is written over. What the kernel keeps of the store in its cache is no memory of the process.
Nothing is synced: after a crash the folder is emptied.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa

_HEADER = 64
"""Bytes before a batch: number of its schema and length, int64 each, and what aligns the batch."""
_MOST_BYTES = 1 << 38
"""Room in the address space, and the file's size: it has holes, and takes as much of the disk as it held at the most."""


class Spill:
    """The store."""

    def __init__(self, folder: Path) -> None:
        """Empties the folder."""
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.num_bytes = 0
        """Bytes written so far."""
        self._schemas: list[pa.Schema] = []
        self._num_parts: dict[str, int] = {}
        self._store: lmdb.Environment | None = None

    def append_rows(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Appends batches."""
        parts: list[pa.Buffer | bytes] = []
        for batch in batches:
            number = self._number_of(batch.schema)
            message = batch.serialize()
            padding = -message.size % _HEADER
            header = np.array([number, message.size + padding, *[0] * 6], np.int64)
            parts += [header.tobytes(), message, bytes(padding)]
        self._append(name, parts)

    def rows(self, name: str) -> list[pa.RecordBatch]:
        """Returns the batches of a name; none if nothing was appended."""
        content = self._content(name)
        buffer, at, batches = pa.py_buffer(content), 0, []
        while at < content.size:
            number, size = content[at : at + 16].view(np.int64)
            batches.append(pa.ipc.read_record_batch(buffer.slice(at + _HEADER, int(size)), self._schemas[number]))
            at += _HEADER + int(size)
        return batches

    def append(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Appends arrays."""
        self._append(name, [np.ascontiguousarray(array).data for array in arrays if array.size])

    def replace(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Writes a name anew."""
        self.remove(name)
        self.append(name, arrays)

    def array(self, name: str, dtype: type = np.int64) -> np.ndarray:
        """Returns what was appended, flat; nothing if nothing was."""
        return self._content(name).view(dtype)

    def remove(self, name: str) -> None:
        """Removes a name if it is there."""
        if number := self._num_parts.pop(name, 0):
            with self._opened().begin(write=True) as transaction:
                for part in range(number):
                    transaction.delete(_key(name, part))

    def close(self) -> None:
        """Removes the folder."""
        if self._store is not None:
            self._store.close()
            self._store = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _opened(self) -> lmdb.Environment:
        if self._store is None:
            flags = {"sync": False, "metasync": False, "lock": False, "meminit": False, "readahead": False, "writemap": True}
            self._store = lmdb.open(str(self.folder), map_size=_MOST_BYTES, **flags)
        return self._store

    def _number_of(self, schema: pa.Schema) -> int:
        for at in reversed(range(len(self._schemas))):
            if self._schemas[at].equals(schema):
                return at
        self._schemas.append(schema)
        return len(self._schemas) - 1

    def _append(self, name: str, parts: Sequence[pa.Buffer | bytes | memoryview]) -> None:
        if not parts:
            return
        value = b"".join(memoryview(part).cast("B") for part in parts)
        self.num_bytes += len(value)
        number = self._num_parts.get(name, 0)
        with self._opened().begin(write=True) as transaction:
            transaction.put(_key(name, number), value)
        self._num_parts[name] = number + 1

    def _content(self, name: str) -> np.ndarray:
        number = self._num_parts.get(name, 0)
        if not number:
            return np.empty(0, np.uint8)
        with self._opened().begin(buffers=True) as transaction:
            parts = [np.frombuffer(transaction.get(_key(name, part), b""), np.uint8) for part in range(number)]
            # A copy: the pages may be written over when the transaction has ended.
            return np.concatenate(parts)


def _key(name: str, part: int) -> bytes:
    return f"{name}/{part:08x}".encode()
