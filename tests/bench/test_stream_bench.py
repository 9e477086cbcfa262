"""The stream benchmark runs, small, and gives the names that are asked of it."""

import json
from pathlib import Path

import pytest

from launch.bench import kill_stream, stream


def test_stream_bench_gives_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rounds", "1", "--events", "20000", "--open", "20000", "--memory_mb", "1"]
    assert stream.main(["--workdir", str(tmp_path), "--parts", "joiner,spilled,file", *flags]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert len(table) == 3 and found["joiner_events_per_s"] > 0 and found["file_events_per_s"] > 0
    assert found["spilled_mb"] <= 1.0 and found["spilled_spilled_mb"] > 0 and found["spilled_open"] >= 19_000


@pytest.mark.slow
def test_live_part_of_the_stream_bench(tmp_path: Path, kafka_jars: None, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rounds", "1", "--events", "20000", "--rate", "3000", "--seconds", "15"]
    assert stream.main(["--workdir", str(tmp_path), "--parts", "kafka,live", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["kafka_events_per_s"] > 0 and 0 < found["event_to_gradient_p99_s"] < 5


@pytest.mark.slow
def test_killed_streams_equal_their_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kill_stream.main(["--workdir", str(tmp_path), "--events", "40000", "--kills", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["kills"], found["runs"]) == (2, found["equal"])


def test_parts_and_flags_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stream.main(["--workdir", str(tmp_path), "--parts", "joiner,fish"])
    assert "--parts has fish; there are joiner, spilled, file, kafka, live" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        kill_stream.main(["--workdir", str(tmp_path), "--broker_kills", "1"])
    assert "--broker_kills needs --log kafka" in capsys.readouterr().err
