"""Ids that share rows, against plain Python; and the point on a small world and a made-up MovieLens folder."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench.collisions import NUM_MOVIES, NUM_USERS, places_after_hash
from launch.points.collisions import LABEL, CollisionsPoint, parse_rows, prepare, read_examples, rewritten, run, shared
from launch.points.measured import Base, Measured

BASE = Base(
    ("configs/data/collisions.gin", "configs/models/deepfm.gin"),
    ("DeepFMConfig.hidden = (8,)", "TrainConfig.batch_size = 256"),
    3,
)


def small(rows: str = "own", videos: int = 25) -> CollisionsPoint:
    return CollisionsPoint(rows=rows, users=40, videos=videos, examples=3000, epochs=2)


def test_table_1_to_the_last_digit() -> None:
    users, movies = (rewritten(number, "md5 1000000") for number in (NUM_USERS, NUM_MOVIES))
    assert (shared(users)[0], shared(movies)[0]) == (149_970, 57_361)
    assert shared(movies)[0] == places_after_hash(NUM_MOVIES)


@given(number=st.integers(1, 300), modulus=st.integers(1, 400))
def test_as_plain_python_has_it(number: int, modulus: int) -> None:
    md5 = [int(hashlib.md5(str(one).encode()).hexdigest(), 16) % modulus for one in range(number)]
    assert rewritten(number, f"md5 {modulus}")[:, 0].tolist() == md5
    assert shared(rewritten(number, f"md5 {modulus}")) == (len(set(md5)), sum(md5.count(one) > 1 for one in md5))
    pairs = rewritten(number, f"quotient_remainder {modulus}")
    assert pairs.tolist() == [[one % modulus, modulus + one // modulus] for one in range(number)]
    assert shared(pairs) == (number, 0), "two ids have one row in common at most"
    assert shared(rewritten(number, "own")) == (number, 0)


@pytest.mark.parametrize("text", ["", "owned", "own 3", "md5", "md5 x", "md5 -1", "quotient_remainder"])
def test_rows_that_are_no_kind_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected 'own', 'md5 M' or 'quotient_remainder M'"):
        CollisionsPoint(rows=text)
    assert parse_rows("md5 12") == ("md5", 12)
    for changed in ({"rows": "md5 0"}, {"test_share": 1.0}, {"epochs": 0}, {"users": 0}):
        with pytest.raises(ValueError, match="CollisionsPoint"):
            CollisionsPoint(**changed)  # pyright: ignore[reportArgumentType]


def test_the_world_has_all_its_ids_from_the_start() -> None:
    examples = read_examples(small(), 3)
    assert examples.users.size == examples.videos.size == examples.labels.size == 3000
    assert (examples.users.min(), examples.videos.min()) == (0, 0)
    assert examples.users.max() < examples.num_users == 40 and examples.videos.max() < examples.num_videos == 25
    assert np.unique(examples.users).size == 40 and 0.1 < examples.labels.mean() < 0.6
    other = read_examples(small(), 4)
    assert not np.array_equal(examples.videos, other.videos), "another seed is another world"


def test_every_arm_has_the_same_examples(tmp_path: Path) -> None:
    tables = {}
    for rows in ("own", "md5 7", "quotient_remainder 7"):
        facts = prepare(small(rows), 3, tmp_path)
        tables[rows] = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("train", "test")]
        assert sum(table.num_rows for table in tables[rows]) == facts["examples"] == 3000
    for one, other in zip(tables["own"], tables["md5 7"], strict=True):
        assert one.column(LABEL).equals(other.column(LABEL)) and one.column("user_id").equals(other.column("user_id"))
        keys = rewritten(40, "md5 7")[:, 0]
        np.testing.assert_array_equal(other.column("user").to_numpy(), keys[one.column("user").to_numpy()])
    twos = tables["quotient_remainder 7"][1].column("video").to_pylist()
    assert twos == [[video % 7, 7 + video // 7] for video in tables["own"][1].column("video").to_pylist()]


def by_name(measured: list[Measured]) -> dict[str, float]:
    return {one.metric: one.value for one in measured if not one.along}


def test_auc_by_epoch(tmp_path: Path) -> None:
    measured = run(small("md5 5"), BASE, tmp_path)
    curve = [one for one in measured if one.metric == "test_auc" and one.along == "epoch"]
    assert [one.at for one in curve] == [1, 2] and all(0.3 < one.value < 1 for one in curve)
    found = by_name(measured)
    assert found["test_auc"] == curve[-1].value and found["best_auc"] == max(one.value for one in curve)
    assert found["rows"] == 10 and found["users_lost"] == 35 and found["users_sharing"] == 1.0
    assert not list(tmp_path.glob("*.parquet"))
    again = by_name(run(small("md5 5"), BASE, tmp_path))
    assert again == found, "a point that is run again finds the same"


def test_two_rows_are_summed(tmp_path: Path) -> None:
    base = BASE._replace(bindings=(*BASE.bindings, "IdFeatureConfig.max_length = 2"))
    found = by_name(run(small("quotient_remainder 8", 24), base, tmp_path))
    assert found["rows"] == (8 + 5) + (8 + 3) and found["users_lost"] == 0 and not math.isnan(found["test_auc"])


def test_movielens(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "ml-25m"
    folder.mkdir()
    lines = [
        f"{rng.integers(1, 30) * 7},{rng.integers(1, 50) * 3},{rng.integers(1, 11) / 2},{1_000_000_000 + i}" for i in range(900)
    ]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n")
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(f"{3 * i},T{i},Drama\n" for i in range(1, 50)))
    point = CollisionsPoint(movielens=str(folder), epochs=1)
    examples = read_examples(point, 0)
    ratings = [line.split(",") for line in lines]
    assert examples.labels.tolist() == [float(row[2]) >= 3.5 for row in ratings]
    users = sorted({int(row[0]) for row in ratings})
    assert examples.users.tolist() == [users.index(int(row[0])) for row in ratings] and examples.num_users == len(users)
    assert by_name(run(point, BASE, tmp_path))["examples"] == 900
    with pytest.raises((ValueError, FileNotFoundError), match="nothing"):
        read_examples(CollisionsPoint(movielens=str(tmp_path / "nothing")), 0)
