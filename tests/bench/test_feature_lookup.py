import json

import pytest

from launch.bench.feature_lookup import main


def test_figures_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--videos=3000", "--rounds=1", "--changes_per_s=5000"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["lookup_few_cpu_p50_ms"] and found["applied_few_per_s"] > 0
    assert found["lookup_p99_ms"] == found["lookup_few_p99_ms"] > 0
