"""The whole way to a feed, judged by held-out sessions: what recall finds, where ranking puts it, what the feed shows.

In: a `Subject` whose experiment says how to serve (`Experiment.serving`). Out: rows by stage, by source and of the time that it
took, with intervals over users; tables and a figure.

The pipeline first reads the training source (`Subject.training`), then the held-out examples in the order of time (`sessions`).
A request's feed is judged by what the user liked in the session that it opens. What the user was really shown came from another
system, and what was not shown could not be liked: all figures are lower bounds, and good to compare models by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.evaluation.held_out import remember, test_files
from launch.evaluation.past import Past
from launch.evaluation.retrieval import intervals, is_positive
from launch.evaluation.sessions import Asked, replay, tell_anew
from launch.evaluation.subject import Subject
from launch.evaluation.written import Row, table, with_interval
from launch.readers import log_of, make_memories, open_source
from launch.serving import open_pipeline
from monolith_jax.evaluate import retrieval
from monolith_jax.reader import Memory
from monolith_jax.serve.merge import SOURCES
from monolith_jax.serve.request import Request
from monolith_jax.stream.history import ids_of

if TYPE_CHECKING:
    from monolith_jax.experiment import Experiment
    from monolith_jax.serve.pipeline import Pipeline

NUMBER = 10
"""Videos of a feed."""
STAGES = ("recall", "ranking", "feed")


def measure(subject: Subject, most: int, number: int, seed: int = 0) -> list[Row]:
    """Returns the rows: "feed_stage", "feed", "feed_source" and "latency".

    Args:
        subject: The model.
        most: Requests at most.
        number: Resamples of users for the intervals; 0: none.
        seed: Of the draws.

    Raises:
        ValueError: `Experiment.serving` is not set, there is no test source, or the training source is a log.
    """
    experiment = subject.experiment
    check(experiment, most)
    positives = _positives(experiment)
    pipeline = open_pipeline(experiment, subject.served)
    try:
        memories, again = make_memories(experiment), _told_anew(experiment)
        past = Past()
        counts = _fill(pipeline, subject, memories, positives, again, past)
        pipeline.build_index(pipeline.events.latest[1] + 1)
        pipeline.explain(Request(pipeline.events.latest[0], NUMBER, time_ms=pipeline.events.latest[1] + 1))  # Compiles.
        source = open_source(test_files(experiment))
        asked = list(replay(pipeline, source, memories, positives, NUMBER, again, most, past))
        if not asked:
            raise ValueError(f"no held-out session has a new video with {', '.join(positives)}: there is nothing to judge by")
        return [
            *_of_stages(asked, number, seed),
            _of_feeds(asked, pipeline, counts, number, seed),
            *_of_sources(asked),
            *_latencies(asked),
        ]
    finally:
        pipeline.close()


def check(experiment: Experiment, most: int) -> None:
    """Refuses what this part cannot judge.

    Raises:
        ValueError: `Experiment.serving` is not set, the training source is a log, or there are to be no requests.
    """
    if log_of(experiment.source):
        raise ValueError("--feed reads the training source for videos and users, and this one's is a log, which may be gone")
    if experiment.serving is None:
        raise ValueError(
            "Experiment.serving is not set, and --feed judges what it serves: give --gin.Experiment.serving=@ServingConfig(), "
            "and a RankConfig; configs/for_you.gin shows how"
        )
    if most < 1:
        raise ValueError(f"--requests must be at least 1, got {most}")


def _positives(experiment: Experiment) -> tuple[str, ...]:
    if experiment.retrieval:
        return experiment.retrieval.positives
    names = [head.label for head in experiment.heads if head.kind == "binary"]
    return ("like",) if "like" in names else tuple(names[:1])


def _told_anew(experiment: Experiment) -> bool:
    """Returns whether columns of videos come from counters, and so change."""
    keys = experiment.counters.keys if experiment.counters else ()
    columns = experiment.serving.catalogue.columns if experiment.serving else ()
    return any(column.startswith(f"{key}_") for key in keys for column in columns)


def _fill(
    pipeline: Pipeline, subject: Subject, memories: Sequence[Memory], positives: Sequence[str], again: bool, past: Past
) -> Counter[int]:
    """Tells a pipeline and the past of `Subject.training`; returns how often each video was liked there."""
    counts: Counter[int] = Counter()
    for plain in subject.training():
        examples = remember(memories, plain)
        pipeline.events.examples(examples)
        if again:
            tell_anew(pipeline, examples)
        liked = is_positive(examples, positives)
        videos = ids_of(examples, "video_id", "an example")[0]
        past.add_training(ids_of(examples, "user_id", "an example")[0], videos)
        counts.update(videos[liked].tolist())
    past.end_training()
    return counts


def _by_user(asked: Sequence[Asked], values: np.ndarray) -> np.ndarray:
    """Returns means over each user's requests, float64 [U], of values [R], those that are NaN left out."""
    _, codes = np.unique([one.feed.user_id for one in asked], return_inverse=True)
    there = ~np.isnan(values)
    total, number = (np.bincount(codes, weights) for weights in (np.where(there, values, 0.0), there.astype(np.float64)))
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _lists(lists: Sequence[np.ndarray], length: int) -> np.ndarray:
    out = np.full((len(lists), length), -1, np.int64)
    for row, videos in zip(out, lists, strict=True):
        row[: min(length, videos.size)] = videos[:length]
    return out


def _of_stages(asked: Sequence[Asked], number: int, seed: int) -> list[Row]:
    """Returns a row a stage: of its first ten what `retrieval.per_user` tells, and of the pool how much it has at all."""
    wanted = [np.array(one.wanted, np.int64) for one in asked]
    stages = {"recall": [one.pool for one in asked], "ranking": [one.ranked for one in asked]}
    stages["feed"] = [one.feed.video_ids for one in asked]
    rows = []
    for stage in STAGES:
        found = stages[stage]
        of_requests = retrieval.per_user(_lists(found, NUMBER), wanted, (NUMBER,))
        if stage != "feed":
            whole = _lists(found, max(NUMBER, *(one.size for one in found)))
            right = retrieval.hits(whole, wanted)
            of_requests["in_pool"] = right.sum(axis=1) / np.array([one.size for one in wanted])
            of_requests["place"] = np.where(right.any(axis=1), right.argmax(axis=1) + 1.0, np.nan)
        of_users = {name.replace("@", "_at_"): _by_user(asked, values) for name, values in of_requests.items()}
        rows.append({"kind": "feed_stage", "stage": stage, **intervals(of_users, number, seed)})
    return rows


def _of_feeds(asked: Sequence[Asked], pipeline: Pipeline, counts: Counter[int], number: int, seed: int) -> Row:
    """Returns what the feeds are like together."""
    found = _lists([one.feed.video_ids for one in asked], NUMBER)
    videos = np.union1d(pipeline.catalogue.ids(), found[found != -1])
    of_requests = {"novelty": retrieval.novelty(found, videos, np.array([counts[one] for one in videos.tolist()]), NUMBER)}
    if pipeline.index is not None:
        vectors, known = pipeline.index.vectors(videos)
        of_requests["intra_list_diversity"] = retrieval.intra_list_diversity(found, videos[known], vectors[known], NUMBER)
    flags = Counter(flag for one in asked for flag in one.feed.flags)
    return {
        "kind": "feed",
        "requests": len(asked),
        "users": len({one.feed.user_id for one in asked}),
        "wanted": sum(len(one.wanted) for one in asked),
        "unknown": sum(one.unknown for one in asked),
        "videos": videos.size,
        "coverage": retrieval.coverage(found, videos.size, NUMBER),
        "candidates": float(np.mean([one.pool.size for one in asked])),
        **intervals({name: _by_user(asked, values) for name, values in of_requests.items()}, number, seed),
        "flags": dict(flags),
    }


def _of_sources(asked: Sequence[Asked]) -> list[Row]:
    """Returns a row a source: its share of candidates and of feeds, and how often what it gave was liked."""
    rows = []
    pool = np.concatenate([one.source for one in asked])
    in_pool = np.concatenate([np.isin(one.pool, one.wanted) for one in asked])
    fed = np.array([source for one in asked for source in one.feed.sources])
    in_feed = np.concatenate([np.isin(one.feed.video_ids, one.wanted) for one in asked])
    for place, name in enumerate(SOURCES):
        of_pool, of_feed = pool == place, fed == name
        rows.append(
            {
                "kind": "feed_source",
                "source": name,
                "candidates": int(of_pool.sum()),
                "candidate_hits": int(in_pool[of_pool].sum()),
                "fed": int(of_feed.sum()),
                "hits": int(in_feed[of_feed].sum()),
                "share": float(of_feed.mean()) if fed.size else 0.0,
                "hit_rate": float(in_feed[of_feed].mean()) if of_feed.any() else 0.0,
            }
        )
    return rows


def _latencies(asked: Sequence[Asked]) -> list[Row]:
    rows = []
    for stage in dict.fromkeys(stage for one in asked for stage in one.feed.timings_ms):
        took = np.array([one.feed.timings_ms[stage] for one in asked if stage in one.feed.timings_ms])
        p50, p99 = np.quantile(took, (0.5, 0.99)).tolist()
        rows.append({"kind": "latency", "stage": stage, "p50_ms": p50, "p99_ms": p99})
    return rows


def tables(rows: Sequence[Row]) -> list[Any]:
    """Returns the rows as tables: stages, sources, time."""
    whole = next(row for row in rows if row["kind"] == "feed")
    flags = "".join(f", {name} {count}" for name, count in whole["flags"].items())
    title = f"Feed: {whole['requests']:,} requests of {whole['users']:,} users, {whole['wanted']:,} videos to be found"
    caption = (
        f"{whole['unknown']:,} of these nobody had been shown before; {whole['candidates']:,.0f} candidates a request{flags}"
    )
    names = (f"hit_rate_at_{NUMBER}", f"recall_at_{NUMBER}", f"ndcg_at_{NUMBER}", "in_pool")
    columns = [name.replace("_at_", "@").replace("_", " ") for name in names]
    stages = table(title, "stage", *columns, "first place", caption=caption)
    for row in (row for row in rows if row["kind"] == "feed_stage"):
        place = "-" if row.get("place") is None else f"{row['place']:.0f}"
        stages.add_row(row["stage"], *(with_interval(row, name) for name in names), place)
    sources = table("Sources", "source", "candidates", "liked", "in feeds", "liked", "share", "hit rate")
    for row in (row for row in rows if row["kind"] == "feed_source"):
        counts = [f"{row[name]:,}" for name in ("candidates", "candidate_hits", "fed", "hits")]
        sources.add_row(row["source"], *counts, f"{row['share']:.1%}", f"{row['hit_rate']:.4f}")
    feeds = table("Feeds", "what", "value")
    feeds.add_row(f"coverage@{NUMBER} of {whole['videos']:,} videos", f"{whole['coverage']:.4f}")
    for name in ("novelty", "intra_list_diversity"):
        feeds.add_row(name.replace("_", " "), with_interval(whole, name))
    for row in (row for row in rows if row["kind"] == "latency"):
        feeds.add_row(f"{row['stage']}, p50 and p99", f"{row['p50_ms']:.1f} and {row['p99_ms']:.1f} ms")
    return [stages, sources, feeds]


def plot(rows: Sequence[Row], output: Path) -> list[Path]:
    """Draws hit rates by stage and sources; returns the file, `feed.png`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from launch.evaluation.figures import pyplot

    draw = pyplot()
    figure, (left, right) = draw.subplots(1, 2, figsize=(9, 3), layout="constrained")
    name = f"hit_rate_at_{NUMBER}"
    stages = [row for row in rows if row["kind"] == "feed_stage"]
    values = [row[name] for row in stages]
    bounds = [[row[name] if row[name + end] is None else row[name + end] for row in stages] for end in ("_low", "_high")]
    ends = [[abs(bound - value) for bound, value in zip(of_end, values, strict=True)] for of_end in bounds]
    left.bar([row["stage"] for row in stages], values, yerr=ends, color="#2563a8", capsize=3)
    left.set_title(f"hit rate of the first {NUMBER}, by stage")
    sources = [row for row in rows if row["kind"] == "feed_source" and (row["fed"] or row["candidates"])]
    right.barh([row["source"].replace("_", " ") for row in sources], [row["share"] for row in sources], color="#3a8f5c")
    right.invert_yaxis()
    right.set_title("share of feeds by source")
    path = output / "feed.png"
    figure.savefig(path, dpi=130)
    draw.close(figure)
    return [path]
