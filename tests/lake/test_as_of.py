"""No feature of this moment or a later one reaches an example, however the log of changes lies."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.lake.as_of import as_of_join, features_of, with_columns
from monolith_jax.lake.tables import Subject
from monolith_jax.lake.versions import FeatureState
from tests.lake.feature_oracle import Change, Oracle, changes_of, int64, log_of

TIMES = st.integers(0, 40).map(lambda step: 10_000 * step)


def examples_of(subject: Subject, ids: list[int], times: list[int]) -> pa.RecordBatch:
    return pa.record_batch({"event_time_ms": int64(times), f"{subject}_id": int64(ids)})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_walk_in_chunks_is_exact_with_one_version(data: st.DataObject) -> None:
    subject: Subject = data.draw(st.sampled_from(("user", "video")))
    changes = data.draw(st.lists(changes_of(subject, TIMES), max_size=40))
    asked = data.draw(st.lists(st.tuples(TIMES, st.integers(0, 5)), min_size=1, max_size=30))
    asked.sort(key=lambda one: one[0])
    oracle, state = Oracle(subject), FeatureState(subject, 10)
    oracle.apply(changes)
    # Each chunk's examples, and its changes: all that are up to its last example, and some that are later.
    cuts = sorted({0, len(asked), *data.draw(st.lists(st.integers(0, len(asked)), max_size=3))})
    left, rest = list(changes), log_of(subject, [])
    for first, last in pairwise(cuts):
        chunk = data.draw(st.permutations(asked[first:last]))
        reach = asked[last - 1][0] + data.draw(st.integers(0, 50_000))
        given_now, left = [one for one in left if one.time_ms <= reach], [one for one in left if one.time_ms > reach]
        batch = pa.Table.from_batches([rest, log_of(subject, given_now)]).combine_chunks().to_batches()
        joined = as_of_join(
            examples_of(subject, [id for _, id in chunk], [time for time, _ in chunk]), batch[0] if batch else rest, state
        )
        wanted = oracle.as_of([id for _, id in chunk], [time for time, _ in chunk])
        assert joined.examples.drop_columns(["event_time_ms", f"{subject}_id"]).to_pydict() == wanted
        rest = joined.rest
    assert state.metrics()["too_old"] == 0


NUMBER = 400
Join = Callable[[pa.RecordBatch, pa.RecordBatch], np.ndarray]
"""Examples and changes to the `views_5m` that each example gets."""


def planted(rng: np.random.Generator) -> tuple[pa.RecordBatch, pa.RecordBatch, np.ndarray]:
    """Returns examples, changes, and what may be seen of them: the counts a millisecond before each example.

    The counts at the moment of an example, and just after, are others: its label, say.
    """
    times = np.sort(rng.choice(100_000, NUMBER, replace=False)) * 100
    ids, labels, fair = rng.integers(0, 20, NUMBER), rng.integers(1, 3, NUMBER), rng.integers(11, 13, NUMBER)
    changes = []
    for id, time, label, seen in zip(ids.tolist(), times.tolist(), labels.tolist(), fair.tolist(), strict=True):
        changes.append(Change(id, 1, time - 1, (seen, 0, 0)))
        changes += [Change(id, 1, time, (label, 0, 0)), Change(id, 1, time + 1, (label, 0, 0))]
    log = log_of("video", changes)
    return examples_of("video", ids.tolist(), times.tolist()), log, fair


def check_no_leak(join: Join) -> None:
    rng = np.random.default_rng(5)
    examples, log, fair = planted(rng)
    shuffled = log.take(pa.array(rng.permutation(log.num_rows)))
    late = log.take(pa.array(np.argsort(np.arange(log.num_rows) + rng.integers(0, 200, log.num_rows))))
    for one in (log, shuffled, late):
        np.testing.assert_array_equal(join(examples, one), fair)


def walked(examples: pa.RecordBatch, log: pa.RecordBatch) -> np.ndarray:
    return as_of_join(examples, log, FeatureState("video", 20)).examples.column("video_views_5m").to_numpy()


def held(examples: pa.RecordBatch, log: pa.RecordBatch) -> np.ndarray:
    state = FeatureState("video", 20, 3 * NUMBER)
    for start in range(0, log.num_rows, 100):
        state.apply(log.slice(start, 100))
    return features_of(examples, state).column("video_views_5m").to_numpy()


def latest(examples: pa.RecordBatch, log: pa.RecordBatch) -> np.ndarray:
    """The join that most would write: the last value of each id."""
    of_id = {row["video_id"]: row["views_5m"] for row in log.to_pylist()}
    return np.array([of_id[id] for id in examples.column("video_id").to_pylist()])


def up_to_now(examples: pa.RecordBatch, log: pa.RecordBatch) -> np.ndarray:
    """One that takes time into account, but not strictly."""
    state = FeatureState("video", 20, 3 * NUMBER)
    state.apply(log)
    times = examples.column("event_time_ms").to_numpy() + 1
    return state.as_of(examples.column("video_id").to_numpy(), times, ["video_views_5m"]).column(0).to_numpy()


def as_it_lies(examples: pa.RecordBatch, log: pa.RecordBatch) -> np.ndarray:
    """One that takes a log for one in the order of time."""
    found, rows, at = [], log.to_pylist(), 0
    of_id: dict[int, int] = {}
    for example in examples.to_pylist():
        while at < len(rows) and rows[at]["event_time_ms"] < example["event_time_ms"]:
            of_id[rows[at]["video_id"]] = rows[at]["views_5m"]
            at += 1
        found.append(of_id.get(example["video_id"], 0))
    return np.array(found)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("join", (walked, held))
def test_a_planted_leak_reaches_nothing(join: Join) -> None:
    check_no_leak(join)


@pytest.mark.parametrize("join", (latest, up_to_now, as_it_lies))
def test_the_test_for_leaks_finds_the_joins_that_leak(join: Join) -> None:
    with pytest.raises(AssertionError):
        check_no_leak(join)


def test_whether_an_id_is_known_does_not_leak_either() -> None:
    log = log_of("user", [Change(1, 0, 100, ("at", "de", 1))])
    joined = as_of_join(examples_of("user", [1, 1, 1], [99, 100, 101]), log, FeatureState("user", 5)).examples
    assert joined.column("user_known").to_pylist() == [False, False, True]


def test_changes_that_set_several_groups_are_refused() -> None:
    columns = {"user_id": [1], "profile_ms": [5], "country": ["at"], "language": ["de"], "age": [3], "activity_ms": [6]}
    names = ("last_video_id", "last_author_id", "last_duration_ms", "last_tag_id")
    both = pa.record_batch(columns | {name: pa.nulls(1) for name in names})
    with pytest.raises(ValueError, match="sets several groups"):
        as_of_join(examples_of("user", [1], [7]), both, FeatureState("user", 5))


def test_logged_columns_are_replaced_and_rows_without_an_id_know_nothing() -> None:
    examples = pa.record_batch(
        {"event_time_ms": int64([5, 6]), "user_id": pa.array([None, 1], pa.int64()), "user_age": [70, 71]}
    )
    log = log_of("user", [Change(1, 0, 4, ("at", "de", 33)), Change(0, 0, 4, ("at", "de", 34))])
    state = FeatureState("user", 5)
    joined = as_of_join(examples, log, state).examples
    assert joined.equals(with_columns(examples, features_of(examples, state)))
    assert joined.column("user_age").to_pylist() == [None, 33] and joined.schema.names.count("user_age") == 1
