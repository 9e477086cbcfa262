"""The index against a dict of vectors that is searched by brute force."""

import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.serve import index_codes, index_lists
from monolith_jax.serve.index import IndexConfig, VideoIndex, warm_up
from monolith_jax.serve.index_kernels import search

DIM = 16


def unit(number: int, seed: int, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(number, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def topics(number: int, seed: int, dim: int = 64, spread: float = 0.5) -> np.ndarray:
    """Returns unit vectors around 100 topics: what towers give is no cloud without shape."""
    rng = np.random.default_rng(seed)
    vectors = unit(100, 77, dim)[rng.integers(100, size=number)] + spread / dim**0.5 * rng.normal(size=(number, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def some_ids(number: int, seed: int = 0) -> np.ndarray:
    edges = np.array([0, -1, 2**63 - 1, -(2**63)], np.int64)[:number]
    others = np.random.default_rng(seed).integers(-(2**63), 2**63, number - edges.size, dtype=np.int64)
    return np.concatenate([edges, others])


def recall(index: VideoIndex, ids: np.ndarray, vectors: np.ndarray, queries: np.ndarray, k: int, scanned: int = 0) -> float:
    found, _ = index.search(queries, k, scanned)
    best = np.argsort(-(queries @ vectors.T), 1)[:, :k]
    return float(np.mean([np.isin(ids[of_query], got).mean() for of_query, got in zip(best, found, strict=True)]))


def check_all(index: VideoIndex, known: dict[int, np.ndarray], queries: np.ndarray) -> None:
    """Holds that a search which looks at everything finds exactly the known videos, with their inner products."""
    ids, scores = index.search(queries, len(known) + 2, 10**9)
    assert (ids[:, len(known) :] == 0).all() and np.isneginf(scores[:, len(known) :]).all()
    for query, of_query, got in zip(queries, ids[:, : len(known)].tolist(), scores[:, : len(known)], strict=True):
        assert sorted(of_query) == sorted(known)
        expected = np.array([known[id].astype(np.float16).astype(np.float32) @ query for id in of_query], np.float32)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert (np.diff(got) <= 0).all()


@pytest.mark.parametrize("way", ["build", "upsert"])
@pytest.mark.parametrize("number", [1, 31, 32, 33, 700])
def test_all_is_found_when_all_is_looked_at(way: str, number: int) -> None:
    ids, vectors = some_ids(number), unit(number, 1)
    index = VideoIndex(IndexConfig(max_videos=1000), DIM)
    assert getattr(index, way)(ids, vectors) == 0
    assert len(index) == number
    check_all(index, dict(zip(ids.tolist(), vectors, strict=True)), unit(3, 2))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_does_what_a_dict_does(data: st.DataObject) -> None:
    pool = some_ids(120)
    index = VideoIndex(IndexConfig(max_videos=80, num_codes=32, swept=data.draw(st.sampled_from([0.0, 1.0, 7.5]))), DIM)
    known: dict[int, np.ndarray] = {}
    for step in range(data.draw(st.integers(1, 12))):
        ids = pool[data.draw(st.lists(st.integers(0, pool.size - 1), max_size=90))]
        match data.draw(st.sampled_from(["upsert", "upsert", "remove", "build"])):
            case "upsert":
                vectors = unit(ids.size, step)
                last = dict(zip(ids.tolist(), vectors, strict=True))
                new = list(dict.fromkeys(id for id in reversed(ids.tolist()) if id not in known))[::-1]
                room = 80 - len(known)
                assert index.upsert(ids, vectors) == max(len(new) - room, 0)
                known |= {id: vector for id, vector in last.items() if id in known or id in new[:room]}
            case "remove":
                assert index.remove(ids) == len(set(ids.tolist()) & set(known))
                known = {id: vector for id, vector in known.items() if id not in set(ids.tolist())}
            case _:
                ids = np.unique(ids)[:80]
                vectors = unit(ids.size, step)
                assert index.build(ids, vectors) == 0
                known = dict(zip(ids.tolist(), vectors, strict=True))
        assert len(index) == len(known)
        check_all(index, known, unit(2, step))
    kept, found = index.vectors(pool)
    assert found.tolist() == [id in known for id in pool.tolist()]
    for id, vector, there in zip(pool.tolist(), kept, found, strict=True):
        np.testing.assert_array_equal(vector, known[id].astype(np.float16) if there else np.zeros(DIM))


def test_what_is_no_vector_is_refused_and_leaves_what_was_there() -> None:
    index = VideoIndex(IndexConfig(max_videos=100), DIM)
    ids, vectors = some_ids(10), unit(10, 1)
    index.upsert(ids, vectors)
    bad = unit(10, 2)
    bad[0, 3], bad[1, 0], bad[2], bad[3, 1], bad[4] = np.nan, np.inf, 0, 1e30, 1e-30
    assert index.upsert(ids[:5], bad[:5]) == 5
    told = index.metrics()
    assert (told["refused_not_finite"], told["refused_zero_length"], told["videos"]) == (3, 2, 10)
    check_all(index, dict(zip(ids.tolist(), vectors, strict=True)), unit(3, 3))


def test_a_full_index_refuses_new_videos_and_moves_known_ones() -> None:
    index = VideoIndex(IndexConfig(max_videos=50), DIM)
    ids, vectors = some_ids(60), unit(60, 1)
    assert index.upsert(ids, vectors) == 10
    assert index.metrics()["refused_full"] == 10
    moved = unit(50, 2)
    assert index.upsert(ids[:50], moved) == 0
    assert index.remove(ids[:1]) == 1 and index.upsert(ids[50:52], vectors[50:52]) == 1
    known = dict(zip(ids[1:51].tolist(), np.concatenate([moved[1:], vectors[50:51]]), strict=True))
    check_all(index, known, unit(3, 3))


def test_of_an_id_that_comes_twice_the_last_counts() -> None:
    index = VideoIndex(IndexConfig(max_videos=50), DIM)
    vectors = unit(3, 1)
    assert index.upsert(np.array([5, 7, 5]), vectors) == 0
    check_all(index, {5: vectors[2], 7: vectors[1]}, unit(2, 2))


def test_an_empty_index_finds_nothing_and_bad_queries_are_errors() -> None:
    index = VideoIndex(IndexConfig(max_videos=50), DIM)
    check_all(index, {}, unit(2, 1))
    assert index.remove(np.array([1])) == 0 and len(index) == 0
    assert index.search(np.zeros((0, DIM), np.float32), 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="NaN"):
        index.search(np.full((1, DIM), np.nan, np.float32), 3)
    with pytest.raises(ValueError, match="float32"):
        index.search(np.zeros((1, DIM + 1), np.float32), 3)
    with pytest.raises(ValueError, match="at least 1"):
        index.search(np.zeros((1, DIM), np.float32), 0)
    with pytest.raises(ValueError, match="expected ids"):
        index.upsert(np.arange(3), unit(2, 1))


def test_result_depends_on_the_order_of_calls_only() -> None:
    found = []
    for _ in range(2):
        index = VideoIndex(IndexConfig(max_videos=6000), 64)
        index.build(np.arange(4000), topics(4000, 1))
        index.upsert(np.arange(3000, 6000), topics(3000, 2))
        index.remove(np.arange(0, 6000, 3))
        found.append(index.search(topics(20, 3), 50, 500))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("way", ["build", "upsert"])
def test_recall_and_balance(way: str) -> None:
    ids, vectors, queries = np.arange(50_000), topics(50_000, 1), topics(100, 2)
    index = VideoIndex(IndexConfig(max_videos=50_000), 64)
    getattr(index, way)(ids, vectors)
    assert recall(index, ids, vectors, queries, 100, 4000) >= 0.95
    told = index.metrics()
    assert told["largest_cluster"] <= 3 * told["mean_cluster"]
    assert told["codes_used"] >= 0.8 * index.config.codes


def test_recall_stays_while_all_vectors_turn_and_videos_change() -> None:
    number, queries = 20_000, topics(50, 2)
    index = VideoIndex(IndexConfig(max_videos=number), 64)
    ids, vectors = np.arange(number), topics(number, 1)
    index.build(ids, vectors)
    before = recall(index, ids, vectors, queries, 100, 3000)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(64, 64)))[0].astype(np.float32)
    for step in range(3):
        share = (step + 1) / 3
        vectors = (1 - share) * vectors + share * topics(number, 10 + step) @ turn
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        index.remove(ids[:2000])
        ids = np.concatenate([ids[2000:], np.arange(2000) + (step + 1) * number])
        index.upsert(ids, vectors)
    queries = queries @ turn
    after = recall(index, ids, vectors, queries, 100, 3000)
    assert before >= 0.95 and after >= before - 0.03, (before, after)
    told = index.metrics()
    assert told["largest_cluster"] <= 3 * told["mean_cluster"]


def of_few_directions(number: int, seed: int) -> np.ndarray:
    """Returns unit vectors [N, 64] that share a direction and differ in three: of users, to whom videos differ in little."""
    vectors = np.zeros((number, 64), np.float32)
    vectors[:, :4] = np.random.default_rng(seed).normal((3, 0, 0, 0), (0.1, 0.5, 0.5, 0.5), (number, 4))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_clusters_in_the_metric_of_the_queries_need_less_looking() -> None:
    number = 20_000
    ids, vectors, queries = np.arange(number), unit(number, 1, 64), of_few_directions(600, 5)
    found = []
    for sample in (None, queries[100:]):
        index = VideoIndex(IndexConfig(max_videos=number, recall=0), 64)
        assert index.build(ids, vectors, sample) == 0
        found.append(recall(index, ids, vectors, queries[:100], 100, 1000))
        assert index.metrics()["scanned"] == index.config.scanned
    assert found[1] >= 0.95 > found[0] + 0.2, found


@pytest.mark.parametrize("wanted", [0.8, 0.97])
def test_build_finds_how_many_videos_to_look_at(wanted: float) -> None:
    number = 50_000
    ids, vectors, queries = np.arange(number), topics(number, 1), topics(1000, 2)
    index = VideoIndex(IndexConfig(max_videos=number, recall=wanted), 64)
    index.build(ids, vectors, queries[200:])
    told = index.metrics()
    assert told["build_recall"] >= wanted and 0 < told["scanned"] < number
    assert recall(index, ids, vectors, queries[:200], 100) >= wanted - 0.02
    index.build(ids, vectors)
    assert index.metrics()["scanned"] == index.config.scanned and np.isnan(index.metrics()["build_recall"])


def test_recall_stays_when_queries_turn_and_are_learnt_again() -> None:
    number = 20_000
    ids, vectors, queries = np.arange(number), unit(number, 1, 64), of_few_directions(600, 5)
    index = VideoIndex(IndexConfig(max_videos=number), 64)
    index.build(ids, vectors, queries[100:])
    before = recall(index, ids, vectors, queries[:100], 100, 1000)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(64, 64)))[0].astype(np.float32)
    vectors, queries = vectors @ turn, queries @ turn
    index.learn(queries[100:])
    index.upsert(ids, vectors)
    after = recall(index, ids, vectors, queries[:100], 100, 1000)
    assert before >= 0.95 and after >= before - 0.03, (before, after)
    check_all(index, dict(zip(ids.tolist(), vectors, strict=True)), queries[:1])


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_few_queries_or_videos_are_no_error(number: int) -> None:
    ids, vectors = some_ids(40), unit(40, 1)
    for size in (0, 1, 40):
        index = VideoIndex(IndexConfig(max_videos=50), DIM)
        assert index.build(ids[:size], vectors[:size], np.concatenate([unit(number, 2), np.zeros((1, DIM))])) == 0
        check_all(index, dict(zip(ids[:size].tolist(), vectors[:size], strict=True)), unit(2, 3))


def test_bad_samples_of_queries_are_errors() -> None:
    index = VideoIndex(IndexConfig(max_videos=50), DIM)
    for wrong in (np.full((2, DIM), np.nan), np.zeros((2, DIM + 1)), np.zeros(DIM)):
        with pytest.raises(ValueError, match="sample of queries"):
            index.build(np.arange(3), unit(3, 1), wrong)
    with pytest.raises(ValueError, match="takes one"):
        index.learn(np.zeros((3, DIM)))


def test_searches_during_changes_find_whole_videos_only() -> None:
    """Every vector says which id it is of; nobody removed is found, and nobody in the middle of a change."""
    number, dim = 3000, 32
    index, of_id = VideoIndex(IndexConfig(max_videos=2 * number), dim), unit(2 * number, 1, dim)
    ids = np.arange(2 * number)
    index.build(ids[:number], of_id[:number])
    removed, changes = np.zeros(2 * number, np.bool_), np.zeros(2 * number, np.int64)
    done, errors = threading.Event(), []

    def read(seed: int) -> None:
        queries, turn = unit(64, seed, dim), 0
        while not done.is_set():
            query, turn, before = queries[turn % 64 : turn % 64 + 1], turn + 1, changes.copy()
            was_removed = removed.copy()
            found, scores = index.search(query, 50, 1000)
            found, scores = found[0][np.isfinite(scores[0])], scores[0][np.isfinite(scores[0])]
            right = np.allclose(np.abs(of_id[found] @ query[0]), np.abs(scores), atol=2e-3)
            gone = was_removed & (before == changes)  # removed before the search began, and not there again since
            if gone[found].any() or np.unique(found).size != found.size or not right:
                errors.append((found, scores))

    readers = [threading.Thread(target=read, args=(seed,)) for seed in (11, 12)]
    for reader in readers:
        reader.start()
    rng, sign, ends = np.random.default_rng(0), 1.0, time.perf_counter() + 2
    while time.perf_counter() < ends and not errors:
        some, sign = rng.permutation(2 * number)[:300], -sign
        removed[some] = False
        changes[some] += 1
        index.upsert(some, (sign * of_id[some]).astype(np.float32))
        some = rng.permutation(2 * number)[:200]
        index.remove(some)
        removed[some] = True
    done.set()
    for reader in readers:
        reader.join()
    assert not errors, errors[0]


def test_memory_does_not_grow_with_changes() -> None:
    index = VideoIndex(IndexConfig(max_videos=2000), DIM)
    before = index.nbytes
    for step in range(20):
        index.upsert(np.arange(step * 2000, step * 2000 + 2000), unit(2000, step))
        index.remove(np.arange(step * 2000, step * 2000 + 2000))
    assert len(index) == 0 and index.nbytes == before
    index.upsert(np.arange(2000), unit(2000, 99))
    assert len(index) == 2000 and not index.metrics()["refused_full"]
    check_all(index, dict(zip(range(2000), unit(2000, 99), strict=True)), unit(1, 1))


def _digest() -> str:
    index = VideoIndex(IndexConfig(max_videos=3000), 64)
    index.build(np.arange(2000), topics(2000, 1))
    index.upsert(np.arange(1000, 3000), topics(2000, 2))
    ids, scores = index.search(topics(20, 3), 50, 600)
    # The sums of float32 are those of each machine: equal ids in another order are ties.
    return " ".join(map(str, [*np.sort(ids, 1).ravel().tolist(), np.round(float(scores.sum()), 2)]))


@pytest.mark.slow
def test_a_machine_without_the_instruction_finds_the_same() -> None:
    names = "from monolith_jax.serve.int8_blocks import HAS_VNNI; from tests.serve.test_index import _digest"
    script = f"{names}; print(_digest(), HAS_VNNI)"
    plain = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    found = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, check=False)
    assert found.stdout.split() == [*_digest().split(), "False"], found.stderr


def test_config_is_checked() -> None:
    wrongs: tuple[dict[str, Any], ...] = (
        {"max_videos": 0},
        {"crowding": 0.0},
        {"scanned": 0},
        {"rescored": 0.5},
        {"swept": -1.0},
        {"num_codes": -1},
        {"recall": 1.0},
        {"recall": -0.1},
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="IndexConfig"):
            IndexConfig(**wrong)


def test_warm_up_compiles_all_kernels() -> None:
    warm_up(DIM)
    compiled = (
        search,
        *(getattr(index_lists, name) for name in ("choose", "put", "move", "split", "dissolve", "add_up")),
    )
    assert all(kernel.signatures for kernel in compiled)
    assert index_lists.take_out.signatures and index_codes.set_codes.signatures and index_codes.nearest_codes.signatures
