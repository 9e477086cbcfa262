from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from monolith_jax.ids import kernels, lines, restore
from monolith_jax.ids.cuckoo import aligned_lines

ALL = 2**64 - 1
WORDS = st.integers(0, ALL)
HASH_IDS: Any = kernels.hash_ids
UNHASH: Any = kernels.unhash


def mixed(x: int) -> int:
    """Stafford's variant 13 with Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ALL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ALL
    return x ^ (x >> 31)


@settings(deadline=None)
@given(WORDS)
@example(0)
@example(ALL)
@example(2**63)
@example(2**63 - 1)
def test_a_hash_gives_back_its_id(x: int) -> None:
    word = np.uint64(x)
    assert lines.mix(word) == mixed(x)
    assert lines.unmix(np.uint64(lines.mix(word))) == x
    assert lines.mix(np.uint64(lines.unmix(word))) == x


@settings(deadline=None)
@given(st.lists(WORDS, max_size=40), WORDS, WORDS)
def test_ids_of_several_tables_come_back_from_their_hashes(ids: list[int], seed: int, other_seed: int) -> None:
    words, hashes, back = np.array(ids, np.uint64), *(np.zeros((2, len(ids)), np.uint64))
    seeds, tables = np.array([seed, other_seed], np.uint64), np.arange(len(ids), dtype=np.int32) % 2
    for table in range(2):
        of_table = np.empty(len(ids), np.uint64)
        HASH_IDS(words, seeds[table], of_table)
        assert of_table.tolist() == [mixed(x ^ int(seeds[table])) for x in ids]
        hashes[tables == table] = of_table[tables == table]
    UNHASH(hashes, seeds, tables, back)
    assert back.tolist() == ids


@settings(deadline=None)
@given(WORDS, st.integers(2, 2**31))
@example(ALL, 2)
@example(ALL, 2**31)
@example(2**32 - 1, 3)
@example(0, 1000)
def test_an_id_has_two_buckets(h: int, num_buckets: int) -> None:
    first, second = (int(bucket(np.uint64(h), num_buckets)) for bucket in (lines.first_bucket, lines.second_bucket))
    assert first == h % 2**32 * num_buckets >> 32 < num_buckets
    other = (h * 0x9E3779B97F4A7C15 % 2**64 >> 32) * num_buckets >> 32
    assert second == (other if other != first else (first + 1) % num_buckets)
    assert 0 <= second < num_buckets and second != first


def test_of_one_bucket_both_are_it() -> None:
    for h in (0, 1, ALL):
        assert lines.first_bucket(np.uint64(h), 1) == lines.second_bucket(np.uint64(h), 1) == 0


@pytest.mark.parametrize("num_buckets", [8, 1000])
def test_buckets_are_met_equally_often(num_buckets: int) -> None:
    hashes = np.empty(100 * num_buckets, np.uint64)
    HASH_IDS(np.arange(hashes.size, dtype=np.uint64), np.uint64(7), hashes)
    for bucket in (lines.first_bucket, lines.second_bucket):
        counts = np.bincount([bucket(h, num_buckets) for h in hashes], minlength=num_buckets)
        # Chi-squared has mean n - 1 and variance 2 (n - 1).
        assert ((counts - 100.0) ** 2 / 100).sum() < num_buckets + 6 * np.sqrt(2 * num_buckets)


@numba.njit
def _slot_of(address: Any, key: Any) -> Any:
    lines.prefetch(address)  # changes nothing
    return lines.slot_of(address, key)


@numba.njit
def _add_to(address: Any, value: Any) -> None:
    lines.store(address, lines.load(address) + value)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2**32, 2**63, ALL]), min_size=4, max_size=4),
    st.lists(st.sampled_from([-1, -(2**31), 0, 7, 2**31 - 1]), min_size=4, max_size=4),
    st.sampled_from([0, 1, 2**32, 2**63, ALL]),
)
def test_a_hash_is_found_in_the_first_slot_that_has_it_and_a_row(hashes: list[int], rows: list[int], wanted: int) -> None:
    bucket = aligned_lines(3)[1]
    bucket[:8].view(np.uint64)[:] = hashes
    bucket[8:12].view(np.int32)[:] = rows
    expected = [slot for slot in range(4) if hashes[slot] == wanted and rows[slot] >= 0]
    before = bucket.copy()
    assert _slot_of(bucket.ctypes.data, np.uint64(wanted)) == min(expected, default=4)
    assert np.array_equal(bucket, before)


def test_words_are_read_and_written_in_place() -> None:
    words = np.arange(4, dtype=np.int32)
    _add_to(words.ctypes.data + 8, np.int32(-10))
    assert words.tolist() == [0, 1, -8, 3]


@pytest.mark.parametrize("number", [1, 3, 2**16 + 1])
def test_lines_start_where_cache_lines_do(number: int) -> None:
    made = aligned_lines(number)
    assert made.shape == (number, lines.LINE_WORDS) and made.dtype == np.uint32
    assert made.ctypes.data % (64 if number * 64 <= 2**22 else 2**21) == 0
    made[:] = 1  # all of it is there


SOURCE = """
def double(x):
    return x + x
"""


def module_of(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_cache(function: Callable[..., Any]) -> bool:
    """Compiles the function for an int; returns whether it was on disk."""
    compiled = lines.jit(function)
    assert compiled(4) == 8
    hits, misses = (sum(numbers.values()) for numbers in (compiled.stats.cache_hits, compiled.stats.cache_misses))
    assert hits + misses == 1
    return bool(hits)


def test_what_is_cached_is_used_until_a_file_of_the_package_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubling.py").write_text(SOURCE)
    double = module_of(tmp_path / "doubling.py").double
    assert [from_cache(double), from_cache(double)] == [False, True]
    stamp = lines._stamp
    (changed, size), *others = stamp(tmp_path)
    monkeypatch.setattr(lines, "_stamp", lambda folder: ((changed + 1, size), *others))
    assert [from_cache(double), from_cache(double)] == [False, True]
    monkeypatch.setattr(lines, "_stamp", stamp)
    assert not from_cache(double)


def test_kernels_are_stamped_with_all_files_of_the_package() -> None:
    folder = Path(lines.__file__).parent
    stamp, serve = lines._stamp(folder), folder.parent / "serve"
    assert len(stamp) == len(list(folder.glob("*.py"))) > 5
    for path in (folder / "lines.py", folder / "kernels.py"):
        assert (path.stat().st_mtime, path.stat().st_size) in stamp
    assert set(lines._stamp(serve)) > set(stamp), "and with those beside the caller"
    # Private parts of numba: an update that moves them must be noticed here.
    for kernel in (kernels.lookup, kernels.find, kernels.insert, kernels.erase, restore.is_sound, lines.mix):
        own, package = kernel._cache._cache_file._source_stamp
        assert own and package == stamp


def test_without_a_folder_to_write_to_it_compiles_all_the_same() -> None:
    space: dict[str, Any] = {}
    exec(compile(SOURCE, "<no file>", "exec"), space)  # numba looks for a folder beside the file and finds none
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(space["double"])
    compiled = lines.jit(space["double"])
    assert compiled(4) == 8 and compiled.nopython_signatures
    assert lines.inline(space["double"])(5) == 10
