"""What is served is what was trained: vectors, scores, deletions, versions; and what is damaged is not served."""

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.features import featurize
from monolith_jax.models.dcn import DCNConfig
from monolith_jax.models.deepfm import DeepFMConfig
from monolith_jax.models.fm import FMConfig, LinearConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.models.shared_bottom import SharedBottomConfig
from monolith_jax.models.towers import ModelConfig
from monolith_jax.sync.delta import Version
from monolith_jax.tables.table import TableConfig
from monolith_jax.train.state import Inputs, place_inputs
from monolith_jax.train.step import make_predict_step, make_train_step
from tests.serve.published import Log, trained_rows, trained_weights
from tests.small_model import SGD, TABLES, Small, make_examples, make_small

BOUNDS = {"float32": (0.0, 0.0), "float16": (2.0**-11, 2.0**-25), "int8": (0.0, 1 / 254)}
"""Error of a value: relative to it, and absolute (float16) or relative to the largest of its row (int8)."""
CONFIGS: dict[str, ModelConfig] = {"deepfm": DeepFMConfig(hidden=(8, 8)), "mmoe": MMoEConfig(), "dcn": DCNConfig(2, 3, (8,))}
CONFIGS |= {"shared bottom": SharedBottomConfig((8,), (4,)), "fm": FMConfig(), "linear": LinearConfig()}


def logit(scores: np.ndarray) -> np.ndarray:
    """Returns logits of the scores of a binary head and one of regression."""
    scores = scores.astype(np.float64)
    return np.stack([np.log(scores[:, 0] / (1 - scores[:, 0])), np.log(np.expm1(scores[:, 1]))], 1)


def frozen_inputs(small: Small, examples: pa.RecordBatch) -> Inputs:
    """Returns inputs in which new ids get no rows, as in the trainer's test."""
    features, nothing = featurize(examples, small.model.layout), np.zeros((examples.num_rows, 2), np.float32)
    plan = small.mapper.plan(features.groups, np.full(examples.num_rows, 9_000_000), insert=False)
    return place_inputs(small.model, Inputs(plan.groups, features.weights, features.dense, nothing, nothing))


def vector(value: float, number: int = 1) -> np.ndarray:
    return np.full((number, 4), value, np.float32)


@pytest.mark.parametrize("format", BOUNDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_served_equals_trained(tmp_path: Path, name: str, format: str) -> None:
    config = CONFIGS[name]
    tables = [dataclasses.replace(table, dim=2) for table in TABLES] if name == "linear" else TABLES  # A float a head.
    small = make_small(1, config, tables)
    step, log = make_train_step(small.model), Log(tmp_path, tables, config)
    for number in range(4):
        small.state, _ = step(small.state, small.inputs_of(make_examples(32, number))[0])
        kind = "base" if number == 0 else "delta"
        log.publish(trained_rows(small), dense=trained_weights(small), kind=kind, format=format)
    served = log.serve()
    assert served.version == log.last and served.metrics()["applied_versions"] == 4
    for table, (ids, vectors) in trained_rows(small).items():
        got, found = served.vectors(table, ids)
        assert found.all() and ids.size
        relative, absolute = BOUNDS[format]
        scale = np.abs(vectors).max(1, keepdims=True) if format == "int8" else 1
        assert (np.abs(got - vectors) <= relative * np.abs(vectors) + absolute * scale * 1.001).all()
        assert served.metrics()["rows_of_tables"][table] == ids.size
    # Some ids are new: they have no row on either side, and none is made.
    asked = make_examples(64, 9, num_ids=80)
    scores = np.asarray(make_predict_step(small.model)(small.state, frozen_inputs(small, asked)))
    if format == "float32":
        np.testing.assert_array_equal(served.predict(asked), scores)
        few = served.predict(asked.slice(5, 11))
        np.testing.assert_allclose(logit(few), logit(scores[5:16]), atol=1e-5)
        assert served.predict(asked.slice(0, 0)).shape == (0, 2)
        many = served.predict(pa.Table.from_batches([asked] * 3).slice(0, 150).combine_chunks().to_batches()[0])
        np.testing.assert_allclose(logit(many), logit(scores[np.arange(150) % 64]), atol=1e-5)
    else:
        np.testing.assert_allclose(served.predict(asked), scores, atol=5e-3)


def test_deletions_and_an_id_that_comes_back(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.publish({"user": ([1, 2, 3], vector(1, 3)), "video": ([1], vector(7))}, kind="base")
    served = log.serve()
    log.publish({}, {"user": [2, 3, 99]})
    assert served.poll() == 1
    vectors, found = served.vectors("user", np.array([1, 2, 3]))
    assert found.tolist() == [True, False, False] and (vectors == vector(1, 3) * found[:, None]).all()
    assert served.ids("user").tolist() == [1] == served.ids("video").tolist()
    with pytest.raises(ValueError, match="there is no table 'users'"):
        served.ids("users")
    log.publish({"user": ([2], vector(5))})
    # Freed and fresh again in one period: deletion first, then the row.
    log.publish({"user": ([1], vector(6))}, {"user": [1]})
    assert served.poll() == 2
    vectors, found = served.vectors("user", np.array([1, 2, 3]))
    assert found.tolist() == [True, True, False] and vectors[:, 0].tolist() == [6, 5, 0]
    assert served.vectors("video", np.array([1, 2]))[0][:, 0].tolist() == [7, 0]
    assert served.metrics()["rows_of_tables"] == {"user": 2, "tag": 0, "video": 1}
    assert served.metrics()["applied_deleted"] == 4
    assert served.poll() == 0


def test_what_a_version_tells(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.publish({}, kind="base")
    served = log.serve(reader="one")
    log.publish({"user": ([1], vector(1))})
    served.poll()
    assert (served.version, served.step, served.event_time_ms) == (Version(1, 1), 20, 1000)
    assert served.position == [{"offset": 1}] and 0 <= served.staleness_s() < 60
    assert served.memory_bytes > 2 * sum(table.max_rows * table.dim * 4 for table in TABLES)
    assert log.folder.readers()["one"][0] == Version(1, 0)  # Where it stood when it last said so.
    served.close()
    assert not log.folder.readers() and served.vectors("user", np.array([1]))[1].all()


def test_dense_weights_have_their_own_period(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.publish({}, kind="base")
    served, asked = log.serve(), make_examples(10)
    before = served.predict(asked)
    log.publish({"user": ([1], vector(1))})
    served.poll()
    np.testing.assert_array_equal(served.predict(asked), before)
    log.publish({}, dense={name: weight + 1 for name, weight in log.dense.items()})
    served.poll()
    assert (served.predict(asked) != before).any()


def test_versions_change_whole_while_threads_read(tmp_path: Path) -> None:
    log, ids = Log(tmp_path), np.arange(400)
    log.publish({"user": (ids, vector(0, 400))}, kind="base")
    served = log.serve()
    served.watch(0.001)
    stop, torn, seen = threading.Event(), list[Any](), set[float]()

    def read() -> None:
        while not stop.is_set():
            vectors, found = served.vectors("user", ids)
            values = np.unique(vectors[found])
            # Every id is there in even versions, the first half in odd ones.
            if values.size != 1 or found.sum() != (200 if values[0] % 2 else 400):
                torn.append((values, found.sum()))
            seen.add(float(values[0]))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 41):
        mine = ids[:200] if number % 2 else ids
        log.publish({"user": (mine, vector(number, mine.size))}, {"user": ids[200:]} if number % 2 else None)
    wait_for(lambda: served.version == log.last)
    served.close()
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not torn and len(seen) > 2 and served.faults == 0
    assert served.vectors("user", ids)[0].min() == 40


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def files_of(log: Log, version: Version) -> list[Path]:
    return sorted(path for path in (log.root / version.folder).iterdir() if path.suffix != ".json")


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_what_is_damaged_is_refused_until_it_is_repaired(tmp_path: Path, how: str) -> None:
    log = Log(tmp_path)
    log.publish({"user": ([1], vector(1))}, kind="base")
    served = log.serve()
    log.publish({"user": ([1], vector(2))})
    bad = log.publish({"user": ([1, 2], vector(3, 2))})
    log.publish({"user": ([1], vector(4))})
    path = max(files_of(log, bad), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(damaged(whole)) if how == "flipped" else path.write_bytes(whole[:-9]) if how == "cut" else path.unlink()
    assert served.poll() == 1 and served.faults == 1 and path.name in served.last_fault
    assert served.poll() == 0 and served.faults == 2
    vectors, found = served.vectors("user", np.array([1, 2]))
    assert served.version == Version(1, 1) and found.tolist() == [True, False] and vectors[0, 0] == 2
    assert served.predict(make_examples(5)).shape == (5, 2)
    path.write_bytes(whole)
    assert served.poll() == 2
    assert served.vectors("user", np.array([1, 2]))[0][:, 0].tolist() == [4, 3]


def damaged(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]


def test_a_newer_base_leads_past_a_damaged_delta(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.publish({"user": ([1, 5], vector(1, 2))}, kind="base")
    served = log.serve()
    bad = log.publish({"user": ([1], vector(2))})
    for path in files_of(log, bad):
        path.write_bytes(path.read_bytes()[:-5])
    assert served.poll() == 0 and served.faults == 1
    log.publish({"user": ([1], vector(3))}, kind="base")
    served.poll()
    vectors, found = served.vectors("user", np.array([1, 5]))
    assert served.version == Version(1, 2) and found.tolist() == [True, False] and vectors[0, 0] == 3


def test_a_damaged_base_is_not_served(tmp_path: Path) -> None:
    log = Log(tmp_path)
    base = log.publish({"user": ([1], vector(1))}, kind="base")
    path = max(files_of(log, base), key=lambda path: path.stat().st_size)
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(ValueError, match=path.name):
        log.serve()


def test_no_base_and_another_model_are_told(tmp_path: Path) -> None:
    log = Log(tmp_path)
    with pytest.raises(ValueError, match="no base to serve"):
        log.serve()
    log.publish({"user": ([1], vector(1))}, kind="base")
    log.tables = tuple(dataclasses.replace(table, dim=8) for table in TABLES)
    with pytest.raises(ValueError, match=r"served are .*'user': 8"):
        log.serve()
    log.tables, log.config = TABLES, DeepFMConfig(hidden=(4,))
    with pytest.raises(ValueError, match="dense weights are of another model"):
        log.serve()
    log.config = DeepFMConfig(hidden=())
    with pytest.raises(ValueError, match="no table 'sound'"):
        log.serve().vectors("sound", np.array([1]))


@pytest.mark.parametrize("kept", [False, True], ids=["the chain was pruned", "all deltas are there"])
def test_catches_up_after_any_absence(tmp_path: Path, kept: bool) -> None:
    log, rng = Log(tmp_path), np.random.default_rng(0)
    log.publish({"user": ([0], vector(0))}, kind="base")
    served, expected = log.serve(reader="away"), {0: 0.0}
    for number in range(1, 60):
        gone = [one for one in expected if rng.random() < 0.2]
        ids = rng.choice(100, 10, replace=False).tolist()
        expected = {one: value for one, value in expected.items() if one not in gone} | dict.fromkeys(ids, float(number))
        log.publish({"user": (ids, vector(number, 10))}, {"user": gone}, log.dense)
        if number % 20 == 10:
            log.publish(
                {"user": (list(expected), np.stack([vector(v)[0] for v in expected.values()]))}, kind="base", same_state=True
            )
    if not kept:
        log.folder.prune(keep_bases=1, reader_timeout_s=0)
    served.poll()
    for reader in (served, log.serve()):
        vectors, found = reader.vectors("user", np.arange(100))
        assert {int(one): float(vectors[one, 0]) for one in np.flatnonzero(found)} == expected
        assert reader.version == log.last and reader.faults == 0


def test_a_table_without_room_is_refused_with_a_count(tmp_path: Path) -> None:
    log = Log(tmp_path, tables=(TableConfig("user", 32, 4, SGD), *TABLES[1:]))
    log.publish({"user": ([1], vector(1))}, kind="base")
    served = log.serve()
    log.publish({"user": (np.arange(2000), vector(2, 2000)), "video": ([1], vector(9))}, {"user": [1]})
    assert served.poll() == 0 and served.faults == 1
    assert "of user" in served.last_fault and "max_rows" in served.last_fault
    assert served.metrics()["refused_rows"] > 2000 - 8 * 32
    vectors, found = served.vectors("user", np.arange(3))
    assert found.tolist() == [False, True, False] and vectors[1, 0] == 1
    assert not served.vectors("video", np.array([1]))[1].any()
    log.publish({"user": ([1, 2], vector(3, 2))}, kind="base")
    served.poll()
    assert served.version == Version(1, 2) and served.vectors("user", np.arange(3))[0][:, 0].tolist() == [0, 3, 3]


def test_what_was_begun_and_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    log = Log(tmp_path, tables=(TableConfig("user", 32, 4, SGD), *TABLES[1:]))
    base = log.publish({"user": ([1, 5], vector(1, 2))}, kind="base")
    served = log.serve()
    log.publish({"user": (np.arange(2000), vector(2, 2000))}, {"user": [1]})
    assert served.poll() == 0 and served.faults == 1
    # A trainer that was started anew does without it.
    log.publish({"user": ([5], vector(3))}, version=Version(2, 0), previous=base)
    for _ in range(2):
        assert served.poll() == 1 and served.version == log.last
        vectors, found = served.vectors("user", np.arange(2000))
        assert np.flatnonzero(found).tolist() == [1, 5] and vectors[[1, 5], 0].tolist() == [1, 3]
        log.publish({})  # The other copy is read next.


def test_formats_may_change(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.publish({"user": ([1, 2], vector(1, 2))}, kind="base", format="int8")
    served = log.serve()
    log.publish({"user": ([2, 3], vector(2, 2))}, format="float16")
    log.publish({"user": ([3, 4], vector(3, 2))}, format="float32")
    assert served.poll() == 2
    np.testing.assert_allclose(served.vectors("user", np.arange(5))[0][:, 0], [0, 1, 2, 3, 3], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_sequence_of_versions_equals_a_dict(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    log, expected = Log(tmp_path_factory.mktemp("log")), dict[int, float]()
    ids = st.lists(st.integers(-3, 12), unique=True, max_size=8)
    log.publish({}, kind="base")
    served, before = log.serve(batch_sizes=(1,)), ("base", 1)
    for number in range(1, data.draw(st.integers(2, 8))):
        kind, epoch = data.draw(st.sampled_from(["delta", "delta", "base"])), data.draw(st.integers(0, 1))
        assert log.last is not None
        version = Version(log.last.epoch + epoch, log.last.sequence + 1)
        if kind == "delta":
            written, gone = data.draw(ids), data.draw(ids)
            expected = {one: value for one, value in expected.items() if one not in gone} | dict.fromkeys(written, number)
            rows = {"tag": (written, np.repeat(vector(number), len(written), 0))}
            log.publish(rows, {"tag": gone}, log.dense, version=version)
        else:
            values = np.array(list(expected.values()), np.float32)
            log.publish(
                {"tag": (list(expected), np.repeat(values[:, None], 4, 1))},
                kind="base",
                version=version,
                same_state=before == ("delta", version.epoch),
            )
        before = kind, version.epoch
        if data.draw(st.booleans()):
            served.poll()
            vectors, found = served.vectors("tag", np.arange(-5, 15))
            assert {
                one: float(row[0]) for one, row, there in zip(range(-5, 15), vectors, found, strict=True) if there
            } == expected


def test_serving_runs_no_training_code() -> None:
    code = "import sys, monolith_jax.serve.served_model as served; print(served.ServedModel.__name__); "
    code += "found = [name for name in sys.modules if name.startswith(('monolith_jax.train', 'orbax', 'grain'))]; "
    code += "assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["ServedModel"], done.stderr


def test_a_request_reads_rows_and_weights_of_one_version(tmp_path: Path) -> None:
    log, asked = Log(tmp_path), make_examples(40)
    ids = np.arange(60) * 7919 - 100

    def publish(number: int, kind: str) -> None:
        # First-order weights grow as the head's share of them falls: their product stays, if both are of one version.
        rows = np.zeros((60, 4), np.float32)
        rows[:, 0] = 2.0**number
        dense = {name: np.zeros_like(weight) for name, weight in log.dense.items()}
        dense["wide"] = np.full(2, 2.0**-number, np.float32)
        log.publish({table.name: (ids, rows) for table in TABLES}, dense=dense, kind=kind)

    publish(0, "base")
    served = log.serve()
    expected = served.predict(asked)
    served.watch(0.001)
    for number in range(1, 16):
        publish(number, "delta")
        for _ in range(20):
            np.testing.assert_array_equal(served.predict(asked), expected)
    wait_for(lambda: served.version == log.last)
    served.close()
    np.testing.assert_array_equal(served.predict(asked), expected)
    assert np.unique(expected).size > 10


def test_a_flipped_bit_or_a_cut_anywhere_is_refused(tmp_path: Path) -> None:
    log, rng = Log(tmp_path), np.random.default_rng(0)
    log.publish({"user": ([1], vector(1)), "video": ([1], vector(1))}, kind="base")
    served = log.serve()
    bad = log.publish({"user": (np.arange(9), vector(2, 9))}, {"video": [1]}, log.dense)
    # The manifest first: once it was read whole, it is not read again.
    files = sorted((log.root / bad.folder).iterdir(), key=lambda path: path.suffix != ".json")
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        for number in range(25):
            at = int(rng.integers(0, len(whole)))
            flipped = whole[:at] + bytes([whole[at] ^ 1 << number % 8]) + whole[at + 1 :]
            path.write_bytes(whole[:at] if number % 3 == 0 else flipped)
            faults = served.faults
            assert served.poll() == 0 and served.faults == faults + 1 and served.version == Version(1, 0)
        path.write_bytes(whole)
    vectors, found = served.vectors("user", np.arange(3))
    assert found.tolist() == [False, True, False] and vectors[1, 0] == 1
    assert served.poll() == 1 and served.vectors("user", np.arange(9))[0].min() == 2
