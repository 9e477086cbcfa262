"""The freshness benchmark runs its three processes and gives the names that are asked of it."""

import json
from pathlib import Path

import pytest

from launch.bench import freshness


@pytest.mark.slow
def test_freshness_gives_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert freshness.main(["--workdir", str(tmp_path), "--seconds", "10", "--rounds", "0", "--rate", "400"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["freshness_p50_s"] <= found["freshness_p99_s"] < 10
    assert found["events"] > 50, "most of the hundred videos that were shown are known"
    assert found["mb_per_min_fp16"] <= 206 and found["mb_per_min_int8"] <= 105 and found["apply_rows_per_s"] > 0
