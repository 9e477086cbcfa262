"""Two evaluations may write into one folder."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.evaluation import written
from launch.sweeps.folder import locked


def test_rows_of_all_who_write_at_once_stay(tmp_path: Path) -> None:
    parts = [f"part{number}" for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda part: written.write(tmp_path, part, [{"kind": part}], {}), parts))
    assert all(len(written.read(tmp_path, part)) == 2 for part in parts)


def test_who_holds_the_folder_for_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "WAIT_S", 0.1)
    with locked(tmp_path / "evaluation.lock"), pytest.raises(ValueError, match="another folder as"):
        written.write(tmp_path, "feed", [], {})
