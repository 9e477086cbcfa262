"""The training command with tables in two tiers: the same numbers and snapshots, told and changed as a user would."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from launch.bench import kill
from launch.identity import identity
from launch.run import train
from monolith_jax.experiment import load
from tests.launch.test_several import FOUR, train_together
from tests.test_flow import SMALL, start, wait_for_snapshot

ROOT = Path(__file__).parent.parent
CONFIG = ["configs/quickstart.gin"]
TIERED = (
    "TableConfig.memory = 'tiered'",
    "TableConfig.device_rows = 40",
    "weekday/TableConfig.memory = 'device'",
    "weekday/TableConfig.device_rows = 0",
)
"""Ten tables of one group; one stays on the device."""
STEPS = 24


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Compiles each program of this module once; returns the folder."""
    folder = str(tmp_path_factory.mktemp("xla"))
    settings = {
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(workdir: Path, *overrides: str, steps: int = STEPS) -> str:
    """Trains; returns what was printed."""
    text = io.StringIO()
    train(load(CONFIG, [*SMALL, f"TrainConfig.steps = {steps}", *overrides]), workdir, Console(file=text, width=200))
    return text.getvalue()


def steps_of(workdir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run with all rows on the device."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run(folder)
    return folder


def test_it_is_the_same_run_and_tells_its_hit_rate(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, *TIERED)
    assert kill.compare(whole, tmp_path) == []
    steps = steps_of(tmp_path)
    assert len(steps) == STEPS
    assert all(0 <= row["hit_rate"] <= 1 for row in steps)
    assert sum(row["loaded"] for row in steps) > 0 < sum(row["evicted"] for row in steps)
    assert "hit_rate" not in steps_of(whole)[0]


@pytest.mark.parametrize(("first", "then"), [(TIERED, TIERED), (TIERED, ()), ((), TIERED)], ids=["tiers", "out", "in"])
def test_a_run_goes_on_wherever_its_rows_are(
    whole: Path, tmp_path: Path, first: tuple[str, ...], then: tuple[str, ...]
) -> None:
    run(tmp_path, *first, steps=11)
    assert "going on from the snapshot of step 11" in run(tmp_path, *then)
    assert kill.compare(whole, tmp_path) == []


def test_killed_and_continued_equals_uninterrupted(
    whole: Path, tmp_path: Path, compile_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compile_cache)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    process = start(tmp_path, *TIERED, steps=STEPS)
    wait_for_snapshot(process, tmp_path)
    process.kill()
    process.communicate()
    process = start(tmp_path, *TIERED, steps=STEPS)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert kill.compare(whole, tmp_path) == []


def test_where_rows_are_is_no_part_of_a_runs_identity() -> None:
    assert identity(load(CONFIG, SMALL)) == identity(load(CONFIG, [*SMALL, *TIERED]))
    assert identity(load(CONFIG, SMALL)) != identity(load(CONFIG, [*SMALL, "video/TableConfig.dim = 4"]))


def test_larger_tables_at_a_restart(tmp_path: Path) -> None:
    for name, tiers in (("one", TIERED), ("other", ())):
        run(tmp_path / name, *tiers, steps=10)
        text = run(tmp_path / name, *tiers, "user/TableConfig.max_rows = 400", "video/TableConfig.ttl_s = 0")
        assert "every id keeps its row" in text
    assert kill.compare(tmp_path / "one", tmp_path / "other") == []


def test_warm_start(whole: Path, tmp_path: Path) -> None:
    changed = (f"TrainConfig.warm_start = '{whole}'", "user/TableConfig.max_rows = 3000")
    for name, tiers in (("one", TIERED), ("other", ())):
        assert "rows taken over" in run(tmp_path / name, *changed, *tiers, steps=6)
    assert kill.compare(tmp_path / "one", tmp_path / "other") == []


def test_held_out_examples(whole: Path, tmp_path: Path) -> None:
    test = (
        "Experiment.test_source = @test/SyntheticConfig()",
        "test/SyntheticConfig.num_examples = 500",
        "test/SyntheticConfig.seed = 1",
    )
    for name, tiers in (("one", TIERED), ("other", ())):
        run(tmp_path / name, *test, *tiers)
    assert any(row["kind"] == "test" for row in kill.rows_of(tmp_path / "one"))
    assert kill.compare(tmp_path / "one", tmp_path / "other") == []


def test_a_batch_that_does_not_fit_names_what_to_change(tmp_path: Path) -> None:
    few = ("TableConfig.memory = 'tiered'", "TableConfig.device_rows = 8")
    with pytest.raises(ValueError, match=r"does not fit on the device: it needs .*Raise TableConfig.device_rows of") as caught:
        run(tmp_path, *few)
    assert "user" in str(caught.value) and "TrainConfig.batch_size" in str(caught.value)
    assert not any(child.name.isdigit() for child in (tmp_path / "snapshots").glob("*"))


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(tmp_path: Path) -> None:
    for name, some in (("one", TIERED), ("other", ())):
        train_together(tmp_path / name, 2, 12, *some, devices=2)
    assert sum(row["loaded"] for row in steps_of(tmp_path / "one")) > 0
    assert kill.compare(tmp_path / "one", tmp_path / "other") == []
    # A snapshot is of any number of processes: two go on with rows where they were not, then one.
    for name, some in (("one", ()), ("other", TIERED)):
        train_together(tmp_path / name, 2, 14, *some, devices=2)
    assert kill.compare(tmp_path / "one", tmp_path / "other") == []
    for name, some in (("one", TIERED), ("other", ())):
        run(tmp_path / name, *FOUR, *some, steps=16)
    assert kill.compare(tmp_path / "one", tmp_path / "other") == []
