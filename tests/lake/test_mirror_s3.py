"""Snapshots and what is published on an S3 server (SeaweedFS)."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.bench import kill
from launch.bench.hdfs_server import HdfsServer
from launch.bench.s3_server import S3Server
from monolith_jax.mirror import Mirror
from monolith_jax.sync.delta import Content, DeltaFolder, Version, next_epoch
from tests import test_flow, test_mirror
from tests.sync import test_publisher
from tests.sync.plain_reader import PlainReader, assert_holds, snapshot_of
from tests.sync.test_delta_readers import names
from tests.sync.test_delta_readers import write as publish

compile_cache = test_flow.compile_cache
from_the_root = test_flow.from_the_root
whole = test_mirror.whole
each_step = test_publisher.each_step


@pytest.fixture
def place(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns an address on the server, which is in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket}/{tmp_path.name}"


def test_a_snapshot_comes_back(place: str, tmp_path: Path) -> None:
    test_mirror.check_round_trip(tmp_path / "run", place)


@pytest.mark.slow
def test_a_snapshot_comes_back_from_hdfs(hdfs: HdfsServer, tmp_path: Path) -> None:
    for url in (hdfs.url, hdfs.web_url):
        run = tmp_path / url.partition(":")[0]
        test_mirror.check_round_trip(run, f"{url}/{run.name}")


def test_a_run_goes_on_from_the_mirror(whole: Path, place: str, tmp_path: Path) -> None:
    test_mirror.check_run_goes_on(whole, tmp_path / "run", place)


SENDS = """
import sys
from pathlib import Path
from monolith_jax import mirror
mirror.DEADLINE_S = 2.0
here = mirror.Mirror(sys.argv[1], Path(sys.argv[2]), 1)
here.send(5, print)
here.wait()
"""


@pytest.mark.parametrize("scheme", ["s3", "hdfs", "webhdfs"])
def test_a_server_that_never_answers_holds_no_process(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if scheme != "s3":
        pytest.importorskip("hdfs_native" if scheme == "hdfs" else "requests")
    (tmp_path / "run" / "snapshots" / "5").mkdir(parents=True)
    (tmp_path / "run" / "snapshots" / "5" / "a").write_text("x")
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "any")
        place = "s3://bucket/run" if scheme == "s3" else f"{scheme}://{address}/run"
        command = [sys.executable, "-c", SENDS, place, str(tmp_path / "run" / "snapshots")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=test_flow.ROOT)
    assert done.returncode == 0 and done.stdout.count(f"; NOT in {place}, ") == 1, done.stdout + done.stderr


UPLOADS = """
import sys
from pathlib import Path
from monolith_jax.mirror import Mirror
mirror = Mirror(sys.argv[1], Path(sys.argv[2]), 1)
print("begins", flush=True)
for step in range(int(sys.argv[3]), 1000):
    mirror.put(step)
"""


def test_a_process_that_is_killed_in_the_upload_leaves_whole_snapshots(place: str, tmp_path: Path) -> None:
    folder, one = tmp_path / "run" / "snapshots", tmp_path / "one"
    folder.mkdir(parents=True)
    for index in range(40):
        path = one / "d" / str(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(1 << (14 + index % 8)))
    for step in range(1, 1000):
        (folder / str(step)).symlink_to(one)
    here = Mirror(place, folder, 1)
    here.put(1)
    newest, leftovers = 1, 0
    for moment in range(20):
        command = [sys.executable, "-c", UPLOADS, place, str(folder), str(newest + 1)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=test_flow.ROOT)
        assert process.stdout and process.stdout.readline() == "begins\n"
        time.sleep(0.08 * moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        leftovers += test_mirror.steps_with_files(here) != here.steps()
        other = tmp_path / "other" / "snapshots"
        shutil.rmtree(other.parent, ignore_errors=True)
        step = Mirror(place, other, 1).fetch()
        assert step is not None and step >= newest, moment
        newest = step
        for path in one.rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (other / str(step) / path.relative_to(one)).read_bytes(), moment
    assert leftovers and newest > 1
    here.put(newest + 1)
    assert test_mirror.steps_with_files(here) == here.steps() == [newest + 1]


def test_a_killed_run_whose_folder_is_lost_equals_one_that_was_not(place: str, tmp_path: Path) -> None:
    every = (f"SnapshotConfig.mirror = {place!r}", "SnapshotConfig.period_steps = 5")
    test_flow.run(tmp_path / "whole", every[1])
    mirror = Mirror(place, tmp_path / "nowhere" / "snapshots", 2)
    process = test_flow.start(tmp_path / "run", *every)
    until = time.monotonic() + 120
    while process.poll() is None and not mirror.steps():
        assert time.monotonic() < until
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "run")
    assert mirror.steps()
    _, text = test_flow.run(tmp_path / "run", *every)
    assert "going on from the snapshot of step " in text and f" MB from {place} in " in text
    assert kill.compare(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.usefixtures("each_step")
def test_a_run_publishes_to_s3(place: str, tmp_path: Path) -> None:
    test_publisher.run(tmp_path, *test_publisher.EVERY_STEP, f"PublisherConfig.folder = '{place}/deltas'", steps=5)
    assert not (tmp_path / "deltas").exists()
    reader: Any = PlainReader(f"{place}/deltas")  # pyright: ignore[reportArgumentType]
    reader.catch_up()
    restored = snapshot_of(tmp_path)
    assert reader.step == restored.step == 5
    assert_holds(reader, restored, test_publisher.TABLES, 8)


def test_what_is_published_is_read_from_s3(place: str) -> None:
    root = f"{place}/deltas"
    writer, reader = DeltaFolder(root), DeltaFolder(root)
    assert reader.versions() == [] and next_epoch(root) == 1
    publish(writer, "B1.1")
    assert names(reader.chain()) == "1.1"
    writer.write_part(Version(1, 2), 0, Content(dense={}), "int8")
    assert names(reader.versions()) == "1.1"
    publish(writer, "D1.3<1.1/1.1 B1.4<1.3 D1.5<1.3/1.4")
    assert names(reader.chain(Version(1, 1))) == "1.3 1.5"
    assert reader.read(Version(1, 5)).rows["user"].vectors.tolist() == [[5.0] * 4]
    reader.register("one", Version(1, 3))
    assert writer.readers()["one"][0] == Version(1, 3)
    assert names(writer.prune(keep_bases=1)) == "1.1"
    writer.unregister("one")
    assert names(writer.prune(keep_bases=1)) == "1.3"
    writer.write_part(Version(1, 6), 0, Content(dense={}), "int8")
    assert next_epoch(root) == 2
    publish(DeltaFolder(root), "D2.1<1.5/1.4")
    assert names(reader.chain(Version(1, 3))) == "1.5 2.1"
