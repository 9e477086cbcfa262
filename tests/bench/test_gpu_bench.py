"""The measurements for a GPU, at small sizes on a CPU, without the packages that are missing there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.bench import device_limits, gpu, gpu_lookup, gpu_steps, workload
from launch.bench.gpu_lookup import LookupSizes
from monolith_jax.mesh import MeshConfig, make_mesh

ROOT = Path(__file__).parents[2]
MISSING = ("grain", "gin", "orbax", "tensorstore")
SIZES = LookupSizes(rows=20_000, ids=500, dim=8, pool=2)
LIMITS = {"copy_gb_per_s": 10.0, "float32_tflop_per_s": 1.0, "bfloat16_tflop_per_s": 2.0}
PROGRAM_NAMES = {"ms", "least_bytes", "flops", "xla_bytes", "xla_flops", "over_copy", "over_products"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Returns an environment in which the missing packages cannot be imported, in child processes neither."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in MISSING)]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    return {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}


def run(arguments: list[str], environment: dict[str, str]) -> list[str]:
    command = [sys.executable, "-m", "launch.bench.gpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()


def test_runs_without_what_is_missing(environment: dict[str, str], tmp_path: Path) -> None:
    check = f"import {MISSING[0]}"
    assert subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, check=False).returncode == 1
    out = tmp_path / "gpu.json"
    lines = run(["--small", "--parts", "map", "lookup", f"--out={out}"], environment)
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    assert set(found) == {"map", "lookup", "missed"} and found["missed"] == []
    assert found["map"]["backend"] == "cpu" and found["map"]["small"] is True and found["map"]["ids_per_s"] > 1000
    assert found["lookup"]["sgd"]["vectors_error"] == 0 and found["lookup"]["sgd"]["update_error_of_largest"] < 1e-5
    assert {"scattered_ms", "sorted_on_device_ms", "order_given_ms", "sort_ms"} == set(found["lookup"]["sums"])


@pytest.mark.slow
def test_all_parts_run_without_what_is_missing(environment: dict[str, str]) -> None:
    found = json.loads(run(["--small"], environment)[-1])
    assert set(found) == {*gpu.PARTS, "missed"}
    assert not any("error" in found[name] for name in gpu.PARTS)
    assert found["correctness"]["agrees"] is True
    for name in ("step", "mmoe"):
        assert set(found[name]["programs"]) == {"fresh", "read", "learn", "write"}
        assert all(set(one) == PROGRAM_NAMES for one in found[name]["programs"].values())
        # XLA counts a little more: biases, activations, the loss.
        assert found[name]["flops"] <= found[name]["xla_flops"] <= 1.1 * found[name]["flops"]


def test_a_part_that_fails_loses_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers: dict[str, dict[str, Any]] = {"map": {"ids_per_s": 1.5}, "lookup": {"error": "stopped after 9 s"}}
    monkeypatch.setattr(gpu, "_in_process", lambda name, small, seconds: {"backend": "gpu", **answers[name]})
    out = tmp_path / "gpu.json"
    assert gpu.main(["--parts", "lookup", "map", f"--out={out}"]) == 1
    found = json.loads(out.read_text())
    assert found["map"] == {"backend": "gpu", "ids_per_s": 1.5} and found["lookup"]["error"] == "stopped after 9 s"
    assert "map >= 120M ids/s" in found["missed"] and "lookup, SGD <= 0.96 ms" in found["missed"]


def test_demands() -> None:
    lookup = {"sgd": {"ms": 0.96, "over_copy": 0.5}, "adam": {"ms": 1.36, "over_copy": 0.49}}
    found: dict[str, Any] = {"correctness": {"agrees": True}, "lookup": lookup, "map": {"ids_per_s": 120e6}}
    missed = ["lookup, Adam <= 1.35 ms", "lookup, Adam >= 0.5 of the copy bandwidth"]
    assert gpu.demands_missed({name: {"backend": "gpu", **part} for name, part in found.items()}) == missed
    assert gpu.demands_missed({name: {"backend": "gpu", "small": True, **part} for name, part in found.items()}) == []


def test_a_part_past_its_time_is_stopped() -> None:
    assert gpu._in_process("map", True, 3.0) == {"error": f"not started: the {gpu.LIMIT_S} s of all parts are over"}


def test_two_devices_agree_and_another_model_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "TOLERANCE", {"adagrad": gpu_steps.TOLERANCE["adagrad"]})
    assert gpu_steps.cpu_mesh().devices.item() != make_mesh(MeshConfig(num_devices=1)).devices.item()
    assert gpu_steps.correctness(64, 300, 3)["agrees"]
    trained = gpu_steps._trained

    def apart(work: workload.Workload, steps: int) -> Any:
        losses, table, scores = trained(work, steps)
        return losses, table * (1 + 0.01 * (work.model.mesh.devices.item().id > 0)), scores

    monkeypatch.setattr(gpu_steps, "_trained", apart)
    found = gpu_steps.correctness(64, 300, 3)
    assert not found["agrees"] and found["adagrad"]["loss"] <= gpu_steps.LOSS_TOLERANCE < found["adagrad"]["table"]


def test_lookup_is_checked_against_numpy() -> None:
    mapper = gpu_lookup.full_mapper(SIZES)
    plans, ms = gpu_lookup.host_map(mapper, gpu_lookup.make_ids(SIZES))
    assert ms > 0 and len(plans) == 2 and mapper.maps.num_rows.sum() == SIZES.rows
    assert all((plan.positions < plan.sent.shape[2]).all() for plan in plans)
    figures = gpu_lookup.lookup_figures(SIZES, "sgd", plans, LIMITS, 2)
    assert figures["vectors_error"] == 0 and figures["update_error_of_largest"] < 1e-5
    ids = gpu_lookup.make_ids(SIZES)
    distinct = np.mean([sum(np.unique(one.ids[:, t]).size for t in range(10)) for one in ids])
    assert figures["distinct"] == distinct and figures["ids"] == 5000
    assert figures["least_bytes"] == distinct * 3 * 8 * 4 + 5000 * (2 * 8 * 4 + 8)
    assert figures["over_copy"] == pytest.approx(figures["least_bytes"] / figures["ms"] / 1e6 / 10.0)
    assert figures["published_ms"]["FBGEMM TBE"] == 0.96


def test_wrong_sums_are_seen() -> None:
    plans, _ = gpu_lookup.host_map(gpu_lookup.full_mapper(SIZES), gpu_lookup.make_ids(SIZES))
    gradients = np.ones((*plans[0].positions.shape, 8), np.float32)
    rows = plans[0].touched[0][:, None].astype(np.int64)
    untouched = gpu_lookup._values(rows, np.arange(8)[None, :])[None]
    vectors = untouched[0][plans[0].positions]
    checked = gpu_lookup._check(plans[0], gradients, vectors, untouched)
    assert checked["vectors_error"] == 0 and checked["update_error_of_largest"] == 1
    assert gpu_lookup._check(plans[0], gradients, vectors + 1, untouched)["vectors_error"] == 1


def test_all_ways_of_summing_agree() -> None:
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 40, 300).astype(np.int32)
    gradients = rng.normal(size=(300, 4)).astype(np.float32)
    expected = np.zeros((38, 4))
    kept = positions < 38
    np.add.at(expected, positions[kept], gradients[kept].astype(np.float64))
    sums = gpu_lookup._sums(jnp.asarray(positions), 38)
    for name in ("scattered", "sorted_on_device", "order_given"):
        np.testing.assert_allclose(sums[name](jnp.asarray(gradients)), expected, atol=1e-5)


def test_limits_and_counts() -> None:
    limits = device_limits.device_limits(2**16, 64, 2)
    assert min(limits.values()) > 0
    compiled = jax.jit(jnp.matmul).lower(jnp.ones((32, 64)), jnp.ones((64, 16))).compile()
    assert device_limits.xla_counts(compiled)["xla_flops"] == pytest.approx(2 * 32 * 64 * 16, rel=0.1)
    near = device_limits.over_limits(2.0, 10e6, 1e9, LIMITS)
    assert near == pytest.approx({"over_copy": 0.5, "over_products": 0.5})


def test_script_is_sound_and_names_no_host() -> None:
    script = ROOT / "launch" / "bench" / "gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert "://" not in script.read_text()
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "gpu.sh FILE" in done.stderr
