"""In what two configs differ, one line a leaf: what a refused snapshot is told with.

In: two JSON-able trees. Out: lines for people.
"""

from __future__ import annotations

import json
from typing import Any


def differences(saved: Any, ours: Any, name: str = "") -> list[str]:
    """Returns a line for each leaf in which two JSON-able trees differ."""
    saved, ours = json.loads(json.dumps(saved)), json.loads(json.dumps(ours))
    if isinstance(saved, dict) and isinstance(ours, dict):
        lines = []
        for key in [*saved, *(key for key in ours if key not in saved)]:
            lines += differences(saved.get(key), ours.get(key), f"{name}.{key}" if name else key)
        return lines
    if (saved_named := _named(saved)) is not None and (ours_named := _named(ours)) is not None:
        lines = differences(saved_named, ours_named, name)
        if set(saved_named) == set(ours_named) and list(saved_named) != list(ours_named):
            # The order decides which rows and weights are whose.
            lines.append(f"{name}: {', '.join(saved_named)} in the snapshot, in the order {', '.join(ours_named)} here")
        return lines
    if isinstance(saved, list) and isinstance(ours, list) and len(saved) == len(ours):
        return [
            line for index, pair in enumerate(zip(saved, ours, strict=True)) for line in differences(*pair, f"{name}[{index}]")
        ]
    return [] if saved == ours else [f"{name}: {_short(saved)} in the snapshot, {_short(ours)} here"]


def _named(value: Any) -> dict[str, Any] | None:
    """Returns a list of configs by name, so that one added or left out is told by its name; None for all else."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return None
    names = [part.get("name", part.get("label")) for part in value]
    if None in names or len(set(names)) != len(names):
        return None
    return dict(zip(names, value, strict=True))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
