"""The benchmark of saving, at a tiny size, and its arithmetic."""

import json

import pytest

from launch.bench import saves
from launch.bench.saves import FROZEN_AHEAD, Clock

NAMES = {
    "throughput_lost", "longest_stall_s", "longest_quiet_s", "save_s", "save_call_s", "extra_memory_gb", "memory_gb", "step_ms",
    "bytes_on_disk", "tables_gb",
}  # fmt: skip


def test_all_figures_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--table_gb=0.002", "--batch_size=64", "--devices=2", "--turn_s=0.2", "--rounds=2"]
    assert saves.main(sizes) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == NAMES
    assert 0.002 <= figures["tables_gb"] < 0.01 and figures["bytes_on_disk"] > 1e6
    assert figures["save_s"] > figures["save_call_s"] > 0 and figures["memory_gb"] > 0.1


def test_a_turn_with_a_save_is_held_against_the_one_before() -> None:
    turn, ends, now = 10, [0.0], 0.0
    for number in range(2, 51):  # 0.1 s a step; the one after a save 0.5 s, one in a turn without a save 0.2 s.
        now += {21: 0.5, 41: 0.7, 33: 0.2}.get(number, 0.1)
        ends.append(now)
    clock = Clock(ends, {20: (1.9, 2.1), 40: (4.4, 4.7)}, {20: 3.4, 40: 6.9}, [(1.0, 3 * 10**9), (2.0, 5 * 10**9)], 2 * 10**9)
    figures = saves.summary(clock, turn, 60)
    assert 21 > 20 - FROZEN_AHEAD and 33 <= 40 - FROZEN_AHEAD
    assert figures["throughput_lost"] == pytest.approx((0.4 + 0.5) / 2 / 60, abs=1e-4)
    assert figures["longest_stall_s"] == 0.6 and figures["longest_quiet_s"] == 0.1 and figures["step_ms"] == 100
    assert figures["save_s"] == 2.0 and figures["save_call_s"] == 0.25
    assert (figures["extra_memory_gb"], figures["memory_gb"]) == (3.0, 2.0)
