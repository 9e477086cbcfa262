"""The served model: follows the log of deltas that a trainer writes, and answers requests meanwhile.

In: the folder of deltas, and the configs that the model was trained with. Out: vectors and scores of the newest version that is
whole. A version is applied to the copy that nobody reads, then the copies change places: readers never wait, and never see half
a version. What is damaged or missing is refused and counted, and the last good version goes on serving.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from flax import nnx

from monolith_jax.features import FeatureConfig, FeatureLayout, feature_layout, featurize
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.towers import ModelConfig, make_towers, weights_of
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.serve.changes import Changed, Changes
from monolith_jax.serve.scorer import Scorer
from monolith_jax.serve.served_copy import Loaded, ServedCopy, TooFull, check_fits
from monolith_jax.serve.sides import Sides
from monolith_jax.sync.delta import DeltaFolder, Manifest, Version
from monolith_jax.tables.table import TableConfig, make_groups
from monolith_jax.types import GroupIds

_REGISTER_S = 10.0
"""How often a reader says where it stands, so that what it needs is not removed; it may stand further."""
_SLOWEST = 32
"""Periods between two looks after many faults in a row."""


class ServedModel:
    """A served model. One thread polls (`watch` starts one); any number call `vectors` and `predict`."""

    def __init__(
        self,
        root: str | Path,
        features: Sequence[FeatureConfig],
        tables: Sequence[TableConfig],
        model_config: ModelConfig | None,
        heads: Sequence[HeadConfig],
        reader: str = "",
        num_shards: int = 64,
        batch_sizes: Sequence[int] = (64, 256, 1024),
        two_tower: TwoTowerConfig | None = None,
        follow: Sequence[str] = (),
    ) -> None:
        """Loads the newest base and the deltas behind it, and compiles the towers.

        Args:
            root: The folder of deltas.
            features: As in training.
            tables: As in training: `max_rows` is the room for ids.
            model_config: As in training; None: no ranker.
            heads: As in training.
            reader: Name of this reader in the folder; empty: host and process.
            num_shards: `MeshConfig.num_shards` of the trainer: with the same one each id that has a row there has room here.
            batch_sizes: Numbers of examples that requests are padded to; larger ones are cut into parts.
            two_tower: `Experiment.retrieval`, as in training.
            follow: Tables that `take_changed` is asked for.

        Raises:
            ValueError: There is no base, it is damaged, or it is of another model.
        """
        self._folder, self._reader = DeltaFolder(root), reader or f"{socket.gethostname()}-{os.getpid()}"
        self._groups = make_groups(tables, num_shards)
        self.layout = feature_layout(features, [group.maps.names for group in self._groups])
        self.dims = tuple(group.dim for group in self._groups)
        self._position_tables = self.position_tables(self.layout)
        self.towers, weights = make_towers(model_config, self.layout, self.dims, heads, 0, two_tower)
        pure = nnx.to_pure_dict(weights)
        self._like = jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, weight.dtype), pure)
        self._scorer = Scorer(self.towers, batch_sizes)
        for table in follow:
            self._check_table(table)
        self._changes = Changes(follow)
        self._polling, self._closed = threading.Lock(), threading.Event()
        self._begun: Version | None = None
        self._watcher: threading.Thread | None = None
        self._registered_s = -_REGISTER_S
        self._counts = {"versions": 0, "rows": 0, "deleted": 0, "faults": 0, "refused_rows": 0}
        self._apply_s, self.last_fault = 0.0, ""
        first = self._first()
        self._sides = Sides(ServedCopy(self._groups, first), ServedCopy(self._groups, first))
        self._changes.note(None, first)
        self._count(first)
        self.poll()
        if model_config is not None:
            self._scorer.warm_up(self._gather)

    def _first(self) -> Loaded:
        """Returns the newest base that is whole."""
        damaged: dict[Version, Exception] = {}
        while chain := self._folder.chain(None, damaged):
            try:
                loaded = self._load(chain[0])
            except ValueError as error:
                self._note(error)
                damaged[chain[0]] = error
                continue
            assert loaded.weights is not None, "the folder takes no base without weights"
            return loaded
        for error in damaged.values():
            raise error
        raise ValueError(
            f"{self._folder.root} holds no base to serve from: train with Experiment.publisher, which writes one with its "
            "first publication, or give the folder that python -m launch.export wrote"
        )

    def _load(self, version: Version) -> Loaded:
        """Reads and checks a version."""
        manifest, content = self._folder.manifest(version), self._folder.read(version)
        check_fits(self._groups, manifest, content)
        weights = None
        if content.dense is not None:
            # A copy: jax may go on using the memory that it is given, which is the file's.
            named = {name: np.array(array) for name, array in content.dense.items()}
            weights = jax.device_put(weights_of(named, self._like))
        return Loaded(manifest, content, weights)

    @property
    def _manifest(self) -> Manifest:
        return self._sides.live.manifest

    @property
    def version(self) -> Version:
        """The version that is served."""
        return self._manifest.version

    @property
    def step(self) -> int:
        """Steps of the trainer that it contains."""
        return self._manifest.step

    @property
    def event_time_ms(self) -> int:
        """Its watermark: event time up to which all is contained."""
        return self._manifest.event_time_ms

    @property
    def position(self) -> Sequence[Any]:
        """Its position in each partition of the stream."""
        return self._manifest.position

    def staleness_s(self) -> float:
        """Returns the seconds since the version that is served was made, by the clocks of both machines."""
        return time.time() - self._manifest.created_ms / 1000

    @property
    def faults(self) -> int:
        """How often a version was refused; `last_fault` tells why."""
        return self._counts["faults"]

    @property
    def memory_bytes(self) -> int:
        """Bytes of both copies of rows and maps, full tables assumed, and of the dense weights."""
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self._sides.live.weights))
        return self._sides.live.nbytes + self._sides.idle.nbytes + weights

    def metrics(self) -> dict[str, Any]:
        """Returns what is served, how old it is, and what was applied and refused."""
        with self._sides.read() as copy:
            manifest, num_rows = copy.manifest, dict(copy.num_rows)
        return {
            "version": list(manifest.version),
            "step": manifest.step,
            "event_time_ms": manifest.event_time_ms,
            "staleness_s": time.time() - manifest.created_ms / 1000,
            "rows_of_tables": num_rows,
            "memory_bytes": self.memory_bytes,
            "apply_s": self._apply_s,
            "last_fault": self.last_fault,
            **{f"applied_{name}": self._counts[name] for name in ("versions", "rows", "deleted")},
            "faults": self._counts["faults"],
            "refused_rows": self._counts["refused_rows"],
        }

    def poll(self) -> int:
        """Applies what is new, up to the first version that is damaged or does not fit; returns how many versions.

        What was refused is counted in `faults`, told in `last_fault` and tried again at the next call. Where a newer base leads
        past it, that is taken.
        """
        with self._polling:
            before, refused = self._counts["versions"], list[Version]()
            while True:
                at = None
                try:
                    for at in self._folder.chain(self.version, refused):
                        self._advance(at)
                    break
                except Exception as error:  # Whatever a disk, a network or a file may do, what is served goes on being served.
                    self._note(error)
                    if at is None:
                        break
                    refused.append(at)
            applied = self._counts["versions"] - before
            if time.monotonic() - self._registered_s > _REGISTER_S:
                self._register()
            return applied

    def _note(self, error: Exception) -> None:
        self._counts["faults"] += 1
        if isinstance(error, TooFull):
            self._counts["refused_rows"] += error.refused
        self.last_fault = f"{type(error).__name__}: {error}"

    def _register(self) -> None:
        self._registered_s = time.monotonic()
        try:
            self._folder.register(self._reader, self.version)
        except OSError as error:
            # A folder that may only be read is served from all the same; nobody prunes what nobody writes.
            self.last_fault = f"cannot register as a reader: {error}"

    def _advance(self, version: Version) -> None:
        """Applies a version to the idle copy, shows it, and applies it to the other one."""
        begun, loaded = time.perf_counter(), self._load(version)
        # What was begun and refused may be tried again as it is: a version can be applied twice, and a base clears all.
        if self._begun not in (None, version) and loaded.manifest.kind == "delta":
            self._sides.idle.copy_from(self._sides.live)
        self._begun = version
        self._sides.idle.apply(loaded)
        before = self._sides.swap()
        self._changes.note(before, loaded)  # Not earlier: who is told reads the new rows.
        before.apply(loaded)
        self._begun = None
        self._apply_s = time.perf_counter() - begun
        self._count(loaded)

    def _count(self, loaded: Loaded) -> None:
        self._counts["versions"] += 1
        self._counts["rows"] += sum(rows.ids.size for rows in loaded.content.rows.values())
        self._counts["deleted"] += sum(ids.size for ids in loaded.content.deleted.values())

    def watch(self, period_s: float = 0.1) -> None:
        """Starts a thread that polls every `period_s` seconds, less often while versions are refused."""
        assert self._watcher is None, "watch() was called before"
        self._watcher = threading.Thread(target=self._watch, args=(period_s,), name="served-model", daemon=True)
        self._watcher.start()

    def _watch(self, period_s: float) -> None:
        periods = 1
        while not self._closed.wait(period_s * periods):
            faults = self.faults
            self.poll()
            periods = min(2 * periods, _SLOWEST) if self.faults > faults else 1

    def close(self) -> None:
        """Ends the thread of `watch`, and the claim to what this reader would need next. What is served stays."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()
        with suppress(OSError):
            self._folder.unregister(self._reader)

    def vectors(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the vectors of ids of a table, all of one version.

        Args:
            table: Its name.
            ids: int64 [N], repeats allowed.

        Returns:
            float32 [N, D], zeros for ids without a row; bool [N], whether an id has one.

        Raises:
            ValueError: There is no such table.
        """
        self._check_table(table)
        with self._sides.read() as copy:
            return copy.vectors(table, np.asarray(ids, np.int64))

    def ids(self, table: str) -> np.ndarray:
        """Returns all ids of a table that have a row, int64 [N], in no order.

        Raises:
            ValueError: There is no such table.
        """
        self._check_table(table)
        with self._sides.read() as copy:
            return copy.ids(table)

    def _check_table(self, table: str) -> None:
        if all(table not in group.maps.names for group in self._groups):
            known = ", ".join(name for group in self._groups for name in group.maps.names)
            raise ValueError(f"there is no table {table!r}; tables: {known}")

    def predict(self, examples: pa.RecordBatch) -> np.ndarray:
        """Returns the scores of examples, float32 [B, T], in the order of the heads; ids without a row read zeros.

        Args:
            examples: A row each, with the columns that the features name, histories and counters among them.

        Raises:
            ValueError: A column is missing or of a type that its feature cannot read.
        """
        if self.towers.graph is None:
            raise ValueError("this model has no ranker to predict with; `serve.encode` gives the vectors of its two-tower")
        return self._scorer.score(featurize(examples, self.layout), self._gather)

    def _gather(self, groups: Sequence[GroupIds]) -> tuple[Sequence[np.ndarray], Any]:
        (vectors,), weights = self.gather([(groups, self._position_tables)])
        return vectors, weights

    def position_tables(self, layout: FeatureLayout) -> tuple[np.ndarray, ...]:
        """Returns of each group the index of the table of each position, int32 [P], for `gather`."""
        groups = enumerate(self._groups)
        return tuple(np.array(layout.position_tables(index, group.maps.names), np.int32) for index, group in groups)

    def gather(self, parts: Sequence[tuple[Sequence[GroupIds], Sequence[np.ndarray]]]) -> tuple[list[list[np.ndarray]], Any]:
        """Returns vectors and the dense weights that belong to them, all of one version.

        Args:
            parts: Examples of several layouts (`features.restricted`): their ids by group, [B, P], and what `position_tables`
                returned for their layout.

        Returns:
            Of each part and group float32 [B, P, D], zeros where there is no id or it has no row; and the weights.
        """
        with self._sides.read() as copy:
            vectors = [
                [
                    rows.vectors_of_batch(ids, valid, of_group)[0]
                    for rows, (ids, valid), of_group in zip(copy.rows, *part, strict=True)
                ]
                for part in parts
            ]
            return vectors, copy.weights

    def take_changed(self, table: str) -> Changed:
        """Returns what changed in a table of `follow` since the last call; at the first one, all that is there.

        Raises:
            ValueError: The table is not followed.
        """
        return self._changes.take(table)
