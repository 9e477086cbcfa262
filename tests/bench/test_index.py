"""The benchmark of the index runs, and its last line tells what it promises."""

import json

import numpy as np
import pytest

from launch.bench import index as bench
from launch.bench import index_rivals, index_world


def test_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--videos", "3000", "--queries", "20", "--rounds", "1", "--seconds", "0.2", "--threads", "1", "--changes", "300"]
    assert bench.main([*sizes, "--rivals"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["videos"] == 3000 and figures["index_qps"] > 0 and figures["updates_per_s"] > 0
    assert figures["static_recall_at_100"] >= 0.95 and figures["recall_at_100"] >= 0.9
    assert figures["changing_recall_at_100"] >= 0.9


def test_changes_leave_what_the_index_has() -> None:
    vectors = index_world.made_up(1500, 16, 4, 0.4, 1)
    world = index_world.World(vectors, np.arange(1500) < 1000, vectors[:5], vectors[5:50])
    contestant = index_rivals.ours(vectors[:1000], world.sample, 1500, 1)
    changes = index_world.Changes(world, 100.0, 1)
    for _ in range(5):
        changes.apply(contestant, 10)
    contestant.set_effort(1500)
    found = np.sort(contestant.one(vectors[:1], 1000))
    np.testing.assert_array_equal(found, np.flatnonzero(changes.there))
    after = index_world.World(changes.vectors, changes.there, world.queries, world.sample)
    assert index_world.recall(contestant.many(world.queries, index_world.K), after.truth()) > 0.99


def test_a_library_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"monolith_jax\[bench\]"):
        index_rivals.needed("no_such_library")
