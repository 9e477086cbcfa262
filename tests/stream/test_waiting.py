from pathlib import Path

import numpy as np
import pytest

from monolith_jax.stream.join_kernels import ARRIVAL, BITS, REQUEST, TIME
from monolith_jax.stream.open_rows import keys_of
from monolith_jax.stream.spill import Spill
from monolith_jax.stream.waiting import Waiting


@pytest.mark.parametrize("spilled", [False, True])
def test_claims_in_order_of_arrival(spilled: bool, tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill")
    waiting = Waiting(1000, 10, spill)
    actions = np.zeros((100, 6), np.int64)
    actions[:, REQUEST], actions[:, TIME] = np.arange(100) % 10, 5000 - np.arange(100)
    actions[:, BITS] = np.arange(100) << ARRIVAL
    for part in (actions[50:], actions[:50]):
        waiting.add(part)
        if spilled:
            waiting.spill()
            assert waiting.part_bytes == 0
    claimed, owners = waiting.claim(keys_of(np.array([77, 3, 5]), np.zeros(3, np.int64)))
    assert (claimed[:, BITS] >> ARRIVAL).tolist() == sorted([*range(3, 100, 10), *range(5, 100, 10)])
    assert owners.tolist() == [1, 2] * 10
    assert waiting.claim(keys_of(np.array([3]), np.zeros(1, np.int64)))[0].size == 0
    # Those of 4,901 to 4,949 have waited long enough: 49, of which 10 were claimed.
    assert waiting.expire(5949) == 39
    assert waiting.expire(5949) == 0
    assert waiting.expire(9000) == 41
    assert not spill._num_parts
    spill.close()
