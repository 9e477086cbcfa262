"""The features tables as they change, for who holds them in memory.

In: a warehouse. Out: what both tables hold, and then every change, as the tables get it. Rows are partial, as each stream wrote
them: whoever takes them in merges them by the times of their groups.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pyarrow as pa

from monolith_jax.lake.changelog import Changelog
from monolith_jax.lake.tables import GROUPS, Subject
from monolith_jax.lake.warehouse import WarehouseConfig

_ROWS = 1 << 16

Changes = list[tuple[Subject, pa.RecordBatch]]


class FeatureChanges:
    """Follows `user_features` and `video_features`. For one thread."""

    def __init__(self, config: WarehouseConfig) -> None:
        """Opens the tables as they are now.

        Raises:
            ValueError: There are no such tables.
        """
        self._followed: list[tuple[Subject, Changelog]] = [(one, Changelog(config, f"{one}_features")) for one in GROUPS]

    def whole(self) -> Iterator[Changes]:
        """Yields what the tables held when they were opened."""
        for subject, changelog in self._followed:
            for batch in changelog.whole().to_batches(_ROWS):
                yield [(subject, batch)]

    def poll(self) -> Changes:
        """Returns what has changed since the last call, or since they were opened.

        Raises:
            ValueError: Changes have expired before they were read.
        """
        return [(subject, batch) for subject, changelog in self._followed for batch in changelog.poll().rows.to_batches()]

    def follow(self, period_s: float = 0.1) -> Iterator[Changes]:
        """Yields changes without end, looking for them every `period_s`, which costs some milliseconds.

        Raises:
            ValueError: Changes have expired before they were read.
        """
        while True:
            yield self.poll()
            time.sleep(period_s)
