from collections.abc import Callable

import numpy as np
import pytest

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.ids.lines import first_bucket, second_bucket

LAYOUT = MapLayout(("user", "video"), (40, 40), 2)
Place = tuple[int, int, int]
"""Shard, line and slot of an id of the first table; the next slot is empty."""


def put(maps: IdMaps, ids: np.ndarray, table: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    return maps.lookup_or_insert(ids, table, np.full(ids.size, 5, np.uint32))


def assert_same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.shape == other[name].shape
        assert array.tobytes() == other[name].tobytes(), name


def _flip_row(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    state["lines"][shard, line, 8 + slot] += 1


def _negative_row(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    state["lines"][shard, line, 8 + slot] = 0x80000000


def _row_above_the_cap(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    state["lines"][shard, line, 8 + slot] = 2**30


def _empty_slot(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    state["lines"][shard, line, 8 + slot] = 0xFFFFFFFF


def _flip_hash(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    state["lines"][shard, line, 2 * slot] ^= 1


def _flip_time(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    state["lines"][shard, line, 12 + slot] ^= 1


def _two_top_bits(state: dict[str, np.ndarray], at: Place) -> None:
    # In a sum of products these two would cancel.
    state["lines"][at[0], at[1], 13:16:2] ^= np.uint32(1 << 31)


def _other_shard(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    state["lines"][shard, line, 2 * slot + 1] ^= 1 << 31


def _other_bucket(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    state["lines"][shard, line, 2 * slot] ^= 1 << 31


def _twice(state: dict[str, np.ndarray], at: Place) -> None:
    """An id that stands twice with a row each; all counts fit."""
    shard, line, slot = at
    _copy(state, at, (shard, line, slot + 1))


def _in_both_buckets(state: dict[str, np.ndarray], at: Place) -> None:
    shard, line, slot = at
    h, number = state["lines"][shard, line, :8].view(np.uint64)[slot], int(LAYOUT.num_buckets[0])
    (other,) = {first_bucket(h, number), second_bucket(h, number)} - {line}
    free = np.flatnonzero(state["lines"][shard, other, 8:12] == 0xFFFFFFFF)[0]
    _copy(state, at, (shard, other, int(free)))


def _copy(state: dict[str, np.ndarray], at: Place, to: Place) -> None:
    (shard, line, slot), (_, to_line, to_slot), lines = at, to, state["lines"]
    assert not state["used"][shard, 0] >> np.uint32(20) & np.uint32(1)
    lines[shard, to_line, 2 * to_slot : 2 * to_slot + 2] = lines[shard, line, 2 * slot : 2 * slot + 2]
    lines[shard, to_line, 8 + to_slot] = 20
    state["used"][shard, 0] |= np.uint32(1 << 20)
    state["counts"][shard, 0] += 1


def _swap_shards(state: dict[str, np.ndarray], at: Place) -> None:
    for array in state.values():
        array[:] = array[::-1].copy()


def _count_beyond(state: dict[str, np.ndarray], at: Place) -> None:
    state["counts"][0, 1] = -1


def _bit_above_the_cap(state: dict[str, np.ndarray], at: Place) -> None:
    state["used"][0, -1] |= np.uint32(1 << 31)


def _clear_bit(state: dict[str, np.ndarray], at: Place) -> None:
    state["used"][at[0], 0] &= state["used"][at[0], 0] - np.uint32(1)


def _another_bit(state: dict[str, np.ndarray], at: Place) -> None:
    _clear_bit(state, at)
    state["used"][at[0], 0] |= np.uint32(1 << 31)


def _move_count(state: dict[str, np.ndarray], at: Place) -> None:
    state["counts"][0, 0] += 1
    state["counts"][1, 0] -= 1


def _wild_cursor(state: dict[str, np.ndarray], at: Place) -> None:
    state["cursors"][1, 0] = 10_000


def _negative_cursor(state: dict[str, np.ndarray], at: Place) -> None:
    state["cursors"][1, 1] = -1


def _lack(state: dict[str, np.ndarray], at: Place) -> None:
    del state["used"]


def _other_type(state: dict[str, np.ndarray], at: Place) -> None:
    state["counts"] = state["counts"].astype(np.int64)


def _lack_checksums(state: dict[str, np.ndarray], at: Place) -> None:
    del state["checksums"]


CONTRADICTIONS = (
    *(
        _flip_row,
        _negative_row,
        _row_above_the_cap,
        _empty_slot,
        _other_shard,
        _other_bucket,
        _twice,
        _in_both_buckets,
        _swap_shards,
    ),
    *(_clear_bit, _another_bit, _bit_above_the_cap, _move_count, _count_beyond, _wild_cursor, _negative_cursor),
    *(_lack, _other_type),
)


def filled_state() -> dict[str, np.ndarray]:
    maps = IdMaps(LAYOUT)
    put(maps, np.arange(20), 0)
    put(maps, np.arange(8), 1)
    maps.erase(np.array([3, 4]), 1)
    return maps.get_state()


def seal(state: dict[str, np.ndarray]) -> None:
    """Makes the checksums right, so that something else must see the damage."""
    state["checksums"] = IdMaps(LAYOUT)._checksums(state["lines"])


def is_refused(state: dict[str, np.ndarray]) -> bool:
    other = IdMaps(LAYOUT)
    put(other, np.arange(3), 0)
    before = other.get_state()
    try:
        other.set_state(state)
    except ValueError as error:
        assert str(error).startswith("id maps of tables") or " lacks " in str(error)
        assert_same_state(other.get_state(), before)
        return True
    assert_same_state(other.get_state(), state)
    return False


def an_id(state: dict[str, np.ndarray]) -> Place:
    there = state["lines"][:, : LAYOUT.num_buckets[0], 8:12] != 0xFFFFFFFF
    shard, line, slot = np.argwhere(there[:, :, :3] & ~there[:, :, 1:])[3].tolist()
    return shard, line, slot


@pytest.mark.parametrize("damage", CONTRADICTIONS, ids=lambda damage: damage.__name__.strip("_"))
def test_a_state_that_contradicts_itself_is_refused(damage: Callable[..., None]) -> None:
    state = filled_state()
    seal(state)
    assert not is_refused(state)
    damage(state, an_id(state))
    seal(state)
    assert is_refused(state)


@pytest.mark.parametrize(
    "damage", [_flip_hash, _flip_time, _two_top_bits, _lack_checksums], ids=lambda damage: damage.__name__.strip("_")
)
def test_a_damage_that_fits_is_refused(damage: Callable[..., None]) -> None:
    state = filled_state()
    damage(state, an_id(state))
    assert is_refused(state)
    # Nothing but the checksums can see these.
    seal(state)
    assert not is_refused(state)


@pytest.mark.parametrize("name", ["lines", "used", "counts", "checksums"])
def test_every_changed_byte_is_refused(name: str) -> None:
    state = filled_state()
    data = state[name].reshape(-1).view(np.uint8)
    for place, change in enumerate(np.random.default_rng(0).integers(1, 256, data.size, np.uint8)):
        data[place] ^= change
        assert is_refused(state), place
        data[place] ^= change
    assert not is_refused(state)


def test_every_changed_byte_of_a_row_contradicts_the_rest() -> None:
    state = filled_state()
    data = state["lines"][:, :, 8:12].copy().view(np.uint8)
    for place in np.argwhere(data != 0xFF):
        for change in (1, 0x80, 0xFF ^ data[tuple(place)]):
            changed = data.copy()
            changed[tuple(place)] ^= np.uint8(change)
            state["lines"][:, :, 8:12] = changed.view(np.uint32)
            seal(state)
            assert is_refused(state), (place, change)
    state["lines"][:, :, 8:12] = data.view(np.uint32)
    seal(state)
    assert not is_refused(state)


def test_a_changed_cursor_is_refused_or_only_starts_elsewhere() -> None:
    state = filled_state()
    words = (LAYOUT.caps + 31) // 32
    data = state["cursors"].reshape(-1).view(np.uint8)
    outcomes = set()
    for place in range(data.size):
        for change in (1, 2, 0x80):
            data[place] ^= np.uint8(change)
            inside = bool(((state["cursors"] >= 0) & (state["cursors"] < words)).all())
            assert is_refused(state) != inside
            outcomes.add(inside)
            if inside:
                maps = IdMaps(LAYOUT)
                maps.set_state(state)
                shards, rows, fresh, *_ = put(maps, np.arange(30), 0)
                assert fresh.sum() == 10 and len(set(zip(shards.tolist(), rows.tolist(), strict=True))) == 30
            data[place] ^= np.uint8(change)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "layout",
    [
        MapLayout(("user", "video"), (40, 41), 2),
        MapLayout(("user", "video"), (41, 40), 2),
        MapLayout(("user", "video"), (40, 40), 4),
        MapLayout(("user",), (40,), 2),
        MapLayout(("user", "movie"), (40, 40), 2),
    ],
)
def test_a_state_of_another_layout_is_refused(layout: MapLayout) -> None:
    maps = IdMaps(LAYOUT)
    for table in range(2):
        put(maps, np.arange(20), table)
    with pytest.raises(ValueError, match="id maps of tables"):
        IdMaps(layout).set_state(maps.get_state())
