"""What was served is what is trained on: a log of served feeds, joined with what followed, has the features that were used."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa

from monolith_jax.features import featurize
from monolith_jax.serve.log_tail import LogTail
from monolith_jax.serve.request import Request
from monolith_jax.stream.feed import Outlet
from monolith_jax.stream.formats import Schemas
from monolith_jax.stream.joiner import JoinerConfig
from monolith_jax.stream.log import open_log, open_producer
from monolith_jax.stream.log_source import LogConfig, LogSource
from tests.serve.small_pipeline import NOW_MS, World, actions


def test_a_served_log_replays_to_the_features_and_scores_of_serving(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'log'}"
    config = LogConfig(url=url, joiner=JoinerConfig(window_s=1.0), ends=True, max_wait_s=0.05, idle_s=0.2)
    world = World(tmp_path / "deltas")
    pipeline = world.pipeline()
    model = pipeline._model
    assert model is not None
    served: dict[tuple[int, int], np.ndarray] = {}
    with closing(open_producer(url)) as producer:
        producer.create("impressions", 1)
        producer.create("actions", 1)
        schemas = [Schemas(open_log(url), topic) for topic in ("impressions", "actions")]
        outlets = [
            Outlet(producer, of_topic, topic, 1, "arrow", 16)
            for of_topic, topic in zip(schemas, ("impressions", "actions"), strict=True)
        ]
        for turn in range(12):
            user, now_ms = turn % 3, NOW_MS + 1000 * turn
            context = {"device": turn} if turn % 2 else {}
            feed = pipeline.recommend(Request(user, 5, now_ms, context=context))
            assert feed.impressions is not None
            served |= {(feed.request_id, video): feed.scores[row] for row, video in enumerate(feed.video_ids.tolist())}
            outlets[0].add(feed.impressions)
            # The user likes the first video: the next feed's history has it, and so has what is logged with that.
            reaction = actions(user, feed.video_ids[:1], ["like"], now_ms + 10, request_id=feed.request_id)
            outlets[1].add(reaction)
            pipeline.events.actions(reaction)
        for outlet in outlets:
            outlet.send_rest()
        producer.flush()
    chunks = [chunk.examples for chunk in LogSource(config, tmp_path / "cuts", 16).read({})]
    examples = pa.Table.from_batches([one for one in chunks if one.num_rows]).combine_chunks().to_batches()[0]
    assert examples.num_rows == 60 and sum(examples.column("like").to_pylist()) == 12
    histories = examples.column("history_video_id").to_pylist()
    assert max(map(len, histories)) == 3, "four feeds each: the last knows three likes"
    keys = list(zip(examples.column("request_id").to_pylist(), examples.column("video_id").to_pylist(), strict=True))
    wanted = np.stack([served[key] for key in keys])
    np.testing.assert_allclose(model.predict(examples), wanted, atol=2e-6)
    used = [group.valid.any(0).mean() for group in featurize(examples, model.layout).groups]
    assert min(used) > 0.7, "histories, tags and context were there to be compared"
    pipeline.close()


def test_state_after_a_restart_is_that_of_before(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'log'}"
    world = World(tmp_path / "deltas")
    kept = world.pipeline(filled=False)
    with closing(open_producer(url)) as producer:
        for topic in ("impressions", "actions"):
            producer.create(topic, 2)
        outlets = [
            Outlet(producer, Schemas(open_log(url), topic), topic, 2, "arrow", 16) for topic in ("impressions", "actions")
        ]
        full = world.pipeline()
        for turn in range(30):
            feed = full.recommend(Request(turn % 5, 4, NOW_MS + turn * 100))
            assert feed.impressions is not None
            reaction = actions(turn % 5, feed.video_ids[:2], ["like", "follow"], NOW_MS + turn * 100 + 1)
            for outlet, batch, observe in zip(
                outlets, (feed.impressions, reaction), (kept.events.impressions, kept.events.actions), strict=True
            ):
                outlet.add(batch)
                observe(batch)
        for outlet in outlets:
            outlet.send_rest()
        producer.flush()
    again = world.pipeline(filled=False)
    with closing(LogTail(LogConfig(url=url), float("inf"))) as tail:
        assert again.events.rebuild(tail) == 30 * 6
    assert len(again.catalogue) == len(kept.catalogue) > 20
    every = np.arange(400)
    for user in range(5):
        for mine, theirs in zip(
            again.user_state.history(user, NOW_MS * 2), kept.user_state.history(user, NOW_MS * 2), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(again.user_state.followed(user), kept.user_state.followed(user))
        np.testing.assert_array_equal(again.seen.unseen(user, every), kept.seen.unseen(user, every))
        assert again.user_state.history(user, NOW_MS * 2)[0].size == 6 and not again.seen.unseen(user, every).all()
    for pipeline in (kept, full, again):
        pipeline.close()
