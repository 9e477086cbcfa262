"""A trainer that is killed with SIGKILL while it publishes, and goes on: readers old and new come to hold its rows."""

import random
import time
from pathlib import Path

import pytest

from tests import test_flow
from tests.sync.plain_reader import PlainReader
from tests.sync.test_publisher import PUBLISHES, assert_up_to_date

compile_cache = test_flow.compile_cache
from_the_root = test_flow.from_the_root


@pytest.mark.slow
def test_killed_at_random_moments_and_continued(tmp_path: Path) -> None:
    rng, reader = random.Random(0), PlainReader(tmp_path / "deltas")
    steps, kills = 150, 0
    every = (*PUBLISHES, "SyntheticConfig.num_examples = 20_000", "SnapshotConfig.period_steps = 10")
    for _ in range(4):
        process = test_flow.start(tmp_path, *every, steps=steps)
        versions, until = len(reader.folder.versions()), time.monotonic() + 120
        wanted = versions + rng.randrange(1, 6)
        while process.poll() is None and len(reader.folder.versions()) < wanted and time.monotonic() < until:
            reader.catch_up()
        time.sleep(rng.random() * 0.1)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        reader.catch_up()
    process = test_flow.start(tmp_path, *every, steps=steps)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert kills >= 2
    assert_up_to_date(reader, tmp_path)
