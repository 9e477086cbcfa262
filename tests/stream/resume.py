"""What every source must hold: reading goes on from any position as if it had never stopped."""

import json
from collections import Counter
from pathlib import Path

from monolith_jax.types import Chunk, Source


def assert_resumes(source: Source) -> list[Chunk]:
    """Reads all chunks, and again from each position (through JSON); returns them."""
    chunks = list(source.read({}))
    for done, chunk in enumerate(chunks, 1):
        again = list(source.read(json.loads(json.dumps(chunk.position))))
        assert len(again) == len(chunks) - done
        for expected, got in zip(chunks[done:], again, strict=True):
            assert got.examples.equals(expected.examples)
            assert got.rejected == expected.rejected
            assert dict(got.position) == dict(expected.position)
    return chunks


def rows_of(chunks: list[Chunk]) -> list[dict]:
    """Returns all examples."""
    return [row for chunk in chunks for row in chunk.examples.to_pylist()]


def reasons_of(chunks: list[Chunk]) -> dict[str, str]:
    """Returns the reason of each row that was set aside, by place (the file's name without its folder)."""
    return {f"{Path(row.where).name}": row.reason for chunk in chunks for row in chunk.rejected}


def counts_of(chunks: list[Chunk]) -> dict[str, int]:
    """Returns how often each reason was given."""
    return dict(Counter(row.reason for chunk in chunks for row in chunk.rejected))
