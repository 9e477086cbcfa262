"""The logs of features are followed past errors, and past what expired; who begins anew knows what who went on does."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("pypaimon")

from monolith_jax.lake.changelog import Changelog
from monolith_jax.lake.commits import TableWriter
from monolith_jax.lake.feature_changes import FeatureChanges, Following
from monolith_jax.lake.feature_history import FeatureHistory
from monolith_jax.lake.ingest import newest_of
from monolith_jax.lake.jobs import TidyConfig
from monolith_jax.lake.tables import GROUPS, Subject, key_of
from monolith_jax.lake.tidy import expire
from monolith_jax.serve.feature_cache import FeatureCache, FeatureCacheConfig
from tests.lake.feature_oracle import Change, log_of
from tests.lake.lake_of import Lake, make_lake
from tests.stream.event_log import START_MS

AT_ONCE = TidyConfig(retention_s=0.0, keep=1, orphan_s=0.0)
HOUR_MS = 3_600_000


def commit(lake: Lake, name: str, epoch: int, rows: pa.Table) -> None:
    with closing(TableWriter(lake.warehouse, name, "one")) as writer:
        writer.write(rows)
        writer.commit(epoch, {"epoch": epoch})


def write(lake: Lake, subject: Subject, epoch: int, changes: list[Change]) -> None:
    """Writes an epoch as the jobs do: each change to the log, and then the newest of each id to the table."""
    log = pa.Table.from_batches([log_of(subject, changes)])
    commit(lake, f"{subject}_features_log", epoch, log)
    time_column = GROUPS[subject][changes[0].group].time_column
    commit(lake, f"{subject}_features", epoch, newest_of(log, key_of(subject), time_column))


def upsert(lake: Lake, epoch: int, time_ms: int, countries: dict[int, str]) -> None:
    write(lake, "user", epoch, [Change(user, 0, time_ms, (country, None, None)) for user, country in countries.items()])


def countries(changes: Following) -> dict[int, str]:
    """Returns what both logs' turns bring."""
    rows = [row for _ in range(2) for _, batch in next(changes) for row in batch.to_pylist()]
    return {row["user_id"]: row["country"] for row in rows}


def cache_of(changes: FeatureChanges) -> FeatureCache:
    """Returns a cache as a server has it after its start."""
    cache = FeatureCache(FeatureCacheConfig(max_users=100, max_videos=100))
    for found in changes.whole():
        for subject, batch in found:
            cache.observe(subject, batch)
    return cache


def keep_up(cache: FeatureCache, changes: FeatureChanges) -> None:
    for subject in GROUPS:
        for _, batch in changes.poll(subject):
            cache.observe(subject, batch)


def test_what_was_there_comes_and_then_each_change(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    upsert(lake, 0, 10, {1: "at", 2: "de"})
    changes = FeatureChanges(lake.warehouse)
    whole = [(subject, row["country"]) for found in changes.whole() for subject, batch in found for row in batch.to_pylist()]
    assert set(whole) == {("user", "at"), ("user", "de")}
    following = changes.follow(0.001)
    # What the table may not have had comes again.
    assert countries(following) == {1: "at", 2: "de"}
    assert countries(following) == {}
    upsert(lake, 1, 11, {2: "ch"})
    assert countries(following) == {2: "ch"}


def shown(user: int, time_ms: int, video: int) -> Change:
    return Change(user, 1, time_ms, (video, 2, 3, None))


def test_a_server_has_what_history_has_of_two_impressions_in_one_epoch(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    write(lake, "user", 0, [shown(7, START_MS - 10_000, 100)])
    changes = FeatureChanges(lake.warehouse)
    cache = cache_of(changes)
    write(lake, "user", 1, [shown(7, START_MS, 101), shown(7, START_MS + 900, 102)])
    keep_up(cache, changes)
    again = cache_of(FeatureChanges(lake.warehouse))
    # The first of both counts, the second does not yet; then it does.
    for time_ms, video in ((START_MS + 1500, 100), (START_MS + 2500, 101), (START_MS + 2901, 102)):
        asked = pa.record_batch({"user_id": [7], "event_time_ms": [time_ms]})
        history = FeatureHistory(lake.warehouse, ["user_last_video_id"], 10).join(asked)
        assert history.column("user_last_video_id").to_pylist() == [video]
        for one in (cache, again):
            assert one.user(7, time_ms, ["user_last_video_id"]).column(0).to_pylist() == [video]


def test_a_server_that_begins_anew_has_what_one_has_that_went_on(tmp_path: Path) -> None:
    lake, changes, end_ms = make_lake(tmp_path), [], START_MS // HOUR_MS * HOUR_MS
    following = FeatureChanges(lake.warehouse)
    running = cache_of(following)
    for epoch, (group, time_ms) in enumerate(
        [(3, end_ms - HOUR_MS), (2, end_ms - 300_000), (1, end_ms - 60_000), (3, end_ms), (2, end_ms), (1, end_ms)]
    ):
        changes = [Change(video, group, time_ms, (5000 + epoch, video, 0)) for video in range(5)]
        write(lake, "video", epoch, changes)
        keep_up(running, following)
    restarted = cache_of(FeatureChanges(lake.warehouse))
    seen = set()
    for after_ms in (0, 6000, 14_000, 15_000, 15_001, 16_000, 70_000, 80_000):
        found = running.videos(np.arange(5), end_ms + after_ms)
        assert restarted.videos(np.arange(5), end_ms + after_ms).equals(found)
        seen |= {*found.column("video_views_1d").to_pylist()}
    assert seen == {5000, 5003}


def test_nothing_is_lost_that_only_the_log_has_yet(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    upsert(lake, 0, START_MS, {1: "at"})
    # Long before in event time, but committed just now; its table follows when the server has read it.
    old = Change(2, 0, START_MS - 10 * HOUR_MS, ("de", None, None))
    commit(lake, "user_features_log", 1, pa.Table.from_batches([log_of("user", [old])]))
    changes = FeatureChanges(lake.warehouse)
    cache = cache_of(changes)
    commit(lake, "user_features", 1, pa.Table.from_batches([log_of("user", [old])]))
    keep_up(cache, changes)
    assert cache.user(2, START_MS, ["user_country"]).column(0).to_pylist() == ["de"]


def test_an_error_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = make_lake(tmp_path)
    following = FeatureChanges(lake.warehouse).follow(0.001)
    upsert(lake, 0, 10, {1: "at"})

    def away(self: Any) -> Any:
        raise OSError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(Changelog, "poll", away)
        for _ in range(3):
            with pytest.raises(OSError, match="away"):
                next(following)
    upsert(lake, 1, 11, {2: "de"})
    assert countries(following) == {1: "at", 2: "de"}


def test_who_was_away_for_too_long_reads_what_the_table_holds(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    following = FeatureChanges(lake.warehouse).follow(0.001)
    for epoch, country in enumerate(("at", "ch", "de")):
        upsert(lake, epoch, 10 + epoch, {1: country, 10 + epoch: country})
    assert expire(lake.warehouse, "user_features_log", AT_ONCE)[0] > 0
    assert countries(following) == {1: "de", 10: "at", 11: "ch", 12: "de"}
    upsert(lake, 3, 13, {1: "fr"})
    # The last epoch comes again: its table may have been behind.
    assert countries(following) == {1: "fr", 12: "de"}
    assert countries(following) == {}
