"""What has to be set in a process before it computes: devices, the compile cache, the other processes of the run.

In: the mesh's config, and the flags of several processes. Out: nothing. Both come before the first use of jax's devices, and
joining comes first: several processes need a device more each.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from launch.cli import ProcessFlags
from launch.members import Members, find_members
from launch.roll_call import call_roll
from monolith_jax.mesh import MeshConfig, split_cpu

USER_ERRORS = (ValueError, FileNotFoundError, FloatingPointError, ImportError)
"""What a user can cause and put right: told in one line, without a traceback."""
_VERDICT_S = 2.0
_MOST_ARENAS = 8
_M_ARENA_MAX = -8
"""Number of that option in glibc's malloc.h."""
_OF_XLA = r"[A-Z_]+: "
"""How XLA's errors begin, which come as ValueError too."""


def prepare(mesh: MeshConfig) -> None:
    """Splits the CPU into virtual devices, turns the compile cache on, and keeps freed memory together."""
    split_cpu(mesh)
    _limit_arenas()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(tempfile.gettempdir()) / f"monolith_jax_xla_{os.getuid()}")
    jax.config.update("jax_compilation_cache_dir", cache)


def _limit_arenas() -> None:
    """Makes threads share the allocator's arenas: one a core, unless `MALLOC_ARENA_MAX` says otherwise.

    Each arena keeps what was freed in it, up to 64 MB and more, and glibc makes eight a core. The threads of XLA and of the
    snapshots' writer come to use all of them, and a run grows for hours (`launch.bench.day`).
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    with contextlib.suppress(AttributeError, OSError):  # Only glibc has it.
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, min(max(os.cpu_count() or 1, 2), _MOST_ARENAS))


@contextmanager
def join(flags: ProcessFlags) -> Iterator[None]:
    """Makes this process one of several for as long as the block runs; does nothing for a process on its own.

    Who they are comes from flags or the cluster's variables (`launch.members`). All of them are waited for, then jax is told.
    In the block, a process that is lost or fails ends all others with status 1 and a line that names it. At the end of
    the block each waits for all others to be there.

    Raises:
        ValueError: Flags or variables are wrong; a process stayed away; the coordinator's port is taken or out of reach.
    """
    members = find_members(flags, os.environ)
    if members is None:
        yield
        return
    if flags.join_timeout_s < 1:
        raise ValueError(f"--join_timeout_s is {flags.join_timeout_s}; expected seconds, at least 1")
    watch = call_roll(members, flags.join_timeout_s)
    watch.start()
    try:
        _tell_jax(members, flags.join_timeout_s)
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError) or re.match(_OF_XLA, str(error)):
            # A collective that broke since another process died: the watch is about to say so, and ends this one.
            time.sleep(_VERDICT_S)
        line = f"{type(error).__name__}: {error}"
        os.write(2, f"{line}\n".encode() if isinstance(error, USER_ERRORS) else traceback.format_exc().encode())
        watch.fail(line)
    watch.close()


def _tell_jax(members: Members, timeout_s: int) -> None:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and "cpu" not in platforms.split(","):
        # Ids travel between hosts on CPU devices.
        jax.config.update("jax_platforms", f"{platforms},cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM for itself until the run asks for it, and a process told to end in between would not.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        members.coordinator,
        members.num_processes,
        members.process_id,
        local_device_ids=members.local_device,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout_s,
    )
