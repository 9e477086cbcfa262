"""What is judged: a run folder or an exported one, made ready to be asked.

In: the folder. Out: a `Subject`: its experiment, a base to serve from in float32, and what its partitions remember.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.evaluation.held_out import Memories, replayed, restored

if TYPE_CHECKING:
    from monolith_jax.experiment import Experiment
    from monolith_jax.serve.served_model import ServedModel
    from monolith_jax.sync.manifest import Manifest


@dataclass(frozen=True)
class Subject:
    """A trained model."""

    experiment: Experiment
    served: Path
    """A folder that `ServedModel` serves."""
    run: Path | None
    """The run folder; None: it was exported, and the training source tells what was remembered."""
    aside: Counter[str] = field(default_factory=Counter)
    """How many held-out rows a part left out, by reason."""

    def memories(self) -> Memories:
        """Returns what partitions remember where training ended, anew at each call.

        Raises:
            ValueError: It cannot be known.
        """
        return (
            replayed(self.experiment, self.positions())
            if self.run is None
            else restored(self.experiment, self.run, self.step())
        )

    def positions(self) -> Sequence[Any]:
        """Returns where each partition stands in the training source."""
        return self._manifest().position

    def step(self) -> int:
        """Returns the steps of training that it has."""
        return self._manifest().step

    def _manifest(self) -> Manifest:
        from monolith_jax.sync.delta import DeltaFolder

        folder = DeltaFolder(self.served)
        return folder.manifest(folder.versions()[-1])

    def model(self, batch_sizes: Sequence[int]) -> ServedModel:
        """Returns the served model."""
        from monolith_jax.serve.served_model import ServedModel

        experiment = self.experiment
        return ServedModel(
            self.served, experiment.features, experiment.tables, experiment.model, experiment.heads,
            num_shards=experiment.mesh.num_shards, batch_sizes=batch_sizes, two_tower=experiment.retrieval,
        )  # fmt: skip


@contextmanager
def open_subject(workdir: Path, overrides: Sequence[str] = ()) -> Iterator[Subject]:
    """Yields what a folder holds; of a run, its newest snapshot is exported to a temporary folder meanwhile.

    A run that goes on saves later snapshots: everything is of the one that is the newest at the beginning.

    Args:
        workdir: A run folder, or one that `launch.export` wrote.
        overrides: Bindings over its config.

    Raises:
        ValueError: It is neither, or a binding is wrong.
    """
    from launch.export import export
    from monolith_jax.experiment import load
    from monolith_jax.sync.delta import DeltaFolder

    config = workdir / "config.gin"
    if not config.is_file():
        raise ValueError(
            f"{workdir} has no config.gin: give a run folder, which python -m launch.train writes, or one that "
            "python -m launch.export wrote"
        )
    experiment = load([config], overrides)
    if (workdir / "snapshots").is_dir():
        with tempfile.TemporaryDirectory(prefix="monolith_jax_evaluate_") as folder:
            export(workdir, Path(folder) / "served", "float32")
            yield Subject(experiment, Path(folder) / "served", workdir)
        return
    if not DeltaFolder(workdir).versions():
        raise ValueError(
            f"{workdir} has a config.gin, but neither snapshots nor an exported base: the run has not saved yet "
            "(SnapshotConfig.period_steps), or this is another folder"
        )
    yield Subject(experiment, workdir, None)
