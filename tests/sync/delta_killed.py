"""A writer that is killed at random moments: run as a program, prints what a reader saw after each kill.

`python delta_killed.py ROOT KILLS` forks writers one after another; each opens an epoch and writes a base, then deltas.
What a version must hold is a function of its name alone.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from monolith_jax.sync.delta import Content, DeltaFolder, Manifest, Rows, Version, next_epoch


def content_of(version: Version) -> Content:
    """Returns what this version holds."""
    rng = np.random.default_rng(version)
    count = int(rng.integers(1, 3000))
    rows = {
        name: Rows(rng.integers(-(2**63), 2**63, count), rng.standard_normal((count, dim), np.float32))
        for name, dim in (("user", 8), ("video", 32), ("author", 8))
    }
    deleted = {"user": rng.integers(0, 2**63, 50)} if version.sequence > 1 else {}
    return Content(rows=rows, deleted=deleted, dense={"bias": rng.standard_normal(5)})


def write(root: Path) -> None:
    """Writes versions until it is killed."""
    folder = DeltaFolder(root)
    epoch, previous = next_epoch(root), max(folder.versions(), default=None)
    for sequence in range(1, 10**6):
        version, base = Version(epoch, sequence), Version(epoch, 1)
        folder.write_part(version, 0, content_of(version), "float32")
        folder.commit(
            Manifest(
                kind="base" if sequence == 1 else "delta",
                version=version,
                previous=previous,
                base=base,
                step=sequence,
                event_time_ms=0,
                created_ms=0,
                position=[],
                format="float32",
            )
        )
        previous = version


def is_whole(folder: DeltaFolder, version: Version) -> bool:
    """Says whether a version holds what it must, all of it."""
    got, wanted = folder.read(version), content_of(version)
    assert got.rows.keys() == wanted.rows.keys() and got.dense and wanted.dense
    for name, rows in wanted.rows.items():
        np.testing.assert_array_equal(got.rows[name].ids, rows.ids)
        np.testing.assert_array_equal(got.rows[name].vectors, rows.vectors)
    for name, ids in wanted.deleted.items():
        np.testing.assert_array_equal(got.deleted[name], ids)
    np.testing.assert_array_equal(got.dense["bias"], wanted.dense["bias"])
    return True


def main(root: Path, kills: int) -> None:
    """Kills as often as told."""
    rng = random.Random(0)
    pa.array(np.zeros(1))  # where there is pandas, pyarrow imports it now, and not in each child for longer than that lives
    reader, at = DeltaFolder(root), None
    seen: set[Version] = set()
    for _ in range(kills):
        child = os.fork()
        if not child:
            write(root)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for version in reader.versions():
            if version not in seen:
                assert is_whole(reader, version)
                seen.add(version)
        chain = reader.chain(at)
        at = chain[-1] if chain else at
        assert at == max(seen, default=None), (at, max(seen))
    begun = [name for name in os.listdir(root) if not (root / name / "manifest.json").exists()]
    extra = [str(path) for path in root.rglob("*") if path.name.startswith((".", "part-")) and path.parent.name not in begun]
    print(json.dumps({"whole": len(seen), "begun": sorted(begun), "extra": extra, "last": at}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
