import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_jax.ids.strings import string_ids

P1, P2, P3, P4, P5 = (
    *(0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9),
    *(0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5),
)
ALL = 2**64 - 1


def rotate(x: int, bits: int) -> int:
    return (x << bits | x >> (64 - bits)) & ALL


def step(lane: int, value: int) -> int:
    return rotate((lane + value * P2) & ALL, 31) * P1 & ALL


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0, from its specification."""
    h, rest = P5, data
    if len(data) >= 32:
        lanes = [(P1 + P2) & ALL, P2, 0, -P1 & ALL]
        while len(rest) >= 32:
            lanes = [step(lane, int.from_bytes(rest[8 * k : 8 * k + 8], "little")) for k, lane in enumerate(lanes)]
            rest = rest[32:]
        h = sum(rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & ALL
        for lane in lanes:
            h = ((h ^ step(0, lane)) * P1 + P4) & ALL
    h = (h + len(data)) & ALL
    while len(rest) >= 8:
        h = (rotate(h ^ step(0, int.from_bytes(rest[:8], "little")), 27) * P1 + P4) & ALL
        rest = rest[8:]
    if len(rest) >= 4:
        h = (rotate(h ^ (int.from_bytes(rest[:4], "little") * P1 & ALL), 23) * P2 + P3) & ALL
        rest = rest[4:]
    for byte in rest:
        h = rotate(h ^ (byte * P5 & ALL), 11) * P1 & ALL
    h = (h ^ h >> 33) * P2 & ALL
    h = (h ^ h >> 29) * P3 & ALL
    return h ^ h >> 32


def hexes(strings: pa.Array) -> list[str]:
    return [f"{value:016x}" for value in string_ids(strings).view(np.uint64).tolist()]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_published_values(kind: pa.DataType) -> None:
    strings = pa.array(["", "a", "abc", "Nobody inspects the spammish repetition"], kind)
    assert hexes(strings) == ["ef46db3751d8e999", "d24ec4f1a98c6e5b", "44bc2cf5ad770999", "fbcea83c8a378bf1"]


def test_every_length_agrees_with_the_specification() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(1, 128, size))) for size in range(101)]
    assert string_ids(pa.array(texts)).view(np.uint64).tolist() == [xxh64(text.encode()) for text in texts]


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=50)), max_size=20), st.integers(0, 5), st.integers(0, 25))
def test_sliced_arrays_with_nulls(texts: list[str | None], first: int, length: int) -> None:
    ids = string_ids(pa.array(texts, pa.string()).slice(min(first, len(texts)), length))
    assert ids.dtype == np.int64
    expected = [xxh64((text or "").encode()) for text in texts[first : first + length]]
    assert ids.view(np.uint64).tolist() == expected


def test_what_is_under_a_null_does_not_matter() -> None:
    under = pa.StringArray.from_buffers(
        3, pa.py_buffer(np.array([0, 2, 4, 5], np.int32)), pa.py_buffer(b"xxyyz"), pa.py_buffer(b"\x05")
    )
    assert under.to_pylist() == ["xx", None, "z"]
    assert string_ids(under).tolist() == string_ids(pa.array(["xx", "", "z"])).tolist()


def test_the_array_is_not_changed_and_equal_strings_agree() -> None:
    many = pa.array([f"user-{k % 1000}" for k in range(5000)])
    ids = string_ids(many)
    assert len(set(ids.tolist())) == 1000 and np.array_equal(ids[:1000], ids[4000:])
