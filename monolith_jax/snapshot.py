"""All state of a run, atomically (the only file that imports orbax).

In: the device's state after a step, and the host's state as it was frozen right after that step's plan. Out: one Orbax
checkpoint a snapshot, written in the background; it is there whole or not at all. It holds the tables, id maps, dense weights,
optimizers, the position in the stream, histories, counters, metric accumulators, dead-letter counts and the lengths of the
run's files, so that a run that was killed goes on as if it had not been. Tables, maps and filters are stored by shard, the
state of the stream by partition: any mesh and any number of processes reads its own parts of it, and no other.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from monolith_jax.config_differences import differences as differences
from monolith_jax.host_copy import HostCopies, on_cpu
from monolith_jax.ids.exchange import Exchange
from monolith_jax.mesh import OF_PROCESSES, sharding
from monolith_jax.mirror import open_mirror
from monolith_jax.packing import pack, unpack

CHUNK_BYTES = 64 * 2**20
FILE_BYTES = 128 * 2**20
"""Files are collected in memory up to this size; Orbax's default would hold a whole gigabyte twice."""
_WHOLE = ("sizes", "extras")
"""Host state that is not by shard or partition, and the same in all processes."""
_SHARE_S = 60.0


@dataclass(frozen=True)
class SnapshotConfig:
    """When state is saved."""

    period_steps: int = 1000
    """Steps between snapshots; 0: only at the end of the run, on SIGTERM and at errors of the input."""
    keep: int = 2
    """Snapshots kept; older ones are deleted."""
    mirror: str = ""
    """A second place for what a run goes on from: a folder, `s3://bucket/run` or `hdfs://namenode:port/run`. Each snapshot is
    copied there when it is whole, beside the training, which waits for no copy; the end of the run waits 300 s at most. A run
    whose own folder holds none goes on from the newest there. Not a folder in the run folder. Empty: none."""


@dataclass(frozen=True)
class Restored:
    """What a snapshot held."""

    step: int
    state: Any
    """The device's state, in the form and place of the example that was given."""
    host: dict[str, Any]
    """The planner's state."""
    extras: dict[str, Any]
    """Whatever else was saved with it."""


@dataclass(frozen=True)
class Committed:
    """A snapshot that is whole."""

    step: int
    num_bytes: int
    """On disk."""
    seconds: float
    """From the call of `save` on."""
    mirrored: str = ""
    """What came of its copy to the mirror, for people; empty: there is no mirror."""


class Snapshots:
    """The snapshots of a run."""

    def __init__(
        self,
        config: SnapshotConfig,
        folder: Path,
        read_only: bool = False,
        tell: Callable[[Committed], None] | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Opens the folder, which is made if need be. Leftovers of interrupted saves are removed.

        Args:
            config: How many are kept.
            folder: Where they are.
            read_only: Leaves the folder as it is: another process may be writing there.
            tell: Is called in another thread when a snapshot is whole; with a mirror, when its copy has ended or is late.
            exchange: To the other processes that save and restore together; none: this is the only one.

        Raises:
            ValueError: The other processes do not share the folder; or the mirror is ahead of it, damaged or not to be reached.
        """
        self._folder = folder.absolute()
        self._tell = tell
        self._copies = HostCopies()
        self._writer: threading.Thread | None = None
        self._failed: Exception | None = None
        self._exchange = exchange
        mirrored = config.mirror and not read_only
        self._mirror = open_mirror(config.mirror, self._folder, config.keep, exchange) if mirrored else None
        processes = ocp.options.MultiprocessingOptions()
        if exchange:
            _share_folder(self._folder, exchange.process_id)
            # Named, they wait for one another at jax's coordinator, and not on devices that the planners use.
            processes = ocp.options.MultiprocessingOptions(active_processes=set(range(exchange.num_processes)))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            create=not read_only and not exchange,
            cleanup_tmp_directories=not read_only,
            multiprocessing_options=processes,
        )
        trees = {name: ocp.PyTreeCheckpointHandler() for name in ("state", "maps", "arrays")}
        handlers = {**trees, "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    @property
    def origin(self) -> str:
        """Where the newest snapshot came from, for people; empty: this run's own folder."""
        return self._mirror.origin if self._mirror else ""

    def latest(self) -> int | None:
        """Returns the step of the newest snapshot, None where there is none."""
        self._join()
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all snapshots, ascending."""
        self._join()
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, host: Mapping[str, Any], extras: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> None:
        """Saves in the background; waits for an earlier save to end first.

        Args:
            step: Steps done.
            state: Tree of device arrays; may be donated as soon as this returns.
            host: The planner's state, of all processes after the same plan; its arrays are not to be changed any more.
            extras: Further state: `arrays` (a flat mapping of numpy arrays, not to be changed any more), the rest JSON-able.
            identity: The configs that the state belongs to, JSON-able.

        Raises:
            Exception: Whatever an earlier write in the background met (a full disk, say).
        """
        started = time.monotonic()
        self._join()
        if jax.process_count() == 1 and on_cpu(state):
            # Orbax would read the devices' own memory while it writes, and copies all that is numpy before it returns.
            state = self._copies.copy(state)
            self._write(step, started, lambda: self._begin(step, state, host, extras, identity))
        else:
            # Processes call it in the same order only here; and it has to fetch what the next step overwrites.
            begun = self._begin(step, state, host, extras, identity)
            self._write(step, started, lambda: begun)

    def prepare(self, state: Any) -> None:
        """Takes memory for copies of such states in the background, so that the first save is no slower than the others."""
        if jax.process_count() == 1 and on_cpu(state):
            self._copies.prepare(state)

    def _write(self, step: int, started: float, begin: Callable[[], bool]) -> None:
        """Begins and ends a save in a thread of its own."""

        def write() -> None:
            with contextlib.suppress(OSError):
                # The threads that compress take after this one. On a CPU host they get what devices and planner leave: beside
                # them the planner, which gives way to the devices, would stand still for seconds.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            try:
                begun = begin()
                self._manager.wait_until_finished()
                seconds = time.monotonic() - started
                if begun:
                    committed = Committed(step, folder_bytes(self._folder / str(step)), seconds)
                    if self._mirror:
                        self._mirror.send(step, lambda mirrored: self._tell_of(replace(committed, mirrored=mirrored)))
                    else:
                        self._tell_of(committed)
            except Exception as error:  # Every error is the caller's to see.
                self._failed = error

        self._writer = threading.Thread(target=write, name="snapshot")
        self._writer.start()

    def _tell_of(self, committed: Committed) -> None:
        try:
            if self._tell:
                self._tell(committed)
        except Exception as error:  # Every error is the caller's to see.
            self._failed = error

    def _join(self) -> None:
        """Waits for the thread that writes; raises what it met."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _begin(
        self, step: int, state: Any, host: Mapping[str, Any], extras: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> bool:
        """Returns whether there was no snapshot of the step yet."""
        meta = {
            "identity": dict(identity),
            "host": {name: value for name, value in host.items() if name not in ("maps", "parts")},
            "extras": {name: value for name, value in extras.items() if name != "arrays"},
        }
        maps = {str(index): self._by_shard(of_group) for index, of_group in enumerate(host["maps"])}
        parts = self._exchange.spread(host["parts"]) if self._exchange else host["parts"]
        args = ocp.args.Composite(
            state=_save_tree(state),
            maps=_save_tree(maps),
            arrays=_save_tree({"parts": parts, "extras": pack(dict(extras["arrays"]))}),
            meta=ocp.args.JsonSave(meta),
        )
        return self._manager.save(step, args=args)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns what a snapshot says of itself: `identity`, `host` and `extras` without their arrays."""
        return self._read(step, lambda: {"meta": ocp.args.JsonRestore()})["meta"]

    def restore(self, step: int, like: Any, identity: Mapping[str, Any]) -> Restored:
        """Returns a snapshot.

        Args:
            step: Which one.
            like: Tree of arrays (or of shapes with shardings) of the state's form.
            identity: The configs of this run.

        Raises:
            ValueError: The snapshot belongs to other configs (the message names the differences), or cannot be read.
        """
        meta = self.read_meta(step)
        if differing := differences(meta["identity"], dict(identity)):
            raise ValueError(
                f"the snapshot of step {step} in {self._folder} is of another config:\n  "
                + "\n  ".join(differing)
                + "\nUse another --workdir, or start a new run from this one with TrainConfig.warm_start."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        in_place = ocp.checkpoint_utils.construct_restore_args(abstract)
        restored = self._read(
            step,
            lambda: {
                "state": ocp.args.PyTreeRestore(abstract, restore_args=in_place),
                **{name: ocp.args.PyTreeRestore(restore_args=self._own_args(step, name)) for name in ("maps", "arrays")},
            },
        )
        host, extras = self._unpack(meta, restored["maps"], restored["arrays"])
        return Restored(step, restored["state"], host, extras)

    def restore_plain(self, step: int) -> Restored:
        """Returns a snapshot as numpy arrays in plain dicts and lists, whatever its config was."""
        names = ("state", "maps", "arrays")
        restored = self._read(
            step, lambda: {name: ocp.args.PyTreeRestore(restore_args=self._numpy_args(step, name)) for name in names}
        )
        host, extras = self._unpack(self.read_meta(step), restored["maps"], restored["arrays"])
        return Restored(step, restored["state"], host, extras)

    def _read(self, step: int, args: Callable[[], dict[str, Any]]) -> Any:
        self._join()
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args()))
        except Exception as error:  # orbax raises whatever it meets, a bare Exception among them
            raise ValueError(
                f"the snapshot in {self._folder / str(step)} cannot be read: files are missing or damaged, or another model's. "
                f"Remove that folder to go on from the snapshot before it. {type(error).__name__}: {error}"
            ) from error

    def _numpy_args(self, step: int, item: str) -> Any:
        tree = self._manager.item_metadata(step)[item].tree
        return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)

    def _own_args(self, step: int, item: str) -> Any:
        """Returns how host state is read: whole by the only process, else by each its own part of what is split."""
        whole, tree = self._numpy_args(step, item), self._manager.item_metadata(step)[item].tree
        if not self._exchange:
            return whole
        where = sharding(self._exchange.mesh, OF_PROCESSES)

        def of(path: Any, one: Any, all_of_it: Any) -> Any:
            if path[-1].key in _WHOLE:
                return all_of_it
            return ocp.ArrayRestoreArgs(sharding=where, global_shape=one.shape, dtype=one.dtype)

        return jax.tree.map_with_path(of, tree, whole)

    def _by_shard(self, of_group: Mapping[str, np.ndarray]) -> dict[str, Any]:
        exchange = self._exchange
        if not exchange:
            return dict(of_group)
        return {name: array if name in _WHOLE else exchange.spread(array) for name, array in of_group.items()}

    def _mine(self, array: Any) -> np.ndarray:
        return self._exchange.mine(array) if self._exchange and isinstance(array, jax.Array) else np.asarray(array)

    def _unpack(self, meta: dict[str, Any], maps: Any, arrays: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        of_groups = [maps[key] for key in sorted(maps, key=int)]
        host = dict(meta["host"]) | {"parts": self._mine(arrays["parts"])}
        host["maps"] = [{name: self._mine(array) for name, array in of_group.items()} for of_group in of_groups]
        return host, dict(meta["extras"]) | {"arrays": unpack(np.asarray(arrays["extras"]))}

    def wait(self) -> None:
        """Waits until the snapshot being written is committed.

        Raises:
            Exception: Whatever the background write met (a full disk, say).
        """
        self._join()

    def close(self) -> None:
        """Waits for the background write and for the last copy to the mirror (`mirror.DEADLINE_S` at most); frees the folder.

        Raises:
            Exception: Whatever the background write met.
            ValueError: The last snapshot did not come into the mirror.
        """
        try:
            self._join()
        finally:
            self._manager.close()
            if self._mirror:
                self._mirror.wait()
        self._join()  # What a telling met.
        if self._mirror and self._mirror.behind:
            raise ValueError(self._mirror.behind)


def _save_tree(tree: Any) -> ocp.args.PyTreeSave:
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    return ocp.args.PyTreeSave(tree, save_args=args, ocdbt_target_data_file_size=FILE_BYTES)


def write_tree(folder: Path, tree: Any) -> None:
    """Writes a tree of numpy arrays, none of them empty, that `orbax.checkpoint.PyTreeCheckpointer().restore(folder)` reads."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))


def _share_folder(folder: Path, process_id: int) -> None:
    """Makes the folder in process 0; the others wait until they see it."""
    if process_id == 0:
        folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + _SHARE_S
    while not folder.is_dir():
        if time.monotonic() > until:
            raise ValueError(
                f"process {process_id} does not see {folder}, which process 0 makes: the run folder must be on a file system "
                "that all hosts share; pass such a --workdir"
            )
        time.sleep(0.1)


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files under a folder; those that go meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def find(folder: Path) -> Path:
    """Returns the snapshots folder of a run folder, or the folder itself if it is one.

    Raises:
        ValueError: There is no snapshot; the message names the nearest folder that exists.
    """
    for candidate in (folder / "snapshots", folder):
        if candidate.is_dir() and any(child.name.isdigit() for child in candidate.iterdir()):
            return candidate
    parent = folder.parent
    near = difflib.get_close_matches(folder.name, [child.name for child in parent.iterdir()], 1) if parent.is_dir() else []
    raise ValueError(f"no snapshot in {folder}" + (f"; did you mean {parent / near[0]}?" if near else ""))
