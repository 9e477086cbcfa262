"""Going on from a snapshot whose tables were smaller, or whose ids came and left by other rules.

In: a snapshot of the same run but for `max_rows` (now at least as large), admission and `ttl_s` of its tables. Out: state and
host state for the new sizes: every id keeps its shard, its row within its table, its vector and its optimizer state. Filters
start empty where their size changed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monolith_jax.ids.cuckoo import IdMaps
from monolith_jax.ids.mapper import Mapper
from monolith_jax.mesh import ROWS, sharding
from monolith_jax.snapshot import Restored, Snapshots, differences
from monolith_jax.tables.table import Group, TableConfig, make_groups
from monolith_jax.train.state import Model, TrainState

_MAY_CHANGE = ("max_rows", "admission", "ttl_s")


def can_grow(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Returns whether two identities differ, but in nothing except what may change about tables."""
    if not differences(saved, ours) or differences(_without_sizes(saved), _without_sizes(ours)):
        return False
    rows = {table["name"]: table["max_rows"] for table in ours["tables"]}
    return all(table["max_rows"] <= rows[table["name"]] for table in saved["tables"])


def _without_sizes(identity: Mapping[str, Any]) -> dict[str, Any]:
    plain = copy.deepcopy(dict(identity))
    plain["tables"] = [{name: value for name, value in table.items() if name not in _MAY_CHANGE} for table in plain["tables"]]
    return plain


def restore_grown(
    snapshots: Snapshots, step: int, model: Model, state: TrainState, mapper: Mapper, tables: Sequence[TableConfig]
) -> Restored:
    """Returns a snapshot of smaller tables as one of this model.

    Args:
        snapshots: Where it is.
        step: Which one; `can_grow` must hold for it.
        model: The model with its new sizes.
        state: A state of the model; without a sharding where all rows are to come as a numpy array (`Tiers.like`).
        mapper: Its id maps, empty, for their sizes; unchanged.
        tables: The tables of the model.
    """
    identity = snapshots.read_meta(step)["identity"]
    old_rows = {table["name"]: table["max_rows"] for table in identity["tables"]}
    old_tables = [dataclasses.replace(table, max_rows=old_rows[table.name]) for table in tables]
    old_groups = make_groups(old_tables, model.groups[0].maps.num_shards)
    by_rows = sharding(model.mesh, ROWS)
    like = tuple(
        jax.ShapeDtypeStruct(old.shape, old.rows.array_dtype, sharding=None if new.tiered else by_rows)
        for old, new in zip(old_groups, model.groups, strict=True)
    )
    restored = snapshots.restore(step, state._replace(groups=like), identity)
    arrays, maps = [], []
    empty = mapper.get_state()
    for old, new, array, of_group, fresh in zip(
        old_groups, model.groups, restored.state.groups, restored.host["maps"], empty, strict=True
    ):
        arrays.append(_grown_array(old, new, array, by_rows))
        maps.append(_grown_maps(old, new, of_group, fresh))
    return dataclasses.replace(
        restored, state=restored.state._replace(groups=tuple(arrays)), host={**restored.host, "maps": maps}
    )


def _grown_array(old: Group, new: Group, array: Any, by_rows: Any) -> Any:
    """Returns the array with each table's rows where they belong now, on the device or not as it was."""
    parts = list(zip(old.maps.row_offsets, new.maps.row_offsets, old.maps.caps, strict=True))
    if isinstance(array, np.ndarray):
        whole = np.zeros(new.shape, array.dtype)
        for at, to, rows in parts:
            whole[:, to : to + rows] = array[:, at : at + rows]
        return whole

    def move(array: jax.Array) -> jax.Array:
        grown = jnp.zeros(new.shape, array.dtype)
        for at, to, rows in parts:
            grown = grown.at[:, to : to + rows].set(array[:, at : at + rows])
        return grown

    return jax.jit(move, out_shardings=by_rows)(array)


def _grown_maps(old: Group, new: Group, state: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of a group's mapper for its new sizes; `fresh` is that of one without ids."""
    smaller, larger = IdMaps(old.maps), IdMaps(new.maps)
    smaller.set_state(state)
    larger.grow_from(smaller)
    kept = {name: state[name] for name in ("wanted", "sizes")}
    filters = [name for name in fresh if name.startswith("filter")]
    if all(state[name].shape == fresh[name].shape for name in filters):
        kept |= {name: state[name] for name in filters}
    return {**fresh, **kept, **larger.get_state()}
