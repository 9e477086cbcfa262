"""One step of training against an oracle in plain numpy, and what a step must leave alone."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest

from monolith_jax.features import Features, IdFeatureConfig, Slot
from monolith_jax.tables.lookup import write_fresh_rows
from monolith_jax.tables.table import TableConfig
from monolith_jax.tables.update import OptimizerConfig
from monolith_jax.train.state import Inputs, TrainState
from monolith_jax.train.step import make_predict_step, make_train_step
from tests.small_model import ADAGRAD, HEADS, SGD, TABLES, Small, make_examples, make_small

RATE = 0.1


def table_of(small: Small, group: int, name: str) -> int:
    return small.model.groups[group].maps.names.index(name)


def vectors_of(small: Small, array: np.ndarray, group: int, table: str, ids: np.ndarray) -> np.ndarray:
    """Returns the vectors of ids, float64 [N, D], zeros for those without a row."""
    of_group = small.model.groups[group]
    index = table_of(small, group, table)
    shards, rows = small.mapper.groups[group].maps.lookup(ids, index)
    vectors = array[shards, of_group.maps.row_offsets[index] + rows, : of_group.dim]
    return np.where(rows[:, None] >= 0, vectors, 0).astype(np.float64)


def fields_of(slot: Slot, vectors: np.ndarray, valid: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fields [B, f, D] of a slot, and the factor [B, f, N] with which each item went into each of them."""
    count = np.maximum(valid.sum(1), 1)
    number, length = valid.shape
    factors = np.zeros((number, length if slot.combiner == "none" else 1, length))
    match slot.combiner:
        case "none":
            factors += np.eye(length)
        case "first":
            factors[:, :, 0] = 1
        case "sum" | "mean" | "sqrtn":
            factors += (1 / {"sum": count**0, "mean": count, "sqrtn": np.sqrt(count)}[slot.combiner])[:, None, None]
    factors = factors * (weights if slot.weighted else np.ones_like(weights))[:, None, :]
    return np.einsum("bfn,bnd->bfd", factors, vectors), factors


class Oracle:
    """A dense model in float64: DeepFM without hidden layers, both losses, SGD with one rate."""

    def __init__(self, small: Small) -> None:
        weights: dict[str, Any] = jax.device_get(small.state.weights)
        self.kernel = weights["deep"]["layers"][0]["kernel"].astype(np.float64)
        self.bias = weights["deep"]["layers"][0]["bias"].astype(np.float64)
        self.wide = weights["wide"].astype(np.float64)
        self.small = small

    def step(self, arrays: list[np.ndarray], features: Features, labels: np.ndarray, masks: np.ndarray) -> tuple[Any, ...]:
        """Returns loss, scores, and the new vectors of all ids as a mapping (table, id) -> vector; learns."""
        parts, fields = [], []
        for group, slots in enumerate(self.small.model.layout.groups):
            ids, valid = features.groups[group]
            weights = features.weights[group]
            for slot in slots:
                at = slice(slot.start, slot.start + slot.length)
                flat = np.ascontiguousarray(ids[:, at]).ravel()
                vectors = vectors_of(self.small, arrays[group], group, slot.table, flat).reshape(*ids[:, at].shape, -1)
                vectors = vectors * valid[:, at, None]
                of_items = np.ones(ids[:, at].shape) if weights is None else weights[:, at].astype(np.float64)
                made, factors = fields_of(slot, vectors, valid[:, at], of_items)
                fields.append(made)
                parts.append((group, slot, factors))
        stacked = np.concatenate(fields, axis=1)
        loss, scores, of_fields = self._learn(stacked, features.dense.astype(np.float64), labels, masks)
        return loss, scores, self._moved(arrays, features, parts, of_fields)

    def _learn(self, fields: np.ndarray, dense: np.ndarray, labels: np.ndarray, masks: np.ndarray) -> tuple[Any, ...]:
        number = len(labels)
        flat = np.concatenate([fields.reshape(number, -1), dense], axis=1)
        total = fields[:, :, 1:].sum(1)
        wide = fields[:, :, 0].sum(1) + 0.5 * ((total**2).sum(1) - (fields[:, :, 1:] ** 2).sum((1, 2)))
        start = np.array([np.log(0.3 / 0.7), np.log(np.expm1(0.6))])
        logits = flat @ self.kernel + self.bias + wide[:, None] * self.wide + start
        sigmoid, softplus = 1 / (1 + np.exp(-logits)), np.log1p(np.exp(logits))
        scores = np.stack([sigmoid[:, 0], softplus[:, 1]], 1)
        each = np.stack(
            [np.log1p(np.exp(logits[:, 0])) - labels[:, 0] * logits[:, 0], (scores[:, 1] - labels[:, 1]) ** 2 / 2], 1
        )
        of_logits = np.stack([sigmoid[:, 0] - labels[:, 0], (scores[:, 1] - labels[:, 1]) * sigmoid[:, 1]], 1) * masks / number
        of_fields = (of_logits @ self.kernel.T)[:, : fields[0].size].reshape(fields.shape)
        of_wide = (of_logits @ self.wide)[:, None]
        of_fields[:, :, 0] += of_wide
        of_fields[:, :, 1:] += of_wide[:, :, None] * (total[:, None] - fields[:, :, 1:])
        self.kernel -= RATE * flat.T @ of_logits
        self.bias -= RATE * of_logits.sum(0)
        self.wide -= RATE * wide @ of_logits
        return (each * masks).sum() / number, scores, of_fields

    def _moved(
        self, arrays: list[np.ndarray], features: Features, parts: list[Any], of_fields: np.ndarray
    ) -> dict[Any, np.ndarray]:
        moved: dict[tuple[str, int], np.ndarray] = {}
        start = 0
        for group, slot, factors in parts:
            ids, valid = features.groups[group]
            of_items = np.einsum("bfn,bfd->bnd", factors, of_fields[:, start : start + factors.shape[1]])
            start += factors.shape[1]
            for example, item in zip(*np.nonzero(valid[:, slot.start : slot.start + slot.length]), strict=True):
                one = int(ids[example, slot.start + item])
                if (slot.table, one) not in moved:
                    moved[slot.table, one] = vectors_of(self.small, arrays[group], group, slot.table, np.array([one]))[0]
                moved[slot.table, one] = moved[slot.table, one] - RATE * of_items[example, item]
        return moved


@pytest.mark.parametrize("num_devices", [1, 8])
def test_three_steps_equal_the_oracle(num_devices: int) -> None:
    # Another learning rate makes another group; the oracle knows one rate, so the second only differs in its decay.
    other = dataclasses.replace(SGD, decay_steps=10**9, end_factor=1.0)
    tables = [dataclasses.replace(table, optimizer=other if table.name == "tag" else SGD) for table in TABLES]
    small = make_small(num_devices, tables=tables)
    assert len(small.model.groups) == 2
    oracle, train_step, state = Oracle(small), make_train_step(small.model), small.state
    for step in range(3):
        inputs, features, plan = small.inputs_of(make_examples(32, seed=step))
        assert plan.stats["occurrences"] > 1.5 * plan.stats["unique"]
        before = [np.asarray(array) for array in _fresh(small, state, inputs)]
        state, metrics = train_step(state, inputs)
        loss, scores, moved = oracle.step(before, features, np.asarray(inputs.labels), np.asarray(inputs.masks))
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.scores, scores, rtol=1e-4, atol=1e-6)
        for (table, one), vector in moved.items():
            group = next(index for index, of_group in enumerate(small.model.groups) if table in of_group.maps.names)
            got = vectors_of(small, np.asarray(state.groups[group]), group, table, np.array([one]))[0]
            np.testing.assert_allclose(got, vector, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.weights["deep"]["layers"][0]["kernel"], oracle.kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.weights["wide"], oracle.wide, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 3


def _fresh(small: Small, state: TrainState, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Returns the arrays as the step will find them, fresh rows with their first values."""
    model, parts = small.model, zip(small.model.groups, state.groups, inputs.plans, strict=True)
    write = jax.jit(write_fresh_rows, static_argnums=(0, 1, 2))
    return tuple(write(model.mesh, group, model.seed, array, plan) for group, array, plan in parts)


def used_rows(small: Small, group: int) -> np.ndarray:
    """Returns which rows [L, R] belong to an id."""
    of_group = small.model.groups[group]
    used = np.zeros(of_group.shape[:2], bool)
    for table in range(len(of_group.tables)):
        _, shards, rows, _ = small.mapper.groups[group].maps.entries(table)
        used[shards, of_group.maps.row_offsets[table] + rows] = True
    return used


@pytest.mark.parametrize("num_devices", [1, 8])
def test_only_rows_of_the_batch_are_written(num_devices: int) -> None:
    small = make_small(num_devices)
    train_step, state = make_train_step(small.model), small.state
    inputs, _, _ = small.inputs_of(make_examples(16, seed=0, num_ids=40))
    state, _ = train_step(state, inputs)
    before = [np.asarray(array) for array in state.groups]
    for group, array in enumerate(before):
        used = used_rows(small, group)
        assert np.abs(array[used]).max(1).all() and not array[~used].any()
    # A batch of other ids leaves the rows of the first as they were.
    old = [used_rows(small, group) for group in range(len(before))]
    inputs, _, _ = small.inputs_of(_shifted(make_examples(16, seed=1, num_ids=40)))
    state, _ = train_step(state, inputs)
    for group, array in enumerate(before):
        after = np.asarray(state.groups[group])
        np.testing.assert_array_equal(after[old[group]], array[old[group]])
        assert (used_rows(small, group) & ~old[group]).any()
        assert not after[~used_rows(small, group)].any()


def _shifted(examples: pa.RecordBatch) -> pa.RecordBatch:
    """Returns examples with ids that `make_examples` never makes."""
    columns = []
    for name, column in zip(examples.schema.names, examples.columns, strict=True):
        if name in ("user_id", "last"):
            column = pa.array([None if one is None else one + 1 for one in column.to_pylist()])
        if name in ("pinned", "seen", "tag"):
            column = pa.array([[one + 1 for one in many] for many in column.to_pylist()], pa.list_(pa.int64()))
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=examples.schema.names)


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad"])
def test_a_batch_of_padding_moves_nothing(name: str) -> None:
    optimizer = OptimizerConfig(name=name, learning_rate=0.1)
    small = make_small(8, tables=[dataclasses.replace(table, optimizer=optimizer) for table in TABLES])
    train_step, state = make_train_step(small.model), small.state
    state, _ = train_step(state, small.inputs_of(make_examples(16))[0])
    before = jax.tree.map(np.asarray, (state.weights, state.groups))
    empty = make_examples(16).slice(0, 0)
    names = ("user_id", "last", "pinned", "seen", "tag", "tag_weight", "like", "age", "duration_ms")
    nulls = {field.name: pa.nulls(16, field.type) for field in empty.schema if field.name in names}
    full = make_examples(16)
    columns = [nulls.get(name, full.column(name)) for name in full.schema.names]
    inputs, _, plan = small.inputs_of(pa.RecordBatch.from_arrays(columns, names=full.schema.names))
    assert plan.stats["occurrences"] == 0 and not np.asarray(inputs.masks).any()
    state, metrics = train_step(state, inputs)
    assert float(metrics.loss) == 0
    for one, other in zip(*(jax.tree.leaves(tree) for tree in (before, (state.weights, state.groups))), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("optimizer", [SGD, ADAGRAD], ids=lambda one: one.name)
def test_equal_ids_in_a_batch_sum_their_gradients(optimizer: OptimizerConfig) -> None:
    """An id that stands in a list twice at half the weight learns what it would learn once at full weight."""
    feature = IdFeatureConfig("tag", "tag", "tag", max_length=2, weight_column="tag_weight")
    learned = []
    for tags, weights in (([5], [1.0]), ([5, 5], [0.5, 0.5])):
        small = make_small(1, tables=[TableConfig("tag", 300, 4, optimizer)], features=[feature])
        example = make_examples(1).to_pydict() | {"tag": [tags], "tag_weight": [weights], "weight": [1.0]}
        inputs, _, _ = small.inputs_of(pa.RecordBatch.from_pydict(example))
        first = _fresh(small, small.state, inputs)[0]
        state, _ = make_train_step(small.model)(small.state, inputs)
        learned.append([np.asarray(array)[used_rows(small, 0)] for array in (first, state.groups[0])])
    (first, once), (same, twice) = learned
    np.testing.assert_array_equal(first, same)
    assert np.abs(once - first).max() > 1e-3
    np.testing.assert_allclose(twice, once, rtol=1e-6)


def test_refused_ids_train_nothing_and_read_zeros() -> None:
    tables = [dataclasses.replace(table, max_rows=1) for table in TABLES]
    small = make_small(1, tables=tables)
    train_step, predict_step, state = make_train_step(small.model), make_predict_step(small.model), small.state
    inputs, _, plan = small.inputs_of(make_examples(32))
    assert plan.stats["refused_at_cap"] > 50
    state, _ = train_step(state, inputs)
    for group, array in enumerate(state.groups):
        used = used_rows(small, group)
        assert not np.asarray(array)[~used].any()
    # Two batches that differ only in ids that were refused are the same to the model.
    names = [index for index, one in enumerate(small.model.groups) if "user" in one.maps.names]
    _, shards, rows, _ = small.mapper.groups[names[0]].maps.entries(0)
    assert len(rows) <= 8 and len(shards) <= 8
    full = make_examples(32)
    scores = []
    for shift in (10**12, 2 * 10**12):
        at = full.schema.names.index("user_id")
        users = pa.array([one + shift for one in full.column("user_id").to_pylist()])
        taken = _free_of(small, names[0], users)
        inputs, _, _ = small.inputs_of(full.set_column(at, "user_id", taken))
        scores.append(np.asarray(predict_step(state, inputs)))
    np.testing.assert_array_equal(scores[0], scores[1])


def _free_of(small: Small, group: int, users: pa.Array) -> pa.Array:
    """Returns user ids like these, each hashing to a shard whose cap is reached."""
    _, shards, _, _ = small.mapper.groups[group].maps.entries(0)
    full = set(shards.tolist())
    out = []
    for user in users.to_pylist():
        while small.mapper.groups[group].maps.lookup(np.array([user]), 0)[0][0] not in full:
            user += 1
        out.append(user)
    return pa.array(out)


def test_predicting_changes_nothing() -> None:
    small = make_small(8)
    inputs, _, _ = small.inputs_of(make_examples(16))
    state, metrics = make_train_step(small.model)(small.state, inputs)
    before = jax.tree.map(np.asarray, state)
    predict_step = make_predict_step(small.model)
    scores = np.asarray(predict_step(state, inputs))
    assert scores.shape == (16, len(HEADS))
    assert not np.array_equal(scores, metrics.scores), "the step has changed the model"
    np.testing.assert_array_equal(scores, predict_step(state, inputs))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_scores_of_a_step_are_from_before_it() -> None:
    small = make_small(1)
    inputs, _, _ = small.inputs_of(make_examples(16))
    fresh = small.state._replace(groups=_fresh(small, small.state, inputs))
    expected = np.asarray(make_predict_step(small.model)(fresh, inputs))
    _, metrics = make_train_step(small.model)(small.state, inputs)
    np.testing.assert_allclose(metrics.scores, expected, rtol=1e-6)
