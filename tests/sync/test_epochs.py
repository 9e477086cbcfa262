"""How a new epoch begins: with what readers are ahead of, or with a base where that cannot be told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monolith_jax.sync.delta import Content, DeltaFolder, Manifest, Rows, Version
from monolith_jax.sync.epochs import Opening, open_epoch


class Log:
    """Writes versions whose only row, or deletion, is an id."""

    def __init__(self, root: Path) -> None:
        self.folder = DeltaFolder(root)
        self.base = self.last = Version(0, 0)

    def write(
        self, epoch: int, sequence: int, step: int, kind: Any = "delta", deleted: bool = False, anew: bool = False
    ) -> None:
        version, ids = Version(epoch, sequence), np.array([100 * epoch + sequence])
        rows = {} if deleted else {"a": Rows(ids, np.ones((1, 2), np.float32))}
        dense = {"w": np.ones(1, np.float32)}
        content = Content(rows=rows, deleted={"a": ids} if deleted else {}, dense=dense)
        self.folder.write_part(version, 0, content, "float32")
        first = self.last == Version(0, 0) or anew or (self.last == self.base and self.base.epoch == epoch)
        previous = None if first else self.last
        if kind == "base":
            self.base = version
        self.folder.commit(
            Manifest(
                kind=kind, version=version, previous=previous, base=self.base, step=step, event_time_ms=0, created_ms=0,
                position=[], format="float32",
            )
        )  # fmt: skip
        if kind == "delta" or first:
            self.last = version


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Returns a log with a base at step 5, deltas at 10, 20 (a deletion), 30, a base of that, and a delta at 40."""
    log = Log(tmp_path)
    log.write(1, 0, 5, "base")
    log.write(1, 1, 10)
    log.write(1, 2, 20, deleted=True)
    log.write(1, 3, 30)
    log.write(1, 4, 30, "base")
    log.write(1, 5, 40)
    return log


def ids_of(log: Log, opening: Opening) -> list[int]:
    return [one for ids in opening.ids(log.folder).values() for one in ids.tolist()]


def test_a_new_folder_or_one_of_another_run_begins_with_a_base(log: Log, tmp_path: Path) -> None:
    assert open_epoch(DeltaFolder(tmp_path / "new"), 1, 0, None) == Opening(1, None, None)
    assert open_epoch(log.folder, 2, 0, None) == Opening(2, None, None)


@pytest.mark.parametrize(("step", "ids"), [(40, []), (35, [105]), (30, [105]), (29, [103, 105]), (10, [102, 103, 105])])
def test_what_readers_are_ahead_of_is_taken_back(log: Log, step: int, ids: list[int]) -> None:
    opening = open_epoch(log.folder, 2, step, 1)
    assert (opening.epoch, opening.previous) == (2, Version(1, 5))
    assert opening.base is not None and sorted(ids_of(log, opening)) == ids
    assert Opening.from_json(opening.to_json()) == opening


@pytest.mark.parametrize(("step", "of_snapshot"), [(4, 1), (41, 1), (35, 2), (40, None)])
def test_where_nobody_can_tell_it_begins_with_a_base(log: Log, step: int, of_snapshot: int | None) -> None:
    # Before the first base; after the last delta; the snapshot's own epoch published nothing; nothing was published then.
    assert open_epoch(log.folder, 3, step, of_snapshot).base is None


def test_deltas_of_epochs_after_the_snapshot_are_taken_back_whatever_their_step(log: Log) -> None:
    log.write(2, 0, 25)
    log.write(2, 1, 28)
    opening = open_epoch(log.folder, 3, 29, 1)
    assert sorted(ids_of(log, opening)) == [103, 105, 200, 201]
    assert sorted(ids_of(log, open_epoch(log.folder, 3, 25, 2))) == [201]
    assert open_epoch(log.folder, 3, 29, 2).base is None


def test_a_missing_or_damaged_delta_makes_it_begin_with_a_base(log: Log) -> None:
    (place,) = log.folder.root.glob("*-0000000003/rows-0-2.arrow")
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(bytes(data))
    fresh = DeltaFolder(log.folder.root)
    assert open_epoch(fresh, 2, 35, 1).base is not None
    assert open_epoch(fresh, 2, 15, 1).base is None
    for part in log.folder.root.glob("*-0000000003"):
        part.rmtree()
    assert open_epoch(DeltaFolder(log.folder.root), 2, 15, 1).base is None
