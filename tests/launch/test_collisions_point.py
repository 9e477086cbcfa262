"""A point of shared rows: Table 1 of the paper, what stands for an id, AUC by epoch, MovieLens, and a killed point."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from launch import run as run_folder
from launch.bench.collisions import NUM_MOVIES, NUM_USERS
from launch.points.collisions import LABEL, CollisionsPoint, check, prepare, read_examples, rewritten, run, shared
from launch.points.measured import Base, Measured
from tests.stream.test_movielens import write
from tests.test_flow import ROOT

FILES = tuple(str(ROOT / "configs" / name) for name in ("data/collisions.gin", "models/deepfm.gin"))
BINDINGS = (
    "DeepFMConfig.hidden = (8,)",
    "TrainConfig.batch_size = 256",
    "OptimizerConfig.learning_rate = 0.02",
    "user/TableConfig.max_rows = 500",
    "video/TableConfig.max_rows = 500",
    "Experiment.mesh = @MeshConfig()",
    "MeshConfig.num_devices = 1",
    "MeshConfig.cpu_devices = 8",  # as in all tests, should this process not have computed yet
    "MeshConfig.num_shards = 8",
)
TWO = "IdFeatureConfig.max_length = 2"
BASE = Base(FILES, BINDINGS, 3)


def tiny(rows: str = "own") -> CollisionsPoint:
    """Returns a world in which an id is seen often."""
    return CollisionsPoint(rows=rows, users=60, videos=40, examples=6_000, epochs=2)


def single(rows: list[Measured]) -> dict[str, float]:
    """Returns the figures that are no curve."""
    return {row.metric: row.value for row in rows if not row.along}


def curve(rows: list[Measured], metric: str) -> list[tuple[float, float]]:
    """Returns epochs and values."""
    return [(row.at, row.value) for row in rows if row.metric == metric and row.along == "epoch"]


def test_table_1_to_the_last_digit() -> None:
    assert [shared(rewritten(number, "md5 1000000"))[0] for number in (NUM_USERS, NUM_MOVIES)] == [149_970, 57_361]
    assert [shared(rewritten(number, "own")) for number in (NUM_USERS, NUM_MOVIES)] == [(NUM_USERS, 0), (NUM_MOVIES, 0)]


def test_what_stands_for_an_id_by_plain_python() -> None:
    number = 700
    hashed = [int(hashlib.md5(str(one).encode()).hexdigest(), 16) % 300 for one in range(number)]
    assert rewritten(number, "md5 300").tolist() == [[one] for one in hashed]
    assert rewritten(number, "own").tolist() == [[one] for one in range(number)]
    assert rewritten(number, "quotient_remainder 30").tolist() == [[one % 30, 30 + one // 30] for one in range(number)]
    sharing = sum(hashed.count(one) > 1 for one in hashed)
    assert shared(rewritten(number, "md5 300")) == (len(set(hashed)), sharing)


@pytest.mark.parametrize("number", [NUM_USERS, NUM_MOVIES])
def test_no_two_ids_have_the_same_quotient_and_remainder(number: int) -> None:
    keys = rewritten(number, "quotient_remainder 32768")
    assert shared(keys) == (number, 0)
    remainders, quotients = keys.T
    assert remainders.max() < quotients.min(), "both kinds are rows of one table"
    assert np.unique(keys).size == 32_768 + -(-number // 32_768)


@pytest.mark.parametrize("wrong", ["", "md5", "own 5", "md5 0", "sha 100", "md5 -1", "quotient_remainder"])
def test_unknown_rows_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"CollisionsPoint\.rows"):
        CollisionsPoint(rows=wrong)


def test_all_arms_have_the_same_examples_and_parts(tmp_path: Path) -> None:
    columns = {}
    for rows in ("own", "md5 20", "quotient_remainder 8"):
        prepare(tiny(rows), 3, tmp_path)
        columns[rows] = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("train", "test")]
    for part, sizes in ((0, (5_300, 5_500)), (1, (500, 700))):
        tables = {rows: of_rows[part] for rows, of_rows in columns.items()}
        own = tables["own"]
        assert sizes[0] < own.num_rows < sizes[1]
        for rows, table in tables.items():
            for name in ("user_id", LABEL):
                assert table.column(name).equals(own.column(name))
            for name, number in (("user", 60), ("video", 40)):
                keys = rewritten(number, rows)
                expected = keys[own.column(name).to_numpy()]
                assert table.column(name).to_pylist() == (expected if keys.shape[1] == 2 else expected[:, 0]).tolist()
    assert columns["own"][0].column("user").equals(columns["own"][0].column("user_id"))


def test_auc_by_epoch_and_a_killed_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tiny(), 3, tmp_path)
    train = pq.read_table(tmp_path / "train.parquet")
    trained = sum(len(train.column(name).unique()) for name in ("user", "video"))
    found = run(tiny(), BASE, tmp_path)
    auc, figures = curve(found, "test_auc"), single(found)
    assert [epoch for epoch, _ in auc] == [1, 2] == [epoch for epoch, _ in curve(found, "test_log_loss")]
    assert auc[-1][1] > 0.6 and auc[0][1] != auc[1][1]
    assert figures["test_auc"] == auc[-1][1]
    assert figures["test_log_loss"] == curve(found, "test_log_loss")[-1][1]
    assert figures["users_lost"] == figures["videos_lost"] == figures["users_sharing"] == 0
    assert (figures["user_rows"], figures["video_rows"]) == (60, 40)
    assert figures["rows"] == trained, "each id that was trained on has a row, and no other"
    assert not list(tmp_path.rglob("*.parquet")), "a sweep of many points would fill the disk"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "test", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), BASE, tmp_path)
    assert (tmp_path / "train.parquet").is_file()
    (tmp_path / "test.parquet").write_bytes(b"PAR1")  # as if it had been killed in writing
    again = run(tiny(), BASE, tmp_path)
    assert [row[:3] for row in again] == [row[:3] for row in found]


def test_shared_rows_are_shared_in_the_tables(tmp_path: Path) -> None:
    own = single(run(tiny(), BASE, tmp_path))
    hashed = single(run(tiny("md5 5"), BASE, tmp_path))
    assert hashed["rows"] == 10 and (hashed["users_lost"], hashed["videos_lost"]) == (55, 35)
    assert hashed["users_sharing"] == hashed["videos_sharing"] == 1
    assert hashed["test_auc"] < own["test_auc"] - 0.02
    both = single(run(tiny("quotient_remainder 8"), BASE._replace(bindings=(*BINDINGS, TWO)), tmp_path))
    assert both["rows"] == 8 + 8 + 8 + 5 and both["users_lost"] == both["videos_lost"] == 0
    assert both["test_auc"] > hashed["test_auc"]


@pytest.mark.parametrize("layout", ["ml-1m", "ml-25m"])
def test_movielens_ids_are_counted_from_0(tmp_path: Path, layout: str) -> None:
    rng = np.random.default_rng(0)
    stars = [(7 * user + 1, 10 * movie, int(rng.integers(1, 6)), 9) for user in range(40) for movie in (1, 2, 9)]
    write(tmp_path, layout, stars)
    point = CollisionsPoint(movielens=str(tmp_path), epochs=1, test_share=0.3)
    examples = read_examples(point, 0)
    rows = sorted(zip(examples.users.tolist(), examples.videos.tolist(), examples.labels.tolist(), strict=True))
    places = {10: 0, 20: 1, 90: 2}
    assert rows == sorted((user // 7, places[movie], star >= 3.5) for user, movie, star, _ in stars)
    assert (examples.num_users, examples.num_videos) == (40, 3)
    (tmp_path / "run").mkdir()
    found = single(run(point, BASE, tmp_path / "run"))
    assert (found["users"], found["videos"], found["examples"]) == (40, 3, 120) and 0 <= found["test_auc"] <= 1


def test_ids_are_not_dropped_without_a_word() -> None:
    facts = {"user_rows": 501.0, "video_rows": 10.0}
    with pytest.raises(ValueError, match=r"needs 501 rows .* holds 500; raise user/TableConfig\.max_rows"):
        check(BASE.load(), "own", facts)
    facts["user_rows"] = 500.0
    check(BASE.load(), "own", facts)
    with pytest.raises(ValueError, match=r"reads 1 of the two rows .* IdFeatureConfig\.max_length to 2"):
        check(BASE.load(), "quotient_remainder 8", facts)
    check(BASE.load(TWO), "quotient_remainder 8", facts)


def test_a_part_of_one_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of the \d+ examples of the \w+ part \d+ are positive"):
        prepare(CollisionsPoint(users=5, videos=4, examples=8), 3, tmp_path)
    with pytest.raises(ValueError, match="'nope'"):
        prepare(CollisionsPoint(users=5, videos=4, examples=8, label="nope"), 3, tmp_path)
