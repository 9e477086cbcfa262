"""A new epoch: what readers may hold that a run which goes on from a snapshot has not done.

In: the folder of deltas, and the step and epoch of the restored snapshot. Out: the epoch's number, and the versions whose ids
its first delta must hold; or that it must begin with a base.

Deltas of the snapshot's epoch up to its step are part of the restored state. All later ones, of that epoch and of those after
it, are not: whatever is in them goes into the first delta of the new epoch. That is enough only if some version of the
snapshot's epoch is of its step or later, since what had changed by then and was never published is known to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from monolith_jax.sync.delta import DeltaFolder, Manifest, Version


@dataclass(frozen=True)
class Opening:
    """How an epoch begins."""

    epoch: int
    previous: Version | None
    """What its first delta follows."""
    base: Version | None
    """The newest base; None: the epoch begins with one."""
    later: tuple[Version, ...] = ()
    """Deltas that are not part of the restored state."""

    def to_json(self) -> dict[str, Any]:
        """Returns it for `from_json` in other processes."""
        return {"epoch": self.epoch, "previous": self.previous, "base": self.base, "later": self.later}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Opening:
        """Returns what `to_json` was called on."""
        previous, base = (told[name] and Version(*told[name]) for name in ("previous", "base"))
        return cls(told["epoch"], previous, base, tuple(Version(*version) for version in told["later"]))

    def ids(self, folder: DeltaFolder) -> dict[str, np.ndarray]:
        """Returns the distinct ids of the later deltas by table, rows and deletions.

        Raises:
            ValueError: One of them is damaged.
        """
        found: dict[str, list[np.ndarray]] = {}
        for version in self.later:
            content = folder.read(version)
            for table, ids in [*((table, rows.ids) for table, rows in content.rows.items()), *content.deleted.items()]:
                found.setdefault(table, []).append(ids)
        return {table: np.unique(np.concatenate(parts)) for table, parts in found.items()}


def open_epoch(folder: DeltaFolder, epoch: int, step: int, of_snapshot: int | None) -> Opening:
    """Returns how an epoch begins.

    Args:
        folder: The versions so far.
        epoch: The new epoch.
        step: Steps done by the restored state.
        of_snapshot: Epoch in which its snapshot was made; None: nothing was published then, or there is no snapshot.
    """
    versions, anew = folder.versions(), Opening(epoch, None, None)
    if not versions or of_snapshot is None:
        return anew
    version, later, covered, base = versions[-1], [], False, None
    while True:
        manifest = _manifest(folder, version)
        if manifest is None:
            return anew
        base = base or manifest.base
        covered |= version.epoch == of_snapshot and manifest.step >= step
        if (version.epoch, manifest.step) <= (of_snapshot, step):
            opening = Opening(epoch, versions[-1], base, tuple(later))
            return opening if covered and _is_whole(folder, opening) else anew
        if manifest.kind == "delta":
            later.append(version)
        following = manifest.previous or (manifest.base if manifest.kind == "delta" else None)
        if following is None:
            # A base that begins its epoch: what it left out nobody can tell.
            return anew
        version = following


def _is_whole(folder: DeltaFolder, opening: Opening) -> bool:
    try:
        opening.ids(folder)
    except ValueError:
        return False
    return True


def _manifest(folder: DeltaFolder, version: Version) -> Manifest | None:
    try:
        return folder.manifest(version)
    except (ValueError, OSError):
        return None  # Pruned, or damaged.
