import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.merge import FILLS, SOURCES, merge

LISTS = st.dictionaries(st.sampled_from(SOURCES), st.lists(st.integers(-2, 30), max_size=25))
QUOTAS = st.dictionaries(st.sampled_from(SOURCES), st.integers(0, 8))


def oracle(lists: dict[str, list[int]], quotas: dict[str, int], seen: set[int]) -> list[tuple[int, int, int]]:
    on = {name: [one for one in lists.get(name, [])] for name in SOURCES if quotas.get(name)}
    total, out = sum(quotas.values()), {}
    for name, most in [(name, quotas.get(name, 0)) for name in SOURCES] + [(name, total) for name in FILLS]:
        given_ = 0
        for one in on.get(name, []):
            if given_ < most and len(out) < total and one not in out and one not in seen:
                out[one] = SOURCES.index(name)
                given_ += 1
    return [(one, source, sum(1 << SOURCES.index(name) for name in on if one in on[name])) for one, source in out.items()]


@settings(deadline=None, max_examples=150)
@given(lists=LISTS, quotas=QUOTAS, seen=st.sets(st.integers(-2, 30)))
def test_agrees_with_dicts(lists: dict[str, list[int]], quotas: dict[str, int], seen: set[int]) -> None:
    arrays = {name: np.array(ids, np.int64) for name, ids in lists.items()}
    merged = merge(arrays, quotas, lambda ids: ~np.isin(ids, list(seen)))
    assert list(zip(*(column.tolist() for column in merged), strict=True)) == oracle(lists, quotas, seen)
    assert [column.dtype for column in merged] == [np.int64, np.int8, np.uint8]


def test_an_empty_source_leaves_room_for_the_others() -> None:
    lists = {"two_tower": np.arange(1000), "trending": np.arange(900, 1200)}
    merged = merge(lists, {"two_tower": 700, "trending": 100, "fresh": 100, "followed": 50, "explore": 50})
    assert merged.ids.size == 1000 and np.unique(merged.ids).size == 1000
    # Its hundred are the first of the trending list; the rest is the two-tower's.
    assert np.bincount(merged.source).tolist() == [900, 0, 100]
    assert merged.sources[merged.ids == 950].tolist() == [0b101]


def test_nothing_gives_nothing() -> None:
    assert merge({}, {}).ids.size == 0
    assert merge({"fresh": np.arange(3)}, {"fresh": 2}, lambda ids: np.zeros(ids.size, np.bool_)).ids.size == 0


def test_refuses_what_is_no_source() -> None:
    with pytest.raises(ValueError, match=r"'tarot'.*two_tower"):
        merge({"tarot": np.arange(3)}, {})
    with pytest.raises(ValueError, match="'fresh'"):
        merge({}, {"fresh": -1})
