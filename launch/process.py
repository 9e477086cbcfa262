"""What has to be set in a process before it computes: devices, the compile cache, memory.

In: the mesh's config. Out: nothing; call it before the first use of jax's devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from pathlib import Path

import jax

from monolith_jax.mesh import MeshConfig, split_cpu

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare(mesh: MeshConfig) -> None:
    """Splits the CPU into virtual devices, turns the compile cache on and keeps freed memory."""
    split_cpu(mesh)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(tempfile.gettempdir()) / f"monolith_jax_xla_{os.getuid()}")
    jax.config.update("jax_compilation_cache_dir", cache)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Keeps the buffers of a step for the next one.

    XLA's CPU backend takes and frees tens of megabytes each step. glibc gives them back to the kernel, and the page faults of
    taking them again cost a tenth of the step. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
