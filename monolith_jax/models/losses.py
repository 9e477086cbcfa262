"""Logits to scores and to one loss over all heads.

In: logits [B, T], labels and masks [B, T]. Out: scores (probabilities, or the expected play ratio) and a scalar loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from monolith_jax.tables.update import float_dtype


@dataclass(frozen=True)
class HeadConfig:
    """One thing that the model predicts."""

    label: str
    """What: a key of `stream.events.DERIVED_LABELS` (complete, skip, play_ratio, ...) or a column (like, share, ...)."""
    kind: Literal["binary", "regression"] = "binary"
    """binary: probability, by cross-entropy. regression: expected value of a label >= 0, by squared error. Play time is
    predicted as `play_ratio`: expected ratio times duration is unbiased, and long videos do not rule the loss."""
    base_rate: float = 0.5
    """Mean label that predictions start from: a rare action need not first learn that it is rare."""
    loss_weight: float = 1.0
    """Weight in the sum over the heads."""


def offsets(heads: Sequence[HeadConfig]) -> jax.Array:
    """Returns what is added to the model's logits, float32 [T]: where each head predicts its base rate.

    Raises:
        ValueError: A base rate that the kind of head cannot predict.
    """
    values = []
    for head in heads:
        if not 0 < head.base_rate or (head.kind == "binary" and head.base_rate >= 1):
            raise ValueError(f"HeadConfig.base_rate of {head.label!r} must be above 0 (binary: below 1), got {head.base_rate}")
        odds = head.base_rate / (1 - head.base_rate) if head.kind == "binary" else math.expm1(head.base_rate)
        values.append(math.log(odds))
    return jnp.asarray(values, float_dtype())


def scores(logits: jax.Array, heads: Sequence[HeadConfig]) -> jax.Array:
    """Returns predictions, float32 [B, T]: sigmoid for binary heads, softplus for regression."""
    binary = jnp.asarray([head.kind == "binary" for head in heads])
    return jnp.where(binary, jax.nn.sigmoid(logits), jax.nn.softplus(logits))


def multi_task_loss(logits: jax.Array, labels: jax.Array, masks: jax.Array, heads: Sequence[HeadConfig]) -> jax.Array:
    """Returns the sum over heads of weight times mean loss, a float32 scalar.

    The mean is over the whole batch, undefined labels and padding counting 0, so an example weighs the same in every batch.

    Args:
        logits: float32 [B, T].
        labels: float32 [B, T].
        masks: float32 [B, T], the example's weight where the label is defined, 0 elsewhere.
        heads: T heads.
    """
    labels, masks = labels.astype(logits.dtype), masks.astype(logits.dtype)
    losses = []
    for task, head in enumerate(heads):
        if head.kind == "binary":
            of_head = optax.sigmoid_binary_cross_entropy(logits[:, task], labels[:, task])
        else:
            of_head = jnp.square(jax.nn.softplus(logits[:, task]) - labels[:, task])
        losses.append(head.loss_weight * jnp.mean(of_head * masks[:, task]))
    return jnp.stack(losses).sum()
