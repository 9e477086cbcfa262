"""Days of events. In: Unix times in ms. Out: the names that append tables are divided by."""

from __future__ import annotations

import pyarrow as pa


def day_of(times_ms: pa.Array) -> pa.Array:
    """Returns the day in UTC of each time, a string such as `2026-11-28`."""
    days = times_ms.cast(pa.timestamp("ms")).cast(pa.date32(), safe=False).dictionary_encode()
    return days.dictionary.cast(pa.string()).take(days.indices)
