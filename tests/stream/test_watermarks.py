"""The watermark of several partitions: who holds whom up, and for how long."""

from monolith_jax.stream.log import LogPartition
from monolith_jax.stream.watermarks import Watermarks

A, B, C = (LogPartition("events", number) for number in range(3))


def nothing_unread(partition: LogPartition) -> bool:
    return False


def test_the_slowest_partition_sets_the_time() -> None:
    newest_ms: dict[LogPartition, int] = {}
    watermarks = Watermarks([A, B], newest_ms, 0.0)
    assert watermarks.watermark_ms() is None
    newest_ms[A] = 50
    assert watermarks.watermark_ms() is None, "B may still bring something older"
    newest_ms[B] = 20
    assert watermarks.watermark_ms() == 20
    newest_ms[B] = 70
    assert watermarks.watermark_ms() == 50


def test_an_idle_partition_holds_nobody_up() -> None:
    newest_ms = {A: 50}
    watermarks = Watermarks([A, B], newest_ms, 0.0)
    watermarks.saw(A, 9.0)
    watermarks.look_for_idle(10.0, 9.5, nothing_unread)
    assert watermarks.watermark_ms() is None
    watermarks.look_for_idle(10.0, 10.0, nothing_unread)
    assert watermarks.watermark_ms() == 50
    newest_ms[B] = 10
    watermarks.saw(B, 11.0)
    assert watermarks.watermark_ms() == 10, "who keeps the watermark does not let it go back"


def test_a_partition_with_something_unread_is_not_idle() -> None:
    watermarks = Watermarks([A, B], {A: 50}, 0.0)
    watermarks.saw(A, 10.0)
    watermarks.look_for_idle(10.0, 10.0, lambda partition: partition == B)
    assert watermarks.watermark_ms() is None


def test_where_all_are_idle_there_is_nothing_to_wait_for() -> None:
    watermarks = Watermarks([A, B], {A: 50, B: 30}, 0.0)
    watermarks.look_for_idle(10.0, 10.0, nothing_unread)
    assert watermarks.watermark_ms() == 50


def test_partitions_wait_for_one_that_is_far_behind() -> None:
    newest_ms = {A: 1000}
    watermarks = Watermarks([A, B, C], newest_ms, 0.0)
    assert watermarks.ahead(100) == {A}, "of B and C nobody knows the time yet"
    newest_ms.update({B: 950, C: 800})
    assert watermarks.ahead(100) == {A, B}
    watermarks.end(C)
    assert watermarks.ahead(100) == {C}, "what has ended is not read, and not waited for"
    assert watermarks.watermark_ms() == 950 and not watermarks.all_ended
