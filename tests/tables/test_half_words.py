"""Rows of bfloat16: what a word holds, rounding that keeps the expected value, and the same bits on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monolith_jax.mesh import ROWS, MeshConfig, make_mesh, sharding
from monolith_jax.tables.half_words import nearest_words, noise_of, num_words, numbers_of, stochastic_words
from monolith_jax.tables.table import TableConfig, empty_array, make_groups
from monolith_jax.tables.update import OptimizerConfig, first_rows, row_layout, updated_rows, vectors_of
from tests.tables.test_lookup import BATCH_SIZE, POSITIONS, Setting, draw

SGD = OptimizerConfig(name="sgd", learning_rate=1.0)


def noise(step: int, number: int, size: int, shard: int = 3) -> jax.Array:
    rows = jnp.arange(number, dtype=jnp.int32)
    return noise_of(11, jnp.int32(step), jnp.full(number, shard, jnp.int32), rows, size)


def all_bfloat16() -> np.ndarray:
    """Returns every bfloat16 as float32: zeros of both signs, the smallest, infinities, all that is no number."""
    return (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_words_keep_what_bfloat16_can_hold(dim: int) -> None:
    every = all_bfloat16()
    rng = np.random.default_rng(0)
    values = rng.permutation(np.concatenate([every, rng.choice(every, -every.size % dim)])).reshape(-1, dim)
    bits = values.view(np.uint32)
    for words in (
        nearest_words(jnp.asarray(values)),
        stochastic_words(jnp.asarray(values), noise(0, len(values), num_words(dim))),
    ):
        assert words.shape == (len(values), -(-dim // 2)) and words.dtype == jnp.float32
        back = np.asarray(numbers_of(words, dim))
        nan = np.isnan(values)
        np.testing.assert_array_equal(back.view(np.uint32)[~nan], bits[~nan])
        assert np.isnan(back[nan]).all()


def test_what_is_no_number_stays_none() -> None:
    # The sum of these bits and noise runs over into the sign: without care they become 0.
    values = np.full((50, 4), 0x7FFFFFFF, np.uint32).view(np.float32)
    for one in (values, (values.view(np.uint32) | 0x80000000).view(np.float32)):
        words = stochastic_words(jnp.asarray(one), noise(0, 50, 2))
        assert np.isnan(np.asarray(numbers_of(words, 4))).all()


def test_words_survive_the_way_through_an_array() -> None:
    # Many words are denormal or no numbers when they are looked at as float32.
    values = np.random.default_rng(1).permutation(all_bfloat16()[: 2**16]).reshape(-1, 4)
    values = values[~np.isnan(values).any(1)]
    words = nearest_words(jnp.asarray(values))
    seen = np.asarray(words).view(np.uint32)
    exponents = (seen >> 23) & 0xFF
    assert ((exponents == 0) & (seen << 9 != 0)).any() and np.isnan(np.asarray(words)).any()
    rows = jnp.arange(len(values), dtype=jnp.int32)

    def there_and_back(array: jax.Array, words: jax.Array) -> jax.Array:
        written = array.at[rows].set(words, mode="drop", unique_indices=True)
        return written.at[rows[::-1]].get(mode="clip", unique_indices=True)

    got = jax.jit(there_and_back)(jnp.zeros((len(values) + 5, 2)), words)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32), seen[::-1])


def test_rounding_is_to_a_neighbour_and_keeps_the_expected_value() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(size=20), [1 + 2**-9, -1 - 2**-9, 3.0, 1e-39, -(2**-20), 2 - 2**-9, 0.0]]).astype(
        np.float32
    )
    number = 20_000
    rounded = jax.jit(lambda x, bits: numbers_of(stochastic_words(x, bits), x.shape[1]))
    tiled = jnp.asarray(np.tile(values, (number, 1)))
    got = np.asarray(rounded(tiled, noise(5, number, num_words(values.size)))).astype(np.float64)
    low = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    high = ((values.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    assert ((got == low) | (got == high)).all()
    exact = values == low
    assert (got[:, exact] == values[exact]).all()
    share = (values - low) / (high - low)
    error = ((got == high).mean(0) - share)[~exact] / np.sqrt(share * (1 - share) / number)[~exact]
    assert np.abs(error).max() < 4.5, "more than chance: the expected value is not kept"
    # Neighbouring rows, positions and steps have nothing to do with each other.
    bits = np.concatenate([np.asarray(noise(step, 4000, 8)).view(np.uint16).astype(np.float64) for step in (6, 7)], axis=1)
    assert np.abs(np.corrcoef(bits, rowvar=False) - np.eye(bits.shape[1])).max() < 0.08
    assert abs(np.corrcoef(bits[:-1].ravel(), bits[1:].ravel())[0, 1]) < 0.02


def test_noise_differs_by_each_of_its_arguments() -> None:
    base = np.asarray(noise(5, 100, 4))
    np.testing.assert_array_equal(np.asarray(noise(5, 50, 2)), base[:50, :2])
    others = (noise(6, 100, 4), noise(5, 100, 4, shard=4), noise(5, 101, 4)[1:])
    assert all(np.count_nonzero(np.asarray(other) == base) == 0 for other in others)
    # A row's noise must not be another shard's row's, step after step.
    states = {np.asarray(noise(step, 64, 2, shard)).tobytes() for step in range(20) for shard in range(20)}
    assert len(states) == 400


def test_small_updates_are_not_lost() -> None:
    number, dim, steps, small = 500, 3, 400, 1e-4
    layout = row_layout(SGD, dim, "bfloat16")
    assert layout.width == 2
    start = first_rows(layout, jnp.ones((number, dim)))
    gradients, rate = jnp.full((number, dim), small), jnp.float32(1)

    def train(random: bool) -> np.ndarray:
        def step(t: jax.Array, rows: jax.Array) -> jax.Array:
            bits = noise_of(7, t, jnp.zeros(number, jnp.int32), jnp.arange(number, dtype=jnp.int32), 2) if random else None
            return updated_rows(layout, rows, gradients, rate, bits)

        return np.asarray(vectors_of(layout, jax.jit(lambda rows: jax.lax.fori_loop(0, steps, step, rows))(start)))

    np.testing.assert_array_equal(train(False), 1.0)
    after = train(True).astype(np.float64)
    # Below 1 the numbers are 2^-8 apart: each walks with at most a step of that size, on the average straight down.
    spread = np.sqrt(steps * small * 2**-8 / after.size)
    assert abs(after.mean() - (1 - steps * small)) < 4.5 * spread
    assert np.unique(after).size > 3


def test_slots_stay_float32_and_vectors_follow_the_float32_update() -> None:
    rng = np.random.default_rng(0)
    adam = OptimizerConfig(name="adam")
    half, full = row_layout(adam, 5, "bfloat16"), row_layout(adam, 5)
    assert (half.width, full.width) == (3 + 11, 5 + 11)
    vectors = numbers_of(nearest_words(jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)), 5)
    gradients = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    rows = updated_rows(half, first_rows(half, vectors), gradients, jnp.float32(0.1), noise(0, 7, 3))
    expected = updated_rows(full, first_rows(full, vectors), gradients, jnp.float32(0.1))
    np.testing.assert_array_equal(rows[:, 3:], expected[:, 5:])
    np.testing.assert_allclose(vectors_of(half, rows), expected[:, :5], rtol=2**-7)
    assert not np.array_equal(vectors_of(half, rows), expected[:, :5])


def test_one_device_equals_eight_to_the_bit() -> None:
    dim = 3
    tables = (TableConfig("a", 400, dim, dtype="bfloat16"), TableConfig("b", 100, dim, dtype="bfloat16", init_scale=1.0))
    arrays, steps = [], []
    for num_devices in (1, 8):
        setting = Setting(num_devices, "adagrad", tables=tables)
        assert setting.group.shape[2] == num_words(dim) + dim
        array = empty_array(setting.group, setting.mesh)
        for number in range(3):
            ids, valid, _ = draw(number)
            # Whole numbers of 1/8: their sums are exact whatever their order.
            gradients = np.random.default_rng(number).integers(-40, 40, (BATCH_SIZE, len(POSITIONS), dim)) / np.float32(8)
            plan = setting.plan(ids, valid)
            vectors, _, after = setting.step(setting.freshen(array, plan, 7), plan, gradients.astype(np.float32), number)
            array = jax.device_put(after.reshape(setting.group.shape), sharding(setting.mesh, ROWS))
            steps.append(vectors)
        arrays.append(np.asarray(array).view(np.uint32))
    np.testing.assert_array_equal(arrays[1], arrays[0])
    np.testing.assert_array_equal(steps[3:], steps[:3])
    # bfloat16 and learning at all: the lower half of each number is 0, and repeated ids have moved.
    assert not (np.stack(steps).view(np.uint32) & 0xFFFF).any()
    assert np.abs(np.stack(steps)).max() > 0.1


def test_dtype_makes_a_group_and_is_checked() -> None:
    tables = [TableConfig("a", 9, 4), TableConfig("b", 9, 4, dtype="bfloat16"), TableConfig("c", 9, 4)]
    assert [group.maps.names for group in make_groups(tables, 8)] == [("a", "c"), ("b",)]
    with pytest.raises(ValueError, match="dtype of table 'a' must be float32 or bfloat16, got 'float16'"):
        make_groups([dataclasses.replace(tables[0], dtype="float16")], 8)  # pyright: ignore[reportArgumentType]


def test_in_float64_only_other_rows_are_wider() -> None:
    mesh = make_mesh(MeshConfig(num_devices=1, num_shards=8))
    with jax.enable_x64(True):
        groups = make_groups([TableConfig("a", 9, 4), TableConfig("b", 9, 4, dtype="bfloat16")], 8)
        assert [empty_array(group, mesh).dtype for group in groups] == [jnp.float64, jnp.float32]
        half = groups[1].rows
        rows = first_rows(half, jnp.ones((2, 4)))
        after = updated_rows(half, rows, jnp.ones((2, 4)), jnp.asarray(0.5), noise(0, 2, 2))
        assert rows.dtype == after.dtype == jnp.float32
        assert vectors_of(half, after).dtype == jnp.float32
