"""Snapshots in a second place: what is there is whole, and a run whose folder is lost goes on from it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from launch.bench import kill
from monolith_jax.mirror import Mirror
from monolith_jax.snapshot import Committed, SnapshotConfig, Snapshots
from tests import test_flow
from tests.launch import test_several
from tests.test_snapshot import IDENTITY, assert_is, make_extras, make_host, make_state

compile_cache = test_flow.compile_cache
from_the_root = test_flow.from_the_root
END = re.compile(r"going on from the snapshot of step 28, [\d.]+ MB from \S+ in [\d.]+ s")


def opened(run: Path, place: str, told: list[Committed] | None = None, keep: int = 2) -> Snapshots:
    return Snapshots(SnapshotConfig(keep=keep, mirror=place), run / "snapshots", tell=told.append if told is not None else None)


def save(snapshots: Snapshots, *steps: int) -> None:
    for step in steps:
        snapshots.save(step, make_state(step), make_host(step), make_extras(step), IDENTITY)
        snapshots.wait()


def steps_with_files(mirror: Mirror) -> list[int]:
    """Returns the steps of which there is any file; an object store may still list folders that were emptied."""
    where = f"{mirror._at}/snapshots"
    files = mirror._files.get_file_info(fs.FileSelector(where, recursive=True))
    return sorted({int(one.path.removeprefix(where).split("/")[1]) for one in files if one.is_file})


def check_round_trip(run: Path, place: str) -> None:
    """Saves, loses the folder, and goes on, for any kind of place."""
    told: list[Committed] = []
    snapshots = opened(run, place, told)
    assert not snapshots.origin
    (run / "stream" / "0").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "stream" / "0" / "cuts ä.log").write_bytes(b"\0\1")
    (run / "deltas").mkdir()
    (run / "deltas" / "1").write_text("published")
    save(snapshots, 3, 5, 8)
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    save(snapshots, 9)
    (run / "metrics.jsonl").write_text("{}\n{}\n{}\n")
    snapshots.close()
    assert [one.step for one in told] == [3, 5, 8, 9]
    assert all(re.fullmatch(rf"; in {re.escape(place)} after [\d.]+ s more", one.mirrored) for one in told)
    mirror = Mirror(place, run / "snapshots", 2)
    assert mirror.steps() == [8, 9] == steps_with_files(mirror)
    assert mirror.fetch() is None, "there is a snapshot here"
    shutil.rmtree(run)
    again = opened(run, place)
    assert again.steps() == [9] and f" MB from {place} in " in again.origin
    assert_is(again.restore(9, make_state(0), IDENTITY), 9)
    assert (run / "metrics.jsonl").read_text() == "{}\n{}\n"
    assert (run / "stream" / "0" / "cuts ä.log").read_bytes() == b"\0\1"
    assert sorted(child.name for child in run.iterdir()) == ["metrics.jsonl", "snapshots", "stream"]
    save(again, 10)
    again.close()
    assert mirror.steps() == [9, 10]


def check_run_goes_on(whole: Path, run: Path, place: str) -> None:
    """Trains, loses the folder, and trains on: as if it had not been, for any kind of place."""
    mirrored = f"SnapshotConfig.mirror = {place!r}"
    _, text = test_flow.run(run, mirrored, steps=28)
    assert text.count(f"; in {place} after ") == 4
    shutil.rmtree(run)
    _, text = test_flow.run(run, mirrored)
    assert END.search(text), text
    assert kill.compare(whole, run) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(test_flow.ROOT)
        test_flow.run(folder)
    return folder


def test_a_snapshot_comes_back(tmp_path: Path) -> None:
    check_round_trip(tmp_path / "run", str(tmp_path / "mirror"))


def test_a_run_goes_on_from_the_mirror(whole: Path, tmp_path: Path) -> None:
    check_run_goes_on(whole, tmp_path / "run", str(tmp_path / "mirror"))


class Killed(BaseException):
    """What ends the process, as far as a test can."""


def test_what_is_cut_short_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, place = tmp_path / "run", str(tmp_path / "mirror")
    snapshots = opened(run, place, keep=1)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "same").write_text("same")
    save(snapshots, 1)
    snapshots.close()
    snapshots = Snapshots(SnapshotConfig(keep=9), run / "snapshots")
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    save(snapshots, 2)
    snapshots.close()
    writing, removing, left = Mirror._writing, Mirror._remove_file, 0

    def counted(original: Callable) -> Callable:
        def call(self: Mirror, name: str) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                if original is writing:  # a file that is begun, as a killed process leaves it where files are not put whole
                    original(self, name).close()
                raise Killed
            return original(self, name)

        return call

    monkeypatch.setattr(Mirror, "_writing", counted(writing))
    monkeypatch.setattr(Mirror, "_remove_file", counted(removing))
    monkeypatch.setattr("monolith_jax.mirror._AT_ONCE", 1)
    for moment in range(100):
        left = moment
        try:
            Mirror(place, run / "snapshots", 1).put(2)
            break
        except Killed:
            left = 10**9
        # Another machine comes at this moment.
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        found = opened(other, place)
        assert found.latest() in (1, 2), moment
        assert_is(found.restore(found.latest() or 0, make_state(0), IDENTITY), found.latest() or 0)
        found.close()
        assert (other / "metrics.jsonl").read_text() == "{}\n" * (found.latest() or 0) and (other / "same").exists()
    assert moment > 10
    left = 10**9
    assert Mirror(place, run / "snapshots", 1).steps() == [2]
    assert os.listdir(tmp_path / "mirror" / "snapshots") == ["2"]
    assert sum(path.is_file() for path in (tmp_path / "mirror" / "beside").rglob("*")) == 2


def test_a_fetch_that_is_cut_short_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, place = tmp_path / "run", str(tmp_path / "mirror")
    snapshots = opened(run, place)
    save(snapshots, 1)
    snapshots.close()
    shutil.rmtree(run)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(Killed))
        Mirror(place, run / "snapshots", 1).fetch()
    assert not any((run / "snapshots").iterdir())
    again = opened(run, place)
    assert_is(again.restore(1, make_state(0), IDENTITY), 1)
    again.close()


def test_damage_is_told_by_name(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "mirror"
    snapshots = opened(run, str(place))
    save(snapshots, 1)
    snapshots.close()
    manifest = json.loads((place / "manifests" / "1.json").read_text())
    name = max(manifest["files"], key=lambda name: manifest["files"][name][0])
    data = (place / name).read_bytes()
    shutil.rmtree(run)
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), None):
        (place / name).unlink() if damaged is None else (place / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{re.escape(name)} is {'missing' if damaged is None else 'damaged'}"):
            opened(run, str(place))
        assert not any((run / "snapshots").glob("*"))
    (place / "manifests" / "1.json").write_text(json.dumps(manifest)[:-2])
    assert opened(run, str(place)).latest() is None


def test_a_mirror_that_is_ahead_is_refused(tmp_path: Path) -> None:
    for name, steps in (("here", [1]), ("there", [2, 7])):
        snapshots = opened(tmp_path / name, str(tmp_path / name / ".." / f"mirror of {name}"))
        save(snapshots, *steps)
        snapshots.close()
    with pytest.raises(ValueError, match=r"mirror of there has a snapshot of step 7, .* none after step 1: another machine"):
        opened(tmp_path / "here", str(tmp_path / "mirror of there"))
    opened(tmp_path / "there", str(tmp_path / "mirror of here")).close()


def test_a_place_that_cannot_be_reached_stops_no_training(tmp_path: Path) -> None:
    place, told = tmp_path / "mirror", list[Committed]()
    snapshots = opened(tmp_path / "run", str(place), told)
    place.write_text("a file")
    save(snapshots, 1, 2)
    assert all(f"; NOT in {place}, the next one may be: " in one.mirrored for one in told)
    with pytest.raises(ValueError, match=r"the snapshot of step 2 is in .*run/snapshots, but not in .*mirror: "):
        snapshots.close()
    place.unlink()
    snapshots = opened(tmp_path / "run", str(place), told)
    save(snapshots, 3)
    snapshots.close()
    assert Mirror(str(place), tmp_path / "run" / "snapshots", 2).steps() == [3]
    with pytest.raises(ValueError, match=r"SnapshotConfig.mirror = 'ftp://a/b': .*cannot read ftp://"):
        opened(tmp_path / "new", "ftp://a/b")


@pytest.mark.slow
def test_several_processes_go_on_from_the_mirror(tmp_path: Path) -> None:
    mirrored = f"SnapshotConfig.mirror = '{tmp_path / 'mirror'}'"
    test_several.train_together(tmp_path / "run", 2, 7, mirrored)
    shutil.rmtree(tmp_path / "run")
    printed = test_several.train_together(tmp_path / "run", 2, 14, mirrored)
    assert "going on from the snapshot of step 7, " in printed[0]
    test_several.train_together(tmp_path / "whole", 2, 7)
    test_several.train_together(tmp_path / "whole", 2, 14)
    assert kill.compare(tmp_path / "whole", tmp_path / "run") == []
