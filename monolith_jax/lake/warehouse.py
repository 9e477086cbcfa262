"""A warehouse: a folder or a bucket that holds the tables of the lake.

In: its address, and options for an object store. Out: Paimon tables, made where they are missing. Reading and writing go
through Paimon's Rust core, which alone merges columns of several streams by their times.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from monolith_jax.lake.tables import DATABASE, GROUPS, Subject, events_schema, features_log_schema, features_schema, key_of
from monolith_jax.stream.events import EXAMPLE

BUCKETS = 4
"""Parts of a features table that are written and merged apart."""
NATIVE = {"write.native.enabled": "true", "read.native.enabled": "true", "commit.native.enabled": "true"}
EVERY_EPOCH = {"snapshot.ignore-empty-commit": "false"}
"""An epoch that brings a table nothing leaves a snapshot all the same: it tells where its writer is."""
EXAMPLES_FIRST = (
    pa.field("day", pa.string(), nullable=False),
    pa.field("part", pa.int32(), nullable=False),
    pa.field("stream_row", pa.int64(), nullable=False),
)
"""Columns of `examples` before those of an example: the day of the watermark when it was written, which partition of the stream
it is of, and its number there, from 0 without a gap."""
_S3 = {
    "endpoint": ("endpoint", "AWS_ENDPOINT_URL"),
    "region": ("region", "AWS_REGION"),
    "access-key": ("accessKeyId", "AWS_ACCESS_KEY_ID"),
    "secret-key": ("accessKeySecret", "AWS_SECRET_ACCESS_KEY"),
    "path-style-access": ("path-style-access", ""),
}
"""Options `s3.<name>` as Java and the Rust core read them; `fs.s3.<name>` of the Python side; variables of the environment."""
_COMMITS = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class WarehouseConfig:
    """Where the lake is."""

    path: str
    """Folder, or `s3://bucket/path`."""
    options: tuple[tuple[str, str], ...] = ()
    """Options of the catalog: of an object store `s3.endpoint` and `s3.region`, where they are not in the environment, as S3's
    clients read it (`AWS_ENDPOINT_URL`, `AWS_REGION`); keys are in the environment (`AWS_ACCESS_KEY_ID`, ...)."""

    def __post_init__(self) -> None:
        """Raises ValueError if there is no path, or a secret among the options."""
        if not self.path:
            raise ValueError("WarehouseConfig.path is empty; name a folder, or s3://bucket/path")
        if secret := [name for name, _ in self.options if "secret" in name.lower()]:
            raise ValueError(
                f"WarehouseConfig.options has {secret[0]}, and every run folder holds its configuration: put keys into the "
                "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return "://" not in self.path


def catalog_of(config: WarehouseConfig) -> Any:
    """Returns the catalog of a warehouse, which is made if need be.

    Raises:
        ImportError: The extra `lake` is not installed.
    """
    try:
        from pypaimon import CatalogFactory  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the lake needs the extra `lake`: pip install 'monolith_jax[lake]'") from error
    options = dict(config.options)
    if not config.is_local:
        options = _for_s3(options)
    path = str(Path(config.path).absolute()) if config.is_local else config.path
    return CatalogFactory.create({"warehouse": path, **options})


def _for_s3(options: dict[str, str]) -> dict[str, str]:
    """Returns options as both sides of pypaimon read them, with those of the environment where they are not given."""
    found = dict(options)
    for name, (python, variable) in _S3.items():
        value = options.get(f"s3.{name}") or os.environ.get(variable, "")
        if not value and name == "path-style-access" and found.get("s3.endpoint"):
            value = "true"  # Servers other than Amazon's seldom have a name for each bucket.
        if value:
            found |= {f"s3.{name}": value, f"fs.s3.{python}": value}
    return found


def open_table(config: WarehouseConfig, name: str) -> Any:
    """Returns a table as it is now.

    Raises:
        ValueError: There is no such table.
        ImportError: The extra `lake` is not installed.
    """
    catalog = catalog_of(config)
    try:
        return catalog.get_table(f"{DATABASE}.{name}")
    except Exception as error:
        if "not exist" not in str(error).lower() and "NotExist" not in type(error).__name__:
            raise
        raise ValueError(
            f"there is no table {name!r} in the warehouse {config.path}; tables are made by python -m launch.lake"
        ) from error


def make_tables(config: WarehouseConfig, names: Sequence[str] = ()) -> None:
    """Makes the tables that are missing: all, or those named. Tables that are there stay as they are."""
    catalog = catalog_of(config)
    from pypaimon import Schema  # pyright: ignore[reportMissingImports]

    catalog.create_database(DATABASE, True)
    for name in names or TABLES:
        schema, primary, partition, options = layout_of(name)
        made = Schema.from_pyarrow_schema(
            schema, partition_keys=partition, primary_keys=primary, options=options | NATIVE | EVERY_EPOCH
        )
        catalog.create_table(f"{DATABASE}.{name}", made, True)


TABLES = ("events", "examples", *(f"{one}_features{suffix}" for one in GROUPS for suffix in ("", "_log")))
"""All tables of a lake."""


def layout_of(name: str) -> tuple[pa.Schema, list[str], list[str], dict[str, str]]:
    """Returns what a table is made of: columns, primary key, partition keys and options."""
    if name == "events":
        return events_schema(), [], ["day"], {}
    if name == "examples":
        return pa.schema([*EXAMPLES_FIRST, *EXAMPLE]), [], ["day", "part"], {}
    subject: Subject = "user" if name.startswith("user") else "video"
    if name.endswith("_log"):
        return features_log_schema(subject), [], ["day"], {}
    merged = {"bucket": str(BUCKETS), "merge-engine": "partial-update"}
    for group in GROUPS[subject]:
        merged[f"fields.{group.time_column}.sequence-group"] = ",".join(column for column, _ in group.columns)
    return features_schema(subject), [key_of(subject)], [], merged


@contextlib.contextmanager
def writing(config: WarehouseConfig, name: str) -> Iterator[None]:
    """Keeps other processes from committing to a table meanwhile.

    Paimon's Python side looks whether a snapshot is there and then renames its own into place, on a local disk under a lock of
    the process alone: of two processes that do so at once, one would overwrite the other's commit. In an object store there is
    nothing to lock: there, one process writes a table (the jobs of `launch.lake` may run in one).
    """
    if not config.is_local:
        with _COMMITS:
            yield
        return
    folder = Path(config.path) / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def alone(config: WarehouseConfig, job: str) -> Iterator[None]:
    """Keeps a second process of the same job out, before it touches anything of the first's.

    Raises:
        ValueError: There is one. (In an object store nobody knows.)
    """
    if not config.is_local:
        yield
        return
    folder = Path(config.path) / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / f"job.{job}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(
            f"another process runs {job!r} on {config.path}: a job of launch.lake runs once; stop that one"
        ) from None
    finally:
        os.close(file)


def storable(rows: pa.Table, known: pa.Schema, reserved: Sequence[str] = ()) -> tuple[pa.Table, list[str]]:
    """Returns rows without the columns that a table cannot take, and the names of those.

    Args:
        rows: With columns that an impression may have been logged with.
        known: The table's columns.
        reserved: Names that are the table's own.
    """
    refused = []
    for field in rows.schema:
        there = known.field(field.name).type if field.name in known.names else None
        if field.name in reserved or not _is_storable(field.type) or (there is not None and there != field.type):
            refused.append(field.name)
    return rows.drop_columns(refused) if refused else rows, refused


def _is_storable(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _is_storable(kind.value_type)
    return kind in (pa.bool_(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.binary())


def add_columns(config: WarehouseConfig, name: str, fields: Sequence[pa.Field]) -> None:
    """Adds columns to a table; what was written before has nulls there."""
    from pypaimon.schema.data_types import PyarrowFieldParser  # pyright: ignore[reportMissingImports]
    from pypaimon.schema.schema_change import SchemaChange  # pyright: ignore[reportMissingImports]

    changes = [SchemaChange.add_column(one.name, PyarrowFieldParser.to_paimon_type(one.type, True)) for one in fields]
    with writing(config, name):
        catalog_of(config).alter_table(f"{DATABASE}.{name}", changes)
