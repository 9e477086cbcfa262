"""Scores and losses against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monolith_jax.models.losses import HeadConfig, check_heads, multi_task_loss, offsets, scores

HEADS = (
    HeadConfig("complete", base_rate=0.2),
    HeadConfig("play_ratio", "regression", base_rate=0.7, loss_weight=0.3),
    HeadConfig("like", loss_weight=2.0),
)


def draw(number: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(number, 3)) * 4
    labels = np.stack([rng.random(number) < 0.3, rng.random(number) * 3, rng.random(number) < 0.5], 1)
    masks = rng.random((number, 3)) * (rng.random((number, 3)) < 0.8)
    return logits.astype(np.float32), labels.astype(np.float32), masks.astype(np.float32)


def test_loss_is_the_weighted_mean_over_the_batch() -> None:
    logits, labels, masks = draw()
    x, y = logits.astype(np.float64), labels.astype(np.float64)
    p = 1 / (1 + np.exp(-x))
    entropy = -(y * np.log(p) + (1 - y) * np.log1p(-p))
    squares = (np.log1p(np.exp(x)) - y) ** 2
    each = np.stack([entropy[:, 0], 0.3 * squares[:, 1], 2.0 * entropy[:, 2]], 1)
    got = multi_task_loss(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(masks), HEADS)
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, (each * masks).sum(1).mean(), rtol=1e-5)


def test_what_is_masked_has_no_say() -> None:
    logits, labels, masks = (jnp.asarray(one) for one in draw())
    gradients = jax.grad(multi_task_loss)(logits, labels, masks, HEADS)
    assert np.array_equal(np.asarray(gradients) != 0, np.asarray(masks) != 0)
    other = jnp.where(masks > 0, labels, 1 - labels)
    assert multi_task_loss(logits, labels, masks, HEADS) == multi_task_loss(logits, other, masks, HEADS)


def test_padding_does_not_change_the_weight_of_an_example() -> None:
    logits, labels, masks = draw(8)
    loss = multi_task_loss(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(masks), HEADS)
    logits, labels, masks = (np.concatenate([one, np.zeros_like(one)]) for one in (logits, labels, masks))
    padded = multi_task_loss(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(masks), HEADS)
    np.testing.assert_allclose(padded, loss / 2, rtol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = jnp.asarray([[1e4, 1e4, -1e4], [-1e4, -1e4, 1e4]])
    ones = jnp.ones((2, 3))
    loss, gradients = jax.value_and_grad(multi_task_loss)(logits, jnp.zeros((2, 3)), ones, HEADS)
    assert np.isfinite(loss) and np.isfinite(np.asarray(gradients)).all()
    assert np.isfinite(np.asarray(scores(logits, HEADS))).all()


def test_predictions_start_at_the_base_rates() -> None:
    start = scores(jnp.zeros((1, 3)) + offsets(HEADS), HEADS)
    np.testing.assert_allclose(start[0], [0.2, 0.7, 0.5], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, 1.5])
def test_base_rates_that_cannot_be_predicted_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"HeadConfig.base_rate of 'like' must be above 0 \(binary: below 1\)"):
        offsets([HeadConfig("like", base_rate=rate)])


def test_base_rate_of_a_regression_may_exceed_one() -> None:
    head = HeadConfig("play_ratio", "regression", base_rate=2.5)
    np.testing.assert_allclose(scores(jnp.zeros((1, 1)) + offsets([head]), [head]), [[2.5]], rtol=1e-6)


def least(labels: list[float], masks: list[float], head: HeadConfig) -> float:
    """Returns the probability that has the least loss, found by Newton's method."""
    y, mask = jnp.asarray(labels)[:, None], jnp.asarray(masks)[:, None]

    def loss(logit: jax.Array) -> jax.Array:
        return multi_task_loss(jnp.full(y.shape, logit), y, mask, [head])

    slope, curve = jax.jit(jax.grad(loss)), jax.jit(jax.grad(jax.grad(loss)))
    logit = jnp.asarray(-1.0)
    for _ in range(30):
        logit -= slope(logit) / curve(logit)
    return float(scores(logit[None, None], [head])[0, 0])


def test_sampled_negatives_do_not_move_predictions() -> None:
    # Of 80 positives and 920 negatives, a tenth of the negatives is kept, each with weight 10.
    labels, masks = [1.0] * 80 + [0.0] * 92, [1.0] * 80 + [10.0] * 92
    assert least(labels, masks, HeadConfig("click", negative_rate=0.1)) == pytest.approx(0.08, rel=1e-4)
    assert least(labels, masks, HeadConfig("like")) == pytest.approx(0.08, rel=1e-4)
    assert least(labels, [1.0] * 172, HeadConfig("click")) > 0.4


def test_early_negatives_do_not_move_predictions() -> None:
    # Each of 1,000 impressions is a negative first; 80 of them become positives later.
    labels = [0.0] * 1000 + [1.0] * 80
    assert least(labels, [1.0] * 1080, HeadConfig("like", early_negatives=True)) == pytest.approx(0.08, rel=1e-4)
    assert least(labels, [1.0] * 1080, HeadConfig("like")) == pytest.approx(80 / 1080, rel=1e-4)


@pytest.mark.parametrize(
    "head, match",
    [
        (HeadConfig("like", negative_rate=0.0), "negative_rate of 'like' must be above 0"),
        (HeadConfig("play_ratio", "regression", early_negatives=True), "'play_ratio' is no binary head"),
    ],
)
def test_corrections_that_do_not_apply_are_refused(head: HeadConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_heads([head])
