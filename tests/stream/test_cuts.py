"""The cut log: what was cut is read again as it was, whatever ended the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from monolith_jax.stream.cuts import Cut, CutLog, Read, sync
from monolith_jax.stream.log import LogPartition

ONE, TWO = LogPartition("impressions", 0), LogPartition("actions-of.all", 11)
CUTS = (
    Cut((), -5, False, (Read(ONE, 3, -1), Read(TWO, 0, 2**40))),
    Cut((Read(ONE, 3, 9), Read(TWO, 0, 1)), 1_700_000_000_000, True),
    Cut((), 1_700_000_000_001, False, (Read(ONE, 90, -1),), 81),
    Cut((), 2**60, is_last=True),
)


def test_cuts_are_read_again_as_they_were(tmp_path: Path) -> None:
    log = CutLog(tmp_path / "stream" / "0")
    assert log.bounds == (0, 0) and list(log.read(0, 0)) == []
    for cut in CUTS[:3]:
        log.append(cut)
    assert list(log.read(0, 3)) == list(CUTS[:3]) and list(log.read(1, 2)) == [CUTS[1]]
    log.close()
    log = CutLog(tmp_path / "stream" / "0")
    log.append(CUTS[3])
    assert log.bounds == (0, 4) and list(log.read(0, 4)) == list(CUTS)
    log.close()


def test_only_one_process_cuts(tmp_path: Path) -> None:
    log = CutLog(tmp_path)
    with pytest.raises(ValueError, match="has a producer already"):
        CutLog(tmp_path)
    log.append(CUTS[0])
    log.close()


def test_cuts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    log = CutLog(tmp_path)
    log.append(CUTS[0])
    with pytest.raises(ValueError, match="goes on from cuts 1 to 7 of its stream, but 0 to 1 are there"):
        list(log.read(1, 7))
    log.close()


def test_a_cut_outlives_the_process_that_made_it(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from monolith_jax.stream.cuts import Cut, CutLog
log = CutLog(Path({str(tmp_path)!r}))
for number in range(7):
    log.append(Cut(watermark_ms=number))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    log = CutLog(tmp_path)
    assert [cut.watermark_ms for cut in log.read(0, log.bounds[1])] == list(range(7))
    log.close()


def test_cuts_are_on_the_disk_when_they_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, synced = CutLog(tmp_path), []
    log.append(CUTS[0])
    assert not synced
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}"))))
    sync(tmp_path)
    assert synced == [tmp_path / "cuts" / "0" / f"{0:020d}.log", tmp_path / "cuts" / "0"]
    log.close()
