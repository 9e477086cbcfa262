"""What formats cost in AUC: the verdict."""

import pytest

from launch.bench.served_auc import figures_of

OWN = {"like": 0.9, "skip": 0.8}


@pytest.mark.parametrize(
    ("changed", "met"),
    [
        ({}, True),
        ({"float32": {"like": 0.9, "skip": 0.80001}}, False),
        ({"float16": {"like": 0.9, "skip": 0.7998}}, False),
        ({"int8": {"like": 0.8985, "skip": 0.9}}, False),
        ({"int8": {"like": 0.8995, "skip": 0.9}}, True),
    ],
)
def test_the_head_that_loses_most_decides(changed: dict[str, dict[str, float]], met: bool) -> None:
    auc = {"float32": OWN, "float16": {"like": 0.89995, "skip": 0.9}, "int8": OWN} | changed
    told = figures_of(OWN, auc)
    assert told["met"] is met
    if not changed:
        assert told["loss_fp16"] == pytest.approx(5e-5) and told["loss_int8"] == 0 and told["auc_int8"] == OWN
