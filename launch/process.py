"""What has to be set in a process before it computes: devices, the compile cache.

In: the mesh's config. Out: nothing; call it before the first use of jax's devices.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import jax

from monolith_jax.mesh import MeshConfig, split_cpu


def prepare(mesh: MeshConfig) -> None:
    """Splits the CPU into virtual devices and turns the compile cache on."""
    split_cpu(mesh)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(tempfile.gettempdir()) / f"monolith_jax_xla_{os.getuid()}")
    jax.config.update("jax_compilation_cache_dir", cache)
