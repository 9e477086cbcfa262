"""Several processes publish what their shards have, as one version; a reader holds what all of them hold."""

import os
import signal
from pathlib import Path

import pytest

from monolith_jax.sync.delta import DeltaFolder
from tests import test_flow
from tests.launch.processes import finish
from tests.launch.test_several import FOUR, launch, train_together, wait_for_step
from tests.sync.plain_reader import PlainReader
from tests.sync.test_publisher import PUBLISHES, assert_up_to_date

compile_cache = test_flow.compile_cache
from_the_root = test_flow.from_the_root


@pytest.mark.slow
def test_two_processes_publish_together_and_one_goes_on(tmp_path: Path) -> None:
    train_together(tmp_path, 2, 16, *PUBLISHES, devices=2)
    reader = PlainReader(tmp_path / "deltas")
    assert_up_to_date(reader, tmp_path)
    folder = DeltaFolder(tmp_path / "deltas")
    manifest = folder.manifest(folder.versions()[-1])
    assert len(manifest.position) == 4
    assert {name for name in manifest.files if name.startswith("rows-")} == {"rows-0-8.arrow", "rows-1-8.arrow"}
    test_flow.run(tmp_path, *FOUR, *PUBLISHES, steps=24)
    assert_up_to_date(reader, tmp_path)
    train_together(tmp_path, 2, 30, *PUBLISHES)
    assert_up_to_date(reader, tmp_path)


@pytest.mark.slow
def test_one_of_two_is_killed_and_they_go_on(tmp_path: Path) -> None:
    every = (*PUBLISHES, "SnapshotConfig.period_steps = 5", "SyntheticConfig.num_examples = 20_000")
    processes = launch(tmp_path, 2, 40, *every)
    wait_for_step(tmp_path, processes, 12)
    os.kill(processes[1].pid, signal.SIGKILL)
    finish(*processes, within_s=60)
    reader = PlainReader(tmp_path / "deltas")
    assert reader.catch_up() > 0
    train_together(tmp_path, 2, 40, *every)
    assert_up_to_date(reader, tmp_path)
