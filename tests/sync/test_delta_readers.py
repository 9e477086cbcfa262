"""Holds what readers of the log are led to, what is kept for them, and that an object store is enough."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from monolith_jax.sync.delta import Content, DeltaFolder, Manifest, Rows, Version, next_epoch


def write(folder: DeltaFolder, text: str, **more: Any) -> None:
    """Writes versions: `B1.4<1.3` a base, `D1.5<1.3/1.4` a delta behind 1.3 whose base is 1.4. A base is the larger."""
    for word in text.split():
        name, _, rest = word[1:].partition("<")
        previous, _, base = rest.partition("/")
        version, before, below = (Version(*map(int, one.split("."))) if one else None for one in (name, previous, base))
        assert version
        count = 1000 if word[0] == "B" else 1
        rows = Rows(np.arange(count), np.full((count, 4), version.sequence, np.float32))
        folder.write_part(version, 0, Content(rows={"user": rows}, dense={}), "float32")
        manifest = Manifest(
            kind="base" if word[0] == "B" else "delta",
            version=version,
            previous=before,
            base=below or version,
            step=0,
            event_time_ms=0,
            created_ms=0,
            position=[],
            format="float32",
        )
        folder.commit(dataclasses.replace(manifest, **more))


def names(versions: list[Version]) -> str:
    return " ".join(f"{one.epoch}.{one.sequence}" for one in versions)


LOG = "B1.1 D1.2<1.1/1.1 D1.3<1.2/1.1 B1.4<1.3 D1.5<1.3/1.4 D1.6<1.5/1.4 B1.7<1.6 D1.8<1.6/1.7 D1.9<1.8/1.7"


def damage(root: Path, version: Version, name: str) -> None:
    path = root / version.folder / name
    path.write_bytes(path.read_bytes()[:-1])


def test_a_reader_is_led_from_nothing_to_the_newest(tmp_path: Path) -> None:
    reader = DeltaFolder(tmp_path / "log")
    assert reader.versions() == [] and reader.chain() == []
    write(DeltaFolder(tmp_path / "log"), LOG)
    assert names(reader.chain()) == "1.7 1.8 1.9"
    assert names(reader.chain(Version(1, 8))) == "1.9"
    assert names(reader.chain(Version(1, 2))) == "1.3 1.5 1.6 1.8 1.9"
    assert reader.chain(Version(1, 9)) == []
    assert reader.manifest(Version(1, 9)).num_bytes < reader.manifest(Version(1, 7)).num_bytes


def test_a_damaged_manifest_is_told_when_nothing_leads_past_it(tmp_path: Path) -> None:
    write(DeltaFolder(tmp_path), LOG)
    damage(tmp_path, Version(1, 9), "manifest.json")
    assert names(DeltaFolder(tmp_path).chain(Version(1, 6))) == "1.8"
    with pytest.raises(ValueError, match=r"00000001-0000000009/manifest\.json is damaged"):
        DeltaFolder(tmp_path).chain(Version(1, 8))
    damage(tmp_path, Version(1, 5), "manifest.json")
    assert names(DeltaFolder(tmp_path).chain(Version(1, 3))) == "1.7 1.8"
    damage(tmp_path, Version(1, 7), "manifest.json")
    damage(tmp_path, Version(1, 4), "manifest.json")
    assert names(DeltaFolder(tmp_path).chain()) == "1.1 1.2 1.3"


def test_a_reader_of_another_log_is_told(tmp_path: Path) -> None:
    write(DeltaFolder(tmp_path), "B1.1")
    with pytest.raises(
        ValueError, match=r"ends at 00000001-0000000001, but its reader has 00000002-0000000001: it is another log"
    ):
        DeltaFolder(tmp_path).chain(Version(2, 1))
    with pytest.raises(ValueError, match="ends at nothing"):
        DeltaFolder(tmp_path / "other").chain(Version(2, 1))


def test_what_a_resumed_trainer_takes_back_is_read_from_the_files(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    assert folder.since(0) == []
    write(folder, "B1.1")
    write(folder, "D1.2<1.1/1.1", step=5)
    write(folder, "D1.3<1.2/1.1 B1.4<1.3", step=10)
    assert names(folder.since(0)) == "1.2 1.3" and names(folder.since(7)) == "1.3" and folder.since(10) == []
    with pytest.raises(ValueError, match=r"what changed up to step 11.*begin its epoch with a base without `previous`"):
        folder.since(11)
    damage(tmp_path, Version(1, 2), "manifest.json")
    assert names(DeltaFolder(tmp_path).since(10)) == ""
    with pytest.raises(ValueError, match=r"00000001-0000000002/manifest\.json is damaged"):
        DeltaFolder(tmp_path).since(7)


def test_a_base_is_of_the_state_of_the_delta_before(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    write(folder, "B1.1 D1.2<1.1/1.1")
    with pytest.raises(ValueError, match=r"base .* is of step 5, its previous 00000001-0000000002 a delta of step 0"):
        write(folder, "B1.3<1.2", step=5)
    folder.write_part(Version(1, 4), 0, Content(), "float32")
    folder.commit(dataclasses.replace(folder.manifest(Version(1, 2)), version=Version(1, 4), previous=Version(1, 2)))
    with pytest.raises(ValueError, match=r"step 0 without dense weights: publish a delta with dense weights"):
        write(folder, "B1.5<1.4")
    damage(tmp_path, Version(1, 4), "manifest.json")
    write(DeltaFolder(tmp_path), "B1.6<1.4")
    with pytest.raises(ValueError, match=r"base 00000002-0000000001 names .* expected a delta of its own epoch"):
        write(folder, "B2.1<1.2")


def test_prune_keeps_the_newest_bases_and_what_follows(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    write(folder, LOG)
    with pytest.raises(ValueError, match="keep_bases must be at least 1, got 0"):
        folder.prune(keep_bases=0)
    assert folder.prune(keep_bases=4) == []
    assert names(folder.prune()) == "1.1 1.2 1.3"
    assert names(folder.versions()) == "1.4 1.5 1.6 1.7 1.8 1.9" == names(DeltaFolder(tmp_path).versions())
    assert names(folder.chain(Version(1, 3))) == "1.5 1.6 1.8 1.9"
    assert names(folder.prune(keep_bases=1)) == "1.4 1.5 1.6"
    assert folder.prune(keep_bases=1) == []
    assert sorted(os.listdir(tmp_path)) == [Version(1, n).folder for n in (7, 8, 9)]


def test_a_damaged_base_does_not_count_as_kept(tmp_path: Path) -> None:
    write(DeltaFolder(tmp_path), LOG)
    damage(tmp_path, Version(1, 7), "manifest.json")
    assert names(DeltaFolder(tmp_path).prune(keep_bases=1)) == "1.1 1.2 1.3"


def test_prune_keeps_what_a_living_reader_needs(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    write(folder, LOG)
    folder.register("near", Version(1, 5))
    assert names(folder.prune(keep_bases=1)) == "1.1 1.2 1.3 1.4"
    assert names(folder.chain(Version(1, 5))) == "1.6 1.8 1.9"
    folder.register("near", Version(1, 8))
    assert names(folder.prune(keep_bases=1)) == "1.5 1.6"


def test_a_reader_far_behind_goes_through_a_base_and_keeps_nothing(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    many = " ".join(f"D1.{n}<1.{n - 1}/1.1" for n in range(2, 40))
    write(folder, f"B1.1 {many} B1.40<1.39 D1.41<1.39/1.40")
    folder.register("far", Version(1, 1))
    assert names(folder.chain(Version(1, 1))) == "1.40 1.41"
    gone = folder.prune(keep_bases=1)
    assert gone == [Version(1, n) for n in range(2, 40)], "where the reader stands is kept, what it will not read is not"
    assert names(folder.chain(Version(1, 1))) == "1.40 1.41"


def test_a_silent_reader_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = DeltaFolder(tmp_path)
    write(folder, LOG)
    folder.register("dead", Version(1, 2))
    folder.register("alive", Version(1, 8))
    told = folder.readers()
    assert told["dead"][0] == Version(1, 2) and 0 <= told["dead"][1] < 5 and told.keys() == {"dead", "alive"}
    assert folder.prune() == [Version(1, 1)]
    now = __import__("time").time()
    monkeypatch.setattr("monolith_jax.sync.readers.time.time", lambda: now + 4000)
    folder.register("alive", Version(1, 8))
    assert names(folder.prune()) == "1.2 1.3"
    assert folder.readers().keys() == {"alive"}
    folder.unregister("alive")
    folder.unregister("alive")
    assert folder.readers() == {}


def test_readers_names_and_damaged_registrations(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    for name in ("", "../x", ".x", "a b"):
        with pytest.raises(ValueError, match="is no name of a reader"):
            folder.register(name, Version(1, 1))
    folder.register("host-1.example.17", Version(1, 1))
    (tmp_path / "readers" / "broken.json").write_text("{")
    assert folder.readers().keys() == {"host-1.example.17"}
    assert folder.versions() == [] and next_epoch(tmp_path) == 1


def test_a_version_that_is_pruned_while_it_is_read_is_missing_not_half(tmp_path: Path) -> None:
    write(DeltaFolder(tmp_path), LOG)
    reader = DeltaFolder(tmp_path)
    assert reader.manifest(Version(1, 2)).counts == {"user": [1, 0]}
    shutil.rmtree(tmp_path / Version(1, 2).folder)
    with pytest.raises(ValueError, match=r"00000001-0000000002/rows-0-4\.arrow is missing"):
        reader.read(Version(1, 2))


def test_prune_takes_what_was_left_without_a_manifest(tmp_path: Path) -> None:
    folder = DeltaFolder(tmp_path)
    write(folder, "B1.1 D1.2<1.1/1.1 D1.3<1.2/1.1")
    folder.write_part(Version(1, 4), 0, Content(dense={}), "float32")
    write(folder, "D1.5<1.3/1.1 B1.6<1.5")
    folder.write_part(Version(1, 7), 0, Content(dense={}), "float32")
    folder.prune(keep_bases=1)
    assert sorted(os.listdir(tmp_path)) == [Version(1, 6).folder, Version(1, 7).folder]


class ObjectStore(MemoryFileSystem):
    """Files in memory that cannot be renamed, and a client that remembers listings until it is told to forget them."""

    cachable = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return "/" + str(path).removeprefix("gs://").strip("/") if str(path).strip("/") else ""

    def _no_rename(self, *_: object, **__: object) -> None:
        raise NotImplementedError("an object store cannot rename")

    mv = rename = move = _no_rename

    def rm_file(self, path: str) -> None:
        self.invalidate_cache()  # else it would find the folder full that it has emptied
        super().rm_file(path)

    def ls(self, path: str, detail: bool = True, **_: object) -> list[Any]:
        known: Any = self.dircache.get(path)
        if known is None:
            self.dircache[path] = known = super().ls(path, detail=True)
        return known if detail else [one["name"] for one in known]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Returns an address in an object store as `etils` reaches it, through fsspec."""
    monkeypatch.setattr(ObjectStore, "store", {})
    monkeypatch.setattr(ObjectStore, "pseudo_dirs", [""])
    file_system = ObjectStore()
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: file_system)
    place: Any = epath.Path("gs://bucket")
    remembered = type(place._backend)._get_filesystem
    remembered.cache_clear()
    yield "gs://bucket/run/deltas"
    remembered.cache_clear()


def test_an_object_store_is_enough(bucket: str) -> None:
    writer, reader = DeltaFolder(bucket), DeltaFolder(bucket)
    assert reader.versions() == [] and next_epoch(bucket) == 1
    write(writer, "B1.1")
    assert names(reader.chain()) == "1.1"
    writer.write_part(Version(1, 2), 0, Content(dense={}), "int8")
    assert names(reader.versions()) == "1.1"
    write(writer, "D1.3<1.1/1.1 B1.4<1.3 D1.5<1.3/1.4")
    assert names(reader.chain(Version(1, 1))) == "1.3 1.5"
    assert reader.read(Version(1, 5)).rows["user"].vectors.tolist() == [[5.0] * 4]
    manifest = epath.Path(bucket) / Version(1, 5).folder / "manifest.json"
    assert json.loads(manifest.read_text())["version"] == [1, 5]
    reader.register("one", Version(1, 3))
    assert writer.readers()["one"][0] == Version(1, 3)
    assert names(writer.prune(keep_bases=1)) == "1.1"
    writer.unregister("one")
    assert names(writer.prune(keep_bases=1)) == "1.3"
    writer.write_part(Version(1, 6), 0, Content(dense={}), "int8")
    assert next_epoch(bucket) == 2
    write(DeltaFolder(bucket), "D2.1<1.5/1.4")
    assert {one.parts[-2] for one in epath.Path(bucket).glob("*/*")} == {Version(*v).folder for v in ((1, 4), (1, 5), (2, 1))}
    assert names(reader.chain(Version(1, 3))) == "1.5 2.1"
