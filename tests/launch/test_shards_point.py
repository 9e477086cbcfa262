"""Algorithm 1 with served copies of several ages: each against what it has to be, by another way."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.points.first_and_rest import FirstAndRest, sizes
from launch.points.judged import Judged, less, mean_of, with_mean
from launch.points.measured import Base, Measured
from launch.points.shards import ShardsPoint, run, shard_of
from launch.points.training import check_experiment
from launch.readers import make_readers
from launch.run import assemble
from monolith_jax.evaluate import metrics
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.planner import Planner
from monolith_jax.reader import Observed
from monolith_jax.train.loop import predict
from monolith_jax.train.step import make_predict_step, make_train_step
from tests.small_model import SmallSource

TINY = (
    *("SyntheticConfig.live_users = 50", "SyntheticConfig.live_videos = 60", "SyntheticConfig.num_examples = 1216"),
    *("SyntheticConfig.videos_per_day = 4000.0", "SyntheticConfig.users_per_day = 4000.0"),
    *("HistoryConfig.max_users = 500", "TableConfig.dim = 8", "rows/OptimizerConfig.learning_rate = 0.05"),
    *(f"{table}/TableConfig.max_rows = 2000" for table in ("user", "video", "author", "sound", "user_author")),
    *("MMoEConfig.num_experts = 2", "MMoEConfig.expert_hidden = (16,)", "MMoEConfig.tower_hidden = (8,)"),
    *("TrainConfig.batch_size = 64", "PrequentialConfig.period_s = 600.0"),
    *("Experiment.mesh = @MeshConfig()", "MeshConfig.num_devices = 1", "MeshConfig.cpu_devices = 8"),
    "MeshConfig.num_shards = 8",
)
STEPS, FIRST = 19, 10
FROM_ZERO = "TableConfig.init_scale = 0.0"
"""New ids read what they read as served: nothing."""


def base(*more: str) -> Base:
    return Base(("configs/quickstart.gin",), (*TINY, *more), 0)


def values(found: list[Measured], metric: str) -> dict[str, float]:
    return {one.head: one.value for one in found if one.metric == metric and not one.along}


def by_hand(online: bool, *more: str) -> dict[str, float]:
    """Returns the AUC over the same rest of test-then-train, or of frozen tables, by the means of `launch.run`."""
    experiment = base(*more).load()
    parts, judged = assemble(experiment), Judged(experiment.heads)

    def planner(**how: Any) -> Planner:
        readers = make_readers(experiment, experiment.source, range(1), parts.memories, Path())
        return Planner(parts.model, readers, parts.mapper, **how)

    first = planner(max_steps=STEPS if online else FIRST)
    train, state = make_train_step(parts.model), parts.state
    for number, planned in enumerate(first):
        state, told = train(state, planned.inputs)
        if number >= FIRST:
            judged.add(planned.observed, {"it": np.asarray(told.scores)})
    if not online:
        rest = planner(insert=False)
        assert first.frozen_at_end
        rest.set_state(first.frozen_at_end)
        predict(state, rest, make_predict_step(parts.model), lambda seen, scores: judged.add(seen, {"it": scores}))
        rest.close()
    first.close()
    assert len(judged) == STEPS - FIRST
    return judged.auc("it")


def assert_same(found: dict[str, float], wanted: dict[str, float], within: float = 0.0) -> None:
    assert {head for head, value in wanted.items() if not math.isnan(value)} >= {"complete", "skip", "like"}
    for head, value in wanted.items():
        assert found[head] == pytest.approx(value, abs=within, nan_ok=True), head


def test_a_shard_a_step_is_test_then_train_and_batch_is_frozen(tmp_path: Path) -> None:
    point = ShardsPoint(FIRST / STEPS, shards=(3, STEPS - FIRST), format="float32")
    found = run(point, base(FROM_ZERO), tmp_path)
    online, frozen = by_hand(True, FROM_ZERO), by_hand(False, FROM_ZERO)
    assert_same(values(found, "auc_9"), online)
    assert_same(values(found, "auc_batch"), frozen)
    assert_same(values(found, "auc_deltas"), online, 1e-6)
    assert values(found, "auc_3")["mean"] != values(found, "auc_9")["mean"]
    assert_same(values(found, "gain_9"), with_mean(less(online, frozen)))
    assert values(found, "versions")[""] == STEPS - FIRST + 1
    assert values(found, "steps")[""] == STEPS - FIRST
    # An impression comes each second, about: eight steps later, in three parts.
    assert values(found, "hours_3")[""] == pytest.approx(8 * 64 / 3600 / 3, rel=0.3)
    assert not (tmp_path / "deltas").exists()
    curve = {one.at: one.value for one in found if (one.metric, one.head, one.along) == ("auc_batch", "complete", "shard")}
    assert list(curve) == [0, 1, 2]
    assert values(found, "shard_auc_batch_3")["complete"] == pytest.approx(sum(curve.values()) / 3)
    assert values(found, "auc_best")["complete"] > 0.6


def test_the_served_model_scores_as_the_newest_copy_where_new_ids_read_zeros(tmp_path: Path) -> None:
    point = ShardsPoint(FIRST / STEPS, 2, shards=(STEPS - FIRST,), format="float32")
    found = run(point, base(), tmp_path)
    assert_same(values(found, "auc_deltas"), values(found, "auc_9"), 1e-6)
    assert values(found, "gain_9")["mean"] != 0
    # Over again in the same folder, without deltas and with rare ones: what the copies give does not depend on them.
    again = run(ShardsPoint(FIRST / STEPS, 2, (STEPS - FIRST,), deltas=False), base(), tmp_path)
    assert values(again, "auc_9") == pytest.approx(values(found, "auc_9"), abs=0, nan_ok=True)
    assert not values(again, "auc_deltas") and not values(again, "versions")
    rare = run(ShardsPoint(FIRST / STEPS, 2, (STEPS - FIRST,), period_s=1e6, format="float32"), base(), tmp_path)
    assert values(rare, "versions")[""] == 1
    assert_same(values(rare, "auc_deltas"), values(found, "auc_batch"), 1e-6)


def test_shards_differ_by_a_step_at_most() -> None:
    for steps, number in ((9, 9), (10, 3), (159, 100), (7, 1)):
        of_steps = [shard_of(step, steps, number) for step in range(steps)]
        sizes_of = np.bincount(of_steps)
        assert of_steps == sorted(of_steps) and sizes_of.size == number
        assert sizes_of.max() - sizes_of.min() <= 1


def test_no_batch_has_examples_of_both_parts() -> None:
    source = SmallSource(num_chunks=5, chunk_rows=10)
    assert sizes(source, 0.5, 2, 8) == (25, 8, 4)
    chunks = list(FirstAndRest(source, 25, 2).read({}))
    assert [(one.examples.num_rows, one.epoch, one.ends_batch) for one in chunks] == [
        *((10, 0, False), (10, 0, False), (5, 0, False)),
        *((10, 1, False), (10, 1, False), (5, 1, True), (5, 1, False), (10, 1, False), (10, 1, False)),
    ]
    whole, last = [one.examples for one in source.read({})], [one.examples for one in chunks[3:]]
    users = [[user for one in part for user in one.column("user_id").to_pylist()] for part in (whole, last)]
    assert users[0] == users[1]
    assert [one.ends_batch for one in FirstAndRest(source, 20, 1).read({})] == [False, True, False, False, False]
    with pytest.raises(ValueError, match="several passes"):
        sizes(SmallSource(epochs=2), 0.5, 1, 8)
    with pytest.raises(ValueError, match="leaves 0 and 50"):
        sizes(source, 0.001, 1, 8)
    with pytest.raises(ValueError, match="from its start"):
        list(FirstAndRest(source, 25, 2).read({"pass": 1}))


def test_models_are_judged_on_the_same_examples() -> None:
    rng = np.random.default_rng(0)
    heads = (HeadConfig("play_ratio", "regression"), HeadConfig("like"), HeadConfig("share"))
    judged, labels, masks = Judged(heads), [], []
    for _ in range(3):
        label, mask = (rng.random((20, 3)) < 0.4).astype(np.float32), (rng.random((20, 3)) < 0.8).astype(np.float32)
        label[:, 2] = 0
        labels.append(label)
        masks.append(mask)
        scores = {"one": label * 0.2 + rng.random((20, 3)).astype(np.float32) * 0.5}
        judged.add(Observed(np.zeros(20, np.int64), np.zeros(20, np.int64), label, mask, None), scores)
    assert judged.models == ("one",) and len(judged) == 3
    found = judged.auc("one", [1, 2])
    there = np.concatenate(masks[1:])[:, 1] > 0
    scores = np.concatenate([step.scores["one"] for step in judged._steps[1:]])[there, 1]
    assert found["like"] == metrics.auc(scores, np.concatenate(labels[1:])[there, 1])
    assert math.isnan(found["share"]) and list(found) == ["like", "share"]
    assert with_mean(found)["mean"] == found["like"] and math.isnan(mean_of({"a": math.nan}))


@pytest.mark.parametrize(
    ("fields", "more", "words"),
    [
        ({"first": 1.0}, (), "ShardsPoint.first"),
        ({"passes": 0}, (), "ShardsPoint.passes"),
        ({"shards": (3, 3)}, (), "ShardsPoint.shards"),
        ({"period_s": -1.0}, (), "ShardsPoint.period_s"),
        ({"shards": (100,)}, (), "a shard needs one at least"),
        ({}, ("TrainConfig.steps = 5",), "TrainConfig.steps to 0"),
        ({}, ("TrainConfig.partitions = 2",), "TrainConfig.partitions to 1"),
        ({}, ("video/TableConfig.ttl_s = 60",), "TableConfig.ttl_s of video"),
        ({}, ("video/TableConfig.memory = 'tiered'", "video/TableConfig.device_rows = 500"), "TableConfig.memory of video"),
        ({"format": "float8"}, (), "float8"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(fields: dict[str, Any], more: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run(ShardsPoint(**{"shards": (3,), **fields}), base(*more), tmp_path)


def test_what_has_no_ranker_is_refused() -> None:
    experiment = base().load()
    with pytest.raises(ValueError, match="kind 'binary'"):
        check_experiment(dataclasses.replace(experiment, heads=experiment.heads[-1:]), "ShardsPoint")
    with pytest.raises(ValueError, match=r"Experiment\.retrieval"):
        check_experiment(
            dataclasses.replace(experiment, retrieval=TwoTowerConfig(user_features=(), video_features=())), "ShardsPoint"
        )
