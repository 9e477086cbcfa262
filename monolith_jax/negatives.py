"""What a partition's examples teach the two-tower, and videos drawn uniformly to set them against.

In: examples of one partition in stream order, with their features. Out: rows of features that hold drawn videos and no user,
how much each example counts as a positive, and of every row how often its video is among a step's candidates in expectation.
Memory is constant: a pool of videos, one a place, and the intervals between showings (Yi et al., RecSys 2019, algorithm 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from monolith_jax.features import DenseFeatureConfig, FeatureLayout, Features, column_ids, restricted
from monolith_jax.ids.kernels import hash_ids
from monolith_jax.ids.lines import jit
from monolith_jax.stream.events import labels
from monolith_jax.types import GroupIds, Retrieval

if TYPE_CHECKING:
    from monolith_jax.models.two_tower import TwoTowerConfig  # At run time it would bring jax along.

NUM_HASHES = 2
"""A cell that two videos share tells an interval that is too short: the longest of several cells counts."""
QUIET = 4.0
"""A video that was not shown for so many of its intervals is shown less often than it was."""
_SEEDS = tuple(np.uint64(seed) for seed in (0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B))


class Drawn(NamedTuple):
    """What goes beside the examples of a part."""

    features: Features
    """m rows, of videos alone."""
    retrieval: Retrieval
    """Of the b rows of examples, and log_q and key of the m rows after them."""


@jit
def _count(cells, valid, first, alpha, last, intervals, counts):
    """Takes the examples in: `cells` int64 [H, N], `valid` bool [N]; example i is number `first` + i of the stream.

    `last` int64 [H, S] is the number of the last example in each cell, `intervals` float32 the mean number of examples between
    two, `counts` uint16 how many there were. The mean is plain until 1 / alpha of them, so that the first guess has no weight.
    """
    for i in range(valid.size):
        if not valid[i]:
            continue
        for h in range(cells.shape[0]):
            cell, number = cells[h, i], first + i
            if counts[h, cell]:
                rate = max(alpha, 1.0 / counts[h, cell])
                intervals[h, cell] += rate * (number - last[h, cell] - intervals[h, cell])
            last[h, cell] = number
            counts[h, cell] = min(np.int64(counts[h, cell]) + 1, 65535)


@jit
def _estimate(cells, now, guess, last, intervals, counts, out):
    """Writes the mean interval of each video, float64 [N]; `guess` of one that was shown once."""
    for i in range(out.size):
        out[i] = 0.0
        for h in range(cells.shape[0]):
            cell = cells[h, i]
            age = np.float64(now - last[h, cell])
            if counts[h, cell] < 2:
                interval = max(guess, age)
            else:
                interval = max(np.float64(intervals[h, cell]), age / QUIET)
            out[i] = max(out[i], interval)


class Frequencies:
    """How often each video is shown: the examples from one showing to the next, on average. Nothing is stored by video."""

    def __init__(self, size: int, alpha: float, guess: int) -> None:
        """Has seen nothing.

        Args:
            size: Cells of each hash.
            alpha: Share of the newest interval in the mean.
            guess: Interval of a video that was shown once; less where the stream is shorter.
        """
        self._alpha, self._guess = alpha, guess
        self.arrays = {
            "last": np.zeros((NUM_HASHES, size), np.int64),
            "intervals": np.zeros((NUM_HASHES, size), np.float32),
            "counts": np.zeros((NUM_HASHES, size), np.uint16),
            "number": np.zeros(1, np.int64),
        }

    def add(self, videos: np.ndarray, valid: np.ndarray) -> None:
        """Takes in the videos of examples, int64 [N] in stream order, where there is one, bool [N]."""
        last, intervals, counts, number = self.arrays.values()
        _count(self._cells(videos), valid, number[0], self._alpha, last, intervals, counts)
        number += videos.size

    def shares(self, videos: np.ndarray, least: int = 1) -> np.ndarray:
        """Returns the share of the examples that show each of some videos that were added, float64 [N].

        Args:
            videos: int64 [N].
            least: The interval that a video is taken to have at least while it was shown only once.
        """
        last, intervals, counts, number = self.arrays.values()
        out = np.empty(videos.size)
        guess = float(max(min(number[0], self._guess), least))
        _estimate(self._cells(videos), number[0], guess, last, intervals, counts, out)
        return 1.0 / np.maximum(out, 1.0)

    def _cells(self, videos: np.ndarray) -> np.ndarray:
        size = np.uint64(self.arrays["last"].shape[1])
        return np.stack([(hashed(videos, seed) % size).astype(np.int64) for seed in _SEEDS[:NUM_HASHES]])


def hashed(ids: np.ndarray, seed: np.uint64) -> np.ndarray:
    """Returns uint64 hashes of int64 ids."""
    out = np.empty(ids.size, np.uint64)
    hash_ids(np.ascontiguousarray(ids, np.int64).view(np.uint64), seed, out)
    return out


class Pool:
    """Distinct videos with the rows of their features. A video has one place; one that comes later may take it."""

    def __init__(self, size: int, layout: FeatureLayout) -> None:
        """Is empty.

        Args:
            size: Places.
            layout: The video's features.
        """
        self.arrays: dict[str, np.ndarray] = {
            "taken": np.zeros(size, np.bool_),
            "places": np.zeros(size, np.int32),
            "number": np.zeros(1, np.int64),
            "videos": np.zeros(size, np.int64),
            "dense": np.zeros((size, layout.num_dense), np.float32),
        }
        for group, slots in enumerate(layout.groups):
            shape = (size, layout.num_positions(group))
            self.arrays |= {f"ids_{group}": np.zeros(shape, np.int64), f"valid_{group}": np.zeros(shape, np.bool_)}
            if any(slot.weighted for slot in slots):
                self.arrays[f"weights_{group}"] = np.zeros(shape, np.float32)

    def __len__(self) -> int:
        """Returns the number of videos."""
        return int(self.arrays["number"][0])

    def add(self, videos: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Takes in videos, int64 [N], with rows of `ids_0`, `valid_0`, ..., `dense`; the last of equal ones counts."""
        arrays = self.arrays
        places = (hashed(videos, _SEEDS[-1]) % np.uint64(arrays["taken"].size)).astype(np.int64)
        fresh = np.unique(places[~arrays["taken"][places]])
        arrays["places"][len(self) : len(self) + fresh.size] = fresh
        arrays["number"] += fresh.size
        arrays["taken"][fresh] = True
        # Each video once: what numpy does with a place that is named twice differs from array to array.
        last = places.size - 1 - np.unique(places[::-1], return_index=True)[1]
        arrays["videos"][places[last]] = videos[last]
        for name, of_rows in rows.items():
            arrays[name][places[last]] = of_rows[last]

    def draw(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Returns places of videos drawn uniformly, with replacement, int32 [number]. There must be one."""
        return self.arrays["places"][rng.integers(0, len(self), number)]


class NegativeSampler:
    """All that one partition knows of videos for the two-tower."""

    def __init__(
        self, config: TwoTowerConfig, layout: FeatureLayout, batch_size: int, partitions: int, index: int, seed: int
    ) -> None:
        """Has seen nothing.

        Args:
            config: The two-tower's config.
            layout: All features.
            batch_size: B, over all partitions.
            partitions: N; each has B / N examples and M / N drawn videos.
            index: This partition.
            seed: Of the draws.
        """
        self._config, self._layout = config, layout
        self._part = restricted(layout, config.video_features)
        self._places, self._columns = _places(layout, config.video_features)
        self._batch_size, self._rows = batch_size, batch_size // partitions
        self._drawn = config.num_negatives // partitions
        self._key = (seed % 2**63, index)
        self._frequencies = Frequencies(config.frequency_size, config.frequency_alpha, config.pool_size)
        self._pool = Pool(config.pool_size, self._part)
        self._step = 0

    def take(self, examples: pa.RecordBatch, features: Features) -> Drawn:
        """Takes in the examples of a part, not padded, and returns what goes beside them.

        A further pass over the data goes on with what the one before knew: which videos there are and how often each is shown
        does not start again with it.

        Raises:
            ValueError: The column of the video or of a label is not there, or of a type that cannot be read.
        """
        config, number = self._config, examples.num_rows
        videos, valid = column_ids(examples, config.video_column, "retrieval")
        self._frequencies.add(videos, valid)
        self._pool.add(videos[valid], {name: rows[valid] for name, rows in self._video_rows(features).items()})
        rng = np.random.Generator(np.random.Philox(key=np.array([self._key[0], self._key[1] << 40 | self._step], np.uint64)))
        self._step += 1
        nothing = self.nothing()
        if not len(self._pool):
            return nothing
        places = self._pool.draw(self._drawn, rng)
        all_videos = np.concatenate([videos, self._pool.arrays["videos"][places]])
        there = np.concatenate([valid, np.ones(self._drawn, np.bool_)])
        drawn_rate = config.num_negatives / len(self._pool)
        log_q = np.log(self._batch_size * self._frequencies.shares(all_videos, self._rows) + drawn_rate)
        keys = (hashed(all_videos, np.uint64(0)) >> np.uint64(32)).astype(np.uint32)
        rows = np.concatenate([np.arange(number), self._rows + np.arange(self._drawn)])
        nothing.retrieval.log_q[rows] = np.where(there, log_q, np.inf)
        nothing.retrieval.key[rows] = keys
        nothing.retrieval.weight[:number] = np.where(valid, self._weights(examples), 0.0)
        for group, at in enumerate(self._places):
            nothing.features.groups[group].ids[:, at] = self._pool.arrays[f"ids_{group}"][places]
            nothing.features.groups[group].valid[:, at] = self._pool.arrays[f"valid_{group}"][places]
            of_group = nothing.features.weights[group]
            if of_group is not None and f"weights_{group}" in self._pool.arrays:
                of_group[:, at] = self._pool.arrays[f"weights_{group}"][places]
        nothing.features.dense[:, self._columns] = self._pool.arrays["dense"][places]
        return nothing

    def nothing(self) -> Drawn:
        """Returns what goes beside a part without examples: no candidates, no ids."""
        rows, layout = self._rows + self._drawn, self._layout
        retrieval = Retrieval(np.zeros(self._rows, np.float32), np.full(rows, np.inf, np.float32), np.zeros(rows, np.uint32))
        shapes = [(self._drawn, layout.num_positions(group)) for group in range(len(layout.groups))]
        groups = tuple(GroupIds(np.zeros(shape, np.int64), np.zeros(shape, np.bool_)) for shape in shapes)
        weights = tuple(
            np.zeros(shape, np.float32) if any(slot.weighted for slot in slots) else None
            for shape, slots in zip(shapes, layout.groups, strict=True)
        )
        return Drawn(Features(groups, weights, np.zeros((self._drawn, layout.num_dense), np.float32)), retrieval)

    def _video_rows(self, features: Features) -> dict[str, np.ndarray]:
        rows = {"dense": features.dense[:, self._columns]}
        for group, at in enumerate(self._places):
            rows |= {f"ids_{group}": features.groups[group].ids[:, at], f"valid_{group}": features.groups[group].valid[:, at]}
            of_group = features.weights[group]
            if of_group is not None and f"weights_{group}" in self._pool.arrays:
                rows[f"weights_{group}"] = of_group[:, at]
        return rows

    def _weights(self, examples: pa.RecordBatch) -> np.ndarray:
        """Returns what each example counts as a positive, float32 [N]."""
        values, masks = labels(examples, self._config.positives)
        weights = (values * masks) @ np.asarray(self._config.positive_weights, np.float32)
        if "weight" in examples.schema.names:
            weights *= examples.column("weight").fill_null(1.0).to_numpy(zero_copy_only=False).astype(np.float32)
        return weights

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns a copy of all state."""
        state = {f"frequency_{name}": array.copy() for name, array in self._frequencies.arrays.items()}
        state |= {f"pool_{name}": array.copy() for name, array in self._pool.arrays.items()}
        return state | {"step": np.array([self._step], np.int64)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `get_state` returned."""
        for prefix, arrays in (("frequency", self._frequencies.arrays), ("pool", self._pool.arrays)):
            for name, array in arrays.items():
                array[...] = state[f"{prefix}_{name}"]
        self._step = int(state["step"][0])


def _places(layout: FeatureLayout, names: tuple[str, ...]) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns where the positions of some features' own layout are among all, of each group, and the same of dense values."""
    part = restricted(layout, names)
    places = []
    for slots, of_part in zip(layout.groups, part.groups, strict=True):
        starts = {slot.feature: slot.start for slot in slots}
        places.append(np.array([starts[slot.feature] + at for slot in of_part for at in range(slot.length)], np.int64))
    columns, first = [], 0
    for feature in layout.features:
        if isinstance(feature, DenseFeatureConfig):
            columns += range(first, first + feature.size) if feature.name in names else ()
            first += feature.size
    return places, np.array(columns, np.int64)


def sampler_bytes(config: TwoTowerConfig, layout: FeatureLayout) -> int:
    """Returns the bytes of a `NegativeSampler`'s arrays."""
    part = restricted(layout, config.video_features)
    of_ids = [13 if any(slot.weighted for slot in slots) else 9 for slots in part.groups]
    positions = sum(part.num_positions(group) * size for group, size in enumerate(of_ids))
    return config.pool_size * (13 + 4 * part.num_dense + positions) + 14 * NUM_HASHES * config.frequency_size + 24


def num_blocks(num_examples: int, num_drawn: int, num_shards: int) -> int:
    """Returns in how many blocks the rows of a step stand: a multiple of the devices, and the same however many there are.

    So the ids of a batch come in one order, and get the same rows, on every mesh.
    """
    return math.gcd(num_examples, num_drawn, num_shards)


def interleaved(examples: np.ndarray, drawn: np.ndarray, blocks: int) -> np.ndarray:
    """Returns rows in equal blocks: in each its share of the examples, then its share of what was drawn."""
    parts = [rows.reshape(blocks, -1, *rows.shape[1:]) for rows in (examples, drawn)]
    return np.concatenate(parts, axis=1).reshape(-1, *examples.shape[1:])


def side_by_side(features: Features, drawn: list[Drawn], blocks: int) -> tuple[Features, Retrieval]:
    """Returns the rows of a step: those of examples and those that each part drew, so that every device has some of both.

    Args:
        features: Of all examples, the parts' one after the other.
        drawn: Of each part.
        blocks: Of this process's rows.
    """

    def joined(of_examples: np.ndarray, of_drawn: list[np.ndarray]) -> np.ndarray:
        return interleaved(of_examples, np.concatenate(of_drawn), blocks)

    groups = tuple(
        GroupIds(
            joined(group.ids, [one.features.groups[index].ids for one in drawn]),
            joined(group.valid, [one.features.groups[index].valid for one in drawn]),
        )
        for index, group in enumerate(features.groups)
    )
    weights = tuple(
        None if of_group is None else joined(of_group, [_of_group(one.features.weights[index]) for one in drawn])
        for index, of_group in enumerate(features.weights)
    )
    rows = len(drawn[0].retrieval.weight)
    retrieval = Retrieval(
        np.concatenate([one.retrieval.weight for one in drawn]),
        *(
            joined(np.concatenate([column[:rows] for column in columns]), [column[rows:] for column in columns])
            for columns in ([one.retrieval.log_q for one in drawn], [one.retrieval.key for one in drawn])
        ),
    )
    return Features(groups, weights, joined(features.dense, [one.features.dense for one in drawn])), retrieval


def _of_group(weights: np.ndarray | None) -> np.ndarray:
    assert weights is not None
    return weights
