"""Writes versions of a small model to a folder of deltas, as a publisher would."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from monolith_jax.features import FeatureConfig, feature_layout
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.towers import ModelConfig, make_towers, named_weights
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.sync.delta import Content, DeltaFolder, Manifest, Rows, Version
from monolith_jax.tables.table import TableConfig, make_groups
from tests.small_model import FEATURES, HEADS, TABLES, Small

NUM_SHARDS = 8
SIZES = (16, 64)


class Log:
    """A folder of deltas that grows."""

    def __init__(
        self,
        root: Path,
        tables: Sequence[TableConfig] = TABLES,
        config: ModelConfig | None = None,
        features: Sequence[FeatureConfig] = FEATURES,
        two_tower: TwoTowerConfig | None = None,
        heads: Sequence[HeadConfig] = HEADS,
    ) -> None:
        """Writes nothing yet; without heads there is no ranker."""
        self.root, self.tables, self.config = root, tables, config or (DeepFMConfig(hidden=()) if heads else None)
        self.features, self.two_tower, self.heads = features, two_tower, heads
        self.folder = DeltaFolder(root)
        self.last: Version | None = None
        self.step = 0
        self.base = Version(1, 0)
        groups = make_groups(tables, NUM_SHARDS)
        layout = feature_layout(features, [group.maps.names for group in groups])
        _, weights = make_towers(self.config, layout, [group.dim for group in groups], heads, 0, two_tower)
        self.dense = {name: np.asarray(weight) for name, weight in named_weights(nnx.to_pure_dict(weights)).items()}

    def publish(
        self,
        rows: Mapping[str, tuple[Any, np.ndarray]],
        deleted: Mapping[str, Any] | None = None,
        dense: Mapping[str, np.ndarray] | None = None,
        kind: str = "delta",
        format: str = "float32",
        version: Version | None = None,
        same_state: bool = False,
        previous: Version | None = None,
    ) -> Version:
        """Commits a version; a base without weights gets the first ones.

        Args:
            rows: Ids and float32 vectors by table.
            deleted: Ids by table.
            dense: Weights by name.
            kind: base or delta.
            format: Of the vectors.
            version: Its name; the next one.
            same_state: Whether a base holds what readers of the version before have.
            previous: Version that it follows; the last one.
        """
        if version is None:
            version = Version(1, 0) if self.last is None else Version(self.last.epoch, self.last.sequence + 1)
        is_base = kind == "base"
        self.step += 0 if same_state else 10
        if is_base:
            self.base = version
        content = Content(
            rows={name: Rows(np.asarray(ids, np.int64), vectors) for name, (ids, vectors) in rows.items()},
            deleted={name: np.asarray(ids, np.int64) for name, ids in (deleted or {}).items()},
            dense=self.dense if is_base and dense is None else dense,
        )
        self.folder.write_part(version, 0, content, format)
        now_ms = int(time.time() * 1000)
        manifest = Manifest(
            kind="base" if is_base else "delta",
            version=version,
            previous=None if is_base and not same_state else previous or self.last,
            base=self.base,
            step=self.step,
            event_time_ms=version.sequence * 1000,
            created_ms=now_ms,
            position=[{"offset": version.sequence}],
            format=format,  # pyright: ignore[reportArgumentType]
        )
        self.folder.commit(manifest)
        self.last = version
        return version

    def serve(self, **options: Any) -> ServedModel:
        """Returns a reader."""
        options = {"num_shards": NUM_SHARDS, "batch_sizes": SIZES, "two_tower": self.two_tower} | options
        return ServedModel(self.root, self.features, self.tables, self.config, self.heads, **options)


def trained_rows(small: Small) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns ids and vectors of all rows of a trainer with one device, by table."""
    rows = {}
    for group, mapper, array in zip(small.model.groups, small.mapper.groups, jax.device_get(small.state.groups), strict=True):
        for table, name in enumerate(group.maps.names):
            ids, shards, of_table, _ = mapper.maps.entries(table)
            vectors = array[shards, group.maps.row_offsets[table] + of_table, : group.dim]
            rows[name] = (ids, np.ascontiguousarray(vectors))
    return rows


def trained_weights(small: Small) -> dict[str, np.ndarray]:
    """Returns the dense weights of a trainer by name."""
    return {name: np.asarray(weight) for name, weight in named_weights(small.state.weights).items()}
