import numpy as np

from monolith_jax.serve.merge import SOURCES
from monolith_jax.serve.source_report import SourceReport


def test_shares_and_hit_rates() -> None:
    report = SourceReport()
    report.fed(1, np.array([10, 11, 12]), np.array([0, 0, 4], np.int8))
    report.fed(2, np.array([10]), np.array([2], np.int8))
    requests, videos = np.array([1, 1, 1, 2, 3, 1]), np.array([10, 10, 11, 10, 10, 12])
    report.acted(requests, videos, np.array([True, True, False, True, True, False]))
    report.acted(requests[:1], videos[:1], np.array([True]))  # Once more: it counts once.
    found = report.report()
    assert tuple(found) == SOURCES
    assert found["two_tower"] == {"fed": 2, "hits": 1, "share": 0.5, "hit_rate": 0.5}
    assert found["trending"] == {"fed": 1, "hits": 1, "share": 0.25, "hit_rate": 1.0}
    assert found["explore"] == {"fed": 1, "hits": 0, "share": 0.25, "hit_rate": 0.0}
    assert found["fresh"] == {"fed": 0, "hits": 0, "share": 0.0, "hit_rate": 0.0}
    assert report.metrics() == {"feeds": 2, "replaced": 0, "not_open": 1}


def test_nothing_was_fed() -> None:
    assert SourceReport().report()["fresh"] == {"fed": 0, "hits": 0, "share": 0.0, "hit_rate": 0.0}


def test_only_so_many_are_waited_for() -> None:
    report = SourceReport(max_open=8)
    for request in range(3):
        report.fed(request, np.arange(4), np.full(4, request, np.int8))
    every = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)
    report.acted(*every, np.ones(12, np.bool_))
    assert [one["hits"] for one in report.report().values()] == [0, 4, 4, 0, 0, 0]
    assert report.metrics() == {"feeds": 3, "replaced": 4, "not_open": 4}
