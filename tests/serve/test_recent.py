from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.recent import RecentItems, recent_bytes

SKIP = 2


class Entry(NamedTuple):
    item: int
    time: int
    marks: int = 0
    play_ms: int = -1


class Model:
    """A slot with Python's lists, newest first."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.entries: list[Entry] = []
        self.late = 0

    def add(self, new: Entry, repeats: bool) -> None:
        for place, old in enumerate(self.entries):
            if not repeats and old.item == new.item:
                longer = new.play_ms > old.play_ms
                marks = (old.marks & ~SKIP) | new.marks if longer else old.marks | (new.marks & ~SKIP)
                self.entries[place] = Entry(old.item, old.time, marks, max(old.play_ms, new.play_ms))
                return
        newer = sum(old.time > new.time for old in self.entries)
        if newer == self.length:
            self.late += 1
        self.entries.insert(newer, new)
        del self.entries[self.length :]


ADDED = st.tuples(
    st.integers(-1, 2), st.builds(Entry, st.integers(-2, 6), st.integers(0, 9), st.integers(0, 7), st.integers(-1, 3))
)


def added(rings: RecentItems, rows: list[tuple[int, Entry]], repeats: bool) -> int:
    columns = [np.array([row[1][field] for row in rows], np.int64) for field in range(4)]
    slots = np.array([slot for slot, _ in rows], np.int64)
    marked = rings.marks.shape[1] > 0
    marks, play_ms = (columns[2].astype(np.uint8), columns[3].astype(np.int32)) if marked else (None, None)
    return rings.add(slots, columns[0], columns[1], marks, play_ms, SKIP, repeats)


@settings(deadline=None, max_examples=120)
@given(
    calls=st.lists(st.tuples(st.lists(ADDED, max_size=20), st.booleans()), max_size=4),
    length=st.integers(1, 5),
    marked=st.booleans(),
    before=st.integers(0, 11),
    most=st.integers(0, 6),
    dropped=st.lists(st.tuples(st.integers(-1, 2), st.integers(-2, 6)), max_size=4),
)
def test_agrees_with_lists(
    calls: list[tuple[list[tuple[int, Entry]], bool]],
    length: int,
    marked: bool,
    before: int,
    most: int,
    dropped: list[tuple[int, int]],
) -> None:
    rings, models = RecentItems(3, length, marked), [Model(length) for _ in range(3)]
    late = 0
    for rows, repeats in calls:
        late += added(rings, rows, repeats)
        for slot, entry in rows:
            if slot >= 0:
                models[slot].add(entry, repeats)
        if not marked:
            rings.drop(*(np.array([one[side] for one in dropped], np.int64) for side in (0, 1)))
            for slot, item in dropped:
                if slot >= 0:
                    models[slot].entries = [one for one in models[slot].entries if one.item != item]
        found = rings.newest(np.array([2, -1, 0, 1]), np.array([before, 99, before, 99]), most)
        wanted = [
            [one for one in models[slot].entries if one.time < until][:most]
            for slot, until in ((2, before), (0, before), (1, 99))
        ]
        assert found[3].tolist() == [len(wanted[0]), 0, len(wanted[1]), len(wanted[2])]
        flat = [one for entries in wanted for one in entries]
        assert found[0].tolist() == [one.item for one in flat]
        assert found[1].tolist() == [one.time for one in flat]
        assert found[2].tolist() == ([one.marks for one in flat] if marked else [])
    assert late == sum(model.late for model in models)


def test_a_cleared_slot_is_empty_and_others_stay() -> None:
    rings = RecentItems(2, 2)
    added(rings, [(0, Entry(1, 1)), (1, Entry(2, 1)), (0, Entry(3, 2))], False)
    rings.clear(np.array([0]))
    items, _, _, lengths = rings.newest(np.array([0, 1]), np.array([9, 9]), 2)
    assert (items.tolist(), lengths.tolist()) == ([2], [0, 1])


def test_bytes() -> None:
    for marked in (False, True):
        assert recent_bytes(3, 5, marked) == sum(array.nbytes for array in vars(RecentItems(3, 5, marked)).values())
