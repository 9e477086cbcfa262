"""What a device can do at most, measured, and what a program needs, counted.

In: arrays, compiled programs. Out: bytes and operations a second, milliseconds, counts of XLA.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def chain_ms(run: Callable[[], Any], repeats: int, chains: int = 5) -> float:
    """Returns the milliseconds of one run: the median over chains of `repeats` runs that are waited for at their end only.

    Args:
        run: Dispatches once; returns what to wait for.
        repeats: Runs of a chain.
        chains: How many; one more goes before, uncounted.
    """
    times = []
    for _ in range(chains + 1):
        started = time.perf_counter()
        waited = None
        for _ in range(repeats):
            waited = run()
        jax.block_until_ready(waited)
        times.append((time.perf_counter() - started) * 1e3 / repeats)
    return statistics.median(times[1:])


def copy_bytes_per_s(nbytes: int, repeats: int) -> float:
    """Returns bytes read and written a second by a program that reads an array and writes another of `nbytes` each."""
    values = jax.jit(lambda: jnp.arange(nbytes // 4, dtype=jnp.uint32))()
    copy = jax.jit(lambda values: values ^ jnp.uint32(1))
    return 2 * values.nbytes / chain_ms(lambda: copy(values), repeats) * 1e3


def product_flops_per_s(size: int, dtype: str, repeats: int) -> float:
    """Returns operations a second of a product of two random square matrices at jax's default precision."""
    first, second = (jax.random.normal(jax.random.key(seed), (size, size), jnp.dtype(dtype)) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / chain_ms(lambda: product(first, second), repeats) * 1e3


def device_limits(nbytes: int, size: int, repeats: int) -> dict[str, float]:
    """Returns the measured copy bandwidth and the rates of matrix products of the default device."""
    return {
        "copy_gb_per_s": copy_bytes_per_s(nbytes, repeats) / 1e9,
        "float32_tflop_per_s": product_flops_per_s(size, "float32", repeats) / 1e12,
        "bfloat16_tflop_per_s": product_flops_per_s(size, "bfloat16", repeats) / 1e12,
    }


def xla_counts(compiled: Any) -> dict[str, float]:
    """Returns the operations and bytes that XLA counts of a compiled program; it knows nothing of indices that repeat."""
    counted = compiled.cost_analysis() or {}
    return {"xla_flops": float(counted.get("flops", 0.0)), "xla_bytes": float(counted.get("bytes accessed", 0.0))}


def over_limits(ms: float, nbytes: float, flops: float, limits: dict[str, float]) -> dict[str, float]:
    """Returns how near a time comes to the measured limits: parts of the copy bandwidth and of the float32 products' rate."""
    return {
        "over_copy": nbytes / ms / 1e6 / limits["copy_gb_per_s"],
        "over_products": flops / ms / 1e9 / limits["float32_tflop_per_s"],
    }
