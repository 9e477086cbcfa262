"""Two bfloat16 numbers in each float32 word, so that vectors of 16-bit floats and 32-bit optimizer slots share one array.

In: float32 numbers [..., D]. Out: words [..., ceil(D / 2)] that hold them as bfloat16, the last padded with 0, and back. Words
are moved, never calculated with: many are no numbers. Rounding is to the nearest or stochastic: up or down with chances that
keep the expected value, so that updates smaller than half a step are not lost (Gupta et al. 2015, "Deep learning with limited
numerical precision", section 3). Its random bits are a hash of where a number lies and of the step, the same on every mesh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def num_words(dim: int) -> int:
    """Returns ceil(D / 2)."""
    return -(-dim // 2)


def nearest_words(values: jax.Array) -> jax.Array:
    """Returns the words of values [..., D], float32 [..., ceil(D / 2)], each rounded to the nearest bfloat16."""
    halves = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return _words_of(halves)


def stochastic_words(values: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns the words of values [V, D], each rounded up or down at random.

    Args:
        values: float32 [V, D]. What bfloat16 can hold, infinities among it, stays as it is.
        noise: uint32 [V, ceil(D / 2)], uniform; 16 bits for each number.
    """
    sixteen = jnp.stack([noise & jnp.uint32(0xFFFF), noise >> jnp.uint32(16)], axis=-1)
    sixteen = sixteen.reshape(values.shape[0], 2 * noise.shape[1])[:, : values.shape[1]]
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) + sixteen
    rounded = (bits >> jnp.uint32(16)).astype(jnp.uint16)
    # Adding to the bits of a NaN could make a number of it.
    nan = jax.lax.bitcast_convert_type(jnp.asarray(jnp.nan, jnp.bfloat16), jnp.uint16)
    return _words_of(jnp.where(jnp.isnan(values), nan, rounded))


def numbers_of(words: jax.Array, dim: int) -> jax.Array:
    """Returns the numbers in words [..., ceil(D / 2)], float32 [..., D]."""
    halves = jax.lax.bitcast_convert_type(words, jnp.bfloat16)
    return halves.reshape(*words.shape[:-1], 2 * words.shape[-1])[..., :dim].astype(jnp.float32)


def _words_of(halves: jax.Array) -> jax.Array:
    dim = halves.shape[-1]
    padded = jnp.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, dim % 2)])
    return jax.lax.bitcast_convert_type(padded.reshape(*halves.shape[:-1], num_words(dim), 2), jnp.float32)


def noise_of(seed: int, step: jax.Array, shards: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    """Returns random bits, uint32 [V, size], a hash of the arguments and the position.

    Args:
        seed: 32 bits.
        step: int32 scalar, steps done.
        shards: int32 [V], shard of each row.
        rows: int32 [V], its row in the shard.
        size: Words a row.
    """
    state = mixed(step.astype(jnp.uint32) ^ jnp.uint32(seed))
    state = mixed(mixed(state + shards.astype(jnp.uint32)) + rows.astype(jnp.uint32))
    positions = jnp.arange(1, size + 1, dtype=jnp.uint32) * jnp.uint32(_GOLDEN)
    return mixed(mixed(state[:, None] + positions[None, :]))


def mixed(x: jax.Array) -> jax.Array:
    """Returns the 32-bit finaliser of murmur3 of uint32 numbers, a bijection."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
