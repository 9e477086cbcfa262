"""Copies of what CPU devices hold: equal, apart from what they were made of, in memory that is used again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monolith_jax.host_copy import HostCopies, on_cpu
from monolith_jax.mesh import REPLICATED, ROWS, MeshConfig, make_mesh, sharding


def make_tree(value: float) -> dict[str, Any]:
    mesh = make_mesh(MeshConfig(num_devices=8, num_shards=8))
    return {
        "split": jax.device_put(np.full((8, 5, 3), value, np.float32), sharding(mesh, ROWS)),
        "whole": jax.device_put(np.full((7,), value, np.float32), sharding(mesh, REPLICATED)),
        "few": [jnp.int32(value), (), None, jnp.full((3,), value, jnp.bfloat16), jnp.zeros((0, 2)), jnp.ones(3, bool)],
    }


def addresses(tree: Any) -> list[int]:
    return [part.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for part in leaf.addressable_shards]


def assert_equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("prepared", [False, True])
def test_a_copy_stays_when_what_it_was_made_of_changes_in_place(prepared: bool) -> None:
    copies, tree = HostCopies(), make_tree(2)
    # Made by a program: memory that numpy happens to share with a device is not written to in place.
    tree["split"] = jax.block_until_ready(jax.jit(lambda array: array + 0)(tree["split"]))
    before = addresses(tree["split"])
    if prepared:
        copies.prepare(tree)
    with jax.transfer_guard("disallow"):
        copy = copies.copy(tree)
    assert_equal(copy, make_tree(2))
    assert not set(addresses(copy["split"])) & set(before)
    tree["split"] = jax.block_until_ready(jax.jit(lambda array: array.at[:, 1].add(1.0), donate_argnums=0)(tree["split"]))
    assert addresses(tree["split"]) == before, "a copy that shares memory would make the step copy its table"
    assert_equal(copy, make_tree(2))


def test_memory_is_used_again() -> None:
    copies = HostCopies()
    first = addresses(copies.copy(make_tree(1))["split"])
    second = copies.copy(make_tree(3))
    assert addresses(second["split"]) == first
    assert_equal(second, make_tree(3))


def test_what_is_here_on_cpu_devices() -> None:
    assert on_cpu(make_tree(0)) and on_cpu({})
