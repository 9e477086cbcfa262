"""Real processes on loopback tell one another words while they compute together."""

import json
import sys

import pytest

from launch.bench.kafka_broker import free_port
from tests.launch.processes import finish, start


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_words_arrive_while_the_devices_compute(num_processes: int) -> None:
    command, port = [sys.executable, "-W", "error", "-m", "tests.ids.exchange_run"], str(free_port())
    processes = [start([*command, str(process), str(num_processes), port]) for process in range(num_processes)]
    for process, (status, out, err) in enumerate(finish(*processes, within_s=120)):
        assert not status, err[-2000:]
        found = json.loads(out.splitlines()[-1])
        assert found == {"wrong": 0, "sums": True, "held": [[process] * 2] * 3, "devices": 2 * num_processes}
