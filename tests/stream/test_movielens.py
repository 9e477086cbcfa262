from pathlib import Path

import numpy as np
import pytest

from monolith_jax.stream.movielens import GENRES, MovieLensConfig, MovieLensSource
from tests.stream.resume import assert_resumes, reasons_of, rows_of

RATINGS = [(1, 10, 5, 300), (1, 20, 3, 100), (2, 10, 4, 300), (2, 30, 1, 200), (3, 20, 3.5, 50)]


def write(folder: Path, layout: str, ratings: list[tuple] = RATINGS) -> None:
    if layout == "ml-100k":
        (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ratings))
        flags = {10: "0|1" + "|0" * 17, 20: "1" + "|0" * 18}
        (folder / "u.item").write_bytes(
            "".join(f"{m}|Caf\xe9|01-Jan-1995||url|{f}\n" for m, f in flags.items()).encode("latin-1")
        )
    elif layout == "ml-1m":
        (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings))
        (folder / "movies.dat").write_bytes("10::Caf\xe9 (1995)::Action\n20::B: C (2000)::unknown\n".encode("latin-1"))
    else:
        (folder / "ratings.csv").write_text(
            "userId,movieId,rating,timestamp\n" + "".join(f"{u},{m},{r},{t}\n" for u, m, r, t in ratings)
        )
        movies = 'movieId,title,genres\n10,"Café, The",Action\n20,B,(no genres listed)\n'
        (folder / "movies.csv").write_text(movies, encoding="utf-8")


def source(folder: Path, **fields: object) -> MovieLensSource:
    return MovieLensSource(MovieLensConfig(folder=str(folder), **{"chunk_rows": 2, **fields}))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("layout", ["ml-100k", "ml-1m", "ml-25m"])
def test_every_layout_gives_the_same_examples_in_time_order(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout)
    chunks = assert_resumes(source(tmp_path, epochs=2))
    rows = rows_of(chunks)
    assert rows[:5] == rows[5:] and not reasons_of(chunks)
    assert [(row["user_id"], row["video_id"], row["event_time_ms"], row["rating"]) for row in rows[:5]] == [
        (3, 20, 50_000, 3.5),
        (1, 20, 100_000, 3.0),
        (2, 30, 200_000, 1.0),
        (1, 10, 300_000, 5.0),
        (2, 10, 300_000, 4.0),
    ]
    assert [row["like"] for row in rows[:5]] == [True, False, False, True, True]
    action, unknown = [GENRES.index("Action")], [GENRES.index("unknown")]
    assert [row["tag_id"] for row in rows[:5]] == [unknown, unknown, None, action, action]
    assert source(tmp_path).num_examples == 5


@pytest.mark.parametrize("layout", ["ml-1m", "ml-25m"])
def test_bad_rows_are_set_aside(tmp_path: Path, layout: str) -> None:
    bad = [(1, "x", 3, 5), (1, 2, -1, 5), (1, 2, 3, 2**62), ("", 2, 3, 5), (1, 10, 5, 300), (1, 2, "nan", 5)]
    write(tmp_path, layout, [*RATINGS, *bad])
    chunks = assert_resumes(source(tmp_path))
    header = layout == "ml-25m"
    name = "ratings.csv" if header else "ratings.dat"
    reasons = ["movieId is not a whole number", "negative rating", "time out of range", "userId is missing", "duplicate"]
    assert reasons_of(chunks) == {
        f"{name}:{6 + header + i}": reason for i, reason in enumerate([*reasons, "rating is missing"])
    }
    assert sum(chunk.examples.num_rows for chunk in chunks) == 5
    again = list(source(tmp_path, part=(0.5, 1.0)).read({}))
    assert len(rows_of(again)) + len(rows_of(list(source(tmp_path, part=(0.0, 0.5)).read({})))) == 5


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        list(source(tmp_path / "none").read({}))
    with pytest.raises(ValueError, match=r"none of ratings\.csv"):
        list(source(tmp_path).read({}))
    write(tmp_path, "ml-25m", [("a", 1, 1, 1)])
    with pytest.raises(ValueError, match="no row is a rating"):
        list(source(tmp_path).read({}))
    (tmp_path / "movies.csv").write_text("movieId,title\n1,2\n")
    with pytest.raises(ValueError, match="not a MovieLens movie file"):
        list(source(tmp_path).read({}))
    (tmp_path / "movies.csv").unlink()
    with pytest.raises(ValueError, match=r"not movies.csv"):
        list(source(tmp_path).read({}))
    (tmp_path / "ratings.csv").write_text("userId,rating,timestamp\n1,2,3\n")
    with pytest.raises(ValueError, match="no column 'movieId'"):
        list(source(tmp_path).read({}))


def test_many_ratings_keep_their_order_and_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (int(u), int(m), 4, int(t))
        for u, m, t in zip(rng.integers(0, 99, 500), rng.permutation(500), rng.integers(0, 50, 500), strict=True)
    ]
    write(tmp_path, "ml-1m", rows)
    parts = [rows_of(list(source(tmp_path, chunk_rows=64, part=part).read({}))) for part in ((0.0, 0.8), (0.8, 1.0))]
    assert len(parts[1]) == 100
    assert [row["video_id"] for part in parts for row in part] == [row[1] for row in sorted(rows, key=lambda row: row[3])]
