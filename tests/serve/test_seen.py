from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve.seen import SeenConfig, SeenFilter, seen_bytes

USERS = (0, -1, 5, 2**63 - 1)
SHOWN = st.lists(st.tuples(st.sampled_from(USERS), st.integers(-3, 20)), max_size=40)


@settings(deadline=None, max_examples=60)
@given(calls=st.lists(SHOWN, max_size=4), length=st.integers(1, 8))
def test_agrees_with_lists_of_the_last_videos(calls: list[list[tuple[int, int]]], length: int) -> None:
    seen, model = SeenFilter(SeenConfig(100, length)), defaultdict(list)
    for shown in calls:
        seen.add(*(np.array([one[side] for one in shown], np.int64) for side in (0, 1)))
        for user, video in shown:
            if video not in model[user]:
                model[user] = [*model[user], video][-length:]
        candidates = np.arange(-5, 25)
        for user in USERS:
            assert seen.unseen(user, candidates).tolist() == [video not in model[user] for video in candidates.tolist()]


def test_a_thousand_of_a_thousand() -> None:
    seen = SeenFilter(SeenConfig(10, 1000))
    videos = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 3000)
    seen.add(4, videos[:2000])
    assert not seen.unseen(4, videos[1000:2000]).any()
    assert seen.unseen(4, videos[:1000]).all()  # They left the ring.
    assert seen.unseen(4, videos[2000:]).all()
    assert seen.unseen(5, videos).all()
    assert seen.unseen(4, videos[:0]).size == 0


def test_more_users_than_there_is_room_for_forget_all_of_the_oldest() -> None:
    seen = SeenFilter(SeenConfig(8, 4))
    for user in range(8):
        seen.add(user, np.array([1, 2]))
    seen.add(0, np.array([3]))
    seen.add(8, np.array([9]))
    assert seen.metrics() == {"users": 8, "users_replaced": 1}
    assert seen.unseen(1, np.array([1, 2])).all()
    assert seen.unseen(8, np.array([1, 2, 9])).tolist() == [True, True, False]
    assert not seen.unseen(0, np.array([1, 2, 3])).any()
    for user in (0, *range(2, 8), 1):  # The last comes back to the slot that was taken from it.
        seen.add(user, np.array([4]))
    assert seen.unseen(1, np.array([1, 2, 4])).tolist() == [True, True, False]


def test_bytes_and_bad_configs() -> None:
    seen = SeenFilter(SeenConfig(100, 7))
    arrays = [one for of in (seen, seen._slots) for one in vars(of).values() if isinstance(one, np.ndarray)]
    assert seen_bytes(SeenConfig(100, 7)) == sum(array.nbytes for array in arrays)
    for fields in ({"max_users": 0}, {"videos": 0}):
        with pytest.raises(ValueError, match="SeenConfig"):
            SeenConfig(**fields)
