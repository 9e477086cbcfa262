"""An approximate index of videos' vectors that lives with the stream: they enter, move and leave, and nothing is ever rebuilt.

In: ids and vectors from the video tower. Out: for a user's vector the ids of the videos with the largest inner products.

Streaming vector quantisation (arXiv 2501.08695, see `index_lists`): K codes in the metric of the queries (see `index_codes`),
a list of int8 vectors for each; the best lists are read until enough videos were looked at, and the best of them scored again
with float16 vectors. With every change another video is looked at, and moved if another cluster is the right one by now, so an
index that drifts repairs itself.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import numpy as np

from monolith_jax.ids.cuckoo import IdMaps, MapLayout
from monolith_jax.ids.threads import ShardThreads
from monolith_jax.serve import index_lists
from monolith_jax.serve.gate import Gate
from monolith_jax.serve.index_codes import Codes, make_codes, nearest_codes, set_codes
from monolith_jax.serve.index_kernels import read_vectors, search
from monolith_jax.serve.index_training import budget_for, checked_queries, halves_of, learn_codes, metric
from monolith_jax.serve.int8_blocks import LANES

_WRITTEN = 32
"""Videos that are written while searches wait: about 0.1 ms."""
_SWEPT = 64
"""Most of the others that are looked at with them."""
_SEARCHED = 8
"""Queries that are searched for before a change may come in between."""
_BUILT = 1 << 14
"""Videos of a block of `build`."""
_SHARDS = 16


@dataclass(frozen=True)
class IndexConfig:
    """The index of videos."""

    max_videos: int = 1_000_000
    """Videos that there is room for; memory is taken as they come."""
    num_codes: int = 0
    """K, clusters; 0: a 128th of max_videos, at least 32 and at most 32,768."""
    scanned: int = 16_384
    """Videos that a search looks at. More of them: more recall, more time. `build` with queries finds the number itself."""
    recall: float = 0.97
    """Of the 100 best videos: the share that `build` with queries finds the number for; 0: the number stays `scanned`."""
    rescored: float = 2.0
    """Videos that are scored exactly, as a multiple of the number asked for."""
    crowding: float = 1.0
    """s: the distance to a cluster of c videos counts min(s c / mean(c), 1) times. 0 would put all into one cluster."""
    swept: float = 1.0
    """Other videos that are looked at with each that changes, and moved if another cluster is theirs by now."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: One is out of range.
        """
        for name, least in (("max_videos", 1), ("num_codes", 0), ("scanned", 1), ("rescored", 1), ("swept", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"IndexConfig.{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.recall < 1:
            raise ValueError(f"IndexConfig.recall must be at least 0 and below 1, got {self.recall}")
        if not self.crowding > 0:
            raise ValueError(f"IndexConfig.crowding must be above 0, got {self.crowding}")
        if self.max_videos > 2**26:
            raise ValueError(f"IndexConfig.max_videos must be at most {2**26:,}, got {self.max_videos:,}: use several indexes")

    @property
    def codes(self) -> int:
        """K, a multiple of the lanes of a block."""
        wanted = self.num_codes or min(max(self.max_videos // 128, LANES), 32768)
        return -(-wanted // LANES) * LANES


class _Content:
    """The arrays of an index; `build` makes new ones."""

    def __init__(self, config: IndexConfig, queries: np.ndarray) -> None:
        """Makes an empty one in the metric of queries float32 [Q, D]."""
        layout, dim = MapLayout(("video",), (config.max_videos,), _SHARDS), queries.shape[1]
        self.maps, self.per_shard = IdMaps(layout), layout.rows_per_shard
        self.codes = make_codes(config.codes, *metric(queries), np.zeros(dim, np.float32))
        self.lists, self.videos = index_lists.make_lists(_SHARDS * self.per_shard, config.codes, dim)
        self.size, self.scanned, self.recall = 0, config.scanned, float("nan")

    def slots(self, ids: np.ndarray) -> np.ndarray:
        """Returns the slots of ids [N], int64, -1 where there is none."""
        shards, rows = self.maps.lookup(ids, 0)
        return np.where(rows < 0, -1, shards.astype(np.int64) * self.per_shard + rows)

    def new_slots(self, ids: np.ndarray, most: int) -> tuple[np.ndarray, int]:
        """Returns the slots of distinct ids [N], made where there is none, int64, and how many found no room (slot -1)."""
        if self.size + ids.size > most:  # some may be new
            new = np.flatnonzero(self.slots(ids) < 0)
            refused = new[max(most - self.size, 0) :]
            if refused.size:
                slots, kept = np.full(ids.size, -1, np.int64), np.ones(ids.size, np.bool_)
                kept[refused] = False
                slots[kept], full = self.new_slots(ids[kept], most)
                return slots, refused.size + full
        shards, rows, fresh, full, no_path = self.maps.lookup_or_insert(ids, 0, np.zeros(ids.size, np.uint32))
        self.size += int(fresh.sum())
        return np.where(rows < 0, -1, shards.astype(np.int64) * self.per_shard + rows), full + no_path

    @property
    def parts(self) -> tuple[index_lists.Lists, Codes, index_lists.Videos]:
        """What the kernels take."""
        return self.lists, self.codes, self.videos

    @property
    def arrays(self) -> list[np.ndarray]:
        """All arrays."""
        return [*self.codes, *self.lists, *self.videos, *self.maps.arrays]


class VideoIndex:
    """The vectors of videos, searched by inner product.

    Recall is that of vectors of length 1; others may be indexed, too, with scores that are right. Any number of threads search
    while one at a time changes. What comes out depends on the order of changes only.
    """

    def __init__(self, config: IndexConfig, dim: int) -> None:
        """Makes an empty index of vectors of length `dim`.

        Raises:
            ValueError: `dim` is no dimension.
        """
        if not 1 <= dim <= 1024:
            raise ValueError(f"the dim of an index must be from 1 to 1024, got {dim}")
        self.config, self.dim = config, dim
        self._content, self._gate = _Content(config, np.zeros((0, dim), np.float32)), Gate()
        self._writer = threading.Lock()
        self._swept_to, self._owed = 0, 0.0
        self._refused = {"not_finite": 0, "zero_length": 0, "full": 0}
        self._done = {"swept": 0, "moved": 0, "splits": 0}

    def __len__(self) -> int:
        """Videos."""
        return self._content.size

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, all of which may come to be used."""
        return sum(array.nbytes for array in self._content.arrays)

    def metrics(self) -> dict[str, float]:
        """Returns how many videos there are, what was refused by reason, how even the clusters are, and what `build` found.

        Of the latter: `scanned`, the videos that a search looks at, and `build_recall` of the sample's queries, NaN without.
        """
        counts = self._content.lists.counts
        used = counts[counts > 0]
        even = {
            "codes_used": used.size,
            "largest_cluster": int(counts.max()),
            "mean_cluster": float(used.mean()) if used.size else 0.0,
        }
        return {
            "videos": len(self),
            **{f"refused_{reason}": number for reason, number in self._refused.items()},
            **even,
            **self._done,
            "scanned": self._content.scanned,
            "build_recall": self._content.recall,
        }

    def vectors(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the vectors of ids [N] as they are kept, float32 [N, D], zeros for those unknown; and which are known."""
        with self._gate.search():
            slots = self._content.slots(np.asarray(ids, np.int64))
            out = np.empty((slots.size, self.dim), np.float32)
            read_vectors(self._content.videos.halves, slots, out)
        return out, slots >= 0

    def search(self, queries: np.ndarray, k: int, scanned: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns the videos with the largest inner products.

        Args:
            queries: float32 [Q, D].
            k: How many.
            scanned: Videos to look at, if not 0: instead of the config's, or of the number that `build` found.

        Returns:
            ids int64 [Q, k] and scores float32 [Q, k], best first; score -inf (and id 0) where there are fewer.

        Raises:
            ValueError: A query is not finite or of another length, or k is below 1.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries must be float32 [Q, {self.dim}], got {queries.shape}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not np.isfinite(queries).all():
            raise ValueError("queries have NaN or infinite numbers; the user tower must give finite ones")
        ids, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        for first in range(0, len(queries), _SEARCHED):
            where = slice(first, first + _SEARCHED)
            with self._gate.search():
                self._find(self._content, queries[where], scanned, ids[where], scores[where])
        return ids, scores

    def _find(self, content: _Content, queries: np.ndarray, scanned: int, ids: np.ndarray, scores: np.ndarray) -> None:
        """Searches content for queries [Q, D]; writes ids and scores [Q, k]."""
        most = max(min(ids.shape[1], content.size), 1)
        budget = min(scanned or content.scanned, max(content.size, 1))
        # Small clusters come together: ask for twice as many as would do on average.
        clusters = min(2 * budget * self.config.codes // max(content.size, 1) + 8, self.config.codes)
        exact = min(int(most * self.config.rescored) + LANES, max(content.size, 1))
        search(queries, content.codes, content.lists, content.videos, clusters, budget, exact, ids, scores)

    def upsert(self, ids: np.ndarray, vectors: np.ndarray) -> int:
        """Adds videos, and moves those that are there. Of an id that comes twice, the last one counts.

        One that is not finite, has the length zero (both as float16), or finds no room is refused and counted; if it is there
        already, it stays as it was.

        Args:
            ids: int64 [N], any.
            vectors: float32 [N, D].

        Returns:
            How many were refused.
        """
        with self._writer:
            ids, halves, vectors, refused = self._checked(ids, vectors)
            for first in range(0, ids.size, _WRITTEN):
                where = slice(first, first + _WRITTEN)
                refused += self._write(ids[where], halves[where], vectors[where])
        return refused

    def remove(self, ids: np.ndarray) -> int:
        """Removes videos; returns how many were there. Once this returns, no search that begins finds them."""
        number = 0
        with self._writer:
            ids = np.unique(np.asarray(ids, np.int64))
            for first in range(0, ids.size, _WRITTEN):
                content, some = self._content, ids[first : first + _WRITTEN]
                with self._gate.change():
                    slots = content.slots(some)
                    index_lists.take_out(slots, *content.parts)
                    content.maps.erase(some, 0)
                    gone = int((slots >= 0).sum())
                    content.size -= gone
                number += gone
                self._owed += self.config.swept * gone
        return number

    def build(self, ids: np.ndarray, vectors: np.ndarray, queries: np.ndarray | None = None) -> int:
        """Replaces all content; searches go on in the old one meanwhile, whose memory is given back afterwards.

        Args:
            ids: int64 [N].
            vectors: float32 [N, D].
            queries: float32 [Q, D], a sample of the users' vectors, some thousand. Clusters are made in their metric, and the
                videos to look at are as many as the config's recall takes, judged by exact search for up to 256 of them.
                Without: all directions count alike, and the number is the config's.

        Returns:
            How many were refused, as `upsert` does.

        Raises:
            ValueError: A query is not finite or of another length.
        """
        sample, judges = checked_queries(queries, self.dim), np.zeros((0, self.dim), np.float32)
        if self.config.recall:
            sample, judges = halves_of(sample)
        with self._writer:
            ids, halves, vectors, refused = self._checked(ids, vectors)
            content, clusters = _Content(self.config, sample), np.full(ids.size, -1, np.int32)
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            threads = ShardThreads(cores, ())
            if ids.size:
                learn_codes(vectors, content.codes, threads)
                threads.run(lambda a, b: nearest_codes(vectors[a:b], content.codes, clusters[a:b]), ids.size)
                content.codes.sums[:] = 0
            for first in range(0, ids.size, _BUILT):
                where = slice(first, first + _BUILT)
                slots, full = content.new_slots(ids[where], self.config.max_videos)
                self._refused["full"] += full
                refused += full
                some = slots, ids[where], halves[where], vectors[where], clusters[where]
                index_lists.put(*some, *content.parts, False)
            set_codes(content.codes, content.lists.counts)
            for cluster in np.flatnonzero(content.lists.counts > self._largest(content)):
                self._split(content, int(cluster))
            if judges.size and content.size:
                self._tune(content, vectors[content.slots(ids) >= 0], judges)
            with self._gate.change():
                self._content, self._swept_to = content, 0
        return refused

    def _tune(self, content: _Content, vectors: np.ndarray, queries: np.ndarray) -> None:
        """Finds how many videos a search has to look at."""

        def scores_of(queries: np.ndarray, k: int, scanned: int) -> np.ndarray:
            ids, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
            self._find(content, queries, scanned, ids, scores)
            return scores

        content.scanned, content.recall = budget_for(self.config.recall, vectors, queries, scores_of)

    def learn(self, queries: np.ndarray) -> None:
        """Takes the metric of newer queries, float32 [Q, D]; videos move as they are swept. The videos to look at stay as many.

        Raises:
            ValueError: A query is not finite or of another length, or there is none.
        """
        sample = checked_queries(queries, self.dim)
        if not sample.size:
            raise ValueError("to learn from queries takes one at least that is not zero, got none")
        with self._writer:
            content = self._content
            codes = make_codes(self.config.codes, *metric(sample), content.codes.centre)
            index_lists.add_up(content.lists, codes, content.videos)
            with self._gate.change():
                content.codes = codes

    def _checked(self, ids: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Returns distinct ids, the bits of their float16 vectors, those as float32, and how many were refused."""
        ids, vectors = np.asarray(ids), np.asarray(vectors)
        if ids.ndim != 1 or vectors.shape != (ids.size, self.dim):
            raise ValueError(f"expected ids [N] and vectors [N, {self.dim}], got {ids.shape} and {vectors.shape}")
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            halves = vectors.astype(np.float16)
        finite, zero = np.isfinite(halves).all(1), ~halves.any(1)
        self._refused["not_finite"] += int((~finite).sum())
        self._refused["zero_length"] += int(zero.sum())
        good = np.flatnonzero(finite & ~zero)
        refused = ids.size - good.size
        _, last = np.unique(ids[good][::-1], return_index=True)
        good = good[np.sort(good.size - 1 - last)]
        halves = np.ascontiguousarray(halves[good])
        return ids[good].astype(np.int64), halves.view(np.uint16), halves.astype(np.float32), refused

    def _write(self, ids: np.ndarray, halves: np.ndarray, vectors: np.ndarray) -> int:
        """Writes a block and sweeps as many videos as are owed; returns how many found no room."""
        # Kernels give up the lock of Python, and to get it back takes longer than they do: few calls, and one change.
        content, swept = self._content, self._to_sweep(ids.size)
        clusters = np.empty(ids.size + swept.size, np.int32)
        index_lists.choose(vectors, swept, *content.parts, np.float32(self.config.crowding), clusters)
        with self._gate.change():
            slots, full = content.new_slots(ids, self.config.max_videos)
            index_lists.put(slots, ids, halves, vectors, clusters, *content.parts, True)
            self._done["moved"] += index_lists.move(swept, clusters[ids.size :], *content.parts) if swept.size else 0
        self._done["swept"] += swept.size
        self._refused["full"] += full
        for cluster in np.unique(np.maximum(clusters, 0)):
            if content.lists.counts[cluster] > self._largest(content):
                self._split(content, int(cluster))
        return full

    def _to_sweep(self, changes: int) -> np.ndarray:
        """Returns the slots whose turn it is, int64."""
        self._owed += self.config.swept * changes
        number, size = min(int(self._owed), _SWEPT), self._content.videos.places.size
        self._owed = min(self._owed - number, size)
        slots = np.arange(self._swept_to, self._swept_to + number) % size
        self._swept_to = (self._swept_to + number) % size
        return slots

    def _largest(self, content: _Content) -> int:
        # A split leaves halves, so clusters are from half of this to all of it, and as many as there are codes.
        return max(3 * content.size // (2 * self.config.codes), index_lists.SMALLEST)

    def _split(self, content: _Content, cluster: int) -> None:
        """Gives half of a cluster to an empty one, or to the smallest one, whose videos go elsewhere."""
        counts = content.lists.counts
        into = int(counts.argmin())
        if 3 * int(counts[into]) > int(counts[cluster]):
            return
        if counts[into] > 0:
            with self._gate.change():
                if not index_lists.dissolve(into, *content.parts):
                    return
        with self._gate.change():
            index_lists.split(cluster, into, *content.parts)
        self._done["splits"] += 1


def warm_up(dim: int) -> None:
    """Compiles all kernels, or reads them from numba's cache: else the first search and the first change would wait."""
    index, ids = VideoIndex(IndexConfig(max_videos=1000), dim), np.arange(1000)
    vectors = np.random.default_rng(0).normal(size=(1000, dim))
    index.build(ids[:500], vectors[:500], vectors[500:510])
    index.learn(vectors[510:])
    index.upsert(ids[500:], np.broadcast_to(vectors[0], (500, dim)) + 0.1 * vectors[500:])  # one cluster grows and is split
    index.remove(ids[::2])
    index.search(vectors[:1], 10)
    index.vectors(ids[:1])
