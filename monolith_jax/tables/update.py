"""The update of rows: any optax transformation that is elementwise over rows, run for each row on its own.

In: rows [V, W] (vector and optimizer state side by side), gradients [V, D] summed over the batch. Out: the new rows. The
transformation runs under `jax.vmap`, so every leaf of its state is a row's own: counts count the row's own updates, norms are
the row's, and weight decay acts on touched rows only ("lazy"). Its learning rate is fixed at 1 and the schedule, which is
global, multiplies afterwards. Dense weights use the same `OptimizerConfig`, as one tree.
"""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

_NOT_PER_ROW = {
    "adafactor": "its factored state needs matrices",
    "sm3": "its accumulators are shared between rows",
    "lbfgs": "it needs the loss function",
    "polyak_sgd": "it needs the loss value",
    "noisy_sgd": "its random state is no number",
    "muon": "it needs matrices",
    "amos": "its state depends on the parameter's shape",
}
_NOT_LINEAR = {"fromage": "its learning rate does not only scale the update"}


@dataclass(frozen=True)
class OptimizerConfig:
    """An optax optimizer and its learning rate."""

    name: str = "adagrad"
    """Name of a function of optax that takes a learning rate: adagrad, adam, sgd, rmsprop, lion, yogi, ..."""
    learning_rate: float = 0.05
    """Learning rate after the warm-up."""
    arguments: tuple[tuple[str, float | int | bool], ...] = ()
    """Further arguments of that function, as (name, value) pairs."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    decay_steps: int = 0
    """Steps after the warm-up in which it falls by a cosine to `end_factor`; 0: it stays."""
    end_factor: float = 0.0
    """Share of the learning rate that is left after the decay."""


def learning_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Returns the learning rate of a step, float32."""
    step = step.astype(jnp.float32)
    rate = jnp.float32(config.learning_rate)
    if config.decay_steps:
        done = jnp.clip((step - config.warmup_steps) / config.decay_steps, 0.0, 1.0)
        rate = rate * (config.end_factor + (1 - config.end_factor) * 0.5 * (1 + jnp.cos(math.pi * done)))
    if config.warmup_steps:
        rate = rate * jnp.minimum(1.0, (step + 1) / config.warmup_steps)
    return rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the transformation with learning rate 1.

    Raises:
        ValueError: optax has no such optimizer, or it has no such argument, or needs one more.
    """
    if config.name in _NOT_LINEAR:
        raise ValueError(f"OptimizerConfig.name: optax.{config.name} cannot be used: {_NOT_LINEAR[config.name]}")
    make = getattr(optax, config.name, None)
    if not callable(make) or "learning_rate" not in inspect.signature(make).parameters:
        known = [name for name in dir(optax) if name.islower() and name[0] != "_" and _takes_rate(getattr(optax, name))]
        near = difflib.get_close_matches(config.name, known, 1) or known
        raise ValueError(f"OptimizerConfig.name: optax has no optimizer {config.name!r}; did you mean {' or '.join(near)}?")
    allowed = [name for name in inspect.signature(make).parameters if name != "learning_rate"]
    for name, _ in config.arguments:
        if name not in allowed:
            raise ValueError(f"OptimizerConfig.arguments: optax.{config.name} takes {', '.join(allowed)}; got {name!r}")
    try:
        made = make(learning_rate=1.0, **dict(config.arguments))
    except TypeError as error:
        raise ValueError(f"OptimizerConfig.arguments: optax.{config.name}: {error}") from None
    assert isinstance(made, optax.GradientTransformation)

    def update(gradients: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        # optax takes Python floats to the power of integer counts, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return made.update(gradients, state, weights)

    return optax.GradientTransformation(made.init, update)  # pyright: ignore[reportArgumentType]


def _takes_rate(value: Any) -> bool:
    return inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters


@dataclass(frozen=True)
class RowLayout:
    """What the W floats of a row are: the vector, then the leaves of the optimizer's state."""

    config: OptimizerConfig
    dim: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @property
    def width(self) -> int:
        """W"""
        return self.dim + sum(math.prod(shape) for shape in self.shapes)


def row_layout(config: OptimizerConfig, dim: int) -> RowLayout:
    """Returns the layout of the rows of a table.

    Raises:
        ValueError: The optimizer cannot work row by row.
    """
    if config.name in _NOT_PER_ROW:
        raise ValueError(f"OptimizerConfig.name: optax.{config.name} cannot update rows: {_NOT_PER_ROW[config.name]}")
    vector = jax.ShapeDtypeStruct((dim,), jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(make_optimizer(config).init, vector))
    for leaf in leaves:
        if leaf.dtype not in (jnp.float32, jnp.int32):
            raise ValueError(f"OptimizerConfig.name: optax.{config.name} keeps {leaf.dtype} state, rows hold float32")
    return RowLayout(config, dim, tuple(leaf.shape for leaf in leaves), tuple(str(leaf.dtype) for leaf in leaves))


def _packed(layout: RowLayout, vectors: jax.Array, state: Any) -> jax.Array:
    # Integers (counts) are exact in float32 up to 2^24.
    leaves = zip(jax.tree.leaves(state), layout.shapes, strict=True)
    flat = [leaf.reshape(vectors.shape[0], math.prod(shape)).astype(jnp.float32) for leaf, shape in leaves]
    return jnp.concatenate([vectors, *flat], axis=1)


def _unpacked(layout: RowLayout, rows: jax.Array) -> tuple[jax.Array, Any]:
    leaves, start = [], layout.dim
    for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
        size = math.prod(shape)
        leaves.append(rows[:, start : start + size].reshape(rows.shape[0], *shape).astype(dtype))
        start += size
    vector = jax.ShapeDtypeStruct((layout.dim,), jnp.float32)
    tree = jax.tree.structure(jax.eval_shape(make_optimizer(layout.config).init, vector))
    return rows[:, : layout.dim], jax.tree.unflatten(tree, leaves)


def first_rows(layout: RowLayout, vectors: jax.Array) -> jax.Array:
    """Returns new rows [V, W]: these vectors [V, D], with the optimizer's initial state for each."""
    return _packed(layout, vectors, jax.vmap(make_optimizer(layout.config).init)(vectors))


def updated_rows(layout: RowLayout, rows: jax.Array, gradients: jax.Array, rate: jax.Array) -> jax.Array:
    """Returns rows [V, W] after one update.

    Args:
        layout: Layout of the rows.
        rows: float32 [V, W].
        gradients: float32 [V, D], of the loss, summed over all occurrences of a row in the batch.
        rate: Learning rate, scalar.
    """
    vectors, state = _unpacked(layout, rows)
    updates, state = jax.vmap(make_optimizer(layout.config).update)(gradients, state, vectors)
    return _packed(layout, vectors + rate * jnp.asarray(updates), state)
