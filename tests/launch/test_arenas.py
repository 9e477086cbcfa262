"""How a process takes memory: few arenas, however many threads."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, sys, threading
from launch.process import prepare
from monolith_jax.mesh import MeshConfig

prepare(MeshConfig())
libc, ready = ctypes.CDLL(None), threading.Barrier(41)
libc.fopen.restype, libc.malloc.restype = ctypes.c_void_p, ctypes.c_void_p

def allocate():
    libc.malloc(10_000)
    ready.wait()

for _ in range(40):
    threading.Thread(target=allocate).start()
ready.wait()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
assert libc.malloc_info(0, file) == 0
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_many_threads_share_few_arenas(tmp_path: Path) -> None:
    def arenas(**variables: str) -> int:
        told = tmp_path / "arenas.xml"
        env = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | variables
        subprocess.run([sys.executable, "-c", PROGRAM, str(told)], env=env, check=True)
        return len(re.findall("<heap nr=", told.read_text()))

    assert arenas() <= min(max(os.cpu_count() or 1, 2), 8)
    assert arenas(MALLOC_ARENA_MAX="11") == 11  # The user's word counts.
