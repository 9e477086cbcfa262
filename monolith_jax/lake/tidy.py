"""Keeps a table small: few large files in place of many small ones, no old snapshots, nothing that no snapshot names.

In: a table that this package writes. Out: the same rows. Safe beside readers and writers, and at any moment of a crash:
`compact` commits new files and the removal of exactly those that it has read, and fails where another has removed one of them;
who follows the table sees nothing of it. `expire` removes snapshots that are old, but for those that a tag keeps and the last
of each writer, and then the files that only they named. What crashed writers have left is removed when it is old enough.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from monolith_jax.lake.cut_files import remove_before
from monolith_jax.lake.ingest import WRITER as INGEST
from monolith_jax.lake.jobs import TidyConfig
from monolith_jax.lake.video_counts import saved_epochs
from monolith_jax.lake.warehouse import WarehouseConfig, open_table, writing

WRITER = "tidy"
_FEW = 4
"""As many files of a bucket may stay as they are."""
_ROWS = 1 << 16


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
    """Brings the files of each bucket together; returns how many there were and are, of those that were touched.

    Raises:
        RuntimeError: Another process compacts the same table.
    """
    table = open_table(config, name)
    builder = table.new_read_builder()
    files: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    splits: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for split in builder.new_scan().plan().splits():
        where = (*split.partition.values, split.bucket)
        files[where] += split.files
        splits[where].append(split)
    before = after = 0
    for where, of_bucket in files.items():
        merged = bool(table.primary_keys)
        small = [one for one in of_bucket if merged or one.file_size < tidy.target_bytes]
        # Append tables are read split by split: one that holds a large file is left out with it.
        chosen = splits[where] if merged else [one for one in splits[where] if all(file in small for file in one.files)]
        count = sum(len(one.files) for one in chosen)
        if count <= (1 if merged else _FEW):
            continue
        before += count
        after += _rewrite(config, name, table, builder, chosen)
    return before, after


def _rewrite(config: WarehouseConfig, name: str, table: Any, builder: Any, splits: list[Any]) -> int:
    """Writes the rows of splits of one bucket anew, and commits them in place of the files that they are in."""
    writer = table.new_stream_write_builder()._with_commit_user(WRITER)
    write, commit = writer.new_write(), writer.new_commit()
    try:
        for batch in _batches(builder, splits):
            write.write_arrow(batch)
        epoch = time.time_ns()
        messages = write.prepare_commit(epoch)
        old = [file for split in splits for file in split.files]
        if not messages:  # Paimon tells deletions of a bucket only beside files for it; an empty one stays as it is.
            return len(old)
        messages[0].deleted_files.extend(old)
        with writing(config, name):
            commit.commit(messages, epoch)
        return sum(len(message.new_files) for message in messages)
    finally:
        write.close()
        commit.close()


def _batches(builder: Any, splits: list[Any]) -> Iterable[pa.Table]:
    """Yields the rows of splits in order."""
    if not splits:
        return
    held: list[pa.RecordBatch] = []
    for batch in builder.new_read().to_arrow_batch_reader(splits):
        held.append(batch)
        if sum(one.num_rows for one in held) >= _ROWS:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def expire(config: WarehouseConfig, name: str, tidy: TidyConfig, now_s: float | None = None) -> tuple[int, int]:
    """Removes old snapshots, and files that no snapshot names; returns how many of each.

    Args:
        config: The warehouse.
        name: The table.
        tidy: What is kept.
        now_s: The time; None: now.
    """
    table, now_s = open_table(config, name), time.time() if now_s is None else now_s
    # Files are listed first: what is written from here on is not looked at.
    listed = _listed(table)
    with writing(config, name):
        snapshots = sorted(table.snapshot_manager().list_snapshots(), key=lambda one: one.id)
        if not snapshots:
            return 0, 0
        # Counts of videos are counted again from where they were saved, by what the snapshots since tell.
        needed = min(saved_epochs(table), default=-1) if name == "events" else None
        old = _old(snapshots, tidy, now_s, needed)
        kept = [one for one in snapshots if one.id not in {gone.id for gone in old}]
        tags = [tag for tag in (table.tag_manager().get(one) for one in _tag_names(table)) if tag]
        named = {one for snapshot in [*kept, *tags] for one in _names_of(table, snapshot)}
        dropped = {one for snapshot in old for one in _names_of(table, snapshot)} - named
        for snapshot in old:
            table.file_io.delete(table.snapshot_manager().get_snapshot_path(snapshot.id))
        _tell_earliest(table, kept[0].id)
    removed = 0
    for path, changed_s in listed.items():
        file = path.rsplit("/", 1)[-1]
        if file in named:
            continue
        if file in dropped or changed_s < now_s - tidy.orphan_s:
            table.file_io.delete_quietly(path)
            removed += 1
    if name == "examples":
        removed += remove_before(table, kept[0])
    return len(old), removed


def _old(snapshots: list[Any], tidy: TidyConfig, now_s: float, needed: int | None) -> list[Any]:
    """Returns the snapshots that may go: a row of the oldest ones, up to the first that must stay.

    Args:
        snapshots: All there are, in order.
        tidy: What is kept.
        now_s: The time.
        needed: The ingest needs its snapshots behind this epoch; None: it needs none.
    """
    last = {one.commit_user: one.id for one in snapshots}
    old = []
    for snapshot in snapshots[: -tidy.keep]:
        young = snapshot.time_millis > 1000 * (now_s - tidy.retention_s)
        is_needed = needed is not None and snapshot.commit_user == INGEST and snapshot.commit_identifier > needed
        if young or is_needed or snapshot.id == last[snapshot.commit_user]:
            break
        old.append(snapshot)
    return old


def _tag_names(table: Any) -> list[str]:
    return [one if isinstance(one, str) else one.tag_name for one in table.list_tags() or []]


def _names_of(table: Any, snapshot: Any) -> set[str]:
    """Returns the names of all files that a snapshot needs."""
    from pypaimon.manifest.manifest_file_manager import ManifestFileManager
    from pypaimon.manifest.manifest_list_manager import ManifestListManager

    lists, files = ManifestListManager(table), ManifestFileManager(table)
    named = {snapshot.base_manifest_list, snapshot.delta_manifest_list, snapshot.changelog_manifest_list}
    named |= {snapshot.index_manifest, snapshot.statistics}
    manifests = lists.read_all(snapshot)
    named |= {one.file_name for one in manifests}
    for entry in files.read_entries_parallel(manifests):
        named |= {entry.file.file_name, *(entry.file.extra_files or [])}
    return {one for one in named if one}


def _listed(table: Any) -> dict[str, float]:
    """Returns the data files and manifests that are there, and when each was written."""
    root, found = str(table.table_path).rstrip("/"), {}
    waiting = [root]
    while waiting:
        for one in table.file_io.list_status(waiting.pop()):
            name = one.path.rsplit("/", 1)[-1]
            if one.type.name == "Directory":
                if name not in ("snapshot", "schema", "tag", "branch", "consumer", "cuts"):
                    waiting.append(one.path)
            elif name.startswith(("data-", "manifest-", "changelog-", "index-")):
                # On a local disk Paimon gives seconds, in an object store a time.
                found[one.path] = float(one.mtime) if isinstance(one.mtime, int | float) else one.mtime.timestamp()
    return found


def _tell_earliest(table: Any, snapshot: int) -> None:
    path = f"{table.snapshot_manager().snapshot_dir}/EARLIEST"
    if table.file_io.exists(path):
        table.file_io.delete(path)
    table.file_io.write_file(path, str(snapshot), False)


def tidy_table(config: WarehouseConfig, name: str, tidy: TidyConfig) -> Tidied:
    """Compacts a table, then expires."""
    before, after = compact(config, name, tidy)
    snapshots, removed = expire(config, name, tidy)
    return Tidied(before, after, snapshots, removed)
