"""What a snapshot holds to the content of a base: the live rows of all tables, in blocks.

In: the groups of tables, the states of their id maps and their arrays [L, R, W] as a snapshot has them, and the dense weights;
all of it numpy's. Out: ids and vectors by table, ids ascending; optimizer slots stay behind. No device is used, and beside the
snapshot there is one block of vectors in memory, not a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from monolith_jax.ids.cuckoo import IdMaps
from monolith_jax.sync.delta import Content, Rows
from monolith_jax.tables.table import Group
from monolith_jax.tables.update import RowLayout

BLOCK_BYTES = 256 << 20
"""Most bytes of float32 vectors in a block."""


@dataclass(frozen=True)
class SavedTable:
    """The live rows of one table of a snapshot."""

    name: str
    ids: np.ndarray
    """int64 [N], ascending."""
    group: Group
    rows: np.ndarray
    """[L * R, W], all rows of the group, a view."""
    places: np.ndarray
    """int64 [N], where the rows of the ids are in `rows`."""

    def blocks(self, most_bytes: int = BLOCK_BYTES) -> Iterator[Rows]:
        """Yields ids and float32 vectors, none where the table is empty.

        Raises:
            FloatingPointError: A value is infinite or not a number.
        """
        size = max(1, most_bytes // (4 * self.group.dim))
        for first in range(0, self.ids.size, size):
            which = slice(first, first + size)
            vectors = host_vectors(self.group.rows, self.rows[self.places[which], : self.group.rows.vector_width])
            check_finite(vectors, f"a row of table {self.name}")
            yield Rows(self.ids[which], vectors)


def saved_tables(
    groups: Sequence[Group], maps: Sequence[Mapping[str, np.ndarray]], arrays: Sequence[np.ndarray]
) -> list[SavedTable]:
    """Returns the tables of all groups.

    Args:
        groups: With the sizes that the snapshot was made with.
        maps: State of each group's id maps.
        arrays: [L, R, W] of each group.

    Raises:
        ValueError: A state or an array is of other sizes, or damaged.
    """
    found = []
    for group, state, array in zip(groups, maps, arrays, strict=True):
        if array.shape != group.shape:
            raise ValueError(
                f"rows of tables {', '.join(group.maps.names)} are {array.shape} in the snapshot, expected {group.shape}: "
                "it is of other tables than config.gin beside it"
            )
        of_group = IdMaps(group.maps)
        of_group.set_state(state)
        for table, name in enumerate(group.maps.names):
            ids, shards, rows, _ = of_group.entries(table)
            order = np.argsort(ids)
            places = shards.astype(np.int64) * group.maps.rows_per_shard + group.maps.row_offsets[table] + rows
            found.append(SavedTable(name, ids[order], group, array.reshape(-1, group.rows.width), places[order]))
    return found


def host_vectors(layout: RowLayout, words: np.ndarray) -> np.ndarray:
    """Returns the vectors, float32 [N, D], of the first `vector_width` floats of rows: `vectors_of` without a device."""
    if layout.vector_dtype != "bfloat16":
        return np.ascontiguousarray(words, np.float32)
    halves = np.ascontiguousarray(words, "<f4").view("<u2")[:, : layout.dim]
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def base_contents(
    tables: Sequence[SavedTable], dense: Mapping[str, np.ndarray], most_bytes: int = BLOCK_BYTES
) -> Iterator[Content]:
    """Yields the content of a base in blocks for `DeltaFolder.write_part`, the first with the dense weights.

    Args:
        tables: All tables.
        dense: Every dense weight by its path.
        most_bytes: Of vectors in a block.

    Raises:
        FloatingPointError: A value is infinite or not a number.
    """
    for name, weight in dense.items():
        check_finite(weight, f"dense weight {name}")
    nothing = {one.name: Rows(np.zeros(0, np.int64), np.zeros((0, one.group.dim), np.float32)) for one in tables}
    yield Content(rows=nothing, dense=dense)
    for one in tables:
        for block in one.blocks(most_bytes):
            yield Content(rows={one.name: block})


def check_finite(values: np.ndarray, what: str) -> None:
    """Raises FloatingPointError where a value is infinite or not a number."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{what} is not finite, so this snapshot is not exported: choose an earlier one (--step), or "
            "train again with a lower learning rate"
        )
