"""TikTok: measures against values worked out by hand, EASE against its own regression, and what the examples hold."""

import itertools
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.bench import tiktok as bench
from launch.points import retrieval, tiktok
from launch.points.measured import Base
from launch.points.retrieval import RetrievalPoint
from launch.points.tiktok import Data, Pairs


def small() -> Data:
    users = np.repeat([0, 1, 2], [1, 3, 120])
    videos = np.concatenate([[5], [2, 7, 9], np.arange(120)])
    content = tuple(np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32) for _ in tiktok.CONTENT)
    return Data(Pairs(users, videos), Pairs(np.array([1, 1, 2]), np.array([40, 41, 126])), content, 3)


def test_best_leaves_out_what_was_seen() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]], np.float32)
    np.testing.assert_array_equal(retrieval.best(scores, [np.array([1]), np.array([0, 2])], 2), [[3, 2], [1, 3]])
    assert scores[0, 1] == np.float32(0.9)


def test_judged_averages_over_users_with_something_to_find() -> None:
    data, scores = small(), np.zeros((3, 128), np.float32)
    # User 1: 40 is second behind a video that is not wanted, 41 is behind 20 others. User 2: 126 is first of the 8 not seen.
    scores[1, 10:31], scores[1, 50], scores[1, 40], scores[1, 41] = 1.0, 3.0, 2.0, 0.5
    scores[2, :120], scores[2, 126] = 9.0, 1.0
    gain = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    figures = retrieval.judged(data, lambda users: scores[users])
    assert (figures["recall_at_20"], figures["ndcg_at_20"]) == pytest.approx(((0.5 + 1) / 2, (gain + 1) / 2))


def test_ease_is_ridge_regression_without_oneself() -> None:
    rng, strength = np.random.default_rng(1), 0.7
    seen = (rng.random((30, 6)) < 0.4).astype(np.float32)
    weights = retrieval.ease(seen, strength)
    for video in range(6):
        others = np.delete(np.arange(6), video)
        x, y = seen[:, others].astype(np.float64), seen[:, video].astype(np.float64)
        solved = np.linalg.solve(x.T @ x + strength * np.eye(5), x.T @ y)
        np.testing.assert_allclose(weights[others, video], solved, rtol=1e-5, atol=1e-6)
        assert weights[video, video] == 0


def test_inner_split_takes_the_last_of_some_users() -> None:
    users = np.repeat(np.arange(3000), 3)
    data = small()._replace(train=Pairs(users, np.tile([3, 5, 8], 3000)), num_users=3000)
    split = tiktok.inner(data, 4)
    assert set(split.test.videos) == {8} and 900 < split.test.users.size < 1100
    assert split.train.users.size + split.test.users.size == users.size
    single = tiktok.inner(data._replace(train=Pairs(np.arange(3000), np.full(3000, 3))), 4)
    assert single.test.users.size == 0


def test_examples_do_not_show_what_they_ask_for(tmp_path: Path) -> None:
    data = small()
    tiktok.prepare(data, tmp_path / "examples.parquet", 3)
    rows = pq.read_table(tmp_path / "examples.parquet").to_pylist()
    assert sorted(row["video_id"] for row in rows[:128]) == list(range(128)) and not any(row["like"] for row in rows[:128])
    passes = rows[128:]
    assert len(passes) == tiktok.PASSES * (3 + tiktok.MANY) and all(row["like"] for row in passes)
    own = tiktok.by_user(data.train, 3)
    for row in passes:
        others = set(own[row["user_id"]].tolist()) - {row["video_id"]}
        assert row["video_id"] in own[row["user_id"]] and set(row["liked"]) <= others
        assert len(row["liked"]) == len(set(row["liked"])) == min(len(others), tiktok.MAX_HISTORY)
        np.testing.assert_allclose(row["acoustic"], data.content[1][row["video_id"]], rtol=1e-6)
        np.testing.assert_allclose(row["liked_visual"], data.content[0][row["liked"]].mean(0), rtol=1e-4, atol=1e-6)
    assert {row["user_id"] for row in passes} == {1, 2}


def loss(data: Data, users: np.ndarray, videos: np.ndarray, penalty: float, confidence: float) -> float:
    """Equation 3 of Hu, Koren and Volinsky, written out."""
    has = retrieval.matrix_of(data).astype(np.float64)
    errors = (1 + confidence * has) * np.square(has - users.astype(np.float64) @ videos.T)
    return float(errors.sum() + penalty * (np.square(users).sum() + np.square(videos).sum()))


def test_factors_solve_their_normal_equations_and_the_loss_never_rises() -> None:
    rng = np.random.default_rng(2)
    users, videos = (rng.random((40, 25)) < 0.2).nonzero()
    data = small()._replace(train=Pairs(users, videos), content=(np.zeros((25, 2), np.float32),) * 2, num_users=40)
    losses = [loss(data, *retrieval.factorise(data, 4, 0.5, 3.0, 1, rounds), 0.5, 3.0) for rounds in range(1, 6)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    of_users, of_videos = (one.astype(np.float64) for one in retrieval.factorise(data, 4, 0.5, 3.0, 1, 3))
    has = retrieval.matrix_of(data)
    for video in range(25):
        weights = 1 + 3.0 * has[:, video]
        left = (of_users * weights[:, None]).T @ of_users + 0.5 * np.eye(4)
        np.testing.assert_allclose(of_videos[video], np.linalg.solve(left, of_users.T @ (weights * has[:, video])), atol=1e-4)


def folder_of(tmp_path: Path, data: Data) -> Path:
    """Writes data as it is published."""
    users, videos = (np.concatenate([data.train[side], data.test[side]]) for side in range(2))
    split = ["trn"] * data.train.users.size + ["val"] * data.test.users.size
    pq.write_table(pa.table({"user": users, "item": videos, "split": split}), tmp_path / "interactions.parquet")
    for name, content in zip(("image_feat", "audio_feat"), data.content, strict=True):
        np.savez(tmp_path / f"{name}.npz", feat=content)
    return tmp_path


def test_popularity_counts_users_of_what_is_learned() -> None:
    scores = retrieval.popularity_scores(small())(np.array([0, 2]))
    assert scores.shape == (2, 128)
    # User 2 has 0 to 119; user 0 has 5, user 1 has 2, 7, 9; 120 and above only stand in what is to be found.
    for row in scores:
        assert set(np.flatnonzero(row == 2)) == {2, 5, 7, 9} and not row[120:].any() and row.sum() == 124


TINY = (
    *(f"{name}/DenseFeatureConfig.size = 4" for one in tiktok.CONTENT for name in (one, f"liked_{one}")),
    *("TableConfig.dim = 8", "TableConfig.max_rows = 512", "ColumnsConfig.epochs = 1", "TrainConfig.batch_size = 32"),
    *("TwoTowerConfig.dim = 8", "TwoTowerConfig.user_hidden = (8,)", "TwoTowerConfig.video_hidden = (8,)"),
    *("TwoTowerConfig.num_negatives = 16", "TwoTowerConfig.pool_size = 256", "TrainConfig.seed = 3"),
)


def test_two_tower_is_the_experiments(tmp_path: Path) -> None:
    folder, base = folder_of(tmp_path, small()), Base(("configs/tiktok.gin",), TINY, 3)
    work = tmp_path / "point"
    (work / "two_tower" / "run").mkdir(parents=True)
    (work / "two_tower" / "run" / "left.txt").write_text("of a try that was killed")
    point = RetrievalPoint("two_tower", str(folder))
    measured = retrieval.run(point, base, work)
    assert {one.metric for one in measured} >= {f"{name}_at_{k}" for name in ("recall", "ndcg", "mrr") for k in (10, 20, 50)}
    assert all(math.isfinite(one.value) for one in measured)
    assert not (work / "two_tower" / "run" / "left.txt").exists() and not (work / "two_tower" / "examples.parquet").exists()


def test_a_run_that_was_stopped_gives_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(experiment: object, workdir: Path, console: object) -> dict[str, object]:
        workdir.mkdir()
        (workdir / "metrics.jsonl").write_text('{"kind": "step", "step": 20, "loss": 5.0}\n')
        return {}

    monkeypatch.setattr("launch.run.train", stopped)
    point, base = RetrievalPoint("two_tower", str(folder_of(tmp_path, small()))), Base(("configs/tiktok.gin",), TINY, 3)
    with pytest.raises(ValueError, match="the run was stopped before its end"):
        retrieval.run(point, base, tmp_path)


@pytest.mark.parametrize(
    ("columns", "videos", "wrong"),
    [
        ({"user": [0, 0], "item": [0, 1]}, 3, "has no column split, only user, item"),
        ({"user": [0, 0], "item": [0, 1], "split": ["trn", "trn"]}, 3, "rows of split trn, to learn from, and of another"),
        (
            {"user": [0, 0], "item": [0, 3], "split": ["trn", "val"]},
            3,
            r"image_feat\.npz must have a vector of each video 0 to 3",
        ),
    ],
    ids=["column", "split", "content"],
)
def test_other_data_are_refused(tmp_path: Path, columns: dict[str, list[object]], videos: int, wrong: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "interactions.parquet")
    for name in ("image_feat", "audio_feat"):
        np.savez(tmp_path / f"{name}.npz", feat=np.eye(videos, 4, dtype=np.float32))
    with pytest.raises(ValueError, match=wrong):
        tiktok.read(tmp_path)


def test_points_of_made_up_data(tmp_path: Path) -> None:
    base = Base(("configs/tiktok.gin",), (), 0)
    folder = folder_of(tmp_path, small())
    for method in ("popularity", "ease", "factors"):
        measured = {one.metric: one.value for one in retrieval.run(RetrievalPoint(method, str(folder)), base, tmp_path)}
        assert 0 <= measured["recall_at_10"] <= measured["recall_at_20"] <= measured["recall_at_50"] <= 1
        assert 0 < measured["coverage_at_20"] <= 1 and measured["novelty_at_20"] > 0
    with pytest.raises(ValueError, match=r"has no interactions\.parquet, image_feat\.npz, audio_feat\.npz"):
        retrieval.run(RetrievalPoint("ease", str(tmp_path / "nothing")), base, tmp_path)


def test_figures_are_means_over_seeds() -> None:
    runs = {"": [(0.12, 0.05), (0.13, 0.054)], "ease_": [(0.09, 0.04)]}
    figures = bench.figures_of(runs)
    assert figures["recall_at_20"] == 0.125 and figures["ndcg_at_20"] == 0.052 and figures["met"]
    assert figures["recall_at_20_by_seed"] == [0.12, 0.13] and figures["ease_ndcg_at_20"] == 0.04
    assert not bench.figures_of({"": [(0.13, 0.0509)]})["met"]
