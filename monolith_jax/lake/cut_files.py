"""The cuts of the stream that `examples` came from, beside the table: what a reader needs to go on where it ends.

In: the cuts of each epoch, by partition of the stream. Out: a cut log in a run folder, and the position in it from which a live
stream goes on as if it had been read there from the start: no example is missing, and none comes twice.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from monolith_jax.lake.commits import told_of
from monolith_jax.stream.cuts import Cut, CutLog, from_bytes, to_bytes
from monolith_jax.types import Position


def folder_of(table: Any) -> str:
    """Returns where the files of a table's cuts are."""
    return f"{str(table.table_path).rstrip('/')}/cuts"


def _path(table: Any, part: int, epoch: int, token: str) -> str:
    return f"{folder_of(table)}/{part}-{epoch:012d}-{token}.jsonl"


def save(table: Any, part: int, epoch: int, first: int, cuts: Sequence[Cut]) -> str:
    """Writes the cuts of an epoch, number `first` and those behind it, beside what a crash may have left of one of that number.

    Returns:
        What tells the file from others of that epoch.
    """
    lines, token = [json.dumps({"first": first}).encode(), *map(to_bytes, cuts)], uuid.uuid4().hex[:12]
    table.file_io.check_or_mkdirs(folder_of(table))
    table.file_io.write_file(_path(table, part, epoch, token), b"\n".join(lines).decode(), False)
    return token


def hand_over(table: Any, part: int, told: Mapping[str, Any], folder: Path, again: bool = False) -> Position:
    """Makes the cut log of a run folder, in place of one that is there, and returns where its stream goes on.

    Args:
        table: `examples`.
        part: Which partition of the stream.
        told: What the writer said of it last: `position`, and `epochs` that have files of cuts.
        folder: Where the cut log is to be.
        again: Whether a cut log that was handed over at the same place stays, with what the run has added to it: a run that
            goes back to before that place then takes the same cuts once more.

    Raises:
        ValueError: A file of cuts is missing or damaged.
    """
    position: dict[str, Any] = dict(told["position"])
    rewind, end = position["rewind"], position["cut"]
    mark, place = folder / "handed_over.json", json.dumps([part, rewind, end, told["epochs"]])
    if again and mark.exists() and mark.read_text() == place:
        return position | {"pending": 0}
    shutil.rmtree(folder, ignore_errors=True)
    expected = None
    with closing(CutLog(folder, rewind)) as log:
        for epoch, _, token in told["epochs"]:
            path = _path(table, part, epoch, token)
            if not table.file_io.exists(path):
                raise ValueError(f"{path} is not there: were files removed? Take another snapshot (LakeConfig.as_of)")
            head, *lines = table.file_io.read_file_utf8(path).split("\n")
            first = json.loads(head)["first"]
            if expected is not None and first != expected:
                raise ValueError(f"{path} begins with cut {first}, expected {expected}: a file of cuts is missing")
            expected = first + len(lines)
            for at, line in enumerate(lines, first):
                if rewind <= at < end:
                    log.append(from_bytes(line.encode()))
        there = log.bounds[1] - rewind
    if there != end - rewind:
        raise ValueError(
            f"{folder_of(table)} holds {there} of the cuts {rewind} to {end}, from which the stream of partition {part} goes "
            "on; were files removed? Take an older snapshot of `examples` (LakeConfig.as_of), or begin the log anew"
        )
    mark.write_text(place)
    return position | {"pending": 0}


def remove_before(table: Any, needed: Sequence[Any]) -> int:
    """Removes the files of epochs that no snapshot needs; returns how many.

    Args:
        table: `examples`.
        needed: The oldest snapshot that stays, and those that tags keep.
    """
    first: dict[int, int] = {}
    for snapshot in needed:
        for name, told in told_of(snapshot).get("parts", {}).items():
            epoch = min([one[0] for one in told["epochs"]], default=told["epoch"])
            first[int(name)] = min(first.get(int(name), epoch), epoch)
    removed = 0
    for one in table.file_io.list_status(folder_of(table)) if table.file_io.exists(folder_of(table)) else []:
        part, epoch, _ = one.path.rsplit("/", 1)[-1].split("-")
        if int(epoch) < first.get(int(part), 0):
            table.file_io.delete_quietly(one.path)
            removed += 1
    return removed
