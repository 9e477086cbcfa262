"""A day replayed: slopes, hours, and a whole run of a short and quiet day."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from launch.bench import day
from launch.bench.day import Hour, Look


def step(hour: float, examples: int, rows: int, rate: float = 100.0) -> dict[str, Any]:
    counts = {"rows": rows, "fresh": 3, "expired": 1, "open_impressions": 7, "examples_per_s": rate}
    return {"event_time_ms": day.START_MS + int(hour * day.HOUR_MS), "examples": examples, **counts}


def test_slope_and_its_error() -> None:
    assert day.slope_of([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 0))
    # Residuals -1/3, 2/3, -1/3: a variance of 2/3 with one degree of freedom, over a spread of 2.
    assert day.slope_of([0, 1, 2], [0, 1, 0]) == pytest.approx((0, math.sqrt(1 / 3)))
    assert all(map(math.isnan, day.slope_of([0, 1], [0, 1])))


def test_hours_hold_what_came_in_them() -> None:
    looks = [Look(day.START_MS + 10, 100.0), Look(day.START_MS + 20, 300.0), Look(day.START_MS + 30, 110.0)]
    hours = day.hours_of([step(0.2, 50, 9), step(0.9, 100, 12), step(1.5, 250, 11)], looks)
    assert hours[0] == Hour(100, 1.0, 12, 6, 2, 7, 110.0)
    assert (hours[1].examples, hours[1].rows) == (150, 11) and math.isnan(hours[1].mb)


def test_memory_is_judged_after_the_warm_up() -> None:
    hours = {number: Hour(1, 1.0, number, 2, 1, 0, mb) for number, mb in enumerate((10.0, 500.0, 50.0, math.nan, 52.0, 53.0))}
    figures = day.figures_of(hours, 2)
    assert (figures["rss_start_mb"], figures["rss_end_mb"], figures["rows_max"], figures["ids_seen"]) == (50.0, 53.0, 5, 12)
    assert figures["slope_mb_per_hour"] == pytest.approx(1.0)


def test_lost_examples_are_told() -> None:
    stream = {"dropped_impressions": 3, "skipped_messages": 0}
    lost = day._check_whole({"examples": 90, "stream": stream, "rejected": {"null": 7}}, 100)
    assert lost == ["100 impressions became 90 examples", "3 dropped impressions", "7 set aside: null"]
    assert day._check_whole({"examples": 100, "stream": {}, "rejected": {}}, 100) == []


def test_memory_of_a_process_is_read() -> None:
    assert 10 < day.anonymous_mb(os.getpid()) < 1e6
    assert day.anonymous_mb(2**22 + 1) == 0.0


def test_short_day_tells_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("TrainConfig.batch_size=64", "SnapshotConfig.period_steps=50", "MMoEConfig.expert_hidden=(16,)")
    bound = [word for one in small for word in ("--gin", one)]
    assert day.main(["--workdir", str(tmp_path), "--hours=5", "--rate=0.4", "--warm_h=1", "--ttl_s=600", *bound]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["examples"] == 7200 and figures["whole"] and 3 < figures["hours"] < 6
    # Rows are those given out less those that expired; no table's size had a hand in it.
    assert figures["rows_end"] == figures["ids_seen"] - figures["expired"] <= figures["rows_max"] < figures["ids_seen"]
    assert figures["freed_at_cap"] == figures["refused"] == 0


@pytest.mark.slow
def test_short_day_is_served_as_it_was_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bound = ("--gin", "TrainConfig.batch_size=64", "--gin", "MMoEConfig.expert_hidden=(16,)", "--serve")
    assert day.main(["--workdir", str(tmp_path), "--hours=5", "--rate=0.4", "--warm_h=1", "--ttl_s=600", *bound]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["served_equal"] is True and figures["faults"] == 0
    assert figures["served_rows"] == figures["rows_end"] and figures["deletions"] > 0
