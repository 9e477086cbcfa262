"""Snapshots in a second place: what is there is whole, and a run whose folder is lost goes on from it."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from launch.bench import kill
from monolith_jax.mirror import Mirror
from monolith_jax.snapshot import Committed, SnapshotConfig, Snapshots
from monolith_jax.stream.spill import Spill
from tests import test_flow
from tests.launch import test_several
from tests.test_snapshot import IDENTITY, assert_is, make_extras, make_host, make_state

compile_cache = test_flow.compile_cache
from_the_root = test_flow.from_the_root
END = re.compile(r"going on from the snapshot of step 28, [\d.]+ MB from \S+ in [\d.]+ s")


def opened(run: Path, place: str, told: list[Committed] | None = None, keep: int = 2) -> Snapshots:
    return Snapshots(SnapshotConfig(keep=keep, mirror=place), run / "snapshots", tell=told.append if told is not None else None)


def save(snapshots: Snapshots, *steps: int, copied: bool = True) -> None:
    for step in steps:
        snapshots.save(step, make_state(step), make_host(step), make_extras(step), IDENTITY)
        snapshots.wait()
        if snapshots._mirror and copied:
            snapshots._mirror.wait()


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
    assert text.count("saved step ") == 4 and re.search(rf"saved step 28: .*; in {re.escape(place)} after ", text), text
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
    assert Mirror(str(place), tmp_path / "run" / "snapshots", 2).steps() == [2, 3], "the one before as well, from the start on"
    with pytest.raises(ValueError, match=r"SnapshotConfig.mirror = 'ftp://a/b': .*cannot read ftp://"):
        opened(tmp_path / "new", "ftp://a/b")


class Server:
    """A place whose answers can be held back, or be errors of its client."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.answers = threading.Event()
        self.asked = threading.Event()
        self.error: Exception | None = None
        writing = Mirror._writing

        def slow(mirror: Mirror, name: str) -> object:
            self.asked.set()
            assert self.answers.wait(60)
            if self.error:
                raise self.error
            return writing(mirror, name)

        patch.setattr(Mirror, "_writing", slow)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(monkeypatch)
    yield server
    server.answers.set()


def until(true: Callable[[], object]) -> None:
    last = time.monotonic() + 60
    while not true():
        assert time.monotonic() < last
        time.sleep(0.01)


def test_a_place_that_never_answers_stops_no_training(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monolith_jax.mirror.DEADLINE_S", 0.5)
    run, place, told = tmp_path / "run", str(tmp_path / "mirror"), list[Committed]()
    snapshots = opened(run, place, told)
    save(snapshots, 1, copied=False)
    until(lambda: told)
    assert "; NOT in " in told[0].mirrored and "has not ended after 0 s; it goes on" in told[0].mirrored
    save(snapshots, 2, 3, copied=False)
    assert [one.step for one in told] == [1, 2, 3]
    assert all(re.search(r"; NOT in .*: the copy of step 1 has not ended after \d+ s", one.mirrored) for one in told[1:])
    with pytest.raises(ValueError, match=r"the snapshot of step 3 is in .*, but not in .*: its copy has not ended"):
        snapshots.close()
    server.answers.set()
    mirror = Mirror(place, run / "snapshots", 2)
    until(lambda: mirror.steps() == [1, 3] and not (run / ".mirrored").exists())
    assert len(told) == 3


def test_what_the_run_deletes_meanwhile_is_copied_whole(tmp_path: Path, server: Server) -> None:
    run, place, told = tmp_path / "run", str(tmp_path / "mirror"), list[Committed]()
    snapshots = opened(run, place, told, keep=1)
    save(snapshots, 1, 2, 3, copied=False)
    assert os.listdir(run / "snapshots") == ["3"] and sorted(os.listdir(run / ".mirrored" / "snapshots")) == ["1", "3"]
    server.answers.set()
    until(lambda: Mirror(place, run / "snapshots", 2).steps()[:1] == [1] or len(told) == 3)
    snapshots.close()
    assert [(one.step, one.mirrored[:5]) for one in told] == [(2, "; NOT"), (1, "; in "), (3, "; in ")]
    shutil.rmtree(run)
    again = opened(run, place)
    assert_is(again.restore(3, make_state(0), IDENTITY), 3)
    again.close()


@pytest.mark.parametrize("links", [True, False])
def test_a_half_that_was_deleted_is_not_taken(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    run, place = tmp_path / "run", str(tmp_path / "mirror")
    (run / "snapshots" / "5").mkdir(parents=True)
    for index in range(20):
        (run / "snapshots" / "5" / f"{index:02}").write_text("x")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("no links here"))
    monkeypatch.setattr("monolith_jax.mirror._AT_ONCE", 2)
    mirror, told = Mirror(place, run / "snapshots", 2), list[str]()
    mirror.send(5, told.append)
    assert server.asked.wait(60)
    for index in range(10, 20):
        (run / "snapshots" / "5" / f"{index:02}").unlink()
    server.answers.set()
    mirror.wait()
    assert mirror.steps() == ([5] if links else [])
    assert ("; in " if links else "No such file") in told[0] and bool(mirror.behind) != links
    if links:
        shutil.rmtree(run)
        assert mirror.fetch() == 5 and len(os.listdir(run / "snapshots" / "5")) == 20


def test_errors_of_clients_stop_no_training(tmp_path: Path, server: Server) -> None:
    server.answers.set()
    run, place, told = tmp_path / "run", str(tmp_path / "mirror"), list[Committed]()
    snapshots = opened(run, place, told)
    for step, server.error in enumerate((RuntimeError("StandbyException"), ValueError("no JSON"), KeyError("a")), 1):
        save(snapshots, step)
    assert [one.mirrored.partition("may be: ")[2] for one in told] == ["StandbyException", "no JSON", "'a'"]
    with pytest.raises(ValueError, match="the snapshot of step 3 is in"):
        snapshots.close()


def test_the_process_ends_although_a_copy_does_not(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from monolith_jax import mirror
mirror.DEADLINE_S = 0.5
mirror.Mirror._writing = lambda *_: time.sleep(1000)
(Path(sys.argv[1]) / "snapshots" / "5").mkdir(parents=True)
(Path(sys.argv[1]) / "snapshots" / "5" / "a").write_text("x")
here = mirror.Mirror(sys.argv[1] + " mirror", Path(sys.argv[1]) / "snapshots", 2)
here.send(5, print)
here.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=60, cwd=test_flow.ROOT
    )
    assert done.returncode == 0 and done.stdout.count("; NOT in ") == 1, done.stdout + done.stderr


def test_what_a_killed_run_did_not_copy_is_copied_at_the_start(tmp_path: Path) -> None:
    run, place = tmp_path / "run", str(tmp_path / "mirror")
    snapshots = opened(run, place)
    save(snapshots, 5)
    snapshots.close()
    unmirrored = Snapshots(SnapshotConfig(), run / "snapshots")
    save(unmirrored, 10)
    unmirrored.close()
    (run / ".mirrored" / "snapshots" / "10").mkdir(parents=True)
    (run / ".mirrored" / "snapshots" / "10" / "left").write_text("")
    opened(run, place).close()
    assert Mirror(place, run / "snapshots", 2).steps() == [5, 10] and not (run / ".mirrored").exists()
    opened(run, str(tmp_path / "new")).close()
    assert Mirror(str(tmp_path / "new"), run / "snapshots", 2).steps() == [10]


def test_a_mirror_in_the_run_folder_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "link").symlink_to(run)
    for place in (run, run / "mirror", run / "snapshots", tmp_path / "link" / "mirror", tmp_path / "x" / ".." / "run" / "m"):
        with pytest.raises(ValueError, match=r"SnapshotConfig.mirror = .* in the run folder .*; name a place outside"):
            opened(run, str(place))
    opened(run, str(tmp_path / "run 2")).close()


def test_a_spill_and_room_set_apart_are_not_copied(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "snapshots").mkdir(parents=True)
    spill = Spill(run / "stream" / "0" / "spill")
    spill.append("a", [np.zeros(1000)])
    for name in ("metrics.jsonl", "stream/0/cuts", "stream/0/.draft", "stream/.hidden/a", "stream/spill.log"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    for name in ("room", "full of zeros", "small room"):
        with (run / name).open("wb") as file:
            file.write(b"x" * 10)
            file.truncate(1 << (20 if name == "small room" else 30))
            if name == "full of zeros":
                os.posix_fallocate(file.fileno(), 0, 1 << 30)
    mirror = Mirror(str(tmp_path / "mirror"), run / "snapshots", 2)
    assert mirror._beside() == ["full of zeros", "metrics.jsonl", "small room", "stream/0/cuts", "stream/spill.log"]
    spill.close()


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
