"""The benchmarks of the step: what they count against numpy, small runs for the names of their figures."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.bench import scaling, step, tiered, workload
from launch.bench.workload import Lane, Workload
from monolith_jax.mesh import MeshConfig, make_mesh
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.tables.wire import exchanged_bytes

BATCH = 64
STEP_NAMES = {
    "steps_per_s", "dense_steps_per_s", "over_dense", "sparse_cpu_ms", "examples_per_s", "rows_100m_over_1m",
    "rows_100m_over_1m_sparse", "over_dense_of_fastest", "host_ms", "host_over_step", "sparse_ms", "full_minus_dense_cpu_ms",
}  # fmt: skip
SCALING_NAMES = {
    "step_ms", "cpu_ms", "exchange_over_floor", "ragged_over_floor", "exchange_bytes", "floor_bytes", "devices8_over_devices2"
}  # fmt: skip


def small_work(num_devices: int, max_rows: int = 4000) -> Workload:
    mesh = make_mesh(MeshConfig(num_devices=num_devices))
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.5)
    return workload.make_workload(mesh, DeepFMConfig(hidden=(8,)), workload.make_batches(BATCH, pool=3), optimizer, max_rows)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_exchange_is_counted_from_the_plan(num_devices: int) -> None:
    work = small_work(num_devices)
    plan = work.inputs(1)[0].plans[0]
    padded, ragged, floor = exchanged_bytes(plan, 16)
    # The first batch that is read is the pool's second; its ids are apart by feature.
    examples = work.batches[1].examples
    ids = np.stack([examples[f"id{f}"].to_numpy() for f in range(workload.NUM_FEATURES)], axis=1)
    distinct = sum(np.unique(part).size for part in np.split(ids, num_devices))
    assert floor == 2 * distinct * 16 * 4
    assert padded == 2 * num_devices**2 * plan.sent.shape[2] * 16 * 4 >= floor
    assert ragged == floor + 2 * 4 * num_devices**2


def test_ids_of_made_inputs_all_have_rows() -> None:
    inputs = small_work(2).inputs()
    assert len(inputs) == 3
    for one in inputs:
        plan = one.plans[0]
        assert (np.asarray(plan.positions) < plan.sent.shape[0] * plan.sent.shape[2]).all()
        assert (np.asarray(plan.fresh_rows) >= np.asarray(plan.touched).min(1, keepdims=True)).all()
        assert not np.isin(np.asarray(plan.fresh_rows), np.asarray(plan.touched)).any()


def test_sparse_lane_moves_the_touched_rows() -> None:
    work = small_work(2)
    lane = workload.sparse_lane(work, "sparse", work.inputs())
    first, *later = (np.asarray(lane.step()[0]) for _ in range(4))
    assert not first.any()  # Tables are empty, and none of the plans has fresh rows.
    assert later[-1].any()  # The fourth step has the plan of the first, whose rows have moved.


def test_zipf_ranks_are_in_range_and_skewed() -> None:
    ranks = workload.zipf_ranks(np.random.default_rng(0), 200_000, 1000)
    assert ranks.min() == 0 and ranks.max() <= 999
    share = (2.0**-0.05 - 1) / (1000**-0.05 - 1)
    assert (ranks == 0).mean() == pytest.approx(share, rel=0.05)


def test_lane_counts_no_settling_steps() -> None:
    calls = []
    lane = Lane("one", lambda: calls.append(1) or jax.numpy.zeros(()))
    lane.turn(3, settle=4)
    assert len(calls) == 7 and len(lane.step_ms) == len(lane.cpu_ms) == 1
    lane.warm(2)
    assert lane.step_ms == [] and lane.cpu_ms == []


def test_summary_takes_each_kind_at_its_best() -> None:
    def lane(name: str, ms: Sequence[float], cpu: float) -> Lane:
        return Lane(name, lambda: None, step_ms=list(ms), cpu_ms=[cpu] * len(ms))

    lanes = [
        lane("dense half, 1 device(s)", (10, 10, 10), 10), lane("full step, 1 device(s)", (40, 40, 40), 40),
        lane("sparse, 1 device(s)", (5, 5, 5), 5), lane("dense half, 2 device(s)", (20, 20, 20), 30),
        lane("full step, 2 device(s)", (11, 25, 12), 44), lane("sparse, 2 device(s)", (7, 7, 7), 8),
        lane("host pipeline alone", (3, 3, 3), 3),
    ]  # fmt: skip
    figures = step.summary(lanes, 100)
    assert figures["dense_steps_per_s"] == 100.0 and figures["steps_per_s"] == pytest.approx(1e3 / 12, abs=0.01)
    assert figures["over_dense"] == 1.2 and figures["over_dense_of_fastest"] == 1.1
    assert figures["sparse_ms"] == 7 and figures["sparse_cpu_ms"] == 8  # Those of the devices of the best full step.
    assert figures["full_minus_dense_cpu_ms"] == 34 and figures["host_over_step"] == 0.25


def test_large_rows_are_left_out_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(step, "free_bytes", lambda: 2 * 10**9)
    figures = step.rows_figures(BATCH, 100_000_000, 1_000_000, 1, 1, said.append)
    assert figures == {"rows_100m_over_1m": None, "rows_100m_over_1m_sparse": None}
    assert len(said) == 1 and "8.6 GB of memory, 2.0 GB are free" in said[0]


def test_free_bytes_is_what_the_system_tells(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       100 kB\nMemAvailable:   64 kB\n")
    assert step.free_bytes(tmp_path / "meminfo") == 65536
    assert step.free_bytes(tmp_path / "nothing") > 2**60


def test_rows_of_large_tables_are_all_taken_and_the_batch_is_the_same() -> None:
    batches = workload.make_batches(BATCH, pool=2, num_ids=100)
    few, many = (step._rows_lane(rows, batches, True, 1) for rows in (2600, 26_000))
    assert few.name == "sparse, 2,600 rows" and many.name == "sparse, 26,000 rows"
    assert few.step()[0].shape == many.step()[0].shape == (BATCH, 26, 4)


@pytest.mark.slow
def test_step_tells_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch_size=64", "--max_rows=5000", "--rounds=2", "--steps=2", "--large_rows=52000", "--small_rows=26000"]
    assert step.main([*sizes, "--devices", "1", "2"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == STEP_NAMES
    assert all(value > 0 for name, value in figures.items() if name != "full_minus_dense_cpu_ms")
    assert figures["examples_per_s"] == pytest.approx(64 * figures["steps_per_s"], rel=0.01)


@pytest.mark.slow
def test_scaling_tells_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch_size=64", "--max_rows=5000", "--rounds=2", "--steps=2"]
    assert scaling.main([*sizes, "--devices", "2", "8"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == SCALING_NAMES
    assert set(figures["step_ms"]) == {"2", "8"} and figures["devices8_over_devices2"] > 0
    assert figures["floor_bytes"]["8"] > figures["floor_bytes"]["2"]


def test_scaling_says_which_process_ended() -> None:
    with pytest.raises(RuntimeError, match="the process with 3 devices ended with status 1"):
        scaling.measure([3], 64, 4000, 1, 1)


def test_scaling_divides_round_by_round() -> None:
    one = {"cpu_ms": [1.0], "padded_bytes": 3.0, "ragged_bytes": 2.1, "floor_bytes": 2.0}
    found = {2: {**one, "step_ms": [10.0, 20.0, 30.0]}, 8: {**one, "step_ms": [11.0, 21.0, 36.0]}}
    figures = scaling.summary(found)
    assert figures["devices8_over_devices2"] == pytest.approx(statistics.median([1.1, 1.05, 1.2]))
    assert figures["exchange_over_floor"] == {"2": 1.5, "8": 1.5} and figures["ragged_over_floor"]["8"] == 1.05


@pytest.mark.slow
def test_tiered_tells_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch_size=64", "--max_rows=2000", "--pool=10", "--rounds=2", "--steps=4", "--times", "10", "2"]
    assert tiered.main(sizes) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"hit_rate", "steps_per_s_over_device", "steps_per_s_device", "by_times"}
    tenth, half = (figures["by_times"][times] for times in ("10", "2"))
    assert 0 < tenth["hit_rate"] == figures["hit_rate"] < half["hit_rate"] <= 1
    assert tenth["steps_per_s_over_device"] > 0
