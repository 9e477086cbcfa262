"""The population of the synthetic world: who is there, what is shown to whom, and every permanent trait.

In: a `SyntheticConfig` and numbers (event numbers, times, indexes). Out: arrays with a row for each event. Nothing is
stored: each trait is an integer hash of (seed, trait, index), so that any event of any world can be computed without
the ones before it. Users, videos, authors and sounds have indexes 0, 1, 2, ... in order of arrival; the ids that a
stream shows are a seeded bijection of them (`ids_of`, `indexes_of`).

How the world works:

* Events follow the hours of the day by the sample's activity curve; the world's clock is UTC.
* `live_users` and `live_videos` are there at any time. Arrivals push the oldest out, so a video lives for
  `live_videos / videos_per_day` days; most of its impressions fall into the first third of its life.
* Who is active and what is popular: a dozen users (two dozen videos) are drawn from those alive, one of which is taken in
  proportion to its hashed log-normal weight. Exposure does not look at tastes, and a user may see a video twice.
* The taste of a user turns from one hashed vector to the next in `drift_days`. The topic of a video is that of its
  author and noise of its own; its tags are the nearest of `NUM_TAGS` fixed tag vectors.

Constants "from the sample" were computed once from 35,553 impressions of KuaiRand-27K (12 days, rows with a like or a
hate; Gao et al., KuaiRand, CIKM 2022, arXiv 2208.08696).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
NUM_TAGS = 64
MAX_TAGS = 3
"""A video has 1 to 3 of the tags."""
USER_CANDIDATES, VIDEO_CANDIDATES = 12, 24
VIDEOS_PER_AUTHOR, AUTHORS_AT_A_TIME = 8, 128
VIDEOS_PER_SOUND, SOUNDS_AT_A_TIME = 4, 256

ACTIVITY = np.array(
    [
        *(0.813, 0.439, 0.231, 0.146, 0.123, 0.153, 0.376, 0.672, 0.829, 0.976, 1.157, 1.270),
        *(1.607, 1.432, 1.043, 1.002, 1.249, 1.511, 1.490, 1.517, 1.465, 1.605, 1.632, 1.263),
    ]
)
"""Impressions by local hour of the day (UTC+8), as a share of the mean hour. From the sample."""
ACTIVITY = ACTIVITY / ACTIVITY.mean()

DURATION_AT = np.array([0, 0.005, 0.02, 0.05, *np.arange(0.1, 0.951, 0.05), 0.98, 0.99, 0.995, 1])
DURATION_MS = np.array(
    [
        *(3000, 5600, 6458, 6996, 7483, 8100, 8749, 9633, 10566, 11566, 12600, 14300, 16500, 19283, 24000, 29166),
        *(35000, 44550, 63875, 80133, 111476, 175633, 259040, 320845, 386440, 1337733),
    ]
)
"""Quantiles of the duration, log-linear in between. From the sample's impressions with a known duration."""

CONTENT_NOISE = 0.3
"""Deviation of what in a video's content says nothing of its topic. Chosen."""

USER_SPREAD, VIDEO_SPREAD = 1.05, 2.2
"""Standard deviation of log activity and log popularity, so that the shares of the top 1 % and 10 % are the sample's."""

SPACES = ("user", "video", "author", "sound", "tag")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """A synthetic world and the part of its stream that is read. The defaults are a world for a quick start."""

    seed: int = 0
    """Another seed is another world: other users, videos, ids and draws."""
    num_examples: int = 400_000
    """Length of the stream. A longer stream of the same world begins with the shorter one."""
    chunk_rows: int = 4096
    """Examples in a chunk. Draws are keyed by chunk, so another value gives other events in the same world."""
    start_ms: int = 1_767_225_600_000
    """Unix time of the first event in ms; the default is 2026-01-01 00:00 UTC."""
    events_per_s: float = 1.0
    """Events in a second of event time, averaged over the day; at most 500, because times are distinct milliseconds."""
    live_users: int = 2_000
    """Users at the start, and alive at any time later."""
    users_per_day: float = 100.0
    """New users in a day. A user leaves after `live_users / users_per_day` days."""
    live_videos: int = 1_000
    """Videos at the start, and alive at any time later."""
    videos_per_day: float = 120.0
    """New videos in a day. A video is shown for the last time after `live_videos / videos_per_day` days."""
    taste_dim: int = 8
    """Dimension of tastes and topics."""
    drift_days: float = 14.0
    """Days in which a taste turns into an independent one."""
    content_dim: int = 0
    """Numbers in the column `content`: what can be seen of a video before anyone watched it, about its topic. 0: no column."""

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field is out of its range.
        """
        low = {"seed": 0, "num_examples": 0, "start_ms": 0, "users_per_day": 0, "videos_per_day": 0, "live_users": 1}
        low |= {"live_videos": 1, "chunk_rows": 1, "taste_dim": 1, "content_dim": 0}
        for name, least in low.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"SyntheticConfig.{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.events_per_s <= 500:
            raise ValueError(f"SyntheticConfig.events_per_s must be above 0 and at most 500, got {self.events_per_s}")
        if not self.drift_days > 0:
            raise ValueError(f"SyntheticConfig.drift_days must be above 0 (inf for fixed tastes), got {self.drift_days}")
        if self.seed >= 2**63:
            raise ValueError(f"SyntheticConfig.seed must be below 2**63, got {self.seed}")


@dataclass(frozen=True, slots=True)
class Shown:
    """Impressions of the world, by index: what can be told of them before anything follows. Arrays of length B."""

    time_ms: np.ndarray
    user: np.ndarray
    video: np.ndarray
    author: np.ndarray
    sound: np.ndarray
    duration_ms: np.ndarray
    topic: np.ndarray
    """float32 [B, D]: the video's topic; every entry is a standard normal over the videos."""


def _mix(values: np.ndarray) -> np.ndarray:
    """Scrambles uint64: a bijection (the finalizer of SplitMix64; Steele et al., OOPSLA 2014, figure 16)."""
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _unmix(values: np.ndarray) -> np.ndarray:
    """The inverse of `_mix`: an xor-shift by n is undone by shifts of n, 2n, ...; a factor by its inverse mod 2^64."""
    values = values ^ (values >> np.uint64(31)) ^ (values >> np.uint64(62))
    values = values * np.uint64(pow(0x94D049BB133111EB, -1, 2**64))
    values = values ^ (values >> np.uint64(27)) ^ (values >> np.uint64(54))
    values = values * np.uint64(pow(0xBF58476D1CE4E5B9, -1, 2**64))
    return values ^ (values >> np.uint64(30)) ^ (values >> np.uint64(60))


@cache
def _key(seed: int, name: str) -> np.uint64:
    """Returns the key of a trait: a hash of the seed and the trait's name."""
    text = np.frombuffer(f"{name:16s}".encode(), np.uint64)
    key = np.array([seed], np.uint64)
    for word in text:
        key = _mix(key * np.uint64(0x9E3779B97F4A7C15) + word)
    return key[0]


def hashes(seed: int, name: str, index: np.ndarray) -> np.ndarray:
    """Returns uint64 hashes of `index` for the trait `name` (at most 16 letters); distinct for distinct indexes."""
    return _mix(index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + _key(seed, name))


def ids_of(seed: int, space: str, index: np.ndarray) -> np.ndarray:
    """Returns the int64 ids of indexes in one of `SPACES`: a bijection of all 64-bit numbers."""
    return hashes(seed, f"id of {space}", index).view(np.int64)


def indexes_of(seed: int, space: str, ids: np.ndarray) -> np.ndarray:
    """Returns the int64 indexes of ids: the inverse of `ids_of`."""
    odd = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
    plain = _unmix(np.ascontiguousarray(ids, np.int64).view(np.uint64)) - _key(seed, f"id of {space}")
    return (plain * odd).view(np.int64)


def uniforms(seed: int, name: str, index: np.ndarray) -> np.ndarray:
    """Returns uniforms in [0, 1) that belong to `index` for good, float64 [B]; `name` as for `hashes`."""
    return (hashes(seed, name, index) >> np.uint64(11)) * 2.0**-53


@cache
def _normal_table() -> np.ndarray:
    """The standard normal's quantiles at 65,536 midpoints: a table is faster than the function, and ends at 4.3."""
    quantile = NormalDist().inv_cdf
    return np.array([quantile((i + 0.5) / 65536) for i in range(65536)], np.float32)


def normals(seed: int, name: str, index: np.ndarray, count: int) -> np.ndarray:
    """Returns float32 [B, count] standard normals that belong to `index` for good.

    Args:
        seed: The world's seed.
        name: The trait, at most 16 letters.
        index: Whole numbers [B].
        count: Normals for each index; four come from one 64-bit hash.
    """
    first = hashes(seed, name, index)
    step = np.arange(-(-count // 4), dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    words = _mix(first[:, None] + step).view(np.uint16)
    return _normal_table()[words[:, :count]]


@cache
def _weight_table(spread: float) -> np.ndarray:
    return np.exp(spread * _normal_table())


@cache
def _age_table() -> np.ndarray:
    """Quantiles of a video's age at its impressions, as a share of its life: a quick rise, then an exponential decay.

    The decay, 0.3 of a life, is that of the sample's ages (median 1.8 days, 90 % below 6.5, at most 9).
    """
    age = np.linspace(0, 1, 4001)
    mass = np.cumsum((1 - np.exp(-age / 0.02)) * np.exp(-age / 0.3))
    return np.interp(np.linspace(0, 1, 4097), mass / mass[-1], age).astype(np.float32)


def event_times(config: SyntheticConfig, number: np.ndarray, jitter: np.ndarray) -> np.ndarray:
    """Returns the Unix times in ms (int64) of events, by the activity curve's integral; strictly increasing in `number`.

    Args:
        config: The world.
        number: Event numbers from the start of the stream, int64 [B].
        jitter: Uniforms in [0, 1): where in its slot an event falls. It is narrowed to keep events 1 ms apart.
    """
    per_day = config.events_per_s * 86_400
    mass = np.concatenate([[0.0], np.cumsum(ACTIVITY) / 24]) * per_day
    hours = np.arange(25.0) * HOUR_MS
    gap = 1.01 * config.events_per_s * ACTIVITY.max() / 1000
    begin, phase = divmod(config.start_ms, DAY_MS)
    done = np.interp(phase, hours, mass) + number + jitter * (1 - gap)
    day = np.floor(done / per_day)
    return ((begin + day) * DAY_MS + np.interp(done - day * per_day, mass, hours)).astype(np.int64)


def newest(config: SyntheticConfig, space: str, time_ms: np.ndarray) -> np.ndarray:
    """Returns the highest index of a `user` or `video` that has arrived by each time, int64 [B]."""
    live, per_day = {
        "user": (config.live_users, config.users_per_day),
        "video": (config.live_videos, config.videos_per_day),
    }[space]
    return live - 1 + np.floor((time_ms - config.start_ms) * (per_day / DAY_MS)).astype(np.int64)


def _popular(seed: int, space: str, index: np.ndarray) -> np.ndarray:
    """Returns the places of users or videos in a table of 65,536 weights: a shorter hash, as it runs for all candidates."""
    place = index.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    place += _key(seed, f"weight {space}")
    place ^= place >> np.uint64(32)
    place *= np.uint64(0xBF58476D1CE4E5B9)
    place >>= np.uint64(48)
    return place.view(np.int64)


def choose(config: SyntheticConfig, space: str, time_ms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws a live `user` or `video` for each time, int64 [B]: one of a few, in proportion to their hashed weights."""
    is_user = space == "user"
    live, candidates = (config.live_users, USER_CANDIDATES) if is_user else (config.live_videos, VIDEO_CANDIDATES)
    share = rng.random((len(time_ms), candidates), np.float32)
    if not is_user:
        share *= np.float32(4096)
        low = share.astype(np.int32)
        share -= low
        share *= np.diff(_age_table())[low]
        share += _age_table()[low]
    index = np.multiply(share, -live, dtype=np.float64).astype(np.int64)
    np.maximum(index, 1 - live, out=index)
    index += newest(config, space, time_ms)[:, None]
    below = np.cumsum(_weight_table(USER_SPREAD if is_user else VIDEO_SPREAD)[_popular(config.seed, space, index)], axis=1)
    rows = np.arange(len(time_ms))
    picked = (below < rng.random((len(rows), 1), np.float32) * below[:, -1:]).sum(axis=1)
    return index[rows, np.minimum(picked, candidates - 1)]


def draw_shown(config: SyntheticConfig, number: np.ndarray, rng: np.random.Generator) -> Shown:
    """Draws the impressions with the given event numbers (int64 [B], a whole chunk, so that draws do not move)."""
    time_ms = event_times(config, number, rng.random(len(number)))
    return describe(config, time_ms, choose(config, "user", time_ms, rng), choose(config, "video", time_ms, rng))


def _maker(config: SyntheticConfig, name: str, video: np.ndarray, per: int, width: int) -> np.ndarray:
    """Returns the author or sound of videos: the more productive one of two drawn from those active at its arrival."""
    draw = hashes(config.seed, f"{name} of video", video)
    pair = video // per + np.stack([draw >> np.uint64(32), draw & np.uint64(0xFFFFFFFF)]).astype(np.int64) % width
    productive = hashes(config.seed, f"weight {name}", pair)
    return np.where(productive[0] >= productive[1], pair[0], pair[1])


def describe(config: SyntheticConfig, time_ms: np.ndarray, user: np.ndarray, video: np.ndarray) -> Shown:
    """Returns what is shown when `video` is shown to `user` (indexes, int64 [B]) at `time_ms`."""
    seed, dim = config.seed, config.taste_dim
    time_ms, user, video = (np.asarray(values, np.int64) for values in (time_ms, user, video))
    author = _maker(config, "author", video, VIDEOS_PER_AUTHOR, AUTHORS_AT_A_TIME)
    sound = _maker(config, "sound", video, VIDEOS_PER_SOUND, SOUNDS_AT_A_TIME)
    own = np.float32(math.sqrt(0.3)) * normals(seed, "topic of video", video, dim)
    topic = own + np.float32(math.sqrt(0.7)) * normals(seed, "topic of author", author, dim)
    log_duration = np.interp(uniforms(seed, "duration", video), DURATION_AT, np.log(DURATION_MS))
    duration = np.rint(np.exp(log_duration)).astype(np.int64)
    return Shown(time_ms, user, video, author, sound, duration, topic)


def content(config: SyntheticConfig, shown: Shown) -> np.ndarray:
    """Returns what can be seen of each video whenever it is shown, float32 [B, content_dim].

    Its topic, seen from fixed directions, and noise of its own; an entry's variance over the videos is about 1 of the former
    and `CONTENT_NOISE` squared of the latter.
    """
    directions = normals(config.seed, "content", np.arange(config.content_dim), config.taste_dim)
    noise = np.float32(CONTENT_NOISE) * normals(config.seed, "content of video", shown.video, config.content_dim)
    # Row by row: the last bits of a product of matrices may depend on how many rows there are.
    return np.einsum("bd,cd->bc", shown.topic, directions) / np.float32(math.sqrt(config.taste_dim)) + noise


def taste(config: SyntheticConfig, user: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Returns the tastes of users (indexes [B]) at the times, float32 [B, D]; every entry is standard normal over users."""
    age = (time_ms - config.start_ms) / (config.drift_days * DAY_MS) + uniforms(config.seed, "phase", user)
    turn = np.floor(age)
    angle = ((age - turn) * (math.pi / 2)).astype(np.float32)[:, None]
    of_user = hashes(config.seed, "taste", user)
    before, after = (
        normals(config.seed, "turn", of_user + (turn + add).astype(np.int64).view(np.uint64), config.taste_dim)
        for add in (0, 1)
    )
    return np.cos(angle) * before + np.sin(angle) * after


def tags_of(config: SyntheticConfig, shown: Shown) -> tuple[np.ndarray, np.ndarray]:
    """Returns each video's number of tags (1 to 3), int64 [B], and its three nearest tags, the nearest first, [B, 3]."""
    _, first, place = np.unique(shown.video, return_index=True, return_inverse=True)
    tag = np.ascontiguousarray(normals(config.seed, "tag", np.arange(NUM_TAGS), config.taste_dim).T)
    # Not `@`: the threads of a BLAS would wait for those of the training step, and slow the stream by a factor of four.
    scores = np.einsum("bd,dt->bt", shown.topic[first], tag)
    rows = np.arange(len(first))
    nearest = np.empty((len(first), MAX_TAGS), np.int64)
    for rank in range(MAX_TAGS):
        nearest[:, rank] = scores.argmax(axis=1)
        scores[rows, nearest[:, rank]] = -np.inf
    count = 1 + (hashes(config.seed, "tag count", shown.video) % np.uint64(MAX_TAGS)).astype(np.int64)
    return count, nearest[place]


def quality(config: SyntheticConfig, shown: Shown) -> np.ndarray:
    """Returns what makes a video good for everyone, float32 [B], standard normal over videos.

    It is partly the video's own, partly its author's and sound's, and goes with its popularity.
    """
    seed = config.seed
    popular = _normal_table()[_popular(seed, "video", shown.video)]
    parts = [normals(seed, f"appeal {n}", index, 1)[:, 0] for n, index in _appeal(shown)]
    return np.float32(0.6) * parts[0] + np.float32(0.5) * parts[1] + np.float32(0.4) * parts[2] + np.float32(0.48) * popular


def _appeal(shown: Shown) -> list[tuple[str, np.ndarray]]:
    return [("video", shown.video), ("author", shown.author), ("sound", shown.sound)]
