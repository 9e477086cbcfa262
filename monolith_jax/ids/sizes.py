"""The padded sizes of plans: few, and known before a run.

In: what a plan needs, and what the one before had. Out: sizes. Each is a compilation of the tables' programs, each place of
padding is gathered and sent.
"""

from __future__ import annotations

import math

import numpy as np

from monolith_jax.ids.cuckoo import MapLayout, ladder

_FRESH_SIZES = tuple(4**k for k in range(3, 14))
_FIRST_SIZES = (256, 64)
"""V and U before anything was needed. What only one device reads costs nothing; what crosses between them is kept small."""


def rows_per_device(layout: MapLayout, num_devices: int, rows_per_shard: int = 0) -> int:
    """Returns the rows of a group that each of S devices holds; `rows_per_shard` of each shard, 0: all.

    Raises:
        ValueError: S does not divide L, or a device would have more rows than int32 can count.
    """
    if layout.num_shards % num_devices:
        raise ValueError(f"{layout.num_shards} shards cannot be divided among {num_devices} devices; use a power of two")
    rows = layout.num_shards // num_devices * (rows_per_shard or layout.rows_per_shard)
    if rows + _FRESH_SIZES[-1] >= 2**31:
        raise ValueError(
            f"a device would hold {rows:,} rows of tables {layout.names}, more than int32 counts; use more than {num_devices} "
            "devices, a smaller TableConfig.max_rows or TableConfig.memory 'tiered'"
        )
    return rows


def fresh_size(number: int) -> int:
    """Returns the padded size F for the fresh rows of a device."""
    return next(size for size in _FRESH_SIZES if size >= number)


def scratch_size(parts: np.ndarray) -> int:
    """Returns the size of `dedup`'s scratch for shards with so many ids."""
    return 1 << max(int(2 * parts.max() - 1).bit_length(), 4)


def first_sizes(num_devices: int) -> tuple[int, int]:
    """Returns the padded sizes V and U of a mapper for S devices before its first plan."""
    touched, sent = _FIRST_SIZES
    return touched, sent if num_devices > 1 else touched


def grown_size(size: int, needed: int) -> int:
    """Returns the padded size V or U of a plan that needs so much, after one of `size`.

    Each size is a compilation of the step's tables, each place of padding is sent. So a size that must grow is a quarter larger
    than it was, and has room for what the next plans of such a stream will need: ids fall on owners by chance, so the most that
    one is asked for by a slice varies by about the root of it.
    """
    return size if needed <= size else ladder(max(int(1.03 * needed + math.sqrt(needed)), size + size // 4))
