import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from launch import produce
from monolith_jax.stream.decoder import Decoder
from monolith_jax.stream.formats import Schemas, schemas_topic
from monolith_jax.stream.log import LogPartition, open_log

ROOT = Path(__file__).parents[2]
GIN = str(ROOT / "configs/quickstart.gin")


def count(url: str, topic: str, partitions: int) -> int:
    """Returns how many good events a topic holds."""
    log = open_log(url)
    decoder = Decoder("impression" if topic.startswith("impressions") else "action", topic, "arrow", Schemas(log, topic))
    found = 0
    assert log.num_partitions(topic) == partitions
    for number in range(partitions):
        partition = LogPartition(topic, number)
        first, end = log.bounds(partition)
        log.seek(partition, first)
        batch, rejected = decoder.decode(partition, log.read_to(partition, end))
        assert not rejected
        found += len(batch)
    log.close()
    return found


def numbers(line: str) -> list[int]:
    return [int(one.replace(",", "")) for one in re.findall(r"([\d,]+) (?:examples|impressions|actions)", line)]


def test_a_log_is_fed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "log"
    flags = ["--max_examples=5000", "--partitions=2", "--option", "fsync_s=inf", "--gin.SyntheticConfig.chunk_rows=1000"]
    assert produce.main([f"--gin_file={GIN}", f"--log=file://{folder}", *flags]) == 0
    line = capsys.readouterr().out
    assert line.startswith("the source ended: 5,000 examples, 5,000 impressions and")
    assert numbers(line)[1:] == [count(f"file://{folder}", topic, 2) for topic in ("impressions", "actions")]


def test_kafka_is_fed(kafka_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown, done = (f"{name}-{uuid.uuid4().hex}" for name in ("impressions", "actions"))
    flags = ["--max_examples=500", "--partitions=2", f"--impressions={shown}", f"--actions={done}", "--option", "linger.ms=5"]
    for times in (1, 2):  # the second finds topics and schemas
        assert produce.main([f"--gin_file={GIN}", f"--log={kafka_url}", *flags]) == 0
        found = numbers(capsys.readouterr().out)[1:]
        assert [times * one for one in found] == [count(kafka_url, topic, 2) for topic in (shown, done)]
        log = open_log(kafka_url)
        assert log.bounds(LogPartition(schemas_topic(shown), 0)) == (0, 1)
        log.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=avro"], "no format 'avro'; choose one of arrow"),
        (["--partitions=0"], "--partitions is 0; a topic has one at least"),
        (["--batch_rows=5000"], "from 1 to 4096 events"),
        (["--max_examples=0"], "expected 1 or more"),
        (["--impressions=a", "--actions=a"], "topics of different events"),
        (["--option=fast"], "expected NAME=VALUE"),
        (["--speed=1", "--rate=5"], "give one of them"),
        (["--delay_s=-1"], "--delay_s is -1"),
        (["--log=http://here"], "is no address of a log"),
        (["--option=fsync=1"], "has no option 'fsync'"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert produce.main([f"--gin_file={GIN}", f"--log=file://{tmp_path}/log", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_another_number_of_partitions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"--gin_file={GIN}", f"--log=file://{tmp_path}/log", "--max_examples=10"]
    assert produce.main([*common, "--partitions=2"]) == 0
    assert produce.main([*common, "--partitions=3"]) == 1
    assert "has 2 partitions, not 3" in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        produce.main(["--help"])
    assert produce.EXAMPLE in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_count(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    command = [sys.executable, "-m", "launch.produce", f"--gin_file={GIN}", f"--log=file://{folder}", "--rate=2000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not any(folder.glob("actions/*/*.log")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert out.startswith("stopped: ") and "were not due yet" in out
    assert numbers(out)[1:] == [count(f"file://{folder}", topic, 4) for topic in ("impressions", "actions")]
