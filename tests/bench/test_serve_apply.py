"""The benchmark of applying deltas, at sizes at which it takes seconds."""

import json

import pytest

from launch.bench import serve_apply


def test_figures_and_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--ids=500", "--deltas=3", "--rows=100", "--examples=8", "--period_ms=1", "--rounds=1", "--seconds=0.1"]
    assert serve_apply.main(small) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"apply_rows_per_s", "predict_p99_ms_idle", "predict_p99_ms_applying"} <= figures.keys()
    assert all(value > 0 for value in figures.values())


def test_more_rows_than_ids_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve_apply.main(["--ids=10", "--rows=11"])
    assert "--rows at most --ids" in capsys.readouterr().err
