"""All measurements on an accelerator: `python -m launch.bench.gpu --help`.

Parts, each in a process of its own, so that one that fails or takes too long loses no other:

  correctness  20 steps with SGD, Adagrad and Adam on the device and on a CPU device, the same plans, float32
  lookup       lookup and update alone, SGD then Adam: 10 tables, dim 128, 24M rows, 1,048,570 ids a step; three ways of summing
  step         the step of `launch.bench.step` at batch 65,536: whole, its dense half, the device alone, the host alone
  mmoe         the same with MMoE, 8 heads, at batch 16,384
  map          ids a second of the host's maps, on 1, half and all cores

Every part measures the copy bandwidth and the rates of matrix products first; ratios are to those. Needs jax, flax, optax,
numpy, pyarrow and numba; neither grain nor gin nor orbax. Runs on a CPU too (`--small`), to try the script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PARTS = {"correctness": 100, "lookup": 150, "step": 110, "mmoe": 80, "map": 60}
"""Seconds that each part may take."""
LIMIT_S = 470
"""Seconds that all parts together may take."""


def _limits(small: bool) -> dict[str, float]:
    from launch.bench.device_limits import device_limits

    return device_limits(2**22, 256, 3) if small else device_limits(2**31, 8192, 20)


def _correctness(small: bool) -> dict[str, Any]:
    from launch.bench.gpu_steps import correctness

    return correctness(256, 600, 5) if small else correctness(2048, 20_000, 20)


def _lookup(small: bool) -> dict[str, Any]:
    from launch.bench import gpu_lookup

    sizes = gpu_lookup.LookupSizes(20_000, 500, 8, 2) if small else gpu_lookup.LookupSizes()
    repeats, limits = (2 if small else 20), _limits(small)
    plans, host_ms = gpu_lookup.host_map(gpu_lookup.full_mapper(sizes, os.cpu_count() or 1), gpu_lookup.make_ids(sizes))
    found: dict[str, Any] = {"limits": limits, "host_ms": host_ms}
    for optimizer in ("sgd", "adam"):
        found[optimizer] = gpu_lookup.lookup_figures(sizes, optimizer, plans, limits, repeats)
        # The rivals come after the figure that counts, and the largest table last.
        if optimizer == "sgd":
            found["sums"] = gpu_lookup.sum_figures(plans[0], sizes.dim, repeats)
    return found


def _step(small: bool) -> dict[str, Any]:
    from launch.bench import gpu_steps

    sizes = (256, 5_000, 2, 2) if small else (65_536, 400_000, 8, 20)
    limits = _limits(small)
    return {"limits": limits, **gpu_steps.step_figures(gpu_steps.deepfm(), ("like",), *sizes, limits)}


def _mmoe(small: bool) -> dict[str, Any]:
    from launch.bench import gpu_steps

    sizes = (128, 5_000, 2, 2) if small else (16_384, 400_000, 8, 20)
    limits = _limits(small)
    return {"limits": limits, **gpu_steps.step_figures(gpu_steps.mmoe(), gpu_steps.HEADS, *sizes, limits)}


def _map(small: bool) -> dict[str, Any]:
    from launch.bench import gpu_lookup

    sizes = gpu_lookup.LookupSizes(20_000, 500, 8, 2) if small else gpu_lookup.LookupSizes()
    return gpu_lookup.map_figures(sizes, len(os.sched_getaffinity(0)))


_RUNS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "correctness": _correctness, "lookup": _lookup, "step": _step, "mmoe": _mmoe, "map": _map
}  # fmt: skip


def run_part(name: str, small: bool) -> dict[str, Any]:
    """Returns the figures of one part, with the device they are of."""
    import jax

    from launch.process import prepare
    from monolith_jax.mesh import MeshConfig

    prepare(MeshConfig())
    device = jax.devices()[0]
    started = time.perf_counter()
    figures = _RUNS[name](small)
    return {
        "backend": jax.default_backend(), "device": device.device_kind, "jax": jax.__version__, "small": small,
        **figures, "wall_s": time.perf_counter() - started,
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < 1e6 else round(value)
    return value


def demands_missed(found: dict[str, Any]) -> list[str]:
    """Returns the demands that the figures miss, or that were not measured; none are made of a CPU or of small sizes."""
    if any(part.get("small") or part.get("backend") == "cpu" for part in found.values()):
        return []

    def at(*path: str) -> Any:
        value: Any = found
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    met: dict[str, Callable[[], bool]] = {
        "correctness: agrees with a CPU": lambda: bool(at("correctness", "agrees")),
        "lookup, SGD <= 0.96 ms": lambda: at("lookup", "sgd", "ms") <= 0.96,
        "lookup, Adam <= 1.35 ms": lambda: at("lookup", "adam", "ms") <= 1.35,
        "lookup, SGD >= 0.5 of the copy bandwidth": lambda: at("lookup", "sgd", "over_copy") >= 0.5,
        "lookup, Adam >= 0.5 of the copy bandwidth": lambda: at("lookup", "adam", "over_copy") >= 0.5,
        "map >= 120M ids/s": lambda: at("map", "ids_per_s") >= 120e6,
    }
    missed = []
    for name, check in met.items():
        try:
            fine = check()
        except TypeError:  # Not measured: None.
            fine = False
        if not fine:
            missed.append(name)
    return missed


def _in_process(name: str, small: bool, seconds: float) -> dict[str, Any]:
    """Runs a part in a process of its own; what went wrong comes back as `error`."""
    if seconds < 10:
        return {"error": f"not started: the {LIMIT_S} s of all parts are over"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", "launch.bench.gpu", f"--part={name}", f"--out={out}", *["--small"] * small]
        environment = {**os.environ}
        if environment.get("JAX_PLATFORMS", "") in ("cuda", "gpu"):
            environment["JAX_PLATFORMS"] = "cuda,cpu"  # The comparison needs a CPU device too.
        try:
            status = subprocess.run(
                command, cwd=Path(__file__).parents[2], env=environment, timeout=seconds, stdout=subprocess.DEVNULL, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {seconds:.0f} s"}
        if status or not out.is_file():
            return {"error": f"ended with status {status}; what it said is above"}
        return json.loads(out.read_text())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.gpu",
        description=__doc__,
        epilog="examples:\n  python -m launch.bench.gpu --out gpu.json\n  python -m launch.bench.gpu --small",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON object goes, beside standard output")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script; no figure means anything")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these (default: all)")
    parser.add_argument("--part", choices=list(PARTS), help="only this one, in this process")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns 1 if a part failed."""
    arguments = _parser().parse_args(argv)
    if arguments.part:
        found: dict[str, Any] = _rounded(run_part(arguments.part, arguments.small))
        failed = False
    else:
        found, until = {}, time.monotonic() + LIMIT_S
        for name in arguments.parts:
            found[name] = _in_process(name, arguments.small, min(PARTS[name], until - time.monotonic()))
            print(f"{name}: {json.dumps(found[name])}", flush=True)
            if arguments.out:  # What is measured is kept, should a later part take the machine down.
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        failed = any("error" in part for part in found.values())
        found = {**found, "missed": demands_missed(found)}
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
