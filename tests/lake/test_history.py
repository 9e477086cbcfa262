"""From the lake to training: each example once, in the order of the stream, and on from the log where history ends."""

import dataclasses
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.history import LakeConfig, LakeSource
from monolith_jax.lake.jobs import TidyConfig
from monolith_jax.lake.tidy import tidy_table
from monolith_jax.lake.warehouse import open_table
from monolith_jax.stream.log_source import LogSource
from monolith_jax.types import Chunk
from tests.lake.lake_of import Lake, make_lake
from tests.stream.event_log import START_MS, World, found_in, make_world

WORLD = make_world(1500)


def halves(world: World) -> tuple[World, World]:
    """Returns the world up to about its middle, in the order of the log, and the rest."""
    parts = []
    for part in (slice(None, 700), slice(700, None)):
        times = world.impressions[700]["event_time_ms"]
        actions = [row for row in world.actions if (row["event_time_ms"] < times) == (part.start is None)]
        parts.append(World(world.impressions[part], actions, {}))
    return parts[0], parts[1]


def send(lake: Lake, world: World) -> None:
    with closing(lake.feed()) as feed:
        feed.send_world(world)


def source(lake: Lake, index: int = 0, number: int = 1, run: str = "run", **fields: Any) -> LakeSource:
    config = LakeConfig(warehouse=lake.warehouse, **fields)
    return LakeSource(config, lake.folder / run / str(index), 32, index, number)


def chunks_of(one: LakeSource | LogSource, position: Any = None) -> list[Chunk]:
    return list(one.read(json.loads(json.dumps(position or {}))))


def examples_of(chunks: list[Chunk]) -> list[pa.RecordBatch]:
    return [chunk.examples for chunk in chunks if chunk.examples.num_rows]


def plain(chunks: list[Chunk]) -> list[Any]:
    return [(one.examples.to_pydict(), one.rejected, one.position, one.ends_batch) for one in chunks]


@pytest.mark.parametrize("parts", [1, 2])
def test_all_examples_are_there_in_the_order_of_the_stream(tmp_path: Path, parts: int) -> None:
    lake = make_lake(tmp_path)
    send(lake, WORLD)
    assert lake.examples(parts) == 1500
    rows = lake.table("examples").sort_by([("part", "ascending"), ("stream_row", "ascending")]).to_pylist()
    for part in range(parts):
        mine = [row for row in rows if row["part"] == part]
        assert [row["stream_row"] for row in mine] == list(range(len(mine)))
        live = LogSource(lake.log(), tmp_path / f"live{part}", 32, part, parts)
        expected = [row for batch in examples_of(chunks_of(live)) for row in batch.to_pylist()]
        assert [{name: row[name] for name in expected[0]} for row in mine] == expected
    assert found_in(examples_of(chunks_of(source(lake)))) == WORLD.examples
    assert source(lake).num_examples == 1500


@pytest.mark.parametrize("parts", [1, 2])
def test_the_stream_goes_on_from_the_log_where_history_ends(tmp_path: Path, parts: int) -> None:
    lake, (first, rest) = make_lake(tmp_path), halves(WORLD)
    send(lake, first)
    # Without an end windows stay open: those of the last three seconds are history's no more than the log's.
    with closing(_examples(lake, parts)) as examples:
        while sum(part.rows for part in examples._parts) < 300:
            examples.step(0.5, 100)
    history = sum(len(batch) for batch in examples_of(chunks_of(source(lake))))
    assert 300 <= history < 700
    send(lake, rest)
    found, live = [], []
    for index in range(parts):
        chunks = chunks_of(source(lake, index, parts, log=lake.log()))
        assert sum("log" in chunk.position for chunk in chunks) > 5
        found += examples_of(chunks)
        # One that reads the log alone, by the cuts of history and then those of the run, learns the same in the same order.
        whole = LogSource(lake.log(), _cuts_of(lake, index, parts, tmp_path), 32, index, parts)
        live.append([row for batch in examples_of(chunks_of(whole)) for row in batch.to_pylist()])
        mine = [row for batch in examples_of(chunks) for row in batch.to_pylist()]
        assert [{name: row[name] for name in live[-1][0]} for row in mine] == live[-1]
        for at in (0, 1, len(chunks) // 2, len(chunks) - 2):
            again = source(lake, index, parts, log=lake.log())
            assert plain(chunks_of(again, chunks[at].position)) == plain(chunks[at + 1 :]), "from any position"
    assert found_in(found) == WORLD.examples, "no gap, no overlap"


def _examples(lake: Lake, parts: int) -> Any:
    from monolith_jax.lake.examples import Examples
    from monolith_jax.stream.dead_letter import DeadLetters

    letters = DeadLetters(lake.folder / "dead_letters.examples.jsonl")
    return Examples(lake.log(ends=False), lake.warehouse, lake.folder / "joined", letters, parts)


def _cuts_of(lake: Lake, index: int, parts: int, tmp_path: Path) -> Path:
    """Returns a cut log of all cuts: those of history, and behind them those of the run."""
    from monolith_jax.lake.cut_files import hand_over
    from monolith_jax.lake.history import moment_of, told_at
    from monolith_jax.stream.cuts import CutLog

    table = open_table(lake.warehouse, "examples")
    told = told_at(table, moment_of(table, ""))["parts"][str(index)]
    files = sorted(Path(table.table_path, "cuts").glob(f"{index}-*.jsonl"))
    epochs = [[int(path.stem.split("-")[1]), 0, path.stem.split("-")[2]] for path in files]
    whole = {"position": {**told["position"], "rewind": 0}, "epochs": epochs}
    folder = tmp_path / f"whole{index}"
    hand_over(table, index, whole, folder)
    with closing(CutLog(lake.folder / "run" / str(index))) as run, closing(CutLog(folder)) as log:
        for cut in run.read(log.bounds[1], run.bounds[1]):
            log.append(cut)
    return folder


def test_a_crash_of_the_join_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = make_lake(tmp_path)
    send(lake, WORLD)
    commit, count = TableWriter.commit, 0

    def crashes(writer: TableWriter, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise ZeroDivisionError
        commit(writer, *arguments)
        if count % 3 == 1:
            raise ZeroDivisionError

    monkeypatch.setattr(TableWriter, "commit", crashes)
    for _ in range(4):
        with pytest.raises(ZeroDivisionError):
            lake.examples()
    monkeypatch.setattr(TableWriter, "commit", commit)
    lake.examples()
    assert found_in(examples_of(chunks_of(source(lake)))) == WORLD.examples


def test_history_is_as_it_was(tmp_path: Path) -> None:
    lake, (first, rest) = make_lake(tmp_path), halves(WORLD)
    send(lake, first)
    lake.examples()
    table = open_table(lake.warehouse, "examples")
    then = table.snapshot_manager().get_latest_snapshot()
    table.create_tag("then")
    send(lake, rest)
    other = make_lake(tmp_path / "other")
    assert chunks_of(source(other)) == []
    old = found_in(examples_of(chunks_of(source(lake))))
    assert len(old) == 700
    with closing(_examples(lake, 1)) as examples:
        assert examples.step(1.0, 1000)
    assert len(found_in(examples_of(chunks_of(source(lake))))) > 700
    for as_of in ("then", str(then.id), _time(then.time_millis)):
        assert found_in(examples_of(chunks_of(source(lake, as_of=as_of)))) == old, as_of
    for as_of, why in (("99", "has expired or was never there"), ("2001-01-01T00:00:00", "as old as"), ("now", "write a time")):
        with pytest.raises(ValueError, match=why):
            chunks_of(source(lake, as_of=as_of))


def _time(time_ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat()


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    send(lake, WORLD)
    lake.examples()
    (chunk, *_) = chunks_of(source(lake, columns=("user_id", "like")))
    assert chunk.examples.schema.names == ["event_time_ms", "user_id", "like"]
    from datetime import UTC, datetime

    begin_ms = START_MS + 7000
    late = source(lake, begin=datetime.fromtimestamp(begin_ms / 1000, UTC).isoformat())
    times = [row for batch in examples_of(chunks_of(late)) for row in batch.to_pydict()["event_time_ms"]]
    assert sorted(times) == sorted(one["event_time_ms"] for one in WORLD.examples.values() if one["event_time_ms"] >= begin_ms)
    with pytest.raises(ValueError, match="no column country"):
        chunks_of(source(lake, columns=("country",)))
    with pytest.raises(ValueError, match=r"partitions of the stream, which 2 of the run"):
        chunks_of(source(lake, 0, 2))
    with pytest.raises(ValueError, match="their number stays"):
        lake.examples(2)
    with pytest.raises(ValueError, match="joined is for history alone"):
        dataclasses.replace(late.config, joined=("user_country",), log=lake.log())
    alone = dataclasses.replace(late.config, joined=("user_country",), log=lake.log(), follow=False)
    assert alone.live is None
    with pytest.raises(ValueError, match="no table"):
        chunks_of(LakeSource(dataclasses.replace(late.config, warehouse=_elsewhere(lake)), tmp_path, 32))


def _elsewhere(lake: Lake) -> Any:
    return dataclasses.replace(lake.warehouse, path=str(lake.folder / "nowhere"))


def test_a_tag_keeps_all_that_going_on_from_it_needs(tmp_path: Path) -> None:
    lake, (first, rest) = make_lake(tmp_path), halves(WORLD)
    at_once = TidyConfig(retention_s=0.0, keep=1, orphan_s=0.0)
    send(lake, first)
    with closing(_examples(lake, 1)) as examples:
        while sum(part.rows for part in examples._parts) < 300:
            examples.step(0.5, 50)
    tidy_table(lake.warehouse, "examples", at_once)
    table = open_table(lake.warehouse, "examples")
    assert table.snapshot_manager().get_latest_snapshot().commit_user == "tidy", "the tag is of a snapshot of tidying"
    table.create_tag("then")
    send(lake, rest)
    with closing(_examples(lake, 1)) as examples:
        for _ in range(3):
            examples.step(0.5, 100)
    tidy_table(lake.warehouse, "examples", at_once)
    chunks = chunks_of(source(lake, as_of="then", log=lake.log()))
    assert sum("log" in chunk.position for chunk in chunks) > 5
    assert found_in(examples_of(chunks)) == WORLD.examples


def test_a_second_join_is_refused_before_it_touches_anything(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    send(lake, WORLD)
    with closing(_examples(lake, 1)) as examples:
        examples.step(0.5, 100)
        with pytest.raises(ValueError, match="another process runs 'examples'"):
            _examples(lake, 1)
        examples.step(0.5, 100)
    lake.examples()
    assert found_in(examples_of(chunks_of(source(lake)))) == WORLD.examples
