import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from monolith_jax.serve.log_tail import Events, LogTail
from monolith_jax.stream.file_producer import FileProducer
from monolith_jax.stream.log import LogPartition
from monolith_jax.stream.log_source import LogConfig

T = 1_700_000_000_000


@pytest.fixture
def producer(tmp_path: Path) -> Iterator[FileProducer]:
    with closing(FileProducer(tmp_path, {"segment_bytes": "400"})) as producer:
        for topic in ("impressions", "actions"):
            producer.create(topic, 2)
        yield producer


def append(producer: FileProducer, topic: str, user: int, video: int, second: int, **columns: object) -> None:
    time_ms = T + 1000 * second
    row = {"event_time_ms": time_ms, "request_id": 1, "user_id": user, "video_id": video, **columns}
    producer.append(LogPartition(topic, user % 2), json.dumps(row).encode(), timestamp_ms=time_ms)
    producer.flush()


def tail_of(folder: Path, horizon_s: float = 0.0, **fields: int) -> LogTail:
    return LogTail(LogConfig(url=f"file://{folder}", format="json", **fields), horizon_s)  # pyright: ignore[reportArgumentType]


def videos_of(found: list[Events]) -> tuple[list[int], list[int]]:
    impressions, actions = zip(*found, strict=True) if found else ((), ())
    both = ([video for one in side if one for video in one.column("video_id").to_pylist()] for side in (impressions, actions))
    one, other = map(sorted, both)
    return one, other


def test_goes_on_where_the_log_ended(tmp_path: Path, producer: FileProducer) -> None:
    append(producer, "impressions", 1, 10, 0)
    append(producer, "actions", 2, 20, 0, action="like")
    with closing(tail_of(tmp_path)) as tail:
        assert list(tail.catch_up()) == []
        assert tail.poll() == Events(None, None) and tail.unread() == 0
        append(producer, "actions", 1, 11, 1, action="like")
        append(producer, "actions", 2, 21, 1, action="like")
        append(producer, "impressions", 2, 12, 1)
        assert tail.unread() == 3
        assert videos_of(list(tail.catch_up())) == ([12], [11, 21])
        append(producer, "actions", 3, 13, 2, action="like")
        assert videos_of([tail.poll(1.0)]) == ([], [13])
        assert tail.poll() == Events(None, None)


def test_events_of_one_partition_keep_their_order(tmp_path: Path, producer: FileProducer) -> None:
    for video, second in enumerate((5, 3, 9, 1, 7, 2)):
        append(producer, "actions", 2, video, second, action="like")
    with closing(tail_of(tmp_path, float("inf"), poll_messages=2)) as tail:
        found = [one.actions.column("video_id").to_pylist() for one in tail.catch_up() if one.actions is not None]
    assert [video for part in found for video in part] == list(range(6)) and len(found) > 1


@pytest.mark.parametrize(("horizon_s", "first"), [(5.0, 14), (0.5, 19), (1e6, 0), (float("inf"), 0)])
def test_a_horizon_before_the_newest_message(tmp_path: Path, producer: FileProducer, horizon_s: float, first: int) -> None:
    for second in range(20):
        append(producer, "impressions", second, second, second)
        if second < 18:  # What is newest is newest of both topics.
            append(producer, "actions", second, second, second, action="like")
    with closing(tail_of(tmp_path, horizon_s, poll_messages=3)) as tail:
        assert videos_of(list(tail.catch_up())) == (list(range(first, 20)), list(range(first, 18)))


def test_bad_messages_are_counted(tmp_path: Path, producer: FileProducer) -> None:
    append(producer, "actions", 1, 1, 1, action="like")
    append(producer, "actions", 1, 2, 1, action="yodel")
    producer.append(LogPartition("actions", 1), b"{", timestamp_ms=T)
    append(producer, "actions", 1, 3, 1, action="like")
    append(producer, "actions", 1, 4, 10**7, action="like")
    with closing(tail_of(tmp_path, float("inf"))) as tail:
        assert videos_of(list(tail.catch_up())) == ([], [1, 3, 4])
        assert sum(tail.set_aside.values()) == 2 and tail.set_aside["unknown action"] == 1


def test_what_retention_took_is_passed_and_counted(tmp_path: Path) -> None:
    with closing(FileProducer(tmp_path, {"segment_bytes": "300", "retention_bytes": "600"})) as producer:
        for topic in ("impressions", "actions"):
            producer.create(topic, 2)
        append(producer, "actions", 0, 0, 0, action="like")
        with closing(tail_of(tmp_path, float("inf"))) as tail:
            for second in range(1, 50):
                append(producer, "actions", 0, second, second, action="like")
            found = videos_of(list(tail.catch_up()))[1]
    assert 0 < len(found) < 40 and found == list(range(50 - len(found), 50))
    assert tail.lost == 50 - len(found)


def test_there_must_be_a_log(tmp_path: Path, producer: FileProducer) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        tail_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'elsewhere'"):
        LogTail(LogConfig(url=f"file://{tmp_path}", impressions="elsewhere"))
    with pytest.raises(ValueError, match="horizon_s"):
        tail_of(tmp_path, float("nan"))
