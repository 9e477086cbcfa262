"""The log of deltas: a folder in which a trainer publishes versions, and from which any number of readers catch up.

In: `Content` and `Manifest` of each version. Out: the same, checked. `<root>/<epoch>-<sequence>/` has the files of one version
and, written last, `manifest.json`: with it the version is there, whole; without it nothing is, and the next epoch's writer
takes it away. `<root>/readers/` says where readers stand. Root is a local folder or an address in an object store (`gs://`,
`s3://`, `az://`). Any thread may call. A reader needs no jax.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from etils import epath

from monolith_jax.sync import readers
from monolith_jax.sync.chain import find_chain, find_since
from monolith_jax.sync.delta_files import Content, Part, read_files, write_files
from monolith_jax.sync.manifest import Manifest, Version, check_manifest, from_bytes, sealed, to_bytes, unsealed
from monolith_jax.sync.quantise import FORMATS, Format, Rows, check_format, dequantised, quantised
from monolith_jax.sync.storage import checksum, is_there, names_in, put, read_whole, remove, size_of, sync_folder

__all__ = [
    "FORMATS",
    "Content",
    "DeltaFolder",
    "Format",
    "Manifest",
    "Rows",
    "Version",
    "dequantised",
    "next_epoch",
    "quantised",
]

_MANIFEST = "manifest.json"
_LONGEST_WAIT_S = 0.05


def next_epoch(root: str | Path | epath.Path) -> int:
    """Returns the epoch of a trainer that starts now: one above all that began there. One process asks for all."""
    return 1 + max((version.epoch for version in _begun(names_in(epath.Path(root)))), default=0)


class DeltaFolder:
    """Writes and reads the log of deltas."""

    def __init__(self, root: str | Path | epath.Path) -> None:
        """Opens the log; nothing is read or written yet.

        Args:
            root: A folder; made by the first write.
        """
        self.root = epath.Path(root)
        self._committed: frozenset[Version] = frozenset()
        self._listed: tuple[frozenset[str], tuple[Version, ...]] = frozenset(), ()  # names, where all of them are committed
        self._manifests: dict[Version, Manifest] = {}
        self._cleaned_below = 0

    def write_part(
        self, version: Version, process: int, content: Content | Iterable[Content], format: str
    ) -> dict[str, list[Any]]:
        """Writes what one process has of a version; durable when it returns, and seen by nobody before `commit`.

        Args:
            version: A new one; what failed is tried again as the next version. `discard` takes its files away.
            process: Which one this is; each writes the rows of its own shards, one of them the dense weights.
            content: float32 vectors. Or blocks of them, which are written one by one; the first names every table.
            format: Of the vectors: float32, float16 or int8.

        Returns:
            Bytes and xxh3 of each file, by name.

        Raises:
            ValueError: The version was written before, a newer epoch has begun, or a dtype, shape or value is wrong.
        """
        self._check_new(version)
        folder, told = self.root / version.folder, self._part(version, process)
        if is_there(told):
            raise ValueError(f"{told} was written before: a version is written once, so take the next sequence number")
        self._clean(version.epoch)
        folder.mkdir(parents=True, exist_ok=True)
        part = write_files(folder, process, content, check_format(format))
        sync_folder(folder)
        sync_folder(self.root)
        put(told, sealed({"format": format, **asdict(part)}), durable=False)
        return part.files

    def commit(self, manifest: Manifest, num_processes: int = 1, timeout_s: float = 600.0) -> Manifest:
        """Makes a version seen, once every process has written its part. One process calls it.

        Args:
            manifest: What there is to tell; `dims`, `counts` and `files` are filled in from the parts.
            num_processes: How many parts there are.
            timeout_s: How long to wait for them.

        Returns:
            The manifest as it was written.

        Raises:
            TimeoutError: A part did not come.
            ValueError: The manifest contradicts itself or the parts, a newer epoch has begun, or a file is not there.
        """
        check_manifest(manifest)
        self._check_new(manifest.version)
        self._check_previous(manifest)
        parts = [self._wait_for(manifest, process, time.monotonic() + timeout_s) for process in range(num_processes)]
        dims: dict[str, int] = {}
        counts: dict[str, Sequence[int]] = {}
        files: dict[str, Sequence[Any]] = {}
        for part in parts:
            for table, dim in part.dims.items():
                if dims.setdefault(table, dim) != dim:
                    raise ValueError(
                        f"vectors of {table} have {dim} floats in one part of {manifest.version.folder}, {dims[table]} before"
                    )
            for table, more in part.counts.items():
                before = counts.get(table, (0, 0))
                counts[table] = [before[0] + more[0], before[1] + more[1]]
            files |= part.files
        whole = replace(manifest, dims=dims, counts=counts, files=files)
        self._check_whole(whole)
        data = to_bytes(whole)
        place = self.root / manifest.version.folder / _MANIFEST
        put(place, data)
        for process in range(num_processes):
            remove(self._part(manifest.version, process))
        self._manifests[manifest.version] = whole = from_bytes(data, str(place))
        return whole

    def discard(self, version: Version) -> None:
        """Takes away what was written of a version that will not be committed; nothing where it was."""
        if not is_there(self.root / version.folder / _MANIFEST):
            remove(self.root / version.folder)

    def versions(self) -> list[Version]:
        """Returns the committed versions, ascending. Costs a listing, and a look at each that is not yet known as committed."""
        names = frozenset(names_in(self.root))
        same, there = self._listed
        if names == same:
            return list(there)
        begun = _begun(names)
        known = self._committed
        there = [one for one in begun if one in known or is_there(self.root / one.folder / _MANIFEST)]
        self._committed = frozenset(there)
        self._listed = (names if len(there) == len(begun) else frozenset(), tuple(there))
        for one in list(self._manifests):
            if one not in self._committed:
                self._manifests.pop(one, None)
        return there

    def manifest(self, version: Version) -> Manifest:
        """Returns the manifest of a version.

        Raises:
            ValueError: It is not there, damaged, or of another layout.
        """
        known = self._manifests.get(version)
        if known is None:
            place = self.root / version.folder / _MANIFEST
            known = from_bytes(_read(place), str(place))
            if known.version != version:
                raise ValueError(f"{place} is of version {known.version.folder}: a folder was moved or renamed; put it back")
            self._manifests[version] = known
        return known

    def read(self, version: Version) -> Content:
        """Returns what a version holds; its arrays are read-only.

        Raises:
            ValueError: A file is missing or damaged; it names the file, and what was expected and got.
        """
        manifest = self.manifest(version)
        files: dict[str, bytes] = {}
        for name, (size, wanted) in manifest.files.items():
            place = self.root / version.folder / name
            files[name] = data = _read(place)
            if len(data) != size or checksum(data) != wanted:
                raise ValueError(
                    f"{place} is damaged: expected {size} bytes with xxh3 {wanted}, got {len(data)} with {checksum(data)}. "
                    "Readers go on with what they have, and past it with the next base"
                )
        return read_files(files, manifest.format)

    def chain(self, after: Version | None = None, without: Collection[Version] = ()) -> list[Version]:
        """Returns what a reader reads next, in this order; empty where there is nothing new.

        These are the deltas behind `after` as far as they are unbroken; or the newest base and the deltas behind it, where that
        gets further, or as far with fewer bytes.

        Args:
            after: The version that the reader has, None if it has nothing. It never goes to a lower one.
            without: Versions that it could not read: a newer base may lead past them.

        Raises:
            ValueError: There is nothing new but damaged manifests, or the log is another one, which ends before `after`.
        """
        versions = self.versions()
        if after is not None and (not versions or after > versions[-1]):
            last = versions[-1].folder if versions else "nothing"
            raise ValueError(
                f"{self.root} ends at {last}, but its reader has {after.folder}: it is another log than the one that was "
                "read, or has lost its end. Start the reader anew, or give it the folder that it had"
            )
        faults: list[ValueError] = []

        def manifest_of(version: Version) -> Manifest | None:
            try:
                return self.manifest(version)
            except ValueError as error:
                faults.append(error)
                return None

        found = find_chain(versions, manifest_of, after, without)
        if faults and not found:
            raise faults[0]
        return found

    def since(self, step: int) -> list[Version]:
        """Returns the deltas that told of states after a step, ascending: a trainer that goes on there takes them back.

        Its first delta has every id that these have in `rows` or `deleted`: with the value it has now, or as deleted.

        Raises:
            ValueError: One is missing or damaged, or what changed up to the step is not told: begin the epoch with a
                base whose `previous` is None, which readers load whole.
        """
        versions = self.versions()
        return find_since(versions[-1], self.manifest, step) if versions else []

    def register(self, reader: str, version: Version) -> None:
        """Tells the writer where a reader stands, so that what it needs is kept. To be called again and again while it lives.

        Raises:
            ValueError: The name is not made of letters, digits, '-', '_' and '.'.
        """
        readers.tell(self.root, reader, version)

    def unregister(self, reader: str) -> None:
        """Forgets a reader that ends."""
        readers.forget(self.root, reader)

    def readers(self) -> dict[str, tuple[Version, float]]:
        """Returns of each registered reader the version it has, and how many seconds ago it said so."""
        return readers.told(self.root)

    def prune(self, keep_bases: int = 2, reader_timeout_s: float = 3600.0) -> list[Version]:
        """Removes what is older than the newest bases and needed by no living reader. One process calls it.

        Args:
            keep_bases: How many bases stay, with all deltas behind the oldest of them.
            reader_timeout_s: Readers that were silent for longer are forgotten.

        Returns:
            The versions that were removed.

        Raises:
            ValueError: `keep_bases` is below 1.
        """
        if keep_bases < 1:
            raise ValueError(f"keep_bases must be at least 1, got {keep_bases}: a reader that starts needs a base")
        for reader, (_, silent_s) in self.readers().items():
            if silent_s > reader_timeout_s:
                self.unregister(reader)
        versions = self.versions()
        bases = list(islice((one for one in reversed(versions) if self._is_base(one)), keep_bases))
        if len(bases) < keep_bases:
            return []
        needed: set[Version] = set()
        for version, _ in self.readers().values():
            if version < bases[-1]:
                needed |= {version, *self._needed_by(version, versions)}
        gone = {one for one in versions if one < bases[-1]} - needed
        self._committed -= gone
        for version in _begun(names_in(self.root)):
            if version in gone:
                remove(self.root / version.folder / _MANIFEST)  # first: what has no manifest is not there
            if version in gone or (version < bases[-1] and version not in versions):
                remove(self.root / version.folder)
        return sorted(gone)

    def _needed_by(self, after: Version, versions: list[Version]) -> list[Version]:
        try:
            return self.chain(after)
        except ValueError:
            return [one for one in versions if one > after]

    def _is_base(self, version: Version) -> bool:
        try:
            return self.manifest(version).kind == "base"
        except ValueError:
            return False

    def _part(self, version: Version, process: int) -> epath.Path:
        return self.root / version.folder / f"part-{process}.json"

    def _check_new(self, version: Version) -> None:
        newest = max((one.epoch for one in map(Version.of_folder, names_in(self.root)) if one), default=0)
        if newest > version.epoch:
            raise ValueError(
                f"{self.root} has epoch {newest}, this writer is of epoch {version.epoch}: another trainer has started "
                "there since. Stop this one, or give each a folder of its own"
            )
        if is_there(self.root / version.folder / _MANIFEST):
            raise ValueError(f"{self.root / version.folder} is committed: take the next sequence number")

    def _check_previous(self, manifest: Manifest) -> None:
        """Raises ValueError if a base holds another state than the delta that it follows."""
        if manifest.kind == "delta" or manifest.previous is None:
            return
        try:
            delta = self.manifest(manifest.previous)
        except ValueError:  # pruned or damaged, which a base is there to mend
            return
        if (delta.kind, delta.step, delta.has_dense) != ("delta", manifest.step, True):
            raise ValueError(
                f"base {manifest.version.folder} is of step {manifest.step}, its previous {delta.version.folder} a "
                f"{delta.kind} of step {delta.step} {'with' if delta.has_dense else 'without'} dense weights: "
                "publish a delta with dense weights from the state of a base, and name that"
            )

    def _clean(self, epoch: int) -> None:
        """Removes what writers of older epochs left without a manifest, or beside the last one."""
        if self._cleaned_below < epoch:
            committed = [version for version in self.versions() if version.epoch < epoch]
            for version in _begun(names_in(self.root)):
                if version.epoch < epoch and version not in committed:
                    remove(self.root / version.folder)
            for version in committed[-1:]:
                for name in names_in(self.root / version.folder):
                    if name.startswith("part-"):
                        remove(self.root / version.folder / name)
            self._cleaned_below = epoch

    def _wait_for(self, manifest: Manifest, process: int, until: float) -> Part:
        """Returns what a process wrote, once it is there."""
        place = self._part(manifest.version, process)
        pause_s = 0.001
        while not is_there(place):
            if time.monotonic() > until:
                raise TimeoutError(
                    f"process {process} has not written its part of {manifest.version.folder}: {place} is not there"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_WAIT_S)
        told = unsealed(_read(place), str(place))
        if told.pop("format") != manifest.format:
            raise ValueError(f"process {process} wrote {manifest.version.folder} in another format than {manifest.format}")
        return Part(**told)

    def _check_whole(self, manifest: Manifest) -> None:
        """Raises ValueError if a file is not as it was written, or a base lacks what a reader begins with."""
        for name, (size, _) in manifest.files.items():
            place = self.root / manifest.version.folder / name
            if not is_there(place) or size_of(place) != size:
                raise ValueError(
                    f"{place} is gone or has not the {size} bytes that were written: is another writer in this folder?"
                )
        if manifest.kind == "base" and not manifest.has_dense:
            raise ValueError(
                f"base {manifest.version.folder} has no dense weights; a reader begins with it, so it needs all of them"
            )
        if manifest.kind == "base" and any(deleted for _, deleted in manifest.counts.values()):
            raise ValueError(
                f"base {manifest.version.folder} has deleted ids; a reader begins with it, so there is nothing to delete"
            )


def _begun(names: Iterable[str]) -> list[Version]:
    """Returns the versions that folders stand for, ascending."""
    return sorted(version for name in names if (version := Version.of_folder(name)))


def _read(place: epath.Path) -> bytes:
    try:
        return read_whole(place)
    except FileNotFoundError:
        raise ValueError(f"{place} is missing: it was lost, or pruned while it was read. Look at the log again") from None
