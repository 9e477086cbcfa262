"""Holds the server of the tests: it goes on after a kill with what it had, and ends with the tests."""

import os
import subprocess
import sys
import time
from pathlib import Path

from launch.bench.kafka_broker import is_running
from tests.lake.profile_database import administrate, running_server

CODE = """
import os, sys
from pathlib import Path
from launch.bench.postgres_server import PostgresServer
server = PostgresServer(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_it_goes_on_after_a_kill(tmp_path: Path) -> None:
    with running_server(tmp_path / "server") as server:
        administrate(server, "CREATE TABLE a AS SELECT 1")
        server.kill()
        server.start()
        assert administrate(server, "SELECT * FROM a") == [(1,)] and administrate(server, "SHOW wal_level") == [("logical",)]
        pid = server.pid
    assert not is_running(pid)


def test_it_ends_with_the_tests_also_when_they_are_killed(tmp_path: Path) -> None:
    with running_server(tmp_path / "first"):
        pass
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    command = [sys.executable, "-c", CODE, str(tmp_path / "second")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    pid, until = int(done.stdout), time.monotonic() + 20
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_running(pid)
