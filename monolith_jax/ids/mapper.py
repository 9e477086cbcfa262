"""The ids of a batch to a plan, for all tables in one call a step.

In: the ids of each group of tables, event times, and the time. Out: a `Plan`, and the rows it freed. Where several processes
share the shards, each gives its part of the batch and gets its part of the plan, and all call in step: what they ask of one
another crosses in one exchange for all groups, what the owners answer in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from monolith_jax.ids.cuckoo import ladder
from monolith_jax.ids.group import GroupMapper
from monolith_jax.ids.messages import everyone
from monolith_jax.ids.owners import WORDS, Answered, Asked, OwnedGroup, Sizes
from monolith_jax.types import Exchange, GroupIds, Moves, Plan


class Mapper:
    """Maps the ids of all groups of a model."""

    def __init__(self, groups: Sequence[GroupMapper], num_devices: int = 1, exchange: Exchange | None = None) -> None:
        """Takes over the groups, in the model's order.

        Args:
            groups: Of each group its maps; with an exchange, made for this process's shards.
            num_devices: S; looked at where there is an exchange.
            exchange: To the other processes; none: this is the only one.
        """
        self.groups = tuple(groups)
        self._exchange = exchange
        self._owned = tuple(OwnedGroup(group, num_devices, exchange.num_processes) for group in groups) if exchange else ()

    def plan(
        self, batch: Sequence[GroupIds], event_time_ms: np.ndarray, now_ms: int = 0, plan_number: int = 0, insert: bool = True
    ) -> Plan:
        """Returns the plan of one batch.

        Args:
            batch: int64 ids of each group, of this process's part of the batch.
            event_time_ms: int64 [B], ms.
            now_ms: The time in ms, never less than in the plan before: expiry goes by it.
            plan_number: How many plans there were before.
            insert: See `GroupMapper.plan`.
        """
        seen_s = np.clip(event_time_ms // 1000, 0, 2**32 - 1).astype(np.uint32)
        if self._exchange:
            return self._plan_together(self._exchange, batch, seen_s, now_ms // 1000, plan_number, insert)
        plans, freed, totals = [], [], {}
        for group, ids in zip(self.groups, batch, strict=True):
            plan, freed_of_group, stats = group.plan(ids, seen_s, now_ms // 1000, plan_number, insert)
            plans.append(plan)
            freed.append(freed_of_group)
            for name, value in stats.items():
                totals[name] = totals.get(name, 0.0) + value
        return Plan(tuple(plans), tuple(freed), _with_shares(totals, sum(plan.touched.size for plan in plans)), self._moves())

    def _plan_together(
        self, exchange: Exchange, batch: Sequence[GroupIds], seen_s: np.ndarray, now_s: int, plan_number: int, insert: bool
    ) -> Plan:
        asked = [group.ask(ids, seen_s) for group, ids in zip(self._owned, batch, strict=True)]
        received = exchange.swap(_questions(exchange, asked))
        answered: list[Answered] = []
        numbers, words = _from_questions(received, [one.numbers.size // exchange.num_processes for one in asked])
        for group, of_group, words_of_group in zip(self._owned, numbers, words, strict=True):
            answered.append(group.answer(of_group, words_of_group, now_s, plan_number, insert))
        needed, stats = _agree(exchange, answered)
        if stats.get("too_few_slots"):
            self._refuse(exchange)
        # Bits, so a 192nd of the questions, rounded up for the words of each.
        replies = exchange.swap(_replies(answered, received.shape[1] // (32 * WORDS) + 1))
        bits = np.unpackbits(replies.view(np.uint8), axis=1, bitorder="little").view(np.bool_)
        parts, at = [np.split(one.numbers, exchange.num_processes) for one in asked], np.zeros(exchange.num_processes, np.int64)
        plans = []
        for index, group in enumerate(self._owned):
            lengths = [int(part.sum()) for part in parts[index]]
            has_row = np.concatenate([bits[p, at[p] : at[p] + length] for p, length in enumerate(lengths)])
            at += lengths
            plans.append(group.plan(batch[index], asked[index], answered[index], has_row, needed[index]))
        rows = sum(plan.touched.size for plan in plans) * exchange.num_processes
        return Plan(tuple(plans), tuple(one.freed for one in answered), _with_shares(stats, rows), self._moves())

    def _moves(self) -> tuple[Moves | None, ...]:
        return tuple(group.tier.moves if group.tier else None for group in self.groups)

    def _refuse(self, exchange: Exchange) -> None:
        """Ends all processes where the rows of a batch do not fit into the slots of one, with its words."""
        words = ""
        try:
            for group in self.groups:
                if group.tier:
                    group.tier.check()
        except ValueError as error:
            words = str(error)
        raise ValueError(next(said for said in everyone(exchange, words) if said))

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


def _with_shares(counts: dict[str, float], num_touched: int) -> dict[str, float]:
    """Returns the stats of a plan: counts of all groups and processes, and what follows from them.

    Args:
        counts: As `GroupMapper.plan` returns them, summed.
        num_touched: Places for touched rows, padding included.
    """
    slots, looks, unique = counts.pop("slots"), counts.pop("second_looks"), counts["unique"]
    if "known" in counts:
        known = counts.pop("known")
        counts["hit_rate"] = 1 - counts["loaded"] / known if known else 1.0
        del counts["too_few_slots"]
    shares = {"load": counts["rows"] / slots, "probe_length": 1 + looks / max(unique, 1)}
    return counts | shares | {"padding": 1 - (unique - counts["unknown"]) / num_touched}


def _questions(exchange: Exchange, asked: Sequence[Asked]) -> np.ndarray:
    """Returns what each owner is asked, uint32 [P, n]: of each group how many ids of each shard, then the ids of each group."""
    num_processes = exchange.num_processes
    blocks = []
    parts = [np.split(one.numbers, num_processes) for one in asked]
    ends = [np.array([part.sum() for part in of_group]).cumsum() for of_group in parts]
    for owner in range(num_processes):
        heads = [of_group[owner].astype(np.uint32) for of_group in parts]
        firsts = [0 if owner == 0 else end[owner - 1] for end in ends]
        ids = [one.words[first : end[owner]].reshape(-1) for one, first, end in zip(asked, firsts, ends, strict=True)]
        blocks.append(np.concatenate([*heads, *ids]))
    longest = max(block.size for block in blocks)
    size = ladder(int(exchange.gather(np.array([longest], np.uint32)).max()))
    return np.stack([np.pad(block, (0, size - block.size)) for block in blocks])


def _from_questions(received: np.ndarray, shards: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns of each group the numbers, int64 [P, L / P], and the words, uint32 [N, 6], the processes' one after the other."""
    numbers, at = [], 0
    for of_group in shards:
        numbers.append(received[:, at : at + of_group].astype(np.int64))
        at += of_group
    words, places = [], np.full(len(received), at)
    for of_group in numbers:
        ends = places + WORDS * of_group.sum(1)
        pieces = [block[first:end] for block, first, end in zip(received, places, ends, strict=True)]
        words.append(np.concatenate(pieces).reshape(-1, WORDS))
        places = ends
    return numbers, words


def _agree(exchange: Exchange, answered: Sequence[Answered]) -> tuple[list[Sizes], dict[str, float]]:
    """Returns of each group the sizes that the neediest owner needs, and the stats of all groups and processes."""
    # Groups in two tiers count more.
    names = list(dict.fromkeys(name for one in answered for name in one.stats))
    mine = np.array([[*one.needed, *(one.stats.get(name, 0.0) for name in names)] for one in answered], np.float64)
    words = exchange.gather(mine.reshape(-1).view(np.uint32))
    theirs = np.ascontiguousarray(words).view(np.float64).reshape(exchange.num_processes, *mine.shape)
    needed = [Sizes(*(int(size) for size in sizes)) for sizes in theirs[:, :, :3].max(0)]
    stats = dict(zip(names, theirs[:, :, 3:].sum((0, 1)).tolist(), strict=True))
    return needed, stats


def _replies(answered: Sequence[Answered], size: int) -> np.ndarray:
    """Returns for each process the bits of all groups, uint32 [P, size]."""
    bits = [np.concatenate(of_process) for of_process in zip(*(one.has_row for one in answered), strict=True)]
    packed = [np.packbits(of_process, bitorder="little") for of_process in bits]
    return np.stack([np.pad(one, (0, 4 * size - one.size)) for one in packed]).view(np.uint32)
