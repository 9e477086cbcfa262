"""Files that are not on this machine: on an S3 server, or in HDFS by its own protocol or by WebHDFS.

In: `s3://bucket/key`, `hdfs://namenode:port/path` (or a name service of `HADOOP_CONF_DIR`), `webhdfs://host:port/path`; names
are taken as they are, nothing is percent-decoded. Out: a `RemotePath` with what table files ask of a `Path`, and patterns of
`glob` expanded. All options are environment variables, so that keys stand in no config and no message: those of S3 clients
(`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_PROFILE`, ...) and of Hadoop's
(`HADOOP_CONF_DIR`, `HADOOP_USER_NAME`).

S3 is pyarrow's own client. HDFS is `hdfs-native`, which needs no Java, and not pyarrow's, which needs libhdfs beside it;
WebHDFS is fsspec's. Both are in the extra `hdfs`.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

SCHEMES = ("s3", "hdfs", "webhdfs")
BUFFER_BYTES = 1 << 20
_FIRST_BLOCK_BYTES, _BLOCK_BYTES = 1 << 18, 1 << 23
_S3_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
_S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a file without opening it."""

    st_size: int
    """Bytes."""
    st_mtime_ns: int
    """When it was written, nanoseconds since 1970; 0 where the server does not say."""


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file of another machine, with the part of `pathlib.Path` that readers of tables use."""

    url: str
    """`scheme://authority/path`."""

    def __post_init__(self) -> None:
        """Raises ValueError if this is none of the URLs that can be read."""
        scheme, _, rest = self.url.partition("://")
        authority, _, path = rest.partition("/")
        if scheme not in SCHEMES:
            known = ", ".join(f"{one}://" for one in SCHEMES)
            raise ValueError(f"{self.url}: cannot read {scheme}://; a path is local or starts with one of {known}")
        if not authority:
            raise ValueError(f"{self.url}: there is no {'bucket' if scheme == 's3' else 'host'} after {scheme}://")
        if "@" in authority:
            raise ValueError(
                f"{scheme}://...@{authority.rpartition('@')[2]}/{path}: keys do not belong into a path, which is logged; set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (S3) or HADOOP_USER_NAME (HDFS)"
            )

    def __str__(self) -> str:
        """Returns the URL."""
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last dot of the name and what follows, "" without."""
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder."""
        return RemotePath(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> RemotePath:
        """Returns a path in this folder."""
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def absolute(self) -> RemotePath:
        """Returns itself."""
        return self

    def exists(self) -> bool:
        """Says whether there is a file or folder."""
        return self._info().type != fs.FileType.NotFound

    def is_file(self) -> bool:
        """Says whether there is a file."""
        return self._info().type == fs.FileType.File

    def stat(self) -> Status:
        """Returns the size and the time of the file.

        Raises:
            FileNotFoundError: There is none.
        """
        info = self._info()
        if info.type != fs.FileType.File:
            raise FileNotFoundError(f"{self.url}: there is no such file")
        return Status(info.size, info.mtime_ns or 0)

    def open(self, mode: Literal["rb"] = "rb") -> IO[bytes]:
        """Opens the file for reading from front to back."""
        assert mode == "rb", "files of other machines are read only"
        return cast(IO[bytes], io.BufferedReader(_Ahead(_WholeFile(self.open_random(), self.url)), BUFFER_BYTES))

    def open_random(self) -> pa.NativeFile:
        """Opens the file for pyarrow's readers, which ask for no bytes but those they need."""
        where, path = self.filesystem()
        if self.url.startswith("s3://"):
            return where.open_input_file(path)
        opened = cast(Any, where).handler.fs.open(path, "rb", **({"cache_type": "none"} if self.url[0] == "w" else {}))
        return pa.PythonFile(_WholeFile(opened, self.url), mode="r")

    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """Returns where the file is, and what it is called there.

        Raises:
            ImportError: The client of HDFS is not installed.
        """
        scheme, _, rest = self.url.partition("://")
        authority, _, path = rest.partition("/")
        if scheme == "s3":
            return s3_files(authority), rest.rstrip("/")
        return _hadoop(scheme, authority, os.environ.get("HADOOP_USER_NAME", "")), "/" + path.rstrip("/")

    def _info(self) -> fs.FileInfo:
        try:
            where, path = self.filesystem()
            return where.get_file_info(path)
        except OSError as error:
            raise ValueError(f"{self.url}: cannot be looked up: {error}") from error

    def children(self) -> list[tuple[RemotePath, bool]]:
        """Returns what is in the folder, by name, and whether each is a folder; nothing where there is no folder."""
        where, path = self.filesystem()
        try:
            found = where.get_file_info(fs.FileSelector(path, allow_not_found=True))
        except NotADirectoryError:
            found = []
        named = sorted((one.base_name, one.type == fs.FileType.Directory) for one in found)
        return [(self / name, is_folder) for name, is_folder in named if name]


AnyPath = Path | RemotePath


@contextmanager
def opened_parquet(path: AnyPath) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file. Of a remote one the columns asked for are fetched a row group at a time."""
    with ExitStack() as stack:
        remote = isinstance(path, RemotePath)
        source = stack.enter_context(path.open_random()) if remote else path
        yield stack.enter_context(
            pq.ParquetFile(
                source, pre_buffer=remote, buffer_size=0 if remote else BUFFER_BYTES, page_checksum_verification=True
            )
        )


class _WholeFile(io.RawIOBase):
    """Reads another file, and takes no short answer for its end: what is missing of a file would be lost in silence."""

    def __init__(self, file: Any, name: str) -> None:
        """Goes to the start of an open file."""
        super().__init__()
        self._file, self._name, self._at = file, name, 0
        self._size = file.size() if isinstance(file, pa.NativeFile) else _size_of(file)

    def readable(self) -> bool:
        """Says yes."""
        return True

    def seekable(self) -> bool:
        """Says yes."""
        return True

    def tell(self) -> int:
        """Returns the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Goes to an offset."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def size(self) -> int:
        """Returns the bytes of the file."""
        return self._size

    def read(self, size: int = -1, /) -> bytes:
        """Returns so many bytes, fewer only at the end."""
        left = max(self._size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        try:
            self._file.seek(self._at)
            data = self._file.read(wanted)
        except OSError as error:
            raise OSError(f"{self._name}: cannot be read at byte {self._at} of {self._size}: {error}") from error
        if len(data) != wanted:
            raise OSError(f"{self._name}: {len(data)} bytes came of {wanted} at {self._at}; the file has {self._size}")
        self._at += wanted
        return bytes(data)

    def readinto(self, buffer: Any, /) -> int:
        """Fills a buffer; less only at the end."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            close = getattr(self._file, "close", None)
            if close:
                close()
        super().close()


class _Ahead(io.RawIOBase):
    """Reads a file from front to back: in blocks that grow, so that a header costs little, each fetched while one is used."""

    def __init__(self, file: _WholeFile) -> None:
        """Goes to the start of an open file."""
        super().__init__()
        self._file, self._at, self._rest = file, 0, memoryview(b"")
        self._block_bytes = _FIRST_BLOCK_BYTES
        self._fetcher = ThreadPoolExecutor(1)
        self._next: Future[bytes] | None = None

    def readable(self) -> bool:
        """Says yes."""
        return True

    def seekable(self) -> bool:
        """Says yes."""
        return True

    def tell(self) -> int:
        """Returns the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Goes to an offset."""
        to = offset + (0, self._at, self._file.size())[whence]
        if to != self._at:
            self._drop()
            self._at = self._file.seek(to)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fills a buffer as far as the next block goes; returns 0 at the end only."""
        if not self._rest:
            more = self._next is not None or self._block_bytes > _FIRST_BLOCK_BYTES
            data = self._next.result() if self._next else self._file.read(self._block_bytes)
            self._block_bytes = min(2 * self._block_bytes, _BLOCK_BYTES)
            self._next = self._fetcher.submit(self._file.read, self._block_bytes) if data and more else None
            self._rest = memoryview(data)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest, self._at = self._rest[size:], self._at + size
        return size

    def _drop(self) -> None:
        """Forgets what was fetched, and what is being fetched once it has come."""
        if self._next:
            wait([self._next])
        self._next, self._rest, self._block_bytes = None, memoryview(b""), _FIRST_BLOCK_BYTES

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            self._drop()
            self._fetcher.shutdown()
            self._file.close()
        super().close()


def _size_of(file: Any) -> int:
    size = getattr(file, "size", None)
    if isinstance(size, int):
        return size
    file.seek(0, 2)
    return file.tell()


def s3_files(bucket: str = "") -> fs.FileSystem:
    """Returns a client of S3 as the environment says; "": for buckets of the region that it names."""
    return _s3(bucket, tuple(os.environ.get(name, "") for name in (*_S3_VARIABLES, *_S3_KEYS)))


@lru_cache(maxsize=64)
def _s3(bucket: str, environment: tuple[str, ...]) -> fs.FileSystem:
    """Returns a client; anew where the environment is another."""
    endpoint_s3, endpoint, region, default_region = environment[: len(_S3_VARIABLES)]
    endpoint, region = endpoint_s3 or endpoint, region or default_region
    if not region:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket) if bucket else None
    # Without background writes a large file is sent as it is read; with them all of it may wait in memory.
    return fs.S3FileSystem(endpoint_override=endpoint or None, region=region, background_writes=False)


@lru_cache(maxsize=64)
def _hadoop(scheme: str, authority: str, user: str) -> fs.FileSystem:
    host, _, port = authority.partition(":")
    if port and not port.isdigit():
        raise ValueError(f"{scheme}://{authority}: {port!r} is no port")
    try:
        if scheme == "hdfs":
            from hdfs_native.fsspec import HdfsFileSystem  # pyright: ignore[reportMissingImports]

            client = HdfsFileSystem(host, int(port) if port else None)
        else:
            from fsspec.implementations.webhdfs import WebHDFS

            client = WebHDFS(host, int(port or 9870), user=user or None, use_listings_cache=False)
    except ImportError as error:
        raise ImportError(f"{scheme}:// needs more packages; pip install 'monolith_jax[hdfs]' ({error})") from error
    return fs.PyFileSystem(fs.FSSpecHandler(client))


def is_remote(path: str) -> bool:
    """Says whether a path is a URL."""
    return "://" in path


def path_of(path: str) -> AnyPath:
    """Returns a local path, or one of another machine where it is a URL.

    Raises:
        ValueError: It is a URL that cannot be read.
    """
    return RemotePath(path) if is_remote(path) else Path(path)


def joined(folder: str, path: str) -> str:
    """Returns a path that starts in a folder, unless it is absolute; "" is the working folder."""
    if not folder or is_remote(path) or path.startswith("/"):
        return path
    return f"{folder.rstrip('/')}/{path}" if is_remote(folder) else str(Path(folder) / path)


def matching(pattern: str) -> list[str]:
    """Returns what a pattern of `glob` stands for, in name order; a name without `*?[`, or one that is there, for itself."""
    if not glob.has_magic(pattern) or path_of(pattern).exists():
        return [pattern]
    if not is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    scheme, _, rest = pattern.partition("://")
    authority, *parts = rest.split("/")
    return sorted(set(_expanded(RemotePath(f"{scheme}://{authority}"), tuple(part for part in parts if part))))


def _expanded(folder: RemotePath, parts: tuple[str, ...]) -> Iterator[str]:
    """Yields what is in a folder and matches, folder by folder: no more is listed than that takes. Some may come twice."""
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    for part in parts[:plain]:
        folder = folder / part
    if plain == len(parts):
        if folder.exists():
            yield str(folder)
        return
    part, rest = parts[plain], parts[plain + 1 :]
    if part == "**" and rest:
        yield from _expanded(folder, rest)
    for child, is_folder in folder.children():
        hidden = child.name.startswith(".") and not part.startswith(".")
        if hidden or not (part == "**" or fnmatch.fnmatchcase(child.name, part)):
            continue
        if not rest:
            yield str(child)
        if is_folder and (part == "**" or rest):
            yield from _expanded(child, parts[plain:] if part == "**" else rest)
