"""A small model over made-up examples: lists, weights and every combiner, two groups of tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from monolith_jax.features import DenseFeatureConfig, FeatureConfig, Features, IdFeatureConfig, featurize
from monolith_jax.ids.group import GroupMapper
from monolith_jax.ids.mapper import Mapper
from monolith_jax.mesh import MeshConfig, make_mesh
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.reader import observe
from monolith_jax.tables.table import TableConfig, make_tier
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.tables.wire import PADDED, WireConfig
from monolith_jax.train.state import Inputs, Model, ModelConfig, TrainState, first_state, make_model, place_inputs
from monolith_jax.types import Chunk, Exchange, Plan, Position, Rejected

SGD = OptimizerConfig(name="sgd", learning_rate=0.1)
ADAGRAD = OptimizerConfig(name="adagrad", learning_rate=0.1)

TABLES = (
    TableConfig("user", 500, 4, SGD),
    TableConfig("tag", 300, 4, ADAGRAD),
    TableConfig("video", 500, 4, SGD),
)
FEATURES: tuple[FeatureConfig, ...] = (
    IdFeatureConfig("seen", "seen", "video", max_length=4, combiner="mean"),
    IdFeatureConfig("user", "user_id", "user"),
    IdFeatureConfig("last", "last", "video", max_length=1, combiner="none"),
    IdFeatureConfig("pinned", "pinned", "video", max_length=2, combiner="none"),
    IdFeatureConfig("newest", "seen", "video", max_length=3, combiner="first"),
    IdFeatureConfig("tag", "tag", "tag", max_length=3, combiner="sum", weight_column="tag_weight"),
    IdFeatureConfig("rare_tag", "tag", "tag", max_length=3, combiner="sqrtn"),
    DenseFeatureConfig("age", "age"),
)
HEADS = (HeadConfig("like", base_rate=0.3), HeadConfig("play_ratio", "regression", base_rate=0.6, loss_weight=0.5))


@dataclass
class Small:
    """A model with its first state and empty maps."""

    model: Model
    state: TrainState
    mapper: Mapper

    def inputs_of(self, examples: pa.RecordBatch) -> tuple[Inputs, Features, Plan]:
        """Returns the inputs of examples on the device, and what they were made of."""
        features = featurize(examples, self.model.layout)
        seen = observe(examples, [head.label for head in self.model.heads], "user_id")
        plan = self.mapper.plan(features.groups, seen.event_time_ms)
        inputs = Inputs(plan.groups, features.weights, features.dense, seen.labels, seen.masks)
        return place_inputs(self.model, inputs), features, plan


def make_small(
    num_devices: int = 1,
    config: ModelConfig | None = None,
    tables: Sequence[TableConfig] = TABLES,
    features: Sequence[FeatureConfig] = FEATURES,
    dense_optimizer: OptimizerConfig = SGD,
    seed: int = 0,
    model_parallel: int = 1,
    exchange: Exchange | None = None,
    wire: WireConfig = PADDED,
    two_tower: TwoTowerConfig | None = None,
) -> Small:
    """Makes a model; by default one whose logits are linear in its inputs but for the products of a factorisation machine.

    With an exchange it is one process's part of a model, and `inputs_of` takes its part of a batch.
    """
    mesh = make_mesh(MeshConfig(num_devices, model_parallel, num_shards=8))
    config = config or DeepFMConfig(hidden=())
    model, weights = make_model(config, tables, features, HEADS, dense_optimizer, seed, 8, mesh, wire, two_tower)
    process = (exchange.process_id, exchange.num_processes) if exchange else (0, 1)
    mappers = [
        GroupMapper(
            group.maps,
            model.layout.position_tables(index, group.maps.names),
            num_devices,
            (),
            None,
            *process,
            tier=make_tier(group, process[1]),
        )
        for index, group in enumerate(model.groups)
    ]
    return Small(model, first_state(model, weights), Mapper(mappers, num_devices, exchange))


def make_examples(number: int, seed: int = 0, num_ids: int = 60) -> pa.RecordBatch:
    """Returns examples whose ids repeat; lists have 0 to 5 items, some are null."""
    rng = np.random.default_rng(seed)

    def ids(size: int) -> list[int]:
        return [int(one) * 7919 - 100 for one in rng.integers(0, num_ids, size)]

    def few(most: int) -> int:
        return int(rng.integers(0, most + 1))

    tags = [ids(few(5)) for _ in range(number)]
    columns = {
        "event_time_ms": pa.array(1_000_000 * (seed + 1) + np.arange(number)),
        "user_id": pa.array(ids(number)),
        "last": pa.array([None if rng.random() < 0.3 else one for one in ids(number)]),
        "pinned": pa.array([ids(few(2)) for _ in range(number)], pa.list_(pa.int64())),
        "seen": pa.array([ids(few(5)) for _ in range(number)], pa.list_(pa.int64())),
        "tag": pa.array(tags, pa.list_(pa.int64())),
        "tag_weight": pa.array([rng.normal(size=len(one)).tolist() for one in tags], pa.list_(pa.float32())),
        "age": pa.array(rng.normal(size=number)),
        "like": pa.array(rng.random(number) < 0.3),
        "play_time_ms": pa.array(rng.integers(0, 20_000, number)),
        "duration_ms": pa.array(np.where(rng.random(number) < 0.2, 0, 10_000)),
        "weight": pa.array(rng.random(number).astype(np.float32)),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


@dataclass(frozen=True)
class SmallSource:
    """A stream of chunks of `make_examples`."""

    num_chunks: int = 8
    chunk_rows: int = 10
    epochs: int = 1
    fails_at: int | None = None
    """Number of the chunk at which reading fails."""
    rejects: bool = False
    """Whether each chunk sets a row aside."""

    @property
    def num_examples(self) -> int:
        """Examples from start to end."""
        return self.num_chunks * self.chunk_rows * self.epochs

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from `position`."""
        for number in range(position.get("chunk", 0), self.num_chunks * self.epochs):
            if number == self.fails_at:
                raise ValueError(f"part {number} cannot be read")
            rejected = (Rejected(f"part#{number}", "broken", "x"),) if self.rejects else ()
            examples = make_examples(self.chunk_rows, number % self.num_chunks)
            yield Chunk(examples, rejected, {"chunk": number + 1}, number // self.num_chunks)
