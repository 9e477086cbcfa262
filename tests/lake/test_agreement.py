import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.lake.agreement import Agreement
from monolith_jax.lake.as_of import as_of_join, features_of, with_columns
from monolith_jax.lake.tables import GROUPS, Subject, features_log_schema, key_of
from monolith_jax.lake.versions import FeatureState
from monolith_jax.serve.feature_cache import FeatureCache, FeatureCacheConfig
from tests.lake.feature_oracle import Change, int64, log_of

CHANGES = [
    Change(1, 0, 10, (7, None, [1, 2], 3000, 0.5)),
    Change(1, 1, 20, (5, 1, 0)),
    Change(2, 1, 20, (6, 1, 0)),
    Change(1, 1, 40, (8, 1, 0)),
]


def logged(cache: FeatureCache, ids: list[int], time_ms: int) -> pa.RecordBatch:
    """Returns impressions as a server logs them."""
    impressions = pa.record_batch({"event_time_ms": int64([time_ms] * len(ids)), "video_id": int64(ids)})
    return with_columns(impressions, cache.videos(int64(ids), time_ms))


def served(changes: list[Change]) -> FeatureCache:
    cache = FeatureCache(FeatureCacheConfig(10, 10))
    cache.observe("video", log_of("video", changes))
    return cache


def state_of(changes: list[Change], versions: int = 4) -> FeatureState:
    state = FeatureState("video", 10, versions)
    state.apply(log_of("video", changes))
    return state


def counts(agreement: Agreement) -> tuple[int, ...]:
    return tuple(agreement.counts.values())


def test_what_was_served_is_what_was_there() -> None:
    agreement = Agreement("video")
    for time_ms in (5, 10, 11, 30, 50, 100_000):
        agreement.check(logged(served(CHANGES), [1, 2, 3], time_ms), state_of(CHANGES))
    assert counts(agreement) == (6 * 3 * 4, 0, 0, 0) and not agreement.mismatches
    assert agreement.metrics()["video_checked"] == 72


@pytest.mark.usefixtures("at_once")
def test_a_change_that_the_server_had_not_seen_is_no_mismatch() -> None:
    agreement = Agreement("video")
    agreement.check(logged(served(CHANGES[:2]), [1, 2, 3], 50), state_of(CHANGES))
    assert counts(agreement) == (12, 0, 2, 0), "the counts of 1 are newer, and those of 2 are there"


@pytest.mark.usefixtures("at_once")
def test_a_version_that_only_the_server_has_is_unknown() -> None:
    agreement = Agreement("video")
    impressions = logged(served(CHANGES[:3]), [1, 2, 3], 30)
    agreement.check(impressions, state_of(CHANGES[:1]))
    assert counts(agreement) == (12, 0, 0, 2), "it has not come"
    agreement.check(impressions, state_of(CHANGES, 1))
    assert counts(agreement) == (24, 0, 0, 3), "it was pushed out"
    stale = logged(served(CHANGES[:3]), [1], 100_000)
    agreement.check(stale, state_of([*CHANGES[:3], Change(1, 1, 100_000, (1, 1, 1))], 1))
    assert counts(agreement) == (28, 0, 0, 4), "it is stale here and pushed out there"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("video_views_5m", pa.array([8, 7, 0])),
        ("video_likes_5m", pa.array([0, None, 0])),
        ("video_quality", pa.array([-0.5, None, None])),
        ("video_tag_id", pa.array([[1, 3], None, None], pa.list_(pa.int64()))),
        ("video_tag_id", pa.array([[1], None, None], pa.list_(pa.int64()))),
        ("video_sound_id", pa.array([0, None, None])),
        ("video_author_id", pa.array([7, 1, None])),
        ("video_views_1d", pa.array([0, 0, None], pa.int64())),
    ],
)
def test_a_value_that_differs_is_a_mismatch_and_is_kept(column: str, values: pa.Array) -> None:
    agreement, impressions = Agreement("video", kept=1), logged(served(CHANGES), [1, 2, 3], 50)
    wrong = impressions.set_column(impressions.schema.names.index(column), column, values)
    for _ in range(3):
        agreement.check(wrong, state_of(CHANGES))
    assert counts(agreement) == (36, 3, 0, 0)
    (kept,) = agreement.mismatches
    assert kept.column == column and kept.time_ms == 50 and kept.logged != kept.found
    assert kept.found == impressions.column(column)[kept.id - 1].as_py() and kept.logged == values[kept.id - 1].as_py()


@pytest.mark.usefixtures("at_once")
def test_only_what_is_logged_is_compared() -> None:
    agreement = Agreement("video")
    impressions = logged(served(CHANGES), [1, 2, 3], 50)
    agreement.check(impressions.select(["event_time_ms", "video_id"]), state_of(CHANGES))
    assert counts(agreement) == (0, 0, 0, 0)
    few = ["event_time_ms", "video_id", "video_views_5m", "video_counts_5m_ms"]
    agreement.check(impressions.select(few), state_of(CHANGES))
    assert counts(agreement) == (3, 0, 0, 0)
    # All was null, and the log left the times out: the server had seen nothing.
    agreement.check(logged(served([]), [1, 2, 3], 50).select(few[:-1]), state_of(CHANGES))
    assert counts(agreement) == (6, 0, 2, 0)
    with pytest.raises(ValueError, match="'video_views_5m' is string, expected int64"):
        agreement.check(impressions.select(few).set_column(2, few[2], pa.array(["x", "y", "z"])), state_of(CHANGES))


def random_log(subject: Subject, number: int, rng: np.random.Generator) -> pa.RecordBatch:
    """Returns changes of 500 ids in the order of time, one every 3 ms."""
    times, of = np.arange(number) * 3, rng.integers(0, len(GROUPS[subject]), number)
    columns = {"event_time_ms": pa.array(times), key_of(subject): pa.array(rng.integers(0, 500, number))}
    for at, group in enumerate(GROUPS[subject]):
        other = of != at
        columns[group.time_column] = pa.array(times, mask=other)
        for name, kind in group.columns:
            null = other | (rng.random(number) < 0.1)
            if pa.types.is_list(kind):
                ends = np.cumsum(np.where(null, 0, rng.integers(0, 4, number)))
                items = pa.array(rng.integers(-(2**62), 2**62, ends[-1]))
                offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
                columns[name] = pa.ListArray.from_arrays(offsets, items, mask=pa.array(null))
            elif pa.types.is_string(kind):
                columns[name] = pa.array(rng.choice(["at", "ch", "de", ""], number), mask=null)
            else:
                columns[name] = pa.array(rng.integers(0, 1000, number), mask=null).cast(kind)
    columns["day"] = pa.array(["2026-11-28"] * number)
    schema = features_log_schema(subject)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("blocks", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_server_online_and_history_agree(blocks: int) -> None:
    # 100 blocks: a million lookups of rows.
    rng, size = np.random.default_rng(0), 10_000
    checked = 0
    for subject in ("user", "video"):
        log = random_log(subject, blocks * 2000, rng)
        cache = FeatureCache(FeatureCacheConfig(500, 500))
        online, history = FeatureState(subject, 500, 16), FeatureState(subject, 500)
        agreement = Agreement(subject), Agreement(subject)
        for block in range(blocks):
            changes = log.slice(block * 2000, 2000)
            cache.observe(subject, changes)
            # All that the server knows is before now, and it answers as of now.
            now_ms = int(changes.column("event_time_ms")[-1].as_py()) + 1
            ids = rng.integers(0, 520, size // 2)
            impressions = pa.record_batch({"event_time_ms": np.full(ids.size, now_ms), key_of(subject): ids})
            found = cache.videos(ids, now_ms) if subject == "video" else None
            if found is None:
                rows = [cache.user(id, now_ms) for id in ids[:200].tolist()]
                impressions, found = impressions.slice(0, 200), pa.Table.from_batches(rows).combine_chunks().to_batches()[0]
            was = with_columns(impressions, found)
            # The changelog runs ahead of the examples.
            online.apply(log.slice((block + 1) * 2000, 1000) if block else log.slice(0, 3000))
            agreement[0].compare(was, features_of(was, online))
            online.apply(log.slice((block + 1) * 2000 + 1000, 1000))
            # Of what is given too early nothing is taken in.
            joined = as_of_join(was, log.slice(block * 2000, 2100), history)
            assert joined.rest.num_rows == (100 if block + 1 < blocks else 0)
            agreement[1].compare(was, joined.examples)
        for one in agreement:
            assert one.counts["checked"] > 0 and not any(one.counts[name] for name in ("mismatched", "behind", "unknown"))
            checked += one.counts["checked"]
    assert checked >= blocks * size * 4
