"""Copies in memory that is used again once nobody holds them."""

import gc

import numpy as np

from monolith_jax.ids.copies import Copies


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_is_used_again_once_no_view_is_left() -> None:
    copies, array = Copies(), np.arange(6, dtype=np.uint32).reshape(2, 3)
    first = copies.copy("a", array)
    view, where = first[1:].view(np.int32)[0, 1:], address(first)
    array += 10
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]] and first.flags.writeable
    del first
    gc.collect()
    second = copies.copy("a", array)
    assert address(second) != where and view.tolist() == [4, 5]
    del view
    gc.collect()
    third = copies.copy("a", array + 1)
    assert address(third) == where and third.tolist() == [[11, 12, 13], [14, 15, 16]]
    assert second.tolist() == array.tolist()


def test_names_and_forms_are_apart() -> None:
    copies = Copies()
    for name, array in (
        ("a", np.ones(3)),
        ("b", np.ones(3)),
        ("a", np.ones(2)),
        ("a", np.ones(3, np.float32)),
        ("a", np.ones(())),
    ):
        copy = copies.copy(name, array)
        assert copy.dtype == array.dtype and copy.shape == array.shape and (copy == array).all()
    assert copies.copy("empty", np.zeros((0, 4))).shape == (0, 4)


def test_copies_outlive_what_made_them() -> None:
    copy = Copies().copy("a", np.arange(5))
    gc.collect()
    assert copy.tolist() == [0, 1, 2, 3, 4]
