"""A request to a feed: recall, rank, rerank, in process.

In: a `Request`, and what has happened (events, videos, deltas of the trainer). Out: a `Feed`. One call takes a user from all
videos to a feed:

    request -> user state -> recall (two-tower, fresh, trending, followed, explore) -> rank (1,000) -> rerank -> feed

A stage that fails, or for which there is no time, is replaced by something simpler, and the feed says so (`request.FLAGS`); an
answer is empty only where there is no video that may be shown.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from monolith_jax.features import featurize
from monolith_jax.serve.asked import Asked, Clock
from monolith_jax.serve.catalogue import Catalogue, CatalogueConfig, Taken
from monolith_jax.serve.crosses import table_of
from monolith_jax.serve.encode import Encoder
from monolith_jax.serve.events import Events
from monolith_jax.serve.feature_cache import FeatureCache, FeatureCacheConfig
from monolith_jax.serve.feed_log import impressions_of
from monolith_jax.serve.index import IndexConfig, VideoIndex
from monolith_jax.serve.indexer import Indexer
from monolith_jax.serve.merge import FILLS, SOURCES, Merged
from monolith_jax.serve.pool import Candidates, behind, best, by_score, pool_of, shared
from monolith_jax.serve.rank import Ranker
from monolith_jax.serve.read_columns import read_columns
from monolith_jax.serve.recall import Recall
from monolith_jax.serve.request import Feed, Request, request_row
from monolith_jax.serve.rerank import RerankConfig, Slate, rerank
from monolith_jax.serve.seen import SeenConfig, SeenFilter, seen_bytes
from monolith_jax.serve.served_model import ServedModel
from monolith_jax.serve.source_report import SourceReport
from monolith_jax.serve.sources import Sources, SourcesConfig, sources_bytes
from monolith_jax.serve.user_state import HISTORY_COLUMNS, UserState, UserStateConfig, user_state_bytes
from monolith_jax.serve.values import RankConfig, Values

_POOL = 200
"""Candidates that the rules of the feed choose from: the best ones; those of the explore source come on top."""
_LIKED = 5
"""Videos that the user liked last whose tags count."""
_SWITCH_S = 0.0005
_FEW = 256
"""Candidates of a request that has few: it is not padded to as many as there may be."""
_USERS = 2048
"""Users that the index is laid out for: a sample."""
_PRIORITY = np.array([FILLS.index(name) for name in SOURCES])
"""The order of sources where nothing is ranked."""


@dataclass(frozen=True)
class ServingConfig:
    """The way from a request to a feed."""

    catalogue: CatalogueConfig = field(default_factory=CatalogueConfig)
    """The videos that are known."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """Where the two-tower's vectors of them are searched."""
    user_state: UserStateConfig = field(default_factory=UserStateConfig)
    """What is kept of each user's last actions."""
    seen: SeenConfig = field(default_factory=SeenConfig)
    """What is kept of the videos that each user has seen."""
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    """Where candidates come from, and how many."""
    features: FeatureCacheConfig | None = None
    """What is kept of the lake's features; None: no column is looked up there."""
    rank: RankConfig | None = None
    """What a prediction is worth; None only where there is no ranker."""
    rerank: RerankConfig = field(default_factory=RerankConfig)
    """The rules of a feed."""
    refresh_per_s: int = 1000
    """Vectors made anew in a second, beside those whose rows changed: the dense weights move all of them a little."""
    seed: int = 0
    """Of exploring."""


class Pipeline:
    """The For You path of one process. Any number of threads may ask; one at a time tells it of events."""

    def __init__(self, config: ServingConfig, ranker: ServedModel | None, retrieval: ServedModel | None) -> None:
        """Takes over the served models; knows no videos and no users yet.

        Args:
            config: The way.
            ranker: Ranks; None: the feed is in the order of recall.
            retrieval: Holds the two-tower, made with `follow` of the table of videos; the same as `ranker` where both were
                trained together. None: the other sources alone.

        Raises:
            ValueError: The configs do not fit the models.
        """
        if ranker is not None and config.rank is None:
            raise ValueError("ServingConfig.rank is not set: name the heads that count, and what each is worth (RankConfig)")
        self.config = config
        self._model = ranker or retrieval
        self.models = list(dict.fromkeys(one for one in (ranker, retrieval) if one is not None))
        """Those that are served; who does not `watch` polls them, and steps the `indexer` then."""
        self._ranker, self.features = None, FeatureCache(config.features) if config.features else None
        if ranker and config.rank:
            most, live = config.rank.num_candidates, self.features.columns("video") if self.features else ()
            self._ranker = Ranker(ranker, config.catalogue.columns, (min(_FEW, most), most), live)
        self._values = Values(config.rank, ranker.towers.heads) if ranker and config.rank else None
        wanted = sum(config.sources.quotas.values())
        if config.rank and wanted > config.rank.num_candidates:
            raise ValueError(
                f"the quotas of SourcesConfig add up to {wanted}, RankConfig.num_candidates is {config.rank.num_candidates}: "
                "the last sources would never be ranked; lower the quotas or raise num_candidates"
            )
        self._encoder = Encoder(retrieval) if retrieval else None
        layouts = [self._ranker.plain_layout] if self._ranker else []
        layouts += [self._encoder.video_layout] if self._encoder else []
        self.catalogue = Catalogue(config.catalogue, layouts)
        self.user_state, self.seen = UserState(config.user_state), SeenFilter(config.seen)
        self.sources, self.report = Sources(config.sources), SourceReport()
        self.index = VideoIndex(config.index, self._encoder.dim) if self._encoder else None
        self._clock = Clock()
        states = self.sources, self.seen, self.user_state, self.catalogue
        self._recall = Recall(config.sources.quotas, self._encoder, self.index, *states, self._clock)
        self.indexer = None
        if self._encoder is not None and retrieval is not None and self.index is not None:
            two_tower = retrieval.towers.two_tower
            assert two_tower is not None
            parts = retrieval, self._encoder, self.catalogue, len(layouts) - 1, self.index
            table, recent = table_of(retrieval.layout.features, two_tower.video_column), self._recall.recent
            self.indexer = Indexer(*parts, table, config.refresh_per_s, self.sources.remove, recent)
        self.events = Events(self.catalogue, self.indexer, self.user_state, self.seen, self.sources, self.report)
        self._read = read_columns(config.catalogue, self._ranker, self._encoder, self.features)
        self._user_table = table_of(self._model.layout.features, "user_id") if self._model else ""
        self._requests, self._first_request = itertools.count(1), time.time_ns() // 1_000_000 << 20
        self._counts: Counter[str] = Counter()

    def recommend(self, request: Request) -> Feed:
        """Answers a request.

        Raises:
            ValueError: The request cannot be understood: a negative number of videos, a context that no column can hold.
        """
        return self.recommend_batch([request])[0]

    def recommend_batch(self, requests: Sequence[Request]) -> list[Feed]:
        """Answers requests; users' vectors are made, and the index is searched, for all of them at once."""
        asked = [self._ask(request, time.perf_counter()) for request in requests]
        feeds = []
        for one, hits in zip(asked, self._recall.search(asked), strict=True):
            feeds.append(self._answer(one, hits)[0])
            self.seen.add(one.request.user_id, feeds[-1].video_ids)
        return feeds

    def explain(self, request: Request) -> tuple[Feed, Candidates]:
        """Answers as `recommend`, and returns what was chosen from, too; the user counts as not having seen the feed."""
        asked = self._ask(request, time.perf_counter())
        return self._answer(asked, self._recall.search([asked])[0])

    def user_vectors(self, requests: Sequence[Request]) -> np.ndarray:
        """Returns the two-tower's vectors of users who would ask now, float32 [B, D].

        Raises:
            ValueError: There is no two-tower.
        """
        if self.indexer is None:
            raise ValueError("there is no two-tower: give the pipeline a model that was trained with Experiment.retrieval")
        return self._recall.user_vectors([self._ask(request, time.perf_counter()).row for request in requests])

    def build_index(self, time_ms: int | None = None) -> int:
        """Fills the index at once, laid out for the users that are known; returns how many videos it holds. Without: slowly."""
        if self.indexer is None:
            return 0
        users = self.user_state.users(_USERS).tolist()
        return self.indexer.build(self.user_vectors([Request(user, time_ms=time_ms) for user in users]) if users else None)

    def _ask(self, request: Request, began_s: float) -> Asked:
        """Looks up what is known of the user."""
        if request.number < 0:
            raise ValueError(f"Request.number must be at least 0, got {request.number}")
        time_ms = int(1000 * time.time()) if request.time_ms is None else request.time_ms
        videos, bits = self.user_state.history(request.user_id, time_ms)
        known = self._history_columns(videos, bits)
        found = self.features.user(request.user_id, time_ms, self._read.user) if self.features and self._read.user else None
        looked_up = dict(zip(found.schema.names, found.columns, strict=True)) if found else {}
        row = request_row(request, time_ms, self._read.request, known, looked_up)
        count = next(self._requests)
        rng = np.random.default_rng([self.config.seed, count])
        state = self.config.user_state
        liked = videos[bits >> state.actions.index(state.positive) & 1 > 0][:_LIKED] if state.positive else videos[:0]
        asked = Asked(request, self._first_request + count, time_ms, row, liked, began_s, rng, [], {})
        if not videos.size and not self._has_row(request.user_id):
            asked.flags.append("unknown_user")
        self._clock.note([asked], "user", began_s)
        return asked

    def _history_columns(self, videos: np.ndarray, bits: np.ndarray) -> dict[str, pa.Array]:
        """Returns a history by columns, as `stream.history` makes them; what is told of a video that has left is null."""
        config = self.config.user_state
        found = {name: pa.array(values) for name, values in zip(HISTORY_COLUMNS, (videos, bits), strict=True)}
        names = [name for name in self.config.catalogue.columns if name != "video_id"]
        names = [one for one in names if {f"history_{one}", f"positive_{one}"} & set(self._read.request)]
        for name, (values, lengths) in self.catalogue.take(videos, columns=names).columns.items():
            found[f"history_{name}"] = pa.array(values if values.ndim == 1 else values[:, 0], mask=lengths == 0)
        if config.positive:
            liked = pa.array((bits >> config.actions.index(config.positive) & 1).astype(np.bool_))
            history = [(name, array) for name, array in found.items() if name != HISTORY_COLUMNS[1]]
            found |= {f"positive_{name.removeprefix('history_')}": array.filter(liked) for name, array in history}
        return found

    def _has_row(self, user_id: int) -> bool:
        """Returns whether training knows the user."""
        model, table = self._model, self._user_table
        return model is not None and table != "" and bool(model.vectors(table, np.array([user_id]))[1][0])

    def _answer(self, asked: Asked, hits: np.ndarray) -> tuple[Feed, Candidates]:
        merged = self._recall.candidates(asked, hits)
        candidates = self._rank(asked, merged)
        slate, rows = self._rerank(asked, candidates)
        if slate.order.size < asked.request.number:
            # Too few may be shown: behind them whatever else there is, such as was seen already.
            asked.flags.append("seen_again")
            candidates = self._rank(asked, self._recall.anything(asked, merged))
            slate, rows = self._rerank(asked, candidates)
        return self._feed(asked, candidates, slate, rows), candidates

    def _rank(self, asked: Asked, merged: Merged) -> Candidates:
        """Returns what the candidates are worth: by the ranker, or where it cannot, by their order."""
        began_s = time.perf_counter()
        rows = np.flatnonzero(self._may_be_shown(asked.request, merged.ids))
        ids, source, sources = merged.ids[rows], merged.source[rows], merged.sources[rows]
        taken = self.catalogue.take(ids, 0 if self._ranker else None, self._read.catalogue)
        explore = (sources >> SOURCES.index("explore")).astype(np.bool_)
        places = np.argsort(np.argsort(_PRIORITY[source], kind="stable"))
        by_order = np.where(taken.known, -places, -np.inf).astype(np.float32)
        # As of the request: all that is ranked is of one moment, and of the same one as what is logged.
        live = self.features.videos(ids, asked.time_ms, self._read.video) if self.features and self._read.video else None
        found = Candidates(ids, source, explore, sources == 0, taken, by_order, None, live)
        if self._ranker is None:
            asked.flags.append("no_ranker")
        elif ids.size and self._clock.has_time(asked, "rank"):
            try:
                found = self._ranked(asked, found)
            except Exception as error:  # The order of recall has to do.
                self._clock.failed([asked], "rank", error)
            self._clock.note([asked], "rank", began_s)
        return found

    def _may_be_shown(self, request: Request, ids: np.ndarray) -> np.ndarray:
        """Returns which videos are known, safe and of an author that the user has not blocked, bool [N]."""
        config = self.config.catalogue
        names = [name for name in ("author_id", config.unsafe_column) if name in self._read.catalogue]
        taken = self.catalogue.take(ids, columns=names)
        fine = taken.known
        if config.unsafe_column:
            unsafe, lengths = taken.columns[config.unsafe_column]
            fine = fine & ~(unsafe.astype(np.bool_) & (lengths > 0))
        if len(request.blocked_authors) and "author_id" in taken.columns:
            authors, lengths = taken.columns["author_id"]
            fine = fine & ~(np.isin(authors, np.array(request.blocked_authors, np.int64)) & (lengths > 0))
        return fine

    def _ranked(self, asked: Asked, candidates: Candidates) -> Candidates:
        ranker, values, taken = self._ranker, self._values, candidates.taken
        assert ranker is not None and values is not None and taken.features is not None
        once, number, live = ranker.once_features(asked.row), candidates.ids.size, candidates.live
        raw = ranker.crosses.of_taken(number, taken.columns, live)
        cross_ids = ranker.crosses.ids(ranker.crosses.of_request(asked.row), raw)
        of_live = featurize(live, ranker.live_layout) if live is not None else None
        scores = ranker.scores(once, ranker.joined(taken.features, cross_ids, of_live))
        duration_ms = taken.columns.get("duration_ms", (np.zeros(number),))[0]
        if not np.isfinite(scores).all(1).any():
            raise FloatingPointError("no candidate has a score that is a number")
        of_candidates = values(scores, duration_ms, asked.request.group, self._interest(asked, taken))
        return candidates._replace(values=np.where(taken.known, of_candidates, -np.inf), scores=scores)

    def _interest(self, asked: Asked, taken: Taken) -> np.ndarray | float:
        """Returns with what share of the videos that the user liked last candidates have a tag in common, [K]."""
        if not asked.liked.size or "tag_id" not in taken.columns:
            return 0.0
        liked, lengths = self.catalogue.take(asked.liked, columns=("tag_id",)).columns["tag_id"]
        return shared(*taken.columns["tag_id"], liked, lengths)

    def _rerank(self, asked: Asked, candidates: Candidates) -> tuple[Slate, np.ndarray]:
        """Returns the slate, and which candidates its pool had."""
        began_s, number = time.perf_counter(), asked.request.number
        values = behind(candidates.values, candidates.is_spare)
        rows = best(values, candidates.is_explore, max(_POOL, 4 * number))
        pool = pool_of(candidates, rows, self.index)
        try:
            slate = rerank(pool, self.config.rerank, number, asked.rng)
            if rows.size < values.size and (slate.relaxed or slate.order.size < number):
                # The best are too much alike: among all others there may be some that keep the rules.
                rows = np.arange(values.size)
                pool = pool_of(candidates, rows, self.index)
                slate = rerank(pool, self.config.rerank, number, asked.rng)
        except Exception as error:  # Only what must not be shown is left out.
            self._clock.failed([asked], "rerank", error)
            slate = by_score(pool, asked.request.number)
        self._clock.note([asked], "rerank", began_s)
        return slate, rows

    def _feed(self, asked: Asked, candidates: Candidates, slate: Slate, rows: np.ndarray) -> Feed:
        began_s, picked = time.perf_counter(), rows[slate.order]
        ids, source = candidates.ids[picked], candidates.source[picked]
        if ids.size < asked.request.number:
            asked.flags.append("short" if ids.size else "empty")
        heads = tuple(head.label for head in self._ranker.heads) if self._ranker else ()
        scores, values = np.full((ids.size, len(heads)), np.nan), np.full(ids.size, np.nan, np.float32)
        if candidates.scores is not None and self._values:
            scores, values = self._values.calibrated(candidates.scores[picked]), candidates.values[picked]
        feed = Feed(
            request_id=asked.request_id,
            user_id=asked.request.user_id,
            time_ms=asked.time_ms,
            video_ids=ids,
            values=values,
            scores=scores,
            heads=heads,
            sources=tuple(SOURCES[number] for number in source.tolist()),
            explored=slate.explored,
            propensities=slate.propensity,
            relaxed=slate.relaxed,
            flags=tuple(dict.fromkeys(asked.flags)),
            version=self._model.version if self._model else None,
            timings_ms=asked.timings_ms,
            impressions=None,
        )
        live = candidates.live.take(pa.array(picked)) if candidates.live is not None else None
        feed = replace(feed, impressions=impressions_of(feed, asked.row, self.catalogue.batch(ids), live))
        self.report.fed(feed.request_id, ids, source)
        self._counts.update(feed.flags)
        self._counts["feeds"] += 1
        self._clock.note([asked], "feed", began_s)
        asked.timings_ms["total"] = 1000 * (time.perf_counter() - asked.began_s)
        return feed

    def watch(self, model_period_s: float = 0.1, index_period_s: float = 0.1) -> None:
        """Starts threads that follow the trainer's deltas and keep the index in step with them.

        Python's threads of this process then give way every 0.5 ms (`sys.setswitchinterval`): a request waits no longer than
        that for one of them.
        """
        sys.setswitchinterval(_SWITCH_S)
        for model in self.models:
            model.watch(model_period_s)
        if self.indexer:
            self.indexer.watch(index_period_s)

    def close(self) -> None:
        """Ends all threads; the served models are closed too."""
        self.events.close()
        if self.features:
            self.features.close()
        if self.indexer:
            self.indexer.close()
        for model in self.models:
            model.close()

    def metrics(self) -> dict[str, Any]:
        """Returns counts of feeds and flags, the expected time of each stage, memory at most, and what the parts tell."""
        found: dict[str, Any] = {
            "counts": dict(self._counts),
            "costs_ms": dict(self._clock.costs_ms),
            "version": self._model.version if self._model else None,
            "last_fault": self._clock.last_fault,
            "events": self.events.metrics(),
        }
        config = self.config
        found["memory_bytes"] = {
            "catalogue": self.catalogue.nbytes,
            "index": self.index.nbytes if self.index is not None else 0,
            "user_state": user_state_bytes(config.user_state),
            "seen": seen_bytes(config.seen),
            "sources": sources_bytes(config.sources),
        }
        if self.features:
            found["features"], found["memory_bytes"]["features"] = self.features.metrics(), self.features.nbytes
        if self._values:
            found["values"] = self._values.metrics()
        if self.indexer:
            found["index"] = self.indexer.metrics()
        return found
