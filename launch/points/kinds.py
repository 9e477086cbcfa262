"""The kinds of points. A new one is imported here, listed, and run by `measure`."""

from __future__ import annotations

from pathlib import Path

from launch.points import closed_loop, collisions, failures, retrieval, shards, towers, train
from launch.points.closed_loop import ClosedLoopPoint
from launch.points.collisions import CollisionsPoint
from launch.points.failures import FailuresPoint
from launch.points.measured import Base, Measured
from launch.points.retrieval import RetrievalPoint
from launch.points.shards import ShardsPoint
from launch.points.towers import TowersPoint
from launch.points.train import TrainPoint

PointConfig = TrainPoint | TowersPoint | CollisionsPoint | RetrievalPoint | ShardsPoint | FailuresPoint | ClosedLoopPoint
POINTS: tuple[type, ...] = (
    *(TrainPoint, TowersPoint, CollisionsPoint, RetrievalPoint, ShardsPoint, FailuresPoint, ClosedLoopPoint),
)


def measure(point: PointConfig, base: Base, folder: Path) -> list[Measured]:
    """Runs a point in a folder, which may hold what an earlier try left; returns what it measured."""
    match point:
        case TrainPoint():
            return train.run(point, base, folder)
        case TowersPoint():
            return towers.run(point, base, folder)
        case CollisionsPoint():
            return collisions.run(point, base, folder)
        case RetrievalPoint():
            return retrieval.run(point, base, folder)
        case ShardsPoint():
            return shards.run(point, base, folder)
        case FailuresPoint():
            return failures.run(point, base, folder)
        case ClosedLoopPoint():
            return closed_loop.run(point, base, folder)
