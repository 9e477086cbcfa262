"""Holds the arithmetic of ids against arrays that are made, and its estimates against draws."""

import numpy as np
import pytest

from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.ids.footprint import ZIPF, array_bytes, bytes_of_tables, largest_part, plan_sizes, work_bytes, zipf_distinct
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.types import GroupIds

LAYOUT = MapLayout(("user", "video", "tag"), (3000, 700_000, 9), 16)
RULES = [Rule(), Rule(AdmissionConfig("seen", 3), ttl_s=60), Rule(AdmissionConfig("chance"))]


@pytest.mark.parametrize("rules", [[Rule()] * 3, RULES])
def test_arrays_of_a_group_take_what_was_said(rules: list[Rule]) -> None:
    mapper = GroupMapper(LAYOUT, [0, 1, 1, 2], 4, rules)
    arrays = {**mapper.maps.arrays._asdict(), **mapper._state(), "pinned": mapper._pinned}
    assert array_bytes(LAYOUT, rules) == {name: array.nbytes for name, array in arrays.items()}
    assert bytes_of_tables(LAYOUT, rules).sum() == pytest.approx(sum(array.nbytes for array in arrays.values()))
    assert bytes_of_tables(LAYOUT, rules).argmax() == 1
    ids = np.arange(4 * 4096).reshape(4096, 4)
    mapper.plan(GroupIds(ids, np.ones(ids.shape, np.bool_)), np.zeros(4096, np.uint32), 0, 0)
    work = mapper.work
    scratch = [*work.distinct, *work.freed, work.hashes, work.positions, work.inverse]
    scratch += [work.last_slice, work.sent_at, work.touched_at]
    assert work_bytes(LAYOUT, rules, ids.size) == pytest.approx(sum(array.nbytes for array in scratch), rel=0.02)


def drawn(rng: np.random.Generator, draws: int, rows: int) -> int:
    power = 1 - ZIPF
    ranks = ((rng.random(draws) * ((rows + 1) ** power - 1) + 1) ** (1 / power)).astype(np.int64)
    return np.unique(ranks).size


@pytest.mark.parametrize(("draws", "rows"), [(1, 10), (500, 20), (3000, 4096), (50_000, 5000), (200_000, 10**7)])
def test_zipf_distinct_is_what_is_drawn(draws: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    mean = np.mean([drawn(rng, draws, rows) for _ in range(5)])
    assert zipf_distinct(draws, rows) == pytest.approx(mean, rel=0.02)


def test_zipf_distinct_of_huge_tables_stays_between_its_limits() -> None:
    sizes = [zipf_distinct(1e6, rows) for rows in (1e6, 1e9, 1e12)]
    assert sizes == sorted(sizes)
    assert sizes[-1] < 1e6


@pytest.mark.parametrize(("number", "parts", "cells"), [(200, 64, 64 * 64), (30_000, 16, 256), (5, 4096, 4096)])
def test_largest_part_bounds_what_hashing_makes_and_not_by_far(number: int, parts: int, cells: int) -> None:
    rng = np.random.default_rng(1)
    largest = [rng.binomial(number, 1 / parts, cells).max() for _ in range(50)]
    bound = largest_part(number, parts, cells)
    assert np.mean(np.array(largest) > bound) < 0.5
    assert bound <= 1.5 * np.mean(largest) + 10


def test_one_device_gets_all() -> None:
    assert largest_part(1234, 1, 1) == 1234


def test_plan_sizes_are_those_of_a_first_plan() -> None:
    tables = [0, 1, 1, 1]
    ids = np.concatenate([np.arange(2048)[:, None], np.arange(3 * 2048).reshape(2048, 3)], axis=1)
    mapper = GroupMapper(LAYOUT, tables, 8)
    plan, _, stats = mapper.plan(GroupIds(ids, np.ones(ids.shape, np.bool_)), np.zeros(2048, np.uint32), 0, 0)
    sizes = plan_sizes(LAYOUT, tables, 2048, 8, min)
    assert sizes.in_batch == stats["unique"]
    assert sizes.touched == pytest.approx(plan.touched.shape[1], rel=0.1)
    assert sizes.sent == pytest.approx(plan.sent.shape[2], rel=0.1)
    assert sizes.fresh == plan.fresh_rows.shape[1]
