"""The runnable configs on the sample data, end to end but short."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from launch.run import train
from monolith_jax.evaluate.report import read
from monolith_jax.experiment import load


@pytest.mark.parametrize(
    ("config", "folder", "part", "head", "least"),
    [
        ("kuairand", "kuairand27k_slice", "test/KuaiRandConfig.part = (0.98, 1.0)", "like", 0.8),
        ("census", "census_income_kdd", "test/ColumnsConfig.part = (0.9, 1.0)", "never_married", 0.85),
    ],
)
def test_config_learns_from_real_data(
    config: str, folder: str, part: str, head: str, least: float, data_folder: Path, tmp_path: Path
) -> None:
    overrides = [f"DATA = {str(data_folder / folder)!r}", "TrainConfig.steps = 40"]
    overrides += ["Experiment.mesh = @MeshConfig()", "MeshConfig.num_devices = 1", part]
    files = [Path("configs") / f"{config}.gin"]
    totals = train(load(files, overrides), tmp_path, Console(quiet=True))
    assert totals[head]["auc"] > least
    run = read(tmp_path)
    assert {row["head"] for row in run.tests} == set(totals)
    assert (tmp_path / "config.gin").is_file()
    if config == "kuairand":
        letters = (tmp_path / "dead_letters.jsonl").read_text().splitlines()
        assert letters and all('"duplicate"' in line for line in letters)
