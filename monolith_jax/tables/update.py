"""The update of rows: any optax transformation that is elementwise over rows, run for each row on its own.

In: rows [V, W] (vector and optimizer state side by side), gradients [V, D] summed over the batch. Out: the new rows. The
transformation runs under `jax.vmap`, so every leaf of its state is a row's own: counts count the row's own updates, norms are
the row's. Rows that a batch does not touch stay as they are ("lazy"): moments do not fade, weight decay and group lasso do not
act while a row is away. The transformation's learning rate is fixed at 1 and the schedule, which is global, multiplies
afterwards; only `ftrl` has its own inside. Dense weights use the same `OptimizerConfig`, as one tree.
"""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from monolith_jax.tables.half_words import nearest_words, num_words, numbers_of, stochastic_words
from monolith_jax.tables.row_optimizers import ftrl, rowwise_adagrad, shrunk_rows

RowDtype = Literal["float32", "bfloat16"]
"""Type of the vector in a row."""

_OURS = {"ftrl": ftrl, "rowwise_adagrad": rowwise_adagrad}
_RATE_INSIDE = ("ftrl",)
_NOT_PER_ROW = {
    "adafactor": "its factored state needs matrices",
    "sm3": "its accumulators are shared between rows",
    "lbfgs": "it needs the loss function",
    "polyak_sgd": "it needs the loss value",
    "noisy_sgd": "its random state is no number",
    "muon": "it needs matrices",
    "amos": "its state depends on the parameter's shape",
}
_NOT_LINEAR = {
    "fromage": "its learning rate does not only scale the update",
    "rprop": "its learning rate is a first step size between fixed bounds",
}


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its learning rate. Rows learn only in the steps that touch them."""

    name: str = "adagrad"
    """`rowwise_adagrad`, `ftrl`, or a function of optax that takes a learning rate: adagrad, adam, sgd (with the argument
    `momentum` if wanted), rmsprop, lion, yogi, ..."""
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
    clip_norm: float = 0.0
    """Longest gradient: a row's own, summed over the batch, is shortened to it; of dense weights all are one. 0: none."""
    group_lasso: float = 0.0
    """Rows only: after its update a vector is shortened by this times the learning rate, to exactly 0 where it was not longer.
    0: none."""


def float_dtype() -> Any:
    """Returns the type of rows and rates: float32, or float64 where a test has switched `jax_enable_x64` on."""
    return jax.dtypes.canonicalize_dtype(float)


def learning_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Returns the learning rate of a step, of the type of `float_dtype`."""
    step = step.astype(float_dtype())
    rate = jnp.asarray(config.learning_rate, float_dtype())
    if config.decay_steps:
        done = jnp.clip((step - config.warmup_steps) / config.decay_steps, 0.0, 1.0)
        rate = rate * (config.end_factor + (1 - config.end_factor) * 0.5 * (1 + jnp.cos(math.pi * done)))
    if config.warmup_steps:
        rate = rate * jnp.minimum(1.0, (step + 1) / config.warmup_steps)
    return rate


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the transformation, with learning rate 1 where `apply_updates` multiplies by the rate, with clipping.

    Raises:
        ValueError: There is no such optimizer, it has no such argument or needs one more, or the rest does not fit it.
    """
    if config.name in _NOT_LINEAR:
        raise ValueError(f"OptimizerConfig.name: optax.{config.name} cannot be used: {_NOT_LINEAR[config.name]}")
    for field in ("clip_norm", "group_lasso"):
        if not 0 <= getattr(config, field) < math.inf:
            raise ValueError(f"OptimizerConfig.{field} must be 0 (none) or above, got {getattr(config, field)}")
    if config.name in _RATE_INSIDE and (config.warmup_steps or config.decay_steps):
        raise ValueError(
            f"OptimizerConfig.warmup_steps, decay_steps: {config.name} has no schedule, its weights follow from one learning "
            "rate for all of its updates; set both to 0"
        )
    make = _OURS.get(config.name) or getattr(optax, config.name, None)
    if not _takes_rate(config.name, make):
        known = [*_OURS, *(name for name in dir(optax) if _takes_rate(name, getattr(optax, name)))]
        near = difflib.get_close_matches(config.name, known, 1) or known
        raise ValueError(f"OptimizerConfig.name: there is no optimizer {config.name!r}; did you mean {' or '.join(near)}?")
    assert callable(make)
    allowed = [name for name in inspect.signature(make).parameters if name != "learning_rate"]
    for name, _ in config.arguments:
        if name not in allowed:
            raise ValueError(f"OptimizerConfig.arguments: {config.name} takes {', '.join(allowed)}; got {name!r}")
    rate = config.learning_rate if config.name in _RATE_INSIDE else 1.0
    try:
        made = make(learning_rate=rate, **dict(config.arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"OptimizerConfig.arguments: {config.name}: {error}") from None
    assert isinstance(made, optax.GradientTransformation)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def update(gradients: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        # optax takes Python floats to the power of integer counts, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            gradients, _ = clip.update(gradients, optax.EmptyState())
            return made.update(gradients, state, weights)

    return optax.GradientTransformation(made.init, update)  # pyright: ignore[reportArgumentType]


def _takes_rate(name: str, value: Any) -> bool:
    # scale_by_... are parts of optimizers: some of them would climb.
    if not name.islower() or name.startswith(("_", "scale_by_")) or not inspect.isfunction(value):
        return False
    return "learning_rate" in inspect.signature(value).parameters


def apply_updates(config: OptimizerConfig, weights: Any, updates: Any, rate: jax.Array) -> Any:
    """Returns weights after updates of `make_optimizer`'s transformation, with the learning rate of the step.

    `rate` may be of another float type than the weights, whose type is kept.
    """

    def apply(weight: jax.Array, update: jax.Array) -> jax.Array:
        update = jnp.asarray(update, weight.dtype)
        return weight + (update if config.name in _RATE_INSIDE else rate.astype(weight.dtype) * update)

    return jax.tree.map(apply, weights, updates)


@dataclass(frozen=True)
class RowLayout:
    """What the W floats of a row are: the vector, then the leaves of the optimizer's state."""

    config: OptimizerConfig
    dim: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    vector_dtype: RowDtype = "float32"
    """bfloat16: two numbers of the vector in each float32 of the row."""
    array_dtype: str = "float32"
    """float32, or float64 as `float_dtype` says."""

    @property
    def vector_width(self) -> int:
        """Floats of a row that hold the vector."""
        return num_words(self.dim) if self.vector_dtype == "bfloat16" else self.dim

    @property
    def width(self) -> int:
        """W"""
        return self.vector_width + sum(math.prod(shape) for shape in self.shapes)


def row_layout(config: OptimizerConfig, dim: int, dtype: RowDtype = "float32") -> RowLayout:
    """Returns the layout of the rows of a table.

    Args:
        config: How rows learn.
        dim: D.
        dtype: Type of the vector; the optimizer's state is float32 always.

    Raises:
        ValueError: The optimizer cannot work row by row.
    """
    if config.name in _NOT_PER_ROW:
        raise ValueError(f"OptimizerConfig.name: optax.{config.name} cannot update rows: {_NOT_PER_ROW[config.name]}")
    array_dtype = "float32" if dtype == "bfloat16" else str(float_dtype())
    leaves = jax.tree.leaves(jax.eval_shape(make_optimizer(config).init, jax.ShapeDtypeStruct((dim,), array_dtype)))
    for leaf in leaves:
        if str(leaf.dtype) not in (array_dtype, "float32", "int32"):
            raise ValueError(f"OptimizerConfig.name: optax.{config.name} keeps {leaf.dtype} state, rows hold {array_dtype}")
    shapes = tuple(leaf.shape for leaf in leaves)
    return RowLayout(config, dim, shapes, tuple(str(leaf.dtype) for leaf in leaves), dtype, array_dtype)


def vectors_of(layout: RowLayout, rows: jax.Array) -> jax.Array:
    """Returns the vectors [..., D] of rows [..., W]."""
    words = rows[..., : layout.vector_width]
    return numbers_of(words, layout.dim) if layout.vector_dtype == "bfloat16" else words


def _packed(layout: RowLayout, vectors: jax.Array, state: Any, noise: jax.Array | None = None) -> jax.Array:
    if layout.vector_dtype == "bfloat16":
        words = nearest_words(vectors) if noise is None else stochastic_words(vectors, noise)
    else:
        words = vectors
    # Integers (counts) are exact in float32 up to 2^24.
    leaves = zip(jax.tree.leaves(state), layout.shapes, strict=True)
    flat = [leaf.reshape(vectors.shape[0], math.prod(shape)).astype(layout.array_dtype) for leaf, shape in leaves]
    return jnp.concatenate([words, *flat], axis=1)


def _unpacked(layout: RowLayout, rows: jax.Array) -> tuple[jax.Array, Any]:
    leaves, start = [], layout.vector_width
    for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
        size = math.prod(shape)
        leaves.append(rows[:, start : start + size].reshape(rows.shape[0], *shape).astype(dtype))
        start += size
    vector = jax.ShapeDtypeStruct((layout.dim,), layout.array_dtype)
    tree = jax.tree.structure(jax.eval_shape(make_optimizer(layout.config).init, vector))
    return vectors_of(layout, rows), jax.tree.unflatten(tree, leaves)


def first_rows(layout: RowLayout, vectors: jax.Array) -> jax.Array:
    """Returns new rows [V, W]: these vectors [V, D], rounded to the nearest, with the optimizer's initial state for each."""
    vectors = vectors.astype(layout.array_dtype)
    return _packed(layout, vectors, jax.vmap(make_optimizer(layout.config).init)(vectors))


def updated_rows(
    layout: RowLayout, rows: jax.Array, gradients: jax.Array, rate: jax.Array, noise: jax.Array | None = None
) -> jax.Array:
    """Returns rows [V, W] after one update.

    Args:
        layout: Layout of the rows.
        rows: [V, W].
        gradients: [V, D], of the loss, summed over all occurrences of a row in the batch.
        rate: Learning rate, scalar.
        noise: Random bits by which bfloat16 vectors are rounded, uint32 [V, vector_width]; None: to the nearest.
    """
    vectors, state = _unpacked(layout, rows)
    gradients = gradients.astype(layout.array_dtype)
    updates, state = jax.vmap(make_optimizer(layout.config).update)(gradients, state, vectors)
    vectors = apply_updates(layout.config, vectors, updates, rate)
    if layout.config.group_lasso:
        vectors = shrunk_rows(vectors, (rate * layout.config.group_lasso).astype(vectors.dtype))
    return _packed(layout, vectors, state, noise)
