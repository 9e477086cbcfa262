"""The exact best videos by inner product, block by block on the device: for small catalogues, and to judge an index by.

In: vectors and queries. Out: positions and scores of the best of each query.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.partial(jax.jit, static_argnames=("k",))
def _best(blocks_NKD: jax.Array, queries_BD: jax.Array, size: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    num_blocks, block, _ = blocks_NKD.shape

    def step(
        best: tuple[jax.Array, jax.Array], numbered: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        number, vectors_KD = numbered
        # Float32 on every device: a TPU's default would round to bfloat16, and the result be no oracle.
        scores_BK = jnp.matmul(queries_BD, vectors_KD.T, precision=lax.Precision.HIGHEST)
        at_K = number * block + jnp.arange(block, dtype=jnp.int32)
        scores_BK = jnp.where(at_K < size, scores_BK, -jnp.inf)
        some, where = lax.top_k(scores_BK, min(k, block))
        scores, at = jnp.concatenate([best[0], some], 1), jnp.concatenate([best[1], at_K[where]], 1)
        scores, where = lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(at, where, 1)), None

    nothing = jnp.full((len(queries_BD), k), -jnp.inf, jnp.float32), jnp.full((len(queries_BD), k), -1, jnp.int32)
    (scores, at), _ = lax.scan(step, nothing, (jnp.arange(num_blocks, dtype=jnp.int32), blocks_NKD))
    return at, scores


def exact_top_k(vectors: np.ndarray, queries: np.ndarray, k: int, block: int = 1 << 17) -> tuple[np.ndarray, np.ndarray]:
    """Returns the vectors with the largest inner products.

    Args:
        vectors: float32 [N, D].
        queries: float32 [Q, D].
        k: How many.
        block: Vectors whose scores are held at a time, for all queries.

    Returns:
        positions int32 [Q, k] in `vectors` and scores float32 [Q, k], best first; position -1 and score -inf where there are
        fewer.

    Raises:
        ValueError: Shapes do not fit, k is below 1, or a query is not finite.
    """
    if vectors.ndim != 2 or queries.ndim != 2 or vectors.shape[1] != queries.shape[1]:
        raise ValueError(f"expected vectors [N, D] and queries [Q, D], got {vectors.shape} and {queries.shape}")
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be at least 1, got {k} and {block}")
    if not np.isfinite(queries).all():
        raise ValueError("queries have NaN or infinite numbers; the user tower must give finite ones")
    size = len(vectors)
    block = max(min(block, size), 1)
    num_blocks = max(-(-size // block), 1)
    padded = vectors.astype(np.float32, copy=False)
    if num_blocks * block != size:
        padded = np.zeros((num_blocks * block, vectors.shape[1]), np.float32)
        padded[:size] = vectors
    at, scores = _best(padded.reshape(num_blocks, block, -1), queries.astype(np.float32, copy=False), np.int32(size), k)
    return np.where(np.isfinite(scores), at, -1), np.asarray(scores)
