"""What of an experiment the state of a run depends on.

In: an `Experiment`. Out: a JSON-able mapping, saved with each snapshot; a run that goes on from one must have the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from monolith_jax.experiment import Experiment
from monolith_jax.lake.history import LakeConfig
from monolith_jax.stream.log_source import LogConfig


def identity(experiment: Experiment) -> dict[str, Any]:
    """Returns the configs that a run's state depends on; a snapshot of others is refused."""
    parts = ("source", "history", "counters", "features", "tables", "model", "heads", "dense_optimizer", "prequential")
    plain: dict[str, Any] = {}
    for name in parts:
        value = getattr(experiment, name)
        plain[name] = [_plain(part) for part in value] if isinstance(value, tuple) else _plain(value)
    if experiment.retrieval:
        plain["retrieval"] = _plain(experiment.retrieval)
    if not plain["source"].get("content_dim", 1):
        del plain["source"]["content_dim"]  # Nor is a column that is not there; snapshots from before it was known go on.
    for table in plain["tables"]:
        # Where rows are kept changes nothing that is learned or saved.
        del table["memory"], table["device_rows"]
    # Nor does where a log or a lake is reached, or how fast it is read.
    if isinstance(experiment.source, LakeConfig):
        del plain["source"]["warehouse"], plain["source"]["jobs"]
        if plain["source"]["log"]:
            plain["source"]["log"] = _lasting(plain["source"]["log"])
    elif isinstance(experiment.source, LogConfig):
        plain["source"] = {"is": "LogConfig", **_lasting(plain["source"])}
    train = experiment.train
    numbers = {"batch_size": train.batch_size, "partitions": train.partitions, "seed": train.seed}
    return plain | {"num_shards": experiment.mesh.num_shards, **numbers}


def _lasting(log: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a `LogConfig` the state of a run depends on."""
    joiner = {name: value for name, value in log["joiner"].items() if name != "memory_mb"}
    return {name: log[name] for name in ("impressions", "actions", "format", "future_s")} | {"joiner": joiner}


def _plain(config: Any) -> Any:
    return None if config is None else {"is": type(config).__name__, **dataclasses.asdict(config)}
