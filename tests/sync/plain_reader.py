"""A reader made of nothing but the folder and dicts, and what the trainer says that it must hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monolith_jax.ids.cuckoo import IdMaps
from monolith_jax.snapshot import Restored, SnapshotConfig, Snapshots
from monolith_jax.sync.delta import Content, DeltaFolder, Version, dequantised
from monolith_jax.sync.gather import fetch_dense
from monolith_jax.tables.table import TableConfig, make_groups
from monolith_jax.tables.update import vectors_of

Values = dict[str, dict[int, bytes]]


class PlainReader:
    """Applies one version after the other."""

    def __init__(self, root: Path) -> None:
        self.folder = DeltaFolder(root)
        self.version: Version | None = None
        self.rows: Values = {}
        self.dense: dict[str, bytes] = {}
        self.deletions = 0

    @property
    def step(self) -> int:
        assert self.version is not None
        return self.folder.manifest(self.version).step

    def begin(self, base: Version) -> None:
        """Starts from this base, were it the newest or not."""
        self._apply(base, self.folder.read(base))

    def next(self) -> bool:
        """Applies the next version, if there is one."""
        chain = self.folder.chain(self.version)
        if not chain:
            return False
        self._apply(chain[0], self.folder.read(chain[0]))
        return True

    def catch_up(self) -> int:
        """Applies all there is; returns how many versions that were."""
        number = 0
        while self.next():
            number += 1
        return number

    def _apply(self, version: Version, content: Content) -> None:
        if self.folder.manifest(version).kind == "base":
            self.rows, self.dense = {}, {}
        for table, ids in content.deleted.items():
            held = self.rows.setdefault(table, {})
            for one in ids.tolist():
                self.deletions += held.pop(one, None) is not None
        for table, rows in content.rows.items():
            values = dequantised(rows)
            self.rows.setdefault(table, {}).update(
                {one: value.tobytes() for one, value in zip(rows.ids.tolist(), values, strict=True)}
            )
        if content.dense is not None:
            self.dense = {name: np.asarray(weight).tobytes() for name, weight in content.dense.items()}
        self.version = version


def live_rows(restored: Restored, tables: Sequence[TableConfig], num_shards: int) -> Values:
    """Returns the vector of every id in a snapshot."""
    found: Values = {}
    arrays = restored.state["groups"] if isinstance(restored.state, dict) else restored.state.groups
    for group, array, state in zip(make_groups(tables, num_shards), arrays, restored.host["maps"], strict=True):
        vectors = np.asarray(vectors_of(group.rows, jnp.asarray(array)))
        maps = IdMaps(group.maps)
        maps.set_state(state)
        for table, name in enumerate(group.maps.names):
            ids, shards, rows, _ = maps.entries(table)
            of_ids = vectors[shards, group.maps.row_offsets[table] + rows]
            found[name] = {one: vector.tobytes() for one, vector in zip(ids.tolist(), of_ids, strict=True)}
    return found


def dense_weights(restored: Restored) -> dict[str, bytes]:
    """Returns the dense weights in a snapshot by their path."""
    weights = restored.state["weights"] if isinstance(restored.state, dict) else restored.state.weights
    return {name: value.tobytes() for name, value in fetch_dense(jax.tree.map(jnp.asarray, weights)).items()}


def assert_holds(reader: PlainReader, restored: Restored, tables: Sequence[TableConfig], num_shards: int) -> None:
    """Checks that a reader has exactly the trainer's rows, bit for bit."""
    live = live_rows(restored, tables, num_shards)
    for table in live.keys() | reader.rows.keys():
        mine, theirs = reader.rows.get(table, {}), live[table]
        assert mine.keys() == theirs.keys(), (table, len(mine.keys() - theirs.keys()), len(theirs.keys() - mine.keys()))
        differing = [one for one, vector in theirs.items() if mine[one] != vector]
        assert not differing, (table, len(differing), reader.version, restored.step)


def snapshot_of(workdir: Path, step: int | None = None) -> Restored:
    """Returns a snapshot of a run folder, by default the newest."""
    snapshots: Any = Snapshots(SnapshotConfig(), workdir / "snapshots", read_only=True)
    try:
        found = snapshots.latest() if step is None else step
        return snapshots.restore_plain(found)
    finally:
        snapshots.close()
