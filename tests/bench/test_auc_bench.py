"""The streaming AUC against the exact one: the exact one is scikit-learn's, and the verdict is the demand's."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from launch.bench import auc
from launch.bench.auc import Streamed


@pytest.mark.parametrize("kind", auc.KINDS)
def test_both_are_the_auc_of_the_stream(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auc, "BATCH", 4096)
    parts = list(auc.batches(kind, 10_000, 3))
    scores, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    wanted = roc_auc_score(labels, scores)
    assert auc.exact(kind, 10_000, 3) == pytest.approx(wanted, abs=1e-12)
    one = auc.streamed(kind, 10_000, 3)
    assert one.auc == pytest.approx(wanted, abs=1e-12) and one.bound == 0 and len(one.peaks_mb) == 3
    assert scores.dtype == np.float32 and 0 <= scores.min() and scores.max() <= 1


@pytest.mark.parametrize(
    ("auc_of", "bound", "peaks", "met"),
    [
        (0.7, 1e-5, (30.0, 31.0, 33.0), True),
        (0.70005, 6e-5, (30.0, 31.0, 33.0), True),
        (0.70005, 1e-5, (30.0, 31.0, 33.0), False),
        (0.7002, 1e-3, (30.0, 31.0, 33.0), False),
        (0.7, 1e-5, (30.0, 100.0, 400.0), False),
    ],
)
def test_the_verdict(auc_of: float, bound: float, peaks: tuple[float, ...], met: bool) -> None:
    told = auc.figures_of(
        {"tied": (Streamed(0.7, 0.0, (1.0, 1.0, 1.0), 9.0), 0.7), "uniform": (Streamed(auc_of, bound, peaks, 5.0), 0.7)}
    )
    assert told["met"] is met and told["scores_per_s"] == 5
    assert told["rss_growth_mb"] == peaks[-1] - peaks[0]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        auc.main(["--help"])
    assert auc.EXAMPLE in capsys.readouterr().out
