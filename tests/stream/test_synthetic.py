"""The synthetic world: a pure function of its seed, with true optima, calibrated on the sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from launch.bench import world as bench
from monolith_jax.stream import world
from monolith_jax.stream.events import ACTIONS, EXAMPLE, labels
from monolith_jax.stream.synthetic import HEADS, RATES, SCHEMA, SyntheticConfig, SyntheticSource, optimal

SMALL = SyntheticConfig(seed=3, num_examples=2_500, chunk_rows=400, live_users=100, live_videos=80)


def column(examples: pa.RecordBatch, name: str) -> np.ndarray:
    return examples[name].to_numpy(zero_copy_only=False)


def indexes(examples: pa.RecordBatch, config: SyntheticConfig, space: str) -> np.ndarray:
    return world.indexes_of(config.seed, space, column(examples, f"{space}_id"))


@pytest.fixture(scope="module")
def examples() -> pa.RecordBatch:
    return bench.load(SyntheticSource(SyntheticConfig()))


def test_columns_are_those_of_an_example() -> None:
    chunk = next(SyntheticSource(SMALL).read({}))
    assert chunk.examples.schema == SCHEMA and not chunk.rejected
    for field in SCHEMA:
        if not field.name.startswith("optimal_"):
            assert field == EXAMPLE.field(field.name)
        assert chunk.examples[field.name].null_count == 0
    assert {f"optimal_{head}" for head in HEADS} <= set(SCHEMA.names)


def test_every_position_goes_on_with_the_same_chunks() -> None:
    source = SyntheticSource(SMALL)
    whole = list(source.read({}))
    assert [chunk.examples.num_rows for chunk in whole] == [400] * 6 + [100]
    assert sum(chunk.examples.num_rows for chunk in whole) == source.num_examples
    for k, before in enumerate(whole):
        position = json.loads(json.dumps(before.position))
        rest = list(SyntheticSource(SMALL).read(position))
        assert len(rest) == len(whole) - k - 1
        assert all(
            a.examples.equals(b.examples) and a.position == b.position for a, b in zip(rest, whole[k + 1 :], strict=True)
        )


def test_longer_stream_begins_with_the_shorter_one() -> None:
    longer = SyntheticConfig(seed=3, num_examples=3_000, chunk_rows=400, live_users=100, live_videos=80)
    assert bench.load(SyntheticSource(longer)).slice(0, 2_500).equals(bench.load(SyntheticSource(SMALL)))


def test_another_seed_is_another_world() -> None:
    other = SyntheticConfig(seed=4, num_examples=2_500, chunk_rows=400, live_users=100, live_videos=80)
    mine, theirs = bench.load(SyntheticSource(SMALL)), bench.load(SyntheticSource(other))
    for name in ("user_id", "video_id", "author_id", "sound_id"):
        assert not set(column(mine, name).tolist()) & set(column(theirs, name).tolist())
    assert not mine["play_time_ms"].equals(theirs["play_time_ms"])


@pytest.mark.parametrize("position", [{"chunk": -1}, {"chunk": 8}, {"chunk": 1.0}, {"offset": 3}, {"chunk": True}])
def test_foreign_position_is_refused(position: dict) -> None:
    with pytest.raises(ValueError, match="k from 0 to 7"):
        SyntheticSource(SMALL).read(position)


@pytest.mark.parametrize(
    "field",
    [
        *({"events_per_s": x} for x in (0.0, 501.0, float("nan"))),
        *({"live_users": 0}, {"drift_days": 0.0}, {"seed": -1}, {"num_examples": -1}, {"chunk_rows": 0}, {"seed": 2**63}),
    ],
)
def test_config_out_of_range_is_refused(field: dict) -> None:
    with pytest.raises(ValueError, match=f"SyntheticConfig.{next(iter(field))} must be"):
        SyntheticConfig(**field)


@pytest.mark.parametrize("events_per_s", [0.01, 1.0, 500.0])
@pytest.mark.parametrize("start_ms", [1_767_225_600_000, 1_767_225_600_000 + 45_678_901])
def test_times_are_strictly_increasing_and_keep_the_rate(events_per_s: float, start_ms: int) -> None:
    config = SyntheticConfig(num_examples=30_000, chunk_rows=1_000, events_per_s=events_per_s, start_ms=start_ms)
    rng = np.random.default_rng(0)
    near = world.event_times(config, np.arange(30_000), rng.random(30_000))
    far = world.event_times(config, 10**9 + np.arange(30_000), rng.random(30_000))
    assert (np.diff(near) > 0).all() and (np.diff(far) > 0).all()
    assert near[0] >= start_ms
    assert (far[0] - start_ms) / 1000 * events_per_s == pytest.approx(1e9, rel=0.01 + 86_400 * events_per_s / 1e9)
    streamed = column(bench.load(SyntheticSource(config)), "event_time_ms")
    assert (np.diff(streamed) > 0).all()


def test_ids_are_a_bijection_spread_over_64_bits() -> None:
    index = np.concatenate([np.arange(300_000), 10**15 + np.arange(1_000), [-1, 2**63 - 1]])
    everything = []
    for space in world.SPACES:
        ids = world.ids_of(7, space, index)
        assert (world.indexes_of(7, space, ids) == index).all()
        assert len(np.unique(ids)) == len(ids)
        assert np.abs(np.bincount(ids.view(np.uint64) >> np.uint64(60)) / len(ids) - 1 / 16).max() < 0.003
        assert (ids > 2**62).any() and (ids < -(2**62)).any()
        everything.append(ids)
    assert len(np.unique(np.concatenate(everything))) == len(index) * len(world.SPACES)


@pytest.mark.parametrize("head", HEADS)
def test_optimal_predictions_are_calibrated(examples: pa.RecordBatch, head: str) -> None:
    best = column(examples, f"optimal_{head}").astype(np.float64)
    values, masks = labels(examples, [head])
    assert masks.all() and np.isfinite(best).all()
    assert head == "play_ratio" or (best.min() >= 0 and best.max() <= 1)
    label = values[:, 0].astype(np.float64)
    error = label - best
    # Bins by the prediction, and by things that the prediction must have taken into account.
    hour = column(examples, "event_time_ms") // 3_600_000 % 24
    seconds = np.minimum(column(examples, "duration_ms") // 6_000, 20)
    by_prediction = np.digitize(best, np.quantile(best, np.linspace(0, 1, 11)[1:-1]))
    for bins in (by_prediction, hour, seconds):
        for one in np.unique(bins):
            of_bin = error[bins == one]
            variance = (best * (1 - best))[bins == one].sum() if head != "play_ratio" else (of_bin**2).sum()
            assert abs(of_bin.sum()) < 4.5 * np.sqrt(variance) + 1, (head, one)


def test_optimum_has_the_signal_that_it_should(examples: pa.RecordBatch) -> None:
    found = bench.optimum(examples)
    assert 0.76 < found["complete"]["AUC"] < 0.82 and 0.76 < found["like"]["AUC"] < 0.82
    for action in ACTIONS:
        assert found[action]["mean"] == pytest.approx(RATES[action], rel=0.25)
        assert found[action]["log-loss"] < 0.97 * found[action]["entropy"]


def test_optimal_of_any_pair_is_that_of_the_stream(examples: pa.RecordBatch) -> None:
    config, some = SyntheticConfig(), examples.slice(0, 3_000)
    again = optimal(config, column(some, "event_time_ms"), indexes(some, config, "user"), indexes(some, config, "video"))
    for head in HEADS:
        np.testing.assert_allclose(again[head], column(some, f"optimal_{head}"), rtol=1e-5)


def test_outcomes_fit_together(examples: pa.RecordBatch) -> None:
    assert (column(examples, "dwell_ms") >= column(examples, "play_time_ms")).all()
    assert (column(examples, "play_time_ms") >= 0).all() and (column(examples, "duration_ms") >= 3_000).all()
    tags = examples["tag_id"]
    lengths = np.diff(tags.offsets.to_numpy())
    assert set(lengths.tolist()) == {1, 2, 3}
    assert len(np.unique(tags.values.to_numpy())) <= world.NUM_TAGS
    pairs = np.stack([column(examples, "video_id"), column(examples, "author_id"), column(examples, "duration_ms")])
    assert np.unique(pairs, axis=1).shape[1] == len(np.unique(column(examples, "video_id"))), "a video keeps its traits"


def test_tastes_drift() -> None:
    config = SyntheticConfig()
    users = np.arange(2_000)
    start, hour_later, day_10, turn_later = (
        world.taste(config, users, np.full(2_000, config.start_ms + int(days * world.DAY_MS)))
        for days in (0, 1 / 24, 10, 2 * config.drift_days)
    )

    def likeness(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    assert likeness(start, hour_later) > 0.999
    assert 0.2 < likeness(start, day_10) < 0.8
    assert abs(likeness(start, turn_later)) < 0.05
    assert start.std() == pytest.approx(1, abs=0.03) and day_10.std() == pytest.approx(1, abs=0.03)


def test_new_users_and_videos_keep_arriving_and_old_ones_fade() -> None:
    config = SyntheticConfig(num_examples=200_000, events_per_s=0.1)  # 23 days: a video lives for 8.3, a user for 20
    examples = bench.load(SyntheticSource(config))
    day = (column(examples, "event_time_ms") - config.start_ms) // world.DAY_MS
    for space, live in (("user", config.live_users), ("video", config.live_videos)):
        index = indexes(examples, config, space)
        newest = world.newest(config, space, column(examples, "event_time_ms"))
        assert index.min() >= 0 and (index <= newest).all() and (index > newest - live).all()
        assert newest[-1] > 1.9 * live
        assert all((index[day == d] > newest[day == d - 1].max()).any() for d in range(1, 23)), "some newcomers every day"
    videos = indexes(examples, config, "video")
    of_first_day = np.array([np.mean(videos[day == d] < config.live_videos) for d in range(22)])
    assert of_first_day[0] > 0.7 and of_first_day[4] < 0.5 and (of_first_day[9:] == 0).all()


def test_a_world_without_arrivals_stands_still() -> None:
    config = SyntheticConfig(num_examples=4_096, users_per_day=0, videos_per_day=0, drift_days=float("inf"), events_per_s=0.001)
    examples = bench.load(SyntheticSource(config))
    assert indexes(examples, config, "user").max() < config.live_users
    assert indexes(examples, config, "video").max() < config.live_videos
    users, far = np.arange(50), config.start_ms + 10**6 * world.DAY_MS
    np.testing.assert_array_equal(
        world.taste(config, users, np.full(50, config.start_ms)), world.taste(config, users, np.full(50, far))
    )


def test_ids_carry_signal_short_of_the_optimum(examples: pa.RecordBatch) -> None:
    """Means by user and by video, learned on the first 80 %, are well above chance and clearly below the best."""
    cut = int(0.8 * examples.num_rows)
    label = labels(examples, ["complete"])[0][:, 0]
    score = np.zeros(examples.num_rows)
    for name in ("user_id", "video_id"):
        of = np.unique(column(examples, name), return_inverse=True)[1]
        mean = (np.bincount(of[:cut], label[:cut], of.max() + 1) + 10) / (np.bincount(of[:cut], minlength=of.max() + 1) + 30)
        score += np.log(mean / (1 - mean))[of]
    reached = bench.metrics.auc(score[cut:], label[cut:])
    assert 0.62 < reached < bench.metrics.auc(column(examples, "optimal_complete")[cut:], label[cut:]) - 0.05


def test_world_is_calibrated_on_the_sample(data_folder: Path) -> None:
    columns = bench.compare(data_folder / "kuairand27k_slice", seed=0)
    ours, sample = columns["as sampled"], columns["sample"]
    for name, value in sample.items():
        if name.startswith("share of") or name.startswith("activity"):
            assert ours[name] == pytest.approx(value, abs=0.1 if name.startswith("activity") else 0.04), name
        else:
            assert ours[name] == pytest.approx(value, rel=0.25), name


def test_bench_prints_a_table_and_one_json_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "THINNING", 2)
    bench.main(["--examples", "20000"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["examples_per_s"] > 0 and set(result["optimum"]) == set(HEADS)
    assert any(line.startswith("share of top 10% videos") for line in lines)
