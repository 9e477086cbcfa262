"""Files that are there once they are told: in local folders fsynced, in object stores (`gs://`, `s3://`, `az://`) whole.

In: an `etils.epath.Path` and bytes. Out: the file, its size and its checksum. Nothing is renamed in an object store.
"""

from __future__ import annotations

import importlib.util
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import xxhash
from etils import epath

if importlib.util.find_spec("s3fs") is None:  # epath asks fsspec for `s3`
    fsspec.register_implementation("s3", "monolith_jax.sync.s3_files.S3Files", clobber=True)


def checksum(data: bytes | memoryview) -> str:
    """Returns the 64-bit xxh3 of some bytes, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def is_local(path: epath.Path) -> bool:
    """Says whether a path is of this machine's file systems, not of an object store."""
    return "://" not in str(path)


class CountedFile(io.RawIOBase):
    """Passes on what is written to a file, and knows its size and checksum."""

    def __init__(self, file: Any) -> None:
        """Begins at the start of an open, empty file."""
        super().__init__()
        self._file = file
        self._hash = xxhash.xxh3_64()
        self.size = 0

    def writable(self) -> bool:
        """Says yes."""
        return True

    def write(self, data: Any, /) -> int:
        """Writes all of the data."""
        view = memoryview(data)
        self._hash.update(view)
        self._file.write(view)
        self.size += view.nbytes
        return view.nbytes

    @property
    def told(self) -> list[Any]:
        """Its size in bytes, and its checksum."""
        return [self.size, self._hash.hexdigest()]


@contextmanager
def new_file(path: epath.Path) -> Iterator[CountedFile]:
    """Opens a file for writing; what was written is durable when the block ends."""
    with path.open("wb") as file:
        yield CountedFile(file)
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())


def put(path: epath.Path, data: bytes, durable: bool = True) -> None:
    """Writes a small file whole: a reader finds all of it or none.

    Args:
        path: May be there already.
        data: What it will hold.
        durable: Whether to wait until it would survive a loss of power.
    """
    if not is_local(path):
        with path.open("wb") as file:
            file.write(data)
        return
    draft = path.parent / f".{path.name}.{os.getpid()}-{threading.get_ident()}"
    with draft.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(draft, path)
    if durable:
        sync_folder(path.parent)


def sync_folder(path: epath.Path) -> None:
    """Makes the names in a local folder durable."""
    if is_local(path):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def names_in(path: epath.Path) -> list[str]:
    """Returns the names in a folder as they are now, none where it is not there."""
    _forget_listings(path)
    try:
        return os.listdir(path) if is_local(path) else [one.name for one in path.iterdir()]
    except FileNotFoundError:
        return []


def is_there(path: epath.Path) -> bool:
    """Says whether there is such a file now."""
    if is_local(path):
        return os.path.exists(path)
    _forget_listings(path.parent)
    return path.exists()


def read_whole(path: epath.Path) -> bytes:
    """Returns what a file holds."""
    with path.open("rb") as file:
        return file.read()


def size_of(path: epath.Path) -> int:
    """Returns the bytes of a file."""
    return os.stat(path).st_size if is_local(path) else path.stat().length


def remove(path: epath.Path) -> None:
    """Removes a file or a folder with all in it; it may be gone already."""
    try:
        path.rmtree() if path.is_dir() else path.unlink()
    except FileNotFoundError:
        pass


def _forget_listings(path: epath.Path) -> None:
    """Drops what fsspec remembers of a folder: it would not see what others write there since."""
    file_system = getattr(getattr(path, "_backend", None), "fs", None)
    if file_system is not None:
        file_system(path).invalidate_cache()
