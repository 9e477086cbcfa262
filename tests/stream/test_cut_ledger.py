import time

import pytest

from monolith_jax.stream.cut_ledger import CutLedger


def test_three_steps_back_and_one_cut() -> None:
    # A cut each 100 ms, whose events matter for 300 ms.
    ledger = CutLedger()
    assert ledger.oldest(0) == 0
    for number in range(1, 40):
        ledger.begin(number, 100 * (number - 1))
        ledger.add(100 * number + 300)
    # At 3,900 cuts from 37 on matter; when 37 came, those from 34 on did; then 31; the one before tells the watermark.
    assert ledger.oldest(3900) == 30
    # Nothing matters: only the watermark is needed.
    assert ledger.oldest(10_000) == 39


def test_numbers_ascend() -> None:
    ledger = CutLedger()
    ledger.begin(3, 0)
    with pytest.raises(ValueError, match="cut 3 comes after cut 3"):
        ledger.begin(3, 0)


def test_many_cuts_cost_no_more_each() -> None:
    # Ten minutes at a hundred cuts a second, three times over.
    ledger, many = CutLedger(), 200_000
    began_s = time.monotonic()
    for number in range(1, many):
        ledger.begin(number, 10 * (number - 1))
        ledger.add(10 * number + 600_000)
        assert ledger.oldest(10 * number) <= number
    assert ledger.oldest(10 * many) < many - 170_000
    assert time.monotonic() - began_s < 20
