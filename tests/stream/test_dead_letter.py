import json
from pathlib import Path

import pytest

from monolith_jax.stream.dead_letter import FURTHER, MAX_REASONS, DeadLetters, set_aside
from monolith_jax.types import Rejected

ROWS = [Rejected(f"log.csv:{i}", "duplicate" if i % 3 else "negative duration", f"{i},é,\udc80\n") for i in range(7)]


def test_each_row_is_a_line_with_place_and_reason(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path / "run" / "set_aside.jsonl")
    letters.add(())
    assert set_aside(letters.counts, tmp_path) == "no row was set aside" and not (tmp_path / "run").exists()
    letters.add(ROWS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "set_aside.jsonl").read_text().splitlines()]
    assert lines == [{"where": row.where, "reason": row.reason, "raw": row.raw} for row in ROWS]
    assert letters.counts == {"duplicate": 4, "negative duration": 3}
    told = set_aside(letters.counts, tmp_path)
    assert "7 rows" in told and "4  duplicate" in told


@pytest.mark.parametrize("stop", range(len(ROWS) + 1))
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    whole, path = DeadLetters(tmp_path / "whole.jsonl"), tmp_path / "resumed.jsonl"
    for row in ROWS:
        whole.add([row])
    before = DeadLetters(path)
    for row in ROWS[:stop]:
        before.add([row])
    state = json.loads(json.dumps(before.get_state()))
    before.add(ROWS)  # written after the snapshot, and lost
    after = DeadLetters(path)
    after.set_state(state)
    for row in ROWS[stop:]:
        after.add([row])
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert after.get_state() == whole.get_state()


def test_a_new_run_replaces_the_file_even_without_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "set_aside.jsonl"
    DeadLetters(path).add(ROWS)
    DeadLetters(path).add(())
    assert path.read_text() == ""


def test_a_lost_file_is_told(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="the state has 10 bytes of set-aside rows, the file 0"):
        letters.set_state({"bytes": 10, "counts": {}})


def test_reasons_without_end_are_counted_together(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path / "set_aside.jsonl")
    for number in range(MAX_REASONS + 5):
        letters.add([Rejected("log", f"column 'user_{number}'", ""), Rejected("log", "column 'user_0'", "")])
    assert len(letters.counts) == MAX_REASONS + 1
    assert letters.counts[FURTHER] == 5 and letters.counts["column 'user_0'"] == MAX_REASONS + 6
