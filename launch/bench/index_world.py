"""What `launch.bench.index` measures with: videos, queries, and changes of the videos.

In: the benchmark's arguments. Out: vectors by number, the exact best of queries, changes that every contestant gets alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launch.bench.index_rivals import Contestant

K = 100


def made_up(number: int, dim: int, latent: int, noise: float, seed: int) -> np.ndarray:
    """Returns unit vectors float32 [N, D]: 2,000 topics of uneven size in `latent` dimensions, bent into D, and noise."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    first = world.normal(size=(latent, 4 * dim)).astype(np.float32) / latent**0.5
    second = world.normal(size=(4 * dim, dim)).astype(np.float32) / (4 * dim) ** 0.5
    topics = world.normal(size=(2000, latent)).astype(np.float32)
    share = 1 / np.arange(1, 2001) ** 0.7
    out = np.empty((number, dim), np.float32)
    for start in range(0, number, 1 << 17):
        size = min(1 << 17, number - start)
        of_topic = topics[rng.choice(2000, size, p=share / share.sum())]
        bent = np.tanh(1.5 * (of_topic + 0.6 * rng.normal(size=(size, latent)).astype(np.float32)) @ first) @ second
        bent /= np.linalg.norm(bent, axis=1, keepdims=True)
        bent += noise / dim**0.5 * rng.normal(size=bent.shape).astype(np.float32)
        out[start : start + size] = bent / np.linalg.norm(bent, axis=1, keepdims=True)
    return out


def near(vectors: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Returns new unit vectors float32 [number, D] close to random ones of `vectors`: of the same kind, and no ties."""
    some = vectors[rng.integers(len(vectors), size=number)]
    some = some + np.float32(0.1 / vectors.shape[1] ** 0.5) * rng.normal(size=some.shape).astype(np.float32)
    return some / np.linalg.norm(some, axis=1, keepdims=True)


@dataclass
class World:
    """What is in the indexes: vectors by number, those that enter later included."""

    vectors: np.ndarray
    """float32 [M, D]"""
    there: np.ndarray
    """bool [M]"""
    queries: np.ndarray
    """float32 [Q, D]"""
    sample: np.ndarray
    """float32 [P, D], other queries, of which an index may know when it is built."""

    def truth(self) -> np.ndarray:
        """Returns the numbers of the best, int64 [Q, 100]."""
        from monolith_jax.serve.exact import exact_top_k

        numbers = np.flatnonzero(self.there)
        content = self.vectors[numbers]
        found = [exact_top_k(content, self.queries[first : first + 64], K)[0] for first in range(0, len(self.queries), 64)]
        return numbers[np.concatenate(found)]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Returns the share of the truth [Q, 100] that was found [Q, 100]."""
    return float(np.mean([np.isin(right, got).mean() for right, got in zip(truth, found, strict=True)]))


class Changes:
    """Changes that every contestant gets alike: a third each of videos that enter, move and leave."""

    def __init__(self, world: World, rate: float, seed: int) -> None:
        """Starts from what is there; the same seed, the same changes."""
        self.rng, self.rate, self.there = np.random.default_rng(seed), rate, world.there.copy()
        self.vectors, self.next = world.vectors.copy(), int(np.flatnonzero(world.there)[-1]) + 1
        self.begun = self.done = 0

    def step(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes 3 * number changes here; returns who leaves, and who moves or enters."""
        self.begun += 1
        enter = np.arange(self.next, self.next + number)
        self.next += number
        # Drawn until enough of them are there: to list all that are would take longer than the changes.
        drawn = self.rng.integers(self.next - number, size=16 * number)
        some = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        some = some[self.there[some]][: 2 * number]
        move, leave = some[:number], some[number:]
        self.vectors[move] = near(self.vectors, number, self.rng)
        self.there[leave], self.there[enter] = False, True
        return leave, np.concatenate([move, enter])

    def apply(self, contestant: Contestant, number: int) -> None:
        """Applies 3 * number changes."""
        leave, both = self.step(number)
        contestant.remove(leave)
        contestant.put(both, self.vectors[both])
        self.done += 1

    def go_on(self, contestant: Contestant, ends: Callable[[], bool]) -> tuple[int, int]:
        """Applies changes at the rate until it ends; returns how many, and how many should have been."""
        done, begun, period_s = 0, time.perf_counter(), 30 / self.rate
        while not ends():
            self.apply(contestant, 10)
            done += 30
            time.sleep(max(begun + done / 30 * period_s - time.perf_counter(), 0))
        return done, int((time.perf_counter() - begun) * self.rate)


def world_of(args: argparse.Namespace) -> World:
    """Returns the videos and queries that the benchmark's arguments ask for; of a file's queries half are the sample.

    Raises:
        ValueError: The file has not so many videos.
    """
    later = max(int(args.changes * (args.seconds * args.rounds + 5)), 1000)  # enough videos that enter
    if args.vectors:
        with np.load(args.vectors) as file:
            videos, queries = file["videos"].astype(np.float32), file["queries"].astype(np.float32)
        sample, queries = queries[: len(queries) // 2], queries[len(queries) // 2 :][: args.queries]
        if args.videos > len(videos):
            raise ValueError(f"{args.vectors} has {len(videos):,} videos, --videos asks for {args.videos:,}")
        videos = videos[np.random.default_rng(0).permutation(len(videos))]
        rest = videos[args.videos :][:later]
        videos = videos[: args.videos]
        videos = np.concatenate([videos, rest, near(videos, later - len(rest), np.random.default_rng(1))])
    else:
        videos = made_up(args.videos + later, args.dim, args.latent, args.noise, 1)
        sample, queries = (
            made_up(size, args.dim, args.latent, args.noise, seed) for size, seed in ((2500, 3), (args.queries, 2))
        )
    return World(videos, np.arange(len(videos)) < args.videos, queries, sample)
