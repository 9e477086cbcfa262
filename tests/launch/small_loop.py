"""A closed loop over a small world, with a small model: a few seconds."""

from pathlib import Path
from typing import Any

from rich.console import Console

from launch.closed_loop import close_loop
from launch.points.closed_loop import ClosedLoopPoint
from monolith_jax.experiment import Experiment, load

CONFIG = Path(__file__).parent.parent.parent / "configs" / "closed_loop.gin"
SMALL = (
    *("SyntheticConfig.live_users = 60", "SyntheticConfig.live_videos = 150", "SyntheticConfig.events_per_s = 0.2"),
    *("SyntheticConfig.content_dim = 4", "content/DenseFeatureConfig.size = 4", "TrainConfig.batch_size = 64"),
    *("TableConfig.dim = 4", "MMoEConfig.num_experts = 2", "MMoEConfig.expert_hidden = (8,)", "MMoEConfig.tower_hidden = (4,)"),
    *("TwoTowerConfig.dim = 8", "TwoTowerConfig.user_hidden = (8,)", "TwoTowerConfig.video_hidden = (8,)"),
    *("TwoTowerConfig.num_negatives = 16", "TwoTowerConfig.pool_size = 64", "TrainConfig.log_every = 1"),
    *("CatalogueConfig.max_videos = 2000", "IndexConfig.max_videos = 2000", "user_author/TableConfig.max_rows = 20000"),
)
POINT = ClosedLoopPoint(hours=3, requests_per_hour=60.0, warm_hours=2.0, number=5, timeout_s=60.0)


def small(*more: str) -> Experiment:
    """Returns an experiment that a loop can be made of; `more` are bindings over it."""
    return load([CONFIG], [*SMALL, *more])


def run(folder: Path, point: ClosedLoopPoint = POINT, seed: int = 0) -> list[dict[str, Any]]:
    """Runs the loop; returns its rows."""
    return close_loop(small(), point, folder, Console(quiet=True), seed)
