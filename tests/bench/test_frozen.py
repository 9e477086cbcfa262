"""Online against frozen: what the comparison counts, and a whole run of a tiny world."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.bench import frozen

TINY = (
    *(
        "TrainConfig.batch_size=64",
        "MMoEConfig.num_experts=2",
        "MMoEConfig.expert_hidden=(16,)",
        "MMoEConfig.tower_hidden=(8,)",
    ),
    *("SyntheticConfig.live_users=20", "SyntheticConfig.live_videos=40", "HistoryConfig.max_users=500"),
    *(f"{table}/TableConfig.max_rows=500" for table in ("user", "video", "author", "sound")),
    "user_author/TableConfig.max_rows=2000",
)


def row(start: int, examples: int, auc: float | None, best: float = 0.9) -> dict[str, Any]:
    return {"period_start_ms": start, "examples": examples, "positives": 10, "auc": auc, "optimal_auc": best}


def test_gap_is_told_by_period_without_those_that_are_cut_short() -> None:
    periods = {
        "frozen": {"like": [row(0, 10, 0.6), row(1, 100, 0.6), row(2, 100, 0.5)]},
        "online": {"like": [row(0, 10, 0.9), row(1, 100, 0.625), row(2, 100, 0.75)]},
    }
    totals = {
        way: {"like": {"auc": auc, "optimal_auc": 0.9, "learned": auc}} for way, auc in (("frozen", 0.55), ("online", 0.7))
    }
    figures = frozen.figures_of(totals, periods, "like")
    assert figures["auc_online"] == {"like": 0.7} and figures["auc_frozen"] == {"like": 0.55}
    assert figures["gap_mean"] == pytest.approx(0.15)
    assert figures["gap_mean_by_period"] == pytest.approx([0.025, 0.25])
    assert figures["gap_last_period"] == pytest.approx(0.25)
    assert figures["gap_like_by_period"] == pytest.approx([0.3, 0.025, 0.25])


def test_several_worlds_give_mean_and_spread() -> None:
    found = frozen.over_worlds([{"gap": {"like": 0.1, "odd": 1.0}, "by": [0.0, 1.0]}, {"gap": {"like": 0.3}, "by": [1.0, 1.0]}])
    assert found["gap"] == {"like": 0.2} and found["by"] == [0.5, 1.0]
    assert found["sd"]["gap"]["like"] == pytest.approx(0.02**0.5, abs=1e-5)
    assert "sd" not in frozen.over_worlds([{"gap": {"like": 0.1}}])


def test_other_examples_are_refused() -> None:
    with pytest.raises(RuntimeError, match="like: the two ways differ in optimal_auc"):
        frozen._check_same({"like": [row(0, 10, 0.6)]}, {"like": [row(0, 10, 0.6, 0.8)]})


def test_tiny_world_tells_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bound = [word for one in TINY for word in ("--gin", one)]
    steps = ["--learn_steps=20", "--more_steps=20", "--period_h=0.2", "--drift_days=1"]
    assert frozen.main(["--workdir", str(tmp_path), *steps, *bound]) == 0
    said = capsys.readouterr().out
    figures = json.loads(said.splitlines()[-1])
    assert set(figures["auc_online"]) == set(figures["auc_frozen"]) == set(figures["auc_best"]) == set(figures["gap"])
    assert figures["auc_best"]["complete"] > 0.7
    # What the snapshot knows is what both start from; then only one of them learns.
    assert figures["auc_online"]["complete"] != figures["auc_frozen"]["complete"]
    assert figures["learned_online"]["complete"] > figures["learned_frozen"]["complete"]
    assert "complete, from (UTC)" in said and (tmp_path / "seed0" / "frozen.png").exists() == ("plot: " in said)
