"""A run's newest snapshots in another place, an object store say: a machine that is lost takes no run with it.

In: a run folder with a snapshot that is whole, and a path or URL (`s3://`, `hdfs://`, `webhdfs://`: see `stream.remote`). Out:
`snapshots/<step>/` there with the same files; what is beside it in the run folder, metrics and the cuts of a live stream, as
`beside/<name>/<size>-<time>`; and, last of all, `manifests/<step>.json`, which names every file. A snapshot without a readable
manifest is not there, and no file is written twice: whatever is cut short, by a kill or by the network, is never taken. A file
beside the snapshots may be longer than its snapshot knows; a run that goes on cuts it.

Copies are made beside the training, one at a time, from hard links in `.mirrored/` of the run folder, so that what the run
deletes meanwhile is still copied whole. Training, saving and the end of the process wait for none of them longer than is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from pyarrow import fs

from monolith_jax.ids.messages import everyone
from monolith_jax.stream.remote import RemotePath, is_remote
from monolith_jax.types import Exchange

DEADLINE_S = 300.0
"""After so long a copy counts as not made: people are told, and the end of the run waits no longer. The copy itself goes on."""
_PIECE_BYTES = 8 << 20
_AT_ONCE = 8
_DELTAS = "deltas"
"""What is published does not go with the snapshots: it has a place of its own where it is to outlive the machine."""
_SPILL = "spill"
"""What a joiner has no memory for (see `stream.spill`); a run that goes on empties it."""
_LINKS = ".mirrored"
_SPARSE_BYTES, _SPARSE = 1 << 30, 16
"""A file of so many bytes with holes and less than that part of them on disk is room that a store set apart."""


@dataclass(eq=False)
class _Sent:
    """A snapshot on its way."""

    step: int
    files: dict[str, Path]
    """By their names in the run folder: where they are read."""
    tell: Callable[[str], None]
    whole: float = field(default_factory=time.monotonic)
    """Since when it is to be copied."""
    told: bool = False
    timer: threading.Timer = field(init=False)
    """Says that it takes too long."""


class Mirror:
    """Copies snapshots of one run folder to another place, and back."""

    def __init__(self, place: str, folder: Path, keep: int) -> None:
        """Touches nothing yet.

        Args:
            place: Where the mirror is; no other run may have it.
            folder: The run's own snapshots, in its run folder.
            keep: Snapshots kept in the mirror.

        Raises:
            ValueError: The place is in the run folder.
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
            if Path(self.place).resolve().is_relative_to(self._run.resolve()):
                raise ValueError(f"it is in the run folder {self._run}, and would be lost with it; name a place outside")
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._running: _Sent | None = None
        self._next: _Sent | None = None

    def steps(self) -> list[int]:
        """Returns the steps of all snapshots that are whole there, ascending."""
        found = [int(name[:-5]) for name, _ in self._listed("manifests") if name[:-5].isdigit() and name.endswith(".json")]
        return [step for step in sorted(found) if self._manifest(step)]

    def send(self, step: int, tell: Callable[[str], None]) -> None:
        """Copies a snapshot that is whole here in a thread of its own; a place that cannot be reached stops no training.

        One copy runs at a time. One that still runs is left to finish, and the newest snapshot that was sent meanwhile is
        copied after it; those between are not. A copy that has not ended after `DEADLINE_S` goes on, but counts as not made.

        Args:
            step: Of the snapshot; the run may delete it as soon as this returns.
            tell: Is called once, mostly in another thread, with what came of it, for people: at the end of the copy, when the
                deadline has passed or another copy's had already, or as soon as a newer snapshot takes its turn.
        """
        sent, passed = _Sent(step, self._linked(step), tell), None
        over = f"the copy has not ended after {DEADLINE_S:,.0f} s; it goes on"
        sent.timer = threading.Timer(DEADLINE_S, self._say, (sent, over, True))
        sent.timer.daemon = True
        with self._lock:
            late = self._running if self._running and self._running.told else None
            if self._running:
                passed, self._next = self._next, sent
            else:
                self._running = sent
                threading.Thread(target=self._copy_all, name="mirror", daemon=True).start()
            if passed:
                self._say(passed, f"the copy before it still runs, step {step:,} comes next")
                self._unlink(passed)
            if late:
                self._say(sent, f"the copy of step {late.step:,} has not ended after {time.monotonic() - late.whole:,.0f} s")
            else:
                sent.timer.start()

    def wait(self) -> None:
        """Waits for the copies that were sent, at most `DEADLINE_S`; then `behind` is right, whatever they come to later."""
        with self._lock:
            if not self._idle.wait_for(lambda: not self._running, DEADLINE_S):
                for sent in filter(None, (self._running, self._next)):
                    self._say(sent, f"its copy has not ended, and the end of the run waited {DEADLINE_S:,.0f} s for it")

    def catch_up(self) -> None:
        """Sends the newest snapshot here if it is not there: a run may end between the two.

        Raises:
            OSError: The place cannot be reached.
        """
        shutil.rmtree(self._run / _LINKS, ignore_errors=True)
        here = self._newest_here()
        if here is not None and here > max(self.steps(), default=-1):
            self.send(here, lambda _: None)

    def _copy_all(self) -> None:
        """Copies what was sent until there is nothing more."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # The devices and the planner go first.
        while sent := self._running:
            fault = ""
            try:
                self._put(sent.step, sent.files)
            except Exception as error:  # Clients raise whatever they meet: fsspec's a RuntimeError, a ValueError.
                fault = f"{error}" or type(error).__name__
            with self._lock:
                self._unlink(sent)
                self._say(sent, fault)
                self._running, self._next = self._next, None
                self._idle.notify_all()

    def _say(self, sent: _Sent, fault: str, unless_told: bool = False) -> None:
        """Tells once what came of a copy; no fault: it is there."""
        with self._lock:
            if unless_told and sent.told:
                return
            first, sent.told = not sent.told, True
            sent.timer.cancel()
            self.behind = fault and f"the snapshot of step {sent.step} is in {self._folder}, but not in {self.place}: {fault}"
        if first:
            there = f"; in {self.place} after {time.monotonic() - sent.whole:.1f} s more"
            sent.tell(f"; NOT in {self.place}, the next one may be: {fault}" if fault else there)

    def put(self, step: int) -> None:
        """Copies a snapshot that is whole here. Removes those that are not kept, and leftovers.

        Raises:
            OSError: The place cannot be reached or is full; the snapshots that were whole there still are.
        """
        self._put(step, self._files_of(step))

    def _put(self, step: int, sources: dict[str, Path]) -> None:
        """Copies the files of a snapshot, which are all there or missed, and what is beside it."""
        self._remove_file(f"manifests/{step}.json")
        files = dict(zip(sources, self._each(lambda name: self._put_file(sources[name], name), sources), strict=True))
        before = self._manifest(max(self.steps(), default=-1)) or {"beside": {}}
        names = self._beside()
        beside = dict(zip(names, self._each(lambda name: self._put_beside(name, before["beside"]), names), strict=True))
        manifest = {"step": step, "files": files, "beside": {name: put for name, put in beside.items() if put}}
        with self._writing(f"manifests/{step}.json") as stream:
            stream.write(json.dumps(manifest).encode())
        self._prune(step)

    def _files_of(self, step: int) -> dict[str, Path]:
        snapshot = self._folder / str(step)
        paths = sorted(path for path in snapshot.rglob("*") if path.is_file())
        return {f"{self._folder.name}/{snapshot.name}/{path.relative_to(snapshot)}": path for path in paths}

    def _linked(self, step: int) -> dict[str, Path]:
        """Returns the files of a snapshot by hard links; the files themselves where the file system has none."""
        files = self._files_of(step)
        try:
            with self._lock:
                for name, path in files.items():
                    to = self._run / _LINKS / name
                    to.parent.mkdir(parents=True, exist_ok=True)
                    os.link(path, to)
        except OSError:  # Then a snapshot that goes meanwhile is not copied: `_put` misses its files by name.
            return files
        return {name: self._run / _LINKS / name for name in files}

    def _unlink(self, sent: _Sent) -> None:
        """Removes the links of a snapshot."""
        with self._lock:
            links = self._run / _LINKS
            shutil.rmtree(links / self._folder.name / str(sent.step), ignore_errors=True)
            with contextlib.suppress(OSError):  # Another snapshot has its own there.
                (links / self._folder.name).rmdir()
                links.rmdir()

    def _newest_here(self) -> int | None:
        return max((int(path.name) for path in self._folder.glob("*") if path.name.isdigit()), default=None)

    def fetch(self) -> int | None:
        """Copies the newest snapshot to the run folder where there is none; returns its step, None where nothing had to come.

        Raises:
            OSError: The place cannot be reached.
            ValueError: The mirror is ahead of the run folder, or one of its files is missing or damaged.
        """
        started = time.monotonic()
        folder = self._folder
        here = self._newest_here()
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
        """Returns the files that go with the snapshots: no spill, nothing hidden, no file that is mostly holes."""
        found: list[str] = []
        for folder, folders, names in os.walk(self._run):
            top = Path(folder) == self._run
            skipped = (_SPILL, self._folder.name, _DELTAS) if top else (_SPILL,)
            folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
            paths = [Path(folder, name) for name in names if name not in skipped and name[0] != "."]
            found += [str(path.relative_to(self._run)) for path in paths if path.is_file() and not _is_sparse(path)]
        return sorted(found)

    def _each(self, work: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
        """Works at several names at once; in threads that the end of the process does not wait for."""
        names = list(names)
        done: list[Any] = [None] * len(names)
        todo, lock, faults = iter(enumerate(names)), threading.Lock(), list[BaseException]()

        def go_on() -> None:
            while not faults:
                with lock:
                    index, name = next(todo, (-1, ""))
                if index < 0:
                    return
                try:
                    done[index] = work(name)
                except BaseException as fault:  # The caller's to see.
                    faults.append(fault)

        threads = [threading.Thread(target=go_on, name="mirror", daemon=True) for _ in range(min(_AT_ONCE, len(names)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]
        return done

    def _put_file(self, path: Path, to: str, most_bytes: int | None = None) -> tuple[int, str]:
        """Copies a file, or its first bytes; returns its size and checksum."""
        told, size = xxhash.xxh3_64(), 0
        with path.open("rb") as file, self._writing(to) as stream:
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
            return known if known and known[0] == to else [to, *self._put_file(self._run / name, to, stat.st_size)]
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


def _is_sparse(path: Path) -> bool:
    """Returns whether a large file is mostly holes."""
    try:
        stat = path.stat()
        if stat.st_size < _SPARSE_BYTES or stat.st_blocks * 512 > stat.st_size // _SPARSE:
            return False
        with path.open("rb") as file:  # Some file systems press files, or count blocks late: those have no holes.
            return os.lseek(file.fileno(), 0, os.SEEK_HOLE) < stat.st_size
    except OSError:
        return False


def open_mirror(place: str, folder: Path, keep: int, exchange: Exchange | None) -> Mirror | None:
    """Fetches the newest snapshot if the folder has none, sends it if the mirror has not. Process 0 has it.

    Raises:
        ValueError: The mirror is ahead of the folder, damaged or not to be reached; in all processes.
    """
    mirror, failed = None, ""
    if not exchange or exchange.process_id == 0:
        try:
            mirror = Mirror(place, folder, keep)
            mirror.fetch()
            mirror.catch_up()
        except Exception as error:  # Every one: the other processes wait to hear of it.
            failed = f"SnapshotConfig.mirror = {place!r}: {error}"
    if failed := everyone(exchange, failed)[0]:
        raise ValueError(failed)
    return mirror
