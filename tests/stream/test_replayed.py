from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.ids.strings import string_ids
from monolith_jax.stream.events import ACTION, ACTIONS, OUTCOME
from monolith_jax.stream.partitions import partitions_of
from monolith_jax.stream.replayed import Waiting, actions_of, impressions_of
from monolith_jax.stream.synthetic import SyntheticConfig, SyntheticSource

T = 1_700_000_000_000


def examples_of(**columns: Any) -> pa.RecordBatch:
    number = len(next(iter(columns.values())))
    needed = {name: pa.array(range(number), pa.int64()) for name in ("user_id", "video_id")}
    return pa.record_batch({"event_time_ms": pa.array(range(T, T + number)), **needed, **columns})


def test_an_example_is_what_its_events_say() -> None:
    [chunk] = SyntheticSource(SyntheticConfig(num_examples=3000)).read({})
    examples = chunk.examples
    impressions = impressions_of(examples, 100)
    actions, rows = actions_of(examples, impressions)
    assert impressions.column("request_id").to_pylist() == list(range(100, 3100))
    same = [name for name in examples.schema.names if name not in OUTCOME.names]
    assert impressions.select(same).to_pylist() == examples.select(same).to_pylist()
    assert set(impressions.schema.names) == {*same, "request_id"}
    assert actions.schema.names == ACTION.names and actions.schema.types == ACTION.types

    joined: list[dict[str, Any]] = [dict.fromkeys(ACTIONS, False) for _ in range(3000)]
    for row, action in zip(rows.tolist(), actions.to_pylist(), strict=True):
        for name in ("user_id", "video_id", "request_id", "event_time_ms"):
            assert action[name] == impressions.column(name)[row].as_py()
        name = {"play": "play_time_ms", "dwell": "dwell_ms"}.get(action["action"], action["action"])
        joined[row][name] = action["value"] if name in ("play_time_ms", "dwell_ms") else True
    wanted = examples.select(["play_time_ms", "dwell_ms", *ACTIONS]).to_pylist()
    assert joined == wanted
    assert len(set(actions.column("event_id").to_pylist())) == len(actions)


def test_events_are_known_again() -> None:
    examples = examples_of(like=[True, True], play_time_ms=[5, 6], request_id=pa.array([7, None]))
    impressions = impressions_of(examples, 50)
    assert impressions.column("request_id").to_pylist() == [7, 51]
    first, again = actions_of(examples, impressions)[0], actions_of(examples, impressions)[0]
    assert first.equals(again)


def test_what_was_not_observed_is_no_event() -> None:
    examples = examples_of(like=[None, False, True], click=pa.nulls(3, pa.bool_()), play_time_ms=[None, 0, 3])
    actions, rows = actions_of(examples, impressions_of(examples, 0))
    assert rows.tolist() == [1, 2, 2]
    assert [(one["action"], one["value"]) for one in actions.to_pylist()] == [("play", 0), ("like", None), ("play", 3)]
    none, rows = actions_of(examples_of(x=[1]), impressions_of(examples_of(x=[1]), 0))
    assert not len(none) and not len(rows) and none.schema.types == ACTION.types


def test_texts_become_their_hashes_where_ids_are_wanted() -> None:
    tags = pa.array([["a", "b"], None, []])
    examples = examples_of(author_id=pa.array(["x", None, "y"]), tag_id=tags, city=["p", "q", None])
    for batch in (examples, pa.concat_batches([examples, examples]).slice(3)):
        impressions = impressions_of(batch, 0)
        x, y, a, b = string_ids(pa.array(["x", "y", "a", "b"])).tolist()
        assert impressions.column("author_id").to_pylist() == [x, None, y]
        assert impressions.column("tag_id").to_pylist() == [[a, b], None, []]
        assert impressions.column("city").to_pylist() == ["p", "q", None]


def test_examples_that_are_no_events_are_refused() -> None:
    with pytest.raises(ValueError, match="no column 'user_id', without which"):
        impressions_of(pa.record_batch({"event_time_ms": [T], "age": [30]}), 0)
    with pytest.raises(ValueError, match="column 'duration_ms' should hold int64, got double"):
        impressions_of(examples_of(duration_ms=[0.5]), 0)


def test_users_stay_whole_in_partitions_of_partitions() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 10_000)
    twelve = partitions_of(ids, 12)
    assert np.bincount(twelve, minlength=12).min() > 700
    for number in (1, 2, 3, 4, 6):
        assert (twelve % number == partitions_of(ids, number)).all()


def test_events_wait_until_they_are_due() -> None:
    rng = np.random.default_rng(0)
    waiting, given, taken = Waiting(), [], []
    now = 0.0
    for turn in range(200):
        due = now + rng.exponential(30, int(rng.integers(0, 50)))
        names = [(turn, at) for at in range(len(due))]
        given += list(zip(due.tolist(), names, strict=True))
        waiting.add(pa.record_batch({"due": due, "turn": [one for one, _ in names], "at": [one for _, one in names]}), due)
        now += 10
        before = len(taken)
        if (batch := waiting.take(now)) is not None:
            taken += [(one["due"], (one["turn"], one["at"])) for one in batch.to_pylist()]
        assert all(now - 10 < one <= now for one, _ in taken[before:]) or not turn
    assert len(waiting) == len(given) - len(taken) > 0
    assert taken == sorted(given)[: len(taken)]
    assert waiting.take(float("inf")) is not None and waiting.take(float("inf")) is None and not len(waiting)
