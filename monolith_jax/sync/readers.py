"""Where the readers of a log stand: a file each in its folder `readers`.

In: the name of a reader and its version. Out: those of all, and how long ago each said so.
"""

from __future__ import annotations

import re
import time

from etils import epath

from monolith_jax.sync.manifest import Version, sealed, unsealed
from monolith_jax.sync.storage import names_in, put, read_whole, remove

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def tell(root: epath.Path, reader: str, version: Version) -> None:
    """Says where a reader stands; see `DeltaFolder.register`."""
    place = _place(root, reader)
    place.parent.mkdir(parents=True, exist_ok=True)
    put(place, sealed({"version": version, "time_s": time.time()}), durable=False)


def forget(root: epath.Path, reader: str) -> None:
    """Takes away what a reader said."""
    remove(_place(root, reader))


def told(root: epath.Path) -> dict[str, tuple[Version, float]]:
    """Returns the version of each reader, and seconds since it said so."""
    found: dict[str, tuple[Version, float]] = {}
    for name in names_in(root / "readers"):
        if name.endswith(".json") and not name.startswith("."):
            try:
                one = unsealed(read_whole(root / "readers" / name), name)
            except (FileNotFoundError, ValueError):  # gone since, or half a file after a loss of power: it will say so again
                continue
            found[name.removesuffix(".json")] = Version(*one["version"]), max(0.0, time.time() - one["time_s"])
    return found


def _place(root: epath.Path, reader: str) -> epath.Path:
    if not _NAME.fullmatch(reader):
        raise ValueError(f"{reader!r} is no name of a reader; use letters, digits, '-', '_' and, but for the first, '.'")
    return root / "readers" / f"{reader}.json"
