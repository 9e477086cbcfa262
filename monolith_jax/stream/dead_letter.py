"""The file of rows that were set aside.

In: `Rejected` rows, in stream order. Out: a JSON-lines file (`where`, `reason`, `raw` a row) and counts by reason. Every
rejected row is written. The state is the file's length: a resumed run cuts the file to it, and so writes the same file
as a run that was never interrupted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from monolith_jax.types import Rejected

MAX_REASONS = 1000
"""Reasons that are counted apart: some name what stood in the row, and the counts are in memory and in every snapshot."""
FURTHER = "further reasons"


class DeadLetters:
    """Appends rejected rows to a file, and counts them by reason.

    A new one starts an empty file; `set_state` makes it go on with what an earlier run wrote.
    """

    def __init__(self, path: str | Path) -> None:
        """Touches no file yet; one that is there is cut at the first `add`, and made at the first rejected row.

        Args:
            path: The JSON-lines file. What it holds is replaced, unless `set_state` is called before the first `add`.
        """
        self.path = Path(path)
        self._bytes = 0
        self._cut = False
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """Rows by reason, most frequent first."""
        return dict(sorted(self._counts.items(), key=lambda item: (-item[1], item[0])))

    def add(self, rejected: Iterable[Rejected]) -> None:
        """Appends rows."""
        rows = list(rejected)
        if not self._cut and self.path.exists():
            os.truncate(self.path, self._bytes)
        self._cut = True
        if not rows:
            return
        letters = ({"where": row.where, "reason": row.reason, "raw": row.raw} for row in rows)
        text = "".join(json.dumps(letter, ensure_ascii=False) + "\n" for letter in letters)
        data = text.encode(errors="backslashreplace")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(data)
        self._bytes += len(data)
        for row in rows:
            known = row.reason in self._counts or len(self._counts) < MAX_REASONS
            self._counts[row.reason if known else FURTHER] += 1

    def get_state(self) -> dict[str, Any]:
        """Returns the JSON-able state: the file's length and the counts. What it speaks of is on disk when it returns."""
        if self._bytes:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return {"bytes": self._bytes, "counts": dict(self.counts)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state: cuts the file to its length.

        Raises:
            ValueError: The file is shorter than the state says.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < state["bytes"]:
            raise ValueError(
                f"{self.path}: the state has {state['bytes']} bytes of set-aside rows, the file {size}; it was cut or "
                "removed. Restore the file, or start without a state"
            )
        if size > state["bytes"]:
            os.truncate(self.path, state["bytes"])
        self._bytes = state["bytes"]
        self._cut = True
        self._counts = Counter(state["counts"])


def set_aside(counts: Mapping[str, int], file: Path) -> str:
    """Returns a line a reason, or one line that nothing was set aside.

    Args:
        counts: Rows by reason.
        file: Where such rows stand, a file or a pattern.
    """
    if not counts:
        return "no row was set aside"
    lines = [f"{sum(counts.values())} rows were set aside, see {file}"]
    return "\n".join([*lines, *(f"  {count:>8}  {reason}" for reason, count in counts.items())])
