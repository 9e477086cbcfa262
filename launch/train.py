"""Trains a model from a stream of examples: `python -m launch.train --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch import cli

EXAMPLE = (
    "python -m launch.train --gin_file=configs/quickstart.gin --gin.TrainConfig.steps=100 --workdir=checkpoints/quickstart"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    does = "Trains a model; goes on from the newest snapshot where the run folder holds one."
    arguments = cli.parse(argv, does, EXAMPLE, several=True)
    # Imported late: --help answers at once.
    from launch.process import USER_ERRORS, join, prepare
    from launch.run import train
    from monolith_jax.experiment import load

    try:
        experiment = load(arguments.gin_files, arguments.overrides)
        with join(arguments.processes):
            prepare(experiment.mesh)
            train(experiment, arguments.workdir)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
