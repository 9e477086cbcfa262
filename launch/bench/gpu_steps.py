"""Whole steps on an accelerator, program by program, beside the host; and the same steps on a CPU device, for comparison.

In: sizes, measured limits. Out: figures by name.

Least bytes of a step's programs, with V distinct rows of W floats, N id positions of D floats:

  read   V rows read and written beside one another, N vectors written
  learn  N vectors read, N gradients written, weights and optimizer read and written, each layer's output written and read
  write  N gradients read, V rows read and written
"""

from __future__ import annotations

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from launch.bench import workload
from launch.bench.device_limits import chain_ms, over_limits, xla_counts
from launch.bench.workload import Workload
from monolith_jax.ids.threads import MapperConfig, make_threads
from monolith_jax.mesh import MODEL, REPLICATED, SHARD, MeshConfig, make_mesh, sharding
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.train.state import ModelConfig, first_state
from monolith_jax.train.step import make_fresh, make_learn, make_read, make_train_step, make_write

HEADS = ("like", "click", "follow", "share", "comment", "profile", "dislike", "finish")
TOLERANCE = {"sgd": 1e-4, "adagrad": 2e-3, "adam": 5e-2}
"""Largest difference of a table's value after the steps, over the largest value. Adam divides by the root of a second moment
that is near zero where gradients cancel, so single elements differ: 1e-2 between 1 and 8 CPU devices too."""
LOSS_TOLERANCE = 1e-4


def cpu_mesh() -> Mesh:
    """Returns a mesh of the last CPU device."""
    return jax.make_mesh((1, 1), (SHARD, MODEL), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[-1:])


def _trained(work: Workload, steps: int) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Returns the losses, the table array and the last scores after `steps` steps."""
    train_step, state = make_train_step(work.model), first_state(work.model, jax.tree.map(np.array, work.weights))
    losses, scores = [], np.zeros(0)
    for planned in work.planner(max_steps=steps):
        state, metrics = train_step(state, planned.inputs)
        losses.append(float(metrics.loss))
        scores = np.asarray(metrics.scores)
    return losses, np.asarray(state.groups[0]), scores


def correctness(batch_size: int, max_rows: int, steps: int) -> dict[str, Any]:
    """Returns how far the default device and a CPU device are apart after the same steps on the same plans, in float32."""
    batches = workload.make_batches(batch_size, pool=min(steps, 8), num_ids=max_rows // 2)
    found: dict[str, Any] = {"steps": steps, "batch": batch_size, "loss_tolerance": LOSS_TOLERANCE, "agrees": True}
    # Else products on a GPU are made of numbers with 10 bits.
    with jax.default_matmul_precision("highest"):
        for name, tolerance in TOLERANCE.items():
            optimizer = OptimizerConfig(name=name, learning_rate=0.02)
            results = []
            for mesh in (make_mesh(MeshConfig(num_devices=1)), cpu_mesh()):
                work = workload.make_workload(mesh, DeepFMConfig(hidden=(64, 32)), batches, optimizer, max_rows)
                results.append(_trained(work, steps))
            (losses, table, scores), (cpu_losses, cpu_table, cpu_scores) = results
            loss = float(np.max(np.abs(np.subtract(losses, cpu_losses)) / np.abs(cpu_losses)))
            apart = float(np.max(np.abs(table - cpu_table)) / np.max(np.abs(cpu_table)))
            agrees = loss <= LOSS_TOLERANCE and apart <= tolerance
            found[name] = {
                "loss": loss, "table": apart, "scores": float(np.max(np.abs(scores - cpu_scores))), "tolerance": tolerance,
                "agrees": agrees,
            }  # fmt: skip
            found["agrees"] &= agrees
    return found


def _counts(work: Workload, inputs: Any) -> dict[str, dict[str, float]]:
    """Returns the least bytes and operations of each program."""
    plan, group = inputs.plans[0], work.model.groups[0]
    rows = int((np.asarray(plan.sent) < plan.touched.shape[1]).sum()) * group.shape[2] * 4
    vectors = plan.positions.size * group.dim * 4
    # Towers that are computed together have kernels [N, I, O] and biases [N, O].
    leaves = jax.tree.leaves(work.weights)
    kernels = [leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(work.weights) if "kernel" in str(path)]
    outputs = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(work.weights) if "bias" in str(path))
    optimizer = jax.tree.leaves(jax.eval_shape(work.model.transformation.init, work.weights))
    dense = 4 * (sum(leaf.size for leaf in leaves) + sum(leaf.size for leaf in optimizer))
    learn = 2 * vectors + 2 * dense + 2 * 4 * work.batch_size * outputs
    return {
        "fresh": {"least_bytes": 0, "flops": 0},
        "read": {"least_bytes": 2 * rows + vectors + 4 * plan.positions.size, "flops": 0},
        "learn": {"least_bytes": learn, "flops": 6 * work.batch_size * sum(kernels)},
        "write": {"least_bytes": vectors + 2 * rows + 4 * plan.positions.size, "flops": plan.positions.size * group.dim},
    }


def programs(work: Workload, inputs: Any, limits: dict[str, float], repeats: int) -> dict[str, dict[str, float]]:
    """Returns for each program of the step its time alone, what it must move and compute, and how near that is to limits."""
    model = work.model
    state = first_state(model, jax.tree.map(np.array, work.weights))
    seen = inputs._replace(plans=())
    fresh = make_fresh(model).lower(state.groups, inputs.plans).compile()
    groups = [fresh(state.groups, inputs.plans)]
    read = make_read(model).lower(groups[0], inputs.plans).compile()
    rows, vectors, valid = read(groups[0], inputs.plans)
    learn = make_learn(model).lower(state.step, state.weights, state.optimizer, vectors, valid, seen).compile()
    _, weights, optimizer, _, gradients = learn(state.step, state.weights, state.optimizer, vectors, valid, seen)
    kept = [weights, optimizer]
    number = jax.device_put(jnp.int32(1), sharding(model.mesh, REPLICATED))
    write = make_write(model).lower(groups[0], rows, gradients, number, inputs.plans).compile()

    def run_fresh() -> Any:
        groups[0] = fresh(groups[0], inputs.plans)
        return groups[0]

    def run_learn() -> Any:
        _, kept[0], kept[1], metrics, _ = learn(number, *kept, vectors, valid, seen)
        return metrics

    def run_write() -> Any:
        groups[0] = write(groups[0], rows, gradients, number, inputs.plans)
        return groups[0]

    runs = {
        "fresh": (fresh, run_fresh),
        "read": (read, lambda: read(groups[0], inputs.plans)),
        "learn": (learn, run_learn),
        "write": (write, run_write),
    }
    counts, found = _counts(work, inputs), {}
    for name, (compiled, run) in runs.items():
        ms, counted = chain_ms(run, repeats), counts[name]
        near = over_limits(ms, counted["least_bytes"], counted["flops"], limits)
        found[name] = {"ms": ms, **counted, **xla_counts(compiled), **near}
    return found


def step_figures(
    config: ModelConfig,
    labels: tuple[str, ...],
    batch_size: int,
    max_rows: int,
    pool: int,
    repeats: int,
    limits: dict[str, float],
) -> dict[str, Any]:
    """Returns the figures of one workload: full step, dense half, host, and each program alone."""
    # The pool's ids need rows: of the 10M, as many as half the rows.
    batches = workload.make_batches(batch_size, pool=pool, labels=labels)
    optimizer = OptimizerConfig(name="adagrad", learning_rate=0.02)
    threads = make_threads(MapperConfig())
    mesh = make_mesh(MeshConfig(num_devices=1))
    work = workload.make_workload(mesh, config, batches, optimizer, max_rows, labels=labels, threads=threads)
    inputs = work.inputs()
    of_programs = programs(work, inputs[0], limits, repeats)
    lanes = {
        "dense_ms": workload.dense_lane(work, "dense half"),
        "device_ms": workload.device_lane(work, "device alone", inputs),
        "step_ms": workload.full_lane(work, "full step"),
        "host_ms": workload.host_lane(work, "host alone"),
    }
    for lane in lanes.values():
        lane.warm(2 * pool)
    for _ in range(5):
        for lane in lanes.values():
            lane.turn(max(repeats // 2, 2))
    for lane in lanes.values():
        lane.close()
    found: dict[str, Any] = {name: statistics.median(lane.step_ms) for name, lane in lanes.items()}
    least = {
        name: sum(one[name] for one in of_programs.values()) for name in ("least_bytes", "flops", "xla_bytes", "xla_flops")
    }
    return {
        "batch": batch_size,
        "ids": batch_size * workload.NUM_FEATURES,
        "host_threads": threads.num_threads,
        "refused": int((np.asarray(inputs[0].plans[0].positions) >= inputs[0].plans[0].sent.size).sum()),
        **found,
        "over_dense": found["step_ms"] / found["dense_ms"],
        "examples_per_s": batch_size * 1e3 / found["step_ms"],
        **least,
        **over_limits(found["device_ms"], least["least_bytes"], least["flops"], limits),
        "programs": of_programs,
    }


def deepfm() -> DeepFMConfig:
    """Returns the towers of `launch.bench.step`."""
    return DeepFMConfig()


def mmoe() -> MMoEConfig:
    """Returns experts and towers of a heavy ranker."""
    return MMoEConfig(num_experts=8, expert_hidden=(512, 256), tower_hidden=(128,))
