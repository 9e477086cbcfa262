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
from monolith_jax.ids.footprint import map_bytes
from monolith_jax.stream.events import labels
from monolith_jax.stream.history import ids_of, rows_of, take_over


@dataclass(frozen=True)
class CountersConfig:
    """Which rates are kept."""

    keys: tuple[str, ...] = ("user_id", "video_id")
    """Columns whose ids are counted, int64 or string; null is not counted."""
    labels: tuple[str, ...] = ("like", "long_view", "complete", "skip")
    """K labels."""
    max_rows: int = 100_000
    """Ids of each key; later ones have no rates of their own, and their examples are counted. Costs 16 K + 40 bytes each."""
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
                # The negatives by themselves: 1 - rate would lose them, and be 0 at last.
                positives = sums[row, k] + prior * overall
                negatives = counts[row, k] - sums[row, k] + prior * (1 - overall)
                out_lift[i, k] = np.log(positives / negatives) - np.log(overall / (1 - overall))
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
            # Not float32: adding 1 would have no effect from 2^24 on.
            "sums": np.zeros((size, num_labels), np.float64),
            "counts": np.zeros((size, num_labels), np.float64),
            "events": np.zeros(size, np.float64),
            "last_s": np.zeros(size, np.float64),
            "total": np.zeros((2, num_labels), np.float64),
            "refused": np.zeros(1, np.int64),
        }


class Counters:
    """The counts of all keys."""

    def __init__(self, config: CountersConfig) -> None:
        """Makes empty counts.

        Raises:
            ValueError: A field is out of its range.
        """
        if config.max_rows < 1 or not config.half_life_s >= 0 or not config.prior_count > 0:
            raise ValueError(
                f"CountersConfig: max_rows must be at least 1, half_life_s at least 0 and prior_count above 0, got {config}"
            )
        self._config = config
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._keys = [_KeyCounters(key, self._config) for key in self._config.keys]

    @property
    def num_refused(self) -> int:
        """Examples so far, summed over keys, whose id has no counts because there are `max_rows` already."""
        return sum(int(key.arrays["refused"][0]) for key in self._keys)

    def extend(self, examples: pa.RecordBatch) -> pa.RecordBatch:
        """Returns examples with the rates of their ids before them, and counts them.

        Raises:
            ValueError: A column is missing or of a wrong type.
        """
        config = self._config
        values, masks = labels(examples, config.labels)
        values = np.minimum(values, 1.0)
        times_ms = examples.column("event_time_ms").to_numpy()
        for key in self._keys:
            ids, known = ids_of(examples, key.key, "CountersConfig.keys")
            rows = rows_of(key.maps, ids, known)
            lift = np.empty((examples.num_rows, len(config.labels)), np.float32)
            count = np.empty(examples.num_rows, np.float32)
            state = key.arrays
            state["refused"] += np.count_nonzero(known & (rows < 0))
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
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The state is of another config or damaged.
        """
        for key in self._keys:
            prefix = key.key + "/"
            mine = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            key.maps.set_state({name[5:]: array for name, array in mine.items() if name.startswith("maps.")})
            take_over(key.arrays, mine, "CountersConfig")


def counters_bytes(config: CountersConfig) -> int:
    """Returns the bytes of the arrays of `Counters`."""
    layouts = [MapLayout(("counters." + key,), (config.max_rows,), 2) for key in config.keys]
    of_labels = 16 * len(config.labels)
    of_keys = [2 * layout.rows_per_shard * (of_labels + 16) + of_labels + 8 for layout in layouts]
    return sum(of_keys) + sum(sum(map_bytes(layout).values()) for layout in layouts)
