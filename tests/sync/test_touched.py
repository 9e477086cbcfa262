"""What has changed since the last publication: a reader that applies it holds what a plain dict of the plans holds."""

from collections.abc import Sequence

import numpy as np
import pytest

from monolith_jax.ids.admission import AdmissionConfig
from monolith_jax.ids.cuckoo import MapLayout
from monolith_jax.ids.group import GroupMapper, Rule
from monolith_jax.ids.mapper import Mapper
from monolith_jax.sync.touched import Taken, Touched
from monolith_jax.types import FreedRows, GroupPlan
from tests.ids.test_mapper import draw

LAYOUTS = (MapLayout(("user", "video"), (30, 50), 8), MapLayout(("tag",), (20,), 8))
Values = dict[str, dict[int, float]]


class Owner:
    """Rows of one group as a dict: which id has each, and the step that last wrote it."""

    def __init__(self, layout: MapLayout, rng: np.random.Generator) -> None:
        self.layout, self.rng = layout, rng
        self.at: dict[tuple[int, int], tuple[int, int]] = {}  # (table, id) -> (shard, row in the shard's table)
        self.values = np.zeros(layout.num_shards * layout.rows_per_shard)

    def place(self, table: int, shard: int, row: int) -> int:
        return shard * self.layout.rows_per_shard + int(self.layout.row_offsets[table]) + row

    def plan(self, step: int, num_devices: int) -> tuple[GroupPlan, FreedRows]:
        """Makes a plan: some rows touched, some fresh, and others freed, which the next plan may give out."""
        rng, layout = self.rng, self.layout
        known = list(self.at)
        touched = [known[index] for index in rng.permutation(len(known))[: rng.integers(0, 8)]]
        fresh: dict[tuple[int, int], tuple[int, int]] = {}
        used = {(table, *where) for (table, _), where in self.at.items()}
        for _ in range(rng.integers(0, 6)):
            table, shard = int(rng.integers(len(layout.names))), int(rng.integers(layout.num_shards))
            key = (table, int(rng.integers(0, 25)) * 2**58 - 2**62)
            free = [row for row in range(layout.caps[table]) if (table, shard, row) not in used]
            if key not in self.at and key not in fresh and free:
                fresh[key] = (shard, int(rng.choice(free)))
                used.add((table, *fresh[key]))
        self.at |= fresh
        all_touched = touched + list(fresh)
        gone = [key for key in self.at if key not in all_touched and rng.random() < 0.15]
        freed = [(key[1], key[0], *self.at.pop(key)) for key in gone]
        for key in all_touched:
            self.values[self.place(key[0], *self.at[key])] = step
        places = sorted((self.place(key[0], *self.at[key]), key) for key in fresh)
        rows = sorted(self.place(key[0], *self.at[key]) for key in all_touched)
        per_device = self.values.size // num_devices
        padded = np.arange(per_device, per_device + 16, dtype=np.int32)
        plan = np.tile(padded, (num_devices, 1)), np.tile(padded, (num_devices, 1))
        fresh_ids, fresh_tables = np.zeros((num_devices, 16, 2), np.uint32), np.zeros((num_devices, 16), np.int32)
        for device in range(num_devices):
            mine = [row % per_device for row in rows if row // per_device == device]
            plan[0][device, : len(mine)] = mine
            of_device = [(row % per_device, key) for row, key in places if row // per_device == device]
            for index, (row, (table, identity)) in enumerate(of_device):
                plan[1][device, index], fresh_tables[device, index] = row, table
                fresh_ids[device, index] = np.array([identity], np.int64).view(np.uint32)
        columns = np.array(freed, np.int64).reshape(-1, 4).T
        of_group = FreedRows(columns[0], *(column.astype(np.int32) for column in columns[1:]))
        return GroupPlan(plan[0], None, None, plan[1], fresh_ids, fresh_tables, None), of_group

    def live(self) -> Values:
        found: Values = {name: {} for name in self.layout.names}
        for (table, identity), where in self.at.items():
            found[self.layout.names[table]][identity] = float(self.values[self.place(table, *where)])
        return found


def read(reader: Values, taken: Taken, layouts: Sequence[MapLayout], values: Sequence[np.ndarray]) -> None:
    """Applies a publication as a reader does: deletions, then rows."""
    for name, ids in taken.deleted.items():
        assert len(set(ids.tolist())) == ids.size
        for identity in ids.tolist():
            reader[name].pop(identity, None)
    for layout, group, of_group in zip(layouts, taken.groups, values, strict=True):
        assert np.all(np.diff(group.rows) > 0)
        for row, identity, table in zip(*(column.tolist() for column in group), strict=True):
            reader[layout.names[table]][identity] = float(of_group[row])


def read_nothing() -> Values:
    return {name: {} for layout in LAYOUTS for name in layout.names}


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("seed", range(4))
def test_a_reader_holds_what_the_plans_left(num_devices: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    owners = [Owner(layout, rng) for layout in LAYOUTS]
    touched, reader, lost = Touched(LAYOUTS), read_nothing(), 0
    deletions = 0
    for step in range(1, 300):
        plans, freed = zip(*(owner.plan(step, num_devices) for owner in owners), strict=True)
        touched.follow(plans, freed)
        if rng.random() < 0.3:
            taken = touched.take()
            if rng.random() < 0.3:
                lost += 1
                # The trainer goes on while the write fails.
                plans, freed = zip(*(owner.plan(step + 1000, num_devices) for owner in owners), strict=True)
                touched.follow(plans, freed)
                touched.failed()
                continue
            read(reader, taken, LAYOUTS, [owner.values for owner in owners])
            deletions += sum(ids.size for ids in taken.deleted.values())
            touched.done()
            assert reader == owners[0].live() | owners[1].live()
            assert touched.num_changed == 0
    assert lost > 5 and deletions > 50


def test_only_what_changed_is_taken() -> None:
    rng = np.random.default_rng(0)
    owner = Owner(LAYOUTS[0], rng)
    touched = Touched(LAYOUTS[:1])
    for step in range(1, 100):
        plan, freed = owner.plan(step, 2)
        touched.follow([plan], [freed])
        taken, now = touched.take(), owner.live()
        touched.done()
        group = taken.groups[0]
        ids = {(owner.layout.names[t], i) for i, t in zip(group.ids.tolist(), group.tables.tolist(), strict=True)}
        assert ids == {(name, one) for name, of in now.items() for one, value in of.items() if value == step}
        deleted = {(name, one) for name, of in taken.deleted.items() for one in of.tolist()}
        names = [owner.layout.names[table] for table in freed.tables.tolist()]
        assert deleted == set(zip(names, freed.ids.tolist(), strict=True))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_with_the_plans_of_a_mapper_that_frees_rows(num_devices: int) -> None:
    rng = np.random.default_rng(3)
    layout, tables = LAYOUTS[0], (0, 1, 0, 1, 1)
    rules = (Rule(AdmissionConfig(), ttl_s=4), Rule(AdmissionConfig(), ttl_s=9))
    mapper = Mapper([GroupMapper(layout, tables, num_devices, rules)])
    touched, reader = Touched([layout]), {name: {} for name in layout.names}
    values, totals = np.zeros(layout.num_shards * layout.rows_per_shard), {"expired": 0.0, "freed_at_cap": 0.0}
    per_device = values.size // num_devices
    maps = mapper.groups[0].maps
    for step in range(1, 200):
        if step == 100:
            # A run that goes on: what it knows comes from the restored maps.
            touched = Touched([layout])
            touched.restore([maps])
        batch = draw(rng, 16, pool=200, tables=tables)
        plan = mapper.plan([batch], np.full(16, 1000 * step), 1000 * step, step)
        device, at = np.nonzero(plan.groups[0].touched < per_device)
        values[device * per_device + plan.groups[0].touched[device, at]] = step
        touched.follow(plan.groups, plan.freed)
        totals = {name: totals[name] + plan.stats[name] for name in totals}
        if step % 3 == 0 or step == 99:
            read(reader, touched.take(), [layout], [values])
            touched.done()
            live: Values = {}
            for table, name in enumerate(layout.names):
                ids, shards, rows, _ = maps.entries(table)
                places = shards.astype(np.int64) * layout.rows_per_shard + layout.row_offsets[table] + rows
                live[name] = dict(zip(ids.tolist(), values[places].tolist(), strict=True))
            assert reader == live
            everything = read_all(touched, layout, values)
            assert everything == live
    assert min(totals.values()) > 20, totals


def read_all(touched: Touched, layout: MapLayout, values: np.ndarray) -> Values:
    reader: Values = {name: {} for name in layout.names}
    read(reader, Taken(touched.live(), {}), [layout], [values])
    return reader


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_readers_hold_from_after_the_restored_state(num_processes: int) -> None:
    layout, tables = LAYOUTS[0], (0, 1, 0, 1, 1)
    whole = GroupMapper(layout, tables, 2)
    ids = np.arange(20) * 2**59
    whole.maps.lookup_or_insert(ids, 1, np.zeros(20, np.uint32))
    theirs = np.concatenate([ids[5:10], ids[5:7], ids[:3] + 1])
    found, gone = [], []
    for process in range(num_processes):
        maps = GroupMapper(layout, tables, 2, process_id=process, num_processes=num_processes).maps
        state, part = whole.maps.get_state(), layout.num_shards // num_processes
        maps.set_state({name: array[process * part : (process + 1) * part] for name, array in state.items()})
        touched = Touched([layout], process, num_processes)
        touched.restore([maps])
        touched.rewind("video", theirs, [maps])
        touched.rewind("no such table", theirs, [maps])
        taken = touched.take()
        found += taken.groups[0].ids.tolist()
        gone += taken.deleted.get("video", np.zeros(0)).tolist()
        assert (taken.groups[0].tables == 1).all() and "user" not in taken.deleted
    assert sorted(found) == sorted(ids[5:10].tolist())
    assert sorted(gone) == sorted((ids[:3] + 1).tolist())
