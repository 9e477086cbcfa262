"""Requests to feeds under load: `python -m launch.bench.serve --help`.

Trains the two-tower and the MMoE of `configs/for_you_large.gin` on a synthetic world, serves them with all videos of that world
in the catalogue and the index, and asks for feeds, one request after the other, each user reacting to what was shown. Meanwhile
another process writes deltas that change a thousand videos a second, which then move in the index, and videos come and go.

Then: the recall of the index against exact search while that goes on; its rate against usearch and hnswlib over the same
vectors (`launch.bench.index`); and what two likes of videos of one tag do to the next feed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = "python -m launch.bench.serve --workdir /tmp/serve --videos 1000000"
MOVES_PER_S = 1200
"""Videos of the catalogue whose rows change."""
COMING_PER_S = 100
"""Videos that come, each in the place of the one that came first."""
STAGES = ("user", "recall", "merge", "rank", "rerank", "feed", "total")
_BLOCK = 1 << 16


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench.serve",
        description="Measures requests to feeds while deltas are applied and videos come, move and go.",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="for the run, which is made once, and its deltas")
    parser.add_argument("--videos", type=int, default=1_000_000, help="in the catalogue and the index (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="of training, batches of 512 (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=3000, help="that are measured (default: %(default)s)")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True, help="measure usearch and hnswlib too")
    parser.add_argument("--rivals_videos", type=int, default=1_000_000, help="of these for the rivals (default: %(default)s)")
    parser.add_argument("--role", choices=("write",), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def trained_folder(asked: argparse.Namespace) -> Path:
    """Returns the folder of the run."""
    return asked.workdir.absolute() / f"run_{asked.videos}_{asked.steps}"


def trained(asked: argparse.Namespace) -> Path:
    """Returns the folder of a trained run, made unless it is there."""
    run = trained_folder(asked)
    if not (run / "done").exists():
        command = [sys.executable, "-m", "launch.train", "--gin_file=configs/for_you_large.gin", f"--workdir={run}"]
        command += [f"--gin.VIDEOS={asked.videos}", f"--gin.TrainConfig.steps={asked.steps}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (run / "done").touch()
    deltas = asked.workdir.absolute() / "deltas"
    shutil.rmtree(deltas, ignore_errors=True)
    shutil.copytree(run / "deltas", deltas)
    return run


def write(asked: argparse.Namespace) -> None:
    """Writes deltas until it is ended, four a second, as a trainer would: rows of videos and of what else a batch touches."""
    import numpy as np

    from monolith_jax.experiment import load
    from monolith_jax.stream.world import ids_of
    from monolith_jax.sync.delta import Content, DeltaFolder, Manifest, Rows, Version

    folder, rng = DeltaFolder(asked.workdir.absolute() / "deltas"), np.random.default_rng(1)
    last = folder.chain(None, ())[-1]
    base = folder.manifest(last).base
    content = folder.read(base)
    dense = {name: np.array(array) for name, array in content.dense.items()} if content.dense else None
    experiment = load([trained_folder(asked) / "config.gin"])
    world = World(experiment, asked.videos)
    alive = ids_of(world.config.seed, "video", world.shown)
    known = {name: np.arange(of_table.ids.size) for name, of_table in content.rows.items()}
    known["video"] = np.flatnonzero(np.isin(content.rows["video"].ids, alive))
    vectors_of = {name: np.array(of_table.vectors, np.float32) for name, of_table in content.rows.items()}
    shares = {"video": MOVES_PER_S / 4, "user": 100, "author": 250, "sound": 250, "user_author": 500}
    number, started = 0, time.monotonic()
    while True:
        number += 1
        rows = {}
        for name, share in shares.items():
            of_table = content.rows[name]
            picked, every = rng.choice(known[name], min(int(share), known[name].size), replace=False), vectors_of[name]
            # They walk, as rows do that learn: what was moved goes on from there.
            every[picked] += rng.normal(0, 0.02 * every[:1000].std(), every[picked].shape).astype(np.float32)
            rows[name] = Rows(of_table.ids[picked], every[picked], None)
        version = Version(last.epoch, last.sequence + 1)
        now_ms = int(1000 * time.time())
        if dense and number % 4 == 0:
            for array in dense.values():
                array += rng.normal(0, 1e-4 * (array.std() + 1e-9), array.shape).astype(array.dtype)
        folder.write_part(version, 0, Content(rows=rows, dense=dense if number % 4 == 0 else None), "float16")
        told: dict[str, Any] = {
            "step": number,
            "event_time_ms": now_ms,
            "created_ms": now_ms,
            "position": [],
            "format": "float16",
        }
        folder.commit(Manifest(kind="delta", version=version, previous=last, base=base, **told))
        last = version
        time.sleep(max(started + number / 4 - time.monotonic(), 0.0))


class World:
    """The synthetic world around a pipeline: its videos, and what users do with a feed."""

    def __init__(self, experiment: Any, videos: int) -> None:
        """Takes the videos that are alive when training ended, the next ones up to `videos`, and the time."""
        import numpy as np

        from monolith_jax.stream.world import newest

        self.config, self.rng = experiment.source, np.random.default_rng(2)
        self.time_ms = self.config.start_ms + int(1000 * experiment.train.steps * 512 / self.config.events_per_s)
        now = np.array([self.time_ms])
        last_video, last_user = (int(newest(self.config, space, now)[0]) for space in ("video", "user"))
        self.first = last_video + 1 - self.config.live_videos
        self.shown, self.next = np.arange(self.first, last_video + 1), self.first + videos
        self.users = np.arange(last_user + 1 - self.config.live_users, last_user + 1)

    def batches(self) -> Iterator[Any]:
        """Yields all videos, those that nobody has seen first: they are the first to leave."""
        import numpy as np

        from monolith_jax.stream.synthetic import videos

        shown = self.first + self.config.live_videos
        for start, end in ((shown, self.next), (self.first, shown)):
            for first in range(start, end, _BLOCK):
                yield videos(self.config, np.arange(first, min(first + _BLOCK, end)), self.time_ms - 3_600_000)

    def coming(self, number: int) -> Any:
        """Returns the next videos."""
        import numpy as np

        from monolith_jax.stream.synthetic import videos

        self.next += number
        return videos(self.config, np.arange(self.next - number, self.next), self.time_ms)

    def user_ids(self, number: int) -> Any:
        """Draws users, int64 [N] ids."""
        from monolith_jax.stream.world import ids_of

        return ids_of(self.config.seed, "user", self.rng.choice(self.users, number))

    def reactions(self, feed: Any) -> Any:
        """Returns what a user does with a feed: actions, by the world's own chances."""
        import numpy as np

        from launch.serving import actions_of
        from monolith_jax.stream.synthetic import optimal
        from monolith_jax.stream.world import indexes_of

        seed, number = self.config.seed, len(feed)
        user = indexes_of(seed, "user", np.full(number, feed.user_id))
        chances = optimal(self.config, np.full(number, feed.time_ms), user, indexes_of(seed, "video", feed.video_ids))
        names = [name for name in ("like", "comment", "share", "follow", "dislike") for _ in range(number)]
        happened = np.concatenate([self.rng.random(number) < chances[name] for name in dict.fromkeys(names)])
        rows = np.flatnonzero(happened)
        return actions_of(
            feed.user_id, feed.video_ids[rows % number], [names[row] for row in rows], feed.time_ms, feed.request_id
        )


def filled(pipeline: Any, world: World, experiment: Any, examples: int, say: Any) -> dict[str, float]:
    """Fills catalogue, index and users' state; returns what that took."""
    from launch.serving import replay

    began = time.perf_counter()
    for number, batch in enumerate(world.batches()):
        pipeline.events.videos(batch)
        if number % 16 == 15:
            say(f"{len(pipeline.catalogue):,} videos in the catalogue")
    catalogue_s = time.perf_counter() - began
    say(f"catalogue: {len(pipeline.catalogue):,} videos in {catalogue_s:.0f} s")
    replay(pipeline, experiment, examples)
    began = time.perf_counter()
    pipeline.build_index(world.time_ms)
    build_s = time.perf_counter() - began
    say(f"index: {len(pipeline.index):,} videos in {build_s:.0f} s")
    return {"catalogue_s": catalogue_s, "index_build_s": build_s}


def measured(pipeline: Any, world: World, number: int, say: Any) -> dict[str, float]:
    """Asks for feeds, one after the other; returns the percentiles of each stage."""
    import numpy as np

    from monolith_jax.serve.request import Request

    took: dict[str, list[float]] = {stage: [] for stage in STAGES}
    flags: dict[str, int] = {}
    users = world.user_ids(number)
    for at, user in enumerate(users.tolist()):
        feed = pipeline.recommend(Request(user, time_ms=world.time_ms + at * 10))
        assert len(feed) == 10, feed
        for stage in STAGES:
            took[stage].append(feed.timings_ms.get(stage, 0.0))
        for flag in feed.flags:
            flags[flag] = flags.get(flag, 0) + 1
        pipeline.events.actions(world.reactions(feed))
        if at % 500 == 499:
            say(f"{at + 1:,} requests, p50 {np.percentile(took['total'], 50):.2f} ms")
    found = {f"{stage}_p{share}_ms": float(np.percentile(took[stage], share)) for stage in STAGES for share in (50, 99)}
    return {"p50_ms": found["total_p50_ms"], "p99_ms": found["total_p99_ms"], **found, "flags": flags}  # type: ignore[dict-item]


class Churn:
    """What goes on beside the requests: another process writes deltas, which are followed, and videos come, and go."""

    def __init__(self, pipeline: Any, world: World, asked: argparse.Namespace) -> None:
        """Starts it."""
        self._pipeline, self._world = pipeline, world
        command = [sys.executable, "-m", "launch.bench.serve", f"--workdir={asked.workdir.absolute()}", "--role=write"]
        self._writer = subprocess.Popen(command, cwd=ROOT)
        pipeline.watch()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._come, daemon=True)
        self._thread.start()
        time.sleep(5.0)  # Until it flows.
        self._before, self._began_s, self._next = pipeline.metrics()["index"], time.perf_counter(), world.next

    def _come(self) -> None:
        while not self._over.wait(0.5):
            self._pipeline.events.videos(self._world.coming(COMING_PER_S // 2))

    def rates(self) -> dict[str, float]:
        """Returns how many vectors were made in a second, by why."""
        now, took_s = self._pipeline.metrics()["index"], time.perf_counter() - self._began_s
        rates = {f"{name}_per_s": (now[name] - self._before[name]) / took_s for name in ("encoded", "refreshed")}
        return rates | {"came_per_s": (self._world.next - self._next) / took_s}

    def close(self) -> None:
        """Ends it; the served model keeps what it has."""
        self._over.set()
        self._thread.join()
        self._writer.terminate()
        self._writer.wait()


def queries(pipeline: Any, world: World, number: int) -> Any:
    """Returns vectors of users who ask now, float32 [N, D]."""
    from monolith_jax.serve.request import Request

    return pipeline.user_vectors([Request(user, time_ms=world.time_ms) for user in world.user_ids(number).tolist()])


def recall(pipeline: Any, vectors: Any, k: int = 100) -> float:
    """Returns the share of the best k by exact search that the index finds, while it changes."""
    import numpy as np

    from monolith_jax.serve.exact import exact_top_k

    found = pipeline.index.search(vectors, k)[0]
    ids = pipeline.catalogue.ids()
    every, there = pipeline.index.vectors(ids)
    places, _ = exact_top_k(every[there], vectors, k)
    exact = ids[there][np.asarray(places)]
    return float(np.mean([np.isin(one, best).mean() for one, best in zip(exact, found, strict=True)]))


def two_likes(pipeline: Any, world: World, number: int) -> dict[str, float]:
    """Returns the share of videos with a tag in the feeds of users before and after they like two videos that have it."""
    import numpy as np

    from launch.serving import actions_of
    from monolith_jax.serve.request import Request
    from monolith_jax.stream.world import ids_of

    ids = ids_of(world.config.seed, "video", world.shown)
    tags, lengths = pipeline.catalogue.take(ids, columns=("tag_id",)).columns["tag_id"]
    every, often = np.unique(tags[lengths > 0, 0], return_counts=True)
    every = every[often >= 100]
    shares, time_ms = [], world.time_ms + 3_600_000
    for at, user in enumerate(world.user_ids(number).tolist()):
        tag = world.rng.choice(every)
        liked = world.rng.choice(ids[(lengths > 0) & (tags[:, 0] == tag)], 2, replace=False)
        of_user = []
        for turn in range(2):
            if turn:
                pipeline.events.actions(actions_of(user, liked, ["like"] * 2, time_ms + 2 * at))
            feed = pipeline.recommend(Request(user, time_ms=time_ms + 2 * at + 1))
            of_feed, counts = pipeline.catalogue.take(feed.video_ids, columns=("tag_id",)).columns["tag_id"]
            has = (of_feed == tag) & (np.arange(of_feed.shape[1]) < counts[:, None])
            of_user.append(has.any(1).mean())
        shares.append(of_user)
    before, after = np.mean(shares, axis=0).tolist()
    return {"tag_share_before": before, "tag_share_after": after, "tag_share_ratio": after / max(before, 1e-9)}


def rivals(pipeline: Any, world: World, asked: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Returns what `launch.bench.index` says of the same vectors, beside usearch and hnswlib."""
    import numpy as np

    vectors, there = pipeline.index.vectors(pipeline.catalogue.ids())
    file = asked.workdir.absolute() / "vectors.npz"
    np.savez(file, videos=vectors[there], queries=queries(pipeline, world, 1000))
    say("the index beside usearch and hnswlib, whose indexes take minutes to build")
    command = [sys.executable, "-m", "launch.bench.index", f"--videos={asked.rivals_videos}", f"--vectors={file}"]
    command += ["--rivals", "usearch-f16", "hnswlib", "--rounds=3"]
    told = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True).stdout
    return {name: value for name, value in json.loads(told.splitlines()[-1]).items() if name.startswith("index_qps")}


def rss_mb() -> float:
    """Returns the memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, or the process that writes deltas; returns 0."""
    asked = _parsed(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if asked.role == "write":
        write(asked)
        return 0
    from launch.serving import open_pipeline
    from monolith_jax.experiment import load

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    run = trained(asked)
    experiment = load([run / "config.gin"])
    pipeline, world = open_pipeline(experiment, asked.workdir.absolute() / "deltas"), World(experiment, asked.videos)
    found: dict[str, Any] = {"videos": asked.videos, **filled(pipeline, world, experiment, asked.steps * 512, say)}
    measured(pipeline, world, 100, lambda text: None)  # Compiles what is left to compile.
    churn = Churn(pipeline, world, asked)
    found |= measured(pipeline, world, asked.requests, say)
    found |= churn.rates()
    found["rss_mb"] = rss_mb()
    vectors = queries(pipeline, world, 200)
    found["recall_at_100"] = recall(pipeline, vectors)
    found["version"] = list(pipeline.metrics()["version"])
    churn.close()
    found |= two_likes(pipeline, world, 300)
    if asked.rivals:
        found |= rivals(pipeline, world, asked, say)
    pipeline.close()
    for stage in STAGES:
        print(f"{stage:8s} p50 {found[f'{stage}_p50_ms']:6.2f} ms   p99 {found[f'{stage}_p99_ms']:6.2f} ms")
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
