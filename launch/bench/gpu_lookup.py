"""Lookup and update of large tables alone, and the host's maps alone.

In: sizes, measured limits. Out: figures by name.

Workload of DynamicEmb's benchmark (NVIDIA recsys-examples): 10 tables, dim 128, 24M rows in all, 104,857 ids a table and step,
zipf(1.05). A step gathers the distinct rows, puts a vector at each id, takes a gradient for each id, sums those of equal ids,
and updates and writes the rows. Least bytes, with V distinct rows and N ids: V vectors read, N written; N gradients read, V
rows (vector and optimizer state) read and written; an index of 4 bytes an id, twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench.device_limits import chain_ms, over_limits, xla_counts
from launch.bench.workload import ZIPF, ids_of_ranks, zipf_ranks
from monolith_jax.features import IdFeatureConfig
from monolith_jax.ids.group import GroupMapper
from monolith_jax.ids.threads import MapperConfig, make_threads
from monolith_jax.mesh import BATCH, REPLICATED, ROWS, MeshConfig, make_mesh, sharding
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.losses import HeadConfig
from monolith_jax.tables.table import TableConfig, empty_array
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.train.state import Model, make_model
from monolith_jax.train.step import make_read, make_write
from monolith_jax.types import GroupIds, GroupPlan

NUM_TABLES, NUM_SHARDS = 10, 64
RATE = 0.1
PUBLISHED_MS = {"sgd": {"DynamicEmb": 1.58, "FBGEMM TBE": 0.96}, "adam": {"DynamicEmb": 1.84, "FBGEMM TBE": 1.35}}
"""Training, forward and backward, all in the memory of one H100 80GB."""
CHECKED = 200
"""Rows that are compared with numpy."""


@dataclass(frozen=True)
class LookupSizes:
    """The sizes of the workload."""

    rows: int = 24_000_000
    """Rows of all tables."""
    ids: int = 104_857
    """Ids a table and step."""
    dim: int = 128
    """D"""
    pool: int = 8
    """Batches, over and over."""


def lookup_model(sizes: LookupSizes, optimizer: str) -> Model:
    """Returns a model with the tables; its towers are not used."""
    config = OptimizerConfig(name=optimizer, learning_rate=RATE)
    of_table = sizes.rows // NUM_TABLES
    tables = [TableConfig(f"id{t}", of_table, sizes.dim, optimizer=config) for t in range(NUM_TABLES)]
    features = [IdFeatureConfig(f"id{t}", f"id{t}", f"id{t}") for t in range(NUM_TABLES)]
    mesh = make_mesh(MeshConfig(num_devices=1))
    heads = [HeadConfig("like")]
    return make_model(DeepFMConfig(hidden=()), tables, features, heads, config, 0, NUM_SHARDS, mesh)[0]


def full_mapper(sizes: LookupSizes, threads: int = 0) -> GroupMapper:
    """Returns maps in which every id has a row, in no order. `threads` as in `MapperConfig`."""
    group = lookup_model(sizes, "sgd").groups[0]
    mapper = GroupMapper(group.maps, list(range(NUM_TABLES)), 1, threads=make_threads(MapperConfig(threads=threads)))
    rng = np.random.default_rng(0)
    for table in range(NUM_TABLES):
        ids = ids_of_ranks(rng.permutation(sizes.rows // NUM_TABLES), table)
        mapper.maps.lookup_or_insert(ids, table, np.zeros(ids.size, np.uint32))
    return mapper


def make_ids(sizes: LookupSizes, seed: int = 1) -> list[GroupIds]:
    """Returns batches of ids [B, 10]."""
    rng, batches, of_table = np.random.default_rng(seed), [], sizes.rows // NUM_TABLES
    for _ in range(sizes.pool):
        columns = [ids_of_ranks(zipf_ranks(rng, sizes.ids, of_table), table) for table in range(NUM_TABLES)]
        ids = np.stack(columns, axis=1)
        batches.append(GroupIds(ids, np.ones(ids.shape, np.bool_)))
    return batches


def host_map(mapper: GroupMapper, batches: list[GroupIds], rounds: int = 3) -> tuple[list[GroupPlan], float]:
    """Returns the plans of the batches and a plan's median milliseconds; the first round, which compiles, is not counted."""
    seen_s = np.zeros(batches[0].ids.shape[0], np.uint32)
    plans, times, number = [], [], 0
    for round_number in range(rounds + 1):
        plans = []
        for batch in batches:
            started = time.perf_counter()
            plans.append(mapper.plan(batch, seen_s, 0, number)[0])
            number += 1
            if round_number:
                times.append((time.perf_counter() - started) * 1e3)
    return plans, statistics.median(times)


def map_figures(sizes: LookupSizes, cores: int) -> dict[str, Any]:
    """Returns ids a second of the host's maps, with one thread, half as many as cores, and as many."""
    batches = make_ids(sizes)
    found: dict[str, Any] = {"cores": cores, "ids": batches[0].ids.size}
    for threads in sorted({1, max(cores // 2, 1), cores}):
        ms = host_map(full_mapper(sizes, threads), batches)[1]
        found[f"threads{threads}_ids_per_s"] = batches[0].ids.size / ms * 1e3
    found["ids_per_s"] = found[f"threads{cores}_ids_per_s"]
    return found


def _values(rows: Any, columns: Any) -> Any:
    """Returns the first values of the tables, which are known of any row: exact floats above 0, int32 indices in."""
    return (((rows * 7 + columns * 13) & 1023) + 1) / np.float32(8192)


def _filled(model: Model) -> jax.Array:
    group = model.groups[0]
    dtype = jax.eval_shape(lambda: empty_array(group, model.mesh)).dtype

    def make() -> jax.Array:
        shards, rows, columns = (jax.lax.broadcasted_iota(jnp.int32, group.shape, axis) for axis in range(3))
        numbers = ((shards * group.shape[1] + rows) * 7 + columns * 13) & 1023
        return (numbers + 1).astype(dtype) / jnp.asarray(8192, dtype)

    return jax.jit(make, out_shardings=sharding(model.mesh, ROWS))()


def _check(plan: GroupPlan, gradients: np.ndarray, vectors: Any, after: Any) -> dict[str, float]:
    """Returns the largest errors of vectors, and of rows after an update by SGD, against numpy in float64, of sampled rows.

    Args:
        plan: The plan, on the host.
        gradients: [B, P, D].
        vectors: [B, P, D], looked up before the update.
        after: [1, V, D], the touched rows after it.
    """
    positions = plan.positions.reshape(-1)
    dim, rng = gradients.shape[-1], np.random.default_rng(2)
    sampled = rng.choice(positions.size, CHECKED)
    rows = plan.touched[0][plan.sent[0, 0][positions[sampled]]]
    expected = _values(rows[:, None].astype(np.int64), np.arange(dim)[None, :])
    looked_up = np.asarray(jnp.asarray(vectors).reshape(-1, dim)[sampled])
    # A hundred at random, most of them rare, and the hundred places whose row the most ids share.
    numbers = np.bincount(positions, minlength=plan.sent.shape[2])[: plan.sent.shape[2]]
    places = np.concatenate([rng.choice(np.nonzero(numbers)[0], CHECKED // 2), np.argsort(-numbers)[: CHECKED // 2]])
    flat, error, largest = gradients.reshape(-1, dim), 0.0, 0.0
    got = np.asarray(jnp.asarray(after)[0, plan.sent[0, 0][places], :dim])
    first = _values(plan.touched[0][plan.sent[0, 0][places]][:, None].astype(np.int64), np.arange(dim)[None, :])
    for place, of_row, was in zip(places, got, first, strict=True):
        change = RATE * flat[positions == place].astype(np.float64).sum(0)
        error = max(error, float(np.abs(of_row - (was - change)).max()))
        largest = max(largest, float(np.abs(change).max()))
    return {
        "vectors_error": float(np.abs(looked_up - expected).max()), "update_error_of_largest": error / largest,
        "most_ids_of_a_row": float(numbers.max()),
    }  # fmt: skip


def lookup_figures(
    sizes: LookupSizes, optimizer: str, batches: list[GroupPlan], limits: dict[str, float], repeats: int
) -> dict[str, Any]:
    """Returns the figures of lookup and update with one optimizer, on plans of the host."""
    model = lookup_model(sizes, optimizer)
    mesh, array = model.mesh, _filled(model)
    rows, batch = sharding(mesh, ROWS), sharding(mesh, BATCH)
    places = GroupPlan(rows, rows, batch, rows, rows, rows, rows)
    plans = [(jax.device_put(plan, places),) for plan in batches]
    drawn = np.random.default_rng(0).normal(size=(*batches[0].positions.shape, sizes.dim)).astype(np.float32)
    gradients = (jax.device_put(drawn, batch),)
    number = jax.device_put(jnp.int32(1), sharding(mesh, REPLICATED))
    read = make_read(model).lower((array,), plans[0]).compile()
    gathered, vectors, _ = read((array,), plans[0])
    write = make_write(model).lower((array,), gathered, gradients, number, plans[0]).compile()
    kept, at = [write((array,), gathered, gradients, number, plans[0])], [0]
    checked = {}
    if optimizer == "sgd":
        checked = _check(batches[0], drawn, vectors[0], read(kept[0], plans[0])[0][0])
    del vectors

    def run_both() -> Any:
        at[0] += 1
        plan = plans[at[0] % len(plans)]
        gathered, _, _ = read(kept[0], plan)
        kept[0] = write(kept[0], gathered, gradients, number, plan)
        return kept[0]

    def run_write() -> Any:
        kept[0] = write(kept[0], gathered, gradients, number, plans[0])
        return kept[0]

    both_ms, read_ms, write_ms = (
        chain_ms(run, repeats) for run in (run_both, lambda: read(kept[0], plans[at[0] % len(plans)]), run_write)
    )
    num_ids, distinct = (
        batches[0].positions.size,
        statistics.mean(int((one.sent < one.touched.shape[1]).sum()) for one in batches),
    )
    vector_bytes, row_bytes = 4 * sizes.dim, model.groups[0].shape[2] * array.dtype.itemsize
    least = distinct * (vector_bytes + 2 * row_bytes) + num_ids * (2 * vector_bytes + 8)
    counted = [xla_counts(one) for one in (read, write)]
    return {
        "optimizer": optimizer, "ids": num_ids, "distinct": distinct, "zipf": ZIPF, "row_floats": model.groups[0].shape[2],
        "array_gb": np.prod(model.groups[0].shape, dtype=float) * 4 / 1e9, "ms": both_ms, "read_ms": read_ms,
        "write_ms": write_ms, "least_bytes": least, "xla_bytes": sum(one["xla_bytes"] for one in counted),
        "xla_flops": sum(one["xla_flops"] for one in counted), "flops": num_ids * sizes.dim, **checked,
        **over_limits(both_ms, least, num_ids * sizes.dim, limits), "published_ms": PUBLISHED_MS[optimizer],
    }  # fmt: skip


def _sums(positions: jax.Array, size: int) -> dict[str, Callable[..., jax.Array]]:
    order = jnp.argsort(positions)
    in_order = positions[order]

    def scattered(gradients: jax.Array, at: jax.Array, sorted_at: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.zeros((size, gradients.shape[1]), gradients.dtype).at[at].add(gradients, mode="drop")

    def sorted_here(gradients: jax.Array, at: jax.Array, sorted_at: jax.Array, order: jax.Array) -> jax.Array:
        here, order = jax.lax.sort_key_val(at, jnp.arange(at.size, dtype=jnp.int32))
        return sorted_before(gradients, at, here, order)

    def sorted_before(gradients: jax.Array, at: jax.Array, sorted_at: jax.Array, order: jax.Array) -> jax.Array:
        zeros = jnp.zeros((size, gradients.shape[1]), gradients.dtype)
        return zeros.at[sorted_at].add(gradients[order], mode="drop", indices_are_sorted=True)

    def sort_alone(gradients: jax.Array, at: jax.Array, sorted_at: jax.Array, order: jax.Array) -> jax.Array:
        return jax.lax.sort_key_val(at, jnp.arange(at.size, dtype=jnp.int32))[1]

    functions = {"scattered": scattered, "sorted_on_device": sorted_here, "order_given": sorted_before, "sort": sort_alone}

    def bound(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        compiled = jax.jit(function)
        return lambda gradients: compiled(gradients, positions, in_order, order)

    return {name: bound(function) for name, function in functions.items()}


def sum_figures(plan: GroupPlan, dim: int, repeats: int) -> dict[str, float]:
    """Returns the milliseconds of summing the gradients of equal ids in three ways, and of sorting positions alone.

    `scattered` adds each where it belongs, in no order: on NVIDIA GPUs jaxlib makes that a loop of compare-and-swap. The others
    add runs of equal indices, whose order the device makes (`sorted_on_device`) or is given (`order_given`).
    """
    drawn = np.random.default_rng(0).normal(size=(plan.positions.size, dim)).astype(np.float32)
    gradients = jnp.asarray(drawn)
    sums = _sums(jnp.asarray(plan.positions.reshape(-1)), plan.sent.size)
    return {f"{name}_ms": chain_ms(lambda sum_=sum_: sum_(gradients), repeats, chains=3) for name, sum_ in sums.items()}
