from collections.abc import Iterator

import numpy as np
import pytest

from monolith_jax.serve.pipeline import Pipeline
from monolith_jax.serve.request import Request
from tests.serve.small_pipeline import (
    NOW_MS,
    PLAIN,
    VIDEOS,
    World,
    actions,
    ask,
    no_chance,
    sources,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("deltas"))


@pytest.fixture
def pipeline(world: World) -> Iterator[Pipeline]:
    pipeline = world.pipeline()
    yield pipeline
    pipeline.close()


def test_a_feed_has_what_was_asked_for_and_says_why(pipeline: Pipeline) -> None:
    feed = ask(pipeline)
    assert len(feed) == 10 and feed.flags == () and feed.version == (1, 0) and feed.heads == ("like", "skip", "play_ratio")
    assert np.isfinite(feed.scores).all() and np.isfinite(feed.values).all()
    assert set(feed.sources) <= {"two_tower", "fresh", "trending", "followed", "explore"} and "two_tower" in feed.sources
    assert {"user", "recall", "merge", "rank", "rerank", "feed", "total"} == set(feed.timings_ms)
    memory = pipeline.metrics()["memory_bytes"]
    assert set(memory) == {"catalogue", "index", "user_state", "seen", "sources"} and min(memory.values()) > 1000
    report = pipeline.metrics()["events"]["report"]
    assert sum(one["fed"] for one in report.values()) == 10 and report["two_tower"]["share"] > 0


def test_the_order_is_that_of_the_values_where_no_rule_speaks_against_it(world: World) -> None:
    pipeline = world.pipeline(rerank=PLAIN)
    feed = ask(pipeline, number=100)
    model = pipeline._model
    assert model is not None and feed.impressions is not None
    scores = model.predict(feed.impressions)
    np.testing.assert_allclose(feed.scores, scores, atol=2e-6)
    durations = feed.impressions.column("duration_ms").to_numpy() / 1000
    values = scores[:, 0] - 0.5 * scores[:, 1] + 0.01 * scores[:, 2] * durations
    np.testing.assert_allclose(feed.values, values, atol=1e-5)
    assert (np.diff(feed.values) <= 0).all()
    pipeline.close()


def test_users_of_a_group_have_other_values(world: World) -> None:
    pipeline = world.pipeline(rerank=PLAIN)
    plain, skippers = ask(pipeline, user=1), ask(pipeline, user=1, group="skippers")
    assert skippers.scores[:, 1].mean() > plain.scores[:, 1].mean()
    ask(pipeline, user=1, group="nobody")
    assert pipeline.metrics()["values"]["unknown_groups"] == 1
    pipeline.close()


def test_nothing_is_shown_twice_while_there_is_something_new(pipeline: Pipeline) -> None:
    shown: list[int] = []
    for _ in range(20):
        feed = ask(pipeline)
        assert not feed.flags
        shown += feed.video_ids.tolist()
    assert len(set(shown)) == len(shown) == 200
    other = ask(pipeline, user=4)
    assert set(other.video_ids.tolist()) & set(shown)


def test_an_action_is_felt_by_the_next_request(pipeline: Pipeline) -> None:
    before = ask(pipeline)
    pipeline.events.actions(actions(3, [11, 12], ["like", "play"], values=[None, 1000]))
    after = ask(pipeline)
    assert before.impressions is not None and after.impressions is not None
    assert before.impressions.column("history_video_id")[0].as_py() == []
    assert after.impressions.column("history_video_id")[0].as_py() == [12, 11]
    assert after.impressions.column("history_action")[0].as_py() == [0b100, 0b001]


def test_followed_authors_are_a_source(world: World) -> None:
    pipeline = world.pipeline(sources=sources(two_tower=0, fresh=0, trending=0, explore=0))
    known = pipeline.catalogue.values("author_id", np.arange(VIDEOS))[0]
    pipeline.events.actions(actions(3, [5], ["follow"]))
    feed = ask(pipeline, number=3)
    assert (set(feed.sources) == {"followed"} and (known[feed.video_ids] == known[5]).all()) or "seen_again" in feed.flags
    feed = ask(pipeline, user=4, number=1, followed_authors=(int(known[8]),))
    assert feed.sources == ("followed",) and known[feed.video_ids[0]] == known[8]
    pipeline.close()


def test_a_batch_answers_as_one_by_one(world: World) -> None:
    requests = [Request(user, 5, NOW_MS, context={"device": 3} if user else {}) for user in range(4)]
    one, all_at_once = world.pipeline(sources=no_chance()), world.pipeline(sources=no_chance())
    singles = [one.recommend(request) for request in requests]
    for single, of_batch in zip(singles, all_at_once.recommend_batch(requests), strict=True):
        assert single.video_ids.tolist() == of_batch.video_ids.tolist()
        np.testing.assert_allclose(single.values, of_batch.values, atol=1e-6)
    assert all_at_once.recommend_batch([]) == []
    one.close()
    all_at_once.close()
