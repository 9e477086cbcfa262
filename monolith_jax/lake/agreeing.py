"""Whether impressions were served with the features that training finds for them, watched while the lake is written.

In: the table `events`, whose impressions hold the features that the server looked up, and the logs of features. Out: counts, as
`agreement` tells them. An impression waits until its time is well past in the lake: then whatever was to be known is there.
"""

from __future__ import annotations

import pyarrow as pa

from monolith_jax.lake.agreement import Agreement
from monolith_jax.lake.changelog import Changelog
from monolith_jax.lake.feature_changes import FeatureChanges
from monolith_jax.lake.tables import GROUPS, Subject
from monolith_jax.lake.versions import FeatureState
from monolith_jax.lake.warehouse import WarehouseConfig

SETTLED_MS = 30_000
"""So far the lake's newest event is past an impression when it is checked."""
VERSIONS = 8
_MOST_ROWS = 1 << 20


class Agreeing:
    """Checks what comes to the lake from now on. For one thread."""

    def __init__(self, config: WarehouseConfig, impressions: str, max_rows: int) -> None:
        """Opens the tables.

        Args:
            config: The warehouse.
            impressions: Topic of the impressions.
            max_rows: Users, and videos, whose features are held.

        Raises:
            ValueError: There are no such tables.
        """
        self._topic = impressions
        self._events = Changelog(config, "events")
        self._states: dict[Subject, FeatureState] = {}
        self._changes = FeatureChanges(config)
        self.agreements: dict[Subject, Agreement] = {}
        for subject in GROUPS:
            self._states[subject] = FeatureState(subject, max_rows, VERSIONS)
            self.agreements[subject] = Agreement(subject)
        for found in self._changes.whole():
            for subject, batch in found:
                self._states[subject].apply(batch)
        self._waiting: list[pa.RecordBatch] = []
        self._newest_ms = 0
        self.dropped = 0
        """Impressions that were not checked, since too many waited."""

    def step(self, settled_ms: int = SETTLED_MS) -> int:
        """Takes in what has come, and checks the impressions whose time is past; returns how many."""
        # Events first: what they were served with is committed before them, or known to be on its way.
        events = self._events.poll().rows
        for subject, state in self._states.items():
            for _, batch in self._changes.poll(subject):
                state.apply(batch)
        if events.num_rows:
            self._newest_ms = max(self._newest_ms, int(events.column("event_time_ms").to_numpy().max()))
            of_topic = events.column("topic").to_numpy(zero_copy_only=False) == self._topic
            self._waiting += events.filter(pa.array(of_topic)).to_batches()
        while sum(batch.num_rows for batch in self._waiting) > _MOST_ROWS:
            self.dropped += self._waiting.pop(0).num_rows
        checked, still = 0, []
        for batch in self._waiting:
            past = batch.column("event_time_ms").to_numpy() < self._newest_ms - settled_ms
            if past.any():
                ripe = batch.filter(pa.array(past))
                for subject, agreement in self.agreements.items():
                    agreement.check(ripe, self._states[subject])
                checked += ripe.num_rows
            if not past.all():
                still.append(batch.filter(pa.array(~past)))
        self._waiting = still
        return checked

    def metrics(self) -> dict[str, int]:
        """Returns the counts of both subjects."""
        found = {name: count for one in self.agreements.values() for name, count in one.metrics().items()}
        return found | ({"dropped": self.dropped} if self.dropped else {})
