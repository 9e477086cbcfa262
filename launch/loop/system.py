"""The system in a closed loop: requests to feeds, what users did to a log, what was learned from it to the next feeds.

In: requests, and what follows when a video is shown. Out: feeds. All goes the way that it goes in production: the pipeline's
impressions with the features as it saw them and the users' actions go to two topics of a log, a trainer joins and learns from
them and publishes, the pipeline follows the deltas. Only time is the world's: who asks waits at set moments until what can be
learned is learned and served. So what is served is a function of the events, however fast the machine is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from launch.loop.trainer import Trainer
from launch.serving import open_pipeline
from monolith_jax.evaluate.replay import Ask, arrived_ms
from monolith_jax.experiment import Experiment
from monolith_jax.serve.request import Request
from monolith_jax.stream import world
from monolith_jax.stream.feed import Outlet
from monolith_jax.stream.formats import Schemas
from monolith_jax.stream.log import open_log, open_producer
from monolith_jax.stream.log_source import LogConfig
from monolith_jax.stream.replayed import Waiting, actions_of
from monolith_jax.stream.synthetic import SyntheticConfig, videos
from monolith_jax.sync.delta import Version

_MESSAGE_ROWS = 512
_IN_TIME = 0.9
"""An action comes at most this share of the join window after its impression, so that none is lost."""


class Topic:
    """Writes one topic, and knows what a joiner can know of it."""

    def __init__(self, url: str, producer: Any, name: str) -> None:
        """Makes the topic, with one partition."""
        producer.create(name, 1)
        self._producer, self._log = producer, open_log(url)
        self._outlet = Outlet(producer, Schemas(self._log, name), name, 1, "arrow", _MESSAGE_ROWS)
        self._kept: list[pa.RecordBatch] = []
        self.newest_ms = -1
        """The newest time of an event that was sent."""

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes events, for `send`."""
        self._kept.append(batch)

    def send(self) -> None:
        """Sends what was taken."""
        for batch in self._kept:
            if batch.num_rows:
                self._outlet.add(batch)
                self.newest_ms = max(self.newest_ms, *batch.column("event_time_ms").to_pylist())
        self._kept = []
        self._outlet.send_rest()
        self._producer.flush()

    def close(self) -> None:
        """Lets go."""
        self._log.close()


class System:
    """A policy: the pipeline, and the trainer behind it."""

    def __init__(
        self, experiment: Experiment, config: SyntheticConfig, source: LogConfig, deltas: Path, trainer: Trainer | None
    ) -> None:
        """Opens the pipeline and the log; knows no videos yet.

        Args:
            experiment: Of the model that is served first, in `deltas`.
            config: The world.
            source: The log that the trainer reads.
            deltas: Where the trainer publishes, too.
            trainer: It runs; None: nobody learns from the log.
        """
        self._config, self._source, self._trainer = config, source, trainer
        self.pipeline = open_pipeline(experiment, deltas)
        self._first: Version = self.pipeline.models[0].version
        self._producer = open_producer(source.url)
        names = source.impressions, source.actions
        self._impressions, self._actions = (Topic(source.url, self._producer, name) for name in names)
        self._due, self._shown_ms = Waiting(), list[int]()
        self._live = np.zeros(0, np.int64)
        self.flags: Counter[str] = Counter()
        """How often feeds were marked."""
        self.sources: Counter[str] = Counter()
        """Impressions by the source that found the video."""

    def remember(self, examples: pa.RecordBatch) -> None:
        """Takes in what happened before the loop."""
        self.pipeline.events.examples(examples)

    def stock(self, live: np.ndarray, time_ms: int) -> None:
        """Brings the catalogue to the videos, int64 [V], that are live at a time."""
        ids = world.ids_of(self._config.seed, "video", live)
        there = self.pipeline.catalogue.ids()
        self.pipeline.events.remove(np.setdiff1d(there, ids))
        new = live[~np.isin(live, self._live)]
        if new.size:
            batch = videos(self._config, new, time_ms)
            self.pipeline.events.videos(batch.set_column(0, batch.schema.field(0), pa.array(arrived_ms(self._config, new))))
        self._live = live
        if self.pipeline.indexer:
            self.pipeline.indexer.step()

    def pick(self, ask: Ask) -> np.ndarray:
        """Answers a request; what it shows goes to the log."""
        self._act(ask.time_ms)
        user = int(world.ids_of(self._config.seed, "user", np.array([ask.user]))[0])
        feed = self.pipeline.recommend(Request(user, ask.size, ask.time_ms))
        assert feed.impressions is not None
        self.flags.update(feed.flags)
        self.sources.update(feed.sources)
        self._impressions.add(feed.impressions)
        self.pipeline.events.impressions(feed.impressions)
        self._shown_ms += [ask.time_ms] * len(feed)
        self._shown = feed.impressions
        return world.indexes_of(self._config.seed, "video", feed.video_ids)

    def follow(self, examples: pa.RecordBatch) -> None:
        """Takes what the user did with the feed that was picked last: a video after the other, each action when it is done."""
        actions, rows = actions_of(examples, self._shown)
        watched = np.cumsum(examples.column("dwell_ms").to_numpy())
        delay = np.minimum(watched, int(1000 * _IN_TIME * self._source.joiner.window_s))[rows]
        times = actions.column("event_time_ms").to_numpy() + delay
        actions = actions.set_column(0, actions.schema.field(0), pa.array(times))
        self._due.add(actions, times.astype(np.float64))

    def _act(self, time_ms: float) -> None:
        """Sends the actions that are done by a time, and tells the pipeline, whose next request feels them."""
        actions = self._due.take(time_ms)
        if actions is not None:
            self._actions.add(actions)
            self.pipeline.events.actions(actions)

    @property
    def learnable(self) -> int:
        """How many impressions' windows have closed, by the events in the log: so many examples there are to learn from."""
        watermark = min(self._impressions.newest_ms, self._actions.newest_ms)
        return int(np.searchsorted(self._shown_ms, watermark - int(1000 * self._source.joiner.window_s), side="right"))

    @property
    def learned(self) -> int:
        """How many examples were learned from."""
        return self._trainer.examples if self._trainer else 0

    def learn(self, time_ms: float) -> None:
        """Sends all that happened by a time, waits until what can be learned from it is learned, and serves that.

        Raises:
            ValueError: The trainer brings nothing for too long.
        """
        self._act(time_ms)
        # First the topic that is ahead: the joiner's time goes on when the other comes, all at once; so batches are cut alike.
        for topic in sorted((self._impressions, self._actions), key=lambda topic: -topic.newest_ms):
            topic.send()
        if self._trainer is None:
            return
        self._trainer.wait("the number of examples learned from", lambda: self.learned, self.learnable)
        if self.learned > self.learnable:
            raise RuntimeError(f"learned from {self.learned} examples where there are {self.learnable}")
        if steps := self._trainer.steps:
            self._trainer.wait("the step that is served", self._served_step, steps)

    def _served_step(self) -> int:
        for model in self.pipeline.models:
            model.poll()
        of = [model.step if model.version.epoch > self._first.epoch else -1 for model in self.pipeline.models]
        return min(of)

    def metrics(self) -> Mapping[str, Any]:
        """Returns what was counted."""
        shown = max(sum(self.sources.values()), 1)
        return {
            "flags": dict(self.flags),
            "sources": {name: count / shown for name, count in self.sources.most_common()},
            "shown": len(self._shown_ms),
            "learnable": self.learnable,
            "learned": self.learned,
            "steps": self._trainer.steps if self._trainer else 0,
            "faults": self.pipeline.events.faults + sum(model.faults for model in self.pipeline.models),
        }

    def close(self) -> None:
        """Lets go of the log and the models; the trainer is stopped by who started it."""
        self.pipeline.close()
        self._producer.close()
        for topic in (self._impressions, self._actions):
            topic.close()
