"""Requests, rewards, policies and the books of a replay in the synthetic world."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.evaluate import replay
from monolith_jax.evaluate.replay import Ask, Ledger, Popularity, Reward, Seen, pick_oracle, pick_random
from monolith_jax.stream import world
from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource, examples_of

CONFIG = SyntheticConfig(seed=3, live_users=60, users_per_day=10.0, live_videos=120, videos_per_day=48.0, events_per_s=0.2)
REWARD = Reward(("like", "complete", "skip"), (1.0, 0.3, -0.3), 0.01)
BEGIN_MS = CONFIG.start_ms + 6 * world.HOUR_MS


def ask(number: int = 0, user: int = 7, size: int = 5, unseen: np.ndarray | None = None, time_ms: int = BEGIN_MS) -> Ask:
    live = replay.live_videos(CONFIG, time_ms)
    worth = REWARD.expected(CONFIG, time_ms, user, live)
    return Ask(number, time_ms, user, size, live, worth, np.ones(live.size, np.bool_) if unseen is None else unseen)


def shown(one: Ask, video: np.ndarray) -> pa.RecordBatch:
    return examples_of(CONFIG, np.full(video.size, one.time_ms), np.full(video.size, one.user), video)


def test_requests_are_the_world_s() -> None:
    of = replay.requests_of(CONFIG, BEGIN_MS, 24, 50)
    assert (np.diff(of.time_ms) > 0).all() and of.time_ms[0] >= BEGIN_MS
    assert of.time_ms[-1] < BEGIN_MS + world.DAY_MS and of.time_ms.size == pytest.approx(24 * 50, abs=2)
    hours = of.time_ms % world.DAY_MS // world.HOUR_MS
    assert np.bincount(hours, minlength=24) == pytest.approx(50 * world.ACTIVITY[(np.arange(24))], abs=2)
    newest = world.newest(CONFIG, "user", of.time_ms)
    assert ((of.user <= newest) & (of.user > newest - CONFIG.live_users)).all()
    # A few users ask most of the time.
    assert np.sort(np.bincount(of.user))[::-1][:10].sum() > 0.3 * of.user.size


def test_requests_follow_the_seed() -> None:
    one, again = (replay.requests_of(CONFIG, BEGIN_MS, 3, 50, seed=1) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    shorter = replay.requests_of(CONFIG, BEGIN_MS, 3, 50, seed=2)
    assert one.user.tolist() != shorter.user.tolist()


def test_requests_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        replay.requests_of(CONFIG, BEGIN_MS, 0, 50)
    with pytest.raises(ValueError, match="before the world does"):
        replay.requests_of(CONFIG, CONFIG.start_ms - 1, 3, 50)


def test_examples_before_are_those_of_the_stream() -> None:
    number = replay.examples_before(CONFIG, BEGIN_MS)
    chunk = next(SyntheticSource(SyntheticConfig(**{**vars(CONFIG), "chunk_rows": 8192})).read({}))
    times = chunk.examples.column("event_time_ms").to_numpy()
    assert np.searchsorted(times, BEGIN_MS) == pytest.approx(number, abs=1)


def test_live_videos_come_and_go() -> None:
    for hours in (0, 1, 25):
        time_ms = CONFIG.start_ms + hours * world.HOUR_MS + 1
        live = replay.live_videos(CONFIG, time_ms)
        assert live.size == CONFIG.live_videos and (np.diff(live) == 1).all()
        assert live[-1] == CONFIG.live_videos - 1 + 2 * hours
        came = replay.arrived_ms(CONFIG, live)
        assert (came <= time_ms).all() and (np.diff(came) > 0).all()
        assert replay.arrived_ms(CONFIG, live[-1:] + 1)[0] > time_ms
        assert (world.newest(CONFIG, "video", came + 1) == live).all()
        assert (world.newest(CONFIG, "video", came - 1) == live - 1).all()
    fixed = SyntheticConfig(videos_per_day=0.0)
    assert (replay.arrived_ms(fixed, np.arange(3)) == fixed.start_ms).all()


def test_reward_is_as_expected_on_average() -> None:
    live = replay.live_videos(CONFIG, BEGIN_MS)
    expected, realised = [], []
    for user in range(60):
        time_ms = BEGIN_MS + user
        expected.append(REWARD.expected(CONFIG, time_ms, user, live))
        realised.append(REWARD.realised(examples_of(CONFIG, np.full(live.size, time_ms), np.full(live.size, user), live)))
    apart = np.concatenate(realised) - np.concatenate(expected)
    assert abs(apart.mean()) < 4 * apart.std() / np.sqrt(apart.size)
    assert np.corrcoef(np.concatenate(expected), np.concatenate(realised))[0, 1] > 0.3


def test_reward_by_hand() -> None:
    names = ["duration_ms", "play_time_ms", "like"]
    examples = pa.record_batch([pa.array([10_000, 20_000]), pa.array([9_600, 1_000]), pa.array([True, False])], names)
    # Liked, complete, 9.6 s; skipped, 1 s.
    assert REWARD.realised(examples).tolist() == pytest.approx([1.0 + 0.3 + 0.096, -0.3 + 0.01], abs=1e-6)


def test_reward_of_what_the_world_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="no true probability of purchase"):
        Reward(("like", "purchase"), (1.0, 2.0))
    with pytest.raises(ValueError, match="a weight for each head"):
        Reward(("like",), (1.0, 2.0))


def test_random_is_worth_the_mean() -> None:
    unseen = np.arange(CONFIG.live_videos) % 3 > 0
    of = [ask(number, unseen=unseen) for number in range(400)]
    picked = np.concatenate([pick_random(one) for one in of]) - of[0].live[0]
    assert unseen[picked].all() and picked.size == 2_000
    there = of[0].worth[unseen]
    assert of[0].worth[picked].mean() == pytest.approx(there.mean(), abs=4 * there.std() / np.sqrt(2_000))
    counts = np.bincount(picked, minlength=unseen.size)[unseen]
    assert counts.min() > 5 and counts.max() < 60
    assert pick_random(of[3]).tolist() == pick_random(of[3]).tolist() != pick_random(of[4]).tolist()


def test_oracle_shows_the_best_that_is_left() -> None:
    seen, left = Seen(), ask()
    for _ in range(CONFIG.live_videos // 5 + 1):
        one = ask(unseen=seen.unseen(7, left.live))
        picked = pick_oracle(one)
        rest = np.setdiff1d(left.live[one.unseen], picked)
        places = picked - left.live[0]
        assert not rest.size or one.worth[places].min() >= one.worth[rest - left.live[0]].max()
        seen.add(np.full(picked.size, 7), picked)
    assert not seen.unseen(7, left.live).any() and seen.unseen(8, left.live).all()
    assert pick_oracle(ask(unseen=seen.unseen(7, left.live))).size == 0


def test_popularity_counts_fade() -> None:
    popular, hour = Popularity(3600.0), world.HOUR_MS

    def learn(video: list[int], likes: list[bool], time_ms: int) -> None:
        columns = {"event_time_ms": pa.array([time_ms] * len(video)), "like": pa.array(likes)}
        columns |= {"play_time_ms": pa.array([0] * len(video)), "duration_ms": pa.array([10_000] * len(video))}
        popular.learn(np.array(video), pa.record_batch(columns))

    one = ask()
    low = int(one.live[0])
    learn([low, low, low, low + 1], [True, True, True, True], BEGIN_MS)
    assert popular.pick(one)[:2].tolist() == [low, low + 1]
    learn([low + 1, low + 2], [True, True], BEGIN_MS + 2 * hour)
    # 3 / 4, 1 / 4 + 1, 1; of those with none, the newest.
    assert popular.pick(one).tolist() == [low + 1, low + 2, low, one.live[-1], one.live[-2]]
    learn([5_000], [True], BEGIN_MS + 2 * hour)
    assert popular.pick(one)[0] == low + 1
    popular.learn(np.zeros(0, np.int64), pa.record_batch({"event_time_ms": pa.array([], pa.int64())}))


def test_books_by_hand() -> None:
    ledger = Ledger(CONFIG, BEGIN_MS)
    unseen = np.ones(CONFIG.live_videos, np.bool_)
    unseen[:10] = False
    one, later = ask(unseen=unseen), ask(1, time_ms=BEGIN_MS + 3 * world.HOUR_MS)
    for policy, pick in (("random", pick_random), ("oracle", pick_oracle)):
        for at in (one, later):
            video = pick(at)
            ledger.book(policy, at, video, REWARD.realised(shown(at, video)))
    ledger.book("mine", one, one.live[8:13], np.arange(5.0))
    rows = {row["policy"]: row for row in ledger.rows(0)}
    mine, best = rows["mine"], np.sort(one.worth[10:])[-5:]
    assert mine["hour"] == 0 and mine["feeds"] == 1 and mine["impressions"] == 5 and mine["realised"] == 9 / 5
    assert mine["reward"] == pytest.approx(one.worth[10:13].sum() / 5) and mine["repeated"] == 0.4, "repeats are worth nothing"
    assert mine["regret"] == pytest.approx(best.mean() - one.worth[10:13].sum() / 5)
    assert mine["coverage"] == 5 / 120 and mine["new"] == 0
    assert rows["oracle"]["advantage"] == 1 and rows["random"]["advantage"] == 0
    assert rows["oracle"]["regret"] == pytest.approx(0) and rows["oracle"]["reward"] == pytest.approx(best.mean())
    low, high = rows["random"]["reward"], rows["oracle"]["reward"]
    assert mine["advantage"] == pytest.approx((mine["reward"] - low) / (high - low))
    assert not ledger.rows(1) and {row["policy"] for row in ledger.rows(3)} == {"random", "oracle"}
    totals = {row["policy"]: row for row in ledger.totals()}
    assert totals["oracle"]["impressions"] == 10 and totals["mine"]["reward"] == mine["reward"]


def test_no_feed_is_better_than_the_best() -> None:
    unseen = np.zeros(CONFIG.live_videos, np.bool_)
    unseen[:7] = True
    one, ledger = ask(unseen=unseen), Ledger(CONFIG, BEGIN_MS)
    by_worth = one.live[np.argsort(-one.worth)]
    feeds = {"repeats": by_worth[:5], "one": one.live[:7][np.argmax(one.worth[:7])][None], "none": one.live[:0]}
    for policy, video in feeds.items():
        ledger.book(policy, one, video, np.ones(video.size))
    rows = {row["policy"]: row for row in ledger.rows(0)}
    assert all(row["regret"] > 0 for row in rows.values()) and rows["none"]["reward"] == rows["none"]["realised"] == 0
    assert rows["one"]["reward"] <= one.worth[:7].max() / 5


def test_new_videos_are_counted() -> None:
    one = ask(time_ms=BEGIN_MS + 2 * world.DAY_MS + 1)
    ledger = Ledger(CONFIG, BEGIN_MS)
    ledger.book("mine", one, one.live[-50:], np.zeros(50))
    assert ledger.rows(48)[0]["new"] == 48 / 50


def test_what_is_not_there_cannot_be_booked() -> None:
    one, ledger = ask(), Ledger(CONFIG, BEGIN_MS)
    for video in (one.live[:1] - 1, one.live[-1:] + 1, one.live[[3, 3]]):
        with pytest.raises(ValueError, match="mine showed a video twice in a feed, or one that is not there"):
            ledger.book("mine", one, video, np.zeros(video.size))


def test_the_oracle_is_above_all_in_every_hour() -> None:
    requests = replay.requests_of(CONFIG, BEGIN_MS, 6, 40)
    ledger, popular = Ledger(CONFIG, BEGIN_MS), Popularity()
    past = next(SyntheticSource(SyntheticConfig(**{**vars(CONFIG), "num_examples": 3_000})).read({})).examples
    popular.learn(world.indexes_of(CONFIG.seed, "video", past.column("video_id").to_numpy()), past)
    lives = {"random": pick_random, "popularity": popular.pick, "oracle": pick_oracle}
    seen = {name: Seen() for name in lives}
    for number, (time_ms, user) in enumerate(zip(*map(np.ndarray.tolist, requests), strict=True)):
        for name, pick in lives.items():
            at = ask(number, user, 3, time_ms=time_ms)
            at = at._replace(unseen=seen[name].unseen(user, at.live))
            video = pick(at)
            examples = shown(at, video)
            ledger.book(name, at, video, REWARD.realised(examples))
            seen[name].add(np.full(video.size, user), video)
            if name == "popularity":
                popular.learn(video, examples)
    for hour in range(6):
        rows = {row["policy"]: row for row in ledger.rows(hour)}
        assert max(rows, key=lambda name: rows[name]["reward"]) == "oracle"
        assert rows["popularity"]["regret"] > 0 and rows["random"]["regret"] > 0
        assert rows["oracle"]["regret"] == pytest.approx(0, abs=1e-12)
        assert all(row["repeated"] == 0 for row in rows.values())
    totals = {row["policy"]: row["reward"] for row in ledger.totals()}
    assert totals["random"] < totals["popularity"] < totals["oracle"]
