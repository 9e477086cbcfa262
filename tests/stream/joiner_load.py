"""A heavy stream through a joiner, in a process of its own: `python -m tests.stream.joiner_load FOLDER MEMORY_MB FIRST LAST`.

Prints one line of JSON a cut. The cuts are functions of their numbers, so that a run may begin at any of them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from monolith_jax.stream.events import ACTION
from monolith_jax.stream.joiner import Joiner, JoinerConfig
from monolith_jax.stream.open_rows import KINDS

WINDOW_S = 600
DISORDER_MS = 2_000


def cut_of(number: int, size: int, cuts_per_window: int) -> tuple[pa.RecordBatch, pa.RecordBatch, int]:
    """Returns `size` impressions, twice as many actions of recent ones, and the watermark."""
    rng = np.random.default_rng(number)
    width = WINDOW_S * 1000 // cuts_per_window
    start = 1_700_000_000_000 + number * width
    ids = np.arange(number * size, (number + 1) * size)
    times = np.sort(rng.integers(start, start + width, size)) + rng.integers(-DISORDER_MS, DISORDER_MS, size)
    tags = pa.ListArray.from_arrays(np.arange(size + 1, dtype=np.int32) * 3, rng.integers(0, 1000, 3 * size))
    impressions = pa.RecordBatch.from_pydict(
        {
            "event_time_ms": times,
            "request_id": ids // 8,
            "user_id": ids % 100_003,
            "video_id": ids * 7919 % 1_000_003,
            "author_id": pa.array(ids % 5003, mask=ids % 11 == 0),
            "sound_id": ids % 999,
            "tag_id": tags,
            "duration_ms": ids % 60_000,
            "ctr": rng.random(size, np.float32),
            "score": rng.random(size, np.float32),
            "age": rng.random(size, np.float32),
            "position": (ids % 8).astype(np.int32),
        }
    )
    # How many impressions ago what is acted on was shown.
    ago = rng.exponential(0.1 * cuts_per_window * size, 2 * size).astype(np.int64)
    of = np.maximum((number + 1) * size - 1 - ago, 0)
    kinds = pa.DictionaryArray.from_arrays(rng.integers(0, len(KINDS), 2 * size).astype(np.int32), list(KINDS))
    columns = [
        rng.integers(start, start + width, 2 * size),
        of // 8,
        of % 100_003,
        of * 7919 % 1_000_003,
        kinds.dictionary_decode(),
        rng.integers(0, 60_000, 2 * size),
        np.arange(number * 2 * size, (number + 1) * 2 * size),
    ]
    actions = pa.RecordBatch.from_arrays([pa.array(one) for one in columns], schema=ACTION)
    return impressions, actions, start - DISORDER_MS


def digest(examples: pa.RecordBatch | None) -> str:
    """Returns a hash of values, whatever the buffers are like."""
    found = hashlib.blake2b(digest_size=8)
    for column in () if examples is None else examples.columns:
        if column.null_count:
            found.update(column.is_valid().to_numpy(zero_copy_only=False).tobytes())
        if pa.types.is_list(column.type):
            found.update(np.diff(column.offsets.to_numpy()).tobytes())
            column = column.flatten()
        found.update(
            column.fill_null(False if pa.types.is_boolean(column.type) else 0).to_numpy(zero_copy_only=False).tobytes()
        )
    return found.hexdigest()


def anon_mb() -> float:
    """Returns the memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def run(joiner: Joiner, first: int, last: int, size: int, cuts_per_window: int) -> Iterator[dict[str, float | str]]:
    """Feeds cuts; yields what is to be told of each."""
    for number in range(first, last):
        impressions, actions, watermark = cut_of(number, size, cuts_per_window)
        began = time.perf_counter()
        examples = joiner.join(number, impressions, actions, watermark)
        yield {
            "cut": number,
            "seconds": time.perf_counter() - began,
            "examples": 0 if examples is None else examples.num_rows,
            "digest": digest(examples),
            "oldest_cut": joiner.oldest_cut,
            "num_open": joiner.num_open,
            "memory_mb": joiner.memory_bytes / 2**20,
            "spilled_mb": joiner.counts["spilled_bytes"] / 2**20,
        }


def main(folder: Path, memory_mb: float, first: int, last: int) -> None:
    """Runs with 10 million impressions open, 20,000 a cut."""
    # Everything is compiled, and the allocators have what they keep, before memory is measured.
    warm = Joiner(JoinerConfig(window_s=WINDOW_S, memory_mb=1), folder / "warm")
    for _ in run(warm, 0, 30, 20_000, 10):
        pass
    warm.close()
    del warm
    before = anon_mb()
    joiner = Joiner(JoinerConfig(window_s=WINDOW_S, memory_mb=memory_mb), folder / "spill")
    for told in run(joiner, first, last, 20_000, 500):
        print(json.dumps(told | {"anon_mb": anon_mb() - before}), flush=True)
    joiner.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
