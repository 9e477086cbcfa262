"""Which new ids get a row: all, those seen n times, or some by chance.

In: ids of a batch that have no row, with their counts in the batch. Out: those not admitted are marked so. A rule is a table's.

`seen` counts in a filter: a *line* of 64 bytes has 25 cells of 20 bits, 12 of a fingerprint and 8 of a count. Line and
fingerprint come from the full 64-bit hash, so ids that are close together are not conflated. Bytes 0-24 are the low eight bits
of the fingerprints, 25-49 the counts (0: the cell is empty), 50-62 the other four bits, two cells a byte, and byte 63 says
whether the line has ever been full: then an id that is not there may stand in its other line. Which that is follows from line
and fingerprint, so that cells can be moved without their ids (Fan et al. 2014, "Cuckoo Filter"). A filter has two generations.
New ids go to the head; when it is full, the other one, which holds the longest untouched, is emptied and becomes the head; an
id found there moves to the head with its count. The cell of an id that was admitted is free for others; until one takes it, it
keeps its count, or an id that is conflated with it would lose what it had. (Monolith's sliding filter counts to 15 and takes
its fingerprint from 12 bits of the id itself.)

`chance` and `chance_each` need no memory (Monolith, `probabilistic_filter`): an id with c occurrences in the batch is admitted
with probability c / times, or 1 - 0.05^(c / times), which makes 95 % after `times` occurrences. What is drawn depends on the id
and the number of the plan only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from monolith_jax.ids.cuckoo import aligned_lines, many_divisors
from monolith_jax.ids.lines import NOT_ADMITTED, first_bucket, inner, jit, mix, prefetch
from monolith_jax.types import Array

CELLS = 25
GENERATIONS = 2
FULL = 0.9
"""A generation is full when this part of its cells is taken."""

_AHEAD = 12
"""New ids ahead whose lines are asked for."""
_KINDS = {"all": 0, "seen": 1, "chance": 2, "chance_each": 3}
_FINGERPRINT = np.uint64(0xD6E8FEB86659FD93)
_S32 = np.uint64(32)
_S52 = np.uint64(52)
_S11 = np.uint64(11)


@dataclass(frozen=True)
class AdmissionConfig:
    """Which new ids of a table get a row. Others read zeros and train nothing."""

    rule: Literal["all", "seen", "chance", "chance_each"] = "all"
    """all: every id; seen: from its n-th occurrence on; chance: with probability c / times for c occurrences in a batch;
    chance_each: with probability 1 - 0.05^(c / times), the same for each occurrence however they are batched."""
    times: int = 3
    """Occurrences needed (seen: 1 to 255), or the scale of the chance."""
    window: int = 0
    """seen: ids waiting to be admitted that a generation of the filter has cells for, 2.56 bytes each; there are two, so that
    nine tenths to twice nine tenths of it are remembered. 0: as many as `TableConfig.max_rows`."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: A number is out of range.
        """
        most = 255 if self.rule == "seen" else 2**31
        if self.rule not in _KINDS:
            raise ValueError(f"AdmissionConfig.rule must be one of {', '.join(_KINDS)}; got {self.rule!r}")
        if not 1 <= self.times <= most:
            raise ValueError(f"AdmissionConfig.times must be 1 to {most:,} for rule {self.rule!r}, got {self.times}")
        if self.window < 0:
            raise ValueError(f"AdmissionConfig.window must be 0 or more ids, got {self.window}")


class Rules(NamedTuple):
    """The rules of the tables of a group."""

    kinds: Array
    """int64 [T]: 0 all, 1 seen, 2 chance, 3 chance_each."""
    times: Array
    """int64 [T]"""
    num_lines: Array
    """int64 [T], lines of one generation in one shard; 0 but for `seen`."""
    offsets: Array
    """int64 [T], where each table's lines start in a shard; the generations follow each other."""
    lines_per_shard: int


def make_rules(admission: Sequence[AdmissionConfig], max_rows: Sequence[int], num_shards: int) -> Rules:
    """Returns the rules of tables with these caps."""
    num_lines = [
        -(-(config.window or rows) // (CELLS * num_shards)) if config.rule == "seen" else 0
        for config, rows in zip(admission, max_rows, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(num_lines)]).astype(np.int64) * GENERATIONS
    kinds = np.array([_KINDS[config.rule] for config in admission], np.int64)
    times = np.array([config.times for config in admission], np.int64)
    return Rules(kinds, times, np.array(num_lines, np.int64), offsets[:-1], many_divisors(max(int(offsets[-1]), 1)))


@inner
def _find_cell(line, low, high):
    """Returns the cell of a fingerprint in uint8 `line` [64], -1 if it is not there."""
    for cell in range(CELLS):
        if line[cell] == low and line[25 + cell] and (line[50 + cell // 2] >> (4 * (cell & 1))) & 15 == high:
            return cell
    return -1


@inner
def _cell_with(line, least, most):
    """Returns a cell whose count lies between `least` and `most`, -1 if there is none."""
    for cell in range(CELLS):
        if least <= line[25 + cell] <= most:
            return cell
    return -1


@inner
def _write_cell(line, cell, low, high, count):
    shift = 4 * (cell & 1)
    line[cell], line[25 + cell] = low, count
    line[50 + cell // 2] = (line[50 + cell // 2] & (240 >> shift)) | (high << shift)


@jit
def _other_line(line, num_lines, fingerprint):
    """Returns the other line of a fingerprint that stands in `line`; of the other one, it is this one."""
    other = np.int64(((mix(fingerprint) >> _S32) * np.uint64(num_lines)) >> _S32) - line
    return other + num_lines if other < 0 else other


@inner
def _locate(cells, line_a, line_b, low, high):
    """Returns line and cell of an id in a generation; cell -1: it is not there."""
    cell = _find_cell(cells[line_a], low, high)
    if cell < 0 and cells[line_a, 63]:
        return line_b, _find_cell(cells[line_b], low, high)
    return line_a, cell


@inner
def _make_room(cells, first, num_lines, line):
    """Moves one cell of a full line to an empty one of its other line; returns the emptied cell, -1 if there is none."""
    for cell in range(CELLS):
        low, high = cells[first + line, cell], (cells[first + line, 50 + cell // 2] >> (4 * (cell & 1))) & 15
        other = _other_line(line, num_lines, np.uint64(low) | (np.uint64(high) << np.uint64(8)))
        empty = _cell_with(cells[first + other], 0, 0)
        if empty >= 0:
            _write_cell(cells[first + other], empty, low, high, cells[first + line, 25 + cell])
            cells[first + line, 25 + cell] = 0
            return cell
    return -1


@inner
def _cell_for(cells, first, num_lines, line_a, line_b, times):
    """Returns line and cell for a new id: empty, emptied, of an admitted id, or of the one that was seen least often."""
    cell = _cell_with(cells[first + line_a], 0, 0)
    if cell >= 0:
        return line_a, cell
    cells[first + line_a, 63] = 1
    cell = _cell_with(cells[first + line_b], 0, 0)
    if cell >= 0:
        return line_b, cell
    cells[first + line_b, 63] = 1
    for line in (line_a, line_b):
        cell = _make_room(cells, first, num_lines, line)
        if cell >= 0:
            return line, cell
    for line in (line_a, line_b):
        cell = _cell_with(cells[first + line], times, 255)
        if cell >= 0:
            return line, cell
    least, at = line_a, 0
    for line in (line_a, line_b):
        for cell in range(CELLS):
            if cells[first + line, 25 + cell] < cells[first + least, 25 + at]:
                least, at = line, cell
    return least, at


@inner
def _seen_before(rules, cells, heads, taken, shard, table, h, count):
    """Adds occurrences to an id's count; returns whether it has been seen often enough."""
    num_lines = rules.num_lines[table]
    fingerprint = (h * _FINGERPRINT) >> _S52
    low, high = np.uint8(fingerprint & np.uint64(255)), np.uint8(fingerprint >> np.uint64(8))
    first = shard * rules.lines_per_shard + rules.offsets[table]
    head = np.int64(heads[shard, table])
    line_a = first_bucket(h, num_lines)
    line_b = _other_line(line_a, num_lines, fingerprint)
    times = rules.times[table]
    for generation in (head, 1 - head):
        start = first + generation * num_lines
        line, cell = _locate(cells, start + line_a, start + line_b, low, high)
        if cell >= 0:
            before = np.int64(cells[line, 25 + cell])
            count += before
            if count >= times or generation == head:
                cells[line, 25 + cell] = min(count, 255)
                taken[shard, table] -= count >= times and before < times and generation == head
                return count >= times
            cells[line, 25 + cell] = 0
            break
    if count >= times:
        return True
    if taken[shard, table] >= FULL * CELLS * num_lines:
        head = 1 - head
        heads[shard, table], taken[shard, table] = head, 0
        start = first + head * num_lines
        cells[start : start + num_lines] = 0
    first += head * num_lines
    line, cell = _cell_for(cells, first, num_lines, line_a, line_b, times)
    before = np.int64(cells[first + line, 25 + cell])
    taken[shard, table] += before == 0 or before >= times
    _write_cell(cells[first + line], cell, low, high, count)
    return False


@jit
def admit(rules, cells, heads, taken, distinct, plan_number, from_shard, to_shard):
    """Marks the distinct ids that have no row and get none: ABSENT becomes NOT_ADMITTED.

    Args:
        rules: Rules of the tables.
        cells: uint8 [L * lines_per_shard, 64], the filters.
        heads: int32 [L, T], which generation is the head.
        taken: int32 [L, T], cells taken in the head.
        distinct: The ids, their rows as `find` left them.
        plan_number: Number of the plan, uint64.
        from_shard, to_shard: Range of shards.
    """
    rows, of, hashes, counts, absent = distinct.rows, distinct.tables, distinct.hashes, distinct.counts, distinct.absent
    address = np.int64(cells.ctypes.data)
    salt = mix(plan_number)
    for shard in range(from_shard, to_shard):
        end = distinct.starts[shard] + distinct.num_absent[shard]
        for k in range(distinct.starts[shard], end):
            if k + _AHEAD < end and rules.kinds[of[absent[k + _AHEAD]]] == 1:
                h, table = hashes[absent[k + _AHEAD]], of[absent[k + _AHEAD]]
                head = np.int64(heads[shard, table]) * rules.num_lines[table]
                line = shard * rules.lines_per_shard + rules.offsets[table] + head
                prefetch(address + 64 * (line + first_bucket(h, rules.num_lines[table])))
            i = absent[k]
            kind, times = rules.kinds[of[i]], rules.times[of[i]]
            if kind == 1:
                if not _seen_before(rules, cells, heads, taken, shard, of[i], hashes[i], np.int64(counts[i])):
                    rows[i] = NOT_ADMITTED
            elif kind > 1:
                probability = counts[i] / times if kind == 2 else 1 - 0.05 ** (counts[i] / times)
                if np.float64(mix(hashes[i] ^ salt) >> _S11) * 2.0**-53 >= probability:
                    rows[i] = NOT_ADMITTED


def empty_filters(rules: Rules, num_shards: int) -> dict[str, np.ndarray]:
    """Returns filters that remember nothing: uint32 and int32 arrays with the shards as leading axis."""
    shape = (num_shards, rules.kinds.size)
    lines = aligned_lines(num_shards * rules.lines_per_shard)
    lines[:] = 0
    return {
        "filters": lines.reshape(num_shards, rules.lines_per_shard, 16),
        "filter_heads": np.zeros(shape, np.int32),
        "filter_taken": np.zeros(shape, np.int32),
    }
