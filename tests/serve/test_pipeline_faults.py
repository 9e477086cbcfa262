"""Bad input, and stages that fail."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.features import featurize
from monolith_jax.serve.catalogue import CatalogueConfig
from monolith_jax.serve.pipeline import Pipeline
from monolith_jax.serve.request import Request
from monolith_jax.serve.user_state import UserStateConfig
from tests.serve.small_pipeline import (
    COLUMNS,
    HISTORY,
    NOW_MS,
    PLAIN,
    VIDEOS,
    World,
    actions,
    ask,
    no_chance,
    serving,
    sources,
    videos,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("deltas"))


@pytest.fixture
def pipeline(world: World) -> Iterator[Pipeline]:
    pipeline = world.pipeline()
    yield pipeline
    pipeline.close()


def test_an_unknown_user_gets_a_full_feed(pipeline: Pipeline) -> None:
    feed = ask(pipeline, user=12345)
    assert len(feed) == 10 and feed.flags == ("unknown_user",)
    assert "unknown_user" not in ask(pipeline, user=99).flags


def test_an_empty_index_leaves_the_other_sources(world: World) -> None:
    pipeline = world.pipeline(filled=False)
    pipeline.events.videos(videos(np.arange(VIDEOS)))
    feed = ask(pipeline)
    assert len(feed) == 10 and feed.flags == ("no_index",) and "two_tower" not in feed.sources
    pipeline.close()


def test_no_ranker_leaves_the_order_of_recall(tmp_path: Path) -> None:
    pipeline = World(tmp_path, heads=()).pipeline(rank=None, rerank=PLAIN)
    feed = ask(pipeline)
    assert feed.flags == ("no_ranker",) and set(feed.sources) == {"two_tower"} and np.isnan(feed.values).all()
    vectors = pipeline.user_vectors([Request(3, time_ms=NOW_MS)])
    assert pipeline.index is not None
    assert feed.video_ids.tolist() == pipeline.index.search(vectors, 10)[0][0].tolist()
    pipeline.close()


def test_no_two_tower_leaves_the_other_sources(tmp_path: Path) -> None:
    pipeline = World(tmp_path, two_tower=None).pipeline()
    feed = ask(pipeline)
    assert len(feed) == 10 and feed.flags == ("no_index",) and np.isfinite(feed.values).all()
    with pytest.raises(ValueError, match="trained with Experiment"):
        pipeline.user_vectors([Request(3)])
    pipeline.close()


@pytest.mark.parametrize("part, name, flag", [
    ("_ranker", "scores", "rank_failed"), ("index", "search", "recall_failed"), ("sources", "trending", "recall_failed"),
])  # fmt: skip
def test_a_stage_that_fails_is_flagged_and_the_feed_full(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, part: str, name: str, flag: str
) -> None:
    calls = []

    def broken(*args: Any) -> Any:
        calls.append(args)
        if flag == "recall_failed" and name == "trending" and len(calls) > 1:
            return np.arange(50)
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(getattr(pipeline, part), name, broken)
    feed = ask(pipeline)
    assert calls and len(feed) == 10 and feed.flags == (flag,)
    assert "broken on purpose" in pipeline.metrics()["last_fault"] and pipeline.metrics()["counts"][flag] == 1


def test_rules_that_fail_leave_the_order_of_the_values_without_what_must_not_be_shown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = world.pipeline()
    monkeypatch.setattr("monolith_jax.serve.pipeline.rerank", lambda *args: 1 // 0)
    known = pipeline.catalogue.values("author_id", np.arange(VIDEOS))[0]
    feed = ask(pipeline, blocked_authors=list(range(20)))
    assert len(feed) == 10 and feed.flags == ("rerank_failed",) and (known[feed.video_ids] >= 20).all()
    assert (np.diff(feed.values) <= 0).all()
    pipeline.close()


def test_a_request_past_its_deadline_gets_popular_videos(pipeline: Pipeline) -> None:
    ask(pipeline)
    feed = ask(pipeline, deadline_ms=0.0)
    assert len(feed) == 10 and set(feed.flags) == {"deadline_recall", "deadline_rank"}
    assert feed.sources[0] == "trending" and np.isnan(feed.values).all()
    assert "rank" not in feed.timings_ms and ask(pipeline, deadline_ms=60_000.0).flags == ()


def test_all_seen_is_shown_again(world: World) -> None:
    pipeline = world.pipeline()
    pipeline.seen.add(3, np.arange(VIDEOS))
    feed = ask(pipeline)
    assert len(feed) == 10 and feed.flags == ("seen_again",)
    pipeline.close()


def test_what_is_new_comes_before_what_was_seen(world: World) -> None:
    pipeline = world.pipeline(rerank=PLAIN)
    pipeline.seen.add(3, np.setdiff1d(np.arange(VIDEOS), [17, 301, 302]))
    feed = ask(pipeline, number=12)
    assert set(feed.video_ids[:3].tolist()) == {17, 301, 302} and len(feed) == 12 and "seen_again" in feed.flags
    pipeline.close()


def test_more_than_there_is_gives_all_there_is(world: World) -> None:
    pipeline = world.pipeline(filled=False)
    pipeline.events.videos(videos(np.arange(25), author_id=pa.array(np.arange(25))))
    feed = ask(pipeline, number=1000)
    assert sorted(feed.video_ids.tolist()) == list(range(25)) and "short" in feed.flags
    assert len(ask(pipeline, user=4, number=0)) == 0
    pipeline.close()


def test_nothing_to_show_is_an_empty_feed_with_a_flag(world: World) -> None:
    pipeline = world.pipeline(filled=False)
    feed = ask(pipeline)
    assert len(feed) == 0 and "empty" in feed.flags and feed.impressions is not None and feed.impressions.num_rows == 0
    pipeline.close()


def test_unsafe_videos_and_blocked_authors_are_never_shown(world: World) -> None:
    catalogue = CatalogueConfig(1000, COLUMNS, unsafe_column="unsafe")
    pipeline = world.pipeline(filled=False, catalogue=catalogue)
    unsafe = np.arange(VIDEOS) % 10 != 0
    pipeline.events.videos(videos(np.arange(VIDEOS), unsafe=pa.array(unsafe)))
    assert pipeline.indexer is not None
    pipeline.indexer.build()
    known = pipeline.catalogue.values("author_id", np.arange(VIDEOS))[0]
    feed = ask(pipeline, number=100, blocked_authors=list(range(10)))
    wanted = np.flatnonzero(~unsafe & (known >= 10))
    assert sorted(feed.video_ids.tolist()) == wanted.tolist() and "short" in feed.flags
    assert len(ask(pipeline, user=4, blocked_authors=list(range(40)))) == 0
    pipeline.close()


def test_vectors_that_are_no_numbers_leave_the_last_good_ones(tmp_path: Path) -> None:
    world = World(tmp_path)
    pipeline = world.pipeline()
    assert pipeline.index is not None and pipeline.indexer is not None and pipeline._model is not None
    pipeline.indexer.step()
    before = pipeline.index.vectors(np.array([8]))[0]
    broken, moved = np.full((1, 8), np.nan, np.float32), np.full((1, 8), 0.5, np.float32)
    world.log.publish({"video": (np.array([8, 10]), np.concatenate([broken, moved]))})
    pipeline._model.poll()
    old = pipeline.index.vectors(np.array([10]))[0]
    pipeline.indexer.step()
    np.testing.assert_array_equal(pipeline.index.vectors(np.array([8]))[0], before)
    assert not np.allclose(pipeline.index.vectors(np.array([10]))[0], old)
    for user in range(30):
        feed = ask(pipeline, user=user)
        assert 8 not in feed.video_ids and np.isfinite(feed.values).all()
    assert pipeline.metrics()["values"]["set_aside"] > 0
    pipeline.close()


def test_videos_that_training_lets_go_leave(tmp_path: Path) -> None:
    world = World(tmp_path)
    pipeline = world.pipeline()
    assert pipeline.index is not None and pipeline.indexer is not None and pipeline._model is not None
    pipeline.indexer.step()
    gone = np.arange(0, 100, 2)
    world.log.publish({}, deleted={"video": gone})
    pipeline._model.poll()
    pipeline.indexer.step()
    assert len(pipeline.catalogue) == len(pipeline.index) == VIDEOS - 50 and not pipeline.catalogue.known(gone).any()
    assert not set(ask(pipeline, number=100).video_ids.tolist()) & set(gone.tolist())
    pipeline.close()


def test_new_videos_enter_the_index_and_the_oldest_leave_it(world: World) -> None:
    pipeline = world.pipeline(catalogue=CatalogueConfig(VIDEOS, COLUMNS))
    assert pipeline.index is not None and pipeline.indexer is not None
    pipeline.events.videos(videos(np.arange(1000, 1100), seed=1))
    assert not set(ask(pipeline, number=100).video_ids.tolist()) & set(range(100))
    pipeline.indexer.step()
    assert len(pipeline.index) == VIDEOS and pipeline.index.vectors(np.arange(1000, 1100))[1].all()
    assert not set(ask(pipeline, number=100).video_ids.tolist()) & set(range(100))
    pipeline.close()


def test_a_history_of_100_000_actions_counts_by_its_newest(pipeline: Pipeline) -> None:
    ids = np.arange(100_000) % VIDEOS
    pipeline.events.actions(actions(3, ids, ["like"] * ids.size, NOW_MS - 200_000))
    feed = ask(pipeline)
    assert feed.impressions is not None and len(feed) == 10
    assert feed.impressions.column("history_video_id")[0].as_py() == [int(one) for one in ids[: -HISTORY - 1 : -1]]


def test_bad_requests_are_refused_by_name(pipeline: Pipeline, world: World) -> None:
    with pytest.raises(ValueError, match="number must be at least 0, got -1"):
        ask(pipeline, number=-1)
    with pytest.raises(ValueError, match=r"Request.context\['device'\]"):
        ask(pipeline, context={"device": object()})
    with pytest.raises(ValueError, match="rank is not set"):
        Pipeline(serving(rank=None), world.served(), None)


def test_a_column_that_nobody_gives_is_null_and_one_that_is_given_counts(world: World) -> None:
    pipeline = world.pipeline(rerank=PLAIN, sources=no_chance())
    plain, given = ask(pipeline, user=1), ask(pipeline, user=2, context={"device": 3})
    assert plain.impressions is not None and given.impressions is not None
    assert plain.impressions.column("device").null_count == 10 and given.impressions.column("device").to_pylist() == [3] * 10
    assert pipeline._model is not None
    layout = pipeline._model.layout
    assert not featurize(plain.impressions, layout).groups[0].valid.all()
    pipeline.close()


def test_it_follows_the_trainer_by_itself(tmp_path: Path) -> None:
    world = World(tmp_path)
    pipeline = world.pipeline()
    assert pipeline.index is not None and pipeline._model is not None
    pipeline.watch(0.01, 0.01)
    before = pipeline.index.vectors(np.array([10]))[0]
    version = world.log.publish({"video": (np.array([10]), np.full((1, 8), 0.5, np.float32))})
    for _ in range(1000):
        if pipeline._model.version == version and not np.allclose(pipeline.index.vectors(np.array([10]))[0], before):
            break
        time.sleep(0.02)
    assert pipeline._model.version == version and not np.allclose(pipeline.index.vectors(np.array([10]))[0], before)
    assert ask(pipeline).version == version
    pipeline.close()


def test_a_tag_that_was_liked_last_takes_more_of_the_next_feed(world: World) -> None:
    state = UserStateConfig(length=HISTORY, max_users=200, actions=("like", "complete", "skip"), positive="like")
    plain = serving().rank
    assert plain is not None
    rank = replace(plain, interest_weight=10.0)
    pipeline = world.pipeline(user_state=state, rank=rank, rerank=PLAIN, sources=sources(similar=20, explore=0, trending=0))
    tags, lengths = pipeline.catalogue.take(np.arange(VIDEOS), columns=("tag_id",)).columns["tag_id"]
    has = (tags[:, 0] == 7) & (lengths == 1)
    liked = np.flatnonzero(has)[:2]
    before = ask(pipeline)
    pipeline.events.actions(actions(3, liked, ["like"] * 2))
    after = ask(pipeline)
    shares = [
        ((tags[feed.video_ids] == 7) & (np.arange(4) < lengths[feed.video_ids, None])).any(1).mean() for feed in (before, after)
    ]
    assert shares[1] == 1.0 > shares[0], "every video shares the tag of both: there are more than ten"
    assert not set(liked.tolist()) & set(after.video_ids.tolist()), "what was liked was seen"
    found = pipeline._recall._similar(pipeline._ask(Request(3, 10, NOW_MS), 0.0))
    assert 30 <= found.size <= 38 and not set(liked.tolist()) & set(found.tolist())
    pipeline.close()


def test_the_index_learns_from_those_who_ask(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = world.pipeline(rerank=PLAIN)
    assert pipeline.indexer is not None and pipeline.index is not None
    monkeypatch.setattr("monolith_jax.serve.indexer._LEARN_S", -1.0)
    pipeline.indexer.step()
    assert pipeline.indexer.metrics()["learned"] == 0, "nobody has asked yet"
    pipeline.recommend_batch([Request(user, 1, NOW_MS) for user in range(300)])
    vectors = pipeline.user_vectors([Request(3, 1, NOW_MS)])
    before = pipeline.index.search(vectors, 50)[0]
    assert pipeline._recall.recent().shape == (300, 8)
    pipeline.indexer.step()
    assert pipeline.indexer.metrics()["learned"] == 1
    for _ in range(3):
        pipeline.index.upsert(np.arange(VIDEOS), pipeline.index.vectors(np.arange(VIDEOS))[0])
    assert np.isin(pipeline.index.search(vectors, 50)[0], before).mean() > 0.95
    pipeline.close()


def test_a_slow_moment_does_not_switch_a_stage_off_for_good(pipeline: Pipeline) -> None:
    ask(pipeline, deadline_ms=5000.0)
    pipeline._clock.costs_ms["rank"] = 10_000.0
    flags = [ask(pipeline, user=user, deadline_ms=300.0).flags for user in range(100)]
    assert flags[0] == ("deadline_rank",) and flags[-1] == ()
    before = pipeline._clock.costs_ms["rank"]
    pipeline._clock.note([], "rank", -1000.0)
    assert pipeline._clock.costs_ms["rank"] < 1.5 * before + 1


def test_one_late_request_of_a_batch_does_not_cost_the_others_their_candidates(pipeline: Pipeline) -> None:
    fine, late = pipeline.recommend_batch([Request(1, 5, NOW_MS), Request(2, 5, NOW_MS, deadline_ms=0.0)])
    assert fine.flags == () and "two_tower" in fine.sources and "deadline_recall" in late.flags
    odd, other = pipeline.recommend_batch(
        [Request(1, 5, NOW_MS, context={"device": "x"}), Request(2, 5, NOW_MS, context={"device": 3})]
    )
    assert len(odd) == len(other) == 5 and other.flags == ()


def test_more_than_the_best_two_hundred_may_be_asked_for(world: World) -> None:
    rank = serving().rank
    assert rank is not None
    pipeline = world.pipeline(rank=replace(rank, num_candidates=400), sources=sources(two_tower=350, similar=0))
    feed = ask(pipeline, number=300)
    assert len(feed) == 300 and feed.flags == ()
    pipeline.close()


def test_few_videos_in_a_large_catalogue_are_found_again_and_again(world: World) -> None:
    pipeline = world.pipeline(filled=False, catalogue=CatalogueConfig(100_000, COLUMNS))
    pipeline.events.videos(videos(np.arange(30), event_time_ms=pa.array(np.full(30, NOW_MS - 10**9))))
    for _ in range(5):
        assert len(ask(pipeline, number=10)) == 10
    pipeline.close()


def test_a_bad_impression_loses_neither_the_others_nor_the_actions(pipeline: Pipeline) -> None:
    bad = videos(np.array([5000, 5001]), content=pa.array([[1.0], [1.0]], pa.list_(pa.float32())))
    bad = bad.append_column("user_id", pa.array([3, 3]))
    assert pipeline.events._take(bad, actions(3, [7], ["like"])) == 3
    assert pipeline.events.metrics()["rows_refused"] == 2 and "size is 4" in pipeline.events.metrics()["last_fault"]
    assert pipeline.user_state.history(3, NOW_MS)[0].tolist() == [7]
    assert not pipeline.seen.unseen(3, np.array([5000, 5001, 7])).any()


def test_a_video_without_content_is_logged_as_it_was_served(world: World) -> None:
    pipeline = world.pipeline(filled=False)
    pipeline.events.videos(videos(np.arange(20), content=pa.nulls(20, pa.list_(pa.float32()))))
    feed = ask(pipeline)
    assert feed.impressions is not None and feed.impressions.column("content").null_count == 10
    assert pipeline._model is not None
    np.testing.assert_allclose(pipeline._model.predict(feed.impressions), feed.scores, atol=2e-6)
    pipeline.close()


def test_scores_that_are_no_numbers_leave_the_order_of_recall(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline._ranker, "scores", lambda once, each: np.full((len(each.dense), 3), np.nan, np.float32))
    feed = ask(pipeline)
    assert len(feed) == 10 and feed.flags == ("rank_failed",)
    with pytest.raises(ValueError, match="quotas of SourcesConfig add up to 900"):
        Pipeline(serving(sources=sources(two_tower=860)), pipeline._model, None)
