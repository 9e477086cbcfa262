"""From the log to the lake: every event once, features as the events tell them, whatever is interrupted."""

import itertools
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.ingest import TABLES, Ingest
from monolith_jax.lake.tables import WINDOWS
from monolith_jax.stream.events import ACTION, COMPLETE_RATIO, IMPRESSION
from monolith_jax.stream.formats import announce, encode
from monolith_jax.stream.log import LogPartition
from tests.lake.lake_of import FEW_BYTES, Lake, make_lake, sorted_rows
from tests.stream.event_log import START_MS, World, make_world

WORLD = make_world(1200, step_ms=400)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Returns a lake into which a world was brought without interruption."""
    lake = make_lake(tmp_path_factory.mktemp("whole"))
    with closing(lake.feed()) as feed:
        feed.send_world(WORLD)
    assert lake.ingest() > 5
    return lake


def test_every_event_is_there_once_with_its_place_in_the_log(whole: Lake) -> None:
    rows = whole.rows("events")
    found = Counter((row["topic"], row["request_id"], row["video_id"], row["action"], row["event_time_ms"]) for row in rows)
    expected = Counter(
        ("impressions", row["request_id"], row["video_id"], None, row["event_time_ms"]) for row in WORLD.impressions
    )
    expected += Counter(
        ("actions", row["request_id"], row["video_id"], row["action"], row["event_time_ms"]) for row in WORLD.actions
    )
    assert found == expected
    assert {row["day"] for row in rows} == {"2023-11-14"}
    places = {(row["topic"], row["log_partition"], row["log_offset"]) for row in rows}
    for topic, partition in itertools.product(("impressions", "actions"), range(4)):
        offsets = sorted(offset for one, number, offset in places if (one, number) == (topic, partition))
        assert offsets == list(range(len(offsets))) and offsets


def test_the_activity_of_a_user_is_the_last_impression(whole: Lake) -> None:
    last: dict[int, dict[str, Any]] = {}
    for row in WORLD.impressions:
        if row["event_time_ms"] >= last.get(row["user_id"], row)["event_time_ms"]:
            last[row["user_id"]] = row
    rows = whole.rows("user_features")
    assert {row["user_id"]: (row["activity_ms"], row["last_video_id"], row["last_tag_id"]) for row in rows} == {
        user: (row["event_time_ms"], row["video_id"], row["tag_id"]) for user, row in last.items()
    }
    assert all(row["profile_ms"] is None and row["country"] is None for row in rows), "the columns of another stream"
    log = whole.rows("user_features_log")
    assert Counter((row["user_id"], row["event_time_ms"]) for row in log) == Counter(
        (row["user_id"], row["event_time_ms"]) for row in WORLD.impressions
    )


def counted(world: World) -> Counter[tuple[str, int, int, str]]:
    """Returns how often what happened to each video in each window, by its end."""
    shown = {(row["request_id"], row["video_id"]): row for row in world.impressions}
    things = [("views", row) for row in world.impressions]
    things += [("likes", row) for row in world.actions if row["action"] == "like"]
    for row in world.actions:
        impression = shown[row["request_id"], row["video_id"]]
        was_shown = row["event_time_ms"] >= impression["event_time_ms"]
        if row["action"] == "play" and was_shown and row["value"] >= COMPLETE_RATIO * impression["duration_ms"]:
            things.append(("completes", row))
    counts: Counter[tuple[str, int, int, str]] = Counter()
    for name, row in things:
        for window in WINDOWS:
            first = row["event_time_ms"] // window.slide_ms * window.slide_ms + window.slide_ms
            for end in range(first, first + window.size_ms, window.slide_ms):
                counts[window.name, row["video_id"], end, name] += 1
    return counts


def test_the_counts_of_videos_are_those_of_the_windows_that_have_ended(whole: Lake) -> None:
    expected, found = counted(WORLD), Counter()
    newest = max(row["event_time_ms"] for row in WORLD.actions)
    for row in whole.rows("video_features_log"):
        (window,) = (one.name for one in WINDOWS if row[f"counts_{one.name}_ms"] is not None)
        assert row[f"counts_{window}_ms"] == row["event_time_ms"] < newest
        for name in ("views", "completes", "likes"):
            if row[f"{name}_{window}"]:
                found[window, row["video_id"], row["event_time_ms"], name] += row[f"{name}_{window}"]
    told = {key[:3] for key in found}
    assert found and found == Counter({key: count for key, count in expected.items() if key[:3] in told})
    ended = {key for key in expected if key[2] < newest - 10_000}
    assert len(ended) > 1000 and ended <= set(found), "no window is missing that ended well before the end"
    merged = {row["video_id"]: row for row in whole.rows("video_features")}
    last = max(end for window, _, end, _ in found if window == "5m")
    for (window, video, end, name), count in found.items():
        if (window, end) == ("5m", last):
            assert (merged[video]["counts_5m_ms"], merged[video][f"{name}_5m"]) == (last, count)


def test_started_again_it_brings_nothing_twice(whole: Lake) -> None:
    before = {name: sorted_rows(whole.rows(name)) for name in TABLES}
    assert whole.ingest() > 5
    assert {name: sorted_rows(whole.rows(name)) for name in TABLES} == before


class Crash(Exception):
    """Ends an ingest between two lines."""


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("when", [0, 1, 2, 3, 4, 5, 8, 13])
def test_a_crash_at_any_commit_changes_nothing(
    tmp_path: Path, whole: Lake, monkeypatch: pytest.MonkeyPatch, when: int, saved: bool
) -> None:
    if saved and when % 4:
        pytest.skip("a few of these are enough")
    if saved:
        monkeypatch.setattr("monolith_jax.lake.video_counts.SAVE_EVERY_S", 0.0)
    lake, count, commit = make_lake(tmp_path), itertools.count(), TableWriter.commit
    with closing(lake.feed()) as feed:
        feed.send_world(WORLD)

    def crashes(writer: TableWriter, *arguments: Any) -> None:
        number = next(count)
        if number == when:
            raise Crash
        commit(writer, *arguments)
        if number == when + 1 - 2 * (when % 2):  # Odd ones crash behind a commit.
            raise Crash

    monkeypatch.setattr(TableWriter, "commit", crashes)
    with pytest.raises(Crash):
        lake.ingest()
    monkeypatch.setattr(TableWriter, "commit", commit)
    lake.ingest(FEW_BYTES // 2)
    for name in ("events", "user_features", "user_features_log"):
        assert sorted_rows(lake.rows(name)) == sorted_rows(whole.rows(name)), name
    # Which windows have ended, the epochs decide: no row is other, none is there twice, and the last ones may come later.
    for name in ("video_features_log",):
        mine, theirs = Counter(sorted_rows(lake.rows(name))), Counter(sorted_rows(whole.rows(name)))
        assert max(mine.values()) == 1 and not mine - theirs and sum((theirs - mine).values()) < 0.2 * len(theirs)


def test_columns_that_impressions_were_logged_with_come_along(tmp_path: Path) -> None:
    lake, world = make_lake(tmp_path), make_world(60)
    schema = pa.schema([*IMPRESSION, pa.field("user_country", pa.string()), pa.field("video_views_1h", pa.int64())])
    with closing(lake.feed()) as feed:
        feed.send("impressions", world.impressions[:30])
        feed.producer.flush()
        assert lake.ingest() == 1
        further = [row | {"user_country": "at", "video_views_1h": 3} for row in world.impressions[30:]]
        feed.send("impressions", further, schema)
        feed.producer.flush()
    assert lake.ingest() == 2
    assert Counter(row["user_country"] for row in lake.rows("events")) == {None: 30, "at": 30}


def test_bad_messages_are_set_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, world = make_lake(tmp_path), make_world(100)
    with closing(lake.feed()) as feed:
        feed.send("impressions", world.impressions[:50])
        feed.producer.append(LogPartition("impressions", 1), b"garbage")
        feed.send("actions", [*world.actions[:20], world.actions[20] | {"action": "stare"}])
        feed.producer.flush()
        commit = TableWriter.commit

        def crashes(writer: TableWriter, *arguments: Any) -> None:
            commit(writer, *arguments)
            raise Crash

        monkeypatch.setattr(TableWriter, "commit", crashes)
        with pytest.raises(Crash):
            lake.ingest(1 << 30)
        monkeypatch.setattr(TableWriter, "commit", commit)
        lake.ingest()
    assert len(lake.rows("events")) == 70
    assert len((tmp_path / "dead_letters.jsonl").read_text().splitlines()) == 2


def test_a_second_ingest_is_refused(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    with closing(lake.feed()) as feed:
        feed.send_world(make_world(50))
        with closing(lake.open_ingest()) as one:
            with pytest.raises(ValueError, match=r"a job of launch\.lake runs once"):
                lake.open_ingest()
            assert one.step(0.2, 1 << 30)
    assert len(lake.rows("events")) == len(make_world(50).impressions) + len(make_world(50).actions)


def test_a_log_that_lost_what_was_not_read_is_refused(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    with closing(lake.feed()) as feed:
        feed.send_world(make_world(50))
    lake.ingest()
    other = make_lake(tmp_path / "other")
    with closing(other.feed()) as feed:
        feed.send_world(make_world(2))
    import dataclasses

    moved = dataclasses.replace(lake, folder=tmp_path / "other")
    (tmp_path / "other" / "warehouse").rename(tmp_path / "gone")
    (tmp_path / "warehouse").rename(tmp_path / "other" / "warehouse")
    with pytest.raises(ValueError, match="retention"):
        moved.open_ingest()


def test_after_a_good_end_the_log_need_not_reach_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, world = make_lake(tmp_path), make_world(200, step_ms=2000)
    with closing(lake.feed()) as feed:
        feed.send_world(World(world.impressions[:100], world.actions[:100], {}))
        lake.ingest()
        monkeypatch.setattr(Ingest, "_again", lambda *_: pytest.fail("it reads the log again"))
        feed.send_world(World(world.impressions[100:], world.actions[100:], {}))
        lake.ingest()
    other = make_lake(tmp_path / "other")
    with closing(other.feed()) as feed:
        feed.send_world(world)
        other.ingest()
    for name in TABLES:
        assert sorted_rows(lake.rows(name)) == sorted_rows(other.rows(name)), name


def test_a_clock_that_is_ahead_closes_no_windows(tmp_path: Path) -> None:
    lake, at_ms = make_lake(tmp_path), START_MS // 60_000 * 60_000
    with closing(lake.feed(partitions=1)) as feed:
        number = announce(feed.producer, feed.schemas["impressions"], "impressions", IMPRESSION)
        for place, ahead_ms in enumerate((0, 3_000_000, 0)):
            row = {"event_time_ms": at_ms + 1000 * place + ahead_ms, "request_id": place, "user_id": 1, "video_id": 1}
            (payload,) = encode(pa.RecordBatch.from_pylist([row], IMPRESSION), "arrow")
            feed.producer.append(LogPartition("impressions", 0), payload, number, at_ms + 1000 * place)
            feed.producer.flush()
            lake.ingest()
    assert len(lake.rows("events")) == 3 and not lake.rows("video_features_log")


def test_columns_that_the_table_cannot_take_are_told(tmp_path: Path) -> None:
    lake, world = make_lake(tmp_path), make_world(40)
    fields = [pa.field("day", pa.string()), pa.field("origin", pa.string()), pa.field("took", pa.duration("ms"))]
    more = {"day": "monday", "origin": "web", "took": 5}
    with closing(lake.feed()) as feed:
        feed.send("impressions", [row | more for row in world.impressions], pa.schema([*IMPRESSION, *fields]))
        feed.send(
            "actions", [row | {"origin": 7} for row in world.actions], pa.schema([*ACTION, pa.field("origin", pa.int64())])
        )
        feed.producer.flush()
    with closing(lake.open_ingest()) as ingest:
        ingest.step(0.2, 1 << 30)
        assert ingest.not_kept == {"day", "took"}
    rows = lake.rows("events")
    assert Counter((row["topic"], row["origin"]) for row in rows) == {
        ("impressions", "web"): 40,
        ("actions", None): len(world.actions),
    }
    assert {row["day"] for row in rows} == {"2023-11-14"}
    assert lake.examples() == 40
    assert "monday" not in {row["day"] for row in lake.rows("examples")}
