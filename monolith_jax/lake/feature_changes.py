"""The features tables as they change, for who holds them in memory.

In: a warehouse. Out: what both tables hold, and then every change, as the tables get it. Rows are partial, as each stream wrote
them: whoever takes them in merges them by the times of their groups.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pyarrow as pa

from monolith_jax.lake.changelog import Changelog, Expired
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
        self._config = config
        self._followed: dict[Subject, Changelog] = {one: Changelog(config, f"{one}_features") for one in GROUPS}

    def whole(self) -> Iterator[Changes]:
        """Yields what the tables held when they were opened."""
        for subject, changelog in self._followed.items():
            for batch in changelog.whole().to_batches(_ROWS):
                yield [(subject, batch)]

    def poll(self, subject: Subject) -> Changes:
        """Returns what has changed of a subject since the last call, or since its table was opened.

        Where that has expired before it was read, it is all that the table holds.
        """
        changelog = self._followed[subject]
        try:
            rows = changelog.poll().rows
        except Expired:
            changelog = Changelog(self._config, f"{subject}_features")
            rows = changelog.whole()
            self._followed[subject] = changelog
        return [(subject, batch) for batch in rows.to_batches(_ROWS)]

    def follow(self, period_s: float = 0.1) -> Following:
        """Returns changes without end, looking for them every `period_s`, which costs some milliseconds."""
        return Following(self, period_s)


class Following(Iterator[Changes]):
    """Changes without end. After an error it can be asked again, as a generator could not, and nothing is lost."""

    def __init__(self, changes: FeatureChanges, period_s: float) -> None:
        """Takes over changes."""
        self._changes, self._period_s = changes, period_s
        self._turns = itertools.cycle(GROUPS)

    def __next__(self) -> Changes:
        """Returns what has changed of the subject whose turn it is.

        Raises:
            OSError: The store cannot be read now.
        """
        subject = next(self._turns)
        time.sleep(self._period_s / len(GROUPS))
        return self._changes.poll(subject)
