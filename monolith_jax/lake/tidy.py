"""Keeps a table small: few large files in place of many small ones, no old snapshots, nothing that no snapshot names.

In: a table that this package writes. Out: the same rows, in the same order. Safe beside readers and writers, and at any moment
of a crash: `compact` commits new files and the removal of exactly those that it has read, a bucket at a time, while writers
wait; who follows the table sees nothing of it. `expire` removes snapshots that are old, but for those that a tag keeps, and
then the files that only they named; what the last commit of each writer told is kept beside the table. What crashes have left
goes when it is old.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from monolith_jax.lake.commits import TOLD, keep_commits, last_commit
from monolith_jax.lake.cut_files import remove_before
from monolith_jax.lake.examples import WRITER as EXAMPLES
from monolith_jax.lake.history import tag_names
from monolith_jax.lake.ingest import WRITER as INGEST
from monolith_jax.lake.jobs import TidyConfig
from monolith_jax.lake.video_counts import saved_epochs
from monolith_jax.lake.warehouse import WarehouseConfig, open_table, writing

WRITER = "tidy"
_FEW = 4
"""Fewer files of a bucket stay as they are."""


@dataclass(frozen=True)
class Tidied:
    """What was done to a table."""

    files_before: int = 0
    """Of the buckets that were compacted."""
    files_after: int = 0
    snapshots_expired: int = 0
    files_removed: int = 0
    """Of expired snapshots, and orphans."""


def is_foreign(config: WarehouseConfig, name: str) -> bool:
    """Returns whether another engine writes a table, such as Flink, which compacts and expires by itself."""
    table = open_table(config, name)
    newest = table.snapshot_manager().get_latest_snapshot()
    return newest is not None and not str(newest.writer_version or "").startswith("python")


def compact(config: WarehouseConfig, name: str, tidy: TidyConfig) -> tuple[int, int]:
    """Brings the files of each bucket together, where it pays; returns how many there were and are, of those buckets."""
    before = after = 0
    for where in _crowded(open_table(config, name), tidy):
        # Writers wait: what came meanwhile would stand before what is older, and of equal times the later row counts.
        with writing(config, name):
            table = open_table(config, name)
            chosen = _crowded(table, tidy).get(where)
            if chosen:
                before += sum(len(one.files) for one in chosen)
                after += _rewrite(table, name, chosen)
    return before, after


def _crowded(table: Any, tidy: TidyConfig) -> dict[tuple[Any, ...], list[Any]]:
    """Returns the splits to bring together, by partition and bucket."""
    splits: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for split in table.new_read_builder().new_scan().plan().splits():
        splits[*split.partition.values, split.bucket].append(split)
    found = {}
    for where, of_bucket in splits.items():
        if not table.primary_keys:
            # Append tables are read split by split: one that holds a large file is left out with it.
            of_bucket = [one for one in of_bucket if all(file.file_size < tidy.target_bytes for file in one.files)]
        sizes = sorted(file.file_size for one in of_bucket for file in one.files)
        # Merging rewrites the largest file too: it is to be worth it.
        grown = not table.primary_keys or 4 * sum(sizes[:-1]) >= sum(sizes[-1:])
        if len(sizes) >= tidy.most_files or (len(sizes) >= _FEW and grown):
            found[where] = of_bucket
    return found


def _rewrite(table: Any, name: str, splits: list[Any]) -> int:
    """Writes the rows of splits of one bucket anew, and commits them in place of the files that they are in."""
    writer = table.new_stream_write_builder()._with_commit_user(WRITER)
    write, commit = writer.new_write(), writer.new_commit()
    try:
        for split in splits:  # One at a time: a reader of several gives their batches as they come.
            write.write_arrow(table.new_read_builder().new_read().to_arrow([split]))
        epoch = time.time_ns()
        messages = write.prepare_commit(epoch)
        old = [file for split in splits for file in split.files]
        if not messages:  # Paimon tells deletions of a bucket only beside files for it; an empty one stays as it is.
            return len(old)
        messages[0].deleted_files.extend(old)
        # Whoever is shown this snapshot is to know where the stream of examples was.
        told = {TOLD: json.dumps(last_commit(table, EXAMPLES).told)} if name == "examples" else {}
        commit.commit(messages, epoch, snapshot_properties=told)
        return sum(len(message.new_files) for message in messages)
    finally:
        write.close()
        commit.close()


class _Named:
    """Which files manifests name. A manifest never changes: each is read once."""

    def __init__(self, table: Any) -> None:
        from pypaimon.manifest.manifest_file_manager import ManifestFileManager
        from pypaimon.manifest.manifest_list_manager import ManifestListManager

        self._lists, self._files = ManifestListManager(table), ManifestFileManager(table)
        self._known: dict[str, tuple[frozenset[str], frozenset[str]]] = {}

    def by(self, snapshot: Any) -> tuple[set[str], set[str]]:
        """Returns the files that a snapshot needs, and all that its manifests name."""
        own = {snapshot.base_manifest_list, snapshot.delta_manifest_list, snapshot.changelog_manifest_list}
        own |= {snapshot.index_manifest, snapshot.statistics}
        added, deleted = {one for one in own if one}, set()
        for manifest in self._lists.read_all(snapshot):
            added.add(manifest.file_name)
            if manifest.file_name not in self._known:
                self._known[manifest.file_name] = self._read(manifest.file_name)
            of_manifest = self._known[manifest.file_name]
            added |= of_manifest[0]
            deleted |= of_manifest[1]
        return added - deleted, added | deleted

    def _read(self, name: str) -> tuple[frozenset[str], frozenset[str]]:
        of_kinds: list[set[str]] = [set(), set()]
        for entry in self._files.read(name):
            of_kinds[entry.kind] |= {entry.file.file_name, *(entry.file.extra_files or [])}
        return frozenset(of_kinds[0]), frozenset(of_kinds[1])


def expire(config: WarehouseConfig, name: str, tidy: TidyConfig, now_s: float | None = None) -> tuple[int, int]:
    """Removes old snapshots, and files that no snapshot names; returns how many of each.

    Args:
        config: The warehouse.
        name: The table.
        tidy: What is kept.
        now_s: The time; None: now.
    """
    table, now_s = open_table(config, name), time.time() if now_s is None else now_s
    snapshots = sorted(table.snapshot_manager().list_snapshots(), key=lambda one: one.id)
    if not snapshots:
        return 0, 0
    # Counts of videos are counted again from where they were saved, by what the snapshots since tell.
    needed = min(saved_epochs(table), default=-1) if name == "events" else None
    old = _old(snapshots, tidy, now_s, needed)
    kept, named = snapshots[len(old) :], _Named(table)
    tags = [tag for tag in (table.tag_manager().get(one) for one in tag_names(table)) if tag]
    # What was removed from a table never comes back: what the first snapshot that stays does not need, none behind it does,
    # but for what came behind it.
    live = {one for snapshot in [kept[0], *tags] for one in named.by(snapshot)[0]}
    dropped = {one for snapshot in old for one in named.by(snapshot)[1]} - live
    # Files are listed before the newest snapshots are looked at: what is written from here on is younger than any that goes.
    listed = _listed(table)
    stale = [path for path, changed_s in listed.items() if changed_s < now_s - tidy.orphan_s]
    if unnamed := [path for path in stale if _file(path) not in live | dropped]:
        live |= {one for snapshot in table.snapshot_manager().list_snapshots() for one in named.by(snapshot)[1]}
    with writing(config, name):
        keep_commits(table, old)
        for snapshot in old:
            table.file_io.delete(table.snapshot_manager().get_snapshot_path(snapshot.id))
        _forget_earliest(table)
    gone = [path for path in listed if _file(path) in dropped] + [path for path in unnamed if _file(path) not in live]
    for path in gone:
        table.file_io.delete_quietly(path)
    removed = len(gone)
    if name == "examples":
        removed += remove_before(table, [kept[0], *tags])
    return len(old), removed


def _file(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _old(snapshots: list[Any], tidy: TidyConfig, now_s: float, needed: int | None) -> list[Any]:
    """Returns the snapshots that may go: a row of the oldest ones, up to the first that must stay.

    Args:
        snapshots: All there are, in order.
        tidy: What is kept.
        now_s: The time.
        needed: The ingest needs its snapshots behind this epoch; None: it needs none.
    """
    old = []
    for snapshot in snapshots[: -tidy.keep]:
        is_needed = needed is not None and snapshot.commit_user == INGEST and snapshot.commit_identifier > needed
        if is_needed or snapshot.time_millis > 1000 * (now_s - tidy.retention_s):
            break
        old.append(snapshot)
    return old


def _listed(table: Any) -> dict[str, float]:
    """Returns the data files and manifests that are there, and when each was written."""
    root, found = str(table.table_path).rstrip("/"), {}
    waiting = [root]
    while waiting:
        for one in table.file_io.list_status(waiting.pop()):
            name = one.path.rsplit("/", 1)[-1]
            if one.type.name == "Directory":
                if name not in ("snapshot", "schema", "tag", "branch", "consumer", "cuts", "state"):
                    waiting.append(one.path)
            elif name.startswith(("data-", "manifest-", "changelog-", "index-")):
                # On a local disk Paimon gives seconds, in an object store a time.
                found[one.path] = float(one.mtime) if isinstance(one.mtime, int | float) else one.mtime.timestamp()
    return found


def _forget_earliest(table: Any) -> None:
    """Removes the hint which snapshot is the first: without it they are listed."""
    path = f"{table.snapshot_manager().snapshot_dir}/EARLIEST"
    if table.file_io.exists(path):
        table.file_io.delete(path)


def tidy_table(config: WarehouseConfig, name: str, tidy: TidyConfig) -> Tidied:
    """Compacts a table, then expires."""
    before, after = compact(config, name, tidy)
    snapshots, removed = expire(config, name, tidy)
    return Tidied(before, after, snapshots, removed)
