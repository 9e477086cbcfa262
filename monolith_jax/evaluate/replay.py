"""Feeds judged in the synthetic world: who asks, what a feed was worth, and what the best one would have been.

In: a world and a seed. Out: requests; what every video is worth to whoever asks; rows of what policies reached, by hour.

    request -> what each live video is worth -> policies: random, popularity, oracle, any other -> ledger -> rows by hour

A policy is a function from an `Ask` to videos. Each lives a life of its own, over the same requests: what it has shown to a
user it does not show again. What follows is drawn such that the same video has the same luck with the same user at the same
time, whichever policy shows it (`synthetic.examples_of`). Users and videos go by their indexes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.stream import world
from monolith_jax.stream.events import labels
from monolith_jax.stream.synthetic import HEADS, SyntheticConfig, foreseen

PLAYED = "play_ratio"
"""The head whose value times the duration is the time of play."""
NEW_MS = world.DAY_MS
"""A video that came less than this ago is new."""


class Requests(NamedTuple):
    """Who asks, and when, in order."""

    time_ms: np.ndarray
    """int64 [R], Unix times, strictly increasing."""
    user: np.ndarray
    """int64 [R], indexes."""


def requests_of(config: SyntheticConfig, begin_ms: int, hours: float, per_hour: float, seed: int = 0) -> Requests:
    """Returns the requests of some hours: by the world's hours of the day, from those of its users who are active then.

    Args:
        config: The world.
        begin_ms: Unix time at which they begin.
        hours: For so long.
        per_hour: Requests an hour, averaged over a day.
        seed: Another seed gives other requests of the same world.

    Raises:
        ValueError: `hours` or `per_hour` is not above 0, or `begin_ms` is before the world begins.
    """
    if not (hours > 0 and per_hour > 0):
        raise ValueError(f"hours and requests an hour must be above 0, got {hours} and {per_hour}")
    if begin_ms < config.start_ms:
        raise ValueError(f"requests begin at {begin_ms} ms, before the world does ({config.start_ms} ms): begin later")
    rng = np.random.default_rng([config.seed, seed])
    most = int(np.ceil(hours * per_hour * world.ACTIVITY.max())) + 1
    clock = SyntheticConfig(seed=config.seed, start_ms=begin_ms, events_per_s=per_hour / 3600)
    times = world.event_times(clock, np.arange(most), rng.random(most))
    users = world.choose(config, "user", times, rng)
    number = int(np.searchsorted(times, begin_ms + hours * world.HOUR_MS))
    return Requests(times[:number], users[:number])


def examples_before(config: SyntheticConfig, time_ms: int) -> int:
    """Returns how many examples the world's own stream has before a time, about: to one."""
    most = int((time_ms - config.start_ms) / 1000 * config.events_per_s * world.ACTIVITY.max()) + 2
    times = world.event_times(config, np.arange(most), np.zeros(most))
    return int(np.searchsorted(times, time_ms))


def live_videos(config: SyntheticConfig, time_ms: int) -> np.ndarray:
    """Returns the videos that may be shown at a time, int64 [V], ascending without gaps."""
    last = int(world.newest(config, "video", np.array([time_ms]))[0])
    return np.arange(last - config.live_videos + 1, last + 1)


def arrived_ms(config: SyntheticConfig, video: np.ndarray) -> np.ndarray:
    """Returns when videos came, int64 [B]; those that the world began with: as if they had come at the same pace."""
    if not config.videos_per_day:
        return np.full(video.size, config.start_ms)
    return config.start_ms + np.ceil((video - config.live_videos + 1) * (world.DAY_MS / config.videos_per_day)).astype(np.int64)


@dataclass(frozen=True)
class Reward:
    """What an impression is worth: the sum of weight times what happened, and the seconds of play."""

    heads: tuple[str, ...]
    """Labels, of `synthetic.HEADS`."""
    weights: tuple[float, ...]
    """Of each of them."""
    play_s_weight: float = 0.0
    """Of a second of play, at most five times the duration."""

    def __post_init__(self) -> None:
        """Raises ValueError where a head is none of the world's."""
        if unknown := sorted(set(self.heads) - set(HEADS)):
            raise ValueError(
                f"the synthetic world knows no true probability of {', '.join(unknown)}; a reward is made of {', '.join(HEADS)}"
            )
        if len(self.heads) != len(self.weights):
            raise ValueError(f"a reward needs a weight for each head, got {self.heads} and {self.weights}")

    def _sum(self, of: Mapping[str, np.ndarray], duration_ms: np.ndarray) -> np.ndarray:
        total = np.zeros(len(duration_ms))
        for head, weight in zip(self.heads, self.weights, strict=True):
            total += weight * of[head].astype(np.float64)
        if self.play_s_weight:
            total += self.play_s_weight * of[PLAYED].astype(np.float64) * duration_ms / 1000
        return total

    def expected(self, config: SyntheticConfig, time_ms: int, user: int, video: np.ndarray) -> np.ndarray:
        """Returns what videos are worth to a user at a time before anyone knows what happens, float64 [B]."""
        shown, best = foreseen(config, np.full(video.size, time_ms), np.full(video.size, user), video)
        return self._sum(best, shown.duration_ms)

    def realised(self, examples: pa.RecordBatch) -> np.ndarray:
        """Returns what examples were worth, float64 [B]."""
        names = list(dict.fromkeys([*self.heads, PLAYED]))
        values, _ = labels(examples, names)
        durations = examples.column("duration_ms").to_numpy()
        return self._sum({name: values[:, at] for at, name in enumerate(names)}, durations)


class Ask(NamedTuple):
    """A request, and what only the world knows of it."""

    number: int
    """Of the request, from 0."""
    time_ms: int
    user: int
    size: int
    """Videos that are wanted."""
    live: np.ndarray
    """int64 [V], videos that may be shown, ascending without gaps."""
    worth: np.ndarray
    """float64 [V], what each is expected to be worth: for the oracle, and for the books."""
    unseen: np.ndarray
    """bool [V], which the policy has not shown to the user."""


Pick = Callable[[Ask], np.ndarray]
"""A policy: the videos of a feed, int64 [N], distinct, N <= size, all of them live."""


def pick_random(ask: Ask) -> np.ndarray:
    """Shows any videos that the user has not seen, with equal chance."""
    there = ask.live[ask.unseen]
    return np.random.default_rng([ask.number, ask.user]).choice(there, min(ask.size, there.size), replace=False)


def _first(ask: Ask, scores: np.ndarray) -> np.ndarray:
    """Returns the unseen videos with the highest scores; of equals, the newest."""
    there = np.flatnonzero(ask.unseen)
    return ask.live[there[np.lexsort((-there, -scores[there]))[: ask.size]]]


def pick_oracle(ask: Ask) -> np.ndarray:
    """Shows what is worth most, of all live videos."""
    return _first(ask, ask.worth)


class Popularity:
    """Shows what was liked or watched to the end most, lately."""

    def __init__(self, half_life_s: float = 86_400.0) -> None:
        """Knows nothing; a count is worth half as much after `half_life_s`."""
        self._half_life_ms, self._counts, self._now_ms = 1000 * half_life_s, np.zeros(1024), 0

    def learn(self, video: np.ndarray, examples: pa.RecordBatch) -> None:
        """Counts what followed when videos, int64 [B], were shown; later calls are of later times."""
        if not video.size:
            return
        values, _ = labels(examples, ["like", "complete"])
        if video.max() >= self._counts.size:
            self._counts = np.concatenate([self._counts, np.zeros(int(video.max()) + 1)])
        times = examples.column("event_time_ms").to_numpy()
        now_ms = max(int(times.max()), self._now_ms)
        self._counts *= 0.5 ** ((now_ms - self._now_ms) / self._half_life_ms) if self._now_ms else 1.0
        self._now_ms = now_ms
        np.add.at(self._counts, video, values.sum(axis=1) * 0.5 ** ((now_ms - times) / self._half_life_ms))

    def pick(self, ask: Ask) -> np.ndarray:
        """Shows what the counts say; of equals, the newest."""
        counts = np.zeros(ask.live.size)
        known = ask.live < self._counts.size
        counts[known] = self._counts[ask.live[known]]
        return _first(ask, counts)


class Seen:
    """What was shown to each user, for good."""

    def __init__(self) -> None:
        """Nobody has seen anything."""
        self._of: dict[int, set[int]] = {}

    def add(self, user: np.ndarray, video: np.ndarray) -> None:
        """Notes that videos were shown, int64 [B] each."""
        for one, shown in zip(user.tolist(), video.tolist(), strict=True):
            self._of.setdefault(one, set()).add(shown)

    def unseen(self, user: int, live: np.ndarray) -> np.ndarray:
        """Returns which of some videos, ascending without gaps, a user has not seen, bool [V]."""
        mask = np.ones(live.size, np.bool_)
        seen = np.fromiter(self._of.get(user, ()), np.int64) - (live[0] if live.size else 0)
        mask[seen[(seen >= 0) & (seen < live.size)]] = False
        return mask


@dataclass
class _Sums:
    feeds: int = 0
    wanted: int = 0
    impressions: int = 0
    expected: float = 0.0
    realised: float = 0.0
    best: float = 0.0
    new: int = 0
    repeated: int = 0
    live: int = 0
    videos: set[int] = field(default_factory=set)


class Ledger:
    """What each policy reached, by hour."""

    def __init__(self, config: SyntheticConfig, begin_ms: int) -> None:
        """Books nothing yet; hours count from `begin_ms`."""
        self._config, self._begin_ms = config, begin_ms
        self._sums: dict[tuple[int, str], _Sums] = {}

    def book(self, policy: str, ask: Ask, video: np.ndarray, realised: np.ndarray) -> None:
        """Takes down a feed.

        Args:
            policy: Who made it.
            ask: For what, with what that policy has shown before.
            video: int64 [N], what was shown.
            realised: float64 [N], what it was worth.

        Raises:
            ValueError: A video is not live, or there twice.
        """
        places = video - ask.live[0]
        if np.unique(places).size < places.size or not ((places >= 0) & (places < ask.live.size)).all():
            raise ValueError(f"{policy} showed a video twice in a feed, or one that is not there (any more): {video.tolist()}")
        sums = self._sums.setdefault(((ask.time_ms - self._begin_ms) // world.HOUR_MS, policy), _Sums())
        sums.feeds += 1
        sums.wanted += ask.size
        sums.impressions += video.size
        # A video is paid once: a feed of what the user has seen, or a short one, is not worth more than what it leaves out.
        first = ask.unseen[places]
        sums.expected += float(ask.worth[places][first].sum())
        sums.realised += float(realised[first].sum())
        sums.best += float(np.maximum(np.sort(ask.worth[ask.unseen])[::-1][: ask.size], 0).sum())
        sums.new += int(np.count_nonzero(arrived_ms(self._config, video) > ask.time_ms - NEW_MS))
        sums.repeated += int(np.count_nonzero(~ask.unseen[places]))
        sums.live = ask.live.size
        sums.videos.update(video.tolist())

    def rows(self, hour: int) -> list[dict[str, Any]]:
        """Returns what was reached in an hour, a row a policy.

        `reward`: expected, the mean of a place of a feed, 0 where it was left empty or shows what the user had seen;
        `realised`: what it really was. `regret`: what the best feed for the same user would have been worth more, given all
        that the policy itself had shown before, at least 0. The oracle shows that feed: it is the best one at a time, and no
        bound for whoever saves good videos for later. `advantage`: which share of the
        oracle's lead over random was reached. `coverage`: share of the live videos that anyone was shown. `new`: share of
        impressions of videos that came within a day. `repeated`: share that the user had seen.
        """
        return [{"hour": hour, **row} for row in _rows({name: one for (at, name), one in self._sums.items() if at == hour})]

    def totals(self) -> list[dict[str, Any]]:
        """Returns the same of all hours; of `coverage` the mean."""
        by_policy: dict[str, list[_Sums]] = {}
        for (_, name), sums in self._sums.items():
            by_policy.setdefault(name, []).append(sums)
        rows = _rows({name: _added(of) for name, of in by_policy.items()})
        for row in rows:
            row["coverage"] = float(np.mean([len(one.videos) / max(one.live, 1) for one in by_policy[row["policy"]]]))
        return rows


def _added(of: Sequence[_Sums]) -> _Sums:
    added = _Sums()
    for name in (one.name for one in fields(_Sums) if one.name != "videos"):
        setattr(added, name, sum(getattr(sums, name) for sums in of))
    return added


def _rows(of: Mapping[str, _Sums]) -> list[dict[str, Any]]:
    mean = {name: sums.expected / max(sums.wanted, 1) for name, sums in of.items()}
    low, high = mean.get("random", np.nan), mean.get("oracle", np.nan)
    rows = []
    for name, sums in of.items():
        shown, wanted = max(sums.impressions, 1), max(sums.wanted, 1)
        rows.append(
            {
                "policy": name,
                "feeds": sums.feeds,
                "impressions": sums.impressions,
                "reward": mean[name],
                "realised": sums.realised / wanted,
                "regret": (sums.best - sums.expected) / wanted,
                "advantage": (mean[name] - low) / (high - low) if high > low else np.nan,
                "coverage": len(sums.videos) / max(sums.live, 1),
                "new": sums.new / shown,
                "repeated": sums.repeated / shown,
            }
        )
    return rows
