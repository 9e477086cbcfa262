from collections import defaultdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.ids.strings import string_ids
from monolith_jax.stream.history import History, HistoryConfig

SCHEMA = pa.schema(
    {"user_id": pa.int64(), "video_id": pa.int64(), "event_time_ms": pa.int64(), "like": pa.bool_(), "play_time_ms": pa.int64()}
)
USERS = (-1, 0, 2**63 - 1, -(2**63), *range(1, 9))
ROW = st.fixed_dictionaries(
    {
        "user_id": st.one_of(st.sampled_from(USERS), st.none()),
        "video_id": st.one_of(st.integers(-2, 5), st.integers(2**62, 2**62 + 3), st.none()),
        "event_time_ms": st.integers(1000, 1008),
        "like": st.one_of(st.none(), st.booleans()),
        "play_time_ms": st.one_of(st.none(), st.sampled_from([0, 2999, 3000])),
    }
)


class Model:
    """The same with Python's dicts and lists."""

    def __init__(self, config: HistoryConfig) -> None:
        self.config = config
        self.layout = MapLayout(("history.user_id",), (config.max_users,), 2)
        self.rings: dict[int, list[tuple[int, int, int]]] = {}
        self.users_in: dict[int, int] = defaultdict(int)
        self.refused = 0

    def knows(self, user: int) -> bool:
        if user not in self.rings:
            shard = int(IdMaps(self.layout).hashes_of(np.array([user]).view(np.uint64), 0)[0] >> np.uint64(63))
            if self.users_in[shard] == self.layout.caps[0]:
                return False
            self.users_in[shard] += 1
            self.rings[user] = []
        return True

    def extend(self, row: dict) -> tuple[list[int], list[int]]:
        if row["user_id"] is None:
            return [], []
        if not self.knows(row["user_id"]):
            self.refused += 1
            return [], []
        ring = self.rings[row["user_id"]]
        before = [(item, bits) for item, bits, time in ring[::-1] if time < row["event_time_ms"]]
        if row["video_id"] is not None:
            skip = row["play_time_ms"] is not None and row["play_time_ms"] < 3000
            ring.append((row["video_id"], bool(row["like"]) + 2 * skip, row["event_time_ms"]))
            del ring[: -self.config.length]
        return [item for item, _ in before], [bits for _, bits in before]


def config(**fields: object) -> HistoryConfig:
    return HistoryConfig(**{"length": 3, "max_users": 100, "actions": ("like", "skip"), **fields})  # pyright: ignore[reportArgumentType]


def histories(history: History, batch: pa.RecordBatch) -> list[tuple[list[int], list[int]]]:
    out = history.extend(batch)
    assert out.schema.names == [*batch.schema.names, "history_video_id", "history_action"]
    assert out.select(batch.schema.names).equals(batch)
    found = [out.column(name) for name in out.schema.names[-2:]]
    assert all(column.type == pa.list_(pa.int64()) and not column.null_count for column in found)
    return list(zip(*(column.to_pylist() for column in found), strict=True))


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(ROW, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    length=st.integers(1, 4),
    max_users=st.sampled_from([1, 3, 100]),
    saved=st.integers(0, 5),
)
def test_agrees_with_dicts_wherever_batches_are_cut(
    rows: list[dict], cuts: list[int], length: int, max_users: int, saved: int
) -> None:
    one = config(length=length, max_users=max_users)
    history, model = History(one), Model(one)
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    edges = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    for index, (start, stop) in enumerate(pairwise(edges)):
        if index == saved:
            state = history.get_state()
            history = History(one)
            history.set_state(state)
            assert all(np.array_equal(array, state[name]) for name, array in history.get_state().items())
        assert histories(history, batch.slice(start, stop - start)) == [model.extend(row) for row in rows[start:stop]]
    assert history.num_refused == model.refused


def batch_of(users: list, items: list, times: list[int], kind: pa.DataType | None = None) -> pa.RecordBatch:
    columns = {
        "user_id": pa.array(users, kind),
        "video_id": pa.array(items, kind),
        "event_time_ms": pa.array(times, pa.int64()),
    }
    return pa.record_batch(columns | {"like": pa.array([item == 2 for item in items])})


def test_newest_first_and_strictly_earlier() -> None:
    history = History(config(actions=("like",)))
    found = histories(history, batch_of([1] * 7, [1, 2, 3, 4, 5, 6, 7], [10, 20, 20, 30, 15, 40, 40]))
    assert found == [
        ([], []),
        ([1], [0]),
        ([1], [0]),
        ([3, 2, 1], [0, 1, 0]),
        ([], []),
        ([5, 4, 3], [0] * 3),
        ([5, 4], [0] * 2),
    ]


def test_a_full_table_refuses_new_users_and_keeps_the_old() -> None:
    history = History(config(max_users=2, actions=("like",)))
    users = list(range(50))
    for time in range(1, 4):
        found = histories(history, batch_of(users, users, [time] * 50))
        held = [user for user, (items, _) in zip(users, found, strict=True) if items]
        assert all(items == [user] * (time - 1) for user, (items, _) in zip(users, found, strict=True) if user in held)
    assert 2 <= len(held) <= 4 and history.num_refused == 3 * (50 - len(held))


def test_strings_are_remembered_by_their_ids() -> None:
    names = ["a", "b", "a", "a", None]
    out = History(config(actions=())).extend(batch_of(names, ["x", "y", None, "z", "z"], [1, 2, 3, 4, 5], pa.string()))
    x = string_ids(pa.array(["x"]))[0]
    assert out.column("history_video_id").to_pylist() == [[], [], [x], [x], []]
    assert out.column("history_action").to_pylist() == [[], [], [0], [0], []]


def test_all_eight_bits() -> None:
    names = tuple("abcdefgh")
    base = batch_of([1] * 9, list(range(9)), list(range(9)))
    for index, name in enumerate(names):
        base = base.append_column(name, pa.array([row == index for row in range(9)]))
    out = History(config(length=8, actions=names)).extend(base)
    assert out.column("history_action").to_pylist()[8] == [1 << k for k in reversed(range(8))]


def test_reset_forgets_everything() -> None:
    history = History(config(max_users=1, actions=("like",)))
    fresh = history.get_state()
    batch = batch_of([*range(9), 0], [1] * 10, [1] * 9 + [2])
    first = histories(history, batch)
    assert history.num_refused
    history.reset()
    assert all(np.array_equal(array, fresh[name]) for name, array in history.get_state().items()) and not history.num_refused
    assert histories(history, batch) == first


def test_clear_errors() -> None:
    for fields in ({"length": 0}, {"max_users": 0}, {"actions": tuple("abcdefghi")}):
        with pytest.raises(ValueError, match="HistoryConfig: at most 8 actions"):
            History(config(**fields))
    batch = batch_of([1], [1], [1])
    with pytest.raises(
        ValueError, match=r"HistoryConfig.user_column is 'who', which the source does not yield; there: user_id"
    ):
        History(config(actions=(), user_column="who")).extend(batch)
    with pytest.raises(ValueError, match=r"HistoryConfig.item_column is 'like', which is bool; expected int64 or string"):
        History(config(actions=(), item_column="like")).extend(batch)
    with pytest.raises(ValueError, match="label needs the column 'follow'"):
        History(config(actions=("follow",))).extend(batch)
    state = History(config(length=4)).get_state()
    with pytest.raises(ValueError, match="state of 'items'"):
        History(config(length=5)).set_state(state)
    with pytest.raises(ValueError, match="id maps of tables"):
        History(config(max_users=7)).set_state(state)
    with pytest.raises(ValueError, match="state of 'heads' is nothing"):
        History(config(length=4)).set_state({name: array for name, array in state.items() if name != "heads"})


def test_what_is_told_of_the_items_stays_beside_them() -> None:
    examples = pa.record_batch(
        {
            "user_id": pa.array([1, 1, 1, 2, 1]),
            "video_id": pa.array([10, 11, 12, 10, 13]),
            "event_time_ms": pa.array([1, 2, 3, 4, 5]),
            "like": pa.array([True, False, True, False, False]),
            "author_id": pa.array([7, None, -1, 7, 9]),
            "tag_id": pa.array([[5, 6], [], None, [5], [8]], pa.list_(pa.int64())),
            "sound_id": pa.array(["a", "b", None, "a", "c"]),
        }
    )
    config = HistoryConfig(length=2, max_users=4, actions=("like",), columns=("author_id", "tag_id", "sound_id"))
    whole = History(config).extend(examples)
    assert whole.column("history_video_id").to_pylist() == [[], [10], [11, 10], [], [12, 11]]
    assert whole.column("history_author_id").to_pylist() == [[], [7], [None, 7], [], [-1, None]]
    assert whole.column("history_tag_id").to_pylist() == [[], [5], [None, 5], [], [None, None]]
    a, b = string_ids(pa.array(["a", "b"])).tolist()
    assert whole.column("history_sound_id").to_pylist() == [[], [a], [b, a], [], [None, b]]
    one, other = History(config), History(config)
    first = one.extend(examples.slice(0, 2))
    other.set_state(one.get_state())
    parts = pa.Table.from_batches([first, other.extend(examples.slice(2))]).combine_chunks().to_batches()[0]
    assert parts.to_pydict() == whole.to_pydict()
    with pytest.raises(ValueError, match=r"HistoryConfig.columns is 'device'"):
        History(HistoryConfig(columns=("device",), actions=("like",))).extend(examples)
