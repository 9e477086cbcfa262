"""What crosses between the devices, and how many bytes of it.

In: on each device blocks [S, U, D], block s for device s. Out: the blocks [S, U, D] that the others had for it. Sent are whole
blocks (`all_to_all`) or only what is in them (`ragged_all_to_all`, into the same places, so that plans are the same).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from monolith_jax.mesh import MODEL, SHARD
from monolith_jax.tables.half_words import nearest_words, num_words, numbers_of
from monolith_jax.types import GroupPlan

_AXES = (SHARD, MODEL)


@dataclass(frozen=True)
class WireConfig:
    """How vectors and gradients cross between devices."""

    kind: Literal["padded", "ragged"] = "padded"
    """padded: blocks of one size, on every backend; ragged: only what is in them, not on CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: half the bytes; vectors and gradients are rounded on the way, sums stay as they are. Vectors of a table of
    bfloat16 lose nothing by it."""


PADDED = WireConfig()


class RaggedSizes(NamedTuple):
    """The index arguments of `jax.lax.ragged_all_to_all` on one device, each int32 [S]."""

    input_offsets: Any
    send_sizes: Any
    output_offsets: Any
    recv_sizes: Any


def check_wire(wire: WireConfig, mesh: Mesh) -> None:
    """Refuses what the devices cannot do.

    Raises:
        ValueError: `ragged` on CPU devices.
    """
    # An abstract mesh has no devices: lowering for others than those here is allowed.
    if wire.kind == "ragged" and isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu":
        raise ValueError(
            "WireConfig.kind is 'ragged', but XLA has no ragged_all_to_all for CPU devices; use 'padded' here, it gives "
            "the same results"
        )


def ragged_sizes(device: Any, to_others: Any, from_others: Any, size: int) -> RaggedSizes:
    """Returns the arguments by which the filled part of each block goes where `all_to_all` would bring it.

    Args:
        device: Index of this device.
        to_others: int32 [S], how many of each of its blocks are filled.
        from_others: int32 [S], how many each device fills of the block for this one.
        size: U, the stride of blocks on both sides.
    """
    number = to_others.shape[0]
    starts = np.arange(number, dtype=np.int32) * np.int32(size)
    # The block lies on each receiver at the sender's number.
    there = np.zeros(number, np.int32) + device * np.int32(size)
    return RaggedSizes(starts, to_others, there, from_others)


def swap_blocks(blocks: jax.Array, num_sent: jax.Array, to_owners: bool, wire: WireConfig) -> jax.Array:
    """Returns what the other devices had for this one, [S, U, D]; inside `jax.shard_map` over all devices.

    Args:
        blocks: [S, U, D], for each device.
        num_sent: int32 [S], how many vectors this device as an owner sends to each slice: its row of `GroupPlan.num_sent`.
        to_owners: Whether slices send to owners (gradients) or owners to slices (vectors).
        wire: How.
    """
    words = nearest_words(blocks) if wire.dtype == "bfloat16" else blocks
    if wire.kind == "padded":
        received = jax.lax.all_to_all(words, _AXES, 0, 0)
    else:
        # A device is given what it sends as an owner; what it gets as a slice it hears from the owners.
        here, there = num_sent, jax.lax.all_to_all(num_sent, _AXES, 0, 0, tiled=True)
        to_others, from_others = (there, here) if to_owners else (here, there)
        sizes = ragged_sizes(jax.lax.axis_index(_AXES), to_others, from_others, words.shape[1])
        flat = words.reshape(-1, words.shape[2])
        arguments = [jnp.asarray(one) for one in sizes]
        received = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), *arguments, axis_name=_AXES).reshape(words.shape)
    if wire.dtype == "bfloat16":
        return numbers_of(received, blocks.shape[2]).astype(blocks.dtype)
    return received


class ExchangedBytes(NamedTuple):
    """Bytes that a step hands over in one group, vectors and gradients together, what stays on its device counted in."""

    padded: int
    ragged: int
    """With the sizes that tell of it, which are exchanged before."""
    floor: int
    """Sum over devices of the distinct ids in their slice of the batch that have a row, times D and the bytes of a number."""


def vector_bytes(dim: int, wire: WireConfig) -> tuple[int, int]:
    """Returns the bytes of a vector [D] on the wire, and what its numbers alone take: two share a word in bfloat16."""
    return (4 * num_words(dim), 2 * dim) if wire.dtype == "bfloat16" else (4 * dim, 4 * dim)


def exchanged_bytes(plan: GroupPlan, dim: int, wire: WireConfig = PADDED) -> ExchangedBytes:
    """Returns the bytes of one step, both ways, for either kind of exchange.

    Args:
        plan: Of a group, for all devices.
        dim: D of the group.
        wire: Its `dtype` is looked at, not its kind.
    """
    (of_vector, least), number = vector_bytes(dim, wire), int(np.asarray(plan.num_sent).sum())
    of_sizes = 4 * plan.num_sent.shape[0] ** 2
    padded = 2 * plan.sent.shape[0] * plan.sent.shape[1] * plan.sent.shape[2] * of_vector
    return ExchangedBytes(padded, 2 * (number * of_vector + of_sizes), 2 * number * least)
