"""A seeded synthetic stream whose best possible predictions are known.

In: a `SyntheticConfig`. Out: chunks of examples in strict time order, with the columns of `events.EXAMPLE` and, for each
of `HEADS`, a column `optimal_<head>`: the true probability of the label (for `play_ratio`: the true mean) given all
that the world knows before the impression: the user's taste at that moment, the video's traits, its duration and the
hour. No model can do better in expectation, so the optimum's log-loss and AUC are what a model is measured against.

The population is in `world.py`. What follows an impression is drawn from a mixture with three components:

* *leave*: the user swipes away after a log-normal time that does not depend on the duration;
* *finish*: the play time is the duration, give or take a few percent;
* *watch*: the play ratio is log-normal around 1, loops included; longer videos are watched in smaller part.

Interest (taste times topic, quality, the user's patience, the hour) moves the weights of the components and the
median of *watch*. An action depends on its own mix of affinity and quality, on biases of the user and the author,
and on the component: who leaves at once seldom likes. Play times are rounded to whole ms, and so are the closed forms.

What comes from where: the components' shapes and their dependence on the duration were fitted by maximum likelihood
to the 28,295 impressions of the KuaiRand sample with a known duration and a play time above 0. That sample holds only
rows with a like or a hate, so it cannot give base rates. `RATES` are chosen to look like a production feed, the weights
of the components are tempered (more leave), and `GIVEN` makes a like or a dislike select the components as it does
in the sample: world rows weighted to 81 % liked and 19 % disliked reproduce the sample's play ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.stream import world
from monolith_jax.stream.events import (
    ACTIONS,
    COMPLETE_RATIO,
    EXAMPLE,
    LONG_VIEW_MS,
    PLAY_RATIO_CAP,
    REWATCH_RATIO,
    SKIP_MS,
)
from monolith_jax.stream.world import Shown, SyntheticConfig
from monolith_jax.types import Chunk, Position

__all__ = ["HEADS", "RATES", "SCHEMA", "SyntheticConfig", "SyntheticSource", "examples_of", "foreseen", "optimal", "videos"]

HEADS = ("complete", "rewatch", "long_view", "skip", *ACTIONS, "play_ratio")
"""Labels with an `optimal_<head>` column."""

LOG_17_S = math.log(17_000)
LEAVE = (8.446, 0.964)
"""Mean and deviation of log play time in ms. Fitted."""
FINISH = (0.026, 0.068)
"""Mean and deviation of the log play ratio. Fitted."""
WATCH = (-0.339, -0.385, 0.507)
"""Of the log play ratio: mean at 17 s, slope on log duration, deviation. Fitted."""
FINISH_WEIGHT = (-2.7, 1.471, -0.508)
WATCH_WEIGHT = (-1.9, 0.255)
"""Log weight against leave, as a polynomial in log(duration / 17 s). Slopes fitted, intercepts tempered."""

INTEREST = (1.2, 0.8, 0.9, 0.2)
"""Weights of affinity, quality, the user's patience and the hour (a cosine that peaks at 22 h). Chosen."""
INTEREST_WEIGHT = (1.4, 1.0)
"""What one unit of interest adds to the log weights of finish and watch. Chosen."""
INTEREST_MEAN = (0.15, 0.2)
"""What one unit of interest adds to the means of leave and watch. Chosen; the fitted means and deviations allow for it."""

RATES = dict(zip(ACTIONS, (0.40, 0.035, 0.005, 0.006, 0.004, 0.015, 0.0015, 0.03), strict=True))
"""Base rates of the actions, about: worlds differ. Chosen to look like a production feed."""
INTERCEPT = np.array([-0.315, -3.849, -6.004, -6.024, -6.331, -4.638, -6.894, -2.766])
"""Log-odds at average traits which give `RATES`. Computed."""
# Affinity, quality, bias of the user, bias of the author: what one standard deviation adds to the log-odds. Chosen.
SLOPES = np.array(
    [
        [0.7, 0.5, 0.5, 0.3],
        [0.9, 0.5, 0.7, 0.4],
        [0.7, 0.4, 0.9, 0.4],
        [0.7, 0.6, 0.8, 0.4],
        [0.9, 0.4, 0.6, 0.6],
        [0.7, 0.3, 0.6, 0.5],
        [-0.8, -0.6, 0.8, 0.4],
        [-0.4, -0.3, 0.9, 0.2],
    ],
    np.float32,
)
GIVEN = np.array(
    [
        [0.6, 1.0, 1.0],
        [0.505, 0.395, 1.0],
        [0.3, 1.0, 1.0],
        [0.3, 1.0, 1.0],
        [0.3, 1.0, 1.0],
        [0.4, 1.0, 1.0],
        [1.0, 0.404, 0.839],
        [0.3, 0.3, 1.0],
    ]
)
"""By action: how often it happens in leave, finish, watch, against where most. Like and dislike fitted, others chosen."""

DWELL_MS, COMMENT_MS = 600.0, 8_000.0
"""Mean time on the screen after the play time; what a comment adds."""

SCHEMA = pa.schema(
    [field for field in EXAMPLE if field.name not in ("request_id", "weight")]
    + [pa.field(f"optimal_{head}", pa.float32(), nullable=False) for head in HEADS]
)
"""The columns of a synthetic example."""


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What may follow impressions: the mixture of each, and the chances of actions before the component is known."""

    weight_BC: np.ndarray
    """Probabilities of leave, finish, watch."""
    mean_BC: np.ndarray
    """Mean of the log play time in ms, by component."""
    action_BT: np.ndarray
    """Probability of each action in a component whose factor in `GIVEN` is 1."""


DEVIATION = np.array([LEAVE[1], FINISH[1], WATCH[2]])


def _outlook(config: SyntheticConfig, shown: Shown) -> _Outlook:
    seed = config.seed
    affinity = np.einsum("bd,bd->b", world.taste(config, shown.user, shown.time_ms), shown.topic)
    affinity /= np.float32(math.sqrt(config.taste_dim))
    quality = world.quality(config, shown)
    of_user = world.normals(seed, "user", shown.user, len(ACTIONS) + 1)
    of_author = world.normals(seed, "author", shown.author, len(ACTIONS))
    hour = (shown.time_ms % world.DAY_MS) / world.HOUR_MS
    evening = np.cos((hour - 22) * (math.pi / 12))
    interest = INTEREST[0] * affinity + INTEREST[1] * quality + INTEREST[2] * of_user[:, -1] + INTEREST[3] * evening

    log_ms = np.log(shown.duration_ms)
    longer = log_ms - LOG_17_S
    weight = np.ones((len(longer), 3))
    weight[:, 1] = np.exp(
        FINISH_WEIGHT[0] + longer * (FINISH_WEIGHT[1] + longer * FINISH_WEIGHT[2]) + INTEREST_WEIGHT[0] * interest
    )
    weight[:, 2] = np.exp(WATCH_WEIGHT[0] + longer * WATCH_WEIGHT[1] + INTEREST_WEIGHT[1] * interest)
    weight /= weight.sum(axis=1, keepdims=True)
    mean = np.empty_like(weight)
    mean[:, 0] = LEAVE[0] + INTEREST_MEAN[0] * interest
    mean[:, 1] = log_ms + FINISH[0]
    mean[:, 2] = log_ms + WATCH[0] + WATCH[1] * longer + INTEREST_MEAN[1] * interest

    log_odds = affinity[:, None] * SLOPES[:, 0] + quality[:, None] * SLOPES[:, 1]
    log_odds += of_user[:, :-1] * SLOPES[:, 2] + of_author * SLOPES[:, 3]
    return _Outlook(weight, mean, 1 / (1 + np.exp(-INTERCEPT - log_odds)))


@cache
def _normal_cdf_table() -> np.ndarray:
    return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in np.arange(-8 * 2048, 8 * 2048 + 2) / 2048])


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    """The standard normal's distribution function, by linear interpolation: off by at most 1e-8."""
    at = (np.clip(x, -8, 8) + 8) * 2048
    low = at.astype(np.int32)
    table = _normal_cdf_table()
    return table[low] + (at - low) * (table[low + 1] - table[low])


def _at_least(outlook: _Outlook, least_ms: np.ndarray) -> np.ndarray:
    """P(play time >= a whole number of ms), which is P(play time before rounding >= that number - 0.5)."""
    above = _normal_cdf((outlook.mean_BC - np.log(least_ms - 0.5)[:, None]) / DEVIATION)
    return np.einsum("bc,bc->b", outlook.weight_BC, above)


def _mean_ratio(outlook: _Outlook, duration_ms: np.ndarray) -> np.ndarray:
    """E[min(play / duration, cap)] of the log-normal mixture; rounding to ms changes it by less than 1e-6."""
    log_ratio = outlook.mean_BC - np.log(duration_ms)[:, None]
    to_cap = (math.log(PLAY_RATIO_CAP) - log_ratio) / DEVIATION
    below = np.exp(log_ratio + 0.5 * DEVIATION**2) * _normal_cdf(to_cap - DEVIATION)
    return np.einsum("bc,bc->b", outlook.weight_BC, below + PLAY_RATIO_CAP * _normal_cdf(-to_cap))


def _optimal(outlook: _Outlook, duration_ms: np.ndarray) -> dict[str, np.ndarray]:
    actions = outlook.action_BT * np.einsum("bc,tc->bt", outlook.weight_BC, GIVEN)
    best = {
        "complete": _at_least(outlook, np.ceil(COMPLETE_RATIO * duration_ms)),
        "rewatch": _at_least(outlook, np.ceil(REWATCH_RATIO * duration_ms)),
        "long_view": _at_least(outlook, np.minimum(duration_ms, LONG_VIEW_MS)),
        "skip": 1 - _at_least(outlook, np.full(len(duration_ms), SKIP_MS)),
        "play_ratio": _mean_ratio(outlook, duration_ms),
        **dict(zip(ACTIONS, actions.T, strict=True)),
    }
    return {head: best[head].astype(np.float32) for head in HEADS}


def optimal(config: SyntheticConfig, time_ms: np.ndarray, user: np.ndarray, video: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the best possible prediction of each head for any user, video and time, shown or not.

    Args:
        config: The world.
        time_ms: Unix times in ms, int64 [B].
        user: Indexes (not ids; see `world.indexes_of`), int64 [B].
        video: Indexes, int64 [B].

    Returns:
        float32 [B] for each of `HEADS`.
    """
    return foreseen(config, time_ms, user, video)[1]


def foreseen(
    config: SyntheticConfig, time_ms: np.ndarray, user: np.ndarray, video: np.ndarray
) -> tuple[Shown, dict[str, np.ndarray]]:
    """Like `optimal`; returns what would be shown, too."""
    shown = world.describe(config, time_ms, user, video)
    return shown, _optimal(_outlook(config, shown), shown.duration_ms)


class _Chance(NamedTuple):
    """What chance decides of each impression, before it is known how likely anything is."""

    component_B1: np.ndarray
    """Uniform."""
    play_B: np.ndarray
    """Standard normal."""
    action_BT: np.ndarray
    """Uniform."""
    stay_B: np.ndarray
    """Standard exponential, as the next."""
    comment_B: np.ndarray


def _chance(rng: np.random.Generator, count: int) -> _Chance:
    """Draws chances, in an order that must stay: the stream's bits depend on it."""
    component, play, action = rng.random((count, 1)), rng.standard_normal(count), rng.random((count, len(ACTIONS)))
    return _Chance(component, play, action, rng.standard_exponential(count), rng.standard_exponential(count))


def _chance_of(config: SyntheticConfig, shown: Shown) -> _Chance:
    """Returns chances that belong to user, video and time for good."""
    key = np.zeros(len(shown.video), np.uint64)
    for name, index in (("user", shown.user), ("video", shown.video), ("time", shown.time_ms)):
        key = world.hashes(config.seed, f"{name} of draw", key + index.astype(np.uint64))
    names = ("component", "radius", "angle", *ACTIONS, "stay", "stay of comment")
    of = {name: world.uniforms(config.seed, name, key) for name in names}
    play = np.sqrt(-2 * np.log1p(-of["radius"])) * np.cos(2 * math.pi * of["angle"])  # Box and Muller, 1958.
    action = np.stack([of[name] for name in ACTIONS], axis=1)
    return _Chance(of["component"][:, None], play, action, -np.log1p(-of["stay"]), -np.log1p(-of["stay of comment"]))


def _follow(outlook: _Outlook, chance: _Chance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns play times and times on the screen in ms (int64 [B]) and actions (bool [B, T])."""
    count = len(outlook.weight_BC)
    component = (chance.component_B1 >= np.cumsum(outlook.weight_BC[:, :2], axis=1)).sum(axis=1)
    log_play = outlook.mean_BC[np.arange(count), component] + DEVIATION[component] * chance.play_B
    play = np.rint(np.exp(log_play)).astype(np.int64)
    actions = chance.action_BT < outlook.action_BT * GIVEN.T[component]
    stay = chance.stay_B * DWELL_MS
    stay += chance.comment_B * COMMENT_MS * actions[:, ACTIONS.index("comment")]
    return play, play + np.rint(stay).astype(np.int64), actions


def _tag_column(config: SyntheticConfig, shown: Shown) -> pa.Array:
    count, tags = world.tags_of(config, shown)
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    values = tags[np.arange(world.MAX_TAGS) < count[:, None]]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(world.ids_of(config.seed, "tag", values)))


def _content_column(config: SyntheticConfig, shown: Shown) -> pa.Array:
    values = world.content(config, shown)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * config.content_dim
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def videos(config: SyntheticConfig, video: np.ndarray, time_ms: int) -> pa.RecordBatch:
    """Returns what can be told of videos, whether they were shown or not: the columns of an impression that are the video's.

    Args:
        config: The world.
        video: Indexes, int64 [B].
        time_ms: Unix time that the rows carry.
    """
    times = np.full(video.size, time_ms, np.int64)
    shown = world.describe(config, times, np.zeros(video.size, np.int64), video)
    columns = {f"{space}_id": world.ids_of(config.seed, space, getattr(shown, space)) for space in ("video", "author", "sound")}
    batch = pa.record_batch({"event_time_ms": times, **columns, "duration_ms": shown.duration_ms})
    batch = batch.append_column("tag_id", _tag_column(config, shown))
    return batch.append_column("content", _content_column(config, shown)) if config.content_dim else batch


def examples_of(config: SyntheticConfig, time_ms: np.ndarray, user: np.ndarray, video: np.ndarray) -> pa.RecordBatch:
    """Returns what follows when videos are shown to users, as examples with the columns of the source.

    It is drawn from what `optimal` tells, and is the same each time that the video is shown to the user at that time, beside
    whatever else: who shows something else is lucky or not in the same things. It is not what the source draws.

    Args:
        config: The world.
        time_ms: Unix times in ms, int64 [B].
        user: Indexes, int64 [B].
        video: Indexes, int64 [B].
    """
    shown = world.describe(config, time_ms, user, video)
    return _examples(config, shown, _chance_of(config, shown))


def _examples(config: SyntheticConfig, shown: Shown, chance: _Chance) -> pa.RecordBatch:
    outlook = _outlook(config, shown)
    play, dwell, actions = _follow(outlook, chance)
    best = _optimal(outlook, shown.duration_ms)
    columns = {
        "event_time_ms": shown.time_ms,
        "tag_id": _tag_column(config, shown),
        "duration_ms": shown.duration_ms,
        "play_time_ms": play,
        "dwell_ms": dwell,
        **{name: actions[:, task] for task, name in enumerate(ACTIONS)},
        **{f"optimal_{head}": best[head] for head in HEADS},
    }
    for space in ("user", "video", "author", "sound"):
        columns[f"{space}_id"] = world.ids_of(config.seed, space, getattr(shown, space))
    examples = pa.RecordBatch.from_arrays([pa.array(columns[field.name]) for field in SCHEMA], schema=SCHEMA)
    return examples.append_column("content", _content_column(config, shown)) if config.content_dim else examples


@dataclass(frozen=True)
class SyntheticSource:
    """A `Source` of synthetic examples with the columns of `SCHEMA`, and with `content_dim` the list `content`.

    Chunk k is a function of (config, k) alone.
    """

    config: SyntheticConfig

    @property
    def num_examples(self) -> int:
        """Examples from start to end."""
        return self.config.num_examples

    def read(self, position: Position) -> Iterator[Chunk]:
        """Yields chunks from `position`, `{}` or `{"chunk": k}`, to the end of the stream.

        Raises:
            ValueError: The position is none of this source's.
        """
        chunks = -(-self.config.num_examples // self.config.chunk_rows)
        first = position.get("chunk", 0)
        if set(position) - {"chunk"} or type(first) is not int or not 0 <= first <= chunks:
            raise ValueError(
                f'a position of this stream is {{}} or {{"chunk": k}} with k from 0 to {chunks}, got {dict(position)}; '
                "a snapshot goes on only with the num_examples and chunk_rows that it was made with, or more examples"
            )
        return (self._chunk(k) for k in range(first, chunks))

    def _chunk(self, k: int) -> Chunk:
        config = self.config
        rng = np.random.Generator(np.random.Philox(key=np.array([config.seed, k], np.uint64)))
        shown = world.draw_shown(config, k * config.chunk_rows + np.arange(config.chunk_rows), rng)
        examples = _examples(config, shown, _chance(rng, len(shown.time_ms)))
        left = min(config.chunk_rows, config.num_examples - k * config.chunk_rows)
        return Chunk(examples.slice(0, left), (), {"chunk": k + 1})
