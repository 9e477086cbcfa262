import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.id_slots import EMPTY, IdSlots, id_slots_bytes

EXTREMES = (0, -1, 1, 2**63 - 1, -(2**63))


def ids_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int64)


class OneBucket:
    """Eight slots with Python's lists: the id and when it was used, or None."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, int] | None] = [None] * 8
        self.replaced = 0

    def take(self, ids: list[int], stamps: list[int]) -> tuple[list[int], list[int]]:
        at, fresh = [], []
        for one, stamp in zip(ids, stamps, strict=True):
            there = [held and held[0] == one for held in self.slots]
            if any(there):
                slot = there.index(True)
                held = self.slots[slot]
                assert held is not None
                self.slots[slot] = one, max(held[1], stamp)
            else:
                ages = [(-(2**70) if held is None else held[1], slot) for slot, held in enumerate(self.slots)]
                slot = min(ages)[1]
                self.replaced += self.slots[slot] is not None
                self.slots[slot] = one, stamp
                fresh.append(slot)
            at.append(slot)
        lost = [not (held := self.slots[slot]) or held[0] != one for one, slot in zip(ids, at, strict=True)]
        return [-1 if gone else slot for gone, slot in zip(lost, at, strict=True)], fresh

    def remove(self, ids: list[int]) -> list[int]:
        gone = [slot for slot, held in enumerate(self.slots) if held and held[0] in ids]
        for slot in gone:
            self.slots[slot] = None
        return gone


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_bucket_is_a_cache_of_the_recently_used(data: st.DataObject) -> None:
    slots, model = IdSlots(5), OneBucket()
    assert slots.size == 8
    for _ in range(data.draw(st.integers(1, 6))):
        ids = data.draw(st.lists(st.sampled_from((*EXTREMES, *range(10, 18))), max_size=20))
        if data.draw(st.booleans()):
            stamps = data.draw(st.lists(st.integers(-3, 3), min_size=len(ids), max_size=len(ids)))
            at, fresh = slots.take(ids_of(*ids), ids_of(*stamps))
            assert (at.tolist(), fresh.tolist()) == model.take(ids, stamps)
        else:
            assert slots.remove(ids_of(*ids[:4])).tolist() == model.remove(ids[:4])
        held = {one[0]: slot for slot, one in enumerate(model.slots) if one}
        every = (*EXTREMES, *range(10, 18))
        assert slots.find(ids_of(*every)).tolist() == [held.get(one, -1) for one in every]
        assert (len(slots), slots.replaced) == (len(held), model.replaced)


def test_many_ids_have_slots_of_their_own() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 20_000)
    slots = IdSlots(40_000)
    at, fresh = slots.take(ids, np.zeros(ids.size, np.int64))
    kept = at >= 0
    assert np.unique(at[kept]).size == kept.sum() == len(slots)
    assert np.array_equal(slots.ids[at[kept]], ids[kept])
    assert np.array_equal(slots.find(ids), at)
    assert fresh.size == ids.size == len(slots) + slots.replaced
    # What the docstring says of slots that are half as many, or as many, as the ids that are used.
    assert 1 / 250 < slots.replaced / ids.size < 1 / 100
    full = IdSlots(20_000)
    full.take(ids, np.zeros(ids.size, np.int64))
    assert 1 / 8 < full.replaced / ids.size < 1 / 6


def test_the_least_stamp_is_still_a_stamp() -> None:
    slots = IdSlots(1)
    at, _ = slots.take(ids_of(7), ids_of(EMPTY))
    assert slots.find(ids_of(7, 0)).tolist() == [at[0], -1]


def test_bytes_and_range() -> None:
    slots = IdSlots(100)
    assert id_slots_bytes(100) == slots.ids.nbytes + slots.used.nbytes
    with pytest.raises(ValueError, match="got 0"):
        IdSlots(0)
