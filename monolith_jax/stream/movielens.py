"""MovieLens ratings as a stream (Harper and Konstan, TiiS 2015; grouplens.org/datasets/movielens).

In: an unpacked folder: ml-100k (`u.data`, `u.item`), ml-1m and ml-10m (`ratings.dat`, `movies.dat`), ml-20m, ml-25m,
ml-32m and ml-latest (`ratings.csv`, `movies.csv`, plain or `.gz`). Out: an example a rating, in time order: `user_id`,
`video_id` (the movie), `event_time_ms`, `rating`, `like` (rating >= `positive_rating`) and `tag_id` (the genres, by
their place in `GENRES`; a genre that is not there by a hash of its name).

The files are ordered by user, so all ratings are read and sorted by time (the file's order where times are equal) before
the first chunk: about 1 GB at ml-25m. Rows that are set aside in reading come with the first chunk of each pass.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from monolith_jax.stream import validate
from monolith_jax.stream.files import bounds, check_reading, num_rows
from monolith_jax.stream.side_table import SideTable, join
from monolith_jax.stream.tabular import RawRows, TableFile, open_table, read_rows, require_columns, start
from monolith_jax.types import Chunk, Position, Rejected

GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western", "IMAX"),
)
"""Genres by their `tag_id`. Children's is Children, and (no genres listed) is unknown."""

_RATING = ("userId", "movieId", "rating", "timestamp")
_LAYOUTS = (
    ("ratings.csv", ",", (), "movies.csv"),
    ("ratings.csv.gz", ",", (), "movies.csv"),
    ("ratings.dat", "::", _RATING, "movies.dat"),
    ("u.data", "\t", _RATING, "u.item"),
)
_READ_ROWS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class MovieLensConfig:
    """What to read of a MovieLens folder."""

    folder: str
    """The unpacked folder."""
    positive_rating: float = 3.5
    """A rating from here on is a like."""
    part: tuple[float, float] = (0.0, 1.0)
    """Share of the ratings to read by time, cut at row floor(share * n): (0.8, 1.0) is the last 20 %."""
    epochs: int = 1
    """Passes over the part. The checks start afresh at each."""
    chunk_rows: int = 4096
    """Rows of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ratings:
    """All good ratings in time order, int64 [N] each unless said otherwise."""

    users: np.ndarray
    movies: np.ndarray
    times_ms: np.ndarray
    ratings: np.ndarray
    """float64 [N]."""
    rows: np.ndarray
    """Row in the file."""


def _open_ratings(folder: Path) -> tuple[TableFile, Path]:
    if not folder.is_dir():
        raise ValueError(f"MovieLens folder {str(folder)!r} is not there ({folder.absolute()})")
    for name, delimiter, columns, movies in _LAYOUTS:
        if (folder / name).is_file():
            file = open_table(folder / name, name=name, columns=columns, delimiter=delimiter)
            require_columns(file, _RATING)
            found = [path for path in (folder / movies, folder / f"{movies}.gz") if path.is_file()]
            if not found:
                raise ValueError(f"{folder}: {name} is there, but not {movies}, which holds the genres")
            return file, found[0]
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
    raise ValueError(f"{folder}: none of {', '.join(layout[0] for layout in _LAYOUTS)}; the folder has: {there}")


def _genre_id(name: str) -> int:
    name = {"Children's": "Children", "(no genres listed)": "unknown"}.get(name, name)
    if name in GENRES:
        return GENRES.index(name)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _movie_genres(path: Path) -> Iterator[tuple[int, list[int]]]:
    """Yields movie ids and genre ids. A few ten thousand movies: a loop is fine."""
    if path.name == "u.item":
        for line in path.read_text("latin-1").splitlines():
            fields = line.split("|")
            yield int(fields[0]), [genre for genre, flag in enumerate(fields[5:]) if flag == "1"]
    elif path.name == "movies.dat":
        for line in path.read_text("latin-1").splitlines():
            movie, _, genres = line.split("::")
            yield int(movie), [_genre_id(genre) for genre in genres.split("|")]
    else:
        with pa.input_stream(str(path)) as stream:
            text = stream.read().decode()
        for row in csv.DictReader(text.splitlines()):
            yield int(row["movieId"]), [_genre_id(genre) for genre in row["genres"].split("|")]


def _load_genres(path: Path) -> SideTable:
    try:
        genres = dict(sorted(_movie_genres(path)))
    except (ValueError, KeyError, IndexError, TypeError, OSError, EOFError) as error:
        raise ValueError(f"{path.name}: not a MovieLens movie file: {error}") from error
    if not genres:
        raise ValueError(f"{path.name}: the file is empty")
    tags = pa.array(list(genres.values()), pa.list_(pa.int64()))
    return SideTable(np.array(list(genres), np.int64), pa.RecordBatch.from_pydict({"tag_id": tags}))


def _typed(raw: RawRows) -> tuple[pa.RecordBatch, tuple[Rejected, ...]]:
    """Returns the good ratings with their row in the file, and the others."""
    columns, faults = {}, []
    for name in _RATING:
        kind = pa.float64() if name == "rating" else pa.int64()
        columns[name], found = validate.convert(raw.batch.column(name), name, kind, raw.file_name)
        faults += [*found, validate.required(columns[name], name)]
    faults.append(validate.not_negative(columns["rating"], "negative rating"))
    seconds = columns["timestamp"]
    outside = pc.or_(pc.less(seconds, 0), pc.greater_equal(seconds, validate.LAST_MS // 1000))
    columns["timestamp"] = pc.multiply(pc.if_else(outside, 0, seconds), 1000)
    faults.append((pc.fill_null(outside, False).to_numpy(zero_copy_only=False), "time out of range"))
    columns["row"] = pa.array(raw.rows)
    return validate.split(pa.RecordBatch.from_pydict(columns), faults, raw.where, raw.raw)


def _load_ratings(file: TableFile) -> tuple[_Ratings, tuple[Rejected, ...]]:
    parts: list[pa.RecordBatch] = []
    rejected: list[Rejected] = []
    for raw in read_rows(file, start(file), num_rows=_READ_ROWS, columns=_RATING, end_row=None):
        good, bad = _typed(raw)
        parts.append(good)
        rejected += [*raw.rejected, *bad]
    table = pa.Table.from_batches(parts)
    if not table.num_rows:
        raise ValueError(
            f"{file.name}: no row is a rating; the first: {rejected[0].where} {rejected[0].reason}: {rejected[0].raw!r}"
        )
    order = np.argsort(table.column("timestamp").to_numpy(), kind="stable")
    names = {"users": "userId", "movies": "movieId", "times_ms": "timestamp", "ratings": "rating", "rows": "row"}
    rejected.sort(key=lambda row: int(row.where.rpartition(":")[2]))
    return _Ratings(**{ours: table.column(theirs).to_numpy()[order] for ours, theirs in names.items()}), tuple(rejected)


@dataclass(frozen=True, slots=True)
class MovieLensSource:
    """A `Source` over a MovieLens folder."""

    config: MovieLensConfig
    """What to read."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field is out of range."""
        check_reading(self.config.part, self.config.epochs, self.config.chunk_rows, 0)

    @property
    def num_examples(self) -> int | None:
        """Ratings of all passes, those that will be set aside counted; counts the lines of the file once."""
        file, _ = _open_ratings(Path(self.config.folder).expanduser())
        ((first, end),) = bounds([num_rows(file)], self.config.part)
        return self.config.epochs * (end - first)

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from `position` on.

        Raises:
            ValueError: A file or column is missing, or a file is empty or damaged.
        """
        config = self.config
        file, movies = _open_ratings(Path(config.folder).expanduser())
        genres = _load_genres(movies)
        ratings, set_aside = _load_ratings(file)
        ((first, end),) = bounds([len(ratings.rows)], config.part)
        keys = tuple((user, movie) for user, movie in position.get("keys", ()))
        trail = validate.Trail(newest_ms=position.get("newest_ms"), keys=keys)
        epoch, row = position.get("epoch", 0), position.get("row", first)
        while epoch < config.epochs:
            while row < end:
                after = min(row + config.chunk_rows, end)
                examples, rejected, trail = _examples(file, ratings, slice(row, after), genres, config.positive_rating, trail)
                rejected = (*(set_aside if row == first else ()), *rejected)
                row = after
                place = {"epoch": epoch, "row": row, "newest_ms": trail.newest_ms}
                yield Chunk(examples, rejected, place | {"keys": [list(key) for key in trail.keys]}, epoch)
            epoch, row, trail = epoch + 1, first, validate.Trail()


def _examples(
    file: TableFile, ratings: _Ratings, rows: slice, genres: SideTable, positive: float, trail: validate.Trail
) -> tuple[pa.RecordBatch, tuple[Rejected, ...], validate.Trail]:
    users, movies = pa.array(ratings.users[rows]), pa.array(ratings.movies[rows])
    times, stars, at = ratings.times_ms[rows], ratings.ratings[rows], ratings.rows[rows]
    columns = {
        "user_id": users,
        "video_id": movies,
        "event_time_ms": pa.array(times),
        "rating": pa.array(stars),
        "like": pa.array(stars >= positive),
        **join(genres, movies),
    }
    faults, trail = validate.in_order(times, users, movies, np.ones(len(at), bool), trail, 0)
    delimiter, header = file.delimiter or ",", bool(file.header_bytes)
    examples, rejected = validate.split(
        pa.RecordBatch.from_pydict(columns),
        faults,
        lambda i: f"{file.name}:{at[i] + 1 + header}",
        lambda i: delimiter.join(map(str, (users[i], movies[i], f"{stars[i]:g}", times[i] // 1000))),
    )
    return examples, rejected, trail
