"""A snapshot to a serving folder that needs nothing else: `python -m launch.export --help`.

In: a run folder. Out: a folder with

* `config.gin`: the run's configuration, which tells the served model's features, tables and heads;
* `<epoch>-<sequence>/`: one base in the layout of `sync.delta`. `ServedModel(folder, ...)` serves it. Exported into the same
  folder once more, a later snapshot is a later base, which a server that polls takes over;
* `orbax/`: the same rows in float32 and the dense weights, which Orbax alone reads, without this package. `orbax/dense` is the
  tree of dense weights; of each table `orbax/tables/<table>/<block>` has `ids` int64 [N] and `vectors` float32 [N, D]. Blocks
  are counted from 0, one up to 256 MB of vectors, none of an empty table; ids ascend within a block and from one to the next.
  In names of tables what is not a letter, digit or one of `_.-~` is percent-encoded.

      import orbax.checkpoint as ocp
      rows = ocp.PyTreeCheckpointer().restore("/models/feed/orbax/tables/video/0")

A snapshot is read whole into memory; a block of vectors comes on top of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

if TYPE_CHECKING:
    from monolith_jax.experiment import Experiment
    from monolith_jax.snapshot import Restored
    from monolith_jax.sync.export import SavedTable
    from monolith_jax.sync.manifest import Manifest, Version

EXAMPLE = "python -m launch.export --workdir=checkpoints/quickstart --output=served/quickstart --format=float16"
_OF_SERVING = ("features", "tables", "model", "retrieval", "heads", "num_shards")
_OF_RUNS = ("snapshots", "metrics.jsonl", "deltas")


class Exported(NamedTuple):
    """What was written."""

    version: Version
    step: int
    num_rows: int
    """Of all tables."""


def export(workdir: Path, output: Path, format: str = "float16", step: int | None = None) -> Exported:
    """Writes the serving folder of a snapshot.

    Args:
        workdir: The run folder.
        output: New or empty, or holds an earlier export of the same model.
        format: Of the base's vectors: float32, float16 or int8.
        step: Which snapshot; None: the newest.

    Raises:
        ValueError: There is no such snapshot or format, or `output` holds something else.
        FloatingPointError: The snapshot has a value that is no number.
    """
    from monolith_jax.experiment import load
    from monolith_jax.models.towers import named_weights
    from monolith_jax.snapshot import SnapshotConfig, Snapshots, find
    from monolith_jax.sync.quantise import check_format

    of_base = check_format(format)
    folder, config = find(workdir), workdir / "config.gin"
    if not config.is_file():
        raise ValueError(f"{workdir} has no config.gin, which a run writes at its start: give the run folder as --workdir")
    experiment = load([config])
    snapshots = Snapshots(SnapshotConfig(), folder, read_only=True)
    try:
        found = _step(snapshots.steps(), step, folder)
        who = snapshots.read_meta(found)["identity"]
        _check_same(experiment, who, config, found)
        _check_output(output, who)
        restored = snapshots.restore_plain(found)
    finally:
        snapshots.close()
    tables = _tables(experiment, restored, who)
    weights = restored.state["weights"]
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, output / "config.gin")
    fresh = output / "orbax.new"
    shutil.rmtree(fresh, ignore_errors=True)
    _write_orbax(fresh, tables, weights)
    manifest = _manifest(restored, of_base, config.read_text(encoding="utf-8"), output)
    _write_base(output, manifest, tables, named_weights(weights))
    shutil.rmtree(output / "orbax", ignore_errors=True)
    fresh.rename(output / "orbax")
    return Exported(manifest.version, found, sum(table.ids.size for table in tables))


def _step(steps: Sequence[int], wanted: int | None, folder: Path) -> int:
    if not steps:
        raise ValueError(f"no snapshot in {folder} is whole; wait for the first (SnapshotConfig.period_steps)")
    if wanted is not None and wanted not in steps:
        raise ValueError(f"no snapshot of step {wanted} in {folder}; there are those of {', '.join(map(str, steps))}")
    return steps[-1] if wanted is None else wanted


def _check_same(experiment: Experiment, who: Mapping[str, Any], config: Path, step: int) -> None:
    from launch.identity import identity
    from monolith_jax.snapshot import differences
    from monolith_jax.train.grow import can_grow

    ours = identity(experiment)
    if (lines := differences(who, ours)) and not can_grow(who, ours):
        raise ValueError(f"{config} is of another run than the snapshot of step {step}:\n  " + "\n  ".join(lines))


def _check_output(output: Path, who: Mapping[str, Any]) -> None:
    """Refuses a folder that is something else than an export of the same model."""
    from launch.identity import identity
    from monolith_jax.experiment import load
    from monolith_jax.snapshot import differences
    from monolith_jax.train.grow import can_grow

    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a new folder as --output")
    names = {child.name for child in output.iterdir()} if output.exists() else set()
    if not names:
        return
    if "config.gin" not in names or names & set(_OF_RUNS):
        what = "is a run folder" if names & set(_OF_RUNS) else "holds something else than an export"
        raise ValueError(f"{output} {what} ({', '.join(sorted(names)[:5])}); give a new folder as --output")
    saved = identity(load([output / "config.gin"]))
    theirs, ours = ({name: one.get(name) for name in _OF_SERVING} for one in (saved, who))
    if (lines := differences(theirs, ours)) and not can_grow(theirs, ours):
        where = [line.partition(":")[0] for line in lines]
        more = f" and {len(where) - 5} more" if len(where) > 5 else ""
        raise ValueError(
            f"{output} holds another model, whose servers this one may not fit; they differ in {', '.join(where[:5])}{more}. "
            "Give a new folder as --output"
        )


def _tables(experiment: Experiment, restored: Restored, who: Mapping[str, Any]) -> list[SavedTable]:
    from monolith_jax.sync.export import saved_tables
    from monolith_jax.tables.table import make_groups

    sizes = {table["name"]: table["max_rows"] for table in who["tables"]}
    tables = [dataclasses.replace(table, max_rows=sizes[table.name]) for table in experiment.tables]
    return saved_tables(make_groups(tables, who["num_shards"]), restored.host["maps"], restored.state["groups"])


def _write_orbax(folder: Path, tables: Sequence[SavedTable], weights: Any) -> None:
    from monolith_jax.snapshot import write_tree

    write_tree(folder / "dense", weights)
    for table in tables:
        of_table = folder / "tables" / quote(table.name, safe="")
        of_table.mkdir(parents=True)
        for number, rows in enumerate(table.blocks()):
            write_tree(of_table / str(number), {"ids": rows.ids, "vectors": rows.vectors})


def _manifest(restored: Restored, format: Any, gin: str, output: Path) -> Manifest:
    from monolith_jax.packing import unpack
    from monolith_jax.sync.delta import Manifest, Version, next_epoch

    version = Version(next_epoch(output), 0)
    return Manifest(
        kind="base",
        version=version,
        previous=None,
        base=version,
        step=restored.step,
        event_time_ms=restored.host["now_ms"],
        created_ms=int(time.time() * 1000),
        position=[unpack(of_partition)["stream"] for of_partition in restored.host["parts"]],
        format=format,
        config=gin,
    )


def _write_base(output: Path, manifest: Manifest, tables: Sequence[SavedTable], dense: Mapping[str, Any]) -> None:
    from monolith_jax.sync.delta import DeltaFolder
    from monolith_jax.sync.export import base_contents

    folder = DeltaFolder(output)
    try:
        folder.write_part(manifest.version, 0, base_contents(tables, dense), manifest.format)
        folder.commit(manifest)
    finally:
        folder.discard(manifest.version)  # Nothing, where it is committed.
    folder.prune(keep_bases=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.export",
        description="Writes a snapshot as a folder to serve from: a base for ServedModel, and what Orbax alone reads.",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="the run folder, with its snapshots")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="new, or an earlier export of the same model"
    )
    parser.add_argument(
        "--format", default="float16", help="of served vectors: float32, float16 or int8 (default: %(default)s)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="of the snapshot (default: the newest)")
    asked = parser.parse_args(argv)
    # Rows stay on the host: an accelerator may be busy training.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from launch.process import USER_ERRORS

    try:
        done = export(asked.workdir, asked.output, asked.format, asked.step)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"step {done.step:,}: {done.num_rows:,} rows in {asked.format} as version {done.version.folder} in {asked.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
