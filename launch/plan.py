"""Says before a run what each device will hold and move, and refuses what cannot fit: `python -m launch.plan --help`.

The last line is one JSON object of bytes. Nothing is allocated; the mesh need not be here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch import cli

if TYPE_CHECKING:
    from rich.table import Table

    from monolith_jax.experiment import Experiment
    from monolith_jax.footprint import Footprint

EXAMPLE = "python -m launch.plan --gin_file=configs/quickstart.gin --gin.TrainConfig.batch_size=65536 --devices=64"
GB = 1e9
HOST_DEVICES = 8
"""Devices of a host, unless --hosts says otherwise."""
FLAGS = ("--gin_file", "--devices", "--hosts", "--device_memory_gb", "--host_memory_gb", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 where the config is wrong or does not fit."""
    usage = "[--devices=N] [--hosts=N] [--device_memory_gb=80] [--host_memory_gb=N]"
    parser = cli.gin_parser("Says what a run will hold and move: devices, hosts, disk. Allocates nothing.", EXAMPLE, usage)
    parser.add_argument("--devices", type=int, default=0, metavar="N", help="else MeshConfig.num_devices, or those here")
    parser.add_argument("--hosts", type=int, default=0, metavar="N", help="else one for every 8 devices")
    parser.add_argument("--device_memory_gb", type=float, default=80, metavar="GB", help="10^9 bytes of a device (80)")
    parser.add_argument("--host_memory_gb", type=float, metavar="GB", help="10^9 bytes of a host; else it is not checked")
    asked, overrides = cli.parse_gin(parser, argv, FLAGS)
    # Imported late: --help answers at once.
    from rich.console import Console

    from monolith_jax.experiment import load
    from monolith_jax.footprint import refuse

    try:
        found = plan(load(asked.gin_file, overrides), asked.devices, asked.hosts)
    except (ValueError, FileNotFoundError, ImportError) as error:
        return _failed(error)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for table in (tables_table(found), bytes_table(found, asked.device_memory_gb * GB), traffic_table(found)):
        console.print(table)
    status, host_memory = 0, None if asked.host_memory_gb is None else asked.host_memory_gb * GB
    try:
        refuse(found, asked.device_memory_gb * GB, host_memory)
    except ValueError as error:
        status = _failed(error)
    print(json.dumps({"fits": not status, **to_json(found)}))
    return status


def _failed(error: Exception) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1


def plan(experiment: Experiment, devices: int = 0, hosts: int = 0) -> Footprint:
    """Returns the footprint of an experiment.

    Args:
        experiment: The experiment.
        devices: Devices of the mesh; 0: as many as MeshConfig says, or as there are here.
        hosts: Hosts; 0: one for every 8 devices.

    Raises:
        ValueError: The configs do not fit together, or to so many devices and hosts.
    """
    import jax

    from launch.process import prepare
    from monolith_jax.footprint import measure
    from monolith_jax.mesh import make_abstract_mesh
    from monolith_jax.train.shapes import trace_model
    from monolith_jax.train.state import make_model

    prepare(experiment.mesh)
    devices = devices or experiment.mesh.num_devices or len(jax.devices())
    mesh = make_abstract_mesh(dataclasses.replace(experiment.mesh, num_devices=devices))
    model, weights = trace_model(
        lambda: make_model(
            experiment.model, experiment.tables, experiment.features, experiment.heads,
            experiment.dense_optimizer, experiment.train.seed, experiment.mesh.num_shards,
            mesh,  # pyright: ignore[reportArgumentType]  # an abstract one is enough to trace
            experiment.wire,
            experiment.retrieval,
        )
    )  # fmt: skip
    hosts = hosts or max(1, devices // HOST_DEVICES)
    train = experiment.train
    return measure(model, weights, train.batch_size, hosts, experiment.history, experiment.counters, train.partitions)


def tables_table(found: Footprint) -> Table:
    """Returns the tables: rows, dim, optimizer, bytes."""
    from rich.table import Table

    table = Table(title=f"tables, {found.parameters:,} parameters in all", title_justify="left")
    for name in ("table", "max_rows", "rows, a device", "dim", "optimizer", "vectors", "slots", "id map, a host"):
        table.add_column(name, justify="left" if name in ("table", "optimizer") else "right")
    for one in found.tables:
        sizes = (one.vectors, one.slots, one.host)
        rows = (f"{one.max_rows:,}", f"{one.rows:,}")
        table.add_row(one.name, *rows, str(one.dim), one.optimizer, *(in_words(size) for size in sizes))
    return table


def bytes_table(found: Footprint, device_memory: float) -> Table:
    """Returns what each device and host holds, and a snapshot."""
    from rich.table import Table

    table = Table(title=f"bytes, {found.num_devices:,} devices, {found.num_hosts:,} hosts", title_justify="left")
    for name in ("where", "what", "bytes", "how it is known"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    device, host, most = found.device, found.host, "all ids of a batch distinct and fresh"
    rows = [
        ("a device", "tables", device.tables, "exact"),
        ("", "dense weights", device.weights, "exact"),
        ("", "their optimizer", device.optimizer, "exact"),
        ("", "inputs of steps ahead", device.inputs, most),
        ("", "touched rows", device.rows, most),
        ("", "exchange buffers", device.exchange, most),
        ("", "towers", device.towers, "XLA's analysis for the backend here"),
        ("", "all", device.total, f"{device.total / device_memory:.1%} of {in_words(device_memory)}"),
        ("a host", "id maps", host.maps, "exact, shards divided among hosts"),
        ("", "admission filters", host.filters, "exact, shards divided among hosts"),
        ("", "rows of tiered tables", host.tables, "exact, shards divided among hosts"),
        ("", "histories, counters", host.memories, "exact, of the partitions of a host"),
        ("", "planning a step", host.work, most),
        ("", "frozen host state", host.frozen, "at a snapshot: the frozen copy and Orbax's"),
        ("", "device state", host.state, "at a snapshot, on its way to disk, with tiered rows"),
        ("", "all", host.total, "without the input pipeline and Python"),
        ("disk", "a snapshot", found.snapshot, "tables full, before compression"),
        ("", "written", found.written, "estimate: zstd on floats that are noise"),
    ]
    for where, what, size, how in rows:
        table.add_row(where, what, in_words(size), how, end_section=what == "all")
    return table


def traffic_table(found: Footprint) -> Table:
    """Returns what a step moves."""
    from rich.table import Table

    table = Table(title="a step moves, a device", title_justify="left")
    table.add_column("what")
    for name in ("upper bound: all ids distinct", "estimate: zipf 1.05 over max_rows"):
        table.add_column(name, justify="right")
    most, likely = found.all_distinct, found.zipf
    for what, field in (
        ("vectors to the batch, padded", "to_batch"),
        ("gradients to their owners, padded", "to_owners"),
        ("both without padding", "needed"),
        ("dense gradients, ring all-reduce", "dense"),
        ("inputs from the host", "inputs"),
        ("of them index arrays", "index_arrays"),
    ):
        table.add_row(what, in_words(getattr(most, field)), in_words(getattr(likely, field)))
    return table


def in_words(size: float) -> str:
    """Returns bytes in the decimal unit that leaves one to three digits before the point."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def to_json(found: Footprint) -> dict[str, Any]:
    """Returns the footprint in plain values, whole bytes."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: whole(part) for name, part in value.items()}
        if isinstance(value, tuple | list):
            return [whole(part) for part in value]
        return round(value) if isinstance(value, float) else value

    plain = whole(dataclasses.asdict(found))
    plain["device"]["total"], plain["host"]["total"] = found.device.total, found.host.total
    return plain


if __name__ == "__main__":
    sys.exit(main())
