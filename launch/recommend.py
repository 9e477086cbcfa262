"""Recommends videos to a user, and says why: `python -m launch.recommend --help`.

In: the folder of a run that published (Experiment.publisher), or was exported. Out: a feed as a table: each video with the
source that found it, what was predicted of it and what that is worth; and what each stage took.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import parse_gin

if TYPE_CHECKING:
    from monolith_jax.serve.pipeline import Pipeline
    from monolith_jax.serve.request import Feed

EXAMPLE = "python -m launch.recommend --workdir=checkpoints/for_you --user=3"
_HEADS = ("like", "comment", "share", "follow", "complete", "skip", "play_ratio")
"""Heads that the table shows, where the ranker has them."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.recommend",
        description="Recommends videos to a user of a run, and says why.",
        epilog=f"the run's config may be changed: --gin.RerankConfig.explore_share=0.5\n\nexample:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="FOLDER", help="the run folder")
    parser.add_argument("--deltas", type=Path, metavar="FOLDER", help="deltas or an export (default: WORKDIR/deltas)")
    parser.add_argument("--user", metavar="ID", help="a user's id (default: the one who was active last)")
    parser.add_argument("--number", type=int, default=10, metavar="N", help="videos of the feed (default: %(default)s)")
    parser.add_argument("--group", default="", help="the user's group, for RankConfig.groups")
    parser.add_argument("--like", default="", metavar="IDS", help="videos that the user likes right before, by commas")
    replay = "examples of the source that tell of videos and users; of a log: seconds that it goes back (default: %(default)s)"
    parser.add_argument("--replay", type=int, default=500_000, metavar="N", help=replay)
    return parser


def table(feed: Feed, pipeline: Pipeline) -> Any:
    """Returns a feed as a table."""
    from rich.table import Table

    shown = [name for name in _HEADS if name in feed.heads]
    columns = ["", "video", "author", "tags", "found by", "value", *shown, "chance"]
    out = Table(*columns, title=f"feed of user {feed.user_id}", title_justify="left")
    taken = pipeline.catalogue.take(
        feed.video_ids, columns=[name for name in ("author_id", "tag_id") if name in _known(pipeline)]
    )
    for place, video in enumerate(feed.video_ids.tolist()):
        tags = [f"{tag % 1000:03d}" for tag in _items(taken, "tag_id", place)]
        authors = [f"{author % 10**6:06d}" for author in _items(taken, "author_id", place)]
        scores = [f"{feed.scores[place, feed.heads.index(name)]:.3f}" for name in shown]
        why = feed.sources[place] + (", by chance" if feed.explored[place] else "")
        why += "".join(f", {rule} relaxed" for at, rule in feed.relaxed if at == place)
        row = [str(place + 1), str(video), " ".join(authors), " ".join(tags), why, f"{feed.values[place]:.3f}"]
        out.add_row(*row, *scores, f"{feed.propensities[place]:.3f}")
    return out


def _known(pipeline: Pipeline) -> tuple[str, ...]:
    return pipeline.config.catalogue.columns


def _items(taken: Any, name: str, row: int) -> list[int]:
    if name not in taken.columns:
        return []
    values, lengths = taken.columns[name]
    return [int(one) for one in values[row].reshape(-1)[: lengths[row]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a feed; returns 0, or 1 where there is nothing to serve."""
    parser = _parser()
    flags = [option for action in parser._actions for option in action.option_strings]
    asked, overrides = parse_gin(parser, argv, flags)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console

    from monolith_jax.experiment import load

    console = Console(width=None if sys.stdout.isatty() else 160)
    config = asked.workdir / "config.gin"
    if not config.is_file():
        print(f"{asked.workdir} is no run folder: it has no config.gin; train first, see {EXAMPLE}", file=sys.stderr)
        return 1
    try:
        recommend(load([config], overrides), asked, console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def recommend(experiment: Any, asked: argparse.Namespace, console: Any) -> None:
    """Makes the pipeline, asks it, prints the answer."""
    from launch.serving import actions_of, open_pipeline, replay
    from monolith_jax.serve.request import FLAGS, Request

    with console.status("loading the model"):
        pipeline = open_pipeline(experiment, asked.deltas or asked.workdir / "deltas")
    try:
        with console.status("reading the source") as status:
            number = replay(pipeline, experiment, asked.replay, lambda read: status.update(f"reading the source: {read:,}"))
        with console.status("making the index"):
            indexed = pipeline.build_index(pipeline.events.latest[1] + 1)
        console.print(f"{number:,} events, {len(pipeline.catalogue):,} videos, {indexed:,} in the index", highlight=False)
        user, time_ms = pipeline.events.latest
        user = user if asked.user is None else int(asked.user)
        request = Request(user, asked.number, time_ms=time_ms + 1, group=asked.group)
        if asked.like:
            liked = [int(one) for one in asked.like.split(",")]
            pipeline.events.actions(actions_of(user, liked, ["like"] * len(liked), time_ms))
        pipeline.recommend(replace(request, user_id=user ^ 1))  # Someone else: compiles what is left to compile.
        feed = pipeline.recommend(request)
        videos, _ = pipeline.user_state.history(user, time_ms + 1)
        console.print(f"{videos.size} videos in the user's history; version {feed.version}", highlight=False)
        console.print(table(feed, pipeline), highlight=False)
        for flag in feed.flags:
            console.print(f"{flag}: {FLAGS[flag]}", highlight=False)
        console.print(", ".join(f"{stage} {took:.1f} ms" for stage, took in feed.timings_ms.items()), highlight=False)
    finally:
        pipeline.close()


if __name__ == "__main__":
    sys.exit(main())
