"""State of any form as rows of bytes, which a snapshot can split: nested dicts and lists of JSON and numpy arrays.

In: such a state. Out: uint8 [rows, 2^20]: eight bytes of length, an npz file, padding; and back.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

ROW_BYTES = 2**20
"""Orbax cuts large arrays into chunks whose sizes divide the array's: a large prime length would become chunks of one byte."""
_JSON = "json"
_ARRAY = "array of the npz file"


def pack(state: Any) -> np.ndarray:
    """Returns a state as uint8 [rows, 2^20]."""
    arrays: dict[str, np.ndarray] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[str(len(arrays))] = value
            return {_ARRAY: str(len(arrays) - 1)}
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, list | tuple) else value

    text = np.frombuffer(json.dumps(plain(state)).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{_JSON: text}, **arrays)
    data = np.frombuffer(buffer.getbuffer(), np.uint8)
    rows = np.zeros((-(-(data.size + 8) // ROW_BYTES), ROW_BYTES), np.uint8)
    flat = rows.reshape(-1)
    flat[:8] = np.frombuffer(data.size.to_bytes(8, "little"), np.uint8)
    flat[8 : 8 + data.size] = data
    return rows


def unpack(rows: np.ndarray) -> Any:
    """Returns the state that `pack` was given; tuples have become lists. Rows may follow that do not belong to it."""
    data = np.ascontiguousarray(rows).reshape(-1)
    length = int.from_bytes(data[:8].tobytes(), "little")
    with np.load(io.BytesIO(data[8 : 8 + length].tobytes()), allow_pickle=False) as archive:
        text = archive[_JSON].tobytes()

        def whole(value: Any) -> Any:
            if isinstance(value, dict):
                if set(value) == {_ARRAY}:
                    return archive[value[_ARRAY]]
                return {name: whole(part) for name, part in value.items()}
            return [whole(part) for part in value] if isinstance(value, list) else value

        return whole(json.loads(text))


def stacked(packed: Sequence[np.ndarray], num_rows: int = 0) -> np.ndarray:
    """Returns packed states as one array, uint8 [number, rows, 2^20], with as many rows as the longest, at least `num_rows`."""
    most = max([num_rows, *(len(rows) for rows in packed)])
    if len(packed) == 1 and len(packed[0]) == most:
        return packed[0][None]
    return np.stack([np.pad(rows, ((0, most - len(rows)), (0, 0))) for rows in packed])
