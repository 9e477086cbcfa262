"""What a point is given and what it gives back: the words that all kinds of points share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from monolith_jax.experiment import Experiment


class Base(NamedTuple):
    """The experiment of a point."""

    gin_files: tuple[str, ...]
    """Its files, in order."""
    bindings: tuple[str, ...]
    """Over the files: those of the sweep, of the command line, of the axes, of the seed; later ones win."""
    seed: int
    """Of the point; the bindings hold it where the sweep says so."""

    def load(self, *more: str) -> Experiment:
        """Returns the experiment, with further bindings over all others.

        Raises:
            ValueError: A binding is wrong.
        """
        from monolith_jax.experiment import load

        return load(self.gin_files, [*self.bindings, *more])


class Measured(NamedTuple):
    """One number."""

    metric: str
    """`auc`, `rows`: the same word as in metrics.jsonl where it stands there too."""
    value: float
    """NaN where it is undefined."""
    head: str = ""
    """Empty: of the whole; `mean`: over the heads."""
    along: str = ""
    """What a curve runs along (`epoch`, `hour`, `shard`); empty: a single figure."""
    at: float = math.nan
    """Where on the curve."""
