"""Runs the tests on eight CPU devices with strict dtype promotion, here and in every process that a test starts."""

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.bench import hdfs_server
from launch.bench import s3_server as s3
from launch.bench.kafka_broker import REQUIRED, Broker, missing, shared_broker

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


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets features of the lake count from their very time on, for tests that say when by the millisecond."""
    from monolith_jax.lake.tables import GROUPS

    for subject, groups in GROUPS.items():
        monkeypatch.setitem(GROUPS, subject, tuple(dataclasses.replace(group, known_ms=0) for group in groups))


@pytest.fixture(scope="session")
def kafka_jars() -> None:
    """Skips where no broker can be started; fails there where one is required."""
    if why := missing():
        assert not os.environ.get(REQUIRED), why
        pytest.skip(why)


@pytest.fixture(scope="session")
def kafka_url(kafka_jars: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Returns the address of the one broker that all processes of a test run share."""
    folder = tmp_path_factory.getbasetemp()
    with shared_broker(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) as broker:
        yield broker.url


@pytest.fixture(scope="module")
def mortal_broker(kafka_jars: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Returns a broker for tests that kill it; they leave it running."""
    one = Broker(tmp_path_factory.mktemp("broker"))
    one.start()
    yield one
    one.stop()


@pytest.fixture(scope="session")
def require_s3() -> None:
    """Skips where no S3 server can be started; fails there where one is required."""
    if why := s3.missing():
        assert not os.environ.get(s3.REQUIRED), why
        pytest.skip(why)


@pytest.fixture(scope="session")
def s3_server(require_s3: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    """Returns the one S3 server that all processes of a test run share."""
    folder = tmp_path_factory.getbasetemp()
    with s3.shared_s3_server(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) as server:
        yield server


@pytest.fixture(scope="session")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hdfs_server.HdfsServer]:
    """Returns an HDFS, or skips where none can be started or its client is not installed; fails there where one is required."""
    why = "" if importlib.util.find_spec("hdfs_native") else "no HDFS: hdfs-native is not installed (extra hdfs)"
    if why := why or hdfs_server.missing():
        assert not os.environ.get(hdfs_server.REQUIRED), why
        pytest.skip(why)
    server = hdfs_server.HdfsServer(tmp_path_factory.mktemp("hdfs"))
    server.start()
    yield server
    server.kill()
