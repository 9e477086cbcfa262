"""The sweeps that compare models: each arm loads, sees the same features, and has as many parameters as the others."""

import functools
from pathlib import Path

import pytest

from launch.points.measured import Base
from launch.points.towers import TowersPoint, dense_parameters, runs_of
from launch.sweeps.config import AxisConfig, Sweep
from monolith_jax.experiment import Experiment, load_as
from monolith_jax.models.fm import FMConfig, LinearConfig
from tests.test_flow import ROOT

SWEEPS = ("towers_kuairand", "towers_census")
NO_TOWERS = ("LR", "FM")
"""Models without layers, whose parameters are in the tables."""


@functools.cache
def arms(name: str) -> dict[str, dict[str, Experiment]]:
    """Returns the experiments of each arm of a sweep, by its label and the names of its runs."""
    file = ROOT / "configs" / "sweeps" / f"{name}.gin"
    sweep = load_as(Sweep, (Sweep, AxisConfig, TowersPoint), [file])
    (axis,) = sweep.axes
    assert axis.bind == ("TowersPoint.separately",)
    found = {}
    for label, of_arm, (separately,) in zip(axis.labels, axis.gin_files, axis.values, strict=True):
        files = tuple(str(ROOT / one) for one in (*sweep.gin_files, of_arm))
        found[label] = runs_of(TowersPoint(separately), Base(files, (), 0).load())
    return found


@pytest.mark.parametrize("name", SWEEPS)
def test_dense_parameters_are_within_five_percent(name: str) -> None:
    numbers = {label: sum(map(dense_parameters, runs.values())) for label, runs in arms(name).items()}
    assert list(numbers) == ["LR", "FM", "DeepFM", "DCN-v2", "shared bottom", "MMoE", "single task"]
    with_towers = [number for label, number in numbers.items() if label not in NO_TOWERS]
    assert max(with_towers) <= 1.05 * min(with_towers), numbers


@pytest.mark.parametrize("name", SWEEPS)
def test_arms_differ_in_the_model_alone(name: str) -> None:
    found = arms(name)
    mmoe = found["MMoE"]["together"]
    assert list(found["single task"]) == [f"alone_{head.label}" for head in mmoe.heads]
    for label, runs in found.items():
        for run in runs.values():
            assert (run.source, run.test_source, run.history, run.counters, run.features, run.train, run.dense_optimizer) == (
                *(mmoe.source, mmoe.test_source, mmoe.history, mmoe.counters, mmoe.features, mmoe.train, mmoe.dense_optimizer),
            )
            heads = len(run.heads)
            match run.model:
                case LinearConfig():
                    assert {table.dim for table in run.tables} == {heads}
                case FMConfig():
                    # As many factors as in DeepFM, which has one first-order weight.
                    assert {table.dim for table in run.tables} == {heads + mmoe.tables[0].dim - 1}
                case _:
                    assert run.tables == mmoe.tables, label


@pytest.mark.parametrize("name", SWEEPS)
def test_the_file_of_each_arm_is_used(name: str) -> None:
    folder = ROOT / "configs" / "sweeps" / "towers"
    data = name.removeprefix("towers_")
    text = (folder.parent / f"{name}.gin").read_text(encoding="utf-8")
    unused = [path.name for path in Path(folder).glob(f"{data}*.gin") if f"configs/sweeps/towers/{path.name}" not in text]
    assert not unused
