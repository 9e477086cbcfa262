"""The contestants of `launch.bench.index`: the index of this project and those of other libraries, behind the same calls.

In: vectors of videos by number. Out: the numbers of the nearest. Each is built and searched as its authors advise; those that
may not be changed while they are searched take turns at the gate that this project's index uses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from monolith_jax.serve.gate import Gate
from monolith_jax.serve.index import IndexConfig, VideoIndex


@dataclass(frozen=True)
class Contestant:
    """A built index."""

    name: str
    settings: str
    """What it was built with."""
    efforts: tuple[int, ...]
    """What recall is bought with, rising: videos scanned, ef, expansion, nprobe."""
    set_effort: Callable[[int], None]
    one: Callable[[np.ndarray, int], np.ndarray]
    """Query [1, D] and k to numbers [k]: one thread."""
    many: Callable[[np.ndarray, int], np.ndarray]
    """Queries [Q, D] and k to numbers [Q, k]: all threads."""
    put: Callable[[np.ndarray, np.ndarray], object]
    """Numbers [N] and vectors [N, D] that enter or move."""
    remove: Callable[[np.ndarray], object]
    """Numbers [N] that leave."""


def needed(module: str) -> Any:
    """Returns a library that only the benchmark needs.

    Raises:
        ValueError: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the benchmark compares with {module}, which is not installed: pip install 'monolith_jax[bench]', or leave it out "
            "of --rivals"
        ) from error


def _ladder(first: int, last: int) -> tuple[int, ...]:
    """Returns efforts about 8 % apart: all contestants are tuned equally finely."""
    steps = np.geomspace(first, last, int(np.log(last / first) / 0.08) + 1)
    return tuple(dict.fromkeys(int(step) for step in steps))


def ours(vectors: np.ndarray, sample: np.ndarray, room: int, threads: int) -> Contestant:
    """Returns this project's index, which learns from a sample of queries."""
    index = VideoIndex(IndexConfig(max_videos=room), vectors.shape[1])
    index.build(np.arange(len(vectors)), vectors, sample)
    effort, pool = [0], ThreadPoolExecutor(threads)

    def many(queries: np.ndarray, k: int) -> np.ndarray:
        parts = np.array_split(queries, threads)
        return np.concatenate(list(pool.map(lambda part: index.search(part, k, effort[0])[0], parts)))

    return Contestant(
        "index",
        f"{index.config.codes} codes, int8 lists, {index.nbytes / 1e6:.0f} MB, would scan {index.metrics()['scanned']:,}",
        _ladder(100, max(len(vectors), 101)),
        lambda scanned: effort.__setitem__(0, scanned),
        lambda query, k: index.search(query, k, effort[0])[0][0],
        many,
        index.upsert,
        index.remove,
    )


def of_hnswlib(connectivity: int) -> Callable[[np.ndarray, int, int], Contestant]:
    """Returns what makes hnswlib's HNSW of that M: ef_construction 200, float32. It must not be searched while it changes."""

    def make(vectors: np.ndarray, room: int, threads: int) -> Contestant:
        index = needed("hnswlib").Index("ip", vectors.shape[1])
        index.init_index(room, M=connectivity, ef_construction=200, allow_replace_deleted=True)
        index.set_num_threads(threads)
        index.add_items(vectors, np.arange(len(vectors)))
        gate, there = Gate(), np.zeros(4 * room, np.bool_)
        there[: len(vectors)] = True

        def one(query: np.ndarray, k: int) -> np.ndarray:
            with gate.search():
                return index.knn_query(query, k, num_threads=1)[0][0]

        def put(numbers: np.ndarray, vectors: np.ndarray) -> None:
            for number, vector in zip(numbers.tolist(), vectors, strict=True):
                with gate.change():
                    index.add_items(vector[None], [number], num_threads=1, replace_deleted=not there[number])
                there[number] = True

        def remove(numbers: np.ndarray) -> None:
            with gate.change():
                for number in numbers.tolist():
                    index.mark_deleted(number)
            there[numbers] = False

        def many(queries: np.ndarray, k: int) -> np.ndarray:
            return index.knn_query(queries, k, num_threads=threads)[0]

        return Contestant(
            "hnswlib", f"M {connectivity}, ef_construction 200", _ladder(100, 20_000), index.set_ef, one, many, put, remove
        )

    return make


def of_usearch(dtype: str, connectivity: int = 16) -> Callable[[np.ndarray, int, int], Contestant]:
    """Returns what makes usearch's HNSW of that type and M: expansion_add 128. It may be changed in searches."""

    def make(vectors: np.ndarray, room: int, threads: int) -> Contestant:
        kind = needed("usearch.index").Index
        index = kind(ndim=vectors.shape[1], metric="ip", dtype=dtype, connectivity=connectivity, expansion_add=128)
        index.add(np.arange(len(vectors)), vectors, threads=threads)
        lock = threading.Lock()  # of changes: one writer, as with the others

        def put(numbers: np.ndarray, vectors: np.ndarray) -> None:
            with lock:
                for number in numbers.tolist():
                    if number in index:
                        index.remove(number)
                index.add(numbers, vectors, threads=1)

        def remove(numbers: np.ndarray) -> None:
            with lock:
                for number in numbers.tolist():
                    index.remove(number)

        return Contestant(
            f"usearch-{dtype}",
            f"connectivity {connectivity}, expansion_add 128",
            _ladder(100, 20_000),
            lambda effort: setattr(index, "expansion_search", effort),
            lambda query, k: index.search(query[0], k, threads=1).keys,
            lambda queries, k: index.search(queries, k, threads=threads).keys,
            put,
            remove,
        )

    return make


def of_faiss(spec: str) -> Callable[[np.ndarray, int, int], Contestant]:
    """Returns what makes the faiss index of a factory's text: inverted lists, 4 sqrt(N) of them. It must not be searched
    while it changes."""

    def make(vectors: np.ndarray, room: int, threads: int) -> Contestant:
        faiss = needed("faiss")
        faiss.omp_set_num_threads(threads)
        lists = 1 << int(np.log2(4 * len(vectors) ** 0.5))
        index = faiss.index_factory(vectors.shape[1], f"IVF{lists},{spec}", faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[np.random.default_rng(0).permutation(len(vectors))[: 64 * lists]])
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
        index.add_with_ids(vectors, np.arange(len(vectors)))
        gate = Gate()

        def one(query: np.ndarray, k: int) -> np.ndarray:
            # The number of threads is the calling thread's own. Without OpenMP's team a query is faster, too.
            faiss.omp_set_num_threads(1)
            with gate.search():
                return index.search(query, k)[1][0]

        def many(queries: np.ndarray, k: int) -> np.ndarray:
            faiss.omp_set_num_threads(threads)
            return index.search(queries, k)[1]

        def put(numbers: np.ndarray, vectors: np.ndarray) -> None:
            with gate.change():
                index.remove_ids(numbers)
                index.add_with_ids(vectors, numbers)

        def remove(numbers: np.ndarray) -> None:
            with gate.change():
                index.remove_ids(numbers)

        def set_effort(effort: int) -> None:
            index.nprobe = effort

        name = f"faiss-{spec.lower()}"
        return Contestant(name, f"IVF{lists}", _ladder(1, lists), set_effort, one, many, put, remove)

    return make


MAKERS: dict[str, Callable[[np.ndarray, int, int], Contestant]] = {
    "usearch-f16": of_usearch("f16"),
    "usearch-f16-m8": of_usearch("f16", 8),
    "usearch-f16-m4": of_usearch("f16", 4),
    "usearch-i8": of_usearch("i8"),
    "hnswlib": of_hnswlib(16),
    "hnswlib-m8": of_hnswlib(8),
    "hnswlib-m4": of_hnswlib(4),
    "faiss-sq8": of_faiss("SQ8"),
    "faiss-flat": of_faiss("Flat"),
}
"""By name, from vectors [N, D], room for so many videos, and threads. Ef is never below k: a graph that finds more than is
demanded even so may be built with fewer edges (m8, m4)."""
