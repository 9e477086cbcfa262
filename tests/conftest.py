"""Runs the tests on eight CPU devices with strict dtype promotion, here and in every process that a test starts."""

import os
from pathlib import Path

import pytest

# Before anything imports jax, which reads these once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["NPROC"] = "16"  # threads of XLA's CPU client: with fewer, steps on eight devices can wait for each other forever
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Returns the folder of sample data, or skips where there is none."""
    folder = os.environ.get("MONOLITH_JAX_DATA")
    if not folder:
        pytest.skip("MONOLITH_JAX_DATA names no folder of sample data")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    """Starts jax with eight devices before a test that trains in this process could start it with fewer."""
    import jax

    assert len(jax.devices()) == 8
