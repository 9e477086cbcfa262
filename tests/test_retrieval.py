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
import pyarrow as pa
import pytest
from rich.console import Console

from launch.bench import kill
from launch.export import export
from launch.identity import identity
from launch.plan import plan
from launch.run import train
from monolith_jax.experiment import Experiment, load
from monolith_jax.features import DenseFeatureConfig, IdFeatureConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.models.towers import user_vectors, video_vectors
from monolith_jax.models.two_tower import TwoTowerConfig
from monolith_jax.negatives import NegativeSampler
from monolith_jax.planner import Planned, Planner
from monolith_jax.reader import Reader
from monolith_jax.stream.batcher import batches
from monolith_jax.stream.dead_letter import DeadLetters
from monolith_jax.stream.history import History, HistoryConfig
from monolith_jax.sync.delta import DeltaFolder
from monolith_jax.tables.table import TableConfig
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.train.shapes import input_shapes
from monolith_jax.train.step import make_read, make_train_step
from monolith_jax.types import Chunk
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
        np.testing.assert_allclose(b, a, rtol=0, atol=10 * tolerance * float(np.abs(a).max()))


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


TOPICS, USERS, VIDEOS = 6, 120, 300
TASTES = TwoTowerConfig(
    user_features=("user", "history"), video_features=("video", "content"), attention=("history",), dim=16,
    user_hidden=(32,), video_hidden=(32,), num_negatives=64, pool_size=2048, frequency_size=4096,
)  # fmt: skip
OF_TASTES = (
    IdFeatureConfig("user", "user_id", "user"),
    IdFeatureConfig("video", "video_id", "video"),
    IdFeatureConfig("history", "history_video_id", "video", max_length=8, combiner="mean"),
    DenseFeatureConfig("content", "content", size=TOPICS),
)


@dataclasses.dataclass(frozen=True)
class Tastes:
    """A stream in which a user likes videos of one topic; what is shown follows no taste. The last chunks have new videos."""

    chunks: int
    new_from: int
    num_examples = None

    def read(self, position: Any) -> Any:
        shares = 1 / np.arange(1, VIDEOS + 1) ** 0.7
        for number in range(position.get("chunk", 0), self.chunks):
            rng = np.random.default_rng(number)
            user, video = rng.integers(0, USERS, 256), rng.choice(VIDEOS, 256, p=shares / shares.sum())
            video += VIDEOS * (number >= self.new_from)
            matches = user % TOPICS == video % TOPICS
            content = np.eye(TOPICS)[video % TOPICS] + 0.3 * np.random.default_rng(0).normal(size=(2 * VIDEOS, TOPICS))[video]
            columns = {
                "event_time_ms": 1000 * (256 * number + np.arange(256)), "user_id": user, "video_id": video,
                "content": pa.array(content.tolist(), pa.list_(pa.float64())),
                "like": rng.random(256) < np.where(matches, 0.6, 0.03),
                "play_time_ms": np.full(256, 5_000), "duration_ms": np.full(256, 10_000),
            }  # fmt: skip
            yield Chunk(pa.RecordBatch.from_pydict(columns), (), {"chunk": number + 1})


def of_examples(rows: Any) -> np.ndarray:
    """Returns the rows of 256 examples, which stand before 64 drawn videos in 8 blocks."""
    return np.asarray(rows).reshape(8, 40, *rows.shape[1:])[:, :32].reshape(256, *rows.shape[1:])


def test_it_learns_tastes_and_places_videos_that_were_never_seen(tmp_path: Path) -> None:
    tables = [TableConfig(name, 1000, 8, OptimizerConfig("adam", 0.01)) for name in ("user", "video")]
    small = make_small(1, None, tables, OF_TASTES, OptimizerConfig("adam", 0.003), two_tower=TASTES)
    model, state, steps = small.model, small.state, 150
    negatives = NegativeSampler(TASTES, model.layout, 256, 1, 0, 0)
    history = History(HistoryConfig(8, 500, actions=("like",)))
    source = batches(Tastes(steps + 8, steps + 4), 256)
    planner = Planner(model, [Reader(source, [history], DeadLetters(tmp_path / "d.jsonl"), 256, negatives)], small.mapper)
    step, read = make_train_step(model), make_read(model)
    ways = (user_vectors, video_vectors)
    encode = jax.jit(lambda weights, *given: [of(model.towers, weights, model.layout, *given) for of in ways])
    liked, told, seen = np.zeros(2**16), [], []
    for number, planned in enumerate(planner):
        inputs = planned.inputs
        assert inputs.retrieval is not None
        key, weight = of_examples(inputs.retrieval.key) >> 16, np.asarray(inputs.retrieval.weight)
        if number < steps:
            np.add.at(liked, key, weight)
            state, metrics = step(state, inputs)
            told.append(metrics.retrieval)
            continue
        _, vectors, valid = read(state.groups, inputs.plans)
        of_both = encode(state.weights, vectors, valid, inputs.weights, inputs.dense)
        seen.append((key, weight, *map(of_examples, of_both)))
    planner.close()
    assert sum(one.hits for one in told[-30:]) / sum(one.weight for one in told[-30:]) > 0.3
    for part, times in ((seen[:4], 1.25), (seen[4:], 2.0)):
        # Videos of the first part were learned from, those of the second were not, and popularity knows nothing of them.
        key, weight, users, videos = map(np.concatenate, zip(*part, strict=True))
        distinct, first, own = np.unique(key, return_index=True, return_inverse=True)
        mine, own = np.flatnonzero(weight), own[weight > 0]
        found = []
        for scores in (users[mine] @ videos[first].T, np.tile(liked[distinct], (mine.size, 1))):
            tied = scores + 1e-9 * np.random.default_rng(0).random(scores.shape)
            found.append(float(np.mean((tied > tied[np.arange(own.size), own][:, None]).sum(1) < 20)))
        assert distinct.size > 150 and found[0] > times * found[1] > 0, found
