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
    negative_rate: float = 1.0
    """Share r of the negatives of this label that the stream keeps, each with weight 1 / r. This head's loss takes logit - ln r
    in place of that weight, so that predictions are of the whole stream (Wang et al., Nonuniform Negative Sampling and Log Odds
    Correction, NeurIPS 2021). Binary heads; a run with a joiner sets it where `JoinerConfig.positive` names the label."""
    early_negatives: bool = False
    """Whether each positive was first seen as a negative (`JoinerConfig.emit` 'at_once', which sets it for actions). The stream
    then shows p / (1 + p); the loss takes log sigmoid(logit), its log-odds, so that predictions are p (the fake negative
    calibration of Ktena et al., Addressing Delayed Feedback, RecSys 2019). Binary heads."""


def check_heads(heads: Sequence[HeadConfig]) -> None:
    """Raises ValueError where a correction is not one that the head can take."""
    for head in heads:
        if not 0 < head.negative_rate <= 1:
            raise ValueError(
                f"HeadConfig.negative_rate of {head.label!r} must be above 0 and at most 1, got {head.negative_rate}"
            )
        if head.kind != "binary" and (head.negative_rate < 1 or head.early_negatives):
            raise ValueError(
                f"HeadConfig {head.label!r} is no binary head: negative_rate and early_negatives do not apply to it"
            )


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
    binary = jnp.asarray([head.kind == "binary" for head in heads], jnp.bool_)
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
    if not heads:
        return jnp.zeros((), float_dtype())
    labels, masks = labels.astype(logits.dtype), masks.astype(logits.dtype)
    losses = []
    for task, head in enumerate(heads):
        logit, label, mask = logits[:, task], labels[:, task], masks[:, task]
        if head.kind == "binary":
            if head.early_negatives:
                logit = jax.nn.log_sigmoid(logit)
            if head.negative_rate < 1:
                logit = logit - math.log(head.negative_rate)
                mask = jnp.where(label > 0, mask, mask * head.negative_rate)
            of_head = optax.sigmoid_binary_cross_entropy(logit, label)
        else:
            of_head = jnp.square(jax.nn.softplus(logit) - label)
        losses.append(head.loss_weight * jnp.mean(of_head * mask))
    return jnp.stack(losses).sum()
