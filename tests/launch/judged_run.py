"""A small run over a recorded world, the last fifth of which is held out: a two-tower, an MMoE, histories and counters."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from launch.run import train
from monolith_jax.experiment import load
from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource

ROOT = Path(__file__).parent.parent.parent
FILES = tuple(f"configs/{name}.gin" for name in ("data/synthetic", "models/mmoe", "models/two_tower"))
EXAMPLES, BATCH = 4_000, 64
WORLD = SyntheticConfig(num_examples=EXAMPLES, live_users=60, live_videos=150, chunk_rows=500)
STEPS = 70
"""Of 50 a pass: the run ends within the second one."""
SMALL = (
    "Experiment.test_source = @test/ColumnsConfig()",
    "Experiment.source = @train/ColumnsConfig()",
    "ColumnsConfig.paths = ('world.parquet',)",
    "train/ColumnsConfig.part = (0.0, 0.8)",
    "test/ColumnsConfig.part = (0.8, 1.0)",
    "train/ColumnsConfig.epochs = 3",
    "Experiment.counters = @CountersConfig()",
    "CountersConfig.keys = ('user_id',)",
    "CountersConfig.labels = ('like', 'skip')",
    "CountersConfig.max_rows = 1000",
    "HistoryConfig.max_users = 500",
    "TableConfig.dim = 8",
    *(f"{name}/TableConfig.max_rows = 1000" for name in ("user", "video", "author", "sound")),
    "MMoEConfig.num_experts = 2",
    "MMoEConfig.expert_hidden = (16, 8)",
    "MMoEConfig.tower_hidden = (8,)",
    "TwoTowerConfig.dim = 8",
    "TwoTowerConfig.num_negatives = 64",
    "TwoTowerConfig.pool_size = 512",
    "TwoTowerConfig.frequency_size = 1024",
    f"TrainConfig.batch_size = {BATCH}",
    f"TrainConfig.steps = {STEPS}",
    "Experiment.train = @TrainConfig()",
    "Experiment.snapshots = @SnapshotConfig()",
    "SnapshotConfig.period_steps = 30",
    "Experiment.prequential = @PrequentialConfig()",
    "PrequentialConfig.period_s = 600.0",
    "Experiment.mesh = @MeshConfig()",
    "MeshConfig.num_devices = 1",
    "MeshConfig.cpu_devices = 8",
    "MeshConfig.num_shards = 8",
    "Experiment.serving = @ServingConfig()",
    "ServingConfig.rank = @RankConfig()",
    "RankConfig.heads = ('like', 'skip')",
    "RankConfig.weights = (1.0, -0.3)",
    "RankConfig.num_candidates = 64",
    "ServingConfig.sources = @SourcesConfig()",
    *(f"SourcesConfig.{name} = 10" for name in ("two_tower", "fresh", "trending", "followed", "explore", "similar")),
    "ServingConfig.catalogue = @CatalogueConfig()",
    "CatalogueConfig.max_videos = 1000",
    "ServingConfig.index = @IndexConfig()",
    "IndexConfig.max_videos = 1000",
    "ServingConfig.user_state = @UserStateConfig()",
    "UserStateConfig.length = 10",
    "UserStateConfig.actions = ('like', 'complete', 'skip')",
)


def recorded(path: Path) -> None:
    """Writes the world."""
    batches = [chunk.examples for chunk in SyntheticSource(WORLD).read({})]
    pq.write_table(pa.Table.from_batches(batches).slice(0, EXAMPLES), path)


def trained(folder: Path, *more: str) -> Path:
    """Writes the world into a folder, and trains; returns the run."""
    recorded(folder / "world.parquet")
    train(load(FILES, [*SMALL, f"ColumnsConfig.folder = {str(folder)!r}", *more]), folder / "run", Console(quiet=True))
    return folder / "run"
