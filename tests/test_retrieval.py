"""Two-tower training as a whole: on one device and eight, alone and beside a ranker, stopped and continued; it learns."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from launch.bench import kill
from launch.export import export
from launch.plan import plan
from launch.readers import make_readers
from launch.run import assemble, identity, train
from monolith_jax.experiment import Experiment, load
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.models.towers import user_vectors, video_vectors
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.negatives import NegativeSampler
from monolith_jax.planner import Planned, Planner
from monolith_jax.reader import Reader
from monolith_jax.stream.batcher import batches
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.sync.delta import DeltaFolder
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.train.shapes import input_shapes
from monolith_jax.train.step import make_read, make_train_step
from tests.small_model import SmallSource, make_small
from tests.test_flow import SMALL, compile_cache, rows

__all__ = ["compile_cache"]  # A fixture, for all tests of this module.

ROOT = Path(__file__).parent.parent
SIZES = (
    *("TwoTowerConfig.dim = 8", "TwoTowerConfig.user_hidden = (16,)", "TwoTowerConfig.video_hidden = ()"),
    *("TwoTowerConfig.num_negatives = 32", "TwoTowerConfig.pool_size = 256", "TwoTowerConfig.frequency_size = 1024"),
)
TWO_TOWER = TwoTowerConfig(
    user_features=("user", "seen", "pinned", "age"),
    video_features=("last", "tag", "rare_tag"),
    video_column="last",
    attention=("seen",),
    dim=8,
    user_hidden=(16, 8),
    video_hidden=(8, 4),
    num_negatives=16,
    pool_size=64,
    frequency_size=256,
    temperature=0.3,
)
ADAGRAD = OptimizerConfig("adagrad", 0.05)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def planner_of(
    folder: Path, num_devices: int = 1, partitions: int = 1, two_tower: TwoTowerConfig = TWO_TOWER, **options: Any
) -> tuple[Any, Planner]:
    """Returns a small model of both kinds and its planner, 32 examples and M drawn videos a step."""
    config = MMoEConfig(2, (16, 8), (4,))
    small, size = make_small(num_devices, config, dense_optimizer=ADAGRAD, two_tower=two_tower, **options), 32 // partitions
    readers = []
    for index in range(partitions):
        negatives = NegativeSampler(two_tower, small.model.layout, 32, partitions, index, 0)
        source, letters = SmallSource(12, size, epochs=2), DeadLetters(folder / f"{index}.jsonl")
        readers.append(Reader(batches(source, size), (), letters, size, negatives))
    return small, Planner(small.model, readers, small.mapper)


def plans_of(folder: Path, **options: Any) -> tuple[Any, list[Planned]]:
    small, planner = planner_of(folder, **options)
    plans = list(planner)
    planner.close()
    return small, plans


def learned(folder: Path, num_devices: int, **options: Any) -> tuple[list[Any], Any]:
    """Returns the metrics of 24 steps and the state after them."""
    small, plans = plans_of(folder, num_devices=num_devices, **options)
    step, state, told = make_train_step(small.model), small.state, []
    for one in plans:
        state, metrics = step(state, one.inputs)
        told.append(jax.device_get(metrics))
    return told, jax.device_get(state)


def assert_near(one: Any, other: Any, tolerance: float) -> None:
    (told, state), (other_told, other_state) = one, other
    # The second pass over the data is known better than the first, of 12 steps.
    means = [
        sum(one.retrieval.loss for one in part) / sum(one.retrieval.weight for one in part) for part in (told[:12], told[12:])
    ]
    assert means[1] < means[0]
    for a, b in zip(told, other_told, strict=True):
        np.testing.assert_allclose(b.loss, a.loss, rtol=tolerance)
        np.testing.assert_allclose(b.retrieval.loss, a.retrieval.loss, rtol=tolerance)
        assert a.retrieval.weight == pytest.approx(b.retrieval.weight)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * max(float(np.abs(a).max()), 1e-30))


def test_one_device_equals_eight(tmp_path: Path) -> None:
    one = learned(tmp_path / "1", 1, partitions=2)
    assert_near(one, learned(tmp_path / "8", 8, partitions=2), 2e-5)


def in_float64() -> dict[str, float]:
    """Returns how far eight devices are from one, by model parallelism; for a process with float64."""
    folder, found = Path("unused"), {}
    one = learned(folder, 1)
    for model_parallel in (1, 2):
        other = learned(folder, 8, model_parallel=model_parallel)
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        found[str(model_parallel)] = max(
            float(np.max(np.abs(np.asarray(a) - b)) / max(np.max(np.abs(a)), 1e-300)) for a, b in pairs
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(one[1])} == {np.dtype(np.float64), np.dtype(np.int32)}
    return found


@pytest.mark.slow
def test_float64_learns_the_same_on_one_device_and_eight() -> None:
    program = (
        "import json, jax; jax.config.update('jax_enable_x64', True); jax.config.update('jax_num_cpu_devices', 8);"
        "from tests.test_retrieval import in_float64; print(json.dumps(in_float64()))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 and max(found.values()) < 1e-9, found


def test_the_ranker_learns_the_same_beside_a_two_tower_without_weight(tmp_path: Path) -> None:
    weightless = dataclasses.replace(TWO_TOWER, loss_weight=0.0)
    small, plans = plans_of(tmp_path, two_tower=weightless)
    alone = make_small(1, MMoEConfig(2, (16, 8), (4,)), dense_optimizer=ADAGRAD)
    step, state = make_train_step(small.model), small.state
    other_step, other = make_train_step(alone.model), alone.state
    for number, one in enumerate(plans[:6]):
        state, metrics = step(state, one.inputs)
        inputs, _, _ = alone.inputs_of(next(iter(SmallSource(12, 32).read({"chunk": number}))).examples)
        other, expected = other_step(other, inputs)
        assert metrics.scores.shape == (32, 2)
        np.testing.assert_allclose(metrics.scores, expected.scores, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    for name, weight in other.weights.items():
        for a, b in zip(jax.tree.leaves(weight), jax.tree.leaves(state.weights[name]), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6)


def test_drawn_videos_are_no_examples(tmp_path: Path) -> None:
    small, plans = plans_of(tmp_path)
    for one in plans:
        assert one.num_examples == len(one.observed.labels) == len(one.times_ms) == 32 and one.inputs.dense.shape[0] == 48
    sizes = [type("Sizes", (), {"touched": g.touched.shape[1], "sent": g.sent.shape[2], "fresh": g.fresh_rows.shape[1]})()
             for g in plans[-1].plans]  # fmt: skip
    shapes = input_shapes(small.model, 32, sizes)  # pyright: ignore[reportArgumentType]
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), plans[-1].inputs)
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)


def test_a_drawn_video_does_not_keep_its_id_from_expiring(tmp_path: Path) -> None:
    small, plans = plans_of(tmp_path)
    seen_s = np.concatenate([group.maps.entries(table)[3] for group in small.mapper.groups
                             for table in range(len(group.maps.layout.names))])  # fmt: skip
    # Each chunk of the source is 1,000 s after the one before: with their time, the drawn videos would be as new as the last.
    assert plans[-1].stats["occurrences"] > 0 and np.unique(seen_s).size > 5


def experiment_of(*overrides: str, steps: int = 24, model: bool = True) -> Experiment:
    files = ["configs/quickstart.gin", "configs/models/two_tower.gin"]
    whole = load(files, [*SMALL, *SIZES, f"TrainConfig.steps = {steps}", *overrides])
    return whole if model else dataclasses.replace(whole, model=None, heads=())


def run(experiment: Experiment, workdir: Path) -> str:
    text = io.StringIO()
    train(experiment, workdir, Console(file=text, width=200))
    return text.getvalue()


@pytest.mark.parametrize(("model", "partitions"), [(True, 2), pytest.param(False, 1, marks=pytest.mark.slow)])
def test_stopped_and_continued_equals_uninterrupted(tmp_path: Path, model: bool, partitions: int) -> None:
    overrides = (f"TrainConfig.partitions = {partitions}", "TrainConfig.log_every = 2")
    run(experiment_of(*overrides, model=model), tmp_path / "whole")
    text = run(experiment_of(*overrides, steps=13, model=model), tmp_path / "parts")
    assert ("complete" in text) == model and "two-tower, before training on each batch: loss" in text
    assert "going on from the snapshot of step 13" in run(experiment_of(*overrides, model=model), tmp_path / "parts")
    assert kill.compare(tmp_path / "whole", tmp_path / "parts") == []
    (summary,), steps = rows(tmp_path / "whole", "summary"), rows(tmp_path / "whole", "step")
    assert 0 < summary["retrieval_hit10"] < 1 and len(steps) == 12
    assert summary["retrieval_loss"] == pytest.approx(np.mean([row["retrieval_loss"] for row in steps]), abs=1e-5)
    assert summary["examples"] == 24 * 64


def test_what_is_published_and_exported_has_both(tmp_path: Path) -> None:
    experiment = experiment_of("Experiment.publisher = @PublisherConfig()", "PublisherConfig.format = 'float32'", steps=10)
    run(experiment, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "served", "float32").step == 10
    for folder in (DeltaFolder(tmp_path / "run" / "deltas"), DeltaFolder(tmp_path / "served")):
        dense = folder.read(folder.versions()[-1]).dense
        assert dense is not None and {name.partition("/")[0] for name in dense} >= {"retrieval", "experts", "towers"}


@pytest.mark.slow
def test_a_ranker_warm_starts_both(tmp_path: Path) -> None:
    run(load(["configs/quickstart.gin"], [*SMALL, "TrainConfig.steps = 5"]), tmp_path / "ranker")
    text = run(experiment_of(f"TrainConfig.warm_start = '{tmp_path / 'ranker'}'", steps=2), tmp_path / "both")
    told = [line.strip() for line in text.splitlines() if line.strip().startswith("weight ")]
    assert told and all(("retrieval." in line) == ("starts anew" in line) for line in told), told


def test_identity_and_refusals(tmp_path: Path) -> None:
    alone = load(["configs/quickstart.gin"], SMALL)
    assert "retrieval" not in identity(alone) and "content_dim" not in identity(alone)["source"]
    assert identity(experiment_of())["retrieval"]["dim"] == 8
    with pytest.raises(ValueError, match=r"set Experiment\.model, Experiment\.retrieval or both"):
        run(dataclasses.replace(alone, model=None, heads=()), tmp_path)
    with pytest.raises(ValueError, match="num_negatives is 33, which 1 devices and 2 partitions cannot share evenly"):
        run(experiment_of("TwoTowerConfig.num_negatives = 33", "TrainConfig.partitions = 2"), tmp_path)
    run(alone_for(alone, 3), tmp_path / "ranker")
    with pytest.raises(ValueError, match="retrieval"):
        run(experiment_of(steps=6), tmp_path / "ranker")


def alone_for(experiment: Experiment, steps: int) -> Experiment:
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=steps))


@pytest.mark.slow
def test_the_footprint_counts_the_drawn_videos() -> None:
    both, alone = plan(experiment_of()), plan(dataclasses.replace(experiment_of(), retrieval=None))
    assert both.device.inputs > alone.device.inputs and both.host.memories > alone.host.memories
    assert both.parameters > alone.parameters


WORLD = (
    *("SyntheticConfig.live_users = 300", "SyntheticConfig.live_videos = 400", "SyntheticConfig.users_per_day = 10"),
    *("SyntheticConfig.videos_per_day = 40", "SyntheticConfig.drift_days = 1000.0", "SyntheticConfig.num_examples = 72_000"),
    *("TrainConfig.batch_size = 256", "TwoTowerConfig.num_negatives = 64", "TwoTowerConfig.pool_size = 1024"),
    *("TableConfig.dim = 8", "TwoTowerConfig.dim = 16", "TwoTowerConfig.positives = ('like',)", "Experiment.publisher = None"),
    *("TwoTowerConfig.positive_weights = (1.0,)", "TwoTowerConfig.user_hidden = (32,)", "TwoTowerConfig.video_hidden = (32,)"),
    *(
        "Experiment.mesh = @MeshConfig()",
        "MeshConfig.num_devices = 1",
        "MeshConfig.num_shards = 8",
        "MeshConfig.cpu_devices = 8",
    ),
)


def recalls(experiment: Experiment, folder: Path, steps: int, most: int) -> dict[str, float]:
    """Returns the share of later positives whose video is among the `most` best of all videos shown there, by way to rank."""
    parts = assemble(experiment)
    readers = make_readers(experiment, experiment.source, parts.partitions, parts.memories, folder, layout=parts.model.layout)
    planner = Planner(parts.model, readers, parts.mapper)
    step, read, model, state = make_train_step(parts.model), make_read(parts.model), parts.model, parts.state
    encode = jax.jit(
        lambda *given: [of(model.towers, given[0], model.layout, *given[1:]) for of in (user_vectors, video_vectors)]
    )
    liked: dict[int, float] = {}
    seen: list[tuple[Any, Any, Any]] = []
    for number, planned in enumerate(planner):
        inputs = planned.inputs
        assert inputs.retrieval is not None
        key, weight = np.asarray(inputs.retrieval.key), np.asarray(inputs.retrieval.weight)
        if number < steps:
            for one, of_one in zip(key.tolist(), weight.tolist(), strict=False):
                liked[one] = liked.get(one, 0.0) + of_one
            state, _ = step(state, inputs)
            continue
        _, vectors, valid = read(state.groups, inputs.plans)
        seen.append((key, weight, encode(state.weights, vectors, valid, inputs.weights, inputs.dense)))
    planner.close()
    keys, first = np.unique(np.concatenate([key for key, _, _ in seen]), return_index=True)
    videos = np.concatenate([of_both[1] for _, _, of_both in seen])[first]
    users = np.concatenate([of_both[0][: weight.size][weight > 0] for _, weight, of_both in seen])
    own = np.searchsorted(keys, np.concatenate([key[: weight.size][weight > 0] for key, weight, _ in seen]))
    popular = np.array([liked.get(int(key), 0.0) for key in keys])
    assert own.size > 200 and keys.size > 200
    ways = {"two-tower": users @ videos.T, "popular": np.tile(popular, (own.size, 1))}
    mine = np.arange(own.size)
    return {name: float(np.mean((scores > scores[mine, own][:, None]).sum(1) < most)) for name, scores in ways.items()}


def test_it_finds_more_of_what_a_user_watches_than_popularity(tmp_path: Path) -> None:
    experiment = dataclasses.replace(load(["configs/for_you.gin"], WORLD), model=None, heads=())
    found = recalls(experiment, tmp_path, 240, 20)
    assert found["two-tower"] > 1.1 * found["popular"] > 0.05, found
