"""Vectors as they are stored: float32, float16, or int8 with a scale for each row.

In: float32 [N, D]. Out: the stored array, and the other way round. Errors of a value v, in a row whose largest is m:
none in float32; at most |v| / 2048 or 2**-25 in float16, m below 65520; at most m / 254 in int8, or m if that is below 2e-36.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from monolith_jax.ids.lines import jit

Format = Literal["float32", "float16", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
LEVELS = 127
"""int8 values go from -LEVELS to LEVELS."""
_SMALLEST_SCALE = np.finfo(np.float32).tiny


class Rows(NamedTuple):
    """Vectors of one table, with the ids that own them. What was read is read-only."""

    ids: np.ndarray
    """int64 [N], distinct."""
    vectors: np.ndarray
    """[N, D]; float32 when it is written, as stored when it is read: float32, float16 or int8."""
    scales: np.ndarray | None = None
    """float32 [N] beside vectors of int8: the values are `vectors * scales[:, None]`."""


def check_format(format: str) -> Format:
    """Returns the format.

    Raises:
        ValueError: There is no such format.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r} of vectors; choose one of {', '.join(FORMATS)}")
    return cast(Format, format)


@jit
def _quantise_rows(vectors, levels, smallest, stored, scales):
    """Writes int8 [N, D] and float32 [N]; returns the first row of float32 [N, D] that is not finite, or -1."""
    for i in range(vectors.shape[0]):
        largest = np.float32(0)
        finite = True
        for j in range(vectors.shape[1]):
            size = abs(vectors[i, j])
            largest = max(largest, size)
            finite = finite and size < np.inf
        if not finite:
            return i
        scale = largest / levels
        if scale < smallest:
            scale = np.float32(0)
        scales[i] = scale
        if scale == 0:
            stored[i] = 0
            continue
        for j in range(vectors.shape[1]):
            stored[i, j] = np.int8(np.rint(vectors[i, j] / scale))
    return -1


def quantised(vectors: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns vectors as they are stored; see the module for what that costs.

    Args:
        vectors: float32 [N, D].
        format: One of `FORMATS`. float32 keeps every bit, whatever it says.

    Returns:
        [N, D] of the format's type, and for int8 float32 [N] scales. A row of zeros has the scale 0.

    Raises:
        ValueError: There is no such format, or it cannot hold a value: infinite, not a number, or too large for float16.
    """
    check_format(format)
    assert vectors.dtype == np.float32 and vectors.ndim == 2, (vectors.dtype, vectors.shape)
    if format == "float32":
        return vectors, None
    if format == "float16":
        with np.errstate(over="ignore"):
            halves = vectors.astype(np.float16)
        if np.any((halves.view(np.uint16) & 0x7C00) == 0x7C00):
            row, column = np.argwhere(~np.isfinite(halves))[0]
            raise ValueError(_cannot(float(vectors[row, column]), int(row), format))
        return halves, None
    stored = np.empty(vectors.shape, np.int8)
    scales = np.empty(len(vectors), np.float32)
    bad = _quantise_rows(vectors, np.float32(LEVELS), _SMALLEST_SCALE, stored, scales)
    if bad >= 0:
        raise ValueError(_cannot(float(vectors[bad][~np.isfinite(vectors[bad])][0]), bad, format))
    return stored, scales


def dequantised(rows: Rows) -> np.ndarray:
    """Returns float32 [N, D] of rows as they were read."""
    if rows.scales is None:
        return rows.vectors.astype(np.float32, copy=False)
    return rows.vectors * rows.scales[:, None]


def _cannot(value: float, row: int, format: str) -> str:
    return (
        f"vector {row} has the value {value}, which {format} cannot hold: expected finite numbers"
        f"{' below 65520 in size' if format == 'float16' else ''}. A run whose vectors grow like this has diverged: lower its "
        "learning rate or clip its gradients, and go on from a snapshot before that"
    )
