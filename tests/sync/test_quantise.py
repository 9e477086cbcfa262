"""Holds what each format keeps of a vector, and what it refuses."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.sync.quantise import FORMATS, Rows, dequantised, quantised

LIMIT = 3.4e38


def vectors_up_to(limit: float) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-limit, limit, width=32))


def back(vectors: np.ndarray, format: str) -> np.ndarray:
    stored, scales = quantised(vectors, format)
    assert stored.dtype == format and (scales is None) == (format != "int8")
    return dequantised(Rows(np.arange(len(stored)), stored, scales))


@settings(deadline=None)  # the first call compiles
@given(hnp.arrays(np.uint32, (3, 5)))
def test_float32_keeps_every_bit(bits: np.ndarray) -> None:
    np.testing.assert_array_equal(back(bits.view(np.float32), "float32").view(np.uint32), bits)


@settings(deadline=None)  # the first call compiles
@given(vectors_up_to(65504))
def test_float16_is_within_its_bound(vectors: np.ndarray) -> None:
    error = np.abs(back(vectors, "float16").astype(np.float64) - vectors)
    assert (error <= np.maximum(np.abs(vectors).astype(np.float64) / 2048, 2.0**-25)).all()


@settings(deadline=None)  # the first call compiles
@given(vectors_up_to(float(np.float32(LIMIT))))
def test_int8_is_within_its_bound(vectors: np.ndarray) -> None:
    largest = np.abs(vectors).max(axis=1, keepdims=True).astype(np.float64)
    error = np.abs(back(vectors, "int8").astype(np.float64) - vectors)
    assert (error <= np.where(largest < 2e-36, largest, largest / 254 * (1 + 1e-5))).all()


def test_int8_is_symmetric_and_keeps_zeros_and_the_largest() -> None:
    vectors = np.random.default_rng(0).standard_normal((2000, 16), dtype=np.float32)
    vectors[7] = 0
    stored, scales = quantised(vectors, "int8")
    assert scales is not None and scales.dtype == np.float32 and scales[7] == 0 and not stored[7].any()
    assert stored.min() == -127 and stored.max() == 127
    negative, same_scales = quantised(-vectors, "int8")
    np.testing.assert_array_equal(negative, -stored)
    np.testing.assert_array_equal(same_scales, scales)


@pytest.mark.parametrize("largest", [1e-45, 2e-43, 1e-40, 1e-37, 1.4e-36])
def test_a_row_too_small_for_a_scale_is_zeros_in_int8(largest: float) -> None:
    stored, scales = quantised(np.array([[largest, -largest / 2], [1, 0.5]], np.float32), "int8")
    np.testing.assert_array_equal(stored, [[0, 0], [127, 64]])
    assert scales is not None and scales[0] == 0


@pytest.mark.parametrize("format", ["float16", "int8"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(format: str, value: float) -> None:
    vectors = np.ones((5, 3), np.float32)
    vectors[3, 1] = value
    with pytest.raises(ValueError, match=f"vector 3 has the value {value}, which {format} cannot hold"):
        quantised(vectors, format)


def test_what_is_too_large_for_float16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vector 0 has the value 70000\.0, which float16 .* below 65520"):
        quantised(np.full((1, 2), 7e4, np.float32), "float16")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match=f"no format 'int4' .*{', '.join(FORMATS)}"):
        quantised(np.ones((1, 1), np.float32), "int4")
