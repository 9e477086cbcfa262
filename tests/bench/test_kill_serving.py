"""Kills of trainer and server: what counts as a difference, and a tiny run of it all."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.bench import follower, kill_serving
from launch.bench.follower import TableRows


def rows(*ids: int) -> TableRows:
    return TableRows(np.array(ids, np.int64), np.arange(2 * len(ids), dtype=np.float32).reshape(-1, 2))


def test_differences_are_told_to_the_bit() -> None:
    live = {"a": rows(1, 2, 3), "b": rows(4), "c": rows()}
    assert follower.differences(dict(live), live) == []
    missing = follower.differences({**live, "a": rows(1, 3, 5, 6)}, live)
    assert missing == ["a: 2 ids that the trainer does not have, 1 ids missing, of 3"]
    negative = live["a"].vectors.copy()
    negative[0, 0] = -0.0  # equal to 0.0, but of other bits
    assert follower.differences({**live, "a": TableRows(live["a"].ids, negative)}, live) == ["a: 1 of 3 vectors differ"]
    assert follower.differences({"a": live["a"], "b": live["b"]}, live) == ["c: only the trainer has such a table"]


@pytest.mark.slow
def test_killed_trainer_and_server_come_to_hold_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kill_serving.main(["--workdir", str(tmp_path), "--kills=2", "--steps=80", "--within_s=0.5", "--seed=2"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["equal"] == figures["rounds"] >= 1
    assert figures["kills"] == figures["trainer_kills"] + figures["server_kills"] == 2
