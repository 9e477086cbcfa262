"""What became of an id so far: decayed rates of each label, for each id of a column.

In: examples in stream order. Out: the same examples with two columns a key: `<key>_lift`, a list of K floats (log-odds of the
id's smoothed rate of each label minus those of all events), and `<key>_count`, the decayed number of its events. An example
sees what came before it in the stream, never itself. State is bounded by `max_rows` ids a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numba
import numpy as np
import pyarrow as pa

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.stream.events import labels, valid_mask
from monolith_jax.stream.history import rows_of


@dataclass(frozen=True)
class CountersConfig:
    """Which rates are kept."""

    keys: tuple[str, ...] = ("user_id", "video_id")
    """Columns whose ids are counted, int64; null is not counted."""
    labels: tuple[str, ...] = ("like", "long_view", "complete", "skip")
    """K labels."""
    max_rows: int = 100_000
    """Ids of each key; later ones have no rates of their own. Costs 8 K + 16 bytes each."""
    half_life_s: float = 0.0
    """Event time in which a count loses half its weight; 0: it keeps it."""
    prior_count: float = 5.0
    """Events at the overall rate that an id's rate is smoothed with."""


@numba.njit(cache=True, nogil=True)
def _walk(rows, times_s, labels, masks, half_life_s, prior, sums, counts, events, last_s, total, out_lift, out_count):
    # In stream order. total [2, K]: positives and defined labels of all events.
    num_labels = labels.shape[1]
    for i in range(rows.size):
        row = rows[i]
        if row >= 0 and half_life_s > 0 and times_s[i] > last_s[row]:
            factor = 0.5 ** ((times_s[i] - last_s[row]) / half_life_s)
            events[row] *= factor
            for k in range(num_labels):
                sums[row, k] *= factor
                counts[row, k] *= factor
            last_s[row] = times_s[i]
        out_count[i] = events[row] if row >= 0 else 0.0
        for k in range(num_labels):
            overall = (total[0, k] + 1.0) / (total[1, k] + 2.0)
            if row >= 0:
                rate = (sums[row, k] + prior * overall) / (counts[row, k] + prior)
                out_lift[i, k] = np.log(rate / (1 - rate)) - np.log(overall / (1 - overall))
            else:
                out_lift[i, k] = 0.0
            total[0, k] += labels[i, k] * masks[i, k]
            total[1, k] += masks[i, k]
            if row >= 0:
                sums[row, k] += labels[i, k] * masks[i, k]
                counts[row, k] += masks[i, k]
        if row >= 0:
            events[row] += 1


class _KeyCounters:
    """The counts of one key."""

    def __init__(self, key: str, config: CountersConfig) -> None:
        self.key = key
        self.layout = MapLayout(("counters." + key,), (config.max_rows,), 2)
        size, num_labels = 2 * self.layout.rows_per_shard, len(config.labels)
        self.maps = IdMaps(self.layout)
        self.arrays = {
            "sums": np.zeros((size, num_labels), np.float32),
            "counts": np.zeros((size, num_labels), np.float32),
            "events": np.zeros(size, np.float32),
            "last_s": np.zeros(size, np.float64),
            "total": np.zeros((2, num_labels), np.float64),
        }


class Counters:
    """The counts of all keys."""

    def __init__(self, config: CountersConfig) -> None:
        """Makes empty counts."""
        self._config = config
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._keys = [_KeyCounters(key, self._config) for key in self._config.keys]

    def extend(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        """Returns examples with the rates of their ids before them, and counts them."""
        config = self._config
        values, masks = labels(examples, config.labels)
        values = np.minimum(values, 1.0)
        times_ms = examples.column("event_time_ms").to_numpy()
        for key in self._keys:
            column = examples.column(key.key)
            there = valid_mask(column)
            rows = np.full(examples.num_rows, -1, np.int64)
            rows[there] = rows_of(key.maps, column.drop_null().to_numpy(), times_ms)
            lift = np.empty((examples.num_rows, len(config.labels)), np.float32)
            count = np.empty(examples.num_rows, np.float32)
            state = key.arrays
            _walk(
                rows, times_ms / 1000.0, values, masks, config.half_life_s, config.prior_count,
                state["sums"], state["counts"], state["events"], state["last_s"], state["total"], lift, count,
            )  # fmt: skip
            offsets = pa.array(np.arange(examples.num_rows + 1, dtype=np.int32) * len(config.labels))
            examples = examples.append_column(key.key + "_lift", pa.ListArray.from_arrays(offsets, pa.array(lift.reshape(-1))))
            examples = examples.append_column(key.key + "_count", pa.array(count))
        return examples

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of everything."""
        state = {}
        for key in self._keys:
            arrays = key.arrays | {f"maps.{name}": array for name, array in key.maps.get_state().items()}
            state |= {f"{key.key}/{name}": array.copy() for name, array in arrays.items()}
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned."""
        for key in self._keys:
            mine = {name.split("/", 1)[1]: array for name, array in state.items() if name.split("/", 1)[0] == key.key}
            key.maps.set_state({name[5:]: array for name, array in mine.items() if name.startswith("maps.")})
            for name, array in key.arrays.items():
                array[:] = mine[name]
