import threading
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.lake.tables import Subject
from monolith_jax.serve.feature_cache import Changes, FeatureCache, FeatureCacheConfig, feature_cache_bytes
from tests.lake.feature_oracle import Change, Oracle, log_of

CONFIG = FeatureCacheConfig(max_users=20, max_videos=2000)
COUNTS = ["video_views_1d", "video_completes_1d", "video_likes_1d", "video_counts_1d_ms"]
HOUR_MS = 3_600_000


def counts(ids: np.ndarray, time_ms: int, value: int) -> pa.RecordBatch:
    columns = {name: np.full(ids.size, value) for name in ("views_1d", "completes_1d", "likes_1d")}
    return pa.record_batch({"video_id": ids, "counts_1d_ms": np.full(ids.size, time_ms), **columns})


@pytest.mark.usefixtures("at_once")
def test_a_request_sees_what_was_before_it() -> None:
    cache = FeatureCache(CONFIG)
    oracles: dict[Subject, Oracle] = {"user": Oracle("user"), "video": Oracle("video")}
    changes: dict[Subject, list[Change]] = {
        "user": [Change(1, 0, 10, ("at", "de", 3)), Change(1, 1, 30, (5, 6, 7, [1, 2])), Change(1, 0, 40, (None, None, None))],
        "video": [
            Change(id, group, 10 + id, values) for id in range(5) for group, values in ((1, (id, 1, 0)), (3, (9, id, 2)))
        ],
    }
    for subject, of_subject in changes.items():
        cache.observe(subject, log_of(subject, of_subject))
        oracles[subject].apply(of_subject)
    for time_ms in (10, 11, 12, 35, 41, 100_000):
        assert cache.user(1, time_ms).to_pydict() == oracles["user"].as_of([1], [time_ms])
        ids = np.array([3, 0, 7, 3])
        assert cache.videos(ids, time_ms).to_pydict() == oracles["video"].as_of(ids.tolist(), [time_ms] * 4)
    wanted = ["video_likes_1d", "video_known"]
    assert cache.videos(ids, 12, wanted).to_pydict() == {
        "video_likes_1d": [0, 2, 0, 0],
        "video_known": [False, True, False, False],
    }
    assert cache.metrics()["videos"]["latest_ms"] == 14 and cache.metrics()["users"]["rows"] == 1
    assert cache.nbytes == feature_cache_bytes(CONFIG) > 2000 * 500


def test_a_lookup_beside_changes_sees_whole_rows() -> None:
    cache, ids, over = FeatureCache(CONFIG), np.arange(1000), threading.Event()
    cache.observe("video", counts(ids, 1, 1))

    def write() -> None:
        value = 2
        while not over.is_set():
            cache.observe("video", counts(ids, value, value))
            value += 1

    writer = threading.Thread(target=write)
    writer.start()
    last = np.zeros(1000, np.int64)
    for _ in range(200):
        found = [column.to_numpy() for column in cache.videos(ids, HOUR_MS, COUNTS).columns]
        assert all(np.array_equal(column, found[0]) for column in found)
        assert (found[0] >= last).all()
        last = found[0]
    over.set()
    writer.join()
    assert last.min() > 1


class Reader:
    """Yields changes, an error among them, then nothing for long."""

    def __init__(self) -> None:
        self.told: list[Changes | Exception] = [
            [("video", counts(np.arange(3), 5, 1)), ("user", log_of("user", [Change(1, 0, 5, ("at", "de", 3))]))],
            OSError("the store is away"),
            [("video", pa.record_batch({"video_id": ["x"]}))],
            [("video", counts(np.arange(3), 6, 2))],
        ]

    def __iter__(self) -> Iterator[Changes]:
        return self

    def __next__(self) -> Changes:
        time.sleep(0.001)
        found = self.told.pop(0) if self.told else []
        if isinstance(found, Exception):
            raise found
        return found


@pytest.mark.usefixtures("at_once")
def test_a_thread_follows_a_reader_past_its_errors() -> None:
    cache = FeatureCache(CONFIG)
    reader = Reader()
    cache.follow(iter(reader), retry_s=0.001)
    end_s = time.monotonic() + 20
    while cache.latest_ms["video"] < 6 and time.monotonic() < end_s:
        time.sleep(0.005)
    assert cache.videos(np.arange(3), 7, COUNTS[:1]).column(0).to_pylist() == [2, 2, 2]
    assert cache.user(1, 7, ["user_country"]).column(0).to_pylist() == ["at"]
    metrics = cache.metrics()
    assert metrics["faults"] == 2 and "video_id" in metrics["last_fault"] and not metrics["has_ended"]
    cache.close()
    cache.close()


def test_the_end_of_a_reader_is_told() -> None:
    cache = FeatureCache(CONFIG)
    told: list[Changes] = [[("video", counts(np.arange(3), 5, 1))]]
    cache.follow(iter(told))
    end_s = time.monotonic() + 20
    while not cache.metrics()["has_ended"] and time.monotonic() < end_s:
        time.sleep(0.005)
    assert cache.metrics()["has_ended"] and cache.metrics()["videos"]["rows"] == 3
    cache.close()


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FeatureCacheConfig(max_videos=0)
