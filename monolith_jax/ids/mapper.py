"""The ids of a batch to a plan, for all tables in one call a step.

In: the ids of each group of tables, event times, and the time. Out: a `Plan`, and the rows it freed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from monolith_jax.ids.group import GroupMapper
from monolith_jax.types import GroupIds, Plan


class Mapper:
    """Maps the ids of all groups of a model."""

    def __init__(self, groups: Sequence[GroupMapper]) -> None:
        """Takes over the groups, in the model's order."""
        self.groups = tuple(groups)

    def plan(
        self, batch: Sequence[GroupIds], event_time_ms: np.ndarray, now_ms: int = 0, plan_number: int = 0, insert: bool = True
    ) -> Plan:
        """Returns the plan of one batch.

        Args:
            batch: int64 ids of each group.
            event_time_ms: int64 [B], ms.
            now_ms: The time in ms, never less than in the plan before: expiry goes by it.
            plan_number: How many plans there were before.
            insert: See `GroupMapper.plan`.
        """
        seen_s = np.clip(event_time_ms // 1000, 0, 2**32 - 1).astype(np.uint32)
        plans, freed, totals = [], [], {}
        for group, ids in zip(self.groups, batch, strict=True):
            plan, freed_of_group, stats = group.plan(ids, seen_s, now_ms // 1000, plan_number, insert)
            plans.append(plan)
            freed.append(freed_of_group)
            for name, value in stats.items():
                totals[name] = totals.get(name, 0.0) + value
        for name in ("padding", "load", "probe_length"):
            totals[name] /= len(plans)
        if "known" in totals:
            known = totals.pop("known")
            totals["hit_rate"] = 1 - totals["loaded"] / known if known else 1.0
        return Plan(tuple(plans), tuple(freed), totals, tuple(group.tier and group.tier.moves for group in self.groups))

    def get_state(self) -> list[dict[str, np.ndarray]]:
        """Returns a copy of everything, one mapping of arrays a group."""
        return [group.get_state() for group in self.groups]

    def set_state(self, state: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Takes over what `get_state` returned.

        Raises:
            ValueError: The state is of another layout or damaged.
        """
        for group, of_group in zip(self.groups, state, strict=True):
            group.set_state(of_group)
