from collections.abc import Callable, Iterator

import numpy as np
import pytest

from monolith_jax.stream.open_rows import keys_of
from monolith_jax.stream.router import FULL, NOWHERE, SEVERAL, Router


def hashes_of(first: int, last: int) -> np.ndarray:
    ids = np.arange(first, last)
    return keys_of(ids // 8, ids).hashes


def nothing_else(hashes: np.ndarray, buckets: np.ndarray) -> Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]:
    return lambda: iter([(hashes, buckets)])


def test_names_the_bucket_of_every_key() -> None:
    router, all_hashes, all_buckets = Router(4), np.empty(0, np.uint64), np.empty(0, np.int32)
    rng = np.random.default_rng(0)
    for first in range(0, 200_000, 10_000):
        hashes, buckets = hashes_of(first, first + 10_000), rng.integers(0, 1024, 10_000).astype(np.int32)
        all_hashes, all_buckets = np.concatenate([all_hashes, hashes]), np.concatenate([all_buckets, buckets])
        router.insert(hashes, buckets, nothing_else(all_hashes, all_buckets))
    found = router.route(all_hashes)
    assert ((found == all_buckets) | (found == SEVERAL)).all()
    assert (found == SEVERAL).mean() < 1e-4
    which, buckets = router.candidates(all_hashes)
    assert np.unique(which[buckets == all_buckets[which]]).size == all_hashes.size
    # One false match in a hundred thousand.
    assert (router.route(hashes_of(10**6, 2 * 10**6)) != NOWHERE).mean() < 3e-5
    assert router.num_bytes < 4 * all_hashes.size / FULL * 1.6


@pytest.mark.parametrize("tag_bits", [2, 22])
def test_removes_what_was_inserted(tag_bits: int) -> None:
    router, hashes = Router(64, tag_bits), hashes_of(0, 800)
    buckets = (np.arange(800) % 3).astype(np.int32)
    router.insert(hashes, buckets, nothing_else(hashes, buckets))
    order = np.random.default_rng(1).permutation(800)
    for gone in (order[:300], order[300:700]):
        router.remove(hashes[gone], buckets[gone])
    left = order[700:]
    which, found = router.candidates(hashes[left])
    assert {*which[found == buckets[left][which]]} == {*range(100)}
    router.remove(hashes[left], buckets[left])
    assert (router.route(hashes) == NOWHERE).all() and router.num_entries == 0


def test_lines_fill_evenly() -> None:
    number = int(FULL * 16 * 20_000)
    router, hashes = Router(20_000), hashes_of(0, number)
    before = router.num_bytes
    buckets = np.zeros(number, np.int32)
    router.insert(hashes, buckets, nothing_else(hashes, buckets))
    assert router.num_bytes == before


def test_a_key_may_be_in_very_many_buckets() -> None:
    router = Router(64)
    hashes, buckets = np.repeat(hashes_of(0, 5), 100), np.tile(np.arange(100, dtype=np.int32), 5)
    router.insert(hashes, buckets, nothing_else(hashes, buckets))
    router.insert(hashes[:50], buckets[:50], nothing_else(np.tile(hashes, 2), np.tile(buckets, 2)))
    assert (router.route(hashes_of(0, 5)) == SEVERAL).all() and (router.route(hashes_of(5, 50)) == NOWHERE).all()
    which, found = router.candidates(hashes_of(0, 10))
    assert which.tolist() == np.repeat(np.arange(5), 100).tolist() and found.tolist() == buckets.tolist()
    router.remove(hashes[::2], buckets[::2])
    router.remove(hashes[1::2], buckets[1::2])
    router.remove(hashes[:50], buckets[:50])
    assert (router.route(hashes_of(0, 5)) == NOWHERE).all() and router.num_entries == 0
