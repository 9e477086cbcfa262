"""What crosses between devices: ragged sizes against a numpy model of the collective, bf16 on the wire, bytes counted."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.ids.group import GroupMapper
from monolith_jax.mesh import BATCH, MODEL, ROWS, SHARD, sharding
from monolith_jax.tables import lookup
from monolith_jax.tables.lookup import gather_rows, return_gradients, send_vectors
from monolith_jax.tables.table import TableConfig
from monolith_jax.tables.wire import RaggedSizes, WireConfig, exchanged_bytes, ragged_sizes
from monolith_jax.types import GroupIds, GroupPlan
from tests.tables.test_lookup import DIM, Setting, draw

HALF = WireConfig(dtype="bfloat16")


def ragged_model(operands: Any, outputs: Any, of_devices: Sequence[RaggedSizes]) -> list[np.ndarray]:
    """Returns what `jax.lax.ragged_all_to_all` is documented to return on each device."""
    results = [np.array(output) for output in outputs]
    for sender, (operand, sizes) in enumerate(zip(operands, of_devices, strict=True)):
        for receiver, result in enumerate(results):
            start, number, to = (int(one[receiver]) for one in sizes[:3])
            assert number == of_devices[receiver].recv_sizes[sender], "the two sides do not agree"
            assert 0 <= start and start + number <= len(operand) and to + number <= len(result)
            result[to : to + number] = np.asarray(operand)[start : start + number]
    return results


def test_the_model_gives_the_documented_example() -> None:
    sizes = [RaggedSizes([0, 1], [1, 2], [0, 0], [1, 1]), RaggedSizes([0, 1], [1, 1], [1, 2], [2, 1])]
    results = ragged_model([[1, 2, 2], [3, 4, 0]], [[0] * 4] * 2, sizes)
    assert [result.tolist() for result in results] == [[1, 3, 0, 0], [2, 2, 4, 0]]


@st.composite
def filled(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Draws how many each of S owners sends to each of S slices, and U."""
    number, size = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(0, size), min_size=number**2, max_size=number**2))
    return np.array(counts, np.int32).reshape(number, number), size


@settings(max_examples=100, deadline=None)
@given(filled(), st.booleans())
def test_ragged_brings_what_is_filled_where_padded_would(case: tuple[np.ndarray, int], to_owners: bool) -> None:
    num_sent, size = case
    number = len(num_sent)
    counts = num_sent.T if to_owners else num_sent  # [sender, receiver]
    blocks = np.arange(1, number * number * size + 1).reshape(number, number, size)
    sizes = [ragged_sizes(device, counts[device], counts[:, device], size) for device in range(number)]
    assert all(np.asarray(one).dtype == np.int32 and np.shape(one) == (number,) for of in sizes for one in of)
    results = ragged_model(blocks.reshape(number, -1), np.zeros((number, number * size), int), sizes)
    padded = blocks.transpose(1, 0, 2)
    expected = np.where(np.arange(size) < counts.T[:, :, None], padded, 0)
    np.testing.assert_array_equal(np.stack(results).reshape(padded.shape), expected)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_a_plan_fills_each_block_from_its_start(num_devices: int) -> None:
    setting = Setting(num_devices)
    for seed in range(3):
        ids, valid, _ = draw(seed)
        plan = jax.device_get(setting.plan(ids, valid))
        assert plan.num_sent.dtype == np.int32 and plan.num_sent.sum() > 20
        filled = np.arange(plan.sent.shape[2]) < plan.num_sent[:, :, None]
        np.testing.assert_array_equal(plan.sent < plan.touched.shape[1], filled)
        # Positions look at nothing but that.
        used = plan.positions[plan.positions < plan.sent[0].size]
        owners, places = np.divmod(used, plan.sent.shape[2])
        slices = np.nonzero(plan.positions < plan.sent[0].size)[0] // (len(ids) // num_devices)
        assert (places < plan.num_sent[owners, slices]).all()


def swapped(setting: Setting, exchange: WireConfig, array: jax.Array, plan: GroupPlan, gradients: Any) -> list[np.ndarray]:
    def swap(array: jax.Array, plan: GroupPlan, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = send_vectors(setting.mesh, setting.group, gather_rows(setting.mesh, array, plan), plan, exchange)
        return vectors, return_gradients(setting.mesh, gradients, plan, exchange)

    both = jax.jit(swap)(array, plan, jax.device_put(gradients, sharding(setting.mesh, BATCH)))
    assert all(one.dtype == jnp.float32 for one in both)
    return [np.asarray(one) for one in both]


def test_bfloat16_on_the_wire_rounds_once_each_way() -> None:
    setting = Setting(8)
    ids, valid, gradients = draw()
    plan, (array, _) = setting.plan(ids, valid), setting.random_array()
    vectors, of_rows = swapped(setting, WireConfig(), array, plan, gradients)
    half_vectors, half_of_rows = swapped(setting, HALF, array, plan, gradients)
    np.testing.assert_array_equal(half_vectors, vectors.astype(jnp.bfloat16).astype(np.float32))
    # Summed in float32 on both sides: in bfloat16 the sums of many would stand still.
    assert np.abs(half_of_rows - of_rows).max() <= 2**-8 * np.abs(gradients).max() * 10
    assert (half_of_rows.view(np.uint32) & 0xFFFF).any() and not np.array_equal(half_of_rows, of_rows)


def test_vectors_of_a_bfloat16_table_lose_nothing_on_a_bfloat16_wire() -> None:
    setting = Setting(2, tables=(TableConfig("a", 400, DIM, dtype="bfloat16"), TableConfig("b", 9, DIM, dtype="bfloat16")))
    ids, valid, gradients = draw()
    plan = setting.plan(ids, valid)
    array = setting.freshen(jax.device_put(np.zeros(setting.group.shape, np.float32), sharding(setting.mesh, ROWS)), plan, 0)
    full, half = (swapped(setting, one, array, plan, gradients)[0] for one in (WireConfig(), HALF))
    assert full.any()
    np.testing.assert_array_equal(full, half)


def ragged_by_gathering(operand: Any, output: Any, *sizes: Any, axis_name: Any) -> jax.Array:
    """Stands in for the collective on CPU: each device sees all operands and sizes, and does what is documented."""
    operands, (starts, numbers, to, received) = jax.lax.all_gather((operand, sizes), axis_name)
    me, places = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0], dtype=jnp.int32)
    for sender in range(operands.shape[0]):
        offset = places - to[sender, me]
        inside = (offset >= 0) & (offset < numbers[sender, me])
        got = operands[sender].at[starts[sender, me] + offset].get(mode="clip")
        output = jnp.where(inside[:, None], got, output)
    return jnp.where((received[me] == numbers[:, me]).all(), output, jnp.nan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_equals_padded_both_ways(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(8)
    ids, valid, gradients = draw()
    plan, (array, _) = setting.plan(ids, valid), setting.random_array()
    assert len(np.unique(plan.num_sent)) > 2
    padded = swapped(setting, WireConfig("padded", dtype), array, plan, gradients)
    monkeypatch.setattr(lookup, "check_wire", lambda exchange, mesh: None)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathering)
    ragged = swapped(setting, WireConfig("ragged", dtype), array, plan, gradients)
    for one, other in zip(padded, ragged, strict=True):
        assert one.any()
        np.testing.assert_array_equal(other, one)


def test_what_is_sent_is_half_as_wide() -> None:
    setting = Setting(2)
    ids, valid, gradients = draw()
    plan, (array, _) = setting.plan(ids, valid), setting.random_array()
    text = {one: _lowered(setting, setting.mesh, one, array, plan, gradients, ()) for one in (WireConfig(), HALF)}
    size = plan.sent.shape[2]
    assert text[WireConfig()].count(f"(tensor<2x{size}x{DIM}xf32>) -> tensor<2x{size}x{DIM}xf32>") == 2
    assert text[HALF].count(f"(tensor<2x{size}x2xf32>) -> tensor<2x{size}x2xf32>") == 2


def _lowered(setting: Setting, mesh: Any, exchange: WireConfig, array: Any, plan: Any, gradients: Any, to: Any) -> str:
    def swap(array: jax.Array, plan: GroupPlan, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = send_vectors(mesh, setting.group, gather_rows(mesh, array, plan), plan, exchange)
        return vectors, return_gradients(mesh, gradients, plan, exchange)

    def abstract(one: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=NamedSharding(mesh, spec))

    plan = jax.tree.map(lambda one: abstract(one, ROWS), plan)._replace(positions=abstract(plan.positions, BATCH))
    traced = jax.jit(swap).trace(abstract(array, ROWS), plan, abstract(gradients, BATCH))
    return (traced.lower(lowering_platforms=to) if to else traced.lower()).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_lowers_for_gpus_and_is_refused_on_cpu(dtype: Any) -> None:
    setting, exchange = Setting(8), WireConfig("ragged", dtype)
    ids, valid, gradients = draw()
    plan, (array, _) = setting.plan(ids, valid), setting.random_array()
    with pytest.raises(ValueError, match=r"WireConfig\.kind is 'ragged', but XLA has no ragged_all_to_all for CPU"):
        swapped(setting, exchange, array, plan, gradients)
    mesh = AbstractMesh((8, 1), (SHARD, MODEL), axis_types=(AxisType.Auto,) * 2)
    text = _lowered(setting, mesh, exchange, array, plan, gradients, ("cuda",))
    assert text.count("@ragged_all_to_all(") == 2


def test_bytes_are_counted_from_the_plan() -> None:
    num_sent, sent = np.array([[3, 1], [0, 2]], np.int32), np.zeros((2, 2, 8), np.int32)
    plan = GroupPlan(None, sent, None, None, None, None, num_sent)
    assert exchanged_bytes(plan, 5) == (2 * 32 * 20, 2 * (6 * 20 + 16), 2 * 6 * 20)
    assert exchanged_bytes(plan, 5, HALF) == (2 * 32 * 12, 2 * (6 * 12 + 16), 2 * 6 * 10)


def test_bytes_of_a_zipf_batch_are_near_the_floor() -> None:
    batch, tables, ids = 4096, 26, 10_000_000
    layout = MapLayout(tuple(f"table_{index}" for index in range(tables)), (200_000,) * tables, 64)
    mapper = GroupMapper(layout, range(tables), 8)
    chances = np.cumsum(np.arange(1, ids + 1, dtype=np.float64) ** -1.05)
    rng = np.random.default_rng(0)
    for step in range(12):
        drawn = np.searchsorted(chances / chances[-1], rng.random((batch, tables)))
        valid = np.ones(drawn.shape, bool)
        plan, *_ = mapper.plan(GroupIds(drawn * 7919, valid), np.zeros(batch, np.uint32), 0, step)
    counted = exchanged_bytes(plan, 16)
    # Distinct ids of each slice, counted without the plan; a full shard refuses a few.
    slices = (drawn * tables + np.arange(tables)).reshape(8, -1)
    distinct = sum(np.unique(of_slice).size for of_slice in slices)
    assert 0.99 * distinct <= counted.floor / (2 * 16 * 4) <= distinct
    assert counted.padded <= 1.5 * counted.floor
    assert counted.ragged <= 1.1 * counted.floor
