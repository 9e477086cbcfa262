"""A run's newest snapshots in another place, an object store say: a machine that is lost takes no run with it.

In: a run folder with a snapshot that is whole, and a path or URL (`s3://`, `hdfs://`, `webhdfs://`: see `stream.remote`). Out:
`snapshots/<step>/` there with the same files; what is beside it in the run folder, metrics and the cuts of a live stream, as
`beside/<name>/<size>-<time>`; and, last of all, `manifests/<step>.json`, which names every file. A snapshot without a readable
manifest is not there, and no file is written twice: whatever is cut short, by a kill or by the network, is never taken. A file
beside the snapshots may be longer than its snapshot knows; a run that goes on cuts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from pyarrow import fs

from monolith_jax.ids.messages import everyone
from monolith_jax.stream.remote import RemotePath, is_remote
from monolith_jax.types import Exchange

_FAULTS = (OSError, pa.ArrowException)
_PIECE_BYTES = 8 << 20
_AT_ONCE = 8
_DELTAS = "deltas"
"""What is published does not go with the snapshots: it has a place of its own where it is to outlive the machine."""


class Mirror:
    """Copies snapshots of one run folder to another place, and back."""

    def __init__(self, place: str, folder: Path, keep: int) -> None:
        """Touches nothing yet.

        Args:
            place: Where the mirror is; no other run may have it.
            folder: The run's own snapshots, in its run folder.
            keep: Snapshots kept in the mirror.
        """
        self.place, self._folder, self._run, self._keep = place.rstrip("/"), folder, folder.parent, keep
        self.origin = ""
        """What was fetched, for people; empty: nothing."""
        self.behind = ""
        """Why the newest snapshot is not there; empty: it is."""
        if is_remote(self.place):
            self._files, self._at = RemotePath(self.place).filesystem()
        else:
            self._files, self._at = fs.LocalFileSystem(), str(Path(self.place).absolute())

    def steps(self) -> list[int]:
        """Returns the steps of all snapshots that are whole there, ascending."""
        found = [int(name[:-5]) for name, _ in self._listed("manifests") if name[:-5].isdigit() and name.endswith(".json")]
        return [step for step in sorted(found) if self._manifest(step)]

    def try_to_put(self, step: int) -> str:
        """Calls `put`; returns what came of it, for people. A place that cannot be reached stops no training."""
        self.behind = ""
        try:
            return f"; in {self.place} after {self.put(step):.1f} s more"
        except _FAULTS as error:
            self.behind = f"the snapshot of step {step} is in {self._folder}, but not in {self.place}: {error}"
            return f"; NOT in {self.place}, the next one may be: {error}"

    def put(self, step: int) -> float:
        """Copies a snapshot that is whole here; returns the seconds it took. Removes those that are not kept, and leftovers.

        Raises:
            OSError: The place cannot be reached or is full; the snapshots that were whole there still are.
        """
        started = time.monotonic()
        snapshot = self._folder / str(step)
        self._remove_file(f"manifests/{step}.json")
        names = sorted(str(path.relative_to(self._run)) for path in snapshot.rglob("*") if path.is_file())
        files = dict(zip(names, self._each(lambda name: self._put_file(name, name), names), strict=True))
        before = self._manifest(max(self.steps(), default=-1)) or {"beside": {}}
        names = self._beside()
        beside = dict(zip(names, self._each(lambda name: self._put_beside(name, before["beside"]), names), strict=True))
        manifest = {"step": step, "files": files, "beside": {name: put for name, put in beside.items() if put}}
        with self._writing(f"manifests/{step}.json") as stream:
            stream.write(json.dumps(manifest).encode())
        self._prune(step)
        return time.monotonic() - started

    def fetch(self) -> int | None:
        """Copies the newest snapshot to the run folder where there is none; returns its step, None where nothing had to come.

        Raises:
            OSError: The place cannot be reached.
            ValueError: The mirror is ahead of the run folder, or one of its files is missing or damaged.
        """
        started = time.monotonic()
        folder = self._folder
        here = max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=None)
        newest = max(self.steps(), default=None)
        if newest is None or here is not None:
            if newest is not None and here is not None and newest > here:
                raise ValueError(
                    f"the mirror {self.place} has a snapshot of step {newest}, {folder} none after step {here}: another "
                    f"machine went on with this run, or another run has the same mirror. Remove {folder} to go on from step "
                    f"{newest}, or set SnapshotConfig.mirror to another place"
                )
            return None
        manifest = self._manifest(newest)
        assert manifest
        draft = self._run / ".fetched"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            self._each(lambda name: self._get(name, draft / name, *manifest["files"][name]), manifest["files"])
            beside = manifest["beside"]
            self._each(lambda name: self._get(beside[name][0], draft / name, *beside[name][1:]), beside)
            for name in beside:
                (self._run / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(draft / name, self._run / name)
            folder.mkdir(exist_ok=True)
            os.rename(draft / folder.name / str(newest), folder / str(newest))  # the last: without it all is fetched again
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        num_bytes = sum(size for size, _ in manifest["files"].values())
        self.origin = f", {num_bytes / 1e6:,.1f} MB from {self.place} in {time.monotonic() - started:.1f} s"
        return newest

    def _beside(self) -> list[str]:
        """Returns the files that go with the snapshots."""
        found = (path.relative_to(self._run) for path in self._run.rglob("*") if path.is_file())
        return sorted(
            str(name) for name in found if name.parts[0] not in (self._folder.name, _DELTAS) and name.parts[0][0] != "."
        )

    def _each(self, work: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(work, names))

    def _put_file(self, name: str, to: str, most_bytes: int | None = None) -> tuple[int, str]:
        """Copies a file, or its first bytes; returns its size and checksum."""
        told, size = xxhash.xxh3_64(), 0
        with (self._run / name).open("rb") as file, self._writing(to) as stream:
            while piece := file.read(_PIECE_BYTES if most_bytes is None else min(_PIECE_BYTES, most_bytes - size)):
                stream.write(piece)
                told.update(piece)
                size += len(piece)
        return size, told.hexdigest()

    def _put_beside(self, name: str, before: dict[str, Any]) -> list[Any] | None:
        """Copies a file that may be growing, if it has; returns where it is, size and checksum; None if it has gone."""
        try:
            stat = (self._run / name).stat()
            to = f"beside/{name}/{stat.st_size}-{stat.st_mtime_ns}"
            known = before.get(name)
            return known if known and known[0] == to else [to, *self._put_file(name, to, stat.st_size)]
        except FileNotFoundError:
            return None

    def _writing(self, name: str) -> Any:
        if not self.place.startswith("s3://"):
            self._files.create_dir(f"{self._at}/{os.path.dirname(name)}", recursive=True)
        return self._files.open_output_stream(f"{self._at}/{name}", compression=None)

    def _get(self, name: str, to: Path, size: int, checksum: str) -> None:
        """Copies a file back."""
        told, got = xxhash.xxh3_64(), 0
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._files.open_input_stream(f"{self._at}/{name}", compression=None) as stream, to.open("wb") as file:
                while piece := stream.read(_PIECE_BYTES):
                    file.write(piece)
                    told.update(piece)
                    got += len(piece)
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError as error:
            raise ValueError(f"{self.place}/{name} is missing; its snapshot cannot be fetched") from error
        if (got, told.hexdigest()) != (size, checksum):
            raise ValueError(f"{self.place}/{name} is damaged: {got} bytes of {size}; its snapshot cannot be fetched")

    def _manifest(self, step: int) -> dict[str, Any] | None:
        """Returns what is in a snapshot; None where it is not whole."""
        try:
            with self._files.open_input_stream(f"{self._at}/manifests/{step}.json", compression=None) as stream:
                return json.loads(stream.read())
        except (FileNotFoundError, ValueError):
            return None

    def _listed(self, name: str) -> list[tuple[str, bool]]:
        found = self._files.get_file_info(fs.FileSelector(f"{self._at}/{name}", allow_not_found=True))
        return [(one.base_name, one.type == fs.FileType.Directory) for one in found]

    def _remove_file(self, name: str) -> None:
        if self._files.get_file_info(f"{self._at}/{name}").type == fs.FileType.File:
            self._files.delete_file(f"{self._at}/{name}")

    def _prune(self, newest: int) -> None:
        """Removes the snapshots before the newest ones, and what is not whole; the manifest goes first."""
        kept = [step for step in self.steps() if step <= newest][-max(self._keep, 1) :]
        for name, _ in self._listed("manifests"):
            if name not in {f"{step}.json" for step in kept}:
                self._remove_file(f"manifests/{name}")
        used = {put[0] for step in kept for put in (self._manifest(step) or {"beside": {}})["beside"].values()}
        for one in self._files.get_file_info(fs.FileSelector(f"{self._at}/beside", allow_not_found=True, recursive=True)):
            if one.is_file and one.path.removeprefix(f"{self._at}/") not in used:
                self._remove_file(one.path.removeprefix(f"{self._at}/"))
        for name, is_folder in self._listed(self._folder.name):
            if is_folder and name not in map(str, kept):
                with contextlib.suppress(FileNotFoundError):  # what some servers say of a folder that was emptied
                    self._files.delete_dir(f"{self._at}/{self._folder.name}/{name}")


def open_mirror(place: str, folder: Path, keep: int, exchange: Exchange | None) -> Mirror | None:
    """Fetches the newest snapshot if the folder has none. Process 0 has the mirror; the others wait until that is done.

    Raises:
        ValueError: The mirror is ahead of the folder, damaged or not to be reached; in all processes.
    """
    mirror, failed = None, ""
    if not exchange or exchange.process_id == 0:
        try:
            mirror = Mirror(place, folder, keep)
            mirror.fetch()
        except (*_FAULTS, ValueError, ImportError) as error:
            failed = f"SnapshotConfig.mirror = {place!r}: {error}"
    if failed := everyone(exchange, failed)[0]:
        raise ValueError(failed)
    return mirror
