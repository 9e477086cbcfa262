from pathlib import Path

import pytest
from rich.console import Console

from launch import recommend
from launch.run import train
from monolith_jax.experiment import load

OVERRIDES = (
    "TrainConfig.steps = 8",
    "TrainConfig.batch_size = 64",
    "TwoTowerConfig.num_negatives = 64",
    "MMoEConfig.num_experts = 2",
    "MMoEConfig.expert_hidden = (8, 8)",
    "PublisherConfig.period_s = 0.05",
)


def test_a_run_that_published_recommends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = load(["configs/for_you.gin"], OVERRIDES)
    train(experiment, tmp_path, Console(quiet=True))
    assert recommend.main([f"--workdir={tmp_path}", "--replay=2000", "--number=4"]) == 0
    printed = capsys.readouterr().out
    assert "2,000 events" in printed and "two_tower" in printed and "total" in printed
    assert sum(line.startswith("│ ") for line in printed.splitlines()) == 4
    assert recommend.main([f"--workdir={tmp_path}", "--replay=2000", "--number=2", "--user=-5"]) == 0
    assert "unknown_user: nothing is known of the user" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recommend.main([f"--workdir={tmp_path}"]) == 1
    assert "is no run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recommend.main(["--help"])
    assert recommend.EXAMPLE in capsys.readouterr().out
