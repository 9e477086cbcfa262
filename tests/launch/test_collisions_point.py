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
from launch.points import driving
from launch.points.collisions import LABEL, CollisionsPoint, check, parse_rows, prepare, read_examples, rewritten, run, shared
from launch.points.measured import Base, Measured
from tests.stream.test_movielens import write

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


@pytest.mark.parametrize("number", [NUM_USERS, NUM_MOVIES])
def test_no_two_ids_of_movielens_25m_have_the_same_quotient_and_remainder(number: int) -> None:
    keys = rewritten(number, "quotient_remainder 32768")
    assert shared(keys) == (number, 0)
    assert keys[:, 0].max() < keys[:, 1].min(), "both are rows of one table"
    assert np.unique(keys).size == 32_768 + -(-number // 32_768)


def test_a_killed_point_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(small(), 3, tmp_path)
    train = pq.read_table(tmp_path / "train.parquet")
    found = by_name(run(small(), BASE, tmp_path))
    trained = sum(len(train.column(name).unique()) for name in ("user", "video"))
    assert found["rows"] == trained, "each id that was learned from has a row, and nothing else"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(driving, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            run(small(), BASE, tmp_path)
    assert (tmp_path / "train.parquet").is_file()
    (tmp_path / "test.parquet").write_bytes(b"PAR1")  # As if it had been killed while writing.
    assert by_name(run(small(), BASE, tmp_path)) == found


def test_rows_of_their_own_tell_more_than_shared_ones(tmp_path: Path) -> None:
    base = BASE._replace(bindings=(*BASE.bindings, "OptimizerConfig.learning_rate = 0.02"))
    of_arm = {
        rows: by_name(run(CollisionsPoint(rows=rows, users=60, videos=40, examples=6000, epochs=2), base, tmp_path))
        for rows in ("own", "md5 5")
    }
    assert of_arm["own"]["test_auc"] > of_arm["md5 5"]["test_auc"] + 0.02


def test_ids_are_not_dropped_without_a_word() -> None:
    experiment, facts = BASE.load("user/TableConfig.max_rows = 500"), {"user_rows": 501.0, "video_rows": 10.0}
    with pytest.raises(ValueError, match=r"needs 501 rows .* holds 500; raise user/TableConfig\.max_rows"):
        check(experiment, "own", facts)
    facts["user_rows"] = 500.0
    check(experiment, "own", facts)
    with pytest.raises(ValueError, match=r"reads 1 of the two rows .* IdFeatureConfig\.max_length to 2"):
        check(experiment, "quotient_remainder 8", facts)
    check(BASE.load("IdFeatureConfig.max_length = 2"), "quotient_remainder 8", facts)


def test_a_part_of_one_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of the \d+ examples of the \w+ part \d+ are positive"):
        prepare(CollisionsPoint(users=5, videos=4, examples=8), 3, tmp_path)
    with pytest.raises(ValueError, match="'nope'"):
        prepare(CollisionsPoint(users=5, videos=4, examples=8, label="nope"), 3, tmp_path)


def test_other_layouts_of_movielens(tmp_path: Path) -> None:
    stars = [(7 * user + 1, 10 * movie, (user + movie) % 5 + 1, 9) for user in range(20) for movie in (1, 2, 9)]
    write(tmp_path, "ml-1m", stars)
    examples, places = read_examples(CollisionsPoint(movielens=str(tmp_path)), 0), {10: 0, 20: 1, 90: 2}
    found = sorted(zip(examples.users.tolist(), examples.videos.tolist(), examples.labels.tolist(), strict=True))
    assert found == sorted((user // 7, places[movie], star >= 3.5) for user, movie, star, _ in stars)
