"""A table as it grows: each row once, in order, and nothing of what merely rewrites it."""

import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from monolith_jax.lake import tidy
from monolith_jax.lake.changelog import Changelog, Moment, read_at
from monolith_jax.lake.commits import NOTHING, TableWriter, last_commit
from monolith_jax.lake.jobs import TidyConfig
from monolith_jax.lake.tidy import compact, expire, tidy_table
from monolith_jax.lake.versions import FeatureState
from monolith_jax.lake.warehouse import add_columns, open_table
from tests.lake.lake_of import Lake, make_lake, sorted_rows
from tests.stream.event_log import World, make_world

AT_ONCE = TidyConfig(retention_s=0.0, keep=1, orphan_s=0.0, most_files=2)


def upsert(lake: Lake, writer: str, epoch: int, rows: list[dict[str, Any]], name: str = "user_features") -> None:
    with closing(TableWriter(lake.warehouse, name, writer)) as one:
        one.write(pa.Table.from_pylist(rows, one.schema))
        one.commit(epoch, {"epoch": epoch})


def user(number: int, time_ms: int, country: str | None) -> dict[str, Any]:
    return {"user_id": number, "profile_ms": time_ms, "country": country}


def test_each_change_comes_once_and_compaction_brings_nothing(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    follower = lake.changelog("user_features", 0)
    assert follower.poll().rows.num_rows == 0
    upsert(lake, "one", 0, [user(1, 10, "at"), user(2, 10, "de")])
    upsert(lake, "other", 0, [{"user_id": 1, "activity_ms": 5, "last_video_id": 7}])
    changes = follower.poll()
    assert sorted_rows(changes.rows.select(["user_id", "country", "last_video_id"]).to_pylist()) == sorted_rows(
        [
            {"user_id": 1, "country": "at", "last_video_id": None},
            {"user_id": 1, "country": None, "last_video_id": 7},
            {"user_id": 2, "country": "de", "last_video_id": None},
        ]
    )
    upsert(lake, "one", 1, [user(1, 9, "late")])
    before = sorted_rows(lake.rows("user_features"))
    assert compact(lake.warehouse, "user_features", AT_ONCE)[0] > compact(lake.warehouse, "user_features", AT_ONCE)[0]
    assert sorted_rows(lake.rows("user_features")) == before
    upsert(lake, "one", 2, [user(1, 11, None)])
    later = follower.poll()
    assert [row["country"] for row in later.rows.to_pylist()] == ["late", None] and later.snapshot > changes.snapshot
    again = lake.changelog("user_features", changes.snapshot)
    assert again.poll().rows.to_pylist() == later.rows.to_pylist(), "from a position that was kept"
    assert follower.poll().rows.num_rows == 0


def test_following_from_what_is_there_leads_to_what_the_table_holds(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    with closing(lake.feed()) as feed:
        feed.send_world(make_world(300))
        lake.ingest()
        follower, state = lake.changelog("user_features"), FeatureState("user", 1000)
        for batch in follower.whole().to_batches():
            state.apply(batch)
        feed.send_world(make_world(300, seed=1))
        lake.ingest()
    for batch in follower.poll().rows.to_batches():
        state.apply(batch)
    import numpy as np

    rows = {row["user_id"]: row for row in lake.rows("user_features")}
    ids = np.array(sorted(rows))
    found = state.as_of(ids, np.full(ids.size, 1 << 60)).to_pylist()
    for number, one in zip(ids.tolist(), found, strict=True):
        assert one["user_last_video_id"] == rows[number]["last_video_id"]
        assert one["user_last_tag_id"] == rows[number]["last_tag_id"] and one["user_country"] is None


def test_a_follower_that_was_away_for_too_long_is_told(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    upsert(lake, "one", 0, [user(1, 10, "at")])
    follower = lake.changelog("user_features", 0)
    for epoch in (1, 2):
        upsert(lake, "one", epoch, [user(1, 10 + epoch, "de")])
    assert expire(lake.warehouse, "user_features", AT_ONCE)[0] == 2
    with pytest.raises(ValueError, match="the next one has expired"):
        follower.poll()
    with pytest.raises(ValueError, match="no column height"):
        Changelog(lake.warehouse, "user_features", None, ("height",))


def test_expiry_keeps_what_is_tagged_read_and_told(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    upsert(lake, "quiet", 0, [user(1, 1, "at")])
    for epoch in range(4):
        upsert(lake, "busy", epoch, [user(2, epoch, str(epoch))])
    open_table(lake.warehouse, "user_features").create_tag("then")
    tagged = sorted_rows(lake.rows("user_features"))
    for epoch in range(4, 12):
        upsert(lake, "busy", epoch, [user(2, epoch, str(epoch)), user(epoch, epoch, "x")])
    reader = lake.table("user_features")
    table = open_table(lake.warehouse, "user_features")
    done = tidy_table(lake.warehouse, "user_features", AT_ONCE)
    assert done.files_before > done.files_after and done.snapshots_expired >= 11 and done.files_removed > 10
    assert sorted_rows(lake.rows("user_features")) == sorted_rows(reader.to_pylist())
    moment = Moment(table.tag_manager().get("then").id, "then")
    assert sorted_rows(read_at(table, moment).to_pylist()) == tagged
    assert last_commit(open_table(lake.warehouse, "user_features"), "busy").epoch == 11
    # Writers go on, although the snapshots that told where they were are gone; and new ones begin.
    for writer, epoch in (("quiet", 0), ("busy", 11)):
        assert last_commit(open_table(lake.warehouse, "user_features"), writer).told == {"epoch": epoch}
    assert last_commit(open_table(lake.warehouse, "user_features"), "new") == NOTHING
    upsert(lake, "busy", 12, [user(3, 99, "goes on")])
    upsert(lake, "quiet", 0, [user(3, 100, "was there already")])
    upsert(lake, "new", 0, [user(4, 4, "x")])
    assert len(lake.rows("user_features")) == 11


def test_what_a_crash_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    upsert(lake, "one", 0, [user(1, 10, "at")])
    folder = next(Path(lake.warehouse.path).rglob("data-*")).parent
    (folder / "data-of-a-crash.parquet").write_bytes(b"x")
    assert expire(lake.warehouse, "user_features", TidyConfig()) == (0, 0)
    assert expire(lake.warehouse, "user_features", AT_ONCE) == (0, 1)
    assert len(lake.rows("user_features")) == 1


def test_compaction_of_appended_rows_keeps_their_order_and_what_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, world = make_lake(tmp_path), make_world(2000)
    first_ms = world.impressions[1500]["event_time_ms"]
    first, rest = ([row for row in world.actions if (row["event_time_ms"] < first_ms) == one] for one in (True, False))
    with closing(lake.feed()) as feed:
        feed.send_world(World(world.impressions[:1500], first, {}))
        lake.examples(most_rows=40)
        before = lake.table("examples").sort_by("stream_row")
        rewrite, writers = tidy._rewrite, []

        def slow(*arguments: Any) -> int:
            feed.send_world(World(world.impressions[1500:], rest, {}))
            writers.append(threading.Thread(target=lake.examples))
            writers[-1].start()
            time.sleep(1.0)
            assert writers[-1].is_alive(), "writers wait"
            return rewrite(*arguments)

        monkeypatch.setattr(tidy, "_rewrite", slow)
        files, left = compact(lake.warehouse, "examples", AT_ONCE)
        assert files > 5 and left == 1 and len(writers) == 1
        writers[0].join()
    after = lake.table("examples").sort_by("stream_row")
    assert after.num_rows > before.num_rows == 1500 and after.slice(0, 1500).to_pylist() == before.to_pylist()
    table = open_table(lake.warehouse, "examples")
    assert "tidy" in {one.commit_user for one in table.snapshot_manager().list_snapshots()}
    lake.examples()
    assert lake.table("examples").num_rows == after.num_rows, "its writer goes on behind it"


def test_columns_that_came_later_are_null_before(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    upsert(
        lake,
        "one",
        0,
        [{"day": "2026-01-01", "part": 0, "stream_row": 0, "event_time_ms": 1, "user_id": 1, "video_id": 1}],
        "examples",
    )
    old = lake.changelog("examples", 0)
    add_columns(lake.warehouse, "examples", [pa.field("further", pa.float64())])
    row = {"day": "2026-01-01", "part": 0, "stream_row": 1, "event_time_ms": 1, "user_id": 1, "video_id": 1, "further": 0.5}
    upsert(lake, "one", 1, [row], "examples")
    assert [one["further"] for one in lake.rows("examples")] == [None, 0.5]
    assert old.poll().rows.num_rows == 2


def test_rows_of_equal_times_stay_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    with closing(TableWriter(lake.warehouse, "user_features_log", "one")) as writer:
        for epoch in range(80):
            row = {"event_time_ms": 5, "day": "1970-01-01", "user_id": 1, "activity_ms": 5, "last_video_id": epoch}
            writer.write(pa.Table.from_pylist([row], writer.schema))
            writer.commit(epoch, {})
    assert compact(lake.warehouse, "user_features_log", AT_ONCE) == (80, 1)
    rows = [row["last_video_id"] for row in lake.rows("user_features_log")]
    assert rows == list(range(80))
