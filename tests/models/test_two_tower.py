"""The two-tower: its vectors, whichever layout they are computed by, and its loss against numpy."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monolith_jax.features import DenseFeatureConfig, FeatureLayout, IdFeatureConfig, feature_layout, restricted
from monolith_jax.models.losses import HeadConfig
from monolith_jax.models.mmoe import MMoEConfig
from monolith_jax.models.towers import forward, make_towers, named_weights, user_vectors, video_vectors
from monolith_jax.models.two_tower import TwoTowerConfig, retrieval_loss
from monolith_jax.types import Retrieval

FEATURES = (
    IdFeatureConfig(name="video", column="video_id", table="video"),
    IdFeatureConfig(name="history", column="history", table="video", max_length=4, combiner="mean"),
    DenseFeatureConfig(name="content", column="content", size=3),
    IdFeatureConfig(name="history_action", column="history_action", table="action", max_length=4, combiner="mean"),
    IdFeatureConfig(name="tag", column="tag", table="tag", max_length=3, combiner="sqrtn", weight_column="tag_weight"),
    IdFeatureConfig(name="user", column="user_id", table="user"),
    DenseFeatureConfig(name="age", column="age"),
)
GROUPS = (("video", "user"), ("action", "tag"))
DIMS = (6, 2)
CONFIG = TwoTowerConfig(
    user_features=("age", "user", "history", "history_action"),
    video_features=("content", "video", "tag"),
    attention=("history", "history_action"),
    dim=8,
    user_hidden=(16,),
    video_hidden=(),
)


def layout() -> FeatureLayout:
    return feature_layout(FEATURES, GROUPS)


def drawn(number: int, seed: int = 0) -> tuple[list[Any], list[Any], list[Any], Any]:
    """Returns vectors, valid, list weights and dense values of examples."""
    rng, of = np.random.default_rng(seed), layout()
    vectors, valid = [], []
    for group, dim in enumerate(DIMS):
        shape = (number, of.num_positions(group))
        there = rng.random(shape) < 0.7
        vectors.append(jnp.asarray(rng.normal(size=(*shape, dim)) * there[:, :, None], jnp.float32))
        valid.append(jnp.asarray(there))
    weights = [None, jnp.asarray(rng.random(vectors[1].shape[:2]), jnp.float32)]
    return vectors, valid, weights, jnp.asarray(rng.normal(size=(number, of.num_dense)), jnp.float32)


def taken(names: tuple[str, ...], inputs: Any) -> tuple[FeatureLayout, Any]:
    """Returns the layout of some features, and the inputs as they are laid out by it."""
    whole, part = layout(), restricted(layout(), names)
    vectors, valid, weights, dense = inputs
    places = []
    for of_whole, of_part in zip(whole.groups, part.groups, strict=True):
        starts = {slot.feature: slot.start for slot in of_whole}
        places.append([starts[slot.feature] + k for slot in of_part for k in range(slot.length)])
    columns, at = [], 0
    for feature in whole.features:
        if isinstance(feature, DenseFeatureConfig):
            columns += list(range(at, at + feature.size)) if feature.name in names else []
            at += feature.size
    pick = [np.array(of_group, np.int64) for of_group in places]
    some = [None if one is None else one[:, p] for one, p in zip(weights, pick, strict=True)]
    of_group = ([one[:, p] for one, p in zip(many, pick, strict=True)] for many in (vectors, valid))
    return part, (*of_group, some, dense[:, np.array(columns, np.int64)])


def test_vectors_are_the_same_by_every_layout_and_of_length_1() -> None:
    towers, weights = make_towers(None, layout(), DIMS, (), 0, CONFIG)
    pure, inputs = nnx.to_pure_dict(weights), drawn(5)
    for of, names in ((user_vectors, CONFIG.user_features), (video_vectors, CONFIG.video_features)):
        whole = of(towers, pure, layout(), *inputs)
        part, of_part = taken(names, inputs)
        np.testing.assert_allclose(of(towers, pure, part, *of_part), whole, rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
        assert whole.shape == (5, 8) and np.ptp(np.asarray(whole), axis=0).min() > 1e-3
    assert forward(towers, pure, *inputs).shape == (5, 0)


def test_each_tower_sees_its_own_features_only() -> None:
    towers, weights = make_towers(None, layout(), DIMS, (), 0, CONFIG)
    pure, (vectors, valid, of_lists, dense) = nnx.to_pure_dict(weights), drawn(3)

    def touched(of: Any) -> set[str]:
        """Returns the features with a gradient."""

        def total(seen: Any, dense: Any) -> Any:
            return (of(towers, pure, layout(), seen, valid, of_lists, dense) * jnp.arange(8.0)).sum()

        by_vectors, by_dense = jax.grad(total, argnums=(0, 1))(vectors, dense)
        names = {slot.feature for group, slots in enumerate(layout().groups) for slot in slots
                 if np.abs(by_vectors[group][:, slot.start : slot.start + slot.length]).max() > 0}  # fmt: skip
        return names | {
            name for name, part in (("content", by_dense[:, :3]), ("age", by_dense[:, 3:])) if np.abs(part).max() > 0
        }

    assert touched(user_vectors) == set(CONFIG.user_features)
    assert touched(video_vectors) == set(CONFIG.video_features)


def test_who_has_no_history_or_is_unknown_has_a_direction() -> None:
    towers, weights = make_towers(None, layout(), DIMS, (), 0, CONFIG)
    pure, (vectors, valid, of_lists, dense) = nnx.to_pure_dict(weights), drawn(2)
    nothing = [jnp.zeros_like(one) for one in vectors], [jnp.zeros_like(one) for one in valid], of_lists, jnp.zeros_like(dense)
    unknown = user_vectors(towers, pure, layout(), *nothing)
    np.testing.assert_allclose(np.linalg.norm(unknown, axis=1), 1, rtol=1e-5)
    # What lies at empty places of the lists does not matter.
    slots = {slot.feature: slot for slot in layout().groups[0]}
    start, end = slots["history"].start, slots["history"].start + slots["history"].length
    empty = [valid[0].at[:, start:end].set(False), valid[1]]
    first = user_vectors(towers, pure, layout(), vectors, empty, of_lists, dense)
    moved = [vectors[0].at[:, start:end].add(1.0), vectors[1]]
    np.testing.assert_array_equal(user_vectors(towers, pure, layout(), moved, empty, of_lists, dense), first)
    assert np.abs(user_vectors(towers, pure, layout(), moved, valid, of_lists, dense) - first).max() > 1e-3


def test_attention_weighs_items_by_what_they_are() -> None:
    towers, weights = make_towers(None, layout(), DIMS, (), 0, CONFIG)
    pure = nnx.to_pure_dict(weights)
    vectors, _, of_lists, dense = drawn(4)
    everything = [jnp.ones(one.shape[:2], bool) for one in vectors]
    before = user_vectors(towers, pure, layout(), vectors, everything, of_lists, dense)
    pure["retrieval"]["user"]["place"] = jnp.asarray([50.0, 0, 0, 0])
    newest = user_vectors(towers, pure, layout(), vectors, everything, of_lists, dense)
    only = [one.copy() for one in everything]
    for group, slots in enumerate(layout().groups):
        for slot in slots:
            if slot.feature.startswith("history"):
                only[group] = only[group].at[:, slot.start + 1 : slot.start + slot.length].set(False)
    np.testing.assert_allclose(user_vectors(towers, pure, layout(), vectors, only, of_lists, dense), newest, atol=1e-5)
    assert np.abs(newest - before).max() > 1e-3


def test_summed_vectors_are_added_before_the_length_is_1() -> None:
    summed = dataclasses.replace(
        CONFIG, dim=6, user_features=("history", "user"), attention=(), video_hidden=(5,), summed=("history", "video", "user")
    )
    towers, weights = make_towers(None, layout(), DIMS, (), 0, summed)
    pure, inputs = nnx.to_pure_dict(weights), drawn(5)
    vectors, valid, of_lists, dense = (jax.tree.map(np.asarray, one) for one in inputs)
    slots = {slot.feature: slot for of_group in layout().groups for slot in of_group}

    def at(name: str, of: Any) -> Any:
        return of[:, slots[name].start : slots[name].start + slots[name].length]

    there = at("history", valid[0])[:, :, None]
    history = (at("history", vectors[0]) * there).sum(1) / np.maximum(there.sum(1), 1)
    # The user's tower has no other features: no layers, one vector for all.
    of_user = history + at("user", vectors[0])[:, 0] + pure["retrieval"]["user"]["centre"]
    assert pure["retrieval"]["user"].keys() == {"centre"}
    tag = (at("tag", vectors[1]) * at("tag", of_lists[1])[:, :, None]).sum(1) / np.sqrt(
        np.maximum(at("tag", valid[1]).sum(1), 1)
    )[:, None]
    layers = pure["retrieval"]["video"]["mlp"]["layers"]
    hidden = np.maximum(np.concatenate([tag, dense[:, :3]], 1) @ layers[0]["kernel"] + layers[0]["bias"], 0)
    of_video = hidden @ layers[1]["kernel"] + layers[1]["bias"] + at("video", vectors[0])[:, 0]
    for of, expected in ((user_vectors, of_user), (video_vectors, of_video)):
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(of(towers, pure, layout(), *inputs), expected, rtol=1e-5, atol=1e-6)
    nothing = [jnp.zeros_like(one) for one in inputs[0]], [jnp.zeros_like(one) for one in inputs[1]], inputs[2], inputs[3]
    unknown = user_vectors(towers, pure, layout(), *nothing)
    np.testing.assert_allclose(np.linalg.norm(unknown, axis=1), 1, rtol=1e-5)


def test_the_ranker_keeps_its_names_and_its_first_weights_beside_a_two_tower() -> None:
    heads = (HeadConfig("like"), HeadConfig("skip"))
    alone, without = make_towers(MMoEConfig(), layout(), DIMS, heads, 3)
    both, with_two = make_towers(MMoEConfig(), layout(), DIMS, heads, 3, CONFIG)
    of_alone, of_both = named_weights(nnx.to_pure_dict(without)), named_weights(nnx.to_pure_dict(with_two))
    assert {name for name in of_both if not name.startswith("retrieval/")} == of_alone.keys() < of_both.keys()
    for name, weight in of_alone.items():
        np.testing.assert_array_equal(weight, of_both[name])
    inputs = drawn(4)
    logits = forward(both, nnx.to_pure_dict(with_two), *inputs)
    np.testing.assert_array_equal(logits, forward(alone, nnx.to_pure_dict(without), *inputs))
    with pytest.raises(ValueError, match="no two-tower"):
        user_vectors(alone, nnx.to_pure_dict(without), layout(), *inputs)


def oracle(users: Any, own: Any, own_q: Any, own_key: Any, videos: Any, seen: Retrieval, temperature: float) -> tuple[Any, ...]:
    """The loss, its hits and weight, example by example in float64."""
    total = hits = 0.0
    for b, weight in enumerate(np.asarray(seen.weight, np.float64)):
        if weight == 0:
            continue
        raw = float(users[b] @ own[b]) / temperature
        terms, better = [raw - own_q[b]], set()
        for r, log_q in enumerate(np.asarray(seen.log_q, np.float64)):
            if np.isinf(log_q) or seen.key[r] == own_key[b]:
                continue
            score = float(users[b] @ videos[r]) / temperature
            terms.append(score - log_q)
            better |= {int(seen.key[r])} if score > raw else set()
        largest = max(terms)
        total += weight * (largest + np.log(np.exp(np.array(terms) - largest).sum()) - terms[0])
        hits += weight * (len(better) < 10)
    return total / len(seen.weight), hits, float(np.sum(seen.weight))


def candidates(seed: int, number: int = 24, negatives: int = 12, distinct: int = 15) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(number + distinct, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    video = rng.integers(0, distinct, number + negatives)
    users, videos = vectors[:number], vectors[number:][video]
    log_q = rng.normal(-1.0, 2.0, distinct)[video]
    log_q[rng.random(log_q.size) < 0.2] = np.inf
    weight = rng.random(number) * (rng.random(number) < 0.6) * np.isfinite(log_q[:number])
    seen = Retrieval(weight.astype(np.float32), log_q.astype(np.float32), (video * 77).astype(np.uint32))
    return users, videos[:number], seen.log_q[:number], seen.key[:number], videos, seen


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_loss_equals_numpy(seed: int, temperature: float) -> None:
    users, own, own_q, own_key, videos, seen = candidates(seed)
    found = retrieval_loss(jnp.asarray(users), jnp.asarray(own), own_q, own_key, jnp.asarray(videos), seen, temperature)
    expected = oracle(users, own, own_q, own_key, videos, seen, temperature)
    assert expected[0] > 0 and 0 < expected[1] < expected[2]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_loss_of_a_batch_without_candidates_or_queries_teaches_nothing() -> None:
    users, own, own_q, own_key, videos, seen = candidates(0)
    for one in (
        seen._replace(weight=np.zeros_like(seen.weight)),
        seen._replace(log_q=np.full_like(seen.log_q, np.inf)),
    ):
        loss = partial(retrieval_loss, own_log_q=own_q, own_key=own_key, seen=one, temperature=0.1)

        def total(users: Any, own: Any, videos: Any, loss: Any = loss) -> Any:
            return loss(users, own, videos_RD=videos).loss

        value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*map(jnp.asarray, (users, own, videos)))
        assert value == 0 and not any(np.asarray(gradient).any() for gradient in gradients)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"user_features": ()}, "user_features must name"),
        ({"user_features": ("nobody",)}, "there is no feature nobody"),
        ({"video_features": ("video", "age")}, "age cannot be the user's and the video's"),
        ({"attention": ("tag",)}, "not among user_features"),
        ({"attention": ("history", "user")}, "of one max_length"),
        ({"summed": ("nobody",)}, "nobody, which is among neither tower's"),
        ({"summed": ("history",)}, "history cannot be in attention and in summed"),
        ({"summed": ("content",)}, "'content' has no one vector"),
        ({"summed": ("video",)}, "'video' have 6 floats and TwoTowerConfig.dim is 8"),
        ({"positives": ("like", "share")}, "a number above 0 for each"),
        ({"positive_weights": (0.0,)}, "a number above 0 for each"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"pool_size": 0}, "pool_size must be at least 1"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_towers(None, layout(), DIMS, (), 0, dataclasses.replace(CONFIG, **fields))


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"neither a ranker nor a two-tower"):
        make_towers(None, layout(), DIMS, (), 0)
    with pytest.raises(ValueError, match=r"heads are the ranker's"):
        make_towers(None, layout(), DIMS, (HeadConfig("like"),), 0, CONFIG)


def test_the_correction_keeps_frequent_videos_from_being_pushed_down() -> None:
    # All users are alike: what is to be learned is how often each video is the positive.
    videos, batch, drawn, temperature = 60, 64, 16, 0.2
    shares = 1 / np.arange(1, videos + 1)
    shares /= shares.sum()
    log_q = np.log(batch * shares + drawn / videos)
    rng = np.random.default_rng(0)

    def slope(corrected: bool) -> float:
        """Returns by how much the learned logits rise with the log of the share."""

        def loss(weights: Any, number: Any, of_rows: Any) -> Any:
            user, table = (one / jnp.linalg.norm(one, axis=-1, keepdims=True) for one in weights)
            seen = Retrieval(jnp.ones(batch), of_rows, number.astype(jnp.uint32))
            own = table[number[:batch]]
            users = jnp.broadcast_to(user, own.shape)
            return retrieval_loss(users, own, of_rows[:batch], seen.key[:batch], table[number], seen, temperature).loss

        weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8,), (videos, 8))]
        gradient = jax.jit(jax.grad(loss))
        for step in range(1500):
            number = np.concatenate([rng.choice(videos, batch, p=shares), rng.integers(0, videos, drawn)]).astype(np.int32)
            of_rows = log_q[number] if corrected else np.zeros(number.size)
            moved = gradient(weights, number, of_rows.astype(np.float32))
            rate = 0.3 * (1 - step / 1500)
            weights = [one - rate * change for one, change in zip(weights, moved, strict=True)]
        user, table = (np.asarray(one / jnp.linalg.norm(one, axis=-1, keepdims=True)) for one in weights)
        return float(np.polyfit(np.log(shares), table @ user / temperature, 1)[0])

    assert slope(True) == pytest.approx(1, abs=0.15)
    assert slope(False) < 0.6
