"""Holds that only whole versions are read: no damaged file, and nothing of a writer that was killed."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from monolith_jax.sync.delta import FORMATS, Content, DeltaFolder, Version, next_epoch
from monolith_jax.sync.manifest import sealed
from tests.sync.written_log import BASE, NEXT, write_two


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_or_a_missing_end_is_refused(format: str, tmp_path: Path) -> None:
    write_two(tmp_path, format)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 2 * 4 + 1
    rng = random.Random(0)
    refused = 0
    for attempt in range(200):
        path = files[attempt % len(files)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        if attempt // len(files) % 2:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(whole)) :]
        path.write_bytes(damaged)
        version = Version.of_folder(path.parent.name)
        assert version is not None
        with pytest.raises(ValueError) as error:
            DeltaFolder(tmp_path).read(version)
        assert str(path) in str(error.value) and "expected" in str(error.value) and "got" in str(error.value)
        refused += 1
        path.write_bytes(whole)
    assert refused == 200
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            version = Version.of_folder(path.parent.name)
            assert version is not None
            DeltaFolder(tmp_path).read(version)
        path.write_bytes(whole)
    assert DeltaFolder(tmp_path).chain() == [BASE, NEXT]


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    write_two(tmp_path)
    path = tmp_path / NEXT.folder / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
                DeltaFolder(tmp_path).manifest(NEXT)


def test_a_folder_under_another_name_is_refused(tmp_path: Path) -> None:
    write_two(tmp_path)
    shutil.move(tmp_path / NEXT.folder, tmp_path / Version(3, 9).folder)
    with pytest.raises(ValueError, match=r"manifest\.json is of version 00000001-0000000002: a folder was moved"):
        DeltaFolder(tmp_path).read(Version(3, 9))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    write_two(tmp_path)
    path = tmp_path / NEXT.folder / "manifest.json"
    told = json.loads(path.read_text())
    del told["xxh3"]
    path.write_bytes(sealed(told | {"schema": 2}))
    with pytest.raises(ValueError, match=r"manifest\.json is of layout 2, this reader knows 1"):
        DeltaFolder(tmp_path).read(NEXT)


def test_a_killed_writer_leaves_whole_versions_only(tmp_path: Path) -> None:
    program = Path(__file__).parent / "delta_killed.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path, "50"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(program.parent.parent.parent), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["whole"] > 0
    killed = {name for name in told["begun"]}
    assert len(killed) <= 1, "leftovers of all but the last writer are gone"
    folder = DeltaFolder(tmp_path)
    epoch = next_epoch(tmp_path)
    assert epoch > max(version.epoch for version in folder.versions())
    folder.write_part(Version(epoch, 1), 0, Content(dense={}), "float32")
    assert not killed & {path.name for path in tmp_path.iterdir()}
