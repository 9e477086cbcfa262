"""From the loop to the folder: a reader holds exactly what the trainer holds, whatever happens to either."""

import errno
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.bench import kill
from monolith_jax.experiment import load
from monolith_jax.sync import publisher
from monolith_jax.sync.delta import DeltaFolder
from monolith_jax.sync.epochs import open_epoch
from monolith_jax.sync.schedule import Schedule
from monolith_jax.sync.writer import Job, Writer
from tests import test_flow
from tests.sync.plain_reader import PlainReader, assert_holds, dense_weights, snapshot_of

PUBLISHES = (
    "Experiment.publisher = @PublisherConfig()",
    "PublisherConfig.period_s = 0.0",
    "PublisherConfig.dense_period_s = 0.0",
    "PublisherConfig.format = 'float32'",
    "PublisherConfig.keep_bases = 100",
)
EVERY_STEP = ("SnapshotConfig.period_steps = 1", "SnapshotConfig.keep = 100")
TABLES = load(["configs/quickstart.gin"], test_flow.SMALL).tables
compile_cache = test_flow.compile_cache
from_the_root = test_flow.from_the_root


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishes after every step: the planner waits for the publication before, unless that has failed."""
    wanted, write, failed = Schedule.wanted, Writer._write, threading.Event()

    def waits(self: Schedule, now_ms: int) -> int:
        until = time.monotonic() + 30
        while not (kind := wanted(self, now_ms)) and time.monotonic() < until and not failed.is_set():
            time.sleep(0.001)
        return kind

    def writes(self: Writer, job: Job) -> None:
        try:
            write(self, job)
        except BaseException:
            failed.set()
            raise

    def opens(*arguments: Any) -> Any:
        failed.clear()
        return open_epoch(*arguments)

    monkeypatch.setattr(publisher, "open_epoch", opens)
    monkeypatch.setattr(Writer, "_write", writes)
    monkeypatch.setattr(Schedule, "wanted", waits)


def run(workdir: Path, *overrides: str, steps: int = test_flow.STEPS) -> tuple[Any, str]:
    return test_flow.run(workdir, *PUBLISHES, *overrides, steps=steps)


def assert_up_to_date(reader: PlainReader, workdir: Path) -> None:
    """Checks that a reader, once it has caught up, holds what the newest snapshot holds, and so does a new one."""
    restored = snapshot_of(workdir)
    new = PlainReader(workdir / "deltas")
    for one in (reader, new):
        one.catch_up()
        assert one.step == restored.step
        assert_holds(one, restored, TABLES, 8)
        assert one.dense == dense_weights(restored)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that published nothing."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(test_flow.ROOT)
        test_flow.run(folder)
    return folder


def check_every_publication(workdir: Path, devices: int, steps: int) -> int:
    """Runs with a snapshot of every step; compares each version with it; returns how many there are."""
    run(workdir, *EVERY_STEP, f"MeshConfig.num_devices = {devices}", steps=steps)
    reader = PlainReader(workdir / "deltas")
    versions = reader.folder.versions()
    number = sum(reader.folder.manifest(version).kind == "delta" for version in versions) + 1
    reader.begin(versions[0])
    while True:
        restored = snapshot_of(workdir, reader.step)
        assert_holds(reader, restored, TABLES, 8)
        assert reader.dense == dense_weights(restored)
        if not reader.next():
            break
    assert reader.step == steps
    if steps == test_flow.STEPS:
        assert reader.deletions > 10
    return number


@pytest.mark.usefixtures("each_step")
def test_after_every_step_a_reader_holds_the_trainers_rows(tmp_path: Path) -> None:
    assert check_every_publication(tmp_path, 1, 12) == 12


@pytest.mark.slow
@pytest.mark.usefixtures("each_step")
@pytest.mark.parametrize("devices", [1, 8])
def test_after_every_step_of_a_longer_run(tmp_path: Path, devices: int) -> None:
    assert check_every_publication(tmp_path, devices, test_flow.STEPS) == test_flow.STEPS


@pytest.mark.slow
def test_after_every_publication_with_plans_ahead(tmp_path: Path) -> None:
    assert check_every_publication(tmp_path, 8, test_flow.STEPS) > 3


@pytest.mark.usefixtures("each_step")
def test_every_base_and_what_follows_it_leads_to_the_same(tmp_path: Path) -> None:
    run(tmp_path, "PublisherConfig.base_every = 3")
    folder = DeltaFolder(tmp_path / "deltas")
    bases = [version for version in folder.versions() if folder.manifest(version).kind == "base"]
    assert len(bases) > 2
    restored = snapshot_of(tmp_path)
    for base in bases:
        reader = PlainReader(tmp_path / "deltas")
        reader.begin(base)
        reader.catch_up()
        assert_holds(reader, restored, TABLES, 8)
    manifest = folder.manifest(bases[-1])
    assert manifest.config == (tmp_path / "config.gin").read_text() and manifest.event_time_ms > 0 and manifest.position


def test_what_is_learned_does_not_depend_on_it(whole: Path, tmp_path: Path) -> None:
    run(tmp_path)
    assert kill.compare(whole, tmp_path) == []
    told = (tmp_path / "metrics.jsonl").read_text()
    assert '"published_version": "00000001-' in told and '"publish_lag_s"' in told


@pytest.mark.usefixtures("each_step")
@pytest.mark.parametrize(
    ("at", "moment"),
    [
        (0, "write_part"),
        (1, "committed"),
        (5, "commit"),
        *(
            pytest.param(at, moment, marks=pytest.mark.slow)
            for at in (0, 1, 2, 5, 9, 12, 20)
            for moment in ("write_part", "commit", "committed")
        ),
    ],
)
def test_a_run_that_dies_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, moment: str) -> None:
    reader, calls = PlainReader(tmp_path / "deltas"), 0
    name = "commit" if moment == "committed" else moment
    works = getattr(DeltaFolder, name)

    def dies(self: DeltaFolder, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls <= at:
            return works(self, *arguments)
        if calls == at + 1 and moment == "committed":
            works(self, *arguments)
        raise RuntimeError("it dies here")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="it dies here"):
        patch.setattr(DeltaFolder, name, dies)
        run(tmp_path)
    reader.catch_up()
    run(tmp_path)
    assert_up_to_date(reader, tmp_path)
    last = reader.version
    assert last is not None and last.epoch == (1 if (at, moment) == (0, "write_part") else 2)


@pytest.mark.usefixtures("each_step")
def test_it_goes_on_from_a_snapshot_that_readers_are_ahead_of(tmp_path: Path) -> None:
    run(tmp_path, "SnapshotConfig.period_steps = 7", "SnapshotConfig.keep = 10", steps=20)
    reader = PlainReader(tmp_path / "deltas")
    reader.catch_up()
    assert reader.step == 20
    for step in (20, 14):  # as if they had never been saved
        shutil.rmtree(tmp_path / "snapshots" / str(step))
    _, text = run(tmp_path, "SnapshotConfig.keep = 10", steps=9)
    assert "going on from the snapshot of step 7" in text
    folder = DeltaFolder(tmp_path / "deltas")
    kinds = [folder.manifest(version).kind for version in folder.versions() if version.epoch == 2]
    assert kinds[0] == "delta"
    assert_up_to_date(reader, tmp_path)


@pytest.mark.usefixtures("each_step")
def test_a_full_disk_delays_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"write_part": 0, "commit": 0}

    def sometimes(name: str) -> Any:
        works, calls = getattr(DeltaFolder, name), 0

        def fails(self: DeltaFolder, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 3:
                failures[name] += 1
                raise OSError(errno.ENOSPC, "No space left on device")
            return works(self, *arguments)

        return fails

    for name in failures:
        monkeypatch.setattr(DeltaFolder, name, sometimes(name))
    run(tmp_path)
    assert min(failures.values()) > 3
    assert_up_to_date(PlainReader(tmp_path / "deltas"), tmp_path)


@pytest.mark.usefixtures("each_step")
def test_a_disk_that_stays_full_ends_the_run_and_the_next_one_makes_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, calls, works = PlainReader(tmp_path / "deltas"), 0, DeltaFolder.write_part

    def fails(self: DeltaFolder, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return works(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr(DeltaFolder, "write_part", fails)
        run(tmp_path, "PublisherConfig.retry_s = 0.2")
    assert "PublisherConfig.retry_s" in caught.value.__notes__[0]
    reader.catch_up()
    run(tmp_path)
    assert_up_to_date(reader, tmp_path)


def test_turned_on_in_the_middle_and_with_other_devices(tmp_path: Path) -> None:
    test_flow.run(tmp_path, steps=8)
    run(tmp_path, "MeshConfig.num_devices = 8", steps=16)
    reader = PlainReader(tmp_path / "deltas")
    assert_up_to_date(reader, tmp_path)
    test_flow.run(tmp_path, steps=22)
    # Nobody knows what changed meanwhile.
    run(tmp_path)
    assert_up_to_date(reader, tmp_path)


@pytest.mark.usefixtures("each_step")
def test_what_is_no_number_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        run(tmp_path, "rows/OptimizerConfig.learning_rate = 1e37", "rows/OptimizerConfig.name = 'sgd'", steps=20)
    reader = PlainReader(tmp_path / "deltas")
    reader.catch_up()
    values = b"".join(value for held in reader.rows.values() for value in held.values())
    assert values and np.isfinite(np.frombuffer(values, np.float32)).all()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("PublisherConfig.format = 'float8'", "float8"),
        ("PublisherConfig.period_s = -1.0", "PublisherConfig.period_s must be 0 or above"),
        ("PublisherConfig.keep_bases = 0", "PublisherConfig.keep_bases must be at least 1"),
        ("PublisherConfig.time = 'sun'", "time"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run(tmp_path, override)


def test_rows_in_two_tiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in two tiers: set TableConfig\.memory of them to 'device'"):
        run(tmp_path, "video/TableConfig.memory = 'tiered'", "video/TableConfig.device_rows = 900")
