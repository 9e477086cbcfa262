# pyright: reportAttributeAccessIssue=false
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.log_tail import LogTail
from monolith_jax.serve.user_state import Lookup, UserState, UserStateConfig, user_state_bytes
from monolith_jax.stream.events import ACTION
from monolith_jax.stream.history import History, HistoryConfig
from monolith_jax.stream.log_source import LogConfig
from monolith_jax.stream.replayed import actions_of, impressions_of
from tests.stream.event_log import Feed, make_world

T = 1_700_000_000_000
LABELS = ("like", "long_view", "complete", "skip", "rewatch", "click")
LIKE, LONG_VIEW, COMPLETE, SKIP, REWATCH, CLICK = (1 << k for k in range(6))
SCHEMA = pa.schema(
    {
        **{name: pa.int64() for name in ("user_id", "video_id", "event_time_ms", "play_time_ms", "duration_ms")},
        **{name: pa.bool_() for name in ("like", "click")},
    }
)
USERS = (-1, 0, 2**63 - 1, -(2**63), 7)
Row = dict[str, Any]


def state_of(length: int = 3, **fields: Any) -> UserState:
    return UserState(UserStateConfig(**{"length": length, "max_users": 1000, "actions": LABELS, **fields}))


def histories(state: UserState, users: np.ndarray, now_ms: int) -> list[list[list[int]]]:
    """Returns the histories of users: videos, and action bits."""
    found = [state.history(user, now_ms) for user in users.tolist()]
    return [[one.tolist() for one in of_all] for of_all in zip(*found, strict=True)]


def rebuild(state: UserState, tail: LogTail, durations: Lookup, authors: Lookup) -> int:
    return sum(state.observe(events.actions, durations, authors) for events in tail.catch_up() if events.actions is not None)


def durations_of(known: dict[int, int]) -> Lookup:
    def durations(videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [known.get(video) for video in videos.tolist()]
        return np.array([1 if one is None else one for one in found], np.int64), np.array(
            [one is not None for one in found], np.bool_
        )

    return durations


def done(*rows: tuple[int, int, str, int | None, int]) -> pa.RecordBatch:
    """Returns actions: (user, video, action, value, ms after T)."""
    names = ("user_id", "video_id", "action", "value", "event_time_ms")
    dicts = [dict(zip(names, (*row[:4], T + row[4]), strict=True)) for row in rows]
    return pa.RecordBatch.from_pylist(dicts, pa.schema([ACTION.field(name) for name in names]))


def asked(state: UserState, user: int, ms: int = 10**9) -> list[tuple[int, int]]:
    videos, bits = state.history(user, T + ms)
    assert videos.dtype == bits.dtype == np.int64
    return list(zip(videos.tolist(), bits.tolist(), strict=True))


EXAMPLE_ROW = st.fixed_dictionaries(
    {
        "user_id": st.one_of(st.sampled_from(USERS), st.none()),
        "video_id": st.one_of(st.integers(-2, 5), st.none()),
        "event_time_ms": st.integers(1000, 1008),
        "play_time_ms": st.one_of(st.none(), st.sampled_from([0, 2999, 3000, 9500, 18_000, 60_000])),
        "duration_ms": st.one_of(st.none(), st.sampled_from([0, 10_000, 40_000])),
        "like": st.one_of(st.none(), st.booleans()),
        "click": st.one_of(st.none(), st.booleans()),
    }
)


def columns_of(batch: pa.RecordBatch) -> list[list[list[int]]]:
    return [batch.column(name).to_pylist() for name in ("history_video_id", "history_action")]


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(EXAMPLE_ROW, max_size=25), cuts=st.lists(st.integers(0, 40), max_size=5), length=st.integers(1, 4))
def test_equals_the_columns_of_history(rows: list[Row], cuts: list[int], length: int) -> None:
    rows = sorted(rows, key=lambda row: row["event_time_ms"])
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    state = state_of(length)
    whole = History(HistoryConfig(length=length, max_users=1000, actions=LABELS))
    edges = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    for start, stop in pairwise(edges):
        part = batch.slice(start, stop - start)
        # Examples of one batch do not see each other here, in `History` they do: but never those of their own time.
        for index in range(len(part)):
            row = part.slice(index, 1)
            wanted = columns_of(whole.extend(row))
            user = rows[start + index]["user_id"]
            if user is not None:
                assert histories(state, np.array([user]), rows[start + index]["event_time_ms"]) == wanted
            state.observe_examples(row)
    every = np.array(USERS)
    probe = pa.RecordBatch.from_pylist([{"user_id": user, "event_time_ms": 2000} for user in USERS], SCHEMA)
    together = state_of(length)
    for start, stop in pairwise(edges):
        together.observe_examples(batch.slice(start, stop - start))
    assert histories(together, every, 2000) == columns_of(whole.extend(probe))


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(EXAMPLE_ROW, max_size=25), seed=st.integers(0, 100))
def test_actions_come_to_the_history_of_their_examples(rows: list[Row], seed: int) -> None:
    rng = np.random.default_rng(seed)
    plays = (0, 2999, 3000, 9500, 18_000, 60_000)
    # Each video once, each with a play time: without any action there is nothing to remember.
    rows = [
        row | {"user_id": row["user_id"] or 0, "video_id": video, "event_time_ms": T + video}
        | {"play_time_ms": plays[rng.integers(6)]}
        for video, row in enumerate(rows)
    ]  # fmt: skip
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    history = History(HistoryConfig(length=5, max_users=1000, actions=LABELS))
    history.extend(batch)
    actions, of_row = actions_of(batch, impressions_of(batch, 1))
    # The player tells shorter times too, before and after.
    shorter = actions.filter(pc.equal(actions.column("action"), "play"))
    value = pa.array([one // 2 for one in shorter.column("value").to_pylist()], pa.int64())
    shorter = shorter.set_column(shorter.schema.get_field_index("value"), "value", value)
    both = pa.concat_batches([actions, shorter])
    at = np.concatenate([of_row, np.arange(len(shorter))])
    # In any order within an impression.
    both = both.take(pa.array(np.lexsort((rng.random(len(both)), at))))
    state = state_of(5)
    durations = durations_of({row["video_id"]: row["duration_ms"] for row in rows if row["duration_ms"] is not None})
    for start, stop in pairwise([0, len(both) // 3, len(both)]):
        state.observe(both.slice(start, stop - start), durations)
    probe = pa.RecordBatch.from_pylist([{"user_id": user, "event_time_ms": T + 1000} for user in USERS], SCHEMA)
    assert histories(state, np.array(USERS), T + 1000) == columns_of(history.extend(probe))


def test_an_action_is_seen_at_once_and_moves_nothing() -> None:
    state, durations = state_of(), durations_of({1: 10_000, 2: 10_000})
    assert state.observe(done((7, 1, "click", None, 0), (7, 2, "play", 9600, 10)), durations) == 2
    assert asked(state, 7) == [(2, COMPLETE), (1, CLICK)]
    state.observe(done((7, 1, "like", None, 20)), durations)
    assert asked(state, 7) == [(2, COMPLETE), (1, CLICK | LIKE)]
    assert asked(state, 7, 10) == [(1, CLICK | LIKE)]  # Strictly earlier.
    assert asked(state, 7, 0) == [] and asked(state, 8) == []
    # One that comes late stands where its time says.
    state.observe(done((7, 3, "click", None, 5)))
    assert [video for video, _ in asked(state, 7)] == [2, 3, 1]


def test_the_largest_play_time_says_whether_it_was_a_skip() -> None:
    state, durations = state_of(), durations_of({1: 10_000})
    told = [(1000, SKIP), (500, SKIP), (4000, 0), (2000, 0), (16_000, LONG_VIEW | COMPLETE | REWATCH)]
    for value, bits in (*told, (100, LONG_VIEW | COMPLETE | REWATCH), (10**12, LONG_VIEW | COMPLETE | REWATCH)):
        state.observe(done((7, 1, "play", value, 0)), durations)
        assert asked(state, 7) == [(1, bits)]
    # Nothing is known of its duration.
    state.observe(done((7, 2, "play", 99_000, 1)), durations)
    assert asked(state, 7)[0] == (2, 0)


def test_a_hundred_thousand_actions_of_one_user_leave_the_newest() -> None:
    state, number = state_of(50, max_users=100), 100_000
    columns = {"user_id": np.full(number, 3), "video_id": np.arange(number), "event_time_ms": T + np.arange(number)}
    actions = pa.record_batch({**columns, "action": ["click"] * number, "value": pa.nulls(number, pa.int64())})
    assert state.observe(actions) == number
    assert asked(state, 3) == [(number - 1 - k, CLICK) for k in range(50)]
    examples = pa.record_batch({**columns, **{name: pa.nulls(number, SCHEMA.field(name).type) for name in SCHEMA.names[3:]}})
    state.observe_examples(examples)
    assert [video for video, _ in asked(state, 3)] == [number - 1 - k // 2 for k in range(50)]


def test_more_users_than_there_is_room_for_are_forgotten() -> None:
    state = state_of(max_users=8)
    authors = durations_of({1: 11})
    state.observe(done(*((user, 1, "follow", None, user) for user in range(8))), None, authors)
    state.observe(done((0, 2, "click", None, 50), (8, 3, "click", None, 51)))
    assert asked(state, 1) == [] and state.followed(1).size == 0
    assert asked(state, 8) == [(3, CLICK)] and state.followed(8).size == 0
    assert [video for video, _ in asked(state, 0)] == [2, 1] and state.followed(0).tolist() == [11]
    assert {name: state.metrics()[name] for name in ("users", "users_replaced", "observed")} == {
        "users": 8,
        "users_replaced": 1,
        "observed": 10,
    }


def test_followed_authors() -> None:
    state = state_of(followed=2)
    authors = durations_of({1: -1, 2: 0, 3: 2**40, 4: 0})
    state.observe(done((7, 1, "follow", None, 0), (7, 2, "follow", None, 1), (7, 3, "like", None, 2)), None, authors)
    assert state.followed(7).tolist() == [0, -1]
    state.observe(done((7, 4, "follow", None, 3), (7, 9, "follow", None, 4), (7, 3, "follow", None, 5)), None, authors)
    assert state.followed(7).tolist() == [2**40, 0]
    state.observe(done((7, 1, "follow", None, 9)))  # Nobody knows whose it is.
    assert state.followed(7).tolist() == [2**40, 0] and state.followed(8).size == 0
    assert state_of(followed=0).followed(7).size == 0


def test_bad_rows_are_set_aside_and_counted() -> None:
    state = state_of()
    good: Row = {"user_id": 7, "video_id": 1, "action": "click", "value": 1.0, "event_time_ms": T}
    bad: dict[str, Row] = {
        "no user_id": {"user_id": None},
        "no video_id": {"video_id": None},
        "no event_time_ms": {"event_time_ms": None},
        "unknown action": {"action": "yodel"},
        "value is missing": {"action": "play", "value": float("nan")},
        "negative value": {"action": "dwell", "value": -1.0},
    }
    rows = [good | {"video_id": 9}, *({**good, "video_id": 50} | one for one in bad.values())]
    rows += [good | {"action": None}, good | {"action": "play", "value": None}, good]
    assert state.observe(pa.RecordBatch.from_pylist(rows)) == 2
    assert asked(state, 7) == [(1, CLICK), (9, CLICK)]
    counts = {name: count for name, count in state.metrics().items() if name.startswith("set_aside/")}
    doubled = ("unknown action", "value is missing")
    assert counts == {f"set_aside/{name}": 1 + (name in doubled) for name in bad}
    assert state.observe(done()) == 0


def test_examples_without_user_video_or_time_are_set_aside() -> None:
    state = state_of()
    rows: list[Row] = [{"user_id": 7, "video_id": 1, "event_time_ms": T, "like": True}]
    rows += [rows[0] | {name: None} for name in ("user_id", "video_id", "event_time_ms")]
    assert state.observe_examples(pa.RecordBatch.from_pylist(rows, SCHEMA)) == 1
    assert asked(state, 7) == [(1, LIKE)]
    assert sum(count for name, count in state.metrics().items() if name.startswith("set_aside/")) == 3


def test_columns_that_are_missing_or_wrong() -> None:
    state, good = state_of(), done((7, 1, "like", None, 0))
    for name in good.schema.names:
        with pytest.raises(ValueError, match=name):
            state.observe(good.drop_columns([name]))
    for name, column in (("user_id", [0.5]), ("event_time_ms", ["now"]), ("value", ["much"])):
        with pytest.raises(ValueError, match=name):
            state.observe(good.set_column(good.schema.get_field_index(name), name, pa.array(column)))
    with pytest.raises(ValueError, match="like"):
        state.observe_examples(good)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"length": 0}, "length"),
        ({"max_users": 0}, "max_users"),
        ({"followed": -1}, "followed"),
        ({"actions": ("like",) * 9}, "at most 8"),
        ({"actions": ("like", "yodel")}, "yodel.*long_view"),
    ],
)
def test_bad_configs(fields: Row, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        UserStateConfig(**fields)


def test_bytes() -> None:
    config = UserStateConfig(length=7, max_users=100, followed=5)
    state = UserState(config)
    parts = (state._slots, state._videos, state._followed)
    arrays = [one for of in parts for one in vars(of).values() if isinstance(one, np.ndarray)]
    assert user_state_bytes(config) == sum(array.nbytes for array in arrays)
    assert 1200 < user_state_bytes(UserStateConfig()) / 100_000 < 1400


def test_a_restart_comes_to_the_same_state(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    worlds = [make_world(1200, seed) for seed in (1, 2)]
    follows = [row | {"action": "follow"} for row in worlds[0].actions[:200]]
    durations, authors = durations_of(dict.fromkeys(range(0, 4000, 2), 9000)), durations_of({k: k % 9 for k in range(4000)})

    def kept(tail: LogTail, state: UserState) -> None:
        for events in tail.catch_up():
            if events.actions is not None:
                state.observe(events.actions, durations, authors)

    state = state_of(20)
    with closing(Feed(url, batch=30)) as feed:
        feed.send_world(worlds[0])
        feed.send("actions", follows)
        feed.producer.flush()
        with closing(LogTail(LogConfig(url=url, poll_messages=7), float("inf"))) as tail:
            assert rebuild(state, tail, durations, authors) == len(worlds[0].actions) + 200
            # It goes on, in other pieces than those that a restart reads.
            feed.send_world(worlds[1])
            kept(tail, state)
        with closing(LogTail(LogConfig(url=url), float("inf"))) as tail:
            again = state_of(20)
            assert rebuild(again, tail, durations, authors) == state.metrics()["observed"]
    users = np.arange(-1, 51)
    for now in (T + 6_000, T + 10**9):
        kept_ones, others = (histories(one, users, now) for one in (state, again))
        assert kept_ones == others
    assert sum(map(len, kept_ones[0])) > 900
    followed = [state.followed(user).tolist() for user in users.tolist()]
    assert followed == [again.followed(user).tolist() for user in users.tolist()] and sum(map(len, followed)) > 100
