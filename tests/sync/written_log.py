"""A base and a delta with all that there can be in them."""

import dataclasses
from pathlib import Path

import numpy as np

from monolith_jax.sync.delta import Content, DeltaFolder, Manifest, Rows, Version

BASE, NEXT = Version(1, 1), Version(1, 2)
DENSE = {"towers/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.float32(3), "steps": np.arange(2)}


def manifest(version: Version, format: str = "float32", previous: Version | None = None, **more: object) -> Manifest:
    first = Manifest(
        kind="base" if previous is None else "delta",
        version=version,
        previous=previous,
        base=version if previous is None else BASE,
        step=7,
        event_time_ms=1_700_000_000_000,
        created_ms=1_700_000_000_500,
        position=[{"topic": "events", "offset": 12}],
        format=format,  # pyright: ignore[reportArgumentType]
    )
    return dataclasses.replace(first, **more)


def rows_of(count: int, dim: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows(rng.integers(-(2**63), 2**63, count), rng.standard_normal((count, dim), np.float32))


def write(
    folder: DeltaFolder, version: Version, content: Content, format: str = "float32", previous: Version | None = None
) -> Manifest:
    folder.write_part(version, 0, content, format)
    return folder.commit(manifest(version, format, previous))


def write_two(root: Path, format: str = "float16") -> DeltaFolder:
    """Writes a base and a delta with all that there can be in them."""
    folder = DeltaFolder(root)
    rows = {"user": rows_of(30, 4), "video": rows_of(20, 8, 1), "author": rows_of(5, 4, 2)}
    write(folder, BASE, Content(rows=rows, dense=DENSE), format)
    deleted = {"user": np.array([1, -5]), "video": np.array([2**62])}
    write(folder, NEXT, Content(rows=rows, deleted=deleted, dense=DENSE), format, BASE)
    return folder
