"""One whole copy of what is served: rows of all groups, dense weights, and of which version they are.

In: manifests and contents of versions, in order. Out: vectors of one version, with the weights that belong to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from monolith_jax.serve.served_rows import ServedRows
from monolith_jax.sync.delta import Content, Manifest
from monolith_jax.tables.table import Group


class Loaded(NamedTuple):
    """A version, read and checked."""

    manifest: Manifest
    content: Content
    weights: Any
    """Dense weights on the device; None: unchanged."""


class ServedCopy:
    """What `Sides` keeps two of. While it is read, nobody changes it."""

    def __init__(self, groups: Sequence[Group], loaded: Loaded) -> None:
        """Makes a copy of a base."""
        self._tables = {name: (g, t) for g, group in enumerate(groups) for t, name in enumerate(group.maps.names)}
        self.rows = tuple(ServedRows(group.maps, group.dim, loaded.manifest.format) for group in groups)
        self.weights, self.manifest = loaded.weights, loaded.manifest
        self._write(loaded)

    def apply(self, loaded: Loaded) -> None:
        """Takes over a version; of a base, all that it does not hold is forgotten.

        Raises:
            ValueError: A table has no room for the ids. The copy is of no use until `copy_from`.
        """
        for of_group in self.rows:
            if loaded.manifest.kind == "base":
                of_group.clear()
            of_group.take_format(loaded.manifest.format, loaded.manifest.kind == "base")
        self._write(loaded)

    def _write(self, loaded: Loaded) -> None:
        for name, ids in loaded.content.deleted.items():
            group, table = self._tables[name]
            self.rows[group].erase(table, ids)
        refused: dict[str, int] = {}
        for name, rows in loaded.content.rows.items():
            group, table = self._tables[name]
            if number := self.rows[group].write(table, rows):
                refused[name] = number
        if refused:
            counts = ", ".join(f"{number:,} of {name}" for name, number in refused.items())
            raise TooFull(
                f"version {loaded.manifest.version.folder} has more ids than their tables here have room for: {counts}; serve "
                "with the TableConfig.max_rows and num_shards of the trainer, which has rows for all of them",
                sum(refused.values()),
            )
        self.weights = self.weights if loaded.weights is None else loaded.weights
        self.manifest = loaded.manifest

    def copy_from(self, other: ServedCopy) -> None:
        """Becomes equal to another copy."""
        for mine, theirs in zip(self.rows, other.rows, strict=True):
            mine.copy_from(theirs)
        self.weights, self.manifest = other.weights, other.manifest

    def vectors(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns vectors of ids [N] of a table, float32 [N, D], zeros for those without a row; and which have one."""
        group, index = self._tables[table]
        return self.rows[group].vectors(index, ids)

    def has(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Returns which ids [N] of a table have a row, bool [N]."""
        group, index = self._tables[table]
        return self.rows[group].has(index, ids)

    def ids(self, table: str) -> np.ndarray:
        """Returns all ids of a table, int64 [N], in no order."""
        group, index = self._tables[table]
        return self.rows[group].ids(index)

    @property
    def num_rows(self) -> Mapping[str, int]:
        """Ids of each table."""
        of_groups = [of_group.num_rows for of_group in self.rows]
        return {name: int(of_groups[group][table]) for name, (group, table) in self._tables.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of rows and maps."""
        return sum(of_group.nbytes for of_group in self.rows)


class TooFull(ValueError):
    """A version has more ids than there is room for."""

    def __init__(self, message: str, refused: int) -> None:
        """Tells how many ids found no room."""
        super().__init__(message)
        self.refused = refused


def check_fits(groups: Sequence[Group], manifest: Manifest, content: Content) -> None:
    """Refuses a version of other tables than those that are served. One that has no rows of a table need not name it.

    Raises:
        ValueError: A table is unknown or has another dim.
    """
    dims = {name: group.dim for group in groups for name in group.maps.names}
    theirs = dict(manifest.dims)
    if any(dims.get(name) != dim for name, dim in theirs.items()) or {*content.rows, *content.deleted} - dims.keys():
        raise ValueError(
            f"version {manifest.version.folder} has rows of tables with dims {theirs} and deletions of "
            f"{sorted(content.deleted)}, served are {dims}; serve with the tables of the trainer"
        )
    for name, rows in content.rows.items():
        if rows.vectors.shape != (rows.ids.size, dims[name]) or rows.vectors.dtype != np.dtype(manifest.format):
            raise ValueError(
                f"version {manifest.version.folder}: vectors of table {name!r} are {rows.vectors.dtype} {rows.vectors.shape}, "
                f"expected {manifest.format} {(rows.ids.size, dims[name])}"
            )
