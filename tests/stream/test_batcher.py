import json
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.stream import batcher
from monolith_jax.stream.batcher import Batch, batches
from monolith_jax.stream.columns import ColumnsConfig, ColumnsSource
from monolith_jax.stream.kuairand import KuaiRandConfig, KuaiRandSource
from monolith_jax.stream.movielens import MovieLensConfig, MovieLensSource
from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource
from monolith_jax.types import Chunk, Position, Rejected, Source


def read_from(source: Source, batch_size: int, read_ahead: int, state: dict | None = None) -> tuple[list[Batch], list[dict]]:
    """Returns the batches from a state on, and the state before each and after the last."""
    with closing(batches(source, batch_size, read_ahead)) as iterator:
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        found, states = [], [iterator.get_state()]
        for batch in iterator:
            found.append(batch)
            states.append(iterator.get_state())
        with pytest.raises(StopIteration):
            next(iterator)
    return found, states


def assert_resumes(source: Source, batch_size: int, read_ahead: int) -> list[Batch]:
    """Holds what a batcher promises of a source: every row once, in order; resumed anywhere, exactly the rest.

    Returns:
        The batches.
    """
    chunks = list(source.read({}))
    whole, states = read_from(source, batch_size, read_ahead)
    rows = [(chunk.epoch, row) for chunk in chunks for row in chunk.examples.to_pylist()]
    assert [(batch.epoch, row) for batch in whole for row in batch.examples.to_pylist()] == rows
    assert [row for batch in whole for row in batch.rejected] == [row for chunk in chunks for row in chunk.rejected]
    filled = [batch for batch in whole if batch.examples.num_rows]
    for index, batch in enumerate(filled):
        is_last = index + 1 == len(filled) or filled[index + 1].epoch > batch.epoch
        assert batch.examples.num_rows <= batch_size and (is_last or batch.examples.num_rows == batch_size)
    assert len(whole) - len(filled) <= 1, "rows that are set aside at the end alone make a batch without rows"
    for index, state in enumerate(states):
        rest, rest_states = read_from(source, batch_size, read_ahead, state)
        assert json.loads(json.dumps(rest_states)) == json.loads(json.dumps(states[index:]))
        assert len(rest) == len(whole) - index
        for got, expected in zip(rest, whole[index:], strict=True):
            assert got.examples.equals(expected.examples, check_metadata=True)
            assert (got.rejected, got.epoch) == (expected.rejected, expected.epoch)
    return whole


@dataclass(frozen=True)
class Scripted:
    """A source of chunks with given numbers of rows, rows set aside, and epochs."""

    chunks: tuple[tuple[int, int, int], ...]
    fails_at: int = -1

    def read(self, position: Position) -> Iterator[Chunk]:
        for index in range(position.get("at", 0), len(self.chunks)):
            if index == self.fails_at:
                raise ValueError("the archive is truncated")
            num_rows, num_rejected, epoch = self.chunks[index]
            rows = pa.record_batch({"row": pa.array([1000 * index + k for k in range(num_rows)], pa.int64())})
            rejected = tuple(Rejected(f"file:{index}.{k}", "bad", "") for k in range(num_rejected))
            yield Chunk(rows, rejected, {"at": index + 1}, epoch)

    @property
    def num_examples(self) -> int | None:
        return None


AWKWARD = (
    *((0, 0, 0), (5, 1, 0), (0, 3, 0), (7, 0, 0), (1, 1, 0), (0, 0, 0), (6, 0, 0), (0, 2, 0)),
    *((0, 4, 1), (3, 0, 1), (0, 0, 1), (9, 1, 1), (0, 2, 1), (0, 0, 1)),
)


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 19, 100])
def test_awkward_chunks(batch_size: int, read_ahead: int) -> None:
    whole = assert_resumes(Scripted(AWKWARD), batch_size, read_ahead)
    assert {batch.epoch for batch in whole} == {0, 1} and sum(batch.examples.num_rows for batch in whole) == 31


@settings(deadline=None, max_examples=100)
@given(
    epochs=st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=6), max_size=3),
    batch_size=st.integers(1, 7),
)
def test_any_chunks(epochs: list[list[tuple[int, int]]], batch_size: int) -> None:
    assert_resumes(Scripted(tuple((*chunk, epoch) for epoch, chunks in enumerate(epochs) for chunk in chunks)), batch_size, 0)


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_nothing_and_nothing_good(read_ahead: int) -> None:
    assert assert_resumes(Scripted(()), 3, read_ahead) == []
    assert assert_resumes(Scripted(((0, 0, 0),)), 3, read_ahead) == []
    (batch,) = assert_resumes(Scripted(((0, 2, 0), (0, 1, 1))), 3, read_ahead)
    assert batch.examples.num_rows == 0 and len(batch.rejected) == 3 and batch.epoch == 1


def test_rows_that_are_set_aside_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "MAX_REJECTED", 10)
    chunks = ((2, 4, 0), *[(0, 4, 0)] * 8, (6, 11, 0))
    whole, states = read_from(Scripted(chunks), 4, 0)
    assert [(batch.examples.num_rows, len(batch.rejected)) for batch in whole] == [(2, 12), (0, 12), (0, 12), (4, 11), (2, 0)]
    for index, state in enumerate(states):
        assert read_from(Scripted(chunks), 4, 0, state)[0] == whole[index:]


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_an_error_loses_nothing(read_ahead: int) -> None:
    whole, states = read_from(Scripted(AWKWARD), 4, 0)
    for fails_at in range(len(AWKWARD)):
        with closing(batches(Scripted(AWKWARD, fails_at), 4, read_ahead)) as iterator:
            found = []
            with pytest.raises(ValueError, match="truncated"):
                for batch in iterator:
                    found.append(batch)
            state = iterator.get_state()
        assert found == whole[: len(found)] and state == states[len(found)]
        assert read_from(Scripted(AWKWARD), 4, read_ahead, state)[0] == whole[len(found) :]


def test_going_back_with_the_same_iterator() -> None:
    whole, states = read_from(Scripted(AWKWARD), 4, 0)
    for read_ahead in (0, 3):
        with closing(batches(Scripted(AWKWARD), 4, read_ahead)) as iterator:
            for index in (5, 2, 7, 0):
                iterator.set_state(states[index])
                assert iterator.get_state() == states[index]
                assert [next(iterator) for _ in whole[index : index + 2]] == whole[index : index + 2]


def test_closing_ends_the_thread() -> None:
    before = set(threading.enumerate())
    iterator = batches(Scripted(AWKWARD * 50), 2, read_ahead=2)
    next(iterator)
    assert set(threading.enumerate()) - before
    iterator.close()
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("read_ahead", [0, 2])
@pytest.mark.parametrize(("batch_size", "chunk_rows"), [(16, 16), (7, 16), (40, 16), (64, 5)])
def test_synthetic(batch_size: int, chunk_rows: int, read_ahead: int) -> None:
    source = SyntheticSource(SyntheticConfig(num_examples=70, chunk_rows=chunk_rows))
    assert sum(batch.examples.num_rows for batch in assert_resumes(source, batch_size, read_ahead)) == 70


T0 = 1_649_400_000


def columns_source(folder: Path) -> Source:
    rows = [f"{i % 3},{'' if i % 4 == 2 else i},{T0 + i}" for i in range(23)]
    (folder / "events.csv").write_text("\n".join(["user,video,ts", *rows, ""]))
    named = (("user", "user_id"), ("video", "video_id"))
    paths = (str(folder / "events.csv"),)
    return ColumnsSource(ColumnsConfig(paths=paths, columns=named, time_column="ts", time_unit="s", chunk_rows=5, epochs=2))


def movielens_source(folder: Path) -> Source:
    rows = [f"{i % 5},{i},{-1 if i % 6 == 1 else 4},{T0 + 7 * i % 50}" for i in range(23)]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows, ""]))
    (folder / "movies.csv").write_text("movieId,title,genres\n1,A,Action\n")
    return MovieLensSource(MovieLensConfig(folder=str(folder), chunk_rows=5, epochs=2))


def kuairand_source(folder: Path) -> Source:
    header = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    header += "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
    for part in range(2):
        # Rows 6 to 11 of each file are bad: a whole chunk of them.
        plays = [-1 if 6 <= i < 12 else 900 * i for i in range(17)]
        rows = [
            f"{i % 3},{i},20220408,1200,{1000 * (T0 + 20 * part + i)},1,0,0,0,1,0,0,{play},9000,0,0,0,0,3"
            for i, play in enumerate(plays)
        ]
        (folder / f"log_standard_{part}.csv").write_text("\n".join([header, *rows, ""]))
    return KuaiRandSource(KuaiRandConfig(folder=str(folder), features=False, chunk_rows=3, epochs=2))


@pytest.mark.parametrize("read_ahead", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 5, 64])
@pytest.mark.parametrize("make", [columns_source, movielens_source, kuairand_source], ids=lambda make: make.__name__)
def test_files(make: object, batch_size: int, read_ahead: int, tmp_path: Path) -> None:
    whole = assert_resumes(make(tmp_path), batch_size, read_ahead)  # pyright: ignore[reportCallIssue]
    assert {batch.epoch for batch in whole} == {0, 1} and any(batch.rejected for batch in whole)


@dataclass(frozen=True)
class LiveSource:
    """Chunks of (rows, whether a batch ends behind them); the last one has a column more."""

    chunks: tuple[tuple[int, bool], ...]

    @property
    def num_examples(self) -> None:
        return None

    def read(self, position: Position) -> Iterator[Chunk]:
        for index in range(position.get("chunk", 0), len(self.chunks)):
            rows, ends = self.chunks[index]
            columns = {"row": [100 * index + row for row in range(rows)]}
            if index == len(self.chunks) - 1:
                columns["more"] = list(range(rows))
            examples = pa.RecordBatch.from_pydict(columns, pa.schema([(name, pa.int64()) for name in columns]))
            yield Chunk(examples, (), {"chunk": index + 1}, ends_batch=ends, told={"lag_s": float(index)})


def test_a_live_stream_ends_batches_that_have_waited() -> None:
    source = LiveSource(((5, False), (0, True), (9, True), (0, True), (8, True), (0, True), (2, False), (1, True)))
    whole, states = read_from(source, 8, read_ahead=2)
    sizes = [(batch.examples.num_rows, batch.is_idle) for batch in whole]
    # What ends a batch that is full already ends no further one.
    assert sizes == [(5, False), (8, False), (1, False), (0, True), (8, False), (0, True), (3, False)]
    assert [batch.told["lag_s"] for batch in whole] == [1, 2, 2, 3, 4, 5, 7]
    assert whole[-1].examples.to_pydict() == {"row": [600, 601, 700], "more": [None, None, 0]}
    for index, state in enumerate(states):
        rest, _ = read_from(source, 8, 0, state)
        assert [batch.examples.to_pylist() for batch in rest] == [batch.examples.to_pylist() for batch in whole[index:]]
